"""Adapter between vLLM's V1 model runner and the routing core."""

from typing import Any

import numpy as np

from grains_vllm.bank import Bank
from grains_vllm.errors import GrainsConfigError
from grains_vllm.marker import marker_of
from grains_vllm.routing import Part, Routing


def install(runner: Any, routing: Routing, bank: Bank) -> None:
    """Tells `routing` about every batch of this runner (GPUModelRunner and its CPU/XPU kin).

    Wrapped on the instance: other engines of the process are not touched.
    """
    for name in ("use_async_spec_decode", "num_computed_tokens"):
        if not hasattr(runner, name):  # Attributes of objects are not among the touch points.
            raise GrainsConfigError(f"--enable-grains: {type(runner).__name__} has no {name}")
    execute_model, prepare_inputs = runner.execute_model, runner._prepare_inputs
    slots: dict[str, list[str]] = {}  # keys in use, by request
    ending: set[str] = set()  # requests whose steering ends among their generated tokens

    def forget(req_id: str) -> None:
        ending.discard(req_id)
        routing.discard(req_id)
        for key in slots.pop(req_id, ()):
            bank.release(key)

    def remember(request: Any) -> None:
        marker = marker_of(request)
        if marker is None or not marker["terms"]:
            return
        terms = marker["terms"]
        # A slot or vector that is missing here would be a defect of ours, never a client's doing:
        # the gate has let the request in. Better to stop than to answer unsteered.
        held = [bank.acquire(term) for term in terms]
        slots[request.req_id] = [term["slot"] for term in terms]
        border = marker["prompt_tokens"]
        if any(term["end"] is not None and term["end"] > border for term in terms):
            ending.add(request.req_id)
        routing.add(
            request.req_id,
            [
                Part(slot, term["strength"], term["start"], term["end"])
                for slot, term in zip(held, terms, strict=True)
            ],
        )

    def steered_execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        for req_id in scheduler_output.finished_req_ids:
            forget(req_id)
        for request in scheduler_output.scheduled_new_reqs:
            forget(request.req_id)
            remember(request)
        return execute_model(scheduler_output, *args, **kwargs)

    def steered_prepare_inputs(
        scheduler_output: Any, num_scheduled_tokens: np.ndarray, *args: Any, **kwargs: Any
    ) -> Any:
        prepared = prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        batch = runner.input_batch
        computed = batch.num_computed_tokens_cpu[: batch.num_reqs]
        if runner.use_async_spec_decode and not ending.isdisjoint(batch.req_ids):
            # The host has taken every draft of the step before for accepted; the device knows.
            # Waiting for it costs some of the overlap, so only these requests make us.
            computed = runner.num_computed_tokens[: batch.num_reqs].cpu().numpy()
        routing.fill(batch.req_ids, num_scheduled_tokens, computed)
        return prepared

    runner.execute_model = steered_execute_model
    runner._prepare_inputs = steered_prepare_inputs
