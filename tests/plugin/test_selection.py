"""What requests may say, and what they get."""

import pytest

from grains_vllm.selection import SelectionError, select


def chosen(extra_args, catalogue):
    steering = select(extra_args, catalogue)
    return steering and (steering.entry.name, steering.strength, steering.positions)


def test_prompt_tokens(catalogue):
    asked = {"steering": "truthful", "steering_positions": "generation"}
    assert select(asked, catalogue()).prompt_tokens is None
    assert select({**asked, "steering_prompt_tokens": 7}, catalogue()).prompt_tokens == 7
    default = catalogue(default="polite")  # whose positions are "prompt"
    assert select({"steering_prompt_tokens": 7}, default).prompt_tokens == 7


@pytest.mark.parametrize(
    ("extra_args", "expected"),
    [
        (None, None),
        ({}, None),
        ({"other_plugin": 1, "string": 2, "strength": 3, 4: 5, None: 6}, None),
        ({"steering": "truthful", "steering_strength": 1e-300}, None),
        ({"steering": "truthful", "steering_strength": -0.0}, None),
        ({"steering": "none"}, None),
        ({"steering": "truthful"}, ("truthful", 0.5, "all")),
        ({"steering": "polite"}, ("polite", 0.2, "prompt")),
        ({"steering": "truthful=-2"}, ("truthful", -2.0, "all")),
        ({"steering": "truthful", "steering_strength": 3}, ("truthful", 3.0, "all")),
        ({"steering": "truthful", "steering_positions": "generation"},
         ("truthful", 0.5, "generation")),
        ({"steering": "truthful", "steering_strength": 0}, None),
        ({"steering": "truthful=0"}, None),
    ],
)  # fmt: skip
def test_without_a_default(catalogue, extra_args, expected):
    assert chosen(extra_args, catalogue()) == expected


@pytest.mark.parametrize(
    ("extra_args", "expected"),
    [
        ({}, ("truthful", 0.9, "all")),
        ({"steering": "none"}, None),
        ({"steering": "polite"}, ("polite", 0.2, "prompt")),
        ({"steering_strength": 0.1}, ("truthful", 0.1, "all")),
        ({"steering_positions": "prompt"}, ("truthful", 0.9, "prompt")),
    ],
)
def test_with_a_default(catalogue, extra_args, expected):
    assert chosen(extra_args, catalogue(default="truthful=0.9")) == expected


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"steering": "Truthful"}, "unknown vector 'Truthful' (did you mean 'truthful'?)"),
        ({"steering": ""}, "unknown vector ''"),
        ({"steering": 7}, "steering: 7 is not text; known vectors: polite, truthful"),
        ({"steering": ["truthful"]}, "is not text"),
        ({"steering": "truthful=x"}, "'x' in 'truthful=x' is not a number"),
        ({"steering": "truthful=nan"}, "steering: nan is not a number"),
        ({"steering": "truthful=1e9"}, "not a number between -1e+06 and 1e+06"),
        ({"steering": "truthful=1", "steering_strength": 2}, "sets the strength too"),
        ({"steering": "truthful", "steering_strength": "1"}, "steering_strength: '1' is not"),
        ({"steering": "truthful", "steering_strength": [1]}, "steering_strength: [1] is not"),
        ({"steering": "truthful", "steering_strength": None}, "steering_strength: None is not"),
        (
            {"steering": "truthful", "steering_prompt_tokens": 3},
            "steering_prompt_tokens: of no use",
        ),
        ({"steering": "polite", "steering_prompt_tokens": 0}, "0 is not a whole number of 1"),
        ({"steering": "polite", "steering_prompt_tokens": True}, "True is not a whole number"),
        ({"steering": "polite", "steering_prompt_tokens": "3"}, "'3' is not a whole number"),
        ({"steering_prompt_tokens": 3}, "given without steering"),
        ({"steerin": "truthful"}, "steerin: unknown key (did you mean 'steering'?)"),
        ({"steering_layers": [1]}, "steering_layers: unknown key"),
        ({"grains": {}}, "reserved"),
        ({"Steering": "truthful"}, "Steering: unknown key (did you mean 'steering'?)"),
        ({"steering": "truthful", "strength": 1}, "did you mean 'steering_strength'?"),
        ({"steering": "truthful", "positions": "all"}, "did you mean 'steering_positions'?"),
        ({"steering": "x" * 10**6}, "..."),
        ({"steering": "truthful", "steering_strength": 10**400}, "a huge integer is not a number"),
        ({"grains_slot": 1}, "reserved"),
    ],
)
def test_refuses(catalogue, extra_args, message):
    with pytest.raises(SelectionError) as error:
        select(extra_args, catalogue())
    assert message in str(error.value)
    assert len(str(error.value)) < 300


def test_digests_differ_wherever_kv_would(catalogue):
    known = catalogue()
    digests = {
        select(asked, known).digest
        for asked in (
            {"steering": "truthful"},
            {"steering": "truthful=0.50001"},
            {"steering": "truthful=-0.5"},
            {"steering": "truthful", "steering_positions": "prompt"},
            {"steering": "polite", "steering_strength": 0.5},
        )
    }
    assert len(digests) == 5
    same = {"steering": "truthful", "steering_strength": 0.5, "steering_positions": "all"}
    assert select(same, known).digest in digests
