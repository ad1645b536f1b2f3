"""What vLLM compiles between two attentions, in small: end of one layer, beginning of the next.

The norm is vLLM's own (its native form, which Inductor gets to see) and the layer is steered by the
plugin's own `attach`; only the matrices around them are stand-ins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grains_vllm.layers import attach

SLOTS = 8
MAX_TOKENS = 8192


@dataclass(frozen=True)
class Size:
    """Attributes: parts: vectors that a token may combine; 0 is a layer that is not steered."""

    hidden: int
    parts: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def feed_forward(self) -> int:
        return 4 * self.hidden


def matrix(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=dtype) * shape[0] ** -0.5, requires_grad=False)


def add_norm(hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from vllm.ir.ops.layernorm import fused_add_rms_norm

    normed, stream = fused_add_rms_norm.impls["native"].impl_fn(hidden, residual, weight, 1e-5)
    return normed, stream


class SumLayer(nn.Module):
    """From the attention's output to that of the MLP; hands on (hidden, residual), as Llama's."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.o = matrix(size.hidden, size.hidden, dtype=size.dtype)
        self.norm = matrix(size.hidden, dtype=size.dtype)
        self.gate_up = matrix(size.hidden, 2 * size.feed_forward, dtype=size.dtype)
        self.down = matrix(size.feed_forward, size.hidden, dtype=size.dtype)

    def forward(self, attention: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        hidden, residual = add_norm(attention @ self.o, residual, self.norm)
        gate, up = (hidden @ self.gate_up).chunk(2, -1)
        return (F.silu(gate) * up) @ self.down, residual


class SingleLayer(nn.Module):
    """The same as GPT-2 does it: biases, LayerNorm, and one tensor, the stream itself."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.o = matrix(size.hidden, size.hidden, dtype=size.dtype)
        self.norm = matrix(size.hidden, dtype=size.dtype)
        self.fc = matrix(size.hidden, size.feed_forward, dtype=size.dtype)
        self.fc_bias = matrix(size.feed_forward, dtype=size.dtype)
        self.proj = matrix(size.feed_forward, size.hidden, dtype=size.dtype)
        self.proj_bias = matrix(size.hidden, dtype=size.dtype)

    def forward(self, attention: Tensor, residual: Tensor) -> Tensor:
        residual = attention @ self.o + residual
        hidden = F.layer_norm(residual, self.norm.shape, self.norm)
        hidden = F.gelu(torch.addmm(self.fc_bias, hidden, self.fc), approximate="tanh")
        return torch.addmm(self.proj_bias, hidden, self.proj) + residual


class Piece(nn.Module):
    """A layer, steered or not, and the norm and projection with which the next one begins.

    Args:
        output: "sum" or "single", see grains_vllm.layers.layer_output.
    """

    def __init__(self, output: str, size: Size) -> None:
        super().__init__()
        self.output = output
        self.layer = {"sum": SumLayer, "single": SingleLayer}[output](size)
        self.norm = matrix(size.hidden, dtype=size.dtype)
        self.qkv = matrix(size.hidden, 3 * size.hidden, dtype=size.dtype)
        if size.parts:
            attach(self.layer, output, steering_buffers(size))

    def forward(self, attention: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] twice -> [tokens, 3 * hidden] and the residual [tokens, hidden]."""
        if self.output == "sum":
            hidden, residual = self.layer(attention, residual)
            hidden, residual = add_norm(hidden, residual, self.norm)
        else:
            residual = self.layer(attention, residual)
            hidden = F.layer_norm(residual, self.norm.shape, self.norm)
        return hidden @ self.qkv, residual


def steering_buffers(size: Size) -> dict[str, Tensor]:
    """As worker.install makes them: slot and strength side by side in one buffer."""
    routing = torch.zeros(MAX_TOKENS, size.parts, 2, dtype=torch.int32)
    return {
        "grains_slot": routing[..., 0],
        "grains_strength": routing.view(torch.float32)[..., 1],
        "grains_gain": torch.ones(SLOTS),
        "grains_direction": F.normalize(torch.randn(SLOTS, size.hidden), dim=-1),
    }
