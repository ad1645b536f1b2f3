"""Correctness and speed on a GPU, in one go, without network.

    python -m benchmarks.gpu --state state.json                       every step
    python -m benchmarks.gpu probe identity-v1 --state state.json     these
    python -m benchmarks.gpu --tiny --state /tmp/state.json           on a CPU, to try the script

Every step is a process with a time limit of its own, and its result is in the state file before the
next begins; a step that fails is written down and the next begins all the same. What the file holds
is not done again, so that the same command goes on elsewhere or later. docs/speed.md has more.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.metadata import folder_for_path
from benchmarks.gpu.steps import Step, filled, steps
from benchmarks.overhead.record import UNFINISHED
from benchmarks.server import ROOT, environment
from grains_vllm.vectors import write_aside

LOG_TAIL = 3000  # characters of a failed step's output that the state keeps
DONE = "done"


def main() -> int:
    args = _arguments()
    chosen = {name: steps(args.tiny)[name] for name in args.steps or steps(args.tiny)}
    state: dict[str, Any] = json.loads(args.state.read_text()) if args.state.is_file() else {}
    if args.show:
        show(state)
        return 0
    deadline = time.monotonic() + 60 * args.minutes
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for name, step in chosen.items():
        left = deadline - time.monotonic()
        if state.get(name, {}).get("status") == DONE and not args.again:
            _tell(name, "was done before")
        elif left < step.least:
            _tell(name, f"not begun: {left:.0f} s are left, it needs {step.least:.0f}")
        else:
            _tell(name, f"begins, with {min(step.seconds, left):.0f} s")
            before = None if args.again else state.get(name, {}).get("result")
            state[name] = _run(name, step, min(step.seconds, left), work, before)
            write_aside(args.state, json.dumps(state, indent=1, sort_keys=True).encode())
            _tell(name, f"{state[name]['status']} after {state[name]['seconds']:.0f} s")
    unfinished = [name for name in chosen if state.get(name, {}).get("status") != DONE]
    for name in unfinished:
        print(f"not done: {name}\n{state.get(name, {}).get('log', '')[-600:]}")
    return 1 if unfinished else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = list(steps(tiny=False))
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(names))
    parser.add_argument("--state", type=Path, required=True, help="results, read and written")
    parser.add_argument("--work", type=Path, default=Path("build/gpu"), help="models and logs")
    parser.add_argument("--minutes", type=float, default=20, help="for all steps together")
    parser.add_argument("--again", action="store_true", help="do what is done once more")
    parser.add_argument("--show", action="store_true", help="print the state, do nothing")
    parser.add_argument("--tiny", action="store_true", help="tiny models, no GPU needed")
    args = parser.parse_args()
    if unknown := [name for name in args.steps if name not in names]:
        parser.error(f"unknown steps {unknown}, there are {names}")
    return args


def show(state: dict[str, Any]) -> None:
    """Prints every step's result: ratios as tables, the rest as JSON."""
    from benchmarks.overhead.__main__ import show as show_ratios

    for name, entry in state.items():
        print(f"\n== {name}: {entry['status']} after {entry['seconds']:.0f} s")
        result = entry.get("result")
        if result is not None and "measurements" in result:
            show_ratios(result)
        elif result is not None:
            print(json.dumps(result, indent=1))


def _run(name: str, step: Step, seconds: float, work: Path, before: Any) -> dict[str, Any]:
    """Runs a step; what it had found `before` is put where it goes on from there."""
    result, log = work / f"{name}.json", work / f"{name}.log"
    result.unlink(missing_ok=True)
    if before is not None:
        write_aside(result, json.dumps(before).encode())
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            filled(step, result, work, seconds), cwd=ROOT, env=_environment(work),
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
    if result.is_file():
        found["result"] = json.loads(result.read_text())
    kinds = {0: DONE, UNFINISHED: "unfinished", None: "out of time"}
    found["status"] = kinds.get(code, "failed")
    if code != 0:
        found["log"] = log.read_text(errors="replace")[-LOG_TAIL:]
    return found


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a step and whatever engines it has left behind, all of them in its own session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        time.sleep(3 if number == signal.SIGTERM else 0)
    process.wait()


def _environment(work: Path) -> dict[str, str]:
    """The caller's, with the checkout and the plugin's entry points on the path."""
    found = environment()
    extra = [folder_for_path(work), ROOT]
    paths = [str(path) for path in extra if path is not None]
    found["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [found.get("PYTHONPATH")])])
    return found


def _tell(name: str, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {name}: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
