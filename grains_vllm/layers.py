"""Where a model's decoder layers are, and how each class hands on its residual stream.

A layer is steered by giving it a subclass of its own class: the shift becomes part of its forward,
so that the compiler sees it, and which token gets which vector stays data in buffers.
"""

from functools import cache
from typing import Any, cast

import torch
from torch import nn

from grains_vllm.errors import GrainsConfigError
from grains_vllm.shift import shift

_MODELS = "vllm.model_executor.models."

# The stream is hidden_states + residual, which the next norm adds up.
_SUM = (
    "gemma.GemmaDecoderLayer gemma2.Gemma2DecoderLayer gemma3.Gemma3DecoderLayer "
    "glm4.Glm4DecoderLayer gpt_oss.TransformerBlock internlm2.InternLMDecoderLayer "
    "llama.LlamaDecoderLayer llama4.Llama4DecoderLayer mistral.MistralDecoderLayer "
    "mixtral.MixtralDecoderLayer olmoe.OlmoeDecoderLayer qwen2.Qwen2DecoderLayer "
    "qwen2_moe.Qwen2MoeDecoderLayer qwen3.Qwen3DecoderLayer qwen3_moe.Qwen3MoeDecoderLayer"
)
# The layer returns one tensor, the stream itself.
_SINGLE = (
    "bloom.BloomBlock falcon.FalconDecoderLayer gpt2.GPT2Block gpt_j.GPTJBlock "
    "granite.GraniteDecoderLayer opt.OPTDecoderLayer"
)
# A tuple whose first part is the whole stream already; adding the second would count it twice.
_FIRST = (
    "commandr.CohereDecoderLayer exaone4.Exaone4DecoderLayer minicpm.MiniCPMDecoderLayer "
    "phimoe.PhiMoEDecoderLayer stablelm.StablelmDecoderLayer"
)
_OUTPUT_OF = {
    _MODELS + name: output
    for output, names in (("sum", _SUM), ("single", _SINGLE), ("first", _FIRST))
    for name in names.split()
}


def find_layers(model: nn.Module) -> tuple[dict[int, nn.Module], int]:
    """The decoder layers of the language model.

    Returns:
        Those that live on this rank, by global index, and how many all ranks have together.

    Raises:
        GrainsConfigError: the model keeps its layers somewhere unknown.
    """
    from vllm.model_executor.models.utils import PPMissingLayer

    language: Any = model
    if hasattr(model, "get_language_model"):
        language = cast(Any, model).get_language_model()
    inner: Any = language
    for name in ("model", "transformer", "decoder"):
        inner = getattr(inner, name, inner)
    for name in ("layers", "h", "blocks"):
        layers = getattr(inner, name, None)
        if isinstance(layers, nn.ModuleList):
            mine = {
                index: layer
                for index, layer in enumerate(layers)
                if not isinstance(layer, PPMissingLayer)
            }
            return mine, len(layers)
    raise GrainsConfigError(
        f"--enable-grains: no list of decoder layers (layers, h or blocks) found in "
        f"{type(model).__name__}"
    )


def layer_output(layer: nn.Module, override: str | None) -> str:
    """How `layer` returns its residual stream: "sum", "single" or "first" (see config.OUTPUTS).

    A subclass that keeps its parent's forward keeps its convention too.

    Raises:
        GrainsConfigError: a class whose convention nobody has read; guessing could add a wrong sum.
    """
    author = next(cls for cls in type(layer).__mro__ if "forward" in cls.__dict__)
    name = f"{author.__module__}.{author.__qualname__}"
    if name in _OUTPUT_OF and override not in (None, _OUTPUT_OF[name]):
        raise GrainsConfigError(
            f"layer_output is {override!r}, but {name} is known to be {_OUTPUT_OF[name]!r}"
        )
    if override is not None:
        return override
    if name not in _OUTPUT_OF:
        raise GrainsConfigError(
            f"--enable-grains: how {name} returns its residual stream is not known. If you have "
            "read its forward, say so in the YAML: 'layer_output: sum' (stream = hidden_states + "
            "residual), 'single' (one tensor) or 'first' (a tuple whose first part is the stream)."
        )
    return _OUTPUT_OF[name]


def attach(layer: nn.Module, output: str, buffers: dict[str, torch.Tensor]) -> None:
    """Makes `layer` shift its residual stream as the buffers say.

    Args:
        output: see `layer_output`.
        buffers: grains_slot [tokens, parts] int32 and grains_strength [tokens, parts] float32,
            shared by all layers; grains_gain [slots] and grains_direction [slots, hidden] float32.
            A strength or gain of 0 leaves a token alone, whatever its slot.

    Raises:
        GrainsConfigError: something else has replaced this layer's forward already.
    """
    if "forward" in vars(layer):
        # On the instance, where it would win over the class; vLLM's CPU offloaders do that.
        raise GrainsConfigError(
            "--enable-grains cannot be used with CPU offloading (--cpu-offload-gb and the like): "
            f"the forward of {type(layer).__name__} has been replaced"
        )
    for name, tensor in buffers.items():
        layer.register_buffer(name, tensor, persistent=False)
    layer.__class__ = _steered_class(cast(Any, type(layer)), output)


@cache
def _steered_class(cls: Any, output: str) -> type[nn.Module]:
    base_forward = cls.forward

    def forward_sum(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, residual = base_forward(self, *args, **kwargs)
        return _steer(self, hidden, residual), residual

    def forward_single(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _steer(self, base_forward(self, *args, **kwargs), None)

    def forward_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, *rest = base_forward(self, *args, **kwargs)
        return _steer(self, hidden, None), *rest

    forward = {"sum": forward_sum, "single": forward_single, "first": forward_first}[output]
    return type(f"Steered{cls.__name__}", (cls,), {"forward": forward})


def _steer(layer: Any, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    if hidden.dim() != 2:
        raise GrainsConfigError(
            f"--enable-grains: {type(layer).__name__} computes a stream of {hidden.dim()} axes, "
            "expected [tokens, hidden]; routing would not fit"
        )
    tokens = hidden.shape[0]
    delta, steered_tokens = None, None
    for part in range(layer.grains_slot.shape[1]):  # unrolled by the compiler
        slot = layer.grains_slot[:tokens, part]
        gain = (layer.grains_strength[:tokens, part] * layer.grains_gain[slot]).unsqueeze(-1)
        added, on = gain * layer.grains_direction[slot], gain != 0
        delta = added if delta is None else delta + added
        steered_tokens = on if steered_tokens is None else steered_tokens | on
    stream = hidden.float()
    if residual is not None:
        stream = stream + residual.float()
    steered = shift(stream, cast(torch.Tensor, delta))
    if residual is not None:
        steered = steered - residual.float()
    # Not a multiplication by a mask: tokens without steering must keep their very bits.
    on = cast(torch.Tensor, steered_tokens)
    return torch.where(on, steered.to(hidden.dtype), hidden)
