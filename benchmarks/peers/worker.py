"""One contestant's process: reads questions as JSON lines on stdin, answers them on stdout.

    python -m benchmarks.peers.worker KIND FOLDER eager|compiled

A question is {"prompts": [[token]], "steer": [name or null], "tokens": N, "fresh": bool}; fresh
says to empty the prefix cache first. The answer has "tokens" (N greedy ones per prompt), "seconds"
and, where there is a prefix cache, "cached" (prompt tokens taken from it), or "error". Runs in the
contestant's own environment, so it imports little.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol


class Peer(Protocol):
    def generate(
        self, prompts: list[list[int]], steer: list[str | None], tokens: int, fresh: bool
    ) -> dict[str, Any]:
        """Answers a question, without the seconds."""


def make(kind: str, folder: Path, mode: str) -> Peer:
    if kind in ("vllm", "grains", "hotwire"):
        from benchmarks.peers.vllm_peers import VllmPeer

        return VllmPeer(kind, folder, mode == "eager")
    from benchmarks.peers.transformers_peers import PEERS

    return PEERS[kind](folder)


def main(kind: str, folder: str, mode: str) -> None:
    # Whatever libraries print goes to stderr; stdout is for answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    try:
        peer = make(kind, Path(folder), mode)
    except Exception as error:  # It does not work here, in whichever way: that is a result.
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
        return
    print(json.dumps({"start_seconds": time.perf_counter() - started}), file=answers)
    for line in sys.stdin:
        question = json.loads(line)
        begun = time.perf_counter()
        try:
            answer = peer.generate(**question)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answer["seconds"] = time.perf_counter() - begun
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
