"""grains-vllm beside other ways of steering, in one run: same model, vectors, prompts, threads.

    python -m benchmarks.peers --out benchmarks/results/peers-cpu.json \\
        --peer hotwire-vllm=.venv-hotwire-vllm/bin/python \\
        --peer repeng=.venv-repeng/bin/python \\
        --peer steering-vectors=.venv-steering-vectors/bin/python

Every contestant is a process of its own, in its own environment (`make peers-install` makes those
three); one without an environment is left out, and the result says so. They take turns: in each
round everybody answers the same prompts, all steered by the same vector on all layers, greedily.
Ratios are to the library underneath, in the same round. Before that, each is asked a few questions
whose right answers a script with hooks knows.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.peers import world
from benchmarks.peers.contestants import CONTESTANTS, REFERENCE
from benchmarks.peers.facts import facts, reference_of
from benchmarks.peers.figure import speeds
from benchmarks.peers.process import PeerProcess
from grains_vllm.vectors import write_aside
from offline.plot_style import save

# Its kernel needs a GPU; Triton's interpreter shows what it does, not how fast.
GPU_ONLY = ("hotwire-vllm",)


def main() -> None:
    args = arguments()
    pythons = dict(peer.split("=", 1) for peer in args.peer)
    if unknown := pythons.keys() - CONTESTANTS:
        sys.exit(f"--peer {min(unknown)}: known are {', '.join(CONTESTANTS)}")
    console = Console(stderr=True)
    result: dict[str, Any] = {
        "settings": {name: getattr(args, name) for name in _SETTINGS},
        "model": f"random Llama, {world.LAYERS} layers x {world.HIDDEN}, float32",
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "code": machine.code(),
        "left_out": {},
        "facts": {},
        "tokens_per_second": {},
    }
    with tempfile.TemporaryDirectory() as aside, ExitStack() as stack:
        folder = Path(aside)
        world.save(folder, args.seed)
        peers = {}
        for name, contestant in CONTESTANTS.items():
            if args.only and name not in args.only and name not in REFERENCE.values():
                continue
            if contestant.package and name not in pythons:
                result["left_out"][name] = f"no --peer {name}=PYTHON was given"
                continue
            console.print(f"starting {name}")
            python = pythons.get(name, sys.executable)
            peer = stack.enter_context(
                PeerProcess(python, contestant.kind, folder, args.mode, args.threads)
            )
            if peer.error is None:
                peers[name] = peer
            else:
                result["left_out"][name] = f"does not start: {peer.error}"
        for name, peer in peers.items():
            formula = CONTESTANTS[name].formula
            if formula and name not in REFERENCE.values():
                console.print(f"facts about {name}")
                reference = reference_of(peers[REFERENCE[formula]])
                result["facts"][name] = facts(peer, reference, args.seed)
        if args.rounds:
            result["tokens_per_second"] = measure(peers, args, result["left_out"], console)
    result["ratios"] = ratios(result["tokens_per_second"])
    report(result)
    if args.out:
        write_aside(args.out, json.dumps(result, indent=1).encode() + b"\n")
        bases = {name: contestant.base for name, contestant in CONTESTANTS.items()}
        where = ", ".join(machine.gpus()) or f"CPU, {args.threads} threads"
        title = f"{result['model']}; {where}; vLLM {result['versions']['vllm']} ({args.mode})"
        found = result["tokens_per_second"]
        if found:
            save(speeds(found, result["ratios"], bases, title), args.out.with_suffix(".png"))


def measure(
    peers: dict[str, PeerProcess], args: argparse.Namespace, left_out: dict[str, str], out: Console
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second by contestant, batch size and round; round 0 warms up and is not kept."""
    fast = dict(peers)
    for name in () if machine.gpus() else GPU_ONLY:
        if fast.pop(name, None):
            left_out[f"{name}, speed"] = "its Triton kernel needs a GPU; facts by the interpreter"
    found: dict[str, dict[str, list[float]]] = {n: {str(b): [] for b in args.batch} for n in fast}
    for turn in range(args.rounds + 1):
        out.print(f"round {turn} of {args.rounds}")
        for batch in args.batch:
            asked = world.prompts(batch, f"{args.seed} {turn} {batch}")
            for name, peer in fast.items():
                steer = world.NAMES[0] if CONTESTANTS[name].formula else None
                answer = peer.ask(asked, [steer] * batch, args.tokens)
                if "error" in answer:
                    raise SystemExit(f"{name}: {answer['error']}")
                if turn:
                    found[name][str(batch)].append(batch * args.tokens / answer["seconds"])
    return found


def ratios(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Median over the rounds of the speed over that of the library underneath."""
    return {
        name: {
            batch: statistics.median(
                mine / base
                for mine, base in zip(rounds, found[CONTESTANTS[name].base][batch], strict=True)
            )
            for batch, rounds in by_batch.items()
        }
        for name, by_batch in found.items()
        if CONTESTANTS[name].formula and CONTESTANTS[name].base in found
    }


def report(result: dict[str, Any]) -> None:
    console = Console()
    found = result["tokens_per_second"]
    if found:
        batches = list(next(iter(found.values())))
        table = Table("tokens/s (ratio)", *(f"batch {batch}" for batch in batches))
        for name, by_batch in found.items():
            cells = []
            for batch in batches:
                ratio = result["ratios"].get(name, {}).get(batch)
                cells.append(
                    f"{statistics.median(by_batch[batch]):.1f}"
                    + ("" if ratio is None else f" ({ratio:.2f})")
                )
            table.add_row(name, *cells)
        console.print(table)
    for name, found_facts in result["facts"].items():
        console.print(name, found_facts)
    for name, why in result["left_out"].items():
        console.print(f"left out: {name}: {why}")


_SETTINGS = ("rounds", "batch", "tokens", "seed", "mode", "threads")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--only", action="append", help="a contestant; the references always run")
    parser.add_argument("--rounds", type=int, default=5, help="0: facts only")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=32, help="generated per prompt")
    parser.add_argument("--mode", choices=("compiled", "eager"), default="compiled", help="of vLLM")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON; the plot goes beside it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
