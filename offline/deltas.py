"""What a set of tokens does to the residual stream: D_l = h_l(x) - h_l(x without the set)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offline.blocks import record_blocks
from offline.errors import InputError
from offline.model import Decoder
from offline.objective import Row, batch_inputs
from offline.options import Read
from offline.prompts import TokenPair


@dataclass(frozen=True)
class Deltas:
    """The deltas of one example.

    Attributes:
        positive, negative: D+ and D-, each [layers, hidden] float32.
        norms: ||h_l|| of the unmasked input where it was read, [reads, layers] float32; one read
            at the prompt's end, two (after y+ and after y-) at the responses' ends.
    """

    positive: Tensor
    negative: Tensor
    norms: Tensor


def masked(prompt: Tensor, positions: Sequence[int], replacement: Tensor) -> Tensor:
    """A copy of `prompt` [T, hidden] whose `positions` hold `replacement` [hidden]."""
    copy = prompt.clone()
    copy[list(positions)] = replacement.to(copy.dtype)
    return copy


def deltas(
    decoder: Decoder,
    pair: TokenPair,
    positive: Sequence[int],
    negative: Sequence[int],
    replacement: Tensor | None,
    read: Read,
) -> Deltas:
    """Deltas of raw block outputs for one example (GrAInS, delta step).

    Args:
        positive, negative: T+ and T-, positions in the prompt; an empty set gives a zero delta.
        replacement: embedding [hidden] for masked positions; None hides them from attention.
        read: the prompt's last position, or the end of x + y+ (for D+) and x + y- (for D-).

    Raises:
        InputError: a block output is NaN or infinite.
    """
    prompt = decoder.embed(pair.prompt_ids)
    after: tuple[Sequence[int], Sequence[int]] = ((), ())
    if read is Read.response_end:
        after = (pair.chosen_ids, pair.rejected_ids)
    rows, hidden_sets = [], []
    for ids, chosen in zip(after, (positive, negative), strict=True):
        segments = ((tuple(ids), 1),)
        rows += [Row(prompt, segments)]
        rows += [
            Row(prompt if replacement is None else masked(prompt, chosen, replacement), segments)
        ]
        hidden_sets += [(), chosen if replacement is None else ()]
    streams = _streams(decoder, rows, hidden_sets, pair)
    whole_plus, without_plus, whole_minus, without_minus = streams.unbind(0)
    norms = torch.stack([whole_plus, whole_minus]).norm(dim=-1)
    if read is Read.prompt_end:
        norms = norms[:1]
    return Deltas(whole_plus - without_plus, whole_minus - without_minus, norms)


def _streams(
    decoder: Decoder, rows: list[Row], hidden_sets: list[Sequence[int]], pair: TokenPair
) -> Tensor:
    """h_l at each row's end: [rows, layers, hidden] float32."""
    inputs = batch_inputs(decoder, rows)
    for mask, positions in zip(inputs["attention_mask"], hidden_sets, strict=True):
        mask[list(positions)] = 0
    ends = torch.tensor([len(row.prompt) + len(row.segments[0][0]) - 1 for row in rows])
    with torch.no_grad(), record_blocks(decoder.blocks, ends) as outputs:
        decoder.model(**inputs, use_cache=False)
    streams = torch.stack(outputs, dim=1)
    if not torch.isfinite(streams).all():
        raise InputError(
            f"{pair.pair.where}: a block output holds a NaN or infinity with model '{decoder.name}'"
        )
    return streams
