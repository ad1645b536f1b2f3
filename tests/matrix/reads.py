"""What the package reads of vLLM's objects without being able to ask for it beforehand.

Most of it is assigned in a constructor, so that no TouchPoint could find it on the class. What
grains_vllm takes for absent in some versions (`getattr` with a default) is listed only where its
absence would be a mistake.
"""

from grains_vllm.plugin import TouchPoint

# our file -> vLLM's class or module -> what is read there
_READS: dict[str, dict[str, str]] = {
    "admin.py": {
        "vllm.plugins.endpoint_plugins.interface.EndpointPlugin": (
            "name required_tasks attach_router init_state"
        ),
        "vllm.v1.engine.async_llm.AsyncLLM": "input_processor vllm_config",
    },
    "admission.py": {
        "vllm.config.VllmConfig": (
            "model_config parallel_config speculative_config kv_transfer_config "
            "compilation_config cache_config"
        ),
        "vllm.config.ModelConfig": (
            "hf_config model runner_type is_moe is_encoder_decoder is_multimodal_model "
            "multimodal_config architecture enable_sleep_mode enable_prompt_embeds "
            "using_transformers_backend"
        ),
        "vllm.config.ParallelConfig": (
            "tensor_parallel_size pipeline_parallel_size data_parallel_size "
            "data_parallel_size_local data_parallel_external_lb "
            "data_parallel_hybrid_lb decode_context_parallel_size prefill_context_parallel_size "
            "enable_dbo ubatch_size use_sequence_parallel_moe enable_elastic_ep"
        ),
        "vllm.config.SpeculativeConfig": "method",
        "vllm.config.CompilationConfig": "pass_config",
        "vllm.config.CacheConfig": "kv_sharing_fast_prefill",
        "vllm.envs": "VLLM_SKIP_MODEL_NAME_VALIDATION",
    },
    "capabilities.py": {"vllm.config.CacheConfig": "enable_prefix_caching"},
    "catalogue.py": {"vllm.config.VllmConfig": "additional_config"},
    "changes.py": {
        "vllm.v1.engine.async_llm.AsyncLLM": "engine_core errored dead_error",
        "vllm.v1.engine.core_client.MPClient": "core_engines",
    },
    "cli.py": {"vllm.engine.arg_utils.EngineArgs": "additional_config"},
    "frontend.py": {
        "vllm.entrypoints.serve.engine.serving.BaseServing": "models",
        "vllm.entrypoints.openai.models.serving.OpenAIServingModels": (
            "input_processor base_model_paths lora_requests"
        ),
        "vllm.entrypoints.openai.models.protocol.BaseModelPath": "name",
        "vllm.entrypoints.openai.models.serving.ModelCard": (
            "id root parent max_model_len permission"
        ),
        "vllm.entrypoints.openai.models.serving.ModelList": "data",
        "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest": (
            "model vllm_xargs use_beam_search user"
        ),
        "vllm.entrypoints.openai.completion.protocol.CompletionRequest": (
            "model vllm_xargs use_beam_search user"
        ),
        "vllm.entrypoints.openai.responses.protocol.ResponsesRequest": "model vllm_xargs user",
        "vllm.entrypoints.llm.LLM": "llm_engine",
        "vllm.v1.engine.llm_engine.LLMEngine": "input_processor",
        "vllm.v1.engine.EngineCoreRequest": (
            "sampling_params prompt_token_ids prompt_embeds resumable mm_features"
        ),
        "vllm.sampling_params.SamplingParams": "extra_args",
    },
    "gate.py": {
        "vllm.v1.engine.core.EngineCore": "scheduler",
        "vllm.v1.request.Request": "request_id sampling_params",
    },
    "log_lines.py": {"vllm.logger": "init_logger"},
    "prefix_keys.py": {"vllm.v1.request.Request": "mm_features"},
    "receipts.py": {
        "vllm.v1.engine.output_processor.OutputProcessor": "request_states",
        "vllm.v1.engine.output_processor.RequestState": "request_id prompt_len detokenizer",
        "vllm.v1.engine.EngineCoreRequest": "request_id",
    },
    "runner_v1.py": {
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner": (
            "input_batch num_computed_tokens use_async_spec_decode"
        ),
        "vllm.v1.worker.gpu_input_batch.InputBatch": "req_ids num_reqs num_computed_tokens_cpu",
    },
    "runner_v2.py": {
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner": "req_states speculative_config",
        "vllm.v1.worker.gpu.states.RequestState": "num_computed_tokens",
    },
    "worker.py": {
        "vllm.v1.worker.worker_base.WorkerWrapperBase": "worker vllm_config",
        "vllm.v1.worker.worker_base.WorkerBase": "load_model vllm_config",
        "vllm.v1.worker.gpu_worker.Worker": "model_runner",
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner": (
            "get_model device max_num_tokens model_memory_usage"
        ),
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner": (
            "get_model device max_num_tokens model_memory_usage"
        ),
        "vllm.v1.engine.core.EngineCore": "model_executor vllm_config",
    },
}
# Calls across the border whose parameters no TouchPoint of plugin.py names.
_CALLS = {
    "frontend.py": TouchPoint("vllm.exceptions", "VLLMValidationError", ("parameter",)),
    "admin.py": TouchPoint(
        "vllm.plugins.endpoint_plugins.interface",
        "EndpointPlugin.init_state",
        ("engine_client", "state", "args"),
    ),
}


def _points(file: str) -> tuple[TouchPoint, ...]:
    found = [
        TouchPoint(owner, name) for owner, names in _READS[file].items() for name in names.split()
    ]
    return (*found, *((_CALLS[file],) if file in _CALLS else ()))


# our file -> what it reads; the "module" of such a point may be a class.
READS = {file: _points(file) for file in _READS}
