"""How fast a sweep is: one vLLM engine, against transformers with hooks, one point after another.

Both score the same items at the same points, and their log-likelihoods are compared. transformers
runs as `grains sweep` runs it (32 items per forward) and as a plain script does, one item per
forward; being proportional, the latter takes only some of the points, which the report says. Every
contestant lives in a process of its own, and they take turns.

    python -m benchmarks.sweep --out benchmarks/results/sweep-cpu.json
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.sycophancy.world import sample_control, sample_text, write_pairs
from grains_vllm.vectors import ModelFingerprint, SteeringVector, write_aside
from offline.backends import transformers_back_end
from offline.engine_scorer import EngineScorer
from offline.grid import grid
from offline.model import as_decoder
from offline.pairs import load_pairs
from offline.scoring import Item, Point, Scorer
from offline.suite import load_suite
from offline.transformers_scorer import TransformersScorer

TINY = Path(__file__).parent / "sycophancy" / "model"
STRENGTHS = "0.05,0.1,0.15,0.2,0.25,0.3,0.4,0.5"
# How every contestant scores, and of how many points it is one in.
CONTESTANTS = {
    "vLLM, one engine": "engine",
    "transformers, 32 items per forward": "32",
    "transformers, one item per forward": "1",
}


@dataclass(frozen=True)
class World:
    """A model on disk, what is scored, and 64 points.

    Attributes:
        sampled: of how many points the slowest contestant takes one.
    """

    model: Path
    vector: SteeringVector
    items: list[Item]
    points: list[Point]
    sampled: int

    @property
    def longest(self) -> int:
        return max(len(item.prompt_ids) + len(item.response_ids) for item in self.items)


def tiny(folder: Path, seed: int) -> World:
    """The committed model with pairs, controls and texts of its own; a random vector."""
    rng = Random(seed)
    write_pairs(folder / "pairs.jsonl", "validation", 60, seed)
    controls = [sample_control(rng) for _ in range(60)]
    lines = [{"prompt": control.prompt, "completion": control.instructed} for control in controls]
    (folder / "controls.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "texts.txt").write_text("".join(sample_text(rng) + "\n" for _ in range(20)))
    back_end = transformers_back_end(str(TINY), "float32", "cpu")
    suite = load_suite(
        load_pairs(str(folder / "pairs.jsonl")), back_end.tokenizer, back_end.config,
        folder / "controls.jsonl", folder / "texts.txt",
    ).suite  # fmt: skip
    vector = random_vector(back_end.fingerprint, 10.0, seed)
    points = grid({"random": vector}, "single;0-1;1-2;2-3;all", STRENGTHS, "all")
    return World(TINY, vector, suite.items, points, sampled=8)


def larger(folder: Path, seed: int) -> World:
    """A random Llama of 8 layers x 512 and 32000 tokens; pairs of 60 + 10 tokens, texts of 60."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    rng = Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 32000) for _ in range(rng.randint(low, high)))

    items = []
    for _ in range(8):
        prompt = ids(50, 70)
        items += [Item(prompt, ids(7, 13)), Item(prompt, ids(7, 13))]
    items += [Item(ids(50, 70), ids(7, 13)) for _ in range(8)]
    items += [Item(ids(1, 1), ids(50, 70)) for _ in range(4)]
    vector = random_vector(ModelFingerprint("LlamaForCausalLM", 512, 8), 5.0, seed)
    points = grid({"random": vector}, "single", STRENGTHS, "all")
    return World(folder / "model", vector, items, points, sampled=8)


WORLDS: dict[str, Callable[[Path, int], World]] = {"tiny": tiny, "larger": larger}


def random_vector(model: ModelFingerprint, norm: float, seed: int) -> SteeringVector:
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(model.num_layers, model.hidden_size, generator=generator)
    norms = torch.full((model.num_layers,), norm)
    return SteeringVector(rows / rows.norm(dim=1, keepdim=True), norms, model)


def contestant(how: str, world: World, threads: int, pipe: Connection) -> None:
    """A process that scores on demand: sends the seconds of its start, then per run seconds, CPU
    seconds and the sums of log-likelihoods per point."""
    import torch

    started = time.perf_counter()
    scorer: Scorer
    if how == "engine":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        engine = EngineScorer(
            str(world.model), {"random": world.vector}, world.points, world.longest,
            {"dtype": "float32"},
        )  # fmt: skip
        engine.start()
        scorer = engine
    else:
        import transformers

        torch.set_num_threads(threads)
        model = transformers.AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32)
        scorer = TransformersScorer(
            as_decoder(model, None, "model"), {"random": world.vector}, int(how)
        )
    pipe.send(time.perf_counter() - started)
    while (points := pipe.recv()) is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        found = dict(scorer.score(world.items, points))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        pipe.send((wall, cpu, [[score.logp for score in found[n]] for n in range(len(points))]))


@contextmanager
def running(how: str, world: World, threads: int) -> Iterator[Connection]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=contestant, args=(how, world, threads, there)
    )
    process.start()
    there.close()
    try:
        yield here
        here.send(None)
        process.join(60)
    finally:
        if process.is_alive():
            process.terminate()
        process.join()


def measure(world: World, repeats: int, threads: int) -> dict[str, Any]:
    from contextlib import ExitStack

    report: dict[str, Any] = {}
    scores: dict[str, list[list[float]]] = {}
    with ExitStack() as stack:
        pipes = {}
        for name, how in CONTESTANTS.items():
            pipes[name] = stack.enter_context(running(how, world, threads))
            report[name] = {"start": pipes[name].recv(), "seconds": [], "cpu_seconds": []}
            report[name]["points"] = len(points_of(how, world))
            pipes[name].send(world.points[:1])  # what is done once only is done now
            pipes[name].recv()
        for _ in range(repeats):  # in turns, so that a slow spell hits all alike
            for name, how in CONTESTANTS.items():
                pipes[name].send(points_of(how, world))
                wall, cpu, scores[name] = pipes[name].recv()
                report[name]["seconds"].append(wall)
                report[name]["cpu_seconds"].append(cpu)
    reference = scores["transformers, 32 items per forward"]
    for name, how in CONTESTANTS.items():
        own = reference[:: world.sampled] if how == "1" else reference
        report[name]["largest_difference"] = max(
            abs(a - b) for row, other in zip(scores[name], own, strict=True)
            for a, b in zip(row, other, strict=True)
        )  # fmt: skip
    return {
        "items": len(world.items),
        "tokens": sum(len(item.prompt_ids) + len(item.response_ids) for item in world.items),
        "points": len(world.points),
        "contestants": report,
    }


def points_of(how: str, world: World) -> Sequence[Point]:
    return world.points[:: world.sampled] if how == "1" else world.points


def per_point(entry: dict[str, Any], key: str = "seconds") -> float:
    return statistics.median(entry[key]) / entry["points"]


def show(report: dict[str, Any]) -> None:
    for name, world in report["worlds"].items():
        table = Table(
            title=f"{name}: {world['points']} points x {world['items']} items, "
            f"{world['tokens']} tokens per point"
        )
        columns = (
            "",
            "s per point",
            "ratio",
            "CPU s per point",
            "ratio",
            "start",
            "ratio with start",
        )
        for column in columns:
            table.add_column(column, justify="left" if not column else "right")
        engine = next(iter(world["contestants"].values()))
        for contestant_name, entry in world["contestants"].items():
            wall, cpu = per_point(entry), per_point(entry, "cpu_seconds")
            whole, engine_whole = (
                one["start"] + world["points"] * per_point(one) for one in (entry, engine)
            )
            table.add_row(
                contestant_name, f"{wall:.3f}", f"{wall / per_point(engine):.2f}",
                f"{cpu:.3f}", f"{cpu / per_point(engine, 'cpu_seconds'):.2f}",
                f"{entry['start']:.0f} s", f"{whole / engine_whole:.2f}",
            )  # fmt: skip
        Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of every contestant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures here (JSON)")
    args = parser.parse_args()
    # Before any contestant's process starts: this is read when its libraries are loaded.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    worlds = {}
    for name in args.worlds:
        with tempfile.TemporaryDirectory() as folder:
            world = WORLDS[name](Path(folder), args.seed)
            worlds[name] = measure(world, args.repeats, args.threads)
    report = {
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "worlds": worlds,
        "hardware": {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
        "load_average_at_end": os.getloadavg(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "vllm")},
        },
    }
    show(report)
    if args.out is not None:
        write_aside(args.out, json.dumps(report, indent=1, sort_keys=True).encode())


if __name__ == "__main__":
    main()
