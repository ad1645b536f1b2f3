"""Installation in a worker, right after it has loaded the model and before it profiles memory.

The engine core then asks every worker whether it is installed: a worker that never loaded the
plugin (another machine, another VLLM_PLUGINS) would serve steered requests unsteered.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from grains_vllm import runner_v1, runner_v2
from grains_vllm.bank import Bank, Store
from grains_vllm.catalogue import Catalogue, Term, VectorEntry, catalogue_of
from grains_vllm.errors import GrainsConfigError
from grains_vllm.layers import attach, find_layers, layer_output
from grains_vllm.log_lines import logger
from grains_vllm.routing import Routing
from grains_vllm.steered_requests import SteeredRequests
from grains_vllm.vectors import ArtifactError, ModelFingerprint


def _load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Today WorkerWrapperBase reaches the worker's method through __getattr__; a version that
        # defines it on the class keeps its own.
        loaded = (
            self.worker.load_model(*args, **kwargs)
            if original is None
            else original(self, *args, **kwargs)
        )
        catalogue = catalogue_of(getattr(self, "vllm_config", None))
        if catalogue is not None:
            self.grains_steerer = install(self.worker, catalogue)
        return loaded

    return load_model


def _grains_installed(_: Any) -> Callable[..., Any]:
    def grains_installed(self: Any) -> bool:
        return "grains_steerer" in vars(self)

    return grains_installed


def _grains_apply(_: Any) -> Callable[..., Any]:
    def grains_apply(self: Any, catalogue: dict[str, Any], keep: list[str]) -> dict[str, Any]:
        return self.grains_steerer.apply(Catalogue.from_json(catalogue), keep)

    return grains_apply


def _grains_stats(_: Any) -> Callable[..., Any]:
    def grains_stats(self: Any) -> dict[str, Any]:
        return self.grains_steerer.stats()

    return grains_stats


def _initialize_kv_caches(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def initialize_kv_caches(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The first thing that an engine core does once its workers have loaded the model.
        if catalogue_of(getattr(self, "vllm_config", None)) is not None:
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
    "grains_apply": _grains_apply,
    "grains_stats": _grains_stats,
}
ENGINE_CORE = {"_initialize_kv_caches": _initialize_kv_caches}


@dataclass(frozen=True)
class Steerer:
    """What steers one worker's model."""

    store: Store
    bank: Bank
    routing: Routing

    def apply(self, catalogue: Catalogue, keep: list[str]) -> dict[str, Any]:
        """Takes over a catalogue's vectors; requests that use others keep them.

        Args:
            keep: digests that requests before the workers still need.

        Returns:
            "vectors": the digests that requests may now name; "error": what kept this worker from
            reading a vector, in which case nothing has changed. Never raises for a bad file, which
            in some executors would cost the engine its life.
        """
        try:
            self.store.replace(catalogue.vectors.values(), keep)
        except (ArtifactError, GrainsConfigError, OSError) as error:
            return {"vectors": self.store.digests, "error": str(error)}
        self.preload(catalogue.vectors.values())
        return {"vectors": self.store.digests}

    def preload(self, entries: Iterable[VectorEntry]) -> None:
        """Puts vectors into slots that hold none yet."""
        for entry in entries:
            if self.bank.resident < self.bank.slots:
                key = Term(entry, entry.strength, entry.positions, entry.layers).slot_key
                self.bank.preload(key, entry.digest, entry.layers, entry.scale)

    def stats(self) -> dict[str, Any]:
        """Counts since the start, seconds and bytes."""
        return {
            "slots": self.bank.slots,
            "slots_in_use": self.bank.in_use,
            "vectors_resident": self.bank.resident,
            "loads": self.bank.loads,
            "evictions": self.bank.evictions,
            "requests": len(self.routing),
            "fills": self.routing.fills,
            "fill_seconds": self.routing.fill_seconds,
            "steered_tokens": self.routing.steered_tokens,
            "bank_bytes": self.bank.num_bytes,
            "store_bytes": self.store.num_bytes,
        }


def _adapter(runner: Any) -> Callable[[Any, SteeredRequests], None]:
    # By name: a runner that is not in use need not be importable.
    known = {adapter.RUNNER: adapter.install for adapter in (runner_v1, runner_v2)}
    for cls in type(runner).__mro__:
        if (name := f"{cls.__module__}.{cls.__qualname__}") in known:
            return known[name]
    raise GrainsConfigError(
        f"--enable-grains: {type(runner).__module__}.{type(runner).__qualname__} is not a model "
        f"runner that can be steered; known are {' and '.join(known)}, and what derives from them"
    )


def install(worker: Any, catalogue: Catalogue) -> Steerer:
    """Steers the worker's model: bank on its device, shift in its layers, routing per batch.

    Raises:
        GrainsConfigError, ArtifactError: the model or a vector is not what it was said to be.
    """
    from vllm.utils.platform_utils import is_pin_memory_available

    runner = worker.model_runner
    tell = _adapter(runner)
    layers, num_layers = find_layers(runner.get_model())
    model = ModelFingerprint.of(worker.vllm_config.model_config.hf_config)
    if num_layers != model.num_layers:
        raise GrainsConfigError(
            f"--enable-grains: found {num_layers} decoder layers, "
            f"the model's config says {model.num_layers}"
        )
    limits = catalogue.limits
    store = Store(model, [layer for layer in limits.layers if layer in layers])
    store.replace(catalogue.vectors.values())
    bank = Bank(store, limits.slots, model.hidden_size, runner.device)
    routing = Routing(
        runner.max_num_tokens,
        limits.max_vectors_per_request,
        runner.device,
        is_pin_memory_available(),
    )
    for row, index in enumerate(store.layers):
        attach(
            layers[index],
            layer_output(layers[index], catalogue.layer_output),
            {
                "grains_slot": routing.slot,
                "grains_strength": routing.strength,
                "grains_gain": bank.gains[row],
                "grains_direction": bank.directions[row],
            },
        )
    tell(runner, SteeredRequests(routing, bank))
    steerer = Steerer(store, bank, routing)
    steerer.preload(catalogue.vectors.values())
    if hasattr(runner, "model_memory_usage"):
        runner.model_memory_usage += bank.num_bytes
    if catalogue.unchecked:
        logger().warning(
            "grains: layer_output=unchecked: nobody has checked that the layers of this model hand "
            "on their residual stream as %r, as the YAML says; receipts say so too",
            catalogue.layer_output,
        )
    logger().info(
        "grains: %d vectors, %d layers, %.2f MiB (%d slots, %d filled; %d layers on this rank)",
        len(catalogue.vectors),
        len(store.layers),
        bank.num_bytes / 2**20,
        bank.slots,
        bank.resident,
        len(layers),
    )
    return steerer
