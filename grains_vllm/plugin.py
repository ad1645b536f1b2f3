"""The only door into vLLM: `register()`, the entry point of the group `vllm.general_plugins`.

vLLM calls it in every process. Here it adds the flags; everything else is wrapped only in processes
that run an engine, or once somebody asks for steering (`enable`), after checking that this vLLM has
every symbol the package touches. An engine without grains passes through each wrapper unchanged.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from grains_vllm.errors import GrainsConfigError
from grains_vllm.log_lines import logger
from grains_vllm.patching import unpatch, wrap

OLDEST, NEWEST = (0, 26), (0, 33)
OVERRIDE = "GRAINS_ALLOW_UNTESTED_VLLM"

_done: set[str] = set()


@dataclass(frozen=True)
class TouchPoint:
    """A vLLM symbol that this package wraps, calls or reads.

    Attributes:
        module: where it is imported from.
        name: a function, class or `Class.attribute` of that module.
        parameters: what the package passes by these names or positions.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def problem(self) -> str | None:
        """Why this vLLM lacks the symbol in the shape that is needed, else None."""
        try:
            symbol: Any = import_module(self.module)
            for part in self.name.split("."):
                symbol = getattr(symbol, part)
        except Exception as error:  # An import may fail in any way: the symbol is not usable.
            return f"{self}: {type(error).__name__}: {error}"
        if not self.parameters:
            return None
        found = inspect.signature(symbol).parameters
        missing = [name for name in self.parameters if name not in found]
        return f"{self}: has no parameter {', '.join(missing)}" if missing else None


_ARGS = "vllm.engine.arg_utils"
_CORE = "vllm.v1.engine.core"
_INPUT = "vllm.v1.engine.input_processor"
_MEDIA = "vllm.multimodal.inputs"
_MODELS = "vllm.entrypoints.openai.models.serving"
_V1 = "vllm.v1.worker.gpu_model_runner"
_V2 = "vllm.v1.worker.gpu.model_runner"
_RESPONSES = "vllm.entrypoints.openai.responses.protocol"
_SERVING = "vllm.entrypoints.serve.engine.serving"
_BEAM = "vllm.entrypoints.generate.beam_search.offline"
_WORKER = "vllm.v1.worker.worker_base"
_HASHING = "vllm.v1.core.kv_cache_utils"
_OUTPUT = "vllm.v1.engine.output_processor"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_SCHEDULED = "vllm.v1.core.sched.output"
_BLOCKS = "vllm.v1.core.block_pool"  # holds the hashing function under its own name

# Wrapped so that --enable-grains exists and can explain itself; needed even to refuse politely.
FLAGS = (
    TouchPoint(_ARGS, "EngineArgs.add_cli_args", ("parser",)),
    TouchPoint(_ARGS, "EngineArgs.from_cli_args", ("args",)),
    TouchPoint(_ARGS, "EngineArgs.create_engine_config"),
)
ENGINE = (
    TouchPoint(_CORE, "EngineCore._initialize_kv_caches", ("vllm_config",)),
    TouchPoint(_SCHEDULER, "Scheduler.__init__", ("vllm_config",)),
    TouchPoint(_CORE, "EngineCore.preprocess_add_request", ("request",)),
    TouchPoint(_CORE, "EngineCore.collective_rpc", ("method", "timeout", "args", "kwargs")),
    TouchPoint(_SCHEDULER, "Scheduler.add_request", ("request",)),
    TouchPoint(_SCHEDULER, "Scheduler.finish_requests", ("request_ids",)),
    TouchPoint(_SCHEDULER, "Scheduler._free_request", ("request",)),
    TouchPoint(
        _HASHING,
        "generate_block_hash_extra_keys",
        ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
    ),
    TouchPoint("vllm.config", "VllmConfig.compute_hash"),
    TouchPoint(_BLOCKS, "generate_block_hash_extra_keys"),
    TouchPoint("vllm.v1.executor.abstract", "Executor.collective_rpc", ("method",)),
    TouchPoint(_WORKER, "WorkerWrapperBase.init_worker"),
    TouchPoint(_SCHEDULED, "SchedulerOutput", ("finished_req_ids", "scheduled_new_reqs")),
    TouchPoint(_SCHEDULED, "NewRequestData", ("req_id", "sampling_params")),
    TouchPoint(_MEDIA, "MultiModalFeatureSpec", ("modality", "mm_position")),
    TouchPoint(_MEDIA, "PlaceholderRange", ("offset", "length")),
    TouchPoint("vllm.utils", "length_from_prompt_token_ids_or_embeds"),
    TouchPoint("vllm.utils.platform_utils", "is_pin_memory_available"),
    TouchPoint("vllm.model_executor.models.utils", "PPMissingLayer"),
)
# The model runners, of which an engine has one; the other need not be importable.
RUNNER_V1 = (
    TouchPoint(_V1, "GPUModelRunner.execute_model", ("scheduler_output",)),
    TouchPoint(_V1, "GPUModelRunner._prepare_inputs", ("scheduler_output", "num_scheduled_tokens")),
    TouchPoint(_V1, "GPUModelRunner._dummy_run"),
    TouchPoint(_SCHEDULED, "SchedulerOutput", ("total_num_scheduled_tokens",)),
)
RUNNER_V2 = (
    TouchPoint(_V2, "GPUModelRunner.execute_model", ("scheduler_output",)),
    TouchPoint(_V2, "GPUModelRunner.prepare_inputs", ("scheduler_output",)),
    TouchPoint(_V2, "GPUModelRunner._dummy_run"),
    TouchPoint(
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        ("req_ids", "num_scheduled_tokens", "num_computed_tokens_np", "num_tokens", "idx_mapping"),
    ),
)
FRONT_END = (
    TouchPoint(_INPUT, "InputProcessor.__init__", ("vllm_config",)),
    TouchPoint(_INPUT, "InputProcessor.process_inputs", ("request_id", "prompt", "params")),
    TouchPoint(_MEDIA, "PlaceholderRange.extract_embeds_range"),
    TouchPoint(_SERVING, "BaseServing._check_model", ("request",)),
    TouchPoint(_SERVING, "BaseServing.create_error_response", ("message", "param")),
    TouchPoint(_MODELS, "OpenAIServingModels.__init__", ("base_model_paths",)),
    TouchPoint(_MODELS, "OpenAIServingModels.show_available_models"),
    TouchPoint(_MODELS, "OpenAIModelRegistry"),
    TouchPoint(_BEAM, "BeamSearchOfflineMixin.beam_search"),
    TouchPoint(_OUTPUT, "OutputProcessor.add_request", ("request", "prompt", "parent_req")),
    TouchPoint(_OUTPUT, "OutputProcessor._finish_request", ("req_state",)),
    TouchPoint(_OUTPUT, "OutputProcessor.abort_requests", ("request_ids", "internal")),
    TouchPoint(
        _OUTPUT, "RequestState._new_request_output", ("external_req_id", "outputs", "finished")
    ),
    TouchPoint("vllm.outputs", "RequestOutput.add", ("next_output",)),
    TouchPoint(_RESPONSES, "ResponsesResponse.from_request"),
    TouchPoint("vllm.entrypoints.anthropic.protocol", "AnthropicMessagesRequest"),
    TouchPoint("vllm.v1.engine.detokenizer", "IncrementalDetokenizer.num_output_tokens"),
    TouchPoint("vllm.v1.engine.parallel_sampling", "ParentRequest.n"),
    TouchPoint("vllm.outputs", "RequestOutput"),
    TouchPoint("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc", ("method", "args")),
    TouchPoint(
        "vllm.v1.engine.core_client", "AsyncMPClient._call_utility_async", ("method", "engine")
    ),
    TouchPoint("vllm.config", "ParallelConfig._api_process_count"),
    TouchPoint("vllm.config", "ParallelConfig._api_process_rank"),
    TouchPoint("vllm.exceptions", "VLLMValidationError"),
    TouchPoint("vllm.config", "VllmConfig.use_v2_model_runner"),
)


def register() -> None:
    """Adds the flags, and in a process that runs an engine the engine's wrappers; idempotent."""
    if problems := _problems(FLAGS):
        logger().error(
            "grains-vllm is installed but does nothing, since this vLLM lacks %s", problems
        )
        return
    from grains_vllm import cli

    _wrap_once(_ARGS, "EngineArgs", cli.ENGINE_ARGS)
    # Engine cores and workers call this before they build anything, with these modules loaded; a
    # front end has not imported them yet, and without grains it never needs to.
    if (_CORE in sys.modules or _WORKER in sys.modules) and unsupported(ENGINE) is None:
        _wrap_engine()


def enable() -> None:
    """Wraps everything that serving vectors needs, in the process that configures an engine.

    Raises:
        GrainsConfigError: this vLLM cannot be steered; the message says what is missing.
    """
    if (reason := unsupported(ENGINE + FRONT_END)) is not None:
        raise GrainsConfigError(reason)
    from grains_vllm import frontend, receipts, receipts_http

    _wrap_engine()
    _wrap_once(_INPUT, "InputProcessor", frontend.INPUT_PROCESSOR)
    _wrap_once(_SERVING, "BaseServing", frontend.BASE_SERVING)
    _wrap_once(_MODELS, "OpenAIServingModels", frontend.MODELS)
    _wrap_once(_BEAM, "BeamSearchOfflineMixin", frontend.BEAM_SEARCH)
    _wrap_once(_OUTPUT, "OutputProcessor", receipts.OUTPUT_PROCESSOR)
    _wrap_once(_OUTPUT, "RequestState", receipts.REQUEST_STATE)
    _wrap_once("vllm.outputs", "RequestOutput", receipts.REQUEST_OUTPUT)
    _wrap_once(_RESPONSES, "ResponsesResponse", receipts_http.RESPONSES_RESPONSE)


def unregister() -> None:
    """Leaves vLLM as it was before `register()`; engines already running keep their layers."""
    unpatch()
    _done.clear()


def unsupported(points: Iterable[TouchPoint] = ENGINE + FRONT_END) -> str | None:
    """Why this vLLM cannot be steered, in a message for its operator, or None if it can."""
    import vllm
    from packaging.version import InvalidVersion, Version

    if os.environ.get(OVERRIDE) != "1":
        try:
            release = Version(vllm.__version__).release[:2]
        except InvalidVersion:  # Builds from a bare source tree call themselves "dev".
            release = (0, 0)
        if not OLDEST <= release <= NEWEST:
            return (
                f"grains-vllm supports vLLM {_dotted(OLDEST)} to {_dotted(NEWEST)}, but vLLM "
                f"{vllm.__version__} is installed. Install a supported version, or set "
                f"{OVERRIDE}=1 to try this one at your own risk."
            )
    if problems := _problems(points):
        return f"grains-vllm cannot steer vLLM {vllm.__version__}, which lacks {problems}"
    return None


def _problems(points: Iterable[TouchPoint]) -> str:
    return "; ".join(why for point in points if (why := point.problem()))


def _wrap_engine() -> None:
    from grains_vllm import compile_key, gate, prefix_keys, worker

    _wrap_once(_WORKER, "WorkerWrapperBase", worker.WORKER_WRAPPER)
    _wrap_once(_CORE, "EngineCore", {**worker.ENGINE_CORE, **gate.ENGINE_CORE})
    _wrap_once(_SCHEDULER, "Scheduler", gate.SCHEDULER)
    _wrap_once("vllm.config", "VllmConfig", compile_key.VLLM_CONFIG)
    import_module(_BLOCKS)  # before the name is wrapped that it takes over
    for module in (_HASHING, _BLOCKS):
        _wrap_once(module, "", prefix_keys.EXTRA_KEYS)


def _wrap_once(module: str, owner: str, wrappers: Mapping[str, Callable[..., Any]]) -> None:
    """Wraps attributes of a class, or of the module itself for the owner ""."""
    if f"{module}.{owner}" in _done:
        return
    _done.add(f"{module}.{owner}")
    target = import_module(module)
    for name, make in wrappers.items():
        wrap(getattr(target, owner) if owner else target, name, make)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
