"""The only door into vLLM: `register()`, the entry point of the group `vllm.general_plugins`.

vLLM calls it in every process. It checks that this vLLM has every symbol the package touches, then
wraps them. A server that did not ask for steering passes through each wrapper unchanged.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from grains_vllm.patching import unpatch, wrap

OLDEST, NEWEST = (0, 26), (0, 33)
OVERRIDE = "GRAINS_ALLOW_UNTESTED_VLLM"

_registered = False


@dataclass(frozen=True)
class TouchPoint:
    """A vLLM symbol that this package wraps or reads, and the parameters it must have."""

    module: str
    owner: str
    name: str
    parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}.{self.owner}.{self.name}"

    def problem(self) -> str | None:
        """Why this vLLM lacks the symbol in the shape that is needed, else None."""
        try:
            owner = getattr(import_module(self.module), self.owner)
            symbol = getattr(owner, self.name)
        except (ImportError, AttributeError) as error:
            return f"{self}: {error}"
        found = inspect.signature(symbol).parameters
        missing = [name for name in self.parameters if name not in found]
        return f"{self}: has no parameter {', '.join(missing)}" if missing else None


# Wrapped so that --enable-grains exists and can explain itself; needed even to refuse politely.
ENGINE_ARGS = (
    TouchPoint("vllm.engine.arg_utils", "EngineArgs", "add_cli_args", ("parser",)),
    TouchPoint("vllm.engine.arg_utils", "EngineArgs", "from_cli_args", ("args",)),
    TouchPoint("vllm.engine.arg_utils", "EngineArgs", "create_engine_config"),
)
_INPUT, _MODELS = "vllm.v1.engine.input_processor", "vllm.entrypoints.openai.models.serving"
_RUNNER = "vllm.v1.worker.gpu_model_runner"
SERVING = (
    TouchPoint(_INPUT, "InputProcessor", "__init__", ("vllm_config",)),
    TouchPoint(_INPUT, "InputProcessor", "process_inputs", ("request_id", "prompt", "params")),
    TouchPoint(
        "vllm.entrypoints.serve.engine.serving", "BaseServing", "_check_model", ("request",)
    ),
    TouchPoint("vllm.entrypoints.serve.engine.serving", "BaseServing", "create_error_response"),
    TouchPoint(_MODELS, "OpenAIServingModels", "show_available_models"),
    TouchPoint("vllm.v1.worker.worker_base", "WorkerWrapperBase", "init_worker"),
    TouchPoint(_RUNNER, "GPUModelRunner", "execute_model", ("scheduler_output",)),
    TouchPoint(
        _RUNNER, "GPUModelRunner", "_prepare_inputs", ("scheduler_output", "num_scheduled_tokens")
    ),
    TouchPoint("vllm.config", "VllmConfig", "use_v2_model_runner"),
)


def unsupported() -> str | None:
    """Why this vLLM cannot be steered, in a message for its operator, or None if it can."""
    import vllm
    from packaging.version import Version

    if os.environ.get(OVERRIDE) != "1":
        release = Version(vllm.__version__).release[:2]
        if not OLDEST <= release <= NEWEST:
            return (
                f"grains-vllm supports vLLM {_dotted(OLDEST)} to {_dotted(NEWEST)}, but vLLM "
                f"{vllm.__version__} is installed. Install a supported version, or set "
                f"{OVERRIDE}=1 to try this one at your own risk."
            )
    problems = [why for point in SERVING if (why := _shape_problem(point))]
    if problems:
        listed = "\n  ".join(problems)
        return f"grains-vllm cannot steer vLLM {vllm.__version__}, which lacks:\n  {listed}"
    return None


def register() -> None:
    """Installs every wrapper, once per process."""
    global _registered
    if _registered:
        return
    _registered = True
    from vllm.logger import init_logger

    if problems := [why for point in ENGINE_ARGS if (why := _shape_problem(point))]:
        init_logger(__name__).error(
            "grains-vllm is installed but does nothing: this vLLM lacks %s", "; ".join(problems)
        )
        return
    reason = unsupported()
    from grains_vllm import cli

    _wrap_all("vllm.engine.arg_utils", "EngineArgs", cli.wrappers(reason))
    if reason is None:
        from grains_vllm import frontend, worker

        _wrap_all(_INPUT, "InputProcessor", frontend.INPUT_PROCESSOR)
        _wrap_all("vllm.entrypoints.serve.engine.serving", "BaseServing", frontend.BASE_SERVING)
        _wrap_all(_MODELS, "OpenAIServingModels", frontend.MODELS)
        _wrap_all("vllm.v1.worker.worker_base", "WorkerWrapperBase", worker.WRAPPER)


def unregister() -> None:
    """Leaves vLLM as it was before `register()`; engines already running keep their layers."""
    global _registered
    unpatch()
    _registered = False


def _wrap_all(module: str, owner: str, wrappers: Mapping[str, Callable[..., Any]]) -> None:
    cls = getattr(import_module(module), owner)
    for name, make in wrappers.items():
        wrap(cls, name, make)


def _shape_problem(point: TouchPoint) -> str | None:
    try:
        return point.problem()
    except TypeError:  # A property has no signature; that it exists is all we need.
        return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
