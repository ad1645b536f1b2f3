"""Ways to write the shift down, compared where it runs: between a layer and the norm after it.

Each is compiled with the add + norm that follows and timed against that add + norm alone; beside
it, what Inductor would generate for a CUDA GPU, and how far it is from float64 where ||h + u|| is
small against ||h|| and a dot-product form cancels.
"""

import statistics
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.kernels.generated import generate, triton_kernels
from benchmarks.kernels.piece import Piece, Size, add_norm, steering_buffers
from grains_vllm.layers import attach
from grains_vllm.shift import shift

Formula = Callable[[Tensor, Tensor], Tensor]


def stored(stream: Tensor, delta: Tensor) -> Tensor:
    """u once, used twice: the compiler writes it to memory."""
    u = stream + delta
    ratio = stream.square().sum(-1, True) / u.square().sum(-1, True).clamp_min(1e-30)
    return u * ratio.sqrt()


def dot_product(stream: Tensor, delta: Tensor) -> Tensor:
    """||u||^2 = ||h||^2 + 2 h.d + ||d||^2, with ||d||^2 from d."""
    before = stream.square().sum(-1, True)
    u = before + 2 * (stream * delta).sum(-1, True) + delta.square().sum(-1, True)
    return (stream + delta) * (before / u.clamp_min(1e-30)).sqrt()


FORMULAS: dict[str, Formula] = {
    "as served": shift,
    "u stored": stored,
    "dot product": dot_product,
}


class _Pass(nn.Module):
    """A layer that does nothing, so that only the shift is left."""

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, residual


def compare(sizes: list[Size], tokens: list[int], rounds: int) -> dict[str, Any]:
    """All formulas at all sizes, interleaved; sizes have at least one part.

    Args:
        tokens: at least 2 each; for one alone the compiler would make a kernel of its own.
    """
    timed = [
        {
            "hidden": size.hidden,
            "parts": size.parts,
            "dtype": str(size.dtype).removeprefix("torch."),
            **_times(size, tokens, rounds),
        }
        for size in track(sizes, "formulas", transient=True)
    ]
    return {
        "timed": timed,
        "error": {name: _error(formula) for name, formula in FORMULAS.items()},
        "generated_for_cuda": {name: _generated(formula) for name, formula in FORMULAS.items()},
    }


def _times(size: Size, tokens: list[int], rounds: int) -> dict[str, Any]:
    """Thread time as a ratio to add + norm, by number of tokens: median, and the middle half."""
    run = {"plain": _compiled("plain", size, None)}
    run |= {name: _compiled(name, size, formula) for name, formula in FORMULAS.items()}
    found: dict[str, Any] = {}
    for count in tokens:
        hidden, residual = (torch.randn(count, size.hidden, dtype=size.dtype) for _ in range(2))
        seconds: dict[str, list[float]] = {name: [] for name in run}
        for _ in range(rounds):  # interleaved, so that a slow spell hits all alike
            for name, call in run.items():
                seconds[name].append(_timed(call, hidden, residual))
        ratios = {
            name: [
                mine / plain for mine, plain in zip(seconds[name], seconds["plain"], strict=True)
            ]
            for name in FORMULAS
        }
        found[str(count)] = {
            "plain_us": statistics.median(seconds["plain"]) * 1e6,
            "ratio": {name: statistics.quantiles(values, n=4) for name, values in ratios.items()},
        }
    return {"tokens": found}


def _compiled(name: str, size: Size, formula: Formula | None) -> Callable[..., Any]:
    layer, weight = _Pass(), torch.ones(size.hidden, dtype=size.dtype)
    if formula is not None:
        buffers = steering_buffers(size)
        buffers["grains_slot"].random_(len(buffers["grains_gain"]))
        buffers["grains_strength"].fill_(0.1)
        attach(layer, "sum", buffers)

    def run(hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        hidden, residual = layer(hidden, residual)
        return add_norm(hidden, residual, weight)

    # The compiler keeps what it knows by code object; each of these gets one of its own.
    own = types.FunctionType(
        run.__code__.replace(co_name=f"{run.__name__}_{abs(hash((name, size)))}"),
        run.__globals__,
        name,
        None,
        run.__closure__,
    )
    compiled: Callable[..., Any] = torch.compile(own, dynamic=True, fullgraph=True)
    with _formula(formula or shift):
        for count in (33, 65):
            compiled(*(torch.randn(count, size.hidden, dtype=size.dtype) for _ in range(2)))
    return compiled


@contextmanager
def _formula(formula: Formula) -> Iterator[None]:
    with mock.patch("grains_vllm.layers.shift", formula):
        yield


def _timed(call: Callable[..., Any], hidden: Tensor, residual: Tensor) -> float:
    repeats = max(1, min(50, 2_000_000 // hidden.numel()))
    began = time.thread_time()  # not the time that other processes have had
    for _ in range(repeats):
        call(hidden, residual)
    return (time.thread_time() - began) / repeats


def _error(formula: Formula) -> dict[str, float]:
    """Largest relative error of ||h'|| by the angle's closeness to a half turn (d near -h)."""
    torch.manual_seed(0)
    h = torch.randn(64, 4096)
    found = {}
    for rest in (1.0, 1e-1, 1e-2, 1e-3):
        delta = -h + rest * torch.randn_like(h)
        norms = formula(h, delta).double().norm(dim=-1) / h.double().norm(dim=-1)
        found[str(rest)] = float((norms - 1).abs().max())
    return found


def _generated(formula: Formula, hidden: int = 4096) -> dict[str, dict[str, int]]:
    """Passes, loads and stores of rows of the kernel that holds the shift, by parts."""
    found = {}
    for parts in (1, 2):
        with torch.device("meta"):
            piece = Piece("sum", Size(hidden, parts))
        with _formula(formula):
            *_, last = triton_kernels(generate(piece, hidden, torch.bfloat16, "cuda"))
        found[str(parts)] = {"passes": last.passes, "loads": last.loads, "stores": last.stores}
    return found
