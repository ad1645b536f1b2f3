"""Is an unsteered request left alone, to the last bit, and is a steered one what it should be?

    python -m benchmarks.gpu.checks identity --runner 2 --gpu --work DIR --out FILE

identity: bfloat16, compiled as vLLM does by default, with CUDA graphs on a GPU. An engine that has
never loaded the plugin, the same once more (bits may differ from process to process, which would
otherwise be taken for our doing), and one with grains. reference: float32 against transformers.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import world
from benchmarks.gpu.reference import Reference
from benchmarks.server import ROOT, environment
from grains_vllm.vectors import write_aside

MAX_TOKENS = 24
# Few sizes to capture: the batches below have 16 requests, or one.
GRAPHS = [1, 2, 4, 8, 16]
Answers = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("check", choices=("identity", "reference"))
    parser.add_argument("--runner", type=int, choices=(1, 2), default=1)
    parser.add_argument("--size", choices=list(world.SIZES), default="usual")
    parser.add_argument("--gpu", action="store_true", help="capture CUDA graphs")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    folder = args.work.resolve() / f"world-{args.size}"
    world.write(folder, world.SIZES[args.size])
    check = identity if args.check == "identity" else against_reference
    found = check(folder, args)
    write_aside(args.out, json.dumps(found, indent=1).encode())
    print(json.dumps(found, indent=1))


def identity(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Compares unsteered requests of three engines, and steered ones with the reference."""
    size = world.SIZES[args.size]
    plain = _ask(folder, args, "plain", "bfloat16", grains=False)
    again = _ask(folder, args, "plain-again", "bfloat16", grains=False)
    grains = _ask(folder, args, "grains", "bfloat16", grains=True)
    unsteered = [n for n, r in enumerate(world.requests(size, True)) if not r["extra_args"]]
    return {
        "engines": {"plain": plain["facts"], "grains": grains["facts"]},
        # Two processes of plain vLLM: what identical can mean on this machine.
        "plain, two processes": _same(plain["answers"]["quiet"], again["answers"]["quiet"]),
        "alone": _same(plain["answers"]["alone"], grains["answers"]["alone"]),
        "nobody steered": _same(plain["answers"]["quiet"], grains["answers"]["quiet"]),
        "others steered": _same(
            [plain["answers"]["quiet"][n] for n in unsteered],
            [grains["answers"]["mixed"][n] for n in unsteered],
        ),
        "others steered, same process": _same(
            [grains["answers"]["quiet"][n] for n in unsteered],
            [grains["answers"]["mixed"][n] for n in unsteered],
        ),
        "reference": _distances(folder, args, grains["answers"]["mixed"]),
    }


def against_reference(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Compares a float32 engine with transformers."""
    grains = _ask(folder, args, "float32", "float32", grains=True)
    return {
        "engine": grains["facts"],
        "reference": _distances(folder, args, grains["answers"]["mixed"]),
    }


def _ask(
    folder: Path, args: argparse.Namespace, name: str, dtype: str, grains: bool
) -> dict[str, Any]:
    """Runs benchmarks.gpu.engine; the batch `mixed` is half steered, and for grains only."""
    size = world.SIZES[args.size]
    quiet, mixed = world.requests(size, False), world.requests(size, True)
    engine: dict[str, Any] = {"dtype": dtype}
    if args.gpu:
        engine["compilation_config"] = {"cudagraph_capture_sizes": GRAPHS}
        engine["gpu_memory_utilization"] = 0.3
    elif args.runner == 2:
        engine["enforce_eager"] = True
    if grains:
        engine["additional_config"] = {"grains": {"config": str(folder / "steering.yaml")}}
    job = {
        "model": str(folder / "model"),
        "engine": engine,
        "max_tokens": MAX_TOKENS,
        "interpreted": args.runner == 2 and not args.gpu,
        "batches": {"alone": quiet[:1], "quiet": quiet, **({"mixed": mixed} if grains else {})},
    }
    asked, answered = (folder / f"{name}-{args.runner}.{kind}.json" for kind in ("job", "result"))
    write_aside(asked, json.dumps(job).encode())
    variables = {
        "VLLM_PLUGINS": "grains" if grains else "none",
        "VLLM_USE_V2_MODEL_RUNNER": str(args.runner - 1),
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    }
    command = [sys.executable, "-m", "benchmarks.gpu.engine", str(asked), str(answered)]
    subprocess.run(command, cwd=ROOT, env={**environment(), **variables}, check=True)
    found: dict[str, Any] = json.loads(answered.read_text())
    if found["facts"]["plugin_loaded"] != grains:
        raise RuntimeError(f"{name}: plugin loaded is {not grains}, expected {grains}")
    if grains:
        steered = [answer["steered"] for answer in found["answers"]["mixed"]]
        if steered != [bool(request["extra_args"]) for request in mixed]:
            raise RuntimeError(f"{name}: the wrong requests were steered: {steered}")
    return found


def _same(one: Answers, other: Answers) -> dict[str, Any]:
    """Whether tokens and log-probabilities are the same bits, and the largest difference."""
    pairs = list(zip(one, other, strict=True))
    differences = [
        abs(a - b) for x, y in pairs for a, b in zip(x["logprobs"], y["logprobs"], strict=True)
    ]
    differing = [
        number
        for number, (x, y) in enumerate(pairs)
        if (x["tokens"], x["logprobs"]) != (y["tokens"], y["logprobs"])
    ]
    return {
        "identical": not differing,
        "differing": differing,
        "requests": len(pairs),
        "values": len(differences),
        "largest_difference": max(differences),
    }


def _distances(folder: Path, args: argparse.Namespace, mixed: Answers) -> dict[str, Any]:
    """Largest differences to the reference, of the batch's steered and unsteered requests.

    `if_ignored` is how far the steered ones are from the reference without steering: a check that
    the comparison could fail.
    """
    size = world.SIZES[args.size]
    reference = Reference(folder / "model", size)
    found: dict[str, list[float]] = {"steered": [], "unsteered": [], "if_ignored": []}
    for request, answer in zip(world.requests(size, True), mixed, strict=True):
        steering = request["extra_args"]
        kinds = {"steered": steering, "if_ignored": None} if steering else {"unsteered": None}
        for kind, applied in kinds.items():
            expected = reference.logprobs(request["prompt"], answer["tokens"], applied)
            pairs = zip(expected, answer["logprobs"], strict=True)
            found[kind].append(max(abs(a - b) for a, b in pairs))
    return {kind: max(values) for kind, values in found.items()}


if __name__ == "__main__":
    main()
