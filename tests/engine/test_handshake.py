"""An engine whose worker never loaded the plugin does not start: it would answer unsteered."""

from pathlib import Path

import pytest

from tests.warm import run_python

pytestmark = pytest.mark.engine

CODE = """
import sys
from grains_vllm import plugin
plugin.register()
plugin.enable()
from vllm import LLM
from vllm.v1.worker.worker_base import WorkerWrapperBase
# What a worker on a machine without the plugin looks like.
del WorkerWrapperBase.load_model, WorkerWrapperBase.grains_installed
LLM(
    sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, max_model_len=256,
    additional_config={"grains": {"config": sys.argv[2]}},
)
"""


def test_a_worker_without_the_plugin_stops_the_start(worlds: Path):
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    model, catalogue = worlds / "llama", worlds / "llama.yaml"
    done = run_python("-c", CODE, model, catalogue, environment=environment)
    assert done.returncode != 0
    assert "GrainsConfigError: --enable-grains: a worker has not loaded the plugin" in done.stderr
