"""A real `vllm serve` for as long as a block runs; the demo and the tests share it."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT_S = 300
LOG_TAIL = 4000  # characters of the log that an error quotes


class ServerError(RuntimeError):
    """The server ended early or never answered; the message ends with its log's last lines."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def tool(name: str) -> str:
    """A command of this Python's environment, also when it is not activated."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or name


def environment() -> dict[str, str]:
    """For children: nothing is fetched, and nothing is reported."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@contextmanager
def running(
    command: list[str],
    port: int,
    log: Path,
    variables: Mapping[str, str] | None = None,
    start_limit_s: float = START_LIMIT_S,
) -> Iterator[str]:
    """Runs `vllm serve ...` from the repository's folder until the block is left.

    Args:
        command: with `--host 127.0.0.1` and `--port`; its first word is looked up by `tool`.
        log: gets what the server prints.
        variables: environment variables for this server alone.
        start_limit_s: how long /health may take to answer.

    Yields:
        The server's URL, once /health answers.

    Raises:
        ServerError: it ended early, also within the block, or was not healthy in time.
    """
    with log.open("w") as output:
        server = subprocess.Popen(
            [tool(command[0]), *command[1:]],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment(), "VLLM_CPU_KVCACHE_SPACE": "1", **(variables or {})},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(url, server, log, start_limit_s)
        yield url
        _require_alive(server, log)
    finally:
        server.terminate()
        server.wait(60)


def _wait_until_healthy(
    url: str, server: subprocess.Popen[bytes], log: Path, limit_s: float
) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        _require_alive(server, log)
        try:
            with urlopen(f"{url}/health", timeout=5):
                return
        except OSError:  # nobody listens yet, or 503
            time.sleep(1)
    raise ServerError(f"no /health within {limit_s:g} s:\n{log.read_text()[-LOG_TAIL:]}")


def _require_alive(server: subprocess.Popen[bytes], log: Path) -> None:
    if server.poll() is not None:
        raise ServerError(f"vllm serve ended early:\n{log.read_text()[-LOG_TAIL:]}")
