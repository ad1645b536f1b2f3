"""The decoder blocks: where they are, and the residual stream that leaves each of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offline.errors import InputError


def find_blocks(model: Any, name: str, path: str | None = None) -> str:
    """The name of the decoder block list: as many entries as layers, each returning [.., hidden].

    Raises:
        InputError: no list, or more than one, behaves like that; says which lists there are.
    """
    layers = model.config.get_text_config().num_hidden_layers
    lists = {key: len(m) for key, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    candidates = [key for key, length in lists.items() if length == layers]
    if path is not None:
        if path not in lists:
            raise InputError(f"--blocks is '{path}', but model '{name}' holds the lists {lists}")
        if path not in candidates:
            raise InputError(
                f"--blocks is '{path}' with {lists[path]} entries, but model '{name}' has "
                f"{layers} layers"
            )
        candidates = [path]
    found = [key for key in candidates if _behaves(model, key)]
    if len(found) != 1:
        raise InputError(
            f"model '{name}': {len(found)} of its module lists behave like {layers} decoder blocks "
            f"({found}); name the right one with --blocks; there are {lists}"
        )
    return found[0]


def _behaves(model: Any, path: str) -> bool:
    """Whether one token's forward runs each entry once and gets [1, 1, hidden] from it."""
    hidden = model.config.get_text_config().hidden_size
    shapes: list[Any] = []
    handles = [
        block.register_forward_hook(lambda _m, _a, out: shapes.append(stream_of(out)))
        for block in model.get_submodule(path)
    ]
    try:
        device = model.get_input_embeddings().weight.device
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    expected = (1, 1, hidden)
    return len(shapes) == len(handles) and all(
        isinstance(x, Tensor) and tuple(x.shape) == expected for x in shapes
    )


def stream_of(output: Any) -> Any:
    """The residual stream in a block's return value: a tensor, or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def record_blocks(
    blocks: Sequence[nn.Module], spans: Sequence[tuple[int, int]]
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Records h_l, the residual stream after each block, averaged over a span of each row.

    Args:
        spans: per row, the first position and the one after the last.

    Yields:
        A list that one forward fills with, per block, the means of h_l [rows, hidden] and of
        ||h_l|| [rows], both float32 on the block's device, before the final norm (unlike
        `hidden_states[-1]` of transformers).
    """
    outputs: list[tuple[Tensor, Tensor]] = []

    def record(_module: nn.Module, _args: Any, output: Any) -> None:
        stream = stream_of(output)
        parts = [row[start:end].float() for row, (start, end) in zip(stream, spans, strict=True)]
        means = torch.stack([part.mean(0) for part in parts])
        norms = torch.stack([part.norm(dim=-1).mean() for part in parts])
        outputs.append((means, norms))

    handles = [block.register_forward_hook(record) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Makes a forward keep only each block's input; its backward computes the block once more.

    transformers' own switch does this in training mode only, which would also switch dropout on.
    """
    own = [vars(block).get("forward") for block in blocks]  # set by libraries that move weights
    for block in blocks:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
