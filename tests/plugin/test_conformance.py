"""Both adapters, driven by vLLM's own scheduler: the same requests get the same steering.

Each lane has a scheduler with very little KV cache, and a stand-in for its model runner that keeps
its batch as the real one does, and nothing else. The real runners are driven in
tests/engine/test_conformance.py; here there are many random traces, and drafts that are rejected.
"""

import random
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from grains_vllm import runner_v1, runner_v2
from grains_vllm.bank import Bank, Store
from grains_vllm.catalogue import VectorEntry
from grains_vllm.routing import Routing
from grains_vllm.steered_requests import SteeredRequests
from tests.tiny import random_vector, save_world

TOKENS, PARTS, KEYS = 64, 2, 5  # a step's, a request's, and how many slots there are
BLOCK, BLOCKS = 16, 16  # of the KV cache: room for two or three requests


class V1Runner:
    """Keeps its requests from step to step, in an order of its own."""

    def __init__(self, drafts, ahead):
        self.use_async_spec_decode = drafts and ahead
        self.num_computed_tokens = torch.zeros(TOKENS, dtype=torch.int32)
        self.input_batch = SimpleNamespace(
            req_ids=[], num_reqs=0, num_computed_tokens_cpu=np.zeros(TOKENS, np.int32)
        )

    def execute_model(self, scheduler_output):
        batch = self.input_batch
        for req_id in [r for r in batch.req_ids if r not in scheduler_output.num_scheduled_tokens]:
            # The last one moves into the gap.
            row, last = batch.req_ids.index(req_id), batch.req_ids.pop()
            if last != req_id:
                batch.req_ids[row] = last
        batch.req_ids += [
            r for r in scheduler_output.num_scheduled_tokens if r not in batch.req_ids
        ]
        batch.num_reqs = len(batch.req_ids)
        counts = [scheduler_output.num_scheduled_tokens[r] for r in batch.req_ids]
        self._prepare_inputs(scheduler_output, np.array(counts, np.int32))
        return batch.req_ids

    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        batch = self.input_batch
        for row, req_id in enumerate(batch.req_ids):
            batch.num_computed_tokens_cpu[row] = self.host[req_id]
            self.num_computed_tokens[row] = self.device[req_id]

    def _dummy_run(self, num_tokens):
        return num_tokens


class V2Runner:
    """Sorts its batch anew at every step; a request has a place among all that are known."""

    def __init__(self, drafts, ahead):
        self.speculative_config = "drafts" if drafts else None
        computed = SimpleNamespace(gpu=torch.zeros(TOKENS, dtype=torch.int32))
        self.req_states = SimpleNamespace(num_computed_tokens=computed)
        self.places = {}

    def execute_model(self, scheduler_output):
        gone = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        for req_id in gone:
            self.places.pop(req_id, None)
        for request in scheduler_output.scheduled_new_reqs:
            free = set(range(TOKENS)) - set(self.places.values())
            self.places[request.req_id] = max(free)
        return self.prepare_inputs(scheduler_output, "a batch descriptor").req_ids

    def prepare_inputs(self, scheduler_output, batch_desc):
        scheduled = scheduler_output.num_scheduled_tokens
        req_ids = sorted(scheduled, key=scheduled.get)
        places = [self.places[req_id] for req_id in req_ids]
        for req_id, place in zip(req_ids, places, strict=True):
            self.req_states.num_computed_tokens.gpu[place] = self.device[req_id]
        return SimpleNamespace(
            req_ids=req_ids,
            idx_mapping=torch.tensor(places, dtype=torch.int32),
            num_scheduled_tokens=np.array([scheduled[r] for r in req_ids], np.int32),
            num_computed_tokens_np=np.array([self.host[r] for r in req_ids], np.int32),
            num_tokens=sum(scheduled.values()),
            # An answer that is computed again counts as prefill; nobody should look at it.
            prefill_len_np=np.full(len(req_ids), 999),
        )

    def _dummy_run(self, num_tokens):
        return num_tokens


class Lane:
    """One scheduler, one runner, one set of buffers."""

    def __init__(self, config, store, digest, runner, adapter, drafts, ahead):
        group = KVCacheGroupSpec(
            ["layer"],
            FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32),
        )
        self.scheduler = (AsyncScheduler if ahead else Scheduler)(
            config,
            KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[group]),
            StructuredOutputManager(config),
            BLOCK,
        )
        self.scheduler.use_v2_model_runner = adapter is runner_v2
        self.bank = Bank(store, KEYS, store[digest].directions.shape[1], torch.device("cpu"))
        self.slots = [self.bank.preload(f"key {n}", digest, [n % 4], "relative") for n in range(5)]
        self.routing = Routing(TOKENS, PARTS, torch.device("cpu"))
        self.runner = runner(drafts, ahead)
        # What the host believes and what the device knows, by request.
        self.runner.host, self.runner.device = self.host, self.device = {}, {}
        adapter.install(self.runner, SteeredRequests(self.routing, self.bank))
        self.drafts, self.ahead = drafts, ahead
        self.in_flight = None
        self.resumed = 0

    def step(self):
        """Schedules and runs one batch; returns its (request, position) by row."""
        output = self.scheduler.schedule()
        cached = output.scheduled_cached_reqs
        told = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        self.resumed += sum(req_id in self.device for req_id in told)
        self.device.update(told)
        told.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for req_id in cached.resumed_req_ids:
            self.device[req_id] = told[req_id]
        self.resumed += len(cached.resumed_req_ids)
        self.host.update(told)
        order, rows, sampled = self.runner.execute_model(output), [], []
        for req_id in order:
            begin, count = self.device[req_id], output.num_scheduled_tokens[req_id]
            rows += [(req_id, begin + i) for i in range(count)]
            drafts = len(output.scheduled_spec_decode_tokens.get(req_id, ()))
            accepted = random.Random(f"{req_id} {begin}").randint(0, drafts)
            self.device[req_id] += count - drafts + accepted
            known = self.scheduler.requests[req_id].num_tokens
            done = self.host[req_id] + count >= known
            sampled.append([7] * (1 + accepted) if done else [])
        results = ModelRunnerOutput(order[:], {r: i for i, r in enumerate(order)}, sampled)
        ready = self.in_flight if self.ahead else (output, results)
        self.in_flight = output, results
        if ready is not None:
            self.scheduler.update_from_output(*ready)
        if self.drafts and not self.ahead:
            going_on = [r for r, new in zip(order, sampled, strict=True) if new]
            self.scheduler.update_draft_token_ids(DraftTokenIds(going_on, [[7, 7]] * len(going_on)))
        return rows

    def given(self, rows):
        """Per row, its steering as (slot key, strength); the rest of the buffers is zero."""
        slot, strength = self.routing.slot, self.routing.strength
        assert not slot[len(rows) :].any() and not strength[len(rows) :].any()
        keys = {slot: f"key {n}" for n, slot in enumerate(self.slots)}
        pairs = zip(slot.tolist(), strength.tolist(), strict=True)
        return [
            sorted((keys[s], x) for s, x in zip(*pair, strict=True) if x)
            for pair, _ in zip(pairs, rows, strict=False)
        ]


@pytest.fixture(scope="module")
def lanes(tmp_path_factory):
    """lanes(drafts, ahead) -> a new lane for each runner."""
    folder = tmp_path_factory.mktemp("conformance")
    save_world(folder, "llama")
    vector = random_vector("llama", 0)
    path = folder / "llama_a.safetensors"
    store = Store(vector.model, range(4))
    store.replace([VectorEntry("a", str(path), vector.digest, 0.5, (0, 1, 2, 3))])

    @cache
    def config_of(drafts):
        config = EngineArgs(
            model=str(folder / "llama"),
            skip_tokenizer_init=True,
            max_model_len=128,
            max_num_batched_tokens=TOKENS,
            max_num_seqs=8,
            block_size=BLOCK,
            enable_prefix_caching=False,
            speculative_config={"method": "ngram", "num_speculative_tokens": 2} if drafts else None,
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = BLOCKS
        return config

    def build(drafts, ahead):
        return [
            Lane(config_of(drafts), store, vector.digest, runner, adapter, drafts, ahead)
            for runner, adapter in ((V1Runner, runner_v1), (V2Runner, runner_v2))
        ]

    return build


def random_request(rng, req_id):
    """A request with up to two vectors: (prompt tokens, answer tokens, terms)."""
    prompt, terms = rng.randint(1, 90), []
    for number in rng.sample(range(KEYS), rng.choice([0, 1, 1, 2])):
        start = rng.choice([0, 0, rng.randint(0, prompt), prompt])
        end = rng.choice([None, prompt, prompt + rng.randint(1, 20)])
        spans = [[start, end]]
        if rng.random() < 0.4:  # one kind of tokens, of which images are the other
            edges = sorted(rng.sample(range(prompt + 1), min(prompt + 1, rng.randint(1, 6))))
            spans = [list(pair) for pair in zip(edges[::2], [*edges[1::2], None], strict=False)]
        strength = rng.choice([-1.5, 0.25, 3.0])
        terms.append(
            {"slot": f"key {number}", "vector": "not read", "layers": [], "scale": "relative",
             "strength": strength, "spans": spans}
        )  # fmt: skip
    return prompt, rng.randint(1, 30), terms


def due(terms, position):
    """What an independent count says that this token gets."""
    return sorted(
        (term["slot"], term["strength"])
        for term in terms
        if any(start <= position < (end or 10**6) for start, end in term["spans"])
    )


@pytest.mark.parametrize(("drafts", "ahead"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_same_traces_same_buffers(lanes, drafts, ahead):
    preempted = steered = rejected = 0
    for seed in range(6):
        rng, both, asked = random.Random(seed), lanes(drafts, ahead), {}
        for step in range(300):
            if step < 60 and rng.random() < 0.4:
                req_id = f"r{step}"
                prompt, answer, terms = asked[req_id] = random_request(rng, req_id)
                marker = {"terms": terms, "prompt_tokens": prompt}
                for lane in both:
                    params = SamplingParams(
                        max_tokens=answer, ignore_eos=True, extra_args={"grains": marker}
                    )
                    lane.scheduler.add_request(Request(req_id, [5] * prompt, params, None))
            if asked and rng.random() < 0.1:  # also of requests that have ended long ago
                leaver = rng.choice(list(asked))
                for lane in both:
                    lane.scheduler.finish_requests(leaver, RequestStatus.FINISHED_ABORTED)
            found = []
            for lane in both:
                rows = lane.step()
                given = lane.given(rows)
                assert given == [due(asked[owner][2], position) for owner, position in rows]
                bits = zip(
                    lane.routing.slot.tolist(),
                    lane.routing.strength.view(torch.int32).tolist(),
                    strict=True,
                )
                found.append(sorted(zip(rows, bits, strict=False)))
                steered += sum(map(bool, given))
                rejected += any(lane.host[owner] > lane.device[owner] for owner, _ in rows)
                if step % 7 == 3:
                    assert lane.runner._dummy_run(3) == 3
                    assert not lane.routing.slot.any() and not lane.routing.strength.any()
            assert found[0] == found[1]
        for lane in both:
            preempted += lane.resumed
            assert not lane.scheduler.requests and not len(lane.routing)
            assert not lane.bank.in_use
    print(f"{preempted} times computed again, {steered} steered tokens, {rejected} optimistic")
    assert preempted > 10 and steered > 1000 and bool(rejected) == bool(drafts and ahead)
