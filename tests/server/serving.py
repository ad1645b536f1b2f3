"""A real `vllm serve --enable-grains` on a free port, as the tests want it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai

from benchmarks.server import ROOT, free_port, running

MODEL = ROOT / "benchmarks" / "sycophancy" / "model"


@dataclass
class Server:
    """A running server; its model is served under the name `tiny`."""

    url: str
    client: openai.OpenAI
    log: Path


@contextmanager
def serve(model: Path, catalogue: Path, *flags: str) -> Iterator[Server]:
    """Serves `model` in float32 without compilation until the block is left."""
    port, log = free_port(), catalogue.with_suffix(".log")
    command = [
        *("vllm", "serve", str(model)),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)),
        *("--enable-grains", "--grains-config", str(catalogue)),
        *("--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--block-size", "32"),
        *flags,
    ]
    # The worker lives in the engine's process, as on a GPU; on a CPU it would be one more to start.
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with running(command, port, log, variables) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        yield Server(url, client, log)
