"""What a sweep judges steering by, read from files: pairs, controls and texts, as token ids.

Controls are JSON lines in TRL's form: `prompt` (text or chat messages) and `completion`. Texts are
the non-empty lines of a .txt file, or the `text` of JSON lines.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grains_vllm.vectors import SteeringVector
from offline.errors import InputError
from offline.pairs import Pair, PairSet, given_with, kind_of, row_picture, same_question, spoken
from offline.passport import example_prompts
from offline.prompts import encode, lay_out, takes_special, tokenise
from offline.scoring import Item, Suite
from offline.sources import read_rows
from offline.vision import image_prompt


@dataclass(frozen=True)
class Sources:
    """A suite and the facts that identify its data: name, sha256 and size per source, or None."""

    suite: Suite
    facts: dict[str, dict[str, Any] | None]


def load_suite(
    pairs: PairSet,
    tokenizer: Any,
    config: Any,
    controls: Path | None = None,
    texts: Path | None = None,
    chat: bool = False,
    processor: Any = None,
    *,
    allow_image_urls: bool = False,
) -> Sources:
    """Tokenises validation pairs, and reads controls and texts.

    Args:
        config: the text part of the model's config; says which ids and lengths fit.
        chat: make a control's string prompt one user message, as `load_pairs` does for pairs.
        processor: of a model that takes images.
        allow_image_urls: download images that controls name by http(s) addresses.

    Raises:
        InputError: naming file, line and field.
    """
    suite = Suite(
        [tokenise(pair, tokenizer, processor) for pair in pairs.pairs],
        []
        if controls is None
        else list(_controls(controls, tokenizer, chat, processor, allow_image_urls)),
        [] if texts is None else list(_texts(texts, tokenizer)),
    )
    for option, path, items in (
        ("--controls", controls, suite.controls),
        ("--text", texts, suite.texts),
    ):
        if path is not None and not items:
            raise InputError(f"{option} is '{path.name}', which holds nothing")
    wheres = [where for pair in pairs.pairs for where in (pair.where, pair.where)]
    wheres += [f"control {number}" for number in range(1, len(suite.controls) + 1)]
    wheres += [f"text {number}" for number in range(1, len(suite.texts) + 1)]
    for item, where in zip(suite.items, wheres, strict=True):
        _require_fit(item, config, where)
    validation = {"name": pairs.name, "sha256": pairs.sha256, "pairs": len(pairs.pairs)}
    facts: dict[str, dict[str, Any] | None] = {
        "validation": {**validation, "total": pairs.total},
        "controls": _facts(controls, suite.controls),
        "texts": _facts(texts, suite.texts),
    }
    return Sources(suite, facts)


def require_disjoint(pairs: PairSet, vectors: Mapping[str, SteeringVector]) -> list[str]:
    """Refuses validation pairs whose prompt is among a vector's calibration examples.

    Returns:
        Names of vectors that do not say what they were made from, so that nothing could be checked.
    """
    silent = []
    for name, vector in vectors.items():
        known = set(example_prompts(vector.passport))
        if not known:
            silent.append(name)
            continue
        both = [pair.id for pair in pairs.pairs if _fingerprints(pair) & known]
        if both:
            shown = ", ".join(both[:10]) + (", ..." if len(both) > 10 else "")
            raise InputError(
                f"{pairs.name}: {len(both)} of {len(pairs.pairs)} pairs have prompts from which "
                f"'{name}' was made (ids {shown}); judge it by others"
            )
    return silent


def _fingerprints(pair: Pair) -> set[str]:
    """The prompt's own, and those of the same question in other forms."""
    return {
        replace(pair, prompt=prompt).prompt_fingerprint for prompt in same_question(pair.prompt)
    }


def _controls(
    path: Path, tokenizer: Any, as_chat: bool, processor: Any, allow_urls: bool
) -> Iterator[Item]:
    for where, row in _rows(path, "--controls", (".jsonl",)):
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: found {kind_of(row)}, expected an object")
        for name in ("prompt", "completion"):
            if row.get(name) is None:
                raise InputError(f"{where}: '{name}' is missing, expected 'prompt', 'completion'")
        prompt, [completion] = spoken(row, ["completion"], where, as_chat)
        picture = row_picture(row, where, path.parent, allow_urls, ("prompt", "completion"))
        if picture is not None and processor is None:
            raise InputError(f"{where}: it has an image, but the model takes text alone")
        laid = lay_out(
            prompt, [completion], tokenizer, where, processor,
            show=picture is not None, given=given_with(prompt, row, where),
        )  # fmt: skip
        [response] = laid.responses
        if not response:
            raise InputError(f"{where}: 'completion' has no tokens")
        if picture is None:
            yield Item(tuple(laid.ids), tuple(response))
        else:
            image = image_prompt(processor, laid.text, picture, laid.special, where)
            yield Item(image.ids, tuple(response), image)


def _texts(path: Path, tokenizer: Any) -> Iterator[Item]:
    for where, row in _rows(path, "--text", (".txt", ".jsonl")):
        text = row.get("text") if isinstance(row, Mapping) else row
        if not isinstance(text, str):
            raise InputError(f"{where}: 'text' is {kind_of(text)}, expected text")
        ids, _ = encode(tokenizer, text, takes_special(tokenizer, text))
        if len(ids) < 2:
            raise InputError(f"{where}: a text of {len(ids)} tokens, expected 2 or more")
        yield Item(tuple(ids[:1]), tuple(ids[1:]))


def _rows(path: Path, option: str, suffixes: Sequence[str]) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{option} is '{path}', expected a {' or '.join(suffixes)} file")
    if not path.is_file():
        raise InputError(f"{option} is '{path}': no such file")
    if path.suffix.lower() == ".jsonl":
        yield from read_rows(str(path), "train")[2]
        return
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8 text ({error})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path.name}, line {number}", line.rstrip("\r")


def _facts(path: Path | None, items: Sequence[Item]) -> dict[str, Any] | None:
    if path is None:
        return None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"name": path.name, "sha256": digest, "items": len(items)}


def _require_fit(item: Item, config: Any, where: str) -> None:
    words = [
        token for token, image in zip(item.prompt_ids, item.image_tokens, strict=True) if not image
    ]
    ids = item.prompt_ids + item.response_ids
    largest = max((*words, *item.response_ids))
    if largest >= config.vocab_size:
        raise InputError(
            f"{where}: token id {largest} is beyond the model's vocabulary of "
            f"{config.vocab_size}; the tokenizer belongs to another model"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and len(ids) > context:
        raise InputError(f"{where}: {len(ids)} tokens, the model takes {context}")
