"""How a person says which points to measure."""

from dataclasses import replace

import pytest
import torch

from offline.errors import InputError
from offline.grid import grid, layer_sets, parse_positions, parse_strengths
from offline.scoring import Point
from tests.tiny import random_vector


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("single", [(0,), (1,), (2,), (3,)]),
        ("all", [(0, 1, 2, 3)]),
        ("3;2-3; all", [(3,), (2, 3), (0, 1, 2, 3)]),
        ("ranges", [(0, 1), (1, 2), (2, 3)]),
        ("ranges:3", [(0, 1, 2), (1, 2, 3)]),
        ("0,2-3", [(0, 2, 3)]),
        ("0-3;all", [(0, 1, 2, 3)]),
    ],
)
def test_layers(text, expected):
    assert layer_sets(text, "v", random_vector("llama", 0)) == expected


def test_ranges_of_nine_layers():
    vector = random_vector("llama", 0)
    model = replace(vector.model, num_layers=9)
    nine = replace(
        vector, directions=vector.directions[:1].expand(9, -1).contiguous(),
        reference_norms=torch.ones(9), model=model,
    )  # fmt: skip
    sets = layer_sets("ranges", "v", nine)
    assert [len(chosen) for chosen in sets] == [2] * 8 + [4] * 3 + [8]
    assert sets[8:11] == [(0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 6, 7)]


def test_layers_that_cannot_be_steered_are_left_out():
    vector = random_vector("llama", 0)
    directions, norms = vector.directions.clone(), vector.reference_norms.clone()
    directions[0], norms[2] = 0, 0
    vector = replace(vector, directions=directions, reference_norms=norms)
    assert layer_sets("single;all", "v", vector) == [(1,), (3,), (1, 3)]
    with pytest.raises(InputError, match=r"'v' steers \[1, 3\], not \[0\]"):
        layer_sets("0-1", "v", vector)


@pytest.mark.parametrize("text", ["", "single;", "2-1", "4", "-1", "ranges:0", "ranges:5", "one"])
def test_bad_layers(text):
    with pytest.raises(InputError, match="--layers is '"):
        layer_sets(text, "v", random_vector("llama", 0))


def test_strengths_and_positions():
    assert parse_strengths("0.1, -2,0.1,-0") == [0.1, -2.0, 0.0]
    assert str(parse_strengths("-0")[0]) == "0.0"
    assert parse_positions("generation,all,all") == ["generation", "all"]
    assert parse_positions("generation+prompt:1, prompt+generation,all") == [
        "prompt:1+generation", "all",
    ]  # fmt: skip
    for text in ("", "0.1,", "nan", "inf", "1e9", "a"):
        with pytest.raises(InputError, match="--strengths is '"):
            parse_strengths(text)
    for text in ("", "both", "all;prompt", "all,", "prompt:0", "prompt:1+prompt", "all+prompt"):
        with pytest.raises(
            InputError, match=r"--positions is '.*' is not one of all, text, image, prompt"
        ):
            parse_positions(text)


def test_every_point_once():
    vectors = {"a": random_vector("llama", 0), "b": random_vector("llama", 1)}
    points = grid(vectors, "3;all;3", "0.1,0.2,0.1", "all,prompt")
    assert len(points) == len(set(points)) == 2 * 2 * 2 * 2
    assert points[0] == Point("a", (3,), 0.1, "all")
