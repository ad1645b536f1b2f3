"""What steering costs, by vLLM's own benchmarks: plain, idle and steered engines in turns.

    python -m benchmarks.overhead --shape cpu --out benchmarks/results/overhead-cpu.json
    python -m benchmarks.overhead --show benchmarks/results/overhead-cpu.json

docs/speed.md says what the arms are and how to read the result. The same command goes on where it
was interrupted.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import machine
from benchmarks.overhead.arms import ARMS, DEFAULT, PLAIN
from benchmarks.overhead.hosts import Host, HostError, Load, Setup, engines, servers
from benchmarks.overhead.record import OTHERWISE, UNFINISHED, Key, Record, RecordError, read
from benchmarks.overhead.shapes import SHAPES, write_catalogue, write_model
from benchmarks.overhead.summary import METRICS, Line, lines, unmet
from benchmarks.server import ServerError

BENCHES = ("serve", "latency", "throughput")
WARM_UP_TOKENS = 4
console = Console(width=None if sys.stdout.isatty() else 110)


def main() -> int:
    args = _arguments()
    if args.show is not None:
        try:
            document = read(args.show)
        except RecordError as error:
            return _refused(error)
        show(document)
        if args.plot is not None:
            plot(document, args.plot)
        return 0
    began = time.monotonic()
    setup, settings = prepare(args)
    try:
        record = Record(args.out, settings)
    except RecordError as error:
        _refused(error)
        return OTHERWISE
    try:
        for bench in args.benches:
            left = None if args.minutes is None else args.minutes * 60 - time.monotonic() + began
            measure(bench, args, setup, record, left)
    except (HostError, ServerError) as error:
        return _refused(error)
    document = record.document()
    if len(record):
        show(document)
        if args.plot is not None:
            plot(document, args.plot)
    return UNFINISHED if any(_pending(bench, args, record) for bench in args.benches) else 0


def _refused(error: Exception) -> int:
    console.print(str(error), style="red", soft_wrap=True, markup=False, highlight=False)
    return 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=list(SHAPES), default="cpu")
    parser.add_argument("--benches", nargs="+", choices=BENCHES, default=["serve"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(DEFAULT))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 32, 256], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--waves", type=int, default=2, help="requests per place in the batch")
    parser.add_argument("--input-len", type=int, default=32, metavar="TOKENS")
    parser.add_argument("--output-len", type=int, default=32, metavar="TOKENS")
    parser.add_argument("--eager", action="store_true", help="nothing is compiled")
    parser.add_argument("--runner", type=int, choices=(1, 2), default=1, help="vLLM's model runner")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engine-args", default="", help="more flags for both engines, quoted")
    parser.add_argument("--minutes", type=float, help="begin no measurement after so long")
    parser.add_argument("--work", type=Path, default=Path("build/overhead"), help="models and logs")
    parser.add_argument("--out", type=Path, default=Path("build/overhead/overhead.json"))
    parser.add_argument("--plot", type=Path, help="a .png or .svg")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a result, measure nothing")
    args = parser.parse_args()
    if PLAIN not in args.arms:
        parser.error(f"--arms: {PLAIN} is missing, which everything is compared with")
    for name in ("rounds", "waves", "input_len", "output_len", *("sizes",)):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name.replace('_', '-')}: {values} is less than 1")
    if args.output_len < 2:
        parser.error("--output-len: 1 has no time per output token, 2 or more do")
    return args


def prepare(args: argparse.Namespace) -> tuple[Setup, dict[str, Any]]:
    """Writes the model and the vectors; returns how to start, and what figures depend on."""
    shape, vectors = SHAPES[args.shape], max(ARMS[name].vectors for name in args.arms)
    longest = args.input_len + args.output_len + 16
    work = args.work.resolve()
    model = write_model(work / f"{args.shape}-{args.dtype}-{longest}", shape, longest, args.dtype)
    catalogue = write_catalogue(work / f"{args.shape}-vectors-{vectors}", shape, vectors)
    flags = [
        "--load-format", "dummy", "--max-model-len", str(longest),
        "--max-num-seqs", str(max(args.sizes)), "--dtype", args.dtype,
        *(["--enforce-eager"] if args.eager else []), *shlex.split(args.engine_args),
    ]  # fmt: skip
    settings = {
        **{n: getattr(args, n) for n in ("shape", "waves", "input_len", "output_len", "runner")},
        "flags": flags,
        "vectors": vectors,
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "plugin": machine.code(),
    }
    return Setup((str(model), *flags), catalogue, args.runner, work), settings


def measure(
    bench: str, args: argparse.Namespace, setup: Setup, record: Record, seconds: float | None
) -> None:
    """Everything of one bench that is not yet there, until `seconds` are over."""
    began = time.monotonic()
    record.forget_unfinished(bench, args.arms)
    pending = _pending(bench, args, record)
    if not pending or (seconds is not None and seconds <= 0):
        return
    record.starts += 1
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
        _hosts(bench, setup) as host,
    ):
        task = progress.add_task(f"{bench}: warm-up", total=len(pending))
        for size, arm in dict.fromkeys((key.size, key.arm) for key in pending):
            host.measure(ARMS[arm], Load(size, 1, args.input_len, WARM_UP_TOKENS, seed=0))
        record.engines[bench] = host.facts()
        for key in pending:
            if seconds is not None and time.monotonic() - began > seconds:
                return
            progress.update(task, description=f"{bench}: batch {key.size}, {key.arm}")
            # The same prompts for all arms of a round; the cache is emptied before each.
            load = Load(key.size, args.waves, args.input_len, args.output_len, 1 + key.round)
            figures = host.measure(ARMS[key.arm], load)
            record.add(key, {**figures, "start": record.starts, "load": os.getloadavg()[0]})
            progress.advance(task)
            progress.console.print(
                f"{bench}, batch {key.size}, round {key.round}, {key.arm}: "
                f"{figures['per_token_ms']:.3f} ms per token"
            )


def _hosts(bench: str, setup: Setup) -> AbstractContextManager[Host]:
    return servers(setup) if bench == "serve" else engines(bench, setup)


def _pending(bench: str, args: argparse.Namespace, record: Record) -> list[Key]:
    """The schedule less what is there: A B C, then B C A, so that no arm is always first."""
    return [key for key in _schedule(bench, args) if key not in record]


def _schedule(bench: str, args: argparse.Namespace) -> Iterator[Key]:
    for number in range(args.rounds):
        turn = number % len(args.arms)
        for size in args.sizes:
            for arm in [*args.arms[turn:], *args.arms[:turn]]:
                yield Key(bench, size, number, arm)


def show(document: dict[str, Any]) -> None:
    """Prints a record as one table per benchmark and batch size."""
    found = lines(document)
    for bench, size in dict.fromkeys((line.bench, line.size) for line in found):
        here = [line for line in found if (line.bench, line.size) == (bench, size)]
        console.print(_table(f"vllm bench {bench}, batch {size}", here))
    for line in unmet(found):
        console.print(
            f"missed: {line.bench}, batch {line.size}, {line.arm}, {METRICS[line.metric]}: "
            f"{_ratio(line)}, wanted {line.target}"
        )


def _table(title: str, found: Sequence[Line]) -> Table:
    table = Table(title=title)
    for column in ("", "arm", "median ms", "ratio", "95% interval", "target"):
        table.add_column(column, justify="left" if column in ("", "arm") else "right")
    for metric in dict.fromkeys(line.metric for line in found):
        for line in (line for line in found if line.metric == metric):
            low, high, plain = line.low, line.high, line.arm == PLAIN
            table.add_row(
                METRICS[metric] if plain else "",
                line.arm,
                f"{median(line.values):.3f}" if line.values else "not measured",
                "" if plain else _ratio(line),
                "" if low is None or high is None else f"{low:.3f} to {high:.3f}",
                "" if line.target is None else f"{line.target:.2f} {line.verdict}",
            )
        table.add_section()
    return table


def _ratio(line: Line) -> str:
    return "not measured" if line.median_ratio is None else f"{line.median_ratio:.3f}"


def plot(document: dict[str, Any], path: Path) -> None:
    """Draws a record."""
    from benchmarks.overhead.figure import ratios
    from offline.plot_style import save

    settings = document["settings"]
    machine_name = ", ".join(settings["hardware"]["gpus"]) or settings["hardware"]["processor"]
    title = (
        f"{settings['shape']} shape, {settings['input_len']} + {settings['output_len']} tokens, "
        f"vLLM {settings['versions']['vllm']}, V{settings['runner']} runner, {machine_name}"
    )
    save(ratios(lines(document), title), path)


if __name__ == "__main__":
    sys.exit(main())
