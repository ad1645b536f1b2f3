"""The V1 adapter's bookkeeping, driven with vLLM's own scheduler outputs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from grains_vllm import runner_v1
from grains_vllm.routing import Routing


class Runner:
    """What the adapter sees of a model runner: two methods and the order of the batch."""

    def __init__(self):
        self.input_batch = SimpleNamespace(
            req_ids=[], num_reqs=0, num_computed_tokens_cpu=np.zeros(8, np.int32)
        )

    def execute_model(self, scheduler_output, intermediate_tensors=None):
        return "executed", intermediate_tensors

    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        return "prepared"


@pytest.fixture
def world():
    runner, routing = Runner(), Routing(64, torch.device("cpu"))
    runner_v1.install(runner, routing, {"key": 3})
    return runner, routing


def step(runner, new=(), finished=(), batch=()):
    """One engine step: `batch` is (req_id, scheduled tokens, computed tokens) per request."""
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = list(new)
    output.finished_req_ids = set(finished)
    assert runner.execute_model(output, None) == ("executed", None)
    ids, scheduled, computed = zip(*batch, strict=True)
    runner.input_batch.req_ids = list(ids)
    runner.input_batch.num_reqs = len(ids)
    runner.input_batch.num_computed_tokens_cpu[: len(ids)] = computed
    assert runner._prepare_inputs(output, np.array(scheduled)) == "prepared"


def request(req_id, prompt_len, positions="all", steered=True):
    steering = {
        "slot": "key", "strength": 0.5, "positions": positions, "prompt_tokens": prompt_len
    }  # fmt: skip
    return NewRequestData(
        req_id=req_id,
        prompt_token_ids=[5] * prompt_len,
        mm_features=[],
        sampling_params=SamplingParams(extra_args={"grains": steering} if steered else None),
        pooling_params=None,
        block_ids=([],),
        num_computed_tokens=0,
        lora_request=None,
    )


def test_a_request_is_routed_until_it_is_finished_and_then_forgotten(world):
    runner, routing = world
    new = [request("a", 3, "generation"), request("b", 2, steered=False)]
    step(runner, new=new, batch=[("b", 2, 0), ("a", 3, 0)])
    assert not routing.slot.any()
    step(runner, batch=[("a", 1, 3), ("b", 1, 2)])
    assert routing.slot.tolist()[:3] == [3, 0, 0]
    # Preempted and computed again from the start: its fourth token stays a generated one.
    step(runner, batch=[("b", 1, 3), ("a", 4, 0)])
    assert routing.slot.tolist()[:6] == [0, 0, 0, 0, 3, 0]
    step(runner, finished=["a"], batch=[("b", 1, 4)])
    assert not routing.slot.any()
    step(runner, batch=[("a", 4, 0)])
    assert not routing.slot.any()


def test_an_id_that_finishes_and_comes_again_in_one_step_is_the_new_request(world):
    runner, routing = world
    step(runner, new=[request("a", 3)], batch=[("a", 3, 0)])
    step(runner, new=[request("a", 2, "prompt")], finished=["a"], batch=[("a", 3, 0)])
    assert routing.slot.tolist()[:4] == [3, 3, 0, 0]


def test_a_runner_of_another_engine_is_not_touched(world):
    assert Runner.execute_model is not type(world[0].execute_model)
    assert "execute_model" not in vars(Runner())
