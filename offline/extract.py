"""From preference pairs to an artifact: the path of every pair, top to bottom."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grains_vllm.vectors import SteeringVector
from offline.batching import Room, out_of_memory
from offline.chat_text import chat_template
from offline.contrastive import contrastive_directions, random_directions
from offline.errors import InputError
from offline.groups import Group, Record, group_maker
from offline.kept_deltas import KeptDeltas
from offline.model import Decoder, check_leaf
from offline.objective import mixes_without_mask
from offline.options import ExtractOptions, Mask, Method, Tokens
from offline.pairs import PairSet
from offline.partial import PartialRun, differences, discard, from_bytes, to_bytes
from offline.passport import manifest, write_passport
from offline.prompts import TokenPair, takes_special, tokenise
from offline.team import Team

GROUP = 8  # examples that are computed together and kept together


def extract(
    decoder: Decoder,
    data: PairSet,
    options: ExtractOptions,
    out: Path | None = None,
    *,
    batch_rows: int | None = None,
    recompute: bool | None = None,
    team: Team | None = None,
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
        batch_rows, recompute: how much one forward holds, see offline.batching.Room; they change
            nothing but speed and memory.
        team: the processes that share the groups of examples; each of them calls this function
            with the same arguments and gets the same result, and the first one alone uses `out`.
            None: this one alone.
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
    team = team or Team()
    say = on_note if team.leads else lambda note: None  # what all of them find
    for note in data.notes:
        say(note)
    if isinstance(data.pairs[0].prompt, str) and chat_template(
        decoder.tokenizer, decoder.processor
    ):
        say("prompts are raw text although the model has a chat template; see --chat")
    if options.tokens is not Tokens.joint and all(pair.picture is None for pair in data.pairs):
        raise InputError(f"--tokens is {options.tokens}, but no prompt has an image")
    pairs = [tokenise(pair, decoder.tokenizer, decoder.processor) for pair in data.pairs]
    for pair in pairs:
        _require_fit(pair, decoder, options.most(pair.image is not None) if strict_k else 1)
    rendered = sum(
        isinstance(pair.prompt, str) and not takes_special(decoder.tokenizer, pair.prompt)
        for pair in data.pairs
    )
    if rendered:
        say(f"{rendered} prompts begin with the tokenizer's special tokens; it adds none to them")
    repeated = len(data.pairs) - len({pair.id for pair in data.pairs})
    if repeated:
        say(f"{repeated} examples have an id that another one has too")
    for example in {pair.image is None: pair for pair in pairs}.values():  # one of each kind
        if options.method is Method.grains or example.image is not None:
            check_leaf(decoder, example.prompt_ids, example.image)
    if options.mask is Mask.attention and mixes_without_mask(decoder):
        raise InputError(
            f"--mask {Mask.attention} hides tokens from attention, but model '{decoder.name}' has "
            "layers that carry them on in other ways; choose another --mask"
        )
    whose = f"process {team.rank}: " if team.size > 1 else ""
    room = Room(batch_rows, recompute, lambda note: on_note(whose + note))
    compute = group_maker(decoder, options, room, say)
    members = [pairs[start : start + GROUP] for start in range(0, len(pairs), GROUP)]
    facts = manifest(decoder, data, options)
    kept_groups = (
        nullcontext(None) if out is None or not team.leads else PartialRun(out, facts, restart)
    )
    try:
        with kept_groups as partial:
            groups = _groups(members, compute, facts, partial, team, on_examples)
            records = [record for _, found in groups for record in found]
            stacked = {
                name: torch.cat([tensors[name] for tensors, _ in groups]) for name in groups[0][0]
            }
            passport = write_passport(decoder, data, options, records)
            vector = _vector(decoder, options, stacked, records, passport, on_deltas)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise InputError(
            "the device has too little memory for one example; use shorter prompts, --recompute, "
            "--dtype bfloat16 or --device-map auto"
        ) from error
    two_rows = sum(not record.get("packed", True) for record in records)
    if two_rows:
        say(f"{two_rows} examples took two rows each: packing does not fit this model")
    if recommended is not None:
        vector = dataclasses.replace(
            vector, passport={**vector.passport, "recommended": dict(recommended)}
        )
    return vector, [{**record, "vector_digest": vector.digest} for record in records]


def finish(vector: SteeringVector, out: Path) -> None:
    """Saves the artifact, then removes the folder of finished groups."""
    vector.save(out)
    discard(out)


def _groups(
    members: Sequence[Sequence[TokenPair]],
    compute: Callable[[Sequence[TokenPair]], Group],
    facts: Mapping[str, Any],
    partial: PartialRun | None,
    team: Team,
    on_examples: Callable[[int], None],
) -> list[Group]:
    """All groups: the kept ones, and the others computed by the team, one each at a time.

    Args:
        partial: where finished groups are kept; None where nothing is, and in all processes but
            the first.
    """
    done: dict[int, Group] = {}
    for number in range(len(members)):
        group = partial.load(number) if partial else None
        if group is not None:
            done[number] = group
    first = json.loads(team.share(json.dumps([facts, sorted(done)]).encode())[0])
    _require_same(first[0], facts)
    for number in first[1]:
        (kept, *_) = team.share(to_bytes(*done[number]) if team.leads else b"")
        done[number] = from_bytes(kept)
        on_examples(len(members[number]))
    missing = [number for number in range(len(members)) if number not in done]
    for start in range(0, len(missing), team.size):
        turn = missing[start : start + team.size]
        mine = b""
        if team.rank < len(turn):
            mine = to_bytes(*compute(members[turn[team.rank]]))
        for number, computed in zip(turn, team.share(mine), strict=False):
            done[number] = from_bytes(computed)
            if partial:
                partial.save(number, *done[number])
            on_examples(len(members[number]))
    return [done[number] for number in range(len(members))]


def _require_same(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises InputError unless the first process and this one have the same task."""
    differing = differences(there, json.loads(json.dumps(here)))
    if differing:
        listed = "; ".join(f"{name} is {two!r} here, {one!r} there" for name, one, two in differing)
        raise InputError(f"not the same run as in process 0: {listed}")


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
    # An image token's own embedding is never looked up, so some models have none.
    words = [
        token for token, image in zip(pair.prompt_ids, pair.image_tokens, strict=True) if not image
    ]
    beyond = [token for token in (*words, *pair.chosen_ids, *pair.rejected_ids) if token >= rows]
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
