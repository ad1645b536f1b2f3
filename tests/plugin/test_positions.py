"""Positions: one interval around the end of the prompt, written in words."""

import pytest

from grains_vllm.positions import Positions, PositionsError


@pytest.mark.parametrize(
    ("text", "canonical", "interval"),
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
def test_words_and_intervals(text, canonical, interval):
    positions = Positions.parse(text)
    assert str(positions) == canonical
    assert Positions.parse(canonical) == positions
    assert positions.interval(10) == interval


@pytest.mark.parametrize(
    "text",
    ["", "ALL", "prompt:0", "prompt:-1", "prompt:01", "prompt:1.5", "generation:", "all+prompt",
     "prompt+prompt:2", "prompt +generation", "prompt:" + "9" * 10, 3, None, ["all"], "x" * 500],
)  # fmt: skip
def test_refuses(text):
    with pytest.raises(PositionsError, match="is not one of all, prompt, prompt:N") as error:
        Positions.parse(text)
    assert len(str(error.value)) < 250
