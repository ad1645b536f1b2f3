"""The door: which vLLM is let in, and that leaving puts everything back."""

import subprocess
import sys

import pytest
import vllm

from grains_vllm import plugin
from grains_vllm.plugin import TouchPoint


def test_this_vllm_is_supported():
    assert plugin.unsupported() is None


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0", "0.12.0.post2"])
def test_other_versions_are_refused_with_a_way_out(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    message = plugin.unsupported()
    assert f"vLLM {version} is installed" in message and "0.26 to 0.33" in message
    monkeypatch.setenv("GRAINS_ALLOW_UNTESTED_VLLM", "1")
    assert plugin.unsupported() is None


@pytest.mark.parametrize("version", ["0.26.0", "0.33.0", "0.32.0+cpu", "0.33.1.dev3"])
def test_supported_versions(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    assert plugin.unsupported() is None


def test_a_missing_symbol_is_named(monkeypatch):
    gone = TouchPoint("vllm.v1.engine.input_processor", "InputProcessor", "no_such_method")
    changed = TouchPoint(
        "vllm.v1.engine.input_processor", "InputProcessor", "process_inputs", ("no_such_argument",)
    )
    monkeypatch.setattr(plugin, "SERVING", (gone, changed))
    message = plugin.unsupported()
    assert "InputProcessor.no_such_method" in message
    assert "process_inputs: has no parameter no_such_argument" in message


def test_register_twice_is_register_once_and_unregister_restores_all():
    """In a process of its own, since wrapping is global."""
    code = """
from importlib import import_module
from grains_vllm import plugin
points = plugin.ENGINE_ARGS + plugin.SERVING
owners = {getattr(import_module(p.module), p.owner) for p in points}
before = {owner: dict(vars(owner)) for owner in owners}
plugin.register()
once = {owner: dict(vars(owner)) for owner in owners}
assert once != before
plugin.register()
assert {owner: dict(vars(owner)) for owner in owners} == once
plugin.unregister()
assert {owner: dict(vars(owner)) for owner in owners} == before
print("restored")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "restored" in done.stdout, done.stderr[-2000:]
