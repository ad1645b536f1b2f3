"""Positions: an interval around the end of the prompt or a kind of tokens, written in words."""

import pytest

from grains_vllm.positions import Positions, PositionsError


@pytest.mark.parametrize(
    ("text", "canonical", "span"),
    [
        ("all", "all", (0, None)),
        ("prompt", "prompt", (0, 10)),
        ("prompt:3", "prompt:3", (7, 10)),
        ("prompt:99", "prompt:99", (0, 10)),
        ("generation", "generation", (10, None)),
        ("generation:2", "generation:2", (10, 12)),
        ("prompt:1+generation", "prompt:1+generation", (9, None)),
        ("generation:4+prompt:1", "prompt:1+generation:4", (9, 14)),
        ("prompt+generation:4", "prompt+generation:4", (0, 14)),
        ("generation+prompt", "all", (0, None)),
    ],
)
def test_words_and_intervals(text, canonical, span):
    positions = Positions.parse(text)
    assert str(positions) == canonical
    assert Positions.parse(canonical) == positions
    assert positions.needs_border == (text not in ("all", "generation+prompt"))
    # What the tokens hold makes no difference.
    assert positions.spans(10) == positions.spans(10, [("image", 3, 8)]) == [span]


@pytest.mark.parametrize(
    ("held", "text", "image"),
    [
        ([], [(0, None)], []),
        ([("image", 3, 8)], [(0, 3), (8, None)], [(3, 8)]),
        ([("image", 0, 4), ("image", 9, 10)], [(4, 9), (10, None)], [(0, 4), (9, 10)]),
        # Two that touch are one; so are the rows between whose ends there is a line break, or none.
        ([("image", 2, 4), ("image", 4, 6), ("image", 7, 8)], [(0, 2), (6, 7), (8, None)],
         [(2, 6), (7, 8)]),
        # Features of other media are neither.
        ([("video", 2, 4), ("image", 4, 6)], [(0, 2), (6, None)], [(4, 6)]),
        ([("image", 0, 10)], [(10, None)], [(0, 10)]),
    ],
)  # fmt: skip
def test_kinds_of_tokens(held, text, image):
    for border in (3, 10):
        assert Positions.parse("text").spans(border, held) == text
        assert Positions.parse("image").spans(border, reversed(held)) == image
    for word in ("text", "image"):
        positions = Positions.parse(word)
        assert str(positions) == word and not positions.needs_border


@pytest.mark.parametrize(
    "text",
    ["", "ALL", "prompt:0", "prompt:-1", "prompt:01", "prompt:1.5", "generation:", "all+prompt",
     "prompt+prompt:2", "prompt +generation", "text+generation", "image:3", "Image",
     "prompt:" + "9" * 10, 3, None, ["all"], "x" * 500],
)  # fmt: skip
def test_refuses(text):
    with pytest.raises(
        PositionsError, match="is not one of all, text, image, prompt, prompt:N"
    ) as error:
        Positions.parse(text)
    assert len(str(error.value)) < 250
