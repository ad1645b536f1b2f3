"""From preference pairs to an artifact: the path of every pair, top to bottom."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grains_vllm.vectors import SteeringVector
from offline.attribution import Attribution, Attributor
from offline.baselines import baseline_embedding, mask_embedding
from offline.deltas import deltas
from offline.directions import directions
from offline.errors import InputError
from offline.model import Decoder, check_leaf
from offline.options import Baseline, ExtractOptions, Mode
from offline.pairs import PairSet
from offline.partial import PartialRun, discard
from offline.passport import Record, manifest, write_passport
from offline.prompts import TokenPair, tokenise
from offline.selection import select

GROUP = 8  # examples that are attributed together and kept together


def extract(
    decoder: Decoder,
    data: PairSet,
    options: ExtractOptions,
    out: Path,
    *,
    batch_rows: int = 8,
    restart: bool = False,
    recommended: Mapping[str, Any] | None = None,
    strict_k: bool = False,
    on_examples: Callable[[int], None] = lambda count: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> tuple[SteeringVector, list[Record]]:
    """Computes the steering vector of `data`; the caller saves it.

    Args:
        out: where the artifact will be; finished groups are kept in the folder `<out>.partial`.
        batch_rows: rows per forward; changes nothing but speed and memory.
        restart: discard what an interrupted run left.
        recommended: the passport's `recommended`, if somebody knows one.
        strict_k: refuse prompts with fewer tokens than k; otherwise they just give fewer.
        on_examples: told how many more examples are finished.
        on_note: told in one line what a person should know about the run.

    Returns:
        The vector, and per example a record of its tokens, scores and selected positions.

    Raises:
        InputError: see the message; on disk is only what an earlier run left.
    """
    if isinstance(data.pairs[0].prompt, str) and getattr(decoder.tokenizer, "chat_template", None):
        on_note("prompts are raw text although the model has a chat template; see --chat")
    pairs = [tokenise(pair, decoder.tokenizer) for pair in data.pairs]
    for pair in pairs:
        _require_fit(pair, decoder, options.k if strict_k else 1)
    repeated = len(data.pairs) - len({pair.id for pair in data.pairs})
    if repeated:
        on_note(f"{repeated} examples have an id that another one has too")
    check_leaf(decoder, pairs[0].prompt_ids)
    baseline = baseline_embedding(decoder, options.baseline)
    if options.baseline is Baseline.pad and not baseline.any():
        on_note("the pad token's embedding is zero, so --baseline pad is --baseline zero here")
    replacement = mask_embedding(decoder, options.mask, baseline)
    attributor = Attributor(decoder, options, baseline, batch_rows)
    try:
        with PartialRun(out, manifest(decoder, data, options), restart) as partial:
            tensors, records = [], []
            for number, start in enumerate(range(0, len(pairs), GROUP)):
                members = pairs[start : start + GROUP]
                group = partial.load(number)
                if group is None:
                    scored = attributor.attribute(members)
                    group = _group(decoder, members, scored, replacement, options)
                    partial.save(number, *group)
                tensors.append(group[0])
                records += group[1]
                on_examples(len(members))
            stacked = {name: torch.cat([group[name] for group in tensors]) for name in tensors[0]}
            vector = _vector(decoder, data, options, stacked, records, recommended)
    except torch.OutOfMemoryError as error:
        raise InputError(
            "the device has too little memory for one example; use shorter prompts, "
            "--dtype bfloat16 or --device-map auto"
        ) from error
    two_rows = sum(not record["packed"] for record in records)
    if two_rows:
        on_note(f"{two_rows} examples took two rows each: packing does not fit this model")
    return vector, records


def finish(vector: SteeringVector, out: Path) -> None:
    """Saves the artifact, then removes the folder of finished groups."""
    vector.save(out)
    discard(out)


def _group(
    decoder: Decoder,
    pairs: Sequence[TokenPair],
    scored: Sequence[Attribution],
    replacement: Tensor | None,
    options: ExtractOptions,
) -> tuple[dict[str, Tensor], list[Record]]:
    """Selection and deltas of one group; an example without a needed set gives no deltas."""
    layers, hidden = len(decoder.blocks), decoder.fingerprint.hidden_size
    positive, negative = [torch.empty(0, layers, hidden)], [torch.empty(0, layers, hidden)]
    norms, records = [torch.empty(0, layers)], []
    for pair, attribution in zip(pairs, scored, strict=True):
        plus, minus = select(attribution.scores, pair.eligible, options.k)
        used = bool(plus and (minus or options.mode is Mode.positive))
        if used:
            delta = deltas(decoder, pair, plus, minus, replacement, options.read)
            positive.append(delta.positive[None])
            negative.append(delta.negative[None])
            norms.append(delta.norms)
        records.append(_record(pair, attribution, plus, minus, used))
    tensors = {"positive": positive, "negative": negative, "norms": norms}
    return {name: torch.cat(parts) for name, parts in tensors.items()}, records


def _record(
    pair: TokenPair, attribution: Attribution, plus: list[int], minus: list[int], used: bool
) -> Record:
    return {
        "id": pair.pair.id,
        "where": pair.pair.where,
        "fingerprint": pair.pair.fingerprint,
        "prompt_fingerprint": pair.pair.prompt_fingerprint,
        "used": used,
        "f_input": attribution.f_input,
        "f_baseline": attribution.f_baseline,
        "points": attribution.points,
        "gap": attribution.gap,
        "packed": attribution.packed,
        "tokens": pair.tokens,
        "eligible": pair.eligible,
        "scores": attribution.scores.tolist(),
        "positive": plus,
        "negative": minus,
    }


def _vector(
    decoder: Decoder,
    data: PairSet,
    options: ExtractOptions,
    tensors: dict[str, Tensor],
    records: Sequence[Record],
    recommended: Mapping[str, Any] | None,
) -> SteeringVector:
    used = sum(record["used"] for record in records)
    if used < 2:
        raise InputError(
            f"{data.name}: {used} of {len(records)} examples have tokens of the needed signs, "
            "expected 2 or more"
        )
    unit_rows, reference, layers = directions(
        tensors["positive"], tensors["negative"], tensors["norms"],
        options.direction, options.mode, options.seed,
    )  # fmt: skip
    if not unit_rows.any():
        raise InputError(f"{data.name}: masking changes no block output, so there is no direction")
    passport = write_passport(decoder, data, options, records, layers, recommended)
    return SteeringVector(unit_rows, reference, decoder.fingerprint, passport)


def _require_fit(pair: TokenPair, decoder: Decoder, k: int) -> None:
    where, config = pair.pair.where, decoder.text_config
    rows = decoder.model.get_input_embeddings().weight.shape[0]
    beyond = [
        token for token in (*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids) if token >= rows
    ]
    if beyond:
        raise InputError(
            f"{where}: token id {beyond[0]} is beyond the {rows} embeddings of model "
            f"'{decoder.name}'; its tokenizer belongs to another model"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and pair.length > context:
        raise InputError(
            f"{where}: prompt and response have {pair.length} tokens, model '{decoder.name}' "
            f"takes {context}"
        )
    if k > len(pair.prompt_ids):
        raise InputError(
            f"{where}: --k is {k}, but the prompt has only {len(pair.prompt_ids)} tokens "
            f"({sum(pair.eligible)} of them eligible)"
        )
