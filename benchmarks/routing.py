"""What the plugin costs the host per engine step: routing, then whatever else runs at each step.

A case is a trace of engine steps; the clock runs around what a model runner's adapter does in one
of them (forget, remember, fill), and nothing else. No model and no engine take part.

    python -m benchmarks.routing --out benchmarks/results/routing-cpu.json
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import code, hardware, versions
from grains_vllm.bank import Bank, Store
from grains_vllm.catalogue import Steering, Term, VectorEntry
from grains_vllm.gate import Gate
from grains_vllm.marker import build
from grains_vllm.prefix_keys import EXTRA_KEYS
from grains_vllm.receipts import REQUEST_STATE, Receipt
from grains_vllm.routing import Part, Routing
from grains_vllm.selection import CHECKED, RESERVED, Choice
from grains_vllm.steered_requests import SteeredRequests
from grains_vllm.vectors import ModelFingerprint, SteeringVector, write_aside

MAX_TOKENS = 8192
PROMPT = 200  # tokens, after which every request decodes
BLOCK = 16  # tokens; a request fills one in so many steps
FAR = 10**6  # a position that no request reaches
WARM_UP = 50  # steps


class Step(NamedTuple):
    """Who leaves, who comes with which parts, and the batch."""

    gone: list[str]
    came: list[tuple[str, list[Part]]]
    req_ids: list[str]
    scheduled: np.ndarray
    computed: np.ndarray


class Trace:
    """Requests side by side that use `vectors` in turn, `parts` at a time; 0: nobody is steered.

    Args:
        end: the position at which a request, by number, stops being steered; None: never.
    """

    def __init__(
        self,
        requests: int,
        vectors: int,
        parts: int,
        end: Callable[[int], int | None] = lambda number: None,
    ) -> None:
        self._vectors, self._parts, self._end = vectors, parts, end
        self._numbers = count()
        self._came: list[tuple[str, list[Part]]] = []
        self._req_ids = [self._new() for _ in range(requests)]
        self._ones = np.ones(requests, np.int32)
        self.computed = PROMPT * self._ones

    def _new(self) -> str:
        number = next(self._numbers)
        req_id = f"chatcmpl-{UUID(int=number * 2**64)}"
        if self._vectors:
            parts, end = range(number, number + self._parts), self._end(number)
            self._came.append(
                (req_id, [Part(p % self._vectors, 0.1 + p, [(0, end)]) for p in parts])
            )
        return req_id

    def step(self, replace: int | None = None, scheduled: np.ndarray | None = None) -> Step:
        """The next step, one token for each unless `scheduled` says otherwise.

        Args:
            replace: the row in which one request has made room for another.
        """
        gone = []
        if replace is not None:
            gone = [self._req_ids[replace]]
            self._req_ids[replace] = self._new()
            self.computed[replace] = PROMPT
        scheduled = self._ones if scheduled is None else scheduled
        came, self._came = self._came, []
        step = Step(gone, came, list(self._req_ids), scheduled.copy(), self.computed.copy())
        self.computed += scheduled
        return step


Case = Callable[[int, int], Iterator[Step]]


def decoding(vectors: int, replacing: bool = False, end: int | None = None) -> Case:
    def steps(requests: int, parts: int) -> Iterator[Step]:
        trace = Trace(requests, vectors, parts, lambda number: end)
        yield trace.step()
        for number in count():
            yield trace.step(number % requests if replacing else None)

    return steps


def with_copied_ids(requests: int, parts: int) -> Iterator[Step]:
    for step in decoding(256, end=FAR)(requests, parts):
        yield step._replace(req_ids=[f"{req_id} "[:-1] for req_id in step.req_ids])


def ending(requests: int, parts: int) -> Iterator[Step]:
    trace = Trace(requests, 256, parts, lambda number: PROMPT + 1 + number)
    while True:
        trace.computed[:] = PROMPT
        for _ in range(requests + 1):
            yield trace.step()


def mixed(requests: int, parts: int) -> Iterator[Step]:
    trace = Trace(requests, 256, parts, lambda number: None if number % 2 else MAX_TOKENS // 2)
    scheduled = np.ones(requests, np.int32)
    scheduled[-1] += MAX_TOKENS - requests
    while True:
        trace.computed[-1] = 0
        yield trace.step(scheduled=scheduled)


def drafting(end: int | None) -> Case:
    def steps(requests: int, parts: int) -> Iterator[Step]:
        trace = Trace(requests, 256, parts, lambda number: end)
        while True:
            yield trace.step(scheduled=np.full(requests, 4, np.int32))

    return steps


CASES: dict[str, Case] = {
    "nobody is steered": decoding(0),
    "256 vectors, the same batch decodes on": decoding(256),
    "the same, all steered up to some far position": decoding(256, end=FAR),
    "the same, ids copied at every step": with_copied_ids,
    "1 vector, one request replaced per step": decoding(1, replacing=True),
    "16 vectors, one request replaced per step": decoding(16, replacing=True),
    "256 vectors, one request replaced per step": decoding(256, replacing=True),
    "one request's steering ends per step": ending,
    f"prefill beside decodes, {MAX_TOKENS} tokens": mixed,
    "three drafts per request": drafting(None),
    "three drafts per request, steered up to some far position": drafting(FAR),
}


def routing_times(case: Case, requests: int, parts: int, args: argparse.Namespace) -> list[int]:
    """Nanoseconds of each step."""
    device, times = torch.device(args.device), []
    routing = Routing(MAX_TOKENS, parts, device, pin_memory=device.type == "cuda")
    for step in islice(case(requests, parts), WARM_UP + args.steps):
        gone, came, req_ids, scheduled, computed = step
        tokens = int(scheduled.sum())
        began = time.perf_counter_ns()
        if gone or came:
            for req_id in gone:
                routing.discard(req_id)
            for req_id, mine in came:
                routing.add(req_id, mine)
        routing.fill(req_ids, scheduled, computed, tokens)
        times.append(time.perf_counter_ns() - began)
    return times[WARM_UP:]


class Scheduler:
    """What the gate stands in front of."""

    def add_request(self, request: Any) -> None: ...

    def finish_requests(self, request_ids: Any) -> None: ...

    def _free_request(self, request: Any) -> None: ...


def _vector() -> tuple[VectorEntry, Bank]:
    """A catalogue entry, and a bank of one slot that holds its vector."""
    model = ModelFingerprint("Any", 64, 32)
    vector = SteeringVector(torch.eye(32, 64), torch.ones(32), model)
    layers = tuple(range(32))
    with TemporaryDirectory() as folder:
        path = f"{folder}/a.safetensors"
        vector.save(path)
        entry, store = VectorEntry("a", path, vector.digest, 0.1, layers), Store(model, layers)
        store.replace([entry])
    return entry, Bank(store, 1, model.hidden_size, torch.device("cpu"))


def _steered_request(number: int, entry: VectorEntry) -> Any:
    """A request as every layer of vLLM sees it."""
    steering = Steering.of([Term(entry, 0.1 + number, "all", entry.layers)])
    extra = {CHECKED: True, RESERVED: build(Choice(steering), PROMPT)}
    req_id, params = f"chatcmpl-{number}", SimpleNamespace(extra_args=extra)
    return SimpleNamespace(request_id=req_id, req_id=req_id, sampling_params=params)


def _nothing() -> None: ...


def other_costs(requests: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """By place: one step of `requests` with the plugin, and the same without it."""
    entry, bank = _vector()
    asked = [_steered_request(number, entry) for number in range(requests)]
    req_ids = [request.req_id for request in asked]

    def hash_block(request: Any, start: int, end: int, mm: int) -> Any:
        return None, mm

    def answer(self: Any, external_req_id: str, outputs: Any, finished: bool) -> Any:
        return self

    gated, plain = Scheduler(), Scheduler()
    Gate(1).install(gated)
    for request in asked:
        gated.add_request(request)
    worker = SteeredRequests(Routing(MAX_TOKENS, 1, torch.device("cpu")), bank)
    worker.follow(SimpleNamespace(finished_req_ids=(), scheduled_new_reqs=asked))
    nobody = SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=[])
    other = SimpleNamespace(finished_req_ids={req_ids[0]}, scheduled_new_reqs=asked[:1])
    states = [
        SimpleNamespace(grains_receipt=Receipt(r.sampling_params.extra_args[RESERVED], PROMPT))
        for r in asked
    ]
    filled = asked[: max(1, requests // BLOCK)]
    steered_answer = REQUEST_STATE["_new_request_output"](answer)
    steered_hash = EXTRA_KEYS["generate_block_hash_extra_keys"](hash_block)

    def come_and_go(scheduler: Any) -> None:
        scheduler._free_request(asked[0])
        scheduler.add_request(asked[0])

    def answers(new_output: Any) -> None:
        for state in states:
            new_output(state, "id", None, False)

    def hashes(block_hash: Any) -> None:
        for request in filled:
            block_hash(request, PROMPT, PROMPT + BLOCK, 0)

    return {
        "worker: nobody comes or goes": (lambda: worker.follow(nobody), _nothing),
        "worker: one request ends, another comes": (lambda: worker.follow(other), _nothing),
        "worker with drafts: whose window ends": (lambda: worker.end_in_answer(req_ids), _nothing),
        "engine core: one request ends, another comes": (
            lambda: come_and_go(gated),
            lambda: come_and_go(plain),
        ),
        f"engine core: a KV block of 1 in {BLOCK} requests fills up": (
            lambda: hashes(steered_hash),
            lambda: hashes(hash_block),
        ),
        "front end: one token of each request": (
            lambda: answers(steered_answer),
            lambda: answers(answer),
        ),
    }


def times_of(run: Callable[[], Any], steps: int) -> list[int]:
    times = []
    for _ in range(WARM_UP + steps):
        began = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - began)
    return times[WARM_UP:]


def microseconds(times: list[int]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "median": statistics.median(ordered) / 1000,
        "p99": ordered[(99 * len(ordered)) // 100] / 1000,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    gc.disable()  # The collector would charge one case for another's garbage.
    torch.set_num_threads(1)
    points = [
        (name, requests, parts)
        for name in CASES
        for parts in args.parts
        for requests in args.requests
    ]
    routing = [
        {"case": name, "requests": requests, "parts": parts}
        | microseconds(routing_times(CASES[name], requests, parts, args))
        for name, requests, parts in track(points, "routing")
    ]
    beside = [
        {
            "where": where,
            "requests": requests,
            "with": microseconds(times_of(steered, args.steps)),
            "without": microseconds(times_of(plain, args.steps)),
        }
        for requests in args.requests
        for where, (steered, plain) in other_costs(requests).items()
    ]
    return {
        "unit": "microseconds of one step",
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "reading_the_clock": microseconds(times_of(lambda: None, args.steps)),
        "routing": routing,
        "beside": beside,
        "hardware": hardware(),
        "load_average": os.getloadavg()[0],
        "versions": {**versions(), "numpy": np.__version__, "grains-vllm's code": code()},
    }


def show(report: dict[str, Any]) -> None:
    console, sizes = Console(), report["settings"]["requests"]
    heads = [f"{requests} requests" for requests in sizes]
    by_point = {(x["case"], x["requests"], x["parts"]): x for x in report["routing"]}
    table = Table("routing", "parts", *heads, title="microseconds per step: median (p99)")
    for name in CASES:
        for parts in report["settings"]["parts"]:
            cells = [by_point[name, requests, parts] for requests in sizes]
            table.add_row(name, str(parts), *(f"{x['median']:.2f} ({x['p99']:.2f})" for x in cells))
    console.print(table)
    table = Table("beside it", *heads, title="microseconds per step: median, less without plugin")
    for where in dict.fromkeys(x["where"] for x in report["beside"]):
        cells = [x for x in report["beside"] if x["where"] == where]
        table.add_row(
            where, *(f"{x['with']['median'] - x['without']['median']:.2f}" for x in cells)
        )
    console.print(table)
    console.print(f"Each figure includes reading the clock: {report['reading_the_clock']}")
    console.print(
        "p99 is elapsed time: where other processes want the processor, it shows them too "
        f"(load average {report['load_average']:.1f} on {report['hardware']['cpus']} processors)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 32, 256, 1024])
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2], help="vectors per request")
    parser.add_argument("--steps", type=int, default=2000, help="measured steps per case")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the figures here (JSON)")
    args = parser.parse_args()
    report = measure(args)
    show(report)
    if args.out is not None:
        write_aside(args.out, json.dumps(report, indent=2).encode())


if __name__ == "__main__":
    main()
