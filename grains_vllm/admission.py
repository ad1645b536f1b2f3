"""Which engines can be steered: the one place that says no at start, and why."""

import os
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from grains_vllm.catalogue import Catalogue
from grains_vllm.errors import GrainsConfigError
from grains_vllm.log_lines import logger
from grains_vllm.plugin import RUNNER_V1, RUNNER_V2, unsupported
from grains_vllm.vectors import ArtifactError, ModelFingerprint

_V2 = "VLLM_USE_V2_MODEL_RUNNER"
_RANKS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def prefer_compared_runner(engine_args: Any) -> None:
    """Chooses the V1 model runner for several ranks, unless the operator has chosen one.

    Args:
        engine_args: vllm.engine.arg_utils.EngineArgs.
    """
    if _V2 not in os.environ and any(getattr(engine_args, name) > 1 for name in _RANKS):
        os.environ[_V2] = "0"
        logger().info("grains: %s=0 (several ranks were compared on the V1 model runner only)", _V2)


def require_engine(vllm_config: Any, catalogue: Catalogue) -> None:
    """Raises GrainsConfigError unless this engine steers every token that it is asked to."""
    # Known only now: which of its runners vLLM chooses depends on the whole configuration.
    points = RUNNER_V2 if vllm_config.use_v2_model_runner else RUNNER_V1
    if (reason := unsupported(points)) is not None:
        raise GrainsConfigError(reason)
    _require_known_media(vllm_config.model_config)
    for flag, refused, reason in _RULES:
        if refused(vllm_config):
            raise GrainsConfigError(f"--enable-grains cannot be used with {flag}: {reason}")
    try:
        catalogue.model.require(
            ModelFingerprint.of(vllm_config.model_config.hf_config), "steering vectors"
        )
    except ArtifactError as error:
        raise GrainsConfigError(str(error)) from error
    _warn_of_siblings(vllm_config, catalogue)


def _media(config: Any) -> Any:
    """vLLM's MultiModalConfig, or None for a model that knows text alone."""
    return config.model_config.multimodal_config


def _require_known_media(model_config: Any) -> None:
    """Raises GrainsConfigError for a multimodal model whose forward nobody has read."""
    name = model_config.architecture
    if model_config.is_multimodal_model and name not in IMAGE_MODELS:
        raise GrainsConfigError(
            f"--enable-grains cannot be used with the multimodal model {name}; known are "
            f"{', '.join(IMAGE_MODELS)}. In others a token's stream may be more than what its "
            "layers hand on (DeepStack models, such as Qwen3-VL, add image features after several "
            "layers), or image features may not lie where the prompt says."
        )


def _parallel(name: str, limit: Any) -> Callable[[Any], bool]:
    # Some of these are missing in some versions; a feature that does not exist is not in use.
    return lambda config: getattr(config.parallel_config, name, limit) != limit


def _other_drafts(config: Any) -> bool:
    speculative = config.speculative_config
    return speculative is not None and speculative.method not in _DRAFTS


def _data_parallel_experts(config: Any) -> bool:
    return config.parallel_config.data_parallel_size > 1 and bool(config.model_config.is_moe)


def _data_parallel_elsewhere(config: Any) -> bool:
    parallel = config.parallel_config
    return parallel.data_parallel_size > 1 and (
        parallel.data_parallel_external_lb
        or parallel.data_parallel_hybrid_lb
        or parallel.data_parallel_size_local != parallel.data_parallel_size
    )


def _warn_of_siblings(config: Any, catalogue: Catalogue) -> None:
    """Notes vectors that fit the model's shape but were extracted from one of another name."""
    model = PurePath(config.model_config.model).name
    for entry in catalogue.vectors.values():
        if entry.origin and PurePath(entry.origin).name != model:
            logger().warning(
                "grains: vector %r was extracted from %r, this model is %r; its shape fits, but "
                "only you can know whether its directions do",
                entry.name,
                entry.origin,
                model,
            )


# As vLLM resolves `architectures`. All of them put image features among the embeddings, once, and
# hand the sequence to a text model whose layers are known.
IMAGE_MODELS = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
)
_UNPROVEN = "not yet shown to be correct together"
_DRAFTS = ("ngram", "draft_model")
_SEES_FEWER_TOKENS = "decoder layers would see other tokens than the ones that routing describes"

# (the flag as the operator wrote it, whether this engine uses it, why it is refused)
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "a model that does not generate text (--runner pooling)",
        lambda c: c.model_config.runner_type != "generate",
        "there is no request to steer",
    ),
    (
        "an encoder-decoder model",
        lambda c: bool(c.model_config.is_encoder_decoder),
        "only decoder-only models are known",
    ),
    (
        "a diffusion language model",
        lambda c: bool(getattr(c.model_config, "is_diffusion", False)),
        "only autoregressive models are known",
    ),
    (
        "--model-impl transformers",
        lambda c: bool(c.model_config.using_transformers_backend()),
        "its layers keep a batch axis that routing does not know",
    ),
    (
        "--enable-prompt-embeds and a multimodal model",
        lambda c: _media(c) is not None and bool(c.model_config.enable_prompt_embeds),
        "which of a client's embeddings hold image features cannot be seen",
    ),
    (
        "--mm-encoder-only",
        lambda c: bool(getattr(_media(c), "mm_encoder_only", False)),
        "such an engine has no layers to steer",
    ),
    (
        "--video-pruning-rate",
        lambda c: bool(getattr(_media(c), "video_pruning_rate", None)),
        "which of a video's tokens stay is known only after its encoder has run",
    ),
    (
        f"{_V2}=1 and tensor, pipeline or data parallelism",
        lambda c: (
            bool(c.use_v2_model_runner)
            and any(getattr(c.parallel_config, name) > 1 for name in _RANKS)
        ),
        f"several ranks were compared on the V1 model runner only; set {_V2}=0",
    ),
    (
        f"--speculative-config of a method other than {' and '.join(_DRAFTS)}",
        _other_drafts,
        _UNPROVEN,
    ),
    (
        "--enable-sleep-mode",
        lambda c: bool(c.model_config.enable_sleep_mode),
        "whether steering survives waking up is not yet shown",
    ),
    ("--kv-transfer-config", lambda c: c.kv_transfer_config is not None, _UNPROVEN),
    (
        "--ec-transfer-config",
        lambda c: getattr(c, "ec_transfer_config", None) is not None,
        _UNPROVEN,
    ),
    # vLLM switches it on for the two above.
    (
        "--enable-mm-embeds",
        lambda c: bool(getattr(_media(c), "enable_mm_embeds", False)),
        _UNPROVEN,
    ),
    (
        "--decode-context-parallel-size",
        _parallel("decode_context_parallel_size", 1),
        _UNPROVEN,
    ),
    ("--data-parallel-size and a mixture of experts", _data_parallel_experts, _UNPROVEN),
    (
        "data-parallel ranks behind several servers or on several machines",
        _data_parallel_elsewhere,
        "each would read and change a catalogue of its own",
    ),
    (
        "--prefill-context-parallel-size",
        _parallel("prefill_context_parallel_size", 1),
        _SEES_FEWER_TOKENS,
    ),
    ("--enable-dbo", _parallel("enable_dbo", False), _SEES_FEWER_TOKENS),
    (
        "--ubatch-size",
        lambda c: getattr(c.parallel_config, "ubatch_size", 0) > 1,
        _SEES_FEWER_TOKENS,
    ),
    (
        "sequence-parallel MoE (expert with tensor and data parallelism)",
        _parallel("use_sequence_parallel_moe", False),
        _SEES_FEWER_TOKENS,
    ),
    (
        "the compilation pass enable_sp",
        lambda c: bool(getattr(c.compilation_config.pass_config, "enable_sp", False)),
        _SEES_FEWER_TOKENS,
    ),
    ("--enable-elastic-ep", _parallel("enable_elastic_ep", False), "workers come and go"),
    (
        "--kv-sharing-fast-prefill",
        lambda c: bool(c.cache_config.kv_sharing_fast_prefill),
        _SEES_FEWER_TOKENS,
    ),
    (
        "VLLM_SKIP_MODEL_NAME_VALIDATION=1",
        lambda c: _env("VLLM_SKIP_MODEL_NAME_VALIDATION"),
        "a misspelt alias would be served without its vector",
    ),
    (
        "VLLM_USE_RUST_FRONTEND=1",
        lambda c: _env("VLLM_USE_RUST_FRONTEND"),
        "it does not pass through the Python front end that checks requests",
    ),
)


def _env(name: str) -> bool:
    import vllm.envs

    return bool(getattr(vllm.envs, name, False))
