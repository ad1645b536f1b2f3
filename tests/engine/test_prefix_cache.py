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
        ("other positions", 0),
        ("other vector", 0),
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

    for first in ("other strength", "other positions", "other vector", "steered"):
        assert (logprobs(first) - logprobs("plain")).abs().max() > 1e-3, first
    for label in ("plain again", "strength zero", "off", "plain at last"):
        torch.testing.assert_close(logprobs(label), logprobs("plain"), rtol=0, atol=1e-5)
    torch.testing.assert_close(logprobs("steered again"), logprobs("steered"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", ["all", "prompt", "generation"])
def test_the_next_turn_does_not_reuse_blocks_steered_as_generated_tokens(engine, positions):
    result = engine("llama", "eager")
    warm = result[f"turn two warm {positions}"]["answers"][0]
    cold = result[f"turn two cold {positions}"]["answers"][0]
    torch.testing.assert_close(
        torch.tensor(warm["logprobs"]), torch.tensor(cold["logprobs"]), rtol=0, atol=1e-5
    )
    # 40 + 70 tokens, three full blocks: reused where every token is steered alike.
    assert (warm["cached"], cold["cached"]) == (96 if positions == "all" else 0, 0)
