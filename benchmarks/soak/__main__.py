"""Half an hour of mixed traffic against a real server, which must neither err, leak nor mix up.

    python -m benchmarks.soak --minutes 30 --concurrency 32

Two thirds of the time there are slots for all vectors in use, then far fewer. Afterwards samples of
the answers are asked for again, alone, and some are compared with transformers.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import httpx

from benchmarks.server import free_port, running
from benchmarks.soak.asks import Asker
from benchmarks.soak.churn import Churn
from benchmarks.soak.expected import guest_of
from benchmarks.soak.growth import growth, leaks
from benchmarks.soak.plot import over_time
from benchmarks.soak.solo import TOLERANCE, Comparison, against_reference, against_solo
from benchmarks.soak.traffic import Ledger, rush
from benchmarks.soak.watch import metrics, watch, workers
from benchmarks.soak.world import MODEL, SERVED, World
from grains_vllm.vectors import write_aside
from offline.plot_style import save

RESULTS = Path(__file__).resolve().parent.parent / "results"
# Few KV blocks, so that requests are preempted and cached blocks evicted all the time.
FLAGS = (
    *("--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--block-size", "32"),
    *("--max-num-seqs", "32", "--num-gpu-blocks-override", "64", "--disable-uvicorn-access-log"),
)
# oneDNN keeps the kernels it compiles, one per layer shape and number of tokens: 300 MiB of the
# default 1,024 would hide what else grows.
ONEDNN_KERNELS = 64
REFERENCES = 24  # samples of a phase that are also scored with transformers


@dataclass(frozen=True)
class Phase:
    """A part of the time, with a server of its own."""

    name: str
    share: float
    slots: int


PHASES = (Phase("roomy", 2 / 3, 64), Phase("tight", 1 / 3, 4))


def main() -> int:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpus": os.cpu_count(), "platform": platform.platform(terse=True),
            "load_before": os.getloadavg(),
        },
        "versions": {name: version(name) for name in ("vllm", "torch", "transformers")},
        "minutes": args.minutes, "concurrency": args.concurrency, "seed": args.seed,
        "plain": args.plain, "tolerance": TOLERANCE, "phases": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        first = 0
        # Slots mean nothing to plain requests.
        for phase in (Phase("plain", 1, PHASES[0].slots),) if args.plain else PHASES:
            facts, first = _phase(phase, args, Path(scratch) / phase.name, first)
            document["phases"].append(facts)
            document["machine"]["load_after"] = os.getloadavg()
            document["problems"] = sum(len(found["problems"]) for found in document["phases"])
            _write(document, args)
    for phase_facts in document["phases"]:
        shown = {key: value for key, value in phase_facts.items() if key != "series"}
        print(json.dumps(shown, indent=1))
    print(f"{document['problems']} problems")
    return 1 if document["problems"] else 0


def _write(document: dict[str, Any], args: argparse.Namespace) -> None:
    name = "soak-plain-cpu" if args.plain else "soak-cpu"
    payload = json.dumps(document, indent=1, allow_nan=False).encode() + b"\n"
    for target in (args.out, *([RESULTS] if args.publish else [])):
        write_aside(target / f"{name}.json", payload)
        save(over_time(document), target / f"{name}.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="of traffic, all phases together")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at the same time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--samples", type=int, default=300, help="answers to compare, per phase")
    parser.add_argument(
        "--plain", action="store_true", help="the same requests without steering, to compare memory"
    )
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    parser.add_argument("--publish", action="store_true", help="also write to benchmarks/results")
    return parser.parse_args()


def _phase(
    phase: Phase, args: argparse.Namespace, folder: Path, first: int
) -> tuple[dict[str, Any], int]:
    """Serves, rushes and compares; returns the facts and the next request's number."""
    folder.mkdir()
    world = World(folder, phase.slots)
    log = args.out / f"{phase.name}.log"
    _tell(phase, f"starts, {phase.slots} slots")
    with _server(world, log) as url:
        facts, first = asyncio.run(_traffic(phase, args, world, url, first))
    lines = log.read_text(errors="replace").splitlines()
    # Of the engine; the API server's are answers too, and have been looked at as such.
    if found := [line for line in lines if "Traceback" in line and "APIServer" not in line]:
        facts["problems"].append(f"the server's log has {len(found)} tracebacks: {found[0]}")
    return facts, first


async def _traffic(
    phase: Phase, args: argparse.Namespace, world: World, url: str, first: int
) -> tuple[dict[str, Any], int]:
    limits = httpx.Limits(max_connections=args.concurrency + 8)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as client:
        series: list[dict[str, Any]] = []
        ledger, churn = Ledger(args.samples, Random(args.seed)), Churn(world, client, args.seed)
        seconds = 60 * args.minutes * phase.share
        beside = [asyncio.create_task(watch(client, min(10.0, seconds / 20), series))]
        if not args.plain:
            beside.append(asyncio.create_task(churn.run(min(15.0, seconds / 10))))
        asker = Asker(world, args.seed, args.plain)
        began = time.monotonic()
        first = await rush(
            client, asker, churn, world, ledger, args.concurrency, seconds,
            lambda text: _tell(phase, text), first,
        )  # fmt: skip
        took = time.monotonic() - began
        problems = ledger.problems
        for task in beside:
            task.cancel()
        for ended in await asyncio.gather(*beside, return_exceptions=True):
            if isinstance(ended, Exception):
                problems.append(f"watch or churn ended: {ended!r}")
        problems += churn.problems
        at_rest, left_over = await _rest(client)
        problems += left_over
        _tell(phase, f"quiet; compares {len(ledger.samples)} answers")
        solo, reference = await _compare(client, args, world, ledger, churn)
        grown = growth(series)
        problems += [*solo.problems, *reference.problems, *leaks(grown)]
        return {
            "name": phase.name, "slots": phase.slots, "seconds": round(took, 1),
            "counts": dict(sorted(ledger.counts.items())),
            "changes": dict(churn.changes),
            "solo": _short(solo), "reference": _short(reference),
            "memory": grown, "peaks": _peaks(series), "at_rest": at_rest,
            "problems": problems, "series": _thin(series),
        }, first  # fmt: skip


async def _rest(client: httpx.AsyncClient) -> tuple[dict[str, float], list[str]]:
    """What is still held once nobody asks any more, which must be nothing."""
    facts: dict[str, float] = {}
    for _ in range(20):
        await asyncio.sleep(0.5)
        found = {**await metrics(client), **await workers(client)}
        names = ("running", "queued", "slots_in_use", "waiting", "requests")
        facts = {name: found[name] for name in names}
        if not any(facts.values()):
            break
    return facts, [f"left over: {n} = {v:g}" for n, v in facts.items() if v]


async def _compare(
    client: httpx.AsyncClient, args: argparse.Namespace, world: World, ledger: Ledger, churn: Churn
) -> tuple[Comparison, Comparison]:
    """Every sample alone; those of each guest while it is there."""
    solo = Comparison()
    groups: dict[str, list[Any]] = {}
    for ask, answer in ledger.samples:
        guest = guest_of(answer, world)
        groups.setdefault(guest.digest if guest else "", []).append((ask, answer))
    for digest, group in groups.items():
        if digest:
            await churn.change("replace", world.by_digest(digest))
        await against_solo(client, group, args.seed, solo)
    reference = await asyncio.to_thread(against_reference, ledger.samples[:REFERENCES], world)
    return solo, reference


def _short(found: Comparison) -> dict[str, Any]:
    return {**asdict(found), "problems": len(found.problems)}


def _peaks(series: list[dict[str, Any]]) -> dict[str, float]:
    """The largest figure of everything that was watched."""
    found: dict[str, float] = {}
    for point in series:
        for name, value in {**point["metrics"], **point["workers"]}.items():
            if isinstance(value, int | float):
                found[name] = max(value, found.get(name, value))
    return dict(sorted(found.items()))


def _thin(series: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the plot needs of every point."""
    return [
        {
            "seconds": round(point["seconds"], 1),
            "rss_mib": {
                name: round(sum(kinds.values()), 1) for name, kinds in point["mib"].items()
            },
            "metrics": {"running": point["metrics"].get("running")},
            "workers": {
                name: point["workers"].get(name)
                for name in ("slots", "slots_in_use", "waiting", "requests")
            },
        }
        for point in series
    ]


@contextmanager
def _server(world: World, log: Path) -> Iterator[str]:
    port = free_port()
    command = ["vllm", "serve", str(MODEL), "--served-model-name", SERVED, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--enable-grains", "--grains-config", str(world.config)]
    variables = {
        "VLLM_PLUGINS": "grains",  # the admin routes
        "VLLM_SERVER_DEV_MODE": "1",  # a look into the worker
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(ONEDNN_KERNELS),
    }
    with running([*command, *FLAGS], port, log, variables) as url:
        yield url


def _tell(phase: Phase, text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {phase.name}: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
