"""Who comes and who goes, and which adapter tells; whole batches are in test_conformance.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from grains_vllm import runner_v1, runner_v2, worker
from grains_vllm.bank import Bank, Store
from grains_vllm.catalogue import VectorEntry
from grains_vllm.errors import GrainsConfigError
from grains_vllm.routing import Routing
from grains_vllm.steered_requests import SteeredRequests
from tests.tiny import random_vector


@pytest.fixture
def world(tmp_path):
    vector = random_vector("llama", 0)
    vector.save(tmp_path / "a.safetensors")
    store = Store(vector.model, range(4))
    entry = VectorEntry("a", str(tmp_path / "a.safetensors"), vector.digest, 0.5, (0, 1, 2, 3))
    store.replace([entry])
    bank = Bank(store, 3, vector.model.hidden_size, torch.device("cpu"))
    routing = Routing(64, 2, torch.device("cpu"))
    return SteeredRequests(routing, bank), routing, bank, vector.digest


def request(req_id, digest, start=0, end=None, terms=1, prompt_tokens=3):
    steering = {
        "prompt_tokens": prompt_tokens,
        "terms": [
            {
                "name": f"a{number}", "vector": digest, "layers": [number], "scale": "relative",
                "slot": f"key {number}", "strength": 0.5, "spans": [[start, end]],
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


def follow(requests, new=(), finished=()):
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs, output.finished_req_ids = list(new), set(finished)
    requests.follow(output)


def steered(requests, routing, *batch):
    """Which tokens are steered of a batch of (req_id, scheduled tokens, computed tokens)."""
    ids, scheduled, computed = zip(*batch, strict=True)
    requests.route(list(ids), np.array(scheduled), np.array(computed), sum(scheduled))
    assert not routing.strength[sum(scheduled) :].any()
    return (routing.strength[: sum(scheduled)] != 0).any(dim=1).int().tolist()


def test_a_request_is_steered_until_it_is_finished_and_then_forgotten(world):
    requests, routing, bank, digest = world
    follow(requests, [request("a", digest, 3), request("b", digest, terms=0)])
    assert steered(requests, routing, ("b", 2, 0), ("a", 3, 0)) == [0, 0, 0, 0, 0]
    assert bank.in_use == 1 and len(routing) == 1
    assert steered(requests, routing, ("a", 1, 3), ("b", 1, 2)) == [1, 0]
    # Preempted and computed again from the start: its fourth token stays a generated one.
    assert steered(requests, routing, ("b", 1, 3), ("a", 4, 0)) == [0, 0, 0, 0, 1]
    follow(requests, finished=["a", "b", "never seen"])
    assert bank.in_use == 0 and len(routing) == 0
    assert steered(requests, routing, ("a", 4, 0)) == [0, 0, 0, 0]


def test_an_id_that_finishes_and_comes_again_in_one_step_is_the_new_request(world):
    requests, routing, bank, digest = world
    follow(requests, [request("a", digest, terms=2)])
    follow(requests, [request("a", digest, 0, 2)], finished=["a"])
    assert steered(requests, routing, ("a", 3, 0)) == [1, 1, 0]
    assert bank.in_use == 1


def test_a_request_that_comes_back_as_a_new_one_keeps_one_place(world):
    """The V2 runner's scheduler sends resumed requests so."""
    requests, routing, bank, digest = world
    for _ in range(3):
        follow(requests, [request("a", digest, 3, 5, terms=2)])
        assert (bank.in_use, len(routing), requests.end_in_answer(["a"])) == (2, 1, True)
        assert steered(requests, routing, ("a", 6, 0)) == [0, 0, 0, 1, 1, 0]
    follow(requests, finished=["a"])
    assert (bank.in_use, len(routing), requests.end_in_answer(["a"])) == (0, 0, False)


@pytest.mark.parametrize(
    ("start", "end", "ends"), [(0, None, 0), (0, 3, 0), (3, None, 0), (0, 4, 1), (3, 9, 1)]
)
def test_only_windows_that_end_in_the_answer_need_the_devices_count(world, start, end, ends):
    requests, _, _, digest = world
    follow(requests, [request("a", digest, start, end), request("b", digest, terms=0)])
    assert requests.end_in_answer(["b", "a"]) == bool(ends)
    assert not requests.end_in_answer(["b"])


def test_dummy_tokens_are_not_steered(world):
    requests, routing, _, digest = world
    follow(requests, [request("a", digest)])
    for _ in range(2):
        assert steered(requests, routing, ("a", 1, 9)) == [1]
        requests.route_nobody()
        assert not routing.strength.any() and not routing.slot.any()


class Runner:
    """The attributes and methods that both adapters look for."""

    use_async_spec_decode = num_computed_tokens = speculative_config = None
    input_batch = SimpleNamespace(req_ids=[], num_reqs=0, num_computed_tokens_cpu=None)
    req_states = SimpleNamespace(num_computed_tokens=SimpleNamespace(gpu=None))

    def execute_model(self): ...

    def _prepare_inputs(self): ...

    def prepare_inputs(self): ...

    def _dummy_run(self): ...


@pytest.mark.parametrize("adapter", [runner_v1, runner_v2])
def test_a_runner_of_another_engine_is_not_touched(world, adapter):
    before, runner = dict(vars(Runner)), Runner()
    adapter.install(runner, world[0])
    assert len(vars(runner)) == 3
    assert dict(vars(Runner)) == before and not vars(Runner())


@pytest.mark.parametrize("adapter", [runner_v1, runner_v2])
def test_a_runner_that_has_changed_is_refused(world, adapter):
    with pytest.raises(GrainsConfigError, match="SimpleNamespace has no"):
        adapter.install(SimpleNamespace(), world[0])
    runner = Runner()
    runner.input_batch = runner.req_states = SimpleNamespace()
    with pytest.raises(GrainsConfigError, match=r"has no (req_ids|num_computed_tokens\.gpu)"):
        adapter.install(runner, world[0])


@pytest.mark.parametrize(
    ("module", "name", "adapter"),
    [
        ("vllm.v1.worker.cpu_model_runner", "CPUModelRunner", runner_v1),
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", runner_v1),
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", runner_v2),
        ("vllm.v1.worker.cpu.model_runner", "CPUModelRunner", runner_v2),
    ],
)
def test_the_adapter_is_chosen_by_the_runners_class(module, name, adapter):
    cls = getattr(pytest.importorskip(module), name)
    assert worker._adapter(cls.__new__(cls)) is adapter.install


def test_an_unknown_runner_is_refused():
    with pytest.raises(GrainsConfigError, match=r"test_steered_requests\.Runner is not a model"):
        worker._adapter(Runner())
