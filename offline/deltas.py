"""What a set of tokens does to the residual stream: D_l = h_l(x) - h_l(x without the set)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from offline.blocks import record_blocks
from offline.errors import InputError
from offline.model import Decoder
from offline.objective import Row, batch_inputs, logits_at
from offline.options import Read
from offline.prompt_inputs import prompt_inputs
from offline.prompts import TokenPair


@dataclass(frozen=True)
class Deltas:
    """The deltas of one example.

    Attributes:
        positive, negative: D+ and D-, each [layers, hidden] float32.
        norms: ||h_l|| of the unmasked input where it was read (the mean where that is a span),
            [reads, layers] float32; one read at the prompt's end, two (in x + y+ and in x + y-) at
            the responses.
    """

    positive: Tensor
    negative: Tensor
    norms: Tensor


def masked(prompt: Tensor, positions: Sequence[int], replacement: Tensor) -> Tensor:
    """A copy of `prompt` [T, hidden] whose `positions` hold `replacement` ([hidden], or [T, hidden]
    with one for each position)."""
    copy, chosen = prompt.clone(), list(positions)
    copy[chosen] = replacement.to(copy.dtype).expand_as(copy)[chosen]
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
        replacement: embedding [hidden] or [T, hidden] for masked positions; None hides them from
            attention.
        read: the prompt's last position, or a place in x + y+ (for D+) and x + y- (for D-).

    Raises:
        InputError: a block output is NaN or infinite.
    """
    place = prompt_inputs(decoder, pair.prompt_ids, pair.image)
    prompt = place.embeds
    whole = [Row(prompt, ((ids, 1),), place) for ids in _after(pair, read)]
    without = []
    for row, chosen in zip((whole[0], whole[-1]), (positive, negative), strict=True):
        embeds = prompt if replacement is None else masked(prompt, chosen, replacement)
        without.append(Row(embeds, row.segments, place))
    hidden: list[Sequence[int]] = [()] * len(whole)
    hidden += [positive, negative] if replacement is None else [(), ()]
    read_off, norms = streams(decoder, [*whole, *without], hidden, pair, read)
    plain, plus, minus = read_off[: len(whole)], read_off[-2], read_off[-1]
    return Deltas(plain[0] - plus, plain[-1] - minus, norms[: len(whole)])


def read_streams(decoder: Decoder, pair: TokenPair, read: Read) -> tuple[Tensor, Tensor]:
    """h_l [reads, layers, hidden] and ||h_l|| [reads, layers] where `read` says, both float32;
    x + y+ comes before x + y-.

    Raises:
        InputError: a block output is NaN or infinite.
    """
    place = prompt_inputs(decoder, pair.prompt_ids, pair.image)
    after = _after(pair, read)
    rows = [Row(place.embeds, ((ids, 1),), place) for ids in after]
    # Tokens where they will do: not every model makes the same of their embeddings.
    tokens = None if pair.image else [[*pair.prompt_ids, *ids] for ids in after]
    return streams(decoder, rows, [()] * len(rows), pair, read, tokens)


def streams(
    decoder: Decoder,
    rows: Sequence[Row],
    hidden: Sequence[Sequence[int]],
    pair: TokenPair,
    read: Read,
    tokens: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """h_l [rows, layers, hidden] and ||h_l|| [rows, layers] at each row's end, float32; with
    `response-mean` their means over the positions that predict the row's response.

    Args:
        hidden: per row, positions that attention must not see.
        tokens: per row, its token ids, which are then given instead of its embeddings.
    """
    inputs = batch_inputs(decoder, rows)
    if tokens is not None:
        ids = pad_sequence([torch.tensor(row) for row in tokens], batch_first=True)
        inputs["input_ids"] = ids.to(inputs.pop("inputs_embeds").device)
    for mask, positions in zip(inputs["attention_mask"], hidden, strict=True):
        mask[list(positions)] = 0
    spans = [_span(row, read) for row in rows]
    anywhere = torch.zeros(len(rows), 1, dtype=torch.long)
    with (
        torch.no_grad(),
        record_blocks(decoder.blocks, spans) as outputs,
        logits_at(decoder.model, anywhere),  # nobody reads logits; all of them would cost much
    ):
        decoder.model(**inputs, use_cache=False)
    result = torch.stack([stream.cpu() for stream, _ in outputs], dim=1)
    if not torch.isfinite(result).all():
        raise InputError(
            f"{pair.pair.where}: a block output holds a NaN or infinity with model '{decoder.name}'"
        )
    return result, torch.stack([norms.cpu() for _, norms in outputs], dim=1)


def _span(row: Row, read: Read) -> tuple[int, int]:
    """The first position that is read, and the one after the last."""
    prompt, response = len(row.prompt), len(row.segments[0][0])
    if read is Read.response_mean:
        return prompt - 1, prompt + response - 1
    return prompt + response - 1, prompt + response


def _after(pair: TokenPair, read: Read) -> list[tuple[int, ...]]:
    """What stands behind the prompt where it is read; one entry where both responses agree."""
    if read is Read.prompt_end:
        return [()]
    count = 1 if read is Read.response_start else None
    return [tuple(pair.chosen_ids[:count]), tuple(pair.rejected_ids[:count])]
