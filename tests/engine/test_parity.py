"""A steered vLLM equals transformers with the same shift, in both residual conventions."""

import pytest
import torch

from tests.engine.jobs import EIGHT, JOBS, MORE
from tests.engine.reference import token_logprobs

pytestmark = pytest.mark.engine


def errors(engine_result, name, batch):
    """Per request, the largest |log-probability - reference| over prompt and answer."""
    worst = []
    for asked, got in zip(JOBS[batch]["requests"], engine_result[batch]["answers"], strict=True):
        expected = token_logprobs(name, asked["prompt"], got["tokens"], asked["extra_args"])
        found = torch.tensor(got["prompt_logprobs"] + got["logprobs"])
        worst.append((found - expected).abs().max().item())
    return worst


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_float32_equals_transformers_closely(engine, name):
    result = engine(name, "eager")
    worst = {
        batch: max(errors(result, name, batch)) for batch in ("alone", "eight", "mixed", "more")
    }
    print(f"float32 max error, {name}: {worst}")
    assert max(worst.values()) < 1e-4


def test_a_given_answer_is_scored_as_if_it_had_been_generated(engine):
    worst = max(errors(engine("llama", "eager"), "llama", "given answers"))
    print(f"float32 max error, given answers: {worst}")
    assert worst < 1e-4


def test_compiled_float32_equals_transformers_closely(engine):
    result = engine("llama", "3")
    worst = max(max(errors(result, "llama", batch)) for batch in ("eight", "more"))
    print(f"float32 max error, llama in mode 3: {worst}")
    assert worst < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_reference_can_tell_steering_from_none(name, engine):
    """The tolerance above is far below what steering does, so that equality means something."""
    answers = engine(name, "eager")["eight"]["answers"]
    for asked, got in zip(JOBS["eight"]["requests"], answers, strict=True):
        unsteered = token_logprobs(name, asked["prompt"], got["tokens"], None)
        found = torch.tensor(got["prompt_logprobs"] + got["logprobs"])
        assert (found - unsteered).abs().max() > 1e-2, asked["extra_args"]


def test_bfloat16_steered_error_is_the_unsteered_error(engine):
    """In bfloat16 steering adds no error of its own beyond the noise that vLLM has without it."""
    result = engine("llama", "eager", "bfloat16")
    mixed = errors(result, "llama", "mixed")
    plain, steered = mixed[0::2], mixed[1::2]
    print(f"bfloat16 max error, plain {max(plain):.3f}, steered {max(steered):.3f}")
    assert max(steered) < 2 * max(plain)


@pytest.mark.parametrize(
    ("batch", "solo", "seed"),
    [
        *(("eight", "solo", seed) for seed in range(len(EIGHT))),
        *(("more", "more solo", seed) for seed in range(len(MORE))),
    ],
)
@pytest.mark.parametrize("mode", ["eager", "3"])
def test_each_in_one_batch_equals_its_solo_run(engine, mode, batch, solo, seed):
    result = engine("llama", mode)
    together = result[batch]["answers"][seed]
    solo = result[f"{solo} {seed}"]["answers"][0]
    assert together["tokens"] == solo["tokens"]
    for key in ("prompt_logprobs", "logprobs"):
        torch.testing.assert_close(
            torch.tensor(together[key]), torch.tensor(solo[key]), rtol=0, atol=5e-5
        )
