"""Adapter to vLLM's V2 model runner: where it keeps the order and the positions of its batch."""

from typing import Any

from grains_vllm.steered_requests import SteeredRequests, require_attributes

RUNNER = "vllm.v1.worker.gpu.model_runner.GPUModelRunner"


def install(runner: Any, requests: SteeredRequests) -> None:
    """Tells `requests` about every batch of this runner (RUNNER and its CPU/XPU kin).

    Wrapped on the instance: other engines of the process are not touched.

    Raises:
        GrainsConfigError: the runner lacks an attribute that is read here.
    """
    require_attributes(runner, "req_states", "speculative_config")
    require_attributes(runner.req_states, "num_computed_tokens.gpu")
    execute_model, prepare_inputs = runner.execute_model, runner.prepare_inputs
    dummy_run = runner._dummy_run

    def steered_execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        requests.follow(scheduler_output)
        return execute_model(scheduler_output, *args, **kwargs)

    def steered_prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        batch = prepare_inputs(*args, **kwargs)
        computed = batch.num_computed_tokens_np
        if runner.speculative_config is not None and requests.end_in_answer(batch.req_ids):
            # The host's count is an upper bound: it takes drafts for accepted that the device has
            # rejected. Waiting for the device costs some of the overlap, so only these make us.
            computed = runner.req_states.num_computed_tokens.gpu[batch.idx_mapping].cpu().numpy()
        requests.route(batch.req_ids, batch.num_scheduled_tokens, computed, batch.num_tokens)
        return batch

    def steered_dummy_run(*args: Any, **kwargs: Any) -> Any:
        requests.route_nobody()
        return dummy_run(*args, **kwargs)

    runner.execute_model = steered_execute_model
    runner.prepare_inputs = steered_prepare_inputs
    runner._dummy_run = steered_dummy_run
