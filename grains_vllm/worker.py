"""Installation in a worker, right after it has loaded the model and before it profiles memory.

The engine core then asks every worker whether it is installed: a worker that never loaded the
plugin (another machine, another VLLM_PLUGINS) would serve steered requests unsteered.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from grains_vllm.bank import build_bank
from grains_vllm.config import Catalogue, catalogue_of
from grains_vllm.errors import GrainsConfigError
from grains_vllm.layers import attach, find_layers, layer_output
from grains_vllm.routing import Routing
from grains_vllm.vectors import ModelFingerprint


def _load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Today WorkerWrapperBase reaches the worker's method through __getattr__; a version that
        # defines it on the class keeps its own.
        loaded = (
            self.worker.load_model(*args, **kwargs)
            if original is None
            else original(self, *args, **kwargs)
        )
        catalogue = catalogue_of(self.vllm_config)
        if catalogue is not None:
            install(self.worker, catalogue)
            self.grains_ready = True
        return loaded

    return load_model


def _grains_installed(_: Any) -> Callable[..., Any]:
    def grains_installed(self: Any) -> bool:
        return "grains_ready" in vars(self)

    return grains_installed


def _initialize_kv_caches(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def initialize_kv_caches(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The first thing that an engine core does once its workers have loaded the model.
        if catalogue_of(self.vllm_config) is not None:
            try:
                ready = all(self.model_executor.collective_rpc("grains_installed"))
            except Exception as error:
                raise GrainsConfigError(f"--enable-grains: {_NOT_EVERYWHERE}") from error
            if not ready:
                raise GrainsConfigError(f"--enable-grains: {_NOT_EVERYWHERE}")
        return original(self, *args, **kwargs)

    return initialize_kv_caches


_NOT_EVERYWHERE = (
    "a worker has not loaded the plugin; install grains-vllm on every machine, and let "
    "VLLM_PLUGINS name it wherever that is set"
)
WORKER_WRAPPER: dict[str, Callable[..., Any]] = {
    "load_model": _load_model,
    "grains_installed": _grains_installed,
}
ENGINE_CORE = {"_initialize_kv_caches": _initialize_kv_caches}


def install(worker: Any, catalogue: Catalogue) -> None:
    """Steers the worker's model: bank on its device, shift in its layers, routing per batch.

    Raises:
        GrainsConfigError, ArtifactError: the model or a vector is not what it was said to be.
    """
    from vllm.logger import init_logger

    from grains_vllm import runner_v1

    runner = worker.model_runner
    layers = find_layers(runner.get_model())
    fingerprint = ModelFingerprint.of(worker.vllm_config.model_config.hf_config)
    if len(layers) != fingerprint.num_layers:
        raise GrainsConfigError(
            f"--enable-grains: found {len(layers)} decoder layers, "
            f"the model's config says {fingerprint.num_layers}"
        )
    steered = catalogue.layers
    bank = build_bank(catalogue, fingerprint, steered, runner.device)
    routing = Routing(runner.max_num_tokens, runner.device)
    for row, index in enumerate(steered):
        output = layer_output(layers[index], catalogue.layer_output)
        attach(
            layers[index],
            output,
            {
                "grains_slot": routing.slot,
                "grains_strength": routing.strength,
                "grains_gain": bank.gains[row],
                "grains_direction": bank.directions[row],
            },
        )
    runner_v1.install(runner, routing, bank.slots)
    if hasattr(runner, "model_memory_usage"):
        runner.model_memory_usage += bank.num_bytes
    init_logger(__name__).info(
        "grains: %d vectors, %d of %d layers steered, %.2f MiB",
        len(catalogue.vectors),
        len(steered),
        len(layers),
        bank.num_bytes / 2**20,
    )
