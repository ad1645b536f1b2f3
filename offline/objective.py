"""F(x) = logp(y+ | x) - logp(y- | x), as a differentiable function of the prompt's embeddings.

A row is one sequence of the batch: the prompt followed by one or more response segments, each of
which sees the prompt and itself. `packed` puts both responses into one row, which saves computing
the prompt twice; `two rows` is the ordinary way. Rows of any lengths share a batch, padded on the
right.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from offline.batching import out_of_memory
from offline.model import Decoder
from offline.options import Objective
from offline.prompt_inputs import PromptInputs, prompt_inputs
from offline.prompts import TokenPair

# How far packed and ordinary log-likelihoods of one token may differ: the noise of one forward.
_PACKED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
# How far those of one response may follow the other, which it does not see: hardly any noise.
_LEAK_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
# Layers in which a mask decides what a position is made of.
_MASKED_LAYERS = ("full_attention", "attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Row:
    """One sequence.

    Attributes:
        prompt: embeddings [T, hidden].
        segments: (response ids, sign in F).
        place: the positions and token types of the prompt; None for those of text.
    """

    prompt: Tensor
    segments: tuple[tuple[tuple[int, ...], int], ...]
    place: PromptInputs | None = None


def rows_of(
    pair: TokenPair, prompt: Tensor, packed: bool, place: PromptInputs | None = None
) -> list[Row]:
    """The one (packed) or two rows from which F of `pair` is computed."""
    chosen, rejected = (tuple(pair.chosen_ids), 1), (tuple(pair.rejected_ids), -1)
    if packed:
        return [Row(prompt, (chosen, rejected), place)]
    return [Row(prompt, (chosen,), place), Row(prompt, (rejected,), place)]


def place_of(decoder: Decoder, pair: TokenPair) -> PromptInputs | None:
    """What `Row.place` is for this pair."""
    if pair.image is None:
        return None
    return prompt_inputs(decoder, pair.prompt_ids, pair.image)


def row_length(pair: TokenPair, packed: bool) -> int:
    """Tokens of the longest of these rows."""
    both = len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
    return both if packed else pair.length


def contrast(
    decoder: Decoder, pairs: Sequence[TokenPair], prompts: Sequence[Tensor], packed: bool,
    objective: Objective,
) -> Tensor:  # fmt: skip
    """F for each pair: [len(pairs)] float32.

    Args:
        prompts: for each pair, embeddings [T, hidden] in any float dtype; gradients flow to them.
        packed: one row per pair instead of two.
    """
    rows = [
        row
        for pair, prompt in zip(pairs, prompts, strict=True)
        for row in rows_of(pair, prompt, packed, place_of(decoder, pair))
    ]
    logps = response_logps(decoder, rows)
    weights = _weights(rows, objective).to(logps.device)
    return (logps * weights).sum(1).view(len(pairs), -1).sum(1)


def response_logps(decoder: Decoder, rows: Sequence[Row]) -> Tensor:
    """Log-likelihood of every response token: [rows, most response tokens] float32.

    Logits at position t score token t + 1, so a segment's first token is scored at the prompt's
    last position. Entries past a row's own tokens are of no meaning.
    """
    scored_at = [torch.tensor(_scored_at(row)) for row in rows]
    targets = [torch.tensor([t for ids, _ in row.segments for t in ids]) for row in rows]
    inputs = batch_inputs(decoder, rows)
    positions = pad_sequence(scored_at, batch_first=True).to(decoder.device)
    with logits_at(decoder.model, positions) as select:
        logits = select(decoder.model(**inputs, use_cache=False).logits)
    wanted = pad_sequence(targets, batch_first=True).to(logits.device)
    # [rows, n, vocabulary] is the largest tensor here; log_softmax is its only float32 copy.
    return logits.log_softmax(-1, dtype=torch.float32).gather(2, wanted[..., None])[..., 0]


def batch_inputs(decoder: Decoder, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Keyword arguments of one forward: inputs_embeds, attention_mask, position_ids, and
    token_type_ids where a prompt has them."""
    embeds, positions = [], []
    axes = max(1 if row.place is None else len(row.place.positions) for row in rows)
    responses: dict[tuple[int, ...], Tensor] = {}  # most batches hold points of one example
    for row in rows:
        ids = tuple(token for segment, _ in row.segments for token in segment)
        parts = [row.prompt.to(decoder.dtype)]
        if ids:
            if ids not in responses:
                responses[ids] = decoder.embed(list(ids))
            parts.append(responses[ids])
        embeds.append(torch.cat(parts))
        positions.append(_positions(row, axes))
    lengths = torch.tensor([len(embedded) for embedded in embeds])
    longest = int(lengths.max())
    if any(len(row.segments) > 1 for row in rows):
        keys = [_lengths(row) for row in rows]
        masks = {key: _additive_mask(key, longest, decoder) for key in dict.fromkeys(keys)}
        # The largest of the inputs: rows of one shape share it.
        mask = (
            masks[keys[0]].expand(len(rows), -1, -1, -1)
            if len(masks) == 1
            else torch.stack([masks[key] for key in keys])
        )
    else:
        mask = (torch.arange(longest) < lengths[:, None]).long()
    # [rows, longest, axes]; models take [rows, longest], or M-RoPE's [3, rows, longest].
    placed = pad_sequence(positions, batch_first=True).to(decoder.device)
    inputs = {
        "inputs_embeds": pad_sequence(embeds, batch_first=True),
        "attention_mask": mask.to(decoder.device),
        "position_ids": placed[..., 0] if axes == 1 else placed.permute(2, 0, 1),
    }
    if any(row.place is not None and row.place.token_types is not None for row in rows):
        types = torch.zeros(len(rows), longest, dtype=torch.long, device=decoder.device)
        for row, marked in zip(rows, types, strict=True):
            if row.place is not None and row.place.token_types is not None:
                marked[: len(row.place.token_types)] = row.place.token_types
        inputs["token_type_ids"] = types
    return inputs


def _positions(row: Row, axes: int) -> Tensor:
    """[tokens, axes]; each response counts on from the prompt's end on all axes."""
    length = row.prompt.shape[0]
    prompt = torch.arange(length)[None] if row.place is None else row.place.positions.cpu()
    after = int(prompt.max()) + 1
    parts = [prompt.expand(axes, -1)]
    for segment, _ in row.segments:
        parts.append(torch.arange(after, after + len(segment)).expand(axes, -1))
    return torch.cat(parts, 1).T


def may_pack(decoder: Decoder, pair: TokenPair) -> bool:
    """Whether one packed row gives this pair's log-likelihoods, by trying it on the plain input.

    A 4-D mask replaces the model's own, so attention windows must not bind, and where layers mix
    positions in other ways, one response would follow from the other. Everything else (exotic
    masks, kernels without masks) shows in the numbers.
    """
    place = place_of(decoder, pair)
    if place is not None and place.token_types is not None:
        return False  # a mask of our own would lose that image tokens see each other both ways
    if mixes_without_mask(decoder):
        return False
    config = decoder.text_config
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if any(window is not None and window < pair.length for window in windows):
        return False
    prompt = decoder.embed(pair.prompt_ids) if place is None else place.embeds
    # A response's first token is scored at the prompt's end, so a single one would show nothing.
    chosen, rejected = (
        ids if len(ids) > 1 else ids * 2 for ids in (pair.chosen_ids, pair.rejected_ids)
    )
    tried = replace(pair, chosen_ids=chosen, rejected_ids=rejected)
    tokens = decoder.model.get_input_embeddings().weight.shape[0]
    other = replace(tried, chosen_ids=[(token + 1) % tokens for token in chosen])
    try:
        with torch.no_grad():
            packed = [row for one in (tried, other) for row in rows_of(one, prompt, True, place)]
            together, beside = response_logps(decoder, packed)
            apart = response_logps(decoder, rows_of(tried, prompt, False, place))
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        return False  # this model or attention implementation does not take a 4-D mask
    alone = torch.cat([apart[0, : len(chosen)], apart[1, : len(rejected)]])
    tolerance, leak = _PACKED_TOLERANCE[decoder.dtype], _LEAK_TOLERANCE[decoder.dtype]
    second = slice(len(chosen), None)
    return bool(
        torch.allclose(together, alone, rtol=tolerance, atol=tolerance)
        and torch.allclose(together[second], beside[second], rtol=0, atol=leak)
    )


def mixes_without_mask(decoder: Decoder) -> bool:
    """Whether layers carry one position into the next whatever an attention mask says, as
    recurrent, convolutional and linear attention layers do."""
    kinds = getattr(decoder.text_config, "layer_types", None) or ()
    return (
        # What transformers says of such models; it does not say so of all of them.
        getattr(decoder.model, "_is_stateful", False)
        or any(kind not in _MASKED_LAYERS for kind in kinds)
        or any(
            isinstance(module, nn.Conv1d | nn.RNNBase)
            for block in decoder.blocks
            for module in block.modules()
        )
    )


@contextmanager
def logits_at(model: Any, positions: Tensor) -> Iterator[Any]:
    """Makes one forward compute logits only at `positions` [rows, n].

    Selecting in front of the output embedding saves most of its cost and leaves whatever the
    model does to its logits afterwards (scaling, soft-capping) in place.

    Yields:
        A function that takes the forward's logits and returns those at `positions`; it selects
        afterwards where the model has no separate output embedding.
    """
    selected = False

    def at(states: Tensor) -> Tensor:
        rows = torch.arange(states.shape[0], device=states.device)[:, None]
        return states[rows, positions.to(states.device)]

    def pick(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal selected
        selected = True
        return (at(args[0]), *args[1:])

    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(pick)
    try:
        yield lambda logits: logits if selected else at(logits)
    finally:
        if handle is not None:
            handle.remove()


def _scored_at(row: Row) -> list[int]:
    last, at = row.prompt.shape[0] - 1, []
    start = last + 1
    for segment, _ in row.segments:
        at += [last, *range(start, start + len(segment) - 1)]
        start += len(segment)
    return at


def _weights(rows: Sequence[Row], objective: Objective) -> Tensor:
    weights = []
    for row in rows:
        parts = []
        for segment, sign in row.segments:
            part = torch.full((len(segment),), float(sign))
            if objective is Objective.mean:
                part /= len(segment)
            elif objective is Objective.first_token:
                part[1:] = 0.0
            parts.append(part)
        weights.append(torch.cat(parts))
    return pad_sequence(weights, batch_first=True)


def _lengths(row: Row) -> tuple[int, ...]:
    return (row.prompt.shape[0], *(len(segment) for segment, _ in row.segments))


def _additive_mask(lengths: tuple[int, ...], longest: int, decoder: Decoder) -> Tensor:
    """[1, longest, longest]: 0 where query sees key, the dtype's minimum elsewhere."""
    device, dtype = decoder.device, decoder.dtype
    sees = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    start = lengths[0]
    for length in lengths[1:]:
        sees[start + length :, start : start + length] = False
        start += length
    padding = torch.arange(start, longest, device=device)
    sees[start:] = False
    sees[padding, padding] = True  # so that there is no NaN
    mask = torch.zeros(1, longest, longest, dtype=dtype, device=device)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min)
