"""Correctness and speed on a GPU, in one go, without network.

    python -m benchmarks.gpu --state state.json                       every step
    python -m benchmarks.gpu probe identity-v1 --state state.json     these
    python -m benchmarks.gpu --tiny --state /tmp/state.json           on a CPU, to try the script

Every step is a process with a time limit of its own, and its result is in the state file before the
next begins; a step that fails is written down and the next begins all the same. What the file holds
is not done again, so that the same command goes on elsewhere or later; what was half measured on
another machine begins afresh there. docs/speed.md has more.
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
from benchmarks.overhead.record import OTHERWISE, UNFINISHED
from benchmarks.server import ROOT, environment
from grains_vllm.vectors import write_aside

LOG_TAIL = 3000  # characters of a failed step's output that the state keeps
DONE = "done"


def main() -> int:
    args = _arguments()
    chosen = {name: steps(args.tiny)[name] for name in args.steps or steps(args.tiny)}
    try:
        state = _read(args.state)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.show:
        show(state)
        return 0
    args.state.parent.mkdir(parents=True, exist_ok=True)
    ended: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + 60 * args.minutes
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for name, step in chosen.items():
        left = deadline - time.monotonic()
        if state.get(name, {}).get("status") == DONE and not args.again:
            ended[name] = state[name]
            _tell(name, "was done before")
        elif left < step.least:
            _tell(name, f"not begun: {left:.0f} s are left, it needs {step.least:.0f}")
        else:
            _tell(name, f"begins, with {min(step.seconds, left):.0f} s")
            before = None if args.again else state.get(name, {}).get("result")
            ended[name] = _run(name, step, min(step.seconds, left), work, before)
            state[name] = _kept(state.get(name, {}), ended[name])
            write_aside(args.state, json.dumps(state, indent=1, sort_keys=True).encode())
            _tell(name, f"{ended[name]['status']} after {ended[name]['seconds']:.0f} s")
    unfinished = [name for name in chosen if ended.get(name, {}).get("status") != DONE]
    for name in unfinished:
        print(f"not done: {name}\n{ended.get(name, {}).get('log', '')[-600:]}")
    return 1 if unfinished else 0


def _read(path: Path) -> dict[str, Any]:
    """The state, empty where there is none.

    Raises:
        ValueError: the file cannot be read, or is something else.
    """
    if not path.exists():
        return {}
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--state {path} is no state of these steps: {error}") from None
    entries = state.values() if isinstance(state, dict) else [None]
    if not all(
        isinstance(entry, dict) and {"status", "seconds"} <= set(entry) for entry in entries
    ):
        raise ValueError(
            f"--state {path} is no state of these steps: an object of steps with status and "
            "seconds is wanted"
        )
    return dict(state)


def _kept(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What the state keeps of a step: a failure takes the place of no result, it stands beside."""
    if old.get("status") == DONE != new["status"]:
        return {**old, "again": new}
    return {**({"result": old["result"]} if "result" in old else {}), **new}


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
        if "again" in entry:
            print(f"done once more: {entry['again']['status']}, the earlier result is kept")
        result = entry.get("result")
        if isinstance(result, dict) and "measurements" in result:
            show_ratios(result)
        elif result is not None:
            print(json.dumps(result, indent=1))


def _run(name: str, step: Step, seconds: float, work: Path, before: Any) -> dict[str, Any]:
    """Runs a step; afresh where what it had found `before` cannot be gone on with here."""
    code, found = _once(name, step, seconds, work, before)
    if code == OTHERWISE and before is not None:
        _tell(name, "what the state has of it was measured otherwise: begins afresh")
        _, found = _once(name, step, seconds - found["seconds"], work, None)
    return found


def _once(
    name: str, step: Step, seconds: float, work: Path, before: Any
) -> tuple[int | None, dict[str, Any]]:
    """One process and its exit status; `before` is put where it goes on from there."""
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
    kinds = {0: DONE, UNFINISHED: "unfinished", None: "out of time"}
    found["status"] = kinds.get(code, "failed")
    if code != 0:
        found["log"] = log.read_text(errors="replace")[-LOG_TAIL:]
    if result.is_file():
        try:
            found["result"] = json.loads(result.read_text())
            if not isinstance(found["result"], dict):
                raise ValueError(f"an object is wanted, found {found.pop('result')!r:.60}")
        except ValueError as error:
            found["status"] = "failed"
            found["log"] = f"{found.get('log', '')}\n{result.name} is no result: {error}"
    return code, found


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
