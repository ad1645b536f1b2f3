"""A contestant's process, seen from outside."""

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]


class PeerProcess:
    """Asks one worker.py; a context manager, which ends the process.

    Attributes:
        error: why it could not start, else None.
    """

    def __init__(self, python: str, kind: str, folder: Path, mode: str, threads: int) -> None:
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # Everybody gets the same threads, and nobody is bound to a core of his own.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
        }
        self.log = folder / f"{kind}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.peers.worker", kind, str(folder), mode],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.error: str | None = self._answer().get("error")

    def ask(
        self,
        prompts: list[list[int]],
        steer: list[str | None],
        tokens: int,
        *,
        fresh: bool = False,
    ) -> dict[str, Any]:
        """One question; see worker.py."""
        assert self._process.stdin is not None
        question = {"prompts": prompts, "steer": steer, "tokens": tokens, "fresh": fresh}
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = self.log.read_text().strip().splitlines()[-1:] or ["nothing"]
            return {"error": f"the process ended; its last words: {last[0]}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> "PeerProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()  # the end of its questions
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
