"""The comparison with peers tells a contestant that steers from one that does not."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.peers.__main__ import ratios
from benchmarks.peers.facts import TOKENS, UNKNOWN, facts
from benchmarks.peers.vllm_peers import VllmPeer

SHIFT = {None: 0, "a": 100, "b": 200}


def right(prompt, name):
    """An answer that depends on the prompt and on the vector."""
    return [prompt[0] + SHIFT[name] + step for step in range(TOKENS)]


class Peer:
    """Answers right; or as if nobody had asked for steering; or from a cache by prompt alone."""

    def __init__(self, deaf=False, stale=False):
        self._deaf, self._stale, self._cache = deaf, stale, {}

    def ask(self, prompts, steer, tokens, *, fresh=False):
        if fresh:
            self._cache.clear()
        if UNKNOWN in steer and not self._deaf:
            return {"error": "VLLMValidationError: no such vector; known: a, b"}
        names = [None if self._deaf else name for name in steer]
        found = []
        for prompt, name in zip(prompts, names, strict=True):
            answer = right(prompt, name)
            found.append(self._cache.setdefault(tuple(prompt), answer) if self._stale else answer)
        return {"tokens": found, "cached": [128 if self._stale else 0] * len(found)}


def test_a_right_one():
    found = facts(Peer(), right, 0)
    assert (found["equal"], found["unsteered"], found["mixed"]) == (1, 0, 1)
    assert found["second_vector"] == {"cached": 0, "equal": 1}
    assert found["unknown"] == "refused: VLLMValidationError: no such vector"


def test_one_that_does_not_listen():
    found = facts(Peer(deaf=True), right, 0)
    assert (found["equal"], found["unsteered"], found["mixed"]) == (0, 1, 1 / 3)
    assert found["unknown"] == "answered without steering, no error"


def test_one_whose_cache_knows_prompts_only():
    assert facts(Peer(stale=True), right, 0)["second_vector"] == {"cached": 128, "equal": 0}


def test_ratios_are_taken_within_rounds():
    found = {"vLLM": {"1": [10.0, 20.0, 40.0]}, "grains-vllm": {"1": [9.0, 20.0, 20.0]}}
    assert ratios(found) == {"grains-vllm": {"1": 0.9}}


@pytest.mark.parametrize(("gpu", "share"), [(True, 0.2), (False, None)])
def test_contestants_share_a_gpu(monkeypatch, tmp_path, gpu, share):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_PLUGINS"):
        monkeypatch.setenv(name, "")  # which the contestant sets, and this takes back
    asked = {}
    llm = SimpleNamespace(LLM=lambda model, **arguments: asked.update(arguments))
    monkeypatch.setitem(sys.modules, "vllm", llm)
    VllmPeer("vllm", tmp_path, eager=False)
    assert asked.get("gpu_memory_utilization") == share
