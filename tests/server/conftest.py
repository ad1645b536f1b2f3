"""A real `vllm serve --enable-grains` on a free port, shared by all tests of this folder."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoConfig

from grains_vllm.vectors import ModelFingerprint, SteeringVector

MODEL = Path(__file__).parents[2] / "benchmarks" / "sycophancy" / "model"
START_LIMIT = 300  # seconds


@dataclass
class Server:
    url: str
    client: openai.OpenAI
    log: Path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    _write_catalogue(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    command = [
        shutil.which("vllm", path=os.path.dirname(sys.executable)) or "vllm",
        "serve",
        str(MODEL),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)),
        *("--enable-grains", "--grains-config", str(folder / "steering.yaml")),
        *("--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--block-size", "32"),
        "--enable-prompt-tokens-details",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
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


def _write_catalogue(folder: Path) -> None:
    config = AutoConfig.from_pretrained(MODEL)
    lines = ["vectors:"]
    for seed, name in enumerate(("truthful", "polite")):
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(config.num_hidden_layers, config.hidden_size, generator=generator)
        SteeringVector(
            directions / directions.norm(dim=1, keepdim=True),
            torch.full((config.num_hidden_layers,), 5.0),
            ModelFingerprint.of(config),
        ).save(folder / f"{name}.safetensors")
        lines.append(f"  {name}: {{path: {name}.safetensors, strength: 0.5}}")
    (folder / "steering.yaml").write_text("\n".join(lines) + "\n")


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
