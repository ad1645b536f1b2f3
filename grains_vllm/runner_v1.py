"""Adapter to vLLM's V1 model runner: where it keeps the order and the positions of its batch."""

from typing import Any

import numpy as np

from grains_vllm.steered_requests import SteeredRequests, require_attributes

RUNNER = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"


def install(runner: Any, requests: SteeredRequests) -> None:
    """Tells `requests` about every batch of this runner (RUNNER and its CPU/XPU kin).

    Wrapped on the instance: other engines of the process are not touched.

    Raises:
        GrainsConfigError: the runner lacks an attribute that is read here.
    """
    require_attributes(runner, "input_batch", "use_async_spec_decode", "num_computed_tokens")
    require_attributes(runner.input_batch, "req_ids", "num_reqs", "num_computed_tokens_cpu")
    execute_model, prepare_inputs = runner.execute_model, runner._prepare_inputs
    dummy_run = runner._dummy_run

    def steered_execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        requests.follow(scheduler_output)
        return execute_model(scheduler_output, *args, **kwargs)

    def steered_prepare_inputs(
        scheduler_output: Any, num_scheduled_tokens: np.ndarray, *args: Any, **kwargs: Any
    ) -> Any:
        prepared = prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        batch = runner.input_batch
        computed = batch.num_computed_tokens_cpu[: batch.num_reqs]
        if runner.use_async_spec_decode and requests.end_in_answer(batch.req_ids):
            # The host has taken every draft of the step before for accepted; the device knows.
            # Waiting for it costs some of the overlap, so only these requests make us.
            computed = runner.num_computed_tokens[: batch.num_reqs].cpu().numpy()
        tokens = scheduler_output.total_num_scheduled_tokens
        requests.route(batch.req_ids, num_scheduled_tokens, computed, tokens)
        return prepared

    def steered_dummy_run(*args: Any, **kwargs: Any) -> Any:
        requests.route_nobody()
        return dummy_run(*args, **kwargs)

    runner.execute_model = steered_execute_model
    runner._prepare_inputs = steered_prepare_inputs
    runner._dummy_run = steered_dummy_run
