"""Time and peak memory of attribution by model size and prompt length, against captum.

Both take gradients at the same Gauss-Legendre points of the same examples, so their scores, and
with them the completeness, agree; the last column says how well. Rows per forward are those that
`grains extract` chooses by itself. captum runs around the plain way to write the objective (a
forward per response, logits everywhere). Every measurement is a process of its own, whose peak
memory is thus its own; contestants and cells take turns, and what --out already holds is not
measured again, save what ran out of memory without --memory-gib. On CPUs processor time counts,
which other work on the machine changes less.

    python -m benchmarks.extraction_grid --out grid.json --plot grid.png
    python -m benchmarks.extraction_grid --shapes 1.5b 8b --device cuda --dtype bfloat16 \
        --out gpu.json
    python -m benchmarks.extraction_grid --whole --shapes 8b --prompts 200 --device cuda \
        --dtype bfloat16 --examples 50 --out whole.json

`--whole` runs all of `grains extract` behind the tokenizer, with its own adaptive points. Weights
are random and made on the device. FLOPs are counted for what frozen weights need: the forward, and
in the backward pass gradients of activations only.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.extraction import build_pairs, captum_scores
from benchmarks.overhead.record import OTHERWISE
from grains_vllm.vectors import write_aside
from offline.attribution import Attributor, Example
from offline.baselines import baseline_embedding
from offline.batching import Room, out_of_memory
from offline.extract import GROUP
from offline.groups import group_maker
from offline.model import DTYPES, Decoder, as_decoder
from offline.objective import row_length
from offline.options import ExtractOptions
from offline.points import stages
from offline.prompts import TokenPair

OURS, THEIRS = "grains", "captum"
_GIB = 2**30
_POINTS = {64: 4, 512: 2, 4096: 1}  # per example of the CPU grid, so that it ends


@dataclass(frozen=True)
class Shape:
    """A Llama: layers, hidden size, width of its MLP, query and key heads, vocabulary."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    key_heads: int
    vocabulary: int

    @property
    def linear(self) -> int:
        """Weights of all blocks."""
        kept = self.hidden * self.hidden * 2 * (1 + self.key_heads / self.heads)
        return int(self.layers * (kept + 3 * self.hidden * self.mlp))


SHAPES = {
    "4x256": Shape(4, 256, 688, 8, 8, 32000),
    "8x512": Shape(8, 512, 1376, 8, 8, 32000),
    "16x1024": Shape(16, 1024, 2752, 16, 16, 32000),
    "1.5b": Shape(28, 1536, 8960, 12, 2, 151936),
    "8b": Shape(32, 4096, 14336, 32, 8, 128256),
}


@dataclass(frozen=True)
class Cell:
    """One point of the grid for one contestant; `points` 0 stands for adaptive ones."""

    shape: str
    prompt: int
    contestant: str
    points: int
    recompute: bool | None
    examples: int
    response: int
    device: str
    dtype: str
    memory_gib: float | None
    whole: bool

    @property
    def name(self) -> str:
        more = {True: "/recompute", False: "/keep", None: ""}[self.recompute]
        kind = "/whole" if self.whole else ""
        return (
            f"{self.shape}/{self.prompt}/{self.contestant}{more}{kind}/{self.device}/{self.dtype}"
        )


def build(cell: Cell) -> Decoder:
    shape = SHAPES[cell.shape]
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    with torch.device(cell.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[cell.dtype])
    # Only the size of the vocabulary is asked of this tokenizer.
    return as_decoder(model, range(shape.vocabulary), f"random Llama {cell.shape}")


def flops(shape: Shape, tokens: int, gradients: int) -> float:
    """Of `gradients` forwards and backwards of one row of `tokens` tokens."""
    attention = 4 * tokens**2 * shape.hidden * shape.layers
    return gradients * (2 * 2 * shape.linear * tokens + 3.5 * attention)


def our_scores(
    decoder: Decoder,
    pairs: Sequence[TokenPair],
    baseline: Tensor,
    room: Room,
    options: ExtractOptions,
) -> list[list[float]]:
    """Gradients alone, as captum takes them: neither F at both ends nor the trial of packing."""
    attributor = Attributor(decoder, options, baseline, room)
    examples = []
    for pair in pairs:
        x = decoder.embed(pair.prompt_ids).float()
        attempts = stages(pair, x, baseline, options)
        examples.append(Example(pair, x - baseline, True, math.nan, math.nan, attempts))
    attributor.take_gradients(examples)
    return [attributor.attribution(example).scores.tolist() for example in examples]


class Memory:
    """Peak memory since it was made, of this process or of the GPU, and what was there before."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self.before = self._status("VmRSS")

    @property
    def peak(self) -> int:
        """Bytes."""
        return torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure(cell: Cell) -> dict[str, Any]:
    """One measurement, in this process."""
    decoder, shape = build(cell), SHAPES[cell.shape]
    args = argparse.Namespace(**asdict(cell), vocabulary=shape.vocabulary, seed=0)
    pairs = build_pairs(args)
    lengths = [row_length(pair, packed=True) for pair in pairs]
    notes: list[str] = []
    room = Room(recompute=cell.recompute, on_note=notes.append)
    options = ExtractOptions(ig_points=cell.points or None)
    baseline = baseline_embedding(decoder, options.baseline)
    warm_up = build_pairs(argparse.Namespace(**{**vars(args), "prompt": 16, "examples": 1}))
    Attributor(decoder, ExtractOptions(ig_points=1), baseline, Room()).attribute(warm_up)
    if cell.memory_gib is not None:
        most = int(cell.memory_gib * _GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    memory = Memory(cell.device)
    start, start_wall = time.process_time(), time.perf_counter()
    report: dict[str, Any] = {}
    try:
        if cell.whole:
            compute = group_maker(decoder, options, room, notes.append)
            records = []
            for first in range(0, len(pairs), GROUP):
                records += compute(pairs[first : first + GROUP])[1]
            scores = [record["scores"] for record in records]
            report["points"] = [record["points"] for record in records]
            report["gap"] = max(record["gap"] for record in records)
        elif cell.contestant == OURS:
            scores = our_scores(decoder, pairs, baseline, room, options)
        else:
            rows = room.fit([max(lengths)] * cell.points, 1)  # as ours
            scores = [
                captum_scores(decoder, pair, baseline, cell.points, rows, ours=False).tolist()
                for pair in pairs
            ]
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return {"too_little_memory": True, "limit_gib": cell.memory_gib}
    if memory.cuda:
        torch.cuda.synchronize()
    wall = time.perf_counter() - start_wall
    seconds = wall if memory.cuda else time.process_time() - start
    points = report.get("points", [cell.points] * len(pairs))
    work = sum(flops(shape, length, n) for length, n in zip(lengths, points, strict=True))
    return report | {
        "wall_seconds": wall,
        "seconds": seconds,
        "seconds_per_example": seconds / len(pairs),
        "seconds_per_point": seconds / sum(points),
        "peak_bytes": memory.peak,
        "peak_bytes_above_model": memory.peak - memory.before,
        "flop_per_second": work / seconds if cell.contestant == OURS else None,
        "notes": notes,
        "scores": scores[0][:64],
    }


def cells_of(args: argparse.Namespace) -> list[Cell]:
    return [
        Cell(
            shape, prompt, who, args.points or (0 if args.whole else _POINTS.get(prompt, 2)),
            {"auto": None, "yes": True, "no": False}[args.recompute], args.examples, args.response,
            args.device, args.dtype, args.memory_gib, args.whole,
        )
        for prompt in args.prompts
        for shape in args.shapes
        for who in ((OURS,) if args.whole else args.contestants)
    ]  # fmt: skip


def run(cell: Cell, timeout: float) -> dict[str, Any]:
    """Measures in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.extraction_grid", "--cell"]
    try:
        done = subprocess.run(
            [*command, json.dumps(asdict(cell))], capture_output=True, text=True, timeout=timeout,
            # Freed tensors leave the process at once, so that memory is what is really in use.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"timed_out_after": timeout}
    if done.returncode:
        raise SystemExit(f"{cell.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def installed(name: str) -> str | None:
    """The version of a package; captum may be missing where nothing is compared with it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def load(out: Path) -> dict[str, Any]:
    """The figures that are there, or none; ends the program where they are of another machine."""
    new = empty()
    if not out.is_file():
        return new
    try:
        report: dict[str, Any] = json.loads(out.read_text())
        for block in ("hardware", "versions"):
            if report[block] != new[block]:
                refuse(
                    f"{out}: {block} {report[block]} there, {new[block]} now: give another --out"
                )
        for cell in report["cells"].values():
            cell["runs"] = [run for run in cell["runs"] if not unasked(run)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        refuse(f"{out} is no result of this benchmark: {type(error).__name__}: {error}")
    return report


def refuse(text: str) -> NoReturn:
    print(text, file=sys.stderr)
    raise SystemExit(OTHERWISE)


def unasked(run: dict[str, Any]) -> bool:
    """Whether it ran out of memory that nobody had limited: no figure, but a failure."""
    return bool(run.get("too_little_memory")) and run["limit_gib"] is None


def empty() -> dict[str, Any]:
    return {
        "hardware": {
            "machine": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: installed(name) for name in ("torch", "transformers", "captum")},
        },
        "cells": {},
    }


def medians(runs: list[dict[str, Any]], key: str) -> float | None:
    values = [run[key] for run in runs if run.get(key) is not None]
    return statistics.median(values) if values else None


def difference(report: dict[str, Any], name: str) -> float | None:
    """How far captum's scores are from ours, relative to the largest; None without both."""
    other = report["cells"].get(name.replace(f"/{OURS}/", f"/{THEIRS}/"), {"runs": []})
    mine, theirs = (
        next((run["scores"] for run in runs if "scores" in run), None)
        for runs in (report["cells"][name]["runs"], other["runs"])
    )
    if mine is None or theirs is None or f"/{OURS}/" not in name:
        return None
    one, two = torch.tensor(mine), torch.tensor(theirs)
    return float((one - two).abs().max() / two.abs().max())


def show(report: dict[str, Any]) -> None:
    table = Table("cell", "runs", "s per point", "s per example", "peak GiB", "above model GiB",
                  "TFLOP/s", "from captum")  # fmt: skip
    for name, cell in report["cells"].items():
        runs = cell["runs"]
        if any(run.get("too_little_memory") for run in runs):
            limit = next(run["limit_gib"] for run in runs if run.get("too_little_memory"))
            memory = "the memory there is" if limit is None else f"{limit} GiB"
            table.add_row(name, str(len(runs)), f"does not fit into {memory}")
            continue
        keys = ("seconds_per_point", "seconds_per_example", "peak_bytes",
                "peak_bytes_above_model", "flop_per_second")  # fmt: skip
        figures = [medians(runs, key) for key in keys]
        scale = (1, 1, _GIB, _GIB, 1e12)
        texts = [
            "" if figure is None else f"{figure / unit:.3g}"
            for figure, unit in zip(figures, scale, strict=True)
        ]
        off = difference(report, name)
        table.add_row(name, str(len(runs)), *texts, "" if off is None else f"{off:.0e}")
    Console().print(table)


def plot(report: dict[str, Any], path: Path) -> None:
    """Seconds per point and memory above the model, by prompt length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = {}
    for cell in report["cells"].values():
        facts = cell["cell"]
        key = facts["shape"], facts["contestant"]
        lines.setdefault(key, {})[facts["prompt"]] = cell["runs"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4))
    shapes = list(dict.fromkeys(shape for shape, _ in lines))
    units = ("seconds_per_point", "seconds per point", 1.0), (
        "peak_bytes_above_model", "GiB above the model", _GIB,
    )  # fmt: skip
    for axis, (field, label, unit) in zip(axes, units, strict=True):
        for (shape, who), by_prompt in lines.items():
            found = {p: medians(runs, field) for p, runs in sorted(by_prompt.items())}
            known = {prompt: value / unit for prompt, value in found.items() if value is not None}
            axis.plot(
                list(known), list(known.values()), marker="o",
                color=f"C{shapes.index(shape)}", linestyle="-" if who == OURS else "--",
                label=f"{shape} {who}",
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel=label)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=["4x256", "8x512", "16x1024"],
                        choices=sorted(SHAPES))  # fmt: skip
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--contestants", nargs="+", default=[OURS, THEIRS])
    parser.add_argument("--points", type=int, help="per example; by default fewer for long ones")
    parser.add_argument("--recompute", choices=["auto", "yes", "no"], default="auto")
    parser.add_argument("--examples", type=int, default=1)
    parser.add_argument("--response", type=int, default=10, help="tokens, give or take 3")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--memory-gib", type=float, help="most memory of a CPU process")
    parser.add_argument("--whole", action="store_true", help="all of extract, adaptive points")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds per measurement")
    parser.add_argument("--out", type=Path, help="figures (JSON); goes on from what is there")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell is not None:
        print(json.dumps(measure(Cell(**json.loads(args.cell)))))
        return
    if args.out is None:
        parser.error("--out is missing")
    report, cells = load(args.out), cells_of(args)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("measurements", total=args.repeats * len(cells))
        for number in range(args.repeats):
            for cell in cells:
                kept = report["cells"].setdefault(cell.name, {"cell": asdict(cell), "runs": []})
                if kept["cell"] != asdict(cell):
                    refuse(f"{cell.name}: {args.out} has it with other settings")
                bar.update(task, description=cell.name)
                if len(kept["runs"]) <= number:
                    kept["runs"].append(run(cell, args.timeout))
                    write_aside(args.out, json.dumps(report, indent=1).encode())
                bar.advance(task)
    show(report)
    if args.plot is not None:
        plot(report, args.plot)
    failed = [
        name for name, cell in report["cells"].items() if any(unasked(run) for run in cell["runs"])
    ]
    if failed:
        raise SystemExit(f"out of memory: {', '.join(failed)}")


if __name__ == "__main__":
    main()
