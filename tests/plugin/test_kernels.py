"""The compiled shift is part of the add + norm that follows: no kernel, no loop of its own."""

import re
from functools import cache

import pytest
import torch

from benchmarks.kernels.formulas import stored
from benchmarks.kernels.generated import cpp_token_loops, generate, triton_kernels
from benchmarks.kernels.piece import Piece, Size
from grains_vllm.shift import shift

HIDDEN = 1536


@cache
def plain(output, device):
    return code(output, 0, device)


def code(output, parts, device):
    with torch.device("meta"):
        piece = Piece(output, Size(HIDDEN, parts))
    return generate(piece, HIDDEN, torch.bfloat16, device)


def launches(generated, device):
    """Kernels of a GPU, or loops over the tokens on a CPU, and the calls of ready-made ones."""
    ready_made = len(re.findall(r"^ +extern_kernels\.", generated, re.M))
    if device == "cuda":
        return len(triton_kernels(generated)), ready_made
    return cpp_token_loops(generated), ready_made


@pytest.mark.parametrize("output", ["sum", "single"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steering_adds_no_kernel(output, device):
    compiled, ready_made = launches(plain(output, device), device)
    assert compiled >= 3
    for parts in (1, 2) if output == "sum" else (1,):
        steered = launches(code(output, parts, device), device)
        assert steered[0] <= compiled
        assert steered[1] == ready_made


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_shift_that_looks_at_other_tokens_would_cost_kernels(device, monkeypatch):
    without = launches(plain("sum", device), device)
    monkeypatch.setattr(
        "grains_vllm.layers.shift", lambda h, d: shift(h, d) - h.mean(0, keepdim=True)
    )
    assert launches(code("sum", 1, device), device)[0] > without[0]


def test_the_shifted_stream_is_not_written_to_memory_and_read_back(monkeypatch):
    without = triton_kernels(plain("sum", "cuda"))[-1]
    steered = triton_kernels(code("sum", 1, "cuda"))[-1]
    # One row more than plain: h', which the norm reads twice. Every pass reads the direction.
    assert (steered.passes, steered.stores) == (without.passes + 1, without.stores + 1)
    monkeypatch.setattr("grains_vllm.layers.shift", stored)
    worse = triton_kernels(code("sum", 1, "cuda"))[-1]
    assert worse.stores > steered.stores
    assert worse.loads > steered.loads
