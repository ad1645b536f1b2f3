"""What requests may say, and what they get."""

import pytest

from grains_vllm.selection import SelectionError, SteeringDisabled, select


def steering(extra_args, catalogue, **more):
    return select(extra_args, catalogue, **more).steering


def chosen(extra_args, catalogue):
    found = steering(extra_args, catalogue)
    if found is None:
        return None
    (term,) = found.terms
    return term.entry.name, term.strength, term.positions


def test_prompt_tokens(catalogue):
    asked = {"steering": "truthful", "steering_positions": "generation"}
    assert steering(asked, catalogue()).prompt_tokens is None
    assert steering({**asked, "steering_prompt_tokens": 7}, catalogue()).prompt_tokens == 7
    default = catalogue(default="polite")  # whose positions are "prompt"
    assert steering({"steering_prompt_tokens": 7}, default).prompt_tokens == 7


def test_vectors_are_combined_in_any_order(catalogue):
    known = catalogue(max_vectors_per_request=2)
    one = steering({"steering": "truthful=0.8,polite"}, known)
    other = steering({"steering": " polite , truthful = 0.8 "}, known)
    assert one == other and one.digest == other.digest
    assert {(t.entry.name, t.strength, t.positions) for t in one.terms} == {
        ("truthful", 0.8, "all"),
        ("polite", 0.2, "prompt"),
    }
    moved = steering({"steering": "truthful,polite", "steering_positions": "prompt:3"}, known)
    assert [term.positions for term in moved.terms] == ["prompt:3", "prompt:3"]
    left = steering({"steering": "truthful=0,polite=0.3"}, known)
    assert [term.entry.name for term in left.terms] == ["polite"]
    assert steering({"steering": "truthful=0,polite=-0"}, known) is None


def test_a_request_can_narrow_the_layers(catalogue):
    asked = {"steering": "truthful", "steering_layers": [3, 1]}
    (narrow,) = steering(asked, catalogue()).terms
    (wide,) = steering({"steering": "truthful"}, catalogue()).terms
    assert narrow.layers == (1, 3) and wide.layers == (0, 1, 2, 3)
    assert narrow.slot_key != wide.slot_key


def test_strengths_and_positions_share_a_slot(catalogue):
    keys = {
        term.slot_key
        for text in ("truthful=0.1", "truthful=-7")
        for places in ("all", "generation:2")
        for term in steering({"steering": text, "steering_positions": places}, catalogue()).terms
    }
    assert len(keys) == 1


def test_switched_off(catalogue):
    known = catalogue(default="truthful", canary={"name": "polite", "fraction": 1.0})
    with pytest.raises(SteeringDisabled, match="switched off"):
        select({"steering": "polite"}, known, enabled=False)
    for asked in (None, {"steering": "none"}, {"steering": "polite=0"}):
        assert select(asked, known, enabled=False).steering is None


def test_a_canary_takes_its_share_and_stays_with_it(catalogue):
    known = catalogue(canary={"name": "truthful=0.7", "fraction": 0.25})
    users = [f"user {number}" for number in range(2000)]
    taken = [user for user in users if steering(None, known, identity=user)]
    assert 400 < len(taken) < 600
    assert taken == [user for user in users if steering({}, known, identity=user)]
    choice = select(None, known, identity=taken[0])
    assert (choice.source, choice.fraction, choice.steering.terms[0].strength) == (
        "canary", 0.25, 0.7
    )  # fmt: skip
    spared = next(user for user in users if user not in taken)
    assert select(None, known, identity=spared).source == "canary"
    # The request's own key counts more than its id, and whoever asks is no longer in the trial.
    assert steering({"steering_canary_key": taken[0]}, known, identity=spared)
    assert select({"steering": "polite"}, known, identity=taken[0]).source == "request"
    assert select({"steering": "none"}, known, identity=taken[0]).fraction is None
    default = catalogue(default="polite", canary={"name": "truthful", "fraction": 0.0})
    assert chosen(None, default) == ("polite", 0.2, "prompt")


@pytest.mark.parametrize(
    ("extra_args", "expected"),
    [
        (None, None),
        ({}, None),
        ({"other_plugin": 1, "string": 2, "strength": 3, 4: 5, None: 6}, None),
        ({"other_plugin": {"steering": 1}}, None),
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
        ({"steering_layer": [1]}, "steering_layer: unknown key (did you mean 'steering_layers'?)"),
        ({"steering": "truthful", "steering_layers": [9]}, "[9] are not served for 'truthful'"),
        ({"steering": "truthful", "steering_layers": []}, "[] is not a layer number or a list"),
        ({"steering": "truthful", "steering_layers": True}, "True is not a layer number"),
        ({"steering": "truthful,polite,truthful"}, "combines 3 vectors; this server allows 2"),
        ({"steering": "truthful,truthful=1"}, "names 'truthful' twice"),
        ({"steering": "truthful,"}, "unknown vector ''"),
        ({"steering": "truthful,polite", "steering_strength": 1}, "fits one vector only"),
        ({"steering": "truthful", "steering_positions": "prompt:0"}, "'prompt:0' is not one of"),
        ({"steering_canary_key": 7}, "steering_canary_key: 7 is not text"),
        ({"grains": {}}, "reserved"),
        ({"Steering": "truthful"}, "Steering: unknown key (did you mean 'steering'?)"),
        ({"steering": "truthful", "strength": 1}, "did you mean 'steering_strength'?"),
        ({"steering": "truthful", "positions": "all"}, "did you mean 'steering_positions'?"),
        ({"steering": "x" * 10**6}, "..."),
        ({"steering": "truthful", "steering_strength": 10**400}, "a huge integer is not a number"),
        ({"grains_slot": 1}, "reserved"),
        ({"GRAINS": 1}, "reserved"),
        ({" steering": "truthful"}, "unknown key (did you mean 'steering'?)"),
        ({"steer": "truthful"}, "steer: unknown key (did you mean 'steering'?)"),
        ({"_steering": "truthful"}, "_steering: unknown key (did you mean 'steering'?)"),
        ({"steeringStrength": 1}, "unknown key (did you mean 'steering_strength'?)"),
        ({"s\u0442eering": "truthful"}, "unknown key (did you mean 'steering'?)"),
        ({"\uff53teering_layers": 1}, "unknown key (did you mean 'steering_layers'?)"),
        ({"steering\u200b": "truthful"}, "unknown key (did you mean 'steering'?)"),
        ({"steering\ud800": "truthful"}, "'steering\\ud800': unknown key"),
        ({"\uff47rains": 1}, "reserved"),
        ({"vector": "truthful"}, "vector: unknown key (did you mean 'steering'?)"),
        ({"truthful": 0.3}, "truthful: unknown key (did you mean 'steering'?)"),
        ({"steering": "truthful:0.3"}, "'truthful:0.3' (a strength is written NAME=STRENGTH)"),
        ({"vllm_xargs": {"steering": "truthful"}}, "vllm_xargs: stands too deep to be heard"),
        ({"vllm_xargs": "none"}, "vllm_xargs: stands too deep"),
        ({"extraBody": [{"vllm_xargs": {}}]}, "vllm_xargs: stands too deep"),
        ({"sampling_params": {"extra_args": {"steering": "none"}}}, "steering: stands too deep"),
        ({"steering": "truthful=1_0"}, "'1_0' in 'truthful=1_0' is not a number"),
        ({"steering": "truthful=\u0663"}, "is not a number"),
        ({"steering_canary_key": "x\ud800"}, "is not text of 1 to 512 characters"),
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
        steering(asked, known).digest
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
    assert steering(same, known).digest in digests
