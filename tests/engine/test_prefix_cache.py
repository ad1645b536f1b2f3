"""KV computed under one steering is never used under another, and always under the same."""

import pytest
import torch

pytestmark = pytest.mark.engine

FULL_BLOCKS = 128  # of the 130-token prompt, in blocks of 32


@pytest.mark.parametrize(
    ("label", "cached"),
    [
        ("plain", 0),
        ("plain again", FULL_BLOCKS),
        ("steered", 0),
        ("steered again", FULL_BLOCKS),
        ("other strength", 0),
        # Inside the prompt it makes no difference that the answer is not steered.
        ("prompt alone", FULL_BLOCKS),
        # And whoever is steered in the answer only shares the prompt with everybody.
        ("answer alone", FULL_BLOCKS),
        ("answer alone again", FULL_BLOCKS),
        ("last prompt tokens", 96),
        ("other vector", 0),
        ("both", 0),
        ("both again", FULL_BLOCKS),
        ("fewer layers", 0),
        ("strength zero", FULL_BLOCKS),
        ("off", FULL_BLOCKS),
        ("plain at last", FULL_BLOCKS),
    ],
)
def test_cached_tokens(engine, label, cached):
    assert engine("llama", "eager")[f"cache {label}"]["answers"][0]["cached"] == cached


def test_answers_from_the_cache_are_those_of_the_first_time(engine):
    result = engine("llama", "eager")

    def logprobs(label):
        return torch.tensor(result[f"cache {label}"]["answers"][0]["logprobs"])

    for first in (
        "other strength",
        "prompt alone",
        "answer alone",
        "last prompt tokens",
        "other vector",
        "both",
        "fewer layers",
        "steered",
    ):
        assert (logprobs(first) - logprobs("plain")).abs().max() > 1e-3, first
    for label in ("plain again", "strength zero", "off", "plain at last"):
        torch.testing.assert_close(logprobs(label), logprobs("plain"), rtol=0, atol=1e-5)
    for again, first in {
        "steered again": "steered",
        "answer alone again": "answer alone",
        "both again": "both",
    }.items():
        torch.testing.assert_close(logprobs(again), logprobs(first), rtol=0, atol=1e-5)


@pytest.mark.parametrize("label", ["answer alone", "last prompt tokens", "prompt alone"])
def test_shared_kv_gives_the_answers_of_an_empty_cache(engine, label):
    result = engine("llama", "eager")
    warm, cold = (result[f"{state} {label}"]["answers"][0] for state in ("cache", "cold"))
    assert warm["cached"] > 0 and cold["cached"] == 0
    assert warm["tokens"] == cold["tokens"]
    torch.testing.assert_close(
        torch.tensor(warm["logprobs"]), torch.tensor(cold["logprobs"]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("positions", ["all", "prompt", "generation"])
def test_the_next_turn_does_not_reuse_blocks_steered_as_generated_tokens(engine, positions):
    result = engine("llama", "eager")
    warm = result[f"turn two warm {positions}"]["answers"][0]
    cold = result[f"turn two cold {positions}"]["answers"][0]
    torch.testing.assert_close(
        torch.tensor(warm["logprobs"]), torch.tensor(cold["logprobs"]), rtol=0, atol=1e-5
    )
    # 40 + 70 tokens, three full blocks: all reused where every token is steered alike, else the
    # one that lies within the first turn's prompt.
    assert (warm["cached"], cold["cached"]) == (96 if positions == "all" else 32, 0)
