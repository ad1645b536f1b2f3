"""Starts and stops a real `vllm serve --enable-grains` on a free port."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

MODEL = Path(__file__).parents[2] / "benchmarks" / "sycophancy" / "model"
START_LIMIT = 300  # seconds


@dataclass
class Server:
    """A running server; its model is served under the name `tiny`."""

    url: str
    client: openai.OpenAI
    log: Path


@contextmanager
def serve(model: Path, catalogue: Path, *flags: str) -> Iterator[Server]:
    """Serves `model` in float32 without compilation until the block is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        shutil.which("vllm", path=os.path.dirname(sys.executable)) or "vllm",
        "serve",
        str(model),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)),
        *("--enable-grains", "--grains-config", str(catalogue)),
        *("--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--block-size", "32"),
        *flags,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = catalogue.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        yield Server(url, client, log)
        assert process.poll() is None, log.read_text()[-4000:]
    finally:
        process.terminate()
        process.wait(60)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    pytest.fail(f"no /health within {START_LIMIT} s\n{log.read_text()[-4000:]}")
