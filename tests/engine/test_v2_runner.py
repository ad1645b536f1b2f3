"""vLLM's V2 model runner, on a CPU in Triton's interpreter (interpreted_triton.py)."""

import pytest
import torch

from tests.engine.conftest import UNSTEERED, plain, run_job
from tests.engine.jobs import EIGHT, JOBS, MORE
from tests.engine.test_parity import errors

pytestmark = pytest.mark.engine


@pytest.fixture
def steered(engine):
    return engine("llama", "eager", runner="v2")


def test_float32_equals_transformers_closely(steered):
    batches = ("alone", "eight", "mixed", "more", "given answers")
    worst = {batch: max(errors(steered, "llama", batch)) for batch in batches}
    print(f"float32 max error, V2 runner: {worst}")
    assert max(worst.values()) < 1e-4


def test_each_in_one_batch_equals_its_solo_run(steered):
    for batch, solo, count in (("eight", "solo", len(EIGHT)), ("more", "more solo", len(MORE))):
        for seed in range(count):
            together = steered[batch]["answers"][seed]
            alone = steered[f"{solo} {seed}"]["answers"][0]
            assert together["tokens"] == alone["tokens"]
            for key in ("prompt_logprobs", "logprobs"):
                torch.testing.assert_close(
                    torch.tensor(together[key]), torch.tensor(alone[key]), rtol=0, atol=5e-5
                )


def test_unsteered_bit_identical_alone_and_in_a_mixed_batch(steered, worlds):
    job = {
        "model": str(worlds / "llama"),
        "runner": "v2",
        "engine": {"dtype": "float32", "enforce_eager": True},
        "batches": {name: plain(JOBS[name]) for name in UNSTEERED},
    }
    never = run_job(worlds / "plain-v2", job, {"VLLM_PLUGINS": "none"})
    assert never["runner"] == "v2"
    for batch in ("alone", "after refusals"):
        assert steered[batch]["answers"] == never[batch]["answers"]
    found, expected = (result["mixed"]["answers"] for result in (steered, never))
    unsteered = [i for i, asked in enumerate(JOBS["mixed"]["requests"]) if not asked["extra_args"]]
    assert [found[i] for i in unsteered] == [expected[i] for i in unsteered]
    assert found[1]["logprobs"] != expected[1]["logprobs"]  # The others really were steered.


def test_everything_else_is_as_with_the_v1_runner(engine, steered):
    """Prefix caching, receipts, refusals: what happens before and after the runner."""
    other = engine("llama", "eager")
    for batch, first in other.items():
        if batch == "runner":
            continue
        second = steered[batch]
        assert first.get("error") == second.get("error")
        for one, two in zip(first.get("answers", []), second.get("answers", []), strict=True):
            assert (one["cached"], one["receipt"]) == (two["cached"], two["receipt"]), batch
            assert one["tokens"] == two["tokens"], batch
