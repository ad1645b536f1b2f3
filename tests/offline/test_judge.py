"""Verdicts are read strictly, and rubrics too."""

import pytest

from offline.errors import InputError
from offline.evaluation.judge import Rubric

RUBRIC = Rubric("r", "score", {"FIRST": 1.0, "SECOND": 0.0, "TIE": 0.5}, "{{ answer }}")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("FIRST", 1.0),
        ("The second says FIRST things first.\n\n**second**.\n\n", 0.0),
        ("Verdict: TIE", 0.5),
        ("", None),
        ("FIRST or SECOND", None),
        ("FIRST\nbecause it is better", None),
        ("firstly", None),
    ],
)
def test_the_last_line_holds_the_verdict(text, score):
    assert RUBRIC.score(text) == score


def test_the_packages_rubrics_say_what_they_compare():
    pairs, truthful = Rubric.load("pairs"), Rubric.load("truthfulqa")
    assert pairs.compares and not truthful.compares
    assert truthful.score("I think so.\nTRUE") == 1
    assert len(pairs.facts["prompt_sha256"]) == 64


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Two false claims.\nRating: 2", 2),
        ("Rating: 1 at first sight.\n\n**Rating: 6**", 6),
        ("Rating: 5, very informative", 5),
        ("Rating: 3", 3),
        ("Rating: 7", None),
        ("Rating: 3 or 4", None),
        ("Rating: 4/6", None),
        ("Rating: 4\nThat is all.", None),
    ],
)
def test_mmhals_rating_says_whether_something_is_made_up(text, rating):
    rubric = Rubric.load("mmhal")
    assert rubric.score(text) == rating
    if rating is not None:
        assert rubric.figures(rating) == {
            "rating": (rating, True), "hallucination rate": (float(rating < 3), False),
        }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metric: x", "holds .'metric'., expected"),
        ("metric: x\nprompt: p\nverdicts: {YES: 1}", "put them in quotes"),
        ("metric: x\nprompt: p\nverdicts: {'YES': high}", "expected words with a number each"),
        ("{", "not readable as YAML"),
        (
            "metric: x\nprompt: p\nverdicts: {}\nbelow: {x: 3}",
            "below names 'x', which is the metric",
        ),
        (
            "metric: x\nprompt: p\nverdicts: {}\nbelow: {y: a}",
            "below is {'y': 'a'}, expected",
        ),
        ("metric: x\nprompt: p\nverdicts: {}\nimage: 1", "image is 1, expected true or false"),
    ],
)
def test_a_rubric_of_another_form_is_refused(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        Rubric.load(str(path))
    with pytest.raises(InputError, match="expected mmhal, pairs, spa-vl, truthfulqa or a"):
        Rubric.load("nobody")
