"""The steered requests of one worker: who comes, who goes, and what the next batch gets.

What vLLM's two model runners have in common; runner_v1.py and runner_v2.py only say where each of
them keeps its batch.
"""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import numpy as np

from grains_vllm.bank import Bank
from grains_vllm.errors import GrainsConfigError
from grains_vllm.marker import marker_of
from grains_vllm.routing import Part, Routing

_NOBODY = np.zeros(0, np.int64)


def require_attributes(thing: Any, *names: str) -> None:
    """Raises GrainsConfigError unless vLLM's object has these attributes (dotted: of attributes).

    What constructors assign is not among the touch points, which look at classes.
    """
    for name in names:
        try:
            attrgetter(name)(thing)
        except AttributeError:
            message = f"--enable-grains: {type(thing).__name__} has no {name}"
            raise GrainsConfigError(message) from None


class SteeredRequests:
    """Keeps slots for the requests that need them, and tells `routing` about every batch."""

    def __init__(self, routing: Routing, bank: Bank) -> None:
        self._routing, self._bank = routing, bank
        self._slots: dict[str, list[str]] = {}  # keys in use, by request
        self._ending: set[str] = set()  # whose steering ends among their generated tokens

    def follow(self, scheduler_output: Any) -> None:
        """Takes over who has finished and who is new (vllm.v1.core.sched.output.SchedulerOutput).

        A preempted request stays: the V1 runner is told of its return as of a known request, the
        V2 runner as of a new one.
        """
        for req_id in scheduler_output.finished_req_ids:
            self._forget(req_id)
        for request in scheduler_output.scheduled_new_reqs:
            self._forget(request.req_id)
            self._remember(request)

    def end_in_answer(self, req_ids: Iterable[str]) -> bool:
        """Whether some of these requests stop being steered at some generated token.

        Only for them does it matter how many drafts the step before has accepted; all others are
        steered alike from their first generated token on.
        """
        return not self._ending.isdisjoint(req_ids)

    def route(
        self, req_ids: list[str], num_scheduled: np.ndarray, num_computed: np.ndarray, tokens: int
    ) -> None:
        """Describes the next batch to the layers; see `Routing.fill`."""
        self._routing.fill(req_ids, num_scheduled, num_computed, tokens)

    def route_nobody(self) -> None:
        """Describes a batch of dummy tokens: none of them is steered."""
        self._routing.fill([], _NOBODY, _NOBODY, 0)

    def _remember(self, request: Any) -> None:
        marker = marker_of(request)
        if marker is None or not marker["terms"]:
            return
        terms = marker["terms"]
        # A slot or vector that is missing here would be a defect of ours, never a client's doing:
        # the gate has let the request in. Better to stop than to answer unsteered.
        held = [self._bank.acquire(term) for term in terms]
        self._slots[request.req_id] = [term["slot"] for term in terms]
        border = marker["prompt_tokens"]
        if any(end is not None and end > border for term in terms for _, end in term["spans"]):
            self._ending.add(request.req_id)
        self._routing.add(
            request.req_id,
            [
                Part(slot, term["strength"], term["spans"])
                for slot, term in zip(held, terms, strict=True)
            ],
        )

    def _forget(self, req_id: str) -> None:
        self._ending.discard(req_id)
        self._routing.discard(req_id)
        for key in self._slots.pop(req_id, ()):
            self._bank.release(key)
