"""A vLLM without one of the symbols: refused with its name, and no trouble for whoever asks for
no steering. The symbol is taken away from the real vLLM, while the process runs.
"""

from argparse import ArgumentParser

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.worker_base import WorkerWrapperBase

from grains_vllm import plugin
from grains_vllm.errors import GrainsConfigError
from tests.tiny import save_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("missing")
    save_world(folder, "llama")
    return folder


@pytest.fixture
def start(world):
    """start(steered) -> the VllmConfig of an engine in a process that has loaded the plugin."""

    def begin(steered):
        plugin.register()
        asked = {"grains": {"config": str(world / "llama.yaml")}} if steered else {}
        return EngineArgs(
            model=str(world / "llama"), skip_tokenizer_init=True, additional_config=asked
        ).create_engine_config()

    yield begin
    plugin.unregister()


def without_free_request(monkeypatch):
    monkeypatch.delattr(Scheduler, "_free_request")


def without_the_prompt(monkeypatch):
    def process_inputs(self, request_id, params, text):
        raise AssertionError

    monkeypatch.setattr(InputProcessor, "process_inputs", process_inputs)


@pytest.mark.parametrize(
    ("take_away", "named"),
    [
        (without_free_request, "vllm.v1.core.sched.scheduler.Scheduler._free_request"),
        (
            without_the_prompt,
            "vllm.v1.engine.input_processor.InputProcessor.process_inputs: has no parameter prompt",
        ),
    ],
)
def test_start_up_refuses_and_names_it(monkeypatch, start, take_away, named):
    import vllm

    take_away(monkeypatch)
    with pytest.raises(GrainsConfigError) as refused:
        start(steered=True)
    message = str(refused.value)
    assert message.startswith(f"grains-vllm cannot steer vLLM {vllm.__version__}, which lacks ")
    assert named in message
    assert start(steered=False).model_config.hf_config.model_type == "llama"


def test_an_engine_without_grains_is_not_touched(monkeypatch, start):
    """`vllm.v1.engine.core` is loaded here, so that the engine's wrappers would be applied."""
    import vllm.v1.engine.core  # noqa: F401

    assert start(steered=False) and hasattr(WorkerWrapperBase, "grains_installed")
    plugin.unregister()
    without_free_request(monkeypatch)
    assert start(steered=False) and not hasattr(WorkerWrapperBase, "grains_installed")


def test_flags_that_cannot_be_added_leave_vllm_alone(monkeypatch, start):
    add_cli_args = EngineArgs.add_cli_args
    monkeypatch.setattr(EngineArgs, "add_cli_args", staticmethod(lambda other: add_cli_args(other)))
    said = []
    monkeypatch.setattr(
        plugin, "logger", lambda: type("Log", (), {"error": lambda *a: said.append(a)})
    )
    assert start(steered=False)
    ((text, problems),) = said
    assert "does nothing" in text
    assert problems == "vllm.engine.arg_utils.EngineArgs.add_cli_args: has no parameter parser"
    parser = EngineArgs.add_cli_args(ArgumentParser())
    assert "--enable-grains" not in parser.format_help()
