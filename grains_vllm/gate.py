"""More vectors than slots: in the engine core, a request waits until there is a slot for it.

The rule. A request enters vLLM's scheduler once all its vectors have slots or can get one, and then
keeps them until it is finished. Requests that need a new slot enter in order of arrival. A request
whose vectors are all on the device already may overtake, unless somebody has waited for PATIENCE
seconds: then the slots in use are left to run dry. Requests without steering never wait.

So the workers, which see requests only after the scheduler, always find a slot that nobody uses.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

from grains_vllm.catalogue import catalogue_of
from grains_vllm.errors import GrainsConfigError
from grains_vllm.marker import marker_of
from grains_vllm.selection import CHECKED

PATIENCE = 5.0  # seconds
APPLY, STATS = "grains_apply", "grains_stats"


class Gate:
    """Counts the slots that requests in the scheduler hold, and keeps the others waiting.

    Attributes:
        waiting: requests by id, in order of arrival.
        known: digests of the vectors that every worker has; None until they have said so.
    """

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots, self._clock = slots, clock
        self._live: Counter[str] = Counter()
        self._held: dict[str, Any] = {}
        self._since: dict[str, float] = {}
        self.waiting: dict[str, Any] = {}
        self.known: set[str] | None = None

    def install(self, scheduler: Any) -> None:
        """Stands in front of one scheduler (vllm.v1.core.sched.scheduler.Scheduler)."""
        add, finish, free = (
            scheduler.add_request,
            scheduler.finish_requests,
            scheduler._free_request,
        )

        def add_request(request: Any) -> None:
            if self._enters(request):
                add(request)

        def finish_requests(request_ids: Any, *args: Any, **kwargs: Any) -> Any:
            # vLLM finishes its own kind best: let them in, without slots, for just that.
            left = self._taken_out(request_ids)
            for request in left:
                add(request)
            finished = finish(request_ids, *args, **kwargs)
            # Whoever stood behind one that has gone may fit into what that one could not use.
            for admitted in self._admitted() if left else ():
                add(admitted)
            return finished

        def free_request(request: Any, *args: Any, **kwargs: Any) -> Any:
            freed = free(request, *args, **kwargs)
            for admitted in self._released(request.request_id):
                add(admitted)
            return freed

        scheduler.add_request = add_request
        scheduler.finish_requests = finish_requests
        scheduler._free_request = free_request

    @property
    def vectors(self) -> set[str]:
        """Digests of the vectors that some request here still needs."""
        requests = (*self._held.values(), *self.waiting.values())
        return {term["vector"] for request in requests for term in _terms(request)}

    def require_known(self, request: Any) -> None:
        """Raises GrainsConfigError for a request that cannot be given what it asked for.

        Its vector no longer exists in the workers, or it has come through a front end without this
        plugin, where nobody looked at what it asked for.
        """
        params = getattr(request, "sampling_params", None)
        if params is not None and CHECKED not in (params.extra_args or {}):
            raise GrainsConfigError(
                "steering: a front end without grains-vllm sent this request; let VLLM_PLUGINS "
                "name grains in every process"
            )
        for term in _terms(request):
            if self.known is not None and term["vector"] not in self.known:
                raise GrainsConfigError(f"steering: the vector {term['name']!r} has been removed")

    def _enters(self, request: Any) -> bool:
        keys = _keys(request)
        if not keys:
            return True
        if self.waiting and (not keys <= self._live.keys() or self._impatient()):
            self._wait(request)
            return False
        if not self._fits(keys):
            self._wait(request)
            return False
        self._hold(request, keys)
        return True

    def _released(self, request_id: str) -> list[Any]:
        """Gives back a finished request's slots; returns the waiting requests that now enter."""
        request = self._held.pop(request_id, None)
        if request is None:
            return []
        freed = False
        for key in _keys(request):
            self._live[key] -= 1
            if not self._live[key]:
                del self._live[key]
                freed = True
        return self._admitted() if freed else []

    def _admitted(self) -> list[Any]:
        entering, blocked = [], False
        for request_id, request in list(self.waiting.items()):
            keys = _keys(request)
            may = self._fits(keys) if not blocked else keys <= self._live.keys()
            if may:
                self._leave(request_id)
                self._hold(request, keys)
                entering.append(request)
                continue
            blocked = True
            if self._impatient():
                break
        return entering

    def _taken_out(self, request_ids: str | Iterable[str] | None) -> list[Any]:
        if request_ids is None:
            wanted = list(self.waiting)
        else:
            asked = [request_ids] if isinstance(request_ids, str) else request_ids
            wanted = [request_id for request_id in asked if request_id in self.waiting]
        return [self._leave(request_id) for request_id in wanted]

    def _fits(self, keys: set[str]) -> bool:
        return len(self._live.keys() | keys) <= self._slots

    def _impatient(self) -> bool:
        oldest = next(iter(self.waiting))
        return self._clock() - self._since[oldest] > PATIENCE

    def _wait(self, request: Any) -> None:
        self.waiting[request.request_id] = request
        self._since[request.request_id] = self._clock()

    def _leave(self, request_id: str) -> Any:
        del self._since[request_id]
        return self.waiting.pop(request_id)

    def _hold(self, request: Any, keys: set[str]) -> None:
        self._held[request.request_id] = request
        self._live.update(keys)


def _terms(request: Any) -> Any:
    marker = marker_of(request)
    return marker["terms"] if marker else ()


def _keys(request: Any) -> set[str]:
    return {term["slot"] for term in _terms(request)}


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        catalogue = catalogue_of(vllm_config)
        if catalogue is not None:
            self.grains_gate = Gate(catalogue.limits.slots)
            self.grains_gate.install(self)

    return __init__


def _preprocess_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def preprocess_add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if (gate := _gate(self)) is not None:
            gate.require_known(request)
        return original(self, request, *args, **kwargs)

    return preprocess_add_request


def _collective_rpc(original: Callable[..., Any]) -> Callable[..., Any]:
    def ours(
        core: Any,
        gate: Gate,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if method == STATS:
            results = original(core, method, timeout, args, kwargs)
            return [{**result, "waiting": len(gate.waiting)} for result in results]
        results = original(core, method, timeout, (*args, sorted(gate.vectors)), kwargs)
        gate.known = _everywhere(results)
        return results

    @wraps(original)
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        gate = _gate(self)
        if gate is None or method not in (APPLY, STATS):
            return original(self, method, *args, **kwargs)
        return ours(self, gate, method, *args, **kwargs)

    return collective_rpc


def _everywhere(results: list[Mapping[str, Any]]) -> set[str]:
    return set.intersection(*(set(result["vectors"]) for result in results))


def _gate(core: Any) -> Gate | None:
    # Some engines ask their workers before they have a scheduler.
    return getattr(getattr(core, "scheduler", None), "grains_gate", None)


# Not EngineCore's: in a process of its own that one is running already when it loads plugins.
SCHEDULER = {"__init__": _init}
ENGINE_CORE = {
    "preprocess_add_request": _preprocess_add_request,
    "collective_rpc": _collective_rpc,
}
