"""Requests that ask for nothing get the very bits of a vLLM without the plugin's layers."""

import pytest

from tests.engine.jobs import JOBS

pytestmark = pytest.mark.engine

MODES = [("llama", "eager"), ("llama", "3"), ("gpt2", "eager")]


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_alone_bit_identical(engine, name, mode):
    plain = engine(name, mode, grains=False)
    grains = engine(name, mode)
    for batch in ("alone", "after refusals"):
        assert grains[batch]["answers"] == plain[batch]["answers"]


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_in_a_mixed_batch_bit_identical(engine, name, mode):
    plain = engine(name, mode, grains=False)["mixed"]["answers"]
    grains = engine(name, mode)["mixed"]["answers"]
    unsteered = [i for i, r in enumerate(JOBS["mixed"]["requests"]) if not r["extra_args"]]
    assert len(unsteered) == 4
    assert [grains[i] for i in unsteered] == [plain[i] for i in unsteered]
    assert grains[1]["logprobs"] != plain[1]["logprobs"]  # The others really were steered.


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_steered_requests_compile_nothing(engine, name, mode):
    graphs = engine(name, mode)["graphs"]
    assert (graphs["start"] > 0) == (mode != "eager")
    # vLLM itself compiles a helper for log-probabilities at the first request.
    assert graphs == engine(name, mode, grains=False)["graphs"]
