"""An engine whose worker never loaded the plugin does not start: it would answer unsteered."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(worlds / "llama"), str(worlds / "llama.yaml")],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "GrainsConfigError: --enable-grains: a worker has not loaded the plugin" in done.stderr
