"""The steps, most valuable first: the command of each and how long it may take."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

RESULT = "RESULT"  # stands for the step's result file in a command
WORK = "WORK"  # and for the folder of models and logs


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        command: after the interpreter.
        seconds: the limit.
        least: seconds below which it is not begun.
        minutes_flag: takes `--minutes`, so that it can end by itself and be gone on with.
    """

    command: tuple[str, ...]
    seconds: float
    least: float
    minutes_flag: bool = False


def steps(tiny: bool) -> Mapping[str, Step]:
    """By name; `tiny` is the same on a CPU in minutes, to see that the script itself works."""
    return {
        "probe": Step(("-m", "benchmarks.gpu.probe", "--out", RESULT), 60, 5),
        # V2 first: on GPUs vLLM chooses it for dense models.
        "identity-v2": _check("identity", 2, tiny),
        "overhead-8b": _overhead("8b", (16, 256), tiny),
        "reference-v2": _check("reference", 2, tiny),
        "kernels": _kernels(tiny),
        "identity-v1": _check("identity", 1, tiny),
        "overhead-8b-v1": _overhead("8b", (256,), tiny, runner=1),
        "overhead-1.5b": _overhead("1.5b", (1, 32, 256), tiny),
        "reference-v1": _check("reference", 1, tiny),
        "overhead-4b": _overhead("4b", (32,), tiny),
        "extraction-8b": _extraction(tiny),
    }


def _check(check: str, runner: int, tiny: bool) -> Step:
    more = ("--size", "tiny") if tiny else ("--gpu",)
    command = (check, "--runner", str(runner), *more, "--work", WORK, "--out", RESULT)
    return Step(("-m", "benchmarks.gpu.checks", *command), 420, 60)


def _overhead(shape: str, sizes: tuple[int, ...], tiny: bool, runner: int = 2) -> Step:
    # Two engines share a GPU; the first must not take all of it.
    words = (
        "--shape tiny --sizes 4 --rounds 2 --eager --arms plain idle 256"
        " --input-len 16 --output-len 8"
        if tiny
        else f"--shape {shape} --sizes {' '.join(map(str, sizes))} --rounds 5"
        " --input-len 128 --output-len 64"
    )
    how = words.split()
    if not tiny:
        how += ["--engine-args", "--gpu-memory-utilization 0.4"]
    # Servers cannot run V2 on a CPU.
    command = ("-m", "benchmarks.overhead", *how, "--runner", "1" if tiny else str(runner))
    # Both engines start anew each time, one after the other, and are warmed up by every arm.
    least = 120 if tiny else 400
    return Step((*command, "--work", WORK, "--out", RESULT), 580, least, minutes_flag=True)


def _kernels(tiny: bool) -> Step:
    how = "--models gpt2 --layers 1 --runner 1" if tiny else "--models llama --runner 2"
    words = f"{how} --rounds 0"  # the formulas' timing is of processors
    return Step(("-m", "benchmarks.kernels", *words.split(), "--out", RESULT), 580, 180)


def _extraction(tiny: bool) -> Step:
    words = (
        "--shapes 4x256 --prompts 64 --examples 2"
        if tiny
        else "--shapes 8b --prompts 200 --examples 25 --device cuda --dtype bfloat16 --repeats 1"
    )
    command = ("-m", "benchmarks.extraction_grid", "--whole", *words.split(), "--out", RESULT)
    return Step(command, 580, 180)


def filled(step: Step, result: Path, work: Path, seconds: float) -> list[str]:
    """The command line of a step that has so many seconds."""
    names = {RESULT: str(result), WORK: str(work)}
    command = [sys.executable, *(names.get(word, word) for word in step.command)]
    if step.minutes_flag:
        # What has begun is finished, and the servers are stopped.
        command += ["--minutes", f"{max(seconds - 45, 30) / 60:.2f}"]
    return command
