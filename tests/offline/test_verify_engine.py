"""`grains verify --model`: an engine of one's own, whole and with a broken formula."""

import json

import pytest

from tests.tiny import save_world
from tests.vision import save_vision_world
from tests.warm import run_python

pytestmark = pytest.mark.engine

COMMAND = """
import sys
from offline.cli import app
{more}
app(sys.argv[1:])
"""
# The norm is not restored.
BREAK = """
from grains_vllm import layers
layers.shift = lambda stream, delta: stream.float() + delta.float()
"""


def verify(folder, more="", *arguments, model="llama"):
    """Exit code, report and output of one run."""
    report = folder / "report.json"
    arguments = (
        *("verify", "--model", folder / model, "--config", folder / f"{model}.yaml"),
        *("--engine-args", '{"dtype": "float32"}', "--json", report, "--force", *arguments),
    )
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = run_python("-c", COMMAND.format(more=more), *arguments, environment=environment)
    assert report.exists(), done.stdout[-3000:] + done.stderr[-5000:]
    return done.returncode, json.loads(report.read_text()), done.stdout


def test_an_engine_passes_and_equals_transformers(tmp_path):
    save_world(tmp_path, "llama")
    file = tmp_path / "llama_a.safetensors"
    code, report, output = verify(tmp_path, "", "--vector", f"a={file}", "--vector", "d")
    assert code == 0, output
    checks = {(check["check"], check["vector"]): check["verdict"] for check in report["checks"]}
    assert set(checks.values()) == {"passed"}, output
    assert ("transformers: as configured", "a") in checks
    assert ("transformers: two vectors", "a+d") in checks
    assert ("the receipt is right", "d") in checks
    assert ("cached tokens tell steerings apart", "a") in checks


def test_an_image_model_is_verified_on_words(tmp_path):
    save_vision_world(tmp_path, "llava")
    code, report, output = verify(tmp_path, "", "--vector", "a", model="llava")
    assert code == 0, output
    verdicts = {check["check"]: check["verdict"] for check in report["checks"]}
    assert set(verdicts.values()) == {"passed"}, output
    assert "transformers: as configured" in verdicts


def test_a_wrong_formula_is_found(tmp_path):
    save_world(tmp_path, "llama")
    code, report, output = verify(tmp_path, BREAK, "--vector", "a")
    assert code == 1, output
    checks = {check["check"]: check["verdict"] for check in report["checks"]}
    assert checks["transformers: plain"] == "passed"
    assert checks["transformers: as configured"] == "failed"
    assert checks["transformers: -s, all"] == "failed"
