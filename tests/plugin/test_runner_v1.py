"""The V1 adapter's bookkeeping, driven with vLLM's own scheduler outputs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from grains_vllm import runner_v1
from grains_vllm.bank import Bank, Store
from grains_vllm.catalogue import VectorEntry
from grains_vllm.routing import Routing
from tests.tiny import random_vector


class Runner:
    """What the adapter sees of a model runner: two methods, the order of the batch, positions."""

    use_async_spec_decode = False

    def __init__(self):
        self.num_computed_tokens = torch.zeros(8, dtype=torch.int32)  # as the device knows them
        self.input_batch = SimpleNamespace(
            req_ids=[], num_reqs=0, num_computed_tokens_cpu=np.zeros(8, np.int32)
        )

    def execute_model(self, scheduler_output, intermediate_tensors=None):
        return "executed", intermediate_tensors

    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        return "prepared"


@pytest.fixture
def world(tmp_path):
    vector = random_vector("llama", 0)
    vector.save(tmp_path / "a.safetensors")
    store = Store(vector.model, range(4))
    entry = VectorEntry("a", str(tmp_path / "a.safetensors"), vector.digest, 0.5, (0, 1, 2, 3))
    store.replace([entry])
    bank = Bank(store, 3, vector.model.hidden_size, torch.device("cpu"))
    runner, routing = Runner(), Routing(64, 2, torch.device("cpu"))
    runner_v1.install(runner, routing, bank)
    return runner, routing, bank, vector.digest


def slots(routing, tokens):
    return routing.slot[:tokens, 0].tolist()


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


def request(req_id, digest, start=0, end=None, terms=1):
    steering = {
        "prompt_tokens": 3,
        "terms": [
            {
                "name": f"a{number}", "vector": digest, "layers": [number], "scale": "relative",
                "slot": f"key {number}", "strength": 0.5, "start": start, "end": end,
            }
            for number in range(terms)
        ],
    }  # fmt: skip
    return NewRequestData(
        req_id=req_id,
        prompt_token_ids=[5] * 3,
        mm_features=[],
        sampling_params=SamplingParams(extra_args={"grains": steering} if terms else None),
        pooling_params=None,
        block_ids=([],),
        num_computed_tokens=0,
        lora_request=None,
    )


def test_a_request_is_routed_until_it_is_finished_and_then_forgotten(world):
    runner, routing, bank, digest = world
    new = [request("a", digest, 3), request("b", digest, terms=0)]
    step(runner, new=new, batch=[("b", 2, 0), ("a", 3, 0)])
    assert not routing.slot.any()
    assert bank.in_use == 1
    step(runner, batch=[("a", 1, 3), ("b", 1, 2)])
    assert slots(routing, 3) == [1, 0, 0]
    # Preempted and computed again from the start: its fourth token stays a generated one.
    step(runner, batch=[("b", 1, 3), ("a", 4, 0)])
    assert slots(routing, 6) == [0, 0, 0, 0, 1, 0]
    step(runner, finished=["a"], batch=[("b", 1, 4)])
    assert not routing.slot.any()
    assert bank.in_use == 0
    step(runner, batch=[("a", 4, 0)])
    assert not routing.slot.any()


def test_an_id_that_finishes_and_comes_again_in_one_step_is_the_new_request(world):
    runner, routing, bank, digest = world
    step(runner, new=[request("a", digest)], batch=[("a", 3, 0)])
    step(runner, new=[request("a", digest, 0, 2)], finished=["a"], batch=[("a", 3, 0)])
    assert slots(routing, 4) == [1, 1, 0, 0]
    assert bank.in_use == 1


def test_a_window_in_the_answer_is_not_ended_by_drafts_that_were_rejected(world):
    runner, routing, _, digest = world
    runner.use_async_spec_decode = True
    runner.num_computed_tokens[0] = 4  # of the two drafts before, none was accepted
    step(runner, new=[request("a", digest, 3, 6)], batch=[("a", 3, 6)])
    assert slots(routing, 4) == [1, 1, 0, 0]


def test_vectors_of_one_request_lie_side_by_side(world):
    runner, routing, bank, digest = world
    step(runner, new=[request("a", digest, 1, terms=2)], batch=[("a", 3, 0)])
    assert routing.slot[:4].tolist() == [[0, 0], [1, 2], [1, 2], [0, 0]]
    step(runner, new=[request("b", digest)], batch=[("b", 3, 0)])
    step(runner, finished=["a"], batch=[("b", 1, 3)])
    assert bank.in_use == 1 and bank.resident == 2


def test_a_runner_of_another_engine_is_not_touched(world):
    assert Runner.execute_model is not type(world[0].execute_model)
    assert "execute_model" not in vars(Runner())
