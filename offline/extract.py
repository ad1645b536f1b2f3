"""From preference pairs to an artifact: the path of every pair, top to bottom."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grains_vllm.vectors import SteeringVector
from offline.contrastive import contrastive_directions, random_directions
from offline.errors import InputError
from offline.groups import Record, group_maker
from offline.kept_deltas import KeptDeltas
from offline.model import Decoder, check_leaf
from offline.options import ExtractOptions, Method
from offline.pairs import PairSet
from offline.partial import PartialRun, discard
from offline.passport import manifest, write_passport
from offline.prompts import TokenPair, tokenise

GROUP = 8  # examples that are computed together and kept together


def extract(
    decoder: Decoder,
    data: PairSet,
    options: ExtractOptions,
    out: Path | None = None,
    *,
    batch_rows: int = 8,
    restart: bool = False,
    recommended: Mapping[str, Any] | None = None,
    strict_k: bool = False,
    on_examples: Callable[[int], None] = lambda count: None,
    on_note: Callable[[str], None] = lambda note: None,
    on_deltas: Callable[[KeptDeltas], None] = lambda kept: None,
) -> tuple[SteeringVector, list[Record]]:
    """Computes the steering vector of `data` with the method of `options`; the caller saves it.

    Args:
        out: where the artifact will be; finished groups are kept in the folder `<out>.partial`.
            None keeps nothing on disk.
        batch_rows: rows per forward; changes nothing but speed and memory.
        restart: discard what an interrupted run left.
        recommended: the passport's `recommended`, if somebody knows one.
        strict_k: refuse prompts with fewer tokens than k; otherwise they just give fewer.
        on_examples: told how many more examples are finished.
        on_note: told in one line what a person should know about the run.
        on_deltas: given the deltas behind the vector; method grains only.

    Returns:
        The vector, and per example a record; with method grains it holds tokens, scores, selected
        positions and the vector's digest.

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
    compute = group_maker(decoder, options, batch_rows, on_note)
    kept_groups = (
        nullcontext(None)
        if out is None
        else PartialRun(out, manifest(decoder, data, options), restart)
    )
    try:
        with kept_groups as partial:
            tensors, records = [], []
            for number, start in enumerate(range(0, len(pairs), GROUP)):
                members = pairs[start : start + GROUP]
                group = partial.load(number) if partial else None
                if group is None:
                    group = compute(members)
                    if partial:
                        partial.save(number, *group)
                tensors.append(group[0])
                records += group[1]
                on_examples(len(members))
            stacked = {name: torch.cat([group[name] for group in tensors]) for name in tensors[0]}
            passport = write_passport(decoder, data, options, records)
            vector = _vector(decoder, options, stacked, records, passport, on_deltas)
    except torch.OutOfMemoryError as error:
        raise InputError(
            "the device has too little memory for one example; use shorter prompts, "
            "--dtype bfloat16 or --device-map auto"
        ) from error
    two_rows = sum(not record.get("packed", True) for record in records)
    if two_rows:
        on_note(f"{two_rows} examples took two rows each: packing does not fit this model")
    if recommended is not None:
        vector = dataclasses.replace(
            vector, passport={**vector.passport, "recommended": dict(recommended)}
        )
    return vector, [{**record, "vector_digest": vector.digest} for record in records]


def finish(vector: SteeringVector, out: Path) -> None:
    """Saves the artifact, then removes the folder of finished groups."""
    vector.save(out)
    discard(out)


def _vector(
    decoder: Decoder,
    options: ExtractOptions,
    tensors: dict[str, Tensor],
    records: Sequence[Record],
    passport: dict[str, Any],
    on_deltas: Callable[[KeptDeltas], None],
) -> SteeringVector:
    if options.method is Method.grains:
        with_plus = [index for index, record in enumerate(records) if record["positive"]]
        kept = KeptDeltas(
            tensors["positive"],
            tensors["negative"],
            tensors["norms"],
            examples=torch.tensor(with_plus, dtype=torch.int64),
            has_negative=torch.tensor(
                [bool(records[index]["negative"]) for index in with_plus], dtype=torch.bool
            ),
            model=decoder.fingerprint,
            passport=passport,
        )
        vector = kept.vector(options.direction, options.mode)
        on_deltas(dataclasses.replace(kept, vector_digest=vector.digest))
        return vector
    norms = tensors["norms"].flatten(0, 1)
    if options.method is Method.random:
        made = random_directions(norms, decoder.fingerprint.hidden_size, options.seed)
    else:
        made = contrastive_directions(
            tensors["positive"], tensors["negative"], norms, options.method, options.seed
        )
    rows, reference, layers = made
    if not rows.any():
        raise InputError(
            f"{passport['data']['name']}: chosen and rejected responses have the same block "
            f"outputs at {options.read_at}, so there is no direction"
        )
    passport["layers"] = [dataclasses.asdict(layer) for layer in layers]
    return SteeringVector(rows, reference, decoder.fingerprint, passport)


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
