"""Runs Python programs that need vLLM, whose import takes long, in forks of a process that has it.

To the program nothing is different: it is a process of its own, with its own arguments, variables
and output, and it ends like any other.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Most of these vLLM itself imports only once it needs them.
_IMPORTS = (
    "vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.v1.engine.core",
    "torch._dynamo.convert_frame", "torch._inductor.compile_fx", "torch._inductor.codecache",
)  # fmt: skip


def run_python(
    *arguments: object, environment: dict[str, str] | None = None, v2_runner: bool = False
) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` does in the repository's folder.

    Args:
        arguments: `-m MODULE` or `-c CODE`, and the program's own.
        environment: variables besides those of this process.
        v2_runner: with vLLM's V2 model runner (tests/engine/interpreted_triton.py).
    """
    warm = _warm(v2_runner)
    assert warm.stdin and warm.stdout
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        job = {
            "arguments": list(map(str, arguments)),
            "environment": {**os.environ, **(environment or {})},
            "outputs": list(map(str, outputs)),
        }
        try:
            print(json.dumps(job), file=warm.stdin, flush=True)
            code = int(warm.stdout.readline())
        except BaseException:  # a test that has run out of time, or Ctrl-C
            os.killpg(warm.pid, signal.SIGKILL)
            _warm.cache_clear()
            raise
        return subprocess.CompletedProcess(
            job["arguments"], code, *(path.read_text() for path in outputs)
        )


@cache
def _warm(v2_runner: bool) -> subprocess.Popen[str]:
    """The process that is forked; it ends with this one."""
    warm = subprocess.Popen(
        [sys.executable, "-m", __name__, *(["v2"] if v2_runner else [])],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,  # to be killed with its forks
    )  # fmt: skip
    atexit.register(warm.kill)
    return warm


def main(v2_runner: bool) -> None:
    """Reads a job a line and writes its exit code; in a fork, runs the job instead."""
    before = dict(os.environ)
    # For answers alone: some releases of vLLM log to stdout when they are imported.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if v2_runner:
        from tests.engine.interpreted_triton import select_v2_runner

        select_v2_runner()
    for name in _IMPORTS:
        import_module(name)
    assert "grains_vllm" not in sys.modules  # some of the programs are to run without
    imported = {name: text for name, text in os.environ.items() if before.get(name) != text}
    gc.freeze()  # The forks need not look at what is here already, which they share.
    for line in sys.stdin:
        fork = os.fork()
        if fork == 0:
            _become(json.loads(line), imported)
            return
        _, status = os.waitpid(fork, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _become(job: dict[str, Any], imported: dict[str, str]) -> None:
    """Runs a job; `imported` are the variables that the imports have set."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for place, path in enumerate(job["outputs"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), place)
    os.environ.clear()
    os.environ.update(job["environment"] | imported)
    option, program, *sys.argv[1:] = job["arguments"]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(program, {"__name__": "__main__"})


if __name__ == "__main__":
    main("v2" in sys.argv)
