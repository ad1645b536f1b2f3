"""A `vllm serve --enable-grains` of one's own, for as long as a block runs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from offline.errors import InputError

START_LIMIT_S = 1800  # large models load for many minutes; one that has died is noticed at once
STOP_LIMIT_S = 60
_EARLY = "vllm serve ended early"
LOG_TAIL = 4000  # characters of the log's end that an error quotes
_ERROR = re.compile(r"\b\w*Error\b: ")


@contextmanager
def serving(
    model: str, name: str, vectors: Mapping[str, Mapping[str, Any]], flags: Sequence[str] = ()
) -> Iterator[str]:
    """Serves `model` under `name`, with one alias `name:vector` per entry of `vectors`.

    Args:
        model: folder or hub id.
        vectors: catalogue entries, `path` among them, by name.
        flags: further flags of `vllm serve`.

    Yields:
        The server's address, once it is healthy.

    Raises:
        InputError: it ended early or was not healthy in time; the message ends with its log.
    """
    with tempfile.TemporaryDirectory(prefix="grains-") as folder:
        catalogue, log = Path(folder, "steering.yaml"), Path(folder, "server.log")
        entries = {
            key: {**entry, "path": str(Path(entry["path"]).resolve())}
            for key, entry in vectors.items()
        }
        catalogue.write_text(json.dumps({"vectors": entries}))  # JSON is YAML
        port = _free_port()
        command = [
            *(_vllm(), "serve", model, "--served-model-name", name),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--enable-grains", "--grains-config", str(catalogue), *flags),
        ]
        with log.open("w") as output:
            # Nobody else can reach it, and it must not ask for the key of another server.
            env = {key: value for key, value in os.environ.items() if key != "VLLM_API_KEY"}
            server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        try:
            _wait_until_healthy(server, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        except InputError as error:
            if server.poll() is not None and _EARLY not in str(error):
                raise InputError(f"{error}\n{_ended(server, log)}") from error
            raise
        finally:
            server.terminate()
            try:
                server.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _vllm() -> str:
    """The command of this Python's environment, also when it is not activated."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which("vllm", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        raise InputError("there is no `vllm` here to serve the model; or use --url")
    return found


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _wait_until_healthy(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        _require_alive(server, log)
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise InputError(f"vllm serve: not healthy within {START_LIMIT_S} s:\n{_tail(log)}")


def _require_alive(server: "subprocess.Popen[bytes]", log: Path) -> None:
    if server.poll() is not None:
        raise InputError(_ended(server, log))


def _ended(server: "subprocess.Popen[bytes]", log: Path) -> str:
    return f"{_EARLY}, with exit code {server.poll()}:\n{_tail(log)}"


def _tail(log: Path) -> str:
    """The lines that report errors, which often stand far above the end, and the end."""
    text = log.read_text(errors="replace")
    end = text[-LOG_TAIL:]
    reported = [line for line in text[:-LOG_TAIL].splitlines() if _ERROR.search(line)]
    causes = list(dict.fromkeys(line[-300:] for line in reported))[-8:]
    return "\n".join([*causes, "...", end] if causes else [end])
