"""How many kernels a decode step runs per layer: plain vLLM, the plugin idle, and steered.

Real vLLM engines in mode 3 run real decode steps under torch.profiler: compiled kernels are counted
where they run (on a GPU also inside CUDA graphs). On a machine without a GPU the code that Inductor
would generate for one is looked at too.

    python -m benchmarks.kernels --out benchmarks/results/kernels-cpu.json
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.kernels.formulas import FORMULAS, compare
from benchmarks.kernels.generated import cpp_token_loops, generate, triton_kernels
from benchmarks.kernels.models import ARCHITECTURES, LONGEST, Model
from benchmarks.kernels.piece import Piece, Size
from benchmarks.machine import code, hardware, versions
from grains_vllm.vectors import write_aside

ROOT = Path(__file__).parents[2]
COMPILED = re.compile(r"cpp_fused|triton_")


@dataclass(frozen=True)
class Engine:
    """One engine; without steered layers it is a vLLM that has not loaded the plugin.

    Attributes:
        steered: the layers that vectors may steer.
        together: vectors that one request may combine, and does when it is steered.
    """

    model: Model
    steered: tuple[int, ...] = ()
    together: int = 1

    @property
    def name(self) -> str:
        name = f"{self.model.family}, {self.model.layers} layers"
        if not self.steered:
            return f"{name}, plain"
        return f"{name}, {len(self.steered)} steerable, {self.together} together"


def engines(args: argparse.Namespace) -> Iterator[Engine]:
    for family in args.models:
        for layers in (args.layers, 2 * args.layers):
            model = Model(family, layers, args.hidden, args.dtype)
            yield Engine(model)
            yield Engine(model, tuple(range(layers)))
            if family != "llama":
                break  # One model twice as deep is enough to tell layers from ends.
            if layers == args.layers:
                yield Engine(model, (1,))
                yield Engine(model, tuple(range(layers)), 2)


def run(engine: Engine, folder: Path, runner: int) -> dict[str, Any]:
    """Starts the engine, counts, ends it.

    Args:
        runner: 1 or 2, vLLM's model runner.

    Raises:
        RuntimeError: it failed, and the message ends with what it printed, or it runs another
            model runner.
    """
    model = engine.model.write(folder / "model")
    arguments: dict[str, Any] = {
        "dtype": engine.model.dtype,
        "compilation_config": {"mode": 3},
        "max_model_len": LONGEST,
        "max_num_batched_tokens": LONGEST,
        "max_num_seqs": 16,
        "gpu_memory_utilization": 0.3,
    }
    steering: list[dict[str, str] | None] = [None]
    if engine.steered:
        catalogue = engine.model.write_vectors(folder, list(engine.steered), engine.together)
        arguments["additional_config"] = {"grains": {"config": str(catalogue)}}
        steering.append({"steering": ",".join("ab"[: engine.together])})
    asked, answered, cache = folder / "job.json", folder / "result.json", folder / "cache"
    asked.write_text(json.dumps({"model": str(model), "engine": arguments, "steering": steering}))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.engine", str(asked), str(answered)],
        cwd=ROOT,
        env={
            "VLLM_CPU_KVCACHE_SPACE": "1",
            **os.environ,
            # Nothing compiled elsewhere: sources are read from there afterwards.
            "VLLM_CACHE_ROOT": str(cache),
            "VLLM_USE_V2_MODEL_RUNNER": str(runner - 1),
            **({} if engine.steered else {"VLLM_PLUGINS": "none"}),
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{engine.name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(answered.read_text())
    if result["v2_runner"] != (runner == 2):
        raise RuntimeError(
            f"{engine.name}: V2 model runner is {result['v2_runner']}, asked {runner}"
        )
    loops = dict(_loops(cache))
    idle, *steered = result.pop("kernels")
    return {
        "model": asdict(engine.model),
        "steered_layers": list(engine.steered),
        "together": engine.together,
        **result,
        "idle" if engine.steered else "plain": _counts(idle, loops),
        **({"steered": _counts(steered[0], loops)} if steered else {}),
    }


def _loops(cache: Path) -> Iterator[tuple[str, int]]:
    """How many loops over tokens each C++ kernel has, by name, from its source."""
    for path in cache.rglob("*.cpp"):
        source = path.read_text()
        if name := re.search(r'"(?:graph_\d+_)?(cpp_fused\w+)"', source):
            yield name.group(1), cpp_token_loops(source)


def _counts(kernels: dict[str, float], loops: dict[str, int]) -> dict[str, Any]:
    compiled = {name: count for name, count in kernels.items() if COMPILED.search(name)}
    counts: dict[str, Any] = {
        "compiled": sum(compiled.values()),
        "other": sum(kernels.values()) - sum(compiled.values()),
        "kernels": kernels,
    }
    if loops:
        counts["token_loops"] = sum(loops[name] * count for name, count in compiled.items())
    return counts


def summarise(measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per engine and state, against the plain engine of the same model."""
    plains = {_model(result): result["plain"] for result in measured.values() if "plain" in result}
    lines = []
    for name, result in measured.items():
        for state in ("plain", "idle", "steered"):
            if state not in result:
                continue
            mine, plain = result[state], plains[_model(result)]
            steered = len(result["steered_layers"])
            lines.append(
                {
                    "engine": name,
                    "state": state,
                    **{key: mine.get(key) for key in ("compiled", "other", "token_loops")},
                    **{
                        f"extra_{key}_per_steered_layer": (
                            (mine[key] - plain[key]) / steered if steered else None
                        )
                        for key in ("compiled", "other", "token_loops")
                        if key in mine
                    },
                    "kernels_that_plain_has_not": _beyond(mine, plain),
                    "kernels_only_of_plain": _beyond(plain, mine),
                }
            )
    return lines


def _model(result: dict[str, Any]) -> str:
    return json.dumps(result["model"], sort_keys=True)


def _beyond(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Runs per step of compiled kernels that `other` lacks; names without their serial number."""
    mine_by_name, others = (Counter(_unnumbered(counts["kernels"])) for counts in (mine, other))
    return {
        name: count - others[name]
        for name, count in sorted(mine_by_name.items())
        if count > others[name]
    }


def _unnumbered(kernels: dict[str, float]) -> dict[str, float]:
    counts: dict[str, float] = {}
    for name, count in kernels.items():
        if COMPILED.search(name):
            bare = re.sub(r"_\d+$", "", name)
            counts[bare] = counts.get(bare, 0) + count
    return counts


def per_layer(measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Compiled kernels and others by layer, from models that differ in nothing but depth."""
    found: dict[str, dict[str, float]] = {}
    for state in ("plain", "idle", "steered"):
        deep = sorted(
            (result["model"]["layers"], result[state])
            for result in measured.values()
            if state in result
            and result["model"]["family"] == "llama"
            and result["together"] == 1
            and len(result["steered_layers"]) in (0, result["model"]["layers"])
        )
        if len(deep) == 2:
            (few, shallow), (many, deeper) = deep
            found[state] = {
                key: (deeper[key] - shallow[key]) / (many - few)
                for key in ("compiled", "other", "token_loops")
                if key in shallow
            }
    return found


def generated_for_cuda() -> list[dict[str, Any]]:
    lines = []
    for output in ("sum", "single"):
        for hidden in (1024, 1536, 4096):
            for parts in (0, 1, 2):
                with torch.device("meta"):
                    piece = Piece(output, Size(hidden, parts))
                found = triton_kernels(generate(piece, hidden, torch.bfloat16, "cuda"))
                lines.append(
                    {
                        "output": output,
                        "hidden": hidden,
                        "parts": parts,
                        "kernels": [asdict(kernel) for kernel in found],
                    }
                )
    return lines


def show(report: dict[str, Any]) -> None:
    console = Console()
    table = Table(title="Runs per decode step (token loops: in C++ sources)")
    for column in ("engine", "", "compiled kernels", "others", "token loops"):
        table.add_column(column, justify="left" if column in ("engine", "") else "right")
    table.add_column("extra compiled / others / loops per steered layer", justify="right")
    for line in report["summary"]:
        extra = [
            line.get(f"extra_{key}_per_steered_layer")
            for key in ("compiled", "other", "token_loops")
        ]
        table.add_row(
            line["engine"],
            line["state"],
            *(_figure(line[key]) for key in ("compiled", "other", "token_loops")),
            " / ".join(map(_figure, extra)),
        )
    console.print(table)
    console.print("per layer:", report["per_layer"])
    table = Table("", "hidden", "vectors", "kernels", title="Generated for CUDA, not run")
    table.add_column("the last: passes / row loads / row stores", justify="right")
    for line in report.get("generated_for_cuda", []):
        last = line["kernels"][-1]
        table.add_row(
            line["output"],
            str(line["hidden"]),
            str(line["parts"]),
            str(len(line["kernels"])),
            f"{last['passes'] or 'registers'} / {last['loads']} / {last['stores']}",
        )
    console.print(table)
    if "formulas" in report:
        table = Table("hidden", "vectors", "dtype", "tokens", *FORMULAS, title="Times add + norm")
        for case in report["formulas"]["timed"]:
            for tokens, found in case["tokens"].items():
                table.add_row(
                    *(str(case[key]) for key in ("hidden", "parts", "dtype")),
                    tokens,
                    *(f"{found['ratio'][name][1]:.2f}" for name in FORMULAS),
                )
        console.print(table)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runner", type=int, choices=(1, 2), default=1, help="vLLM's model runner")
    parser.add_argument("--rounds", type=int, default=25, help="of the formulas' timing; 0: none")
    parser.add_argument("--out", type=Path, help="write the figures here (JSON)")
    args = parser.parse_args()
    measured: dict[str, dict[str, Any]] = {}
    report: dict[str, Any] = {
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "versions": versions(),
        "hardware": hardware(),
        "code": code(),
        "engines": measured,
    }
    for engine in track(list(engines(args)), "engines"):
        with tempfile.TemporaryDirectory() as folder:
            measured[engine.name] = run(engine, Path(folder), args.runner)
        report |= {"summary": summarise(measured), "per_layer": per_layer(measured)}
        _write(report, args.out)  # each engine takes its minute, and the next may fail
    if not torch.cuda.is_available():
        report["generated_for_cuda"] = generated_for_cuda()
    if args.rounds:
        sizes = [Size(4096, 1), Size(4096, 2), Size(1024, 1)]
        report["formulas"] = compare(sizes, [2, 16, 256], args.rounds)
    show(report)
    _write(report, args.out)


def _write(report: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        write_aside(out, json.dumps(report, indent=2).encode())


if __name__ == "__main__":
    main()
