"""Adapter between vLLM's V1 model runner and the routing core."""

from typing import Any

import numpy as np

from grains_vllm.routing import Route, Routing
from grains_vllm.selection import RESERVED


def install(runner: Any, routing: Routing, slots: dict[str, int]) -> None:
    """Tells `routing` about every batch of this runner (GPUModelRunner and its CPU/XPU kin).

    Wrapped on the instance: other engines of the process are not touched.
    """
    execute_model, prepare_inputs = runner.execute_model, runner._prepare_inputs

    def steered_execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        for req_id in scheduler_output.finished_req_ids:
            routing.discard(req_id)
        for request in scheduler_output.scheduled_new_reqs:
            routing.discard(request.req_id)
            if route := _route(request, slots):
                routing.add(request.req_id, route)
        return execute_model(scheduler_output, *args, **kwargs)

    def steered_prepare_inputs(
        scheduler_output: Any, num_scheduled_tokens: np.ndarray, *args: Any, **kwargs: Any
    ) -> Any:
        prepared = prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        batch = runner.input_batch
        computed = batch.num_computed_tokens_cpu[: batch.num_reqs]
        routing.fill(batch.req_ids, num_scheduled_tokens, computed)
        return prepared

    runner.execute_model = steered_execute_model
    runner._prepare_inputs = steered_prepare_inputs


def _route(request: Any, slots: dict[str, int]) -> Route | None:
    params = request.sampling_params
    steering = ((params and params.extra_args) or {}).get(RESERVED)
    if steering is None:
        return None
    # A slot that is missing here would be a defect of ours, never a client's doing: the front end
    # has checked the request against the same catalogue. Better to stop than to answer unsteered.
    return Route(
        slots[steering["slot"]],
        steering["strength"],
        steering["positions"],
        steering["prompt_tokens"],
    )
