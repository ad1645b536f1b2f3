"""The door: which vLLM is let in, and that leaving puts everything back."""

import ast
import asyncio
import inspect
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import vllm

from grains_vllm import plugin
from grains_vllm.plugin import TouchPoint
from tests.warm import run_python


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
def owner(point):
    module = import_module(point.module)
    return getattr(module, point.name.split(".")[0]) if "." in point.name else module

owners = {owner(point) for point in points}

def state():
    return {owner: {name: id(value) for name, value in vars(owner).items()} for owner in owners}

plugin.unsupported()  # imports everything
before = state()
plugin.register()
plugin.enable()
once = state()
changed = sorted(owner.__name__ for owner in owners if once[owner] != before[owner])
plugin.register()
plugin.enable()
assert state() == once
plugin.unregister()
assert state() == before
print(changed)
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == [
        "BaseServing",
        "BeamSearchOfflineMixin",
        "EngineArgs",
        "EngineCore",
        "InputProcessor",
        "OpenAIServingModels",
        "OutputProcessor",
        "RequestOutput",
        "RequestState",
        "ResponsesResponse",
        "Scheduler",
        "VllmConfig",
        "WorkerWrapperBase",
        "vllm.v1.core.block_pool",
        "vllm.v1.core.kv_cache_utils",
    ]


def test_every_wrapper_passes_an_engine_without_grains_through(monkeypatch):
    """Whatever such an engine has not got yet: these objects have no attribute at all."""
    wrapped = []
    monkeypatch.setattr(plugin, "_wrap_once", lambda *what: wrapped.append(what))
    plugin.register()
    plugin.enable()
    tried = set()
    for module, owner, wrappers in wrapped:
        target = import_module(module)
        target = getattr(target, owner) if owner else target
        for name, make in wrappers.items():
            raw = inspect.getattr_static(target, name, None)
            # Attributes that are new, and the flags, which every engine gets.
            if raw is None or name == "add_cli_args":
                continue
            symbol = inspect.unwrap(getattr(raw, "__func__", raw))
            signature = inspect.signature(symbol)

            def told(args, kwargs, signature=signature):
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                return bound.arguments

            result, calls = object(), []

            def original(*args, calls=calls, told=told, result=result, **kwargs):
                calls.append(told(args, kwargs))
                return result

            async def waiting(*args, original=original, **kwargs):
                return original(*args, **kwargs)

            given = [
                SimpleNamespace()
                for parameter in signature.parameters.values()
                if parameter.default is parameter.empty
                and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            ]
            waits = inspect.iscoroutinefunction(symbol)
            found = make(waiting if waits else original)(*given)
            found = asyncio.run(found) if waits else found
            assert calls == [told(given, {})], f"{module}.{owner}.{name}"
            assert name == "__init__" or found is result, f"{module}.{owner}.{name}"
            tried.add(f"{owner}.{name}".removeprefix("."))
    assert len(tried) >= 20, tried
    assert tried >= {"EngineCore.collective_rpc", "EngineArgs.create_engine_config"}


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
