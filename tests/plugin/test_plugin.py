"""The door: which vLLM is let in, and that leaving puts everything back."""

import subprocess
import sys

import pytest
import vllm

from grains_vllm import plugin
from grains_vllm.plugin import TouchPoint


def test_this_vllm_is_supported():
    assert plugin.unsupported() is None


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0", "0.12.0.post2", "dev"])
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
    module = "vllm.v1.engine.input_processor"
    message = plugin.unsupported(
        [
            TouchPoint(module, "InputProcessor.no_such_method"),
            TouchPoint(module, "InputProcessor.process_inputs", ("no_such_argument",)),
            TouchPoint("vllm.no_such_module", "anything"),
        ]
    )
    assert "InputProcessor.no_such_method" in message
    assert "process_inputs: has no parameter no_such_argument" in message
    assert "vllm.no_such_module.anything: ModuleNotFoundError" in message


def test_register_twice_is_register_once_and_unregister_restores_all():
    """In a process of its own, since wrapping is global."""
    code = """
from importlib import import_module
from grains_vllm import plugin
points = plugin.FLAGS + plugin.ENGINE + plugin.FRONT_END
owners = {getattr(import_module(p.module), p.name.split(".")[0]) for p in points if "." in p.name}
before = {owner: dict(vars(owner)) for owner in owners}
plugin.register()
plugin.enable()
once = {owner: dict(vars(owner)) for owner in owners}
assert sum(once[owner] != before[owner] for owner in owners) == 7
plugin.register()
plugin.enable()
assert {owner: dict(vars(owner)) for owner in owners} == once
plugin.unregister()
assert {owner: dict(vars(owner)) for owner in owners} == before
print("restored")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "restored" in done.stdout, done.stderr[-2000:]


def test_without_the_flag_only_the_flags_are_added():
    """A front end that does not steer imports none of the serving code for our sake."""
    code = """
import sys
import vllm.engine.arg_utils
before = set(sys.modules)
from grains_vllm import plugin
plugin.register()
print([name for name in set(sys.modules) - before if name.startswith("vllm.")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr[-2000:]
