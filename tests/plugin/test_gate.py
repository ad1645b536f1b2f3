"""Waiting for slots, in front of a scheduler that keeps vLLM's contract."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest

from grains_vllm.errors import GrainsConfigError
from grains_vllm.gate import PATIENCE, Gate


class Scheduler:
    """What the gate sees of vLLM's scheduler: requests come, are finished, and are freed."""

    def __init__(self):
        self.requests = {}

    def add_request(self, request):
        assert request.request_id not in self.requests
        self.requests[request.request_id] = request

    def finish_requests(self, request_ids, status):
        if isinstance(request_ids, str):
            request_ids = [request_ids]
        found = [i for i in (request_ids or list(self.requests)) if i in self.requests]
        return [self._free_request(self.requests[i]) for i in found]

    def _free_request(self, request):
        del self.requests[request.request_id]
        return request


class World:
    def __init__(self, slots):
        self.now = 0.0
        self.scheduler = Scheduler()
        self.gate = Gate(slots, clock=lambda: self.now)
        self.gate.install(self.scheduler)

    def add(self, request_id, *keys):
        terms = [{"slot": key, "vector": key, "name": key} for key in keys]
        extra = {"grains_checked": True, **({"grains": {"terms": terms}} if keys else {})}
        params = SimpleNamespace(extra_args=extra)
        self.scheduler.add_request(SimpleNamespace(request_id=request_id, sampling_params=params))

    def finish(self, *request_ids):
        return self.scheduler.finish_requests(request_ids, "aborted")

    @property
    def running(self):
        return list(self.scheduler.requests)


def test_requests_that_need_a_third_vector_wait_in_order_and_others_go_on():
    world = World(2)
    for request_id, key in [("a1", "a"), ("b1", "b"), ("c1", "c"), ("a2", "a"), ("d1", "d")]:
        world.add(request_id, key)
    world.add("plain")
    assert world.running == ["a1", "b1", "a2", "plain"]
    assert list(world.gate.waiting) == ["c1", "d1"]
    world.finish("a1")
    assert "c1" not in world.running  # a2 still uses that slot
    world.finish("a2")
    assert world.running == ["b1", "plain", "c1"]
    world.finish("b1")
    assert world.running == ["plain", "c1", "d1"]
    assert not world.gate.waiting


def test_somebody_who_needs_two_slots_is_not_overtaken_by_those_who_need_one():
    world = World(2)
    for request_id, keys in {"a": "a", "b": "b", "both": "cd", "c": "c", "d": "d"}.items():
        world.add(request_id, *keys)
    world.finish("a")
    assert world.running == ["b"]
    world.finish("b")
    assert world.running == ["both", "c", "d"]


def test_after_a_while_nobody_overtakes_so_that_slots_run_dry():
    world = World(1)
    world.add("a1", "a")
    world.add("b1", "b")
    world.now = PATIENCE - 1
    world.add("a2", "a")
    world.now = PATIENCE + 1
    world.add("a3", "a")
    assert world.running == ["a1", "a2"]
    world.finish("a1")
    world.finish("a2")
    assert world.running == ["b1"]
    world.finish("b1")
    assert world.running == ["a3"]


def test_a_waiting_request_can_be_aborted_and_vllm_hears_of_it():
    world = World(1)
    for request_id in ("a", "b", "c"):
        world.add(request_id, request_id)
    assert [request.request_id for request in world.finish("b")] == ["b"]
    assert list(world.gate.waiting) == ["c"]
    assert len(world.scheduler.finish_requests(None, "aborted")) == 2
    assert not world.running and not world.gate.waiting and not world.gate.vectors
    world.add("d", "d")
    assert world.running == ["d"]


def test_who_stood_behind_somebody_that_gave_up_enters_at_once():
    world = World(2)
    for request_id, keys in {"long": "a", "head": "cd", "behind": "b"}.items():
        world.add(request_id, *keys)
    assert list(world.gate.waiting) == ["head", "behind"]
    world.finish("head")
    assert world.running == ["long", "behind"] and not world.gate.waiting


def test_vectors_that_somebody_still_needs_and_those_that_are_gone():
    world = World(1)
    world.add("a", "a")
    world.add("b", "b")
    assert world.gate.vectors == {"a", "b"}
    world.gate.require_known(world.gate.waiting["b"])
    world.gate.known = {"a"}
    world.gate.require_known(world.scheduler.requests["a"])
    with pytest.raises(GrainsConfigError, match="'b' has been removed"):
        world.gate.require_known(world.gate.waiting["b"])


def test_a_request_that_no_front_end_of_ours_has_seen_is_refused():
    world = World(1)
    asked = SimpleNamespace(sampling_params=SimpleNamespace(extra_args={"steering": "a"}))
    with pytest.raises(GrainsConfigError, match="a front end without grains-vllm"):
        world.gate.require_known(asked)
    with pytest.raises(GrainsConfigError):
        world.gate.require_known(SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None)))
    world.gate.require_known(SimpleNamespace(sampling_params=None))  # nothing is generated


def test_random_traffic_never_needs_more_slots_than_there_are_and_everybody_gets_in():
    rng = random.Random(0)
    for _ in range(200):
        slots = rng.randint(2, 4)
        world, added, finished = World(slots), set(), set()
        for step in range(80):
            world.now += rng.random() * 2
            if rng.random() < 0.6:
                world.add(f"r{step}", *rng.sample("abcdef", rng.randint(0, 2)))
                added.add(f"r{step}")
            candidates = [*world.running, *world.gate.waiting]
            if candidates and rng.random() < 0.5:
                gone = rng.choice(candidates)
                world.finish(gone)
                finished.add(gone)
            live = Counter(
                term["slot"]
                for request in world.scheduler.requests.values()
                for term in request.sampling_params.extra_args.get("grains", {"terms": []})["terms"]
            )
            assert len(live) <= slots
            assert world.running or not world.gate.waiting
            if world.gate.waiting:  # and whoever comes next really does not fit
                first = next(iter(world.gate.waiting.values()))
                asked = {t["slot"] for t in first.sampling_params.extra_args["grains"]["terms"]}
                assert len(live.keys() | asked) > slots
        while world.running:
            finished.add(world.running[0])
            world.finish(world.running[0])
        assert finished == added and not world.gate.waiting
