"""What is computed for a few examples at a time: tensors that become directions, and records."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offline.attribution import Attribution, Attributor
from offline.baselines import baseline_embedding, mask_embedding, prompt_baseline
from offline.batching import Room
from offline.deltas import deltas, read_streams
from offline.image_views import image_record
from offline.model import Decoder
from offline.options import Baseline, ExtractOptions, Mask, Method, Mode, Read
from offline.prompt_inputs import prompt_inputs
from offline.prompts import TokenPair
from offline.selection import select

Record = dict[str, Any]
Group = tuple[dict[str, Tensor], list[Record]]


def group_maker(
    decoder: Decoder, options: ExtractOptions, room: Room, on_note: Callable[[str], None]
) -> Callable[[Sequence[TokenPair]], Group]:
    """The function that computes one group of examples with the method of `options`.

    Its tensors, stacked over the examples that have any:
        grains: `positive` and `negative` [n, layers, hidden], `norms` [n, reads, layers].
        caa, pca-diff, icv: the same; the first two are h_l(x, y+) and h_l(x, y-).
        random: `norms` alone.
    """
    if options.method is not Method.grains:
        return lambda pairs: _read_group(decoder, pairs, options)
    baseline = baseline_embedding(decoder, options.baseline)
    if options.baseline in (Baseline.pad, Baseline.mask_token) and not baseline.any():
        kind = options.baseline.value.removesuffix("-token")
        on_note(
            f"the {kind} token's embedding is zero, so --baseline {options.baseline} is "
            "--baseline zero here"
        )
    replacement = mask_embedding(decoder, options.mask, baseline)
    attributor = Attributor(decoder, options, baseline, room)
    return lambda pairs: _grains_group(
        decoder, pairs, attributor.attribute(pairs), replacement, options
    )


def _grains_group(
    decoder: Decoder,
    pairs: Sequence[TokenPair],
    scored: Sequence[Attribution],
    replacement: Tensor | None,
    options: ExtractOptions,
) -> Group:
    """Selection and deltas; an example without T+ gives no deltas, one without T- a zero D-."""
    layers, hidden = len(decoder.blocks), decoder.fingerprint.hidden_size
    positive, negative = [torch.empty(0, layers, hidden)], [torch.empty(0, layers, hidden)]
    norms, records = [], []
    for pair, attribution in zip(pairs, scored, strict=True):
        eligible = pair.eligible
        if pair.image is not None:
            eligible = options.tokens.allow(eligible, pair.image_tokens)
        plus, minus = select(attribution.scores, eligible, options.most(pair.image is not None))
        used = bool(plus and (minus or options.mode is Mode.positive))
        if plus:
            instead = replacement
            if replacement is not None and options.mask is Mask.baseline:
                prompt = prompt_inputs(decoder, pair.prompt_ids, pair.image)
                instead = prompt_baseline(prompt, replacement, options.baseline)
            delta = deltas(decoder, pair, plus, minus, instead, options.read_at)
            positive.append(delta.positive[None])
            negative.append(delta.negative[None])
            norms.append(delta.norms[None])
        record = _identity(pair, used) | _story(pair, attribution, eligible, plus, minus)
        if pair.image is not None:
            record["image"] = image_record(decoder, pair)
        records.append(record)
    tensors = {"positive": torch.cat(positive), "negative": torch.cat(negative)}
    reads = 1 if options.read_at is Read.prompt_end else 2
    return tensors | {"norms": torch.cat([torch.empty(0, reads, layers), *norms])}, records


def _read_group(decoder: Decoder, pairs: Sequence[TokenPair], options: ExtractOptions) -> Group:
    """The residual streams themselves, with nothing masked."""
    read = [read_streams(decoder, pair, options.read_at) for pair in pairs]
    streams, norms = (torch.stack(parts) for parts in zip(*read, strict=True))
    tensors = {"norms": norms}
    if options.method is not Method.random:
        tensors |= {"positive": streams[:, 0].clone(), "negative": streams[:, 1].clone()}
    return tensors, [_identity(pair, used=True) for pair in pairs]


def _identity(pair: TokenPair, used: bool) -> Record:
    return {
        "id": pair.pair.id,
        "where": pair.pair.where,
        "fingerprint": pair.pair.fingerprint,
        "prompt_fingerprint": pair.pair.prompt_fingerprint,
        "used": used,
    }


def _story(
    pair: TokenPair,
    attribution: Attribution,
    eligible: list[bool],
    plus: list[int],
    minus: list[int],
) -> Record:
    return {
        "f_input": attribution.f_input,
        "f_baseline": attribution.f_baseline,
        "points": attribution.points,
        "gap": attribution.gap,
        "packed": attribution.packed,
        "tokens": pair.tokens,
        "eligible": eligible,
        "scores": attribution.scores.tolist(),
        "positive": plus,
        "negative": minus,
    }
