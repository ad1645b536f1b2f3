"""Repetition by hand-counted examples."""

import pytest

from offline.evaluation.text_statistics import distinct, words


def test_distinct_counts_different_ngrams():
    text = "the sea the sea the sky"
    assert distinct(text, 1) == pytest.approx(3 / 6)
    assert distinct(text, 2) == pytest.approx(3 / 5)  # the sea, sea the, the sky
    assert distinct(text, 3) == pytest.approx(3 / 4)  # one repeated: the sea the
    assert distinct("no no no no", 1) == pytest.approx(1 / 4)


def test_short_and_empty_answers_repeat_nothing():
    assert distinct("", 1) == distinct("yes", 2) == 1.0


def test_words_are_split_from_marks_in_any_case_and_script():
    assert words("It's über-COOL, ja!") == ["it", "'", "s", "über", "-", "cool", ",", "ja", "!"]
