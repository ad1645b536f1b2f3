"""Preference pairs: what a row of data must hold, and what it means.

The words and conventions are TRL's: string prompts are raw text, message lists are chats.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grains_vllm.vectors import write_aside
from offline.errors import InputError
from offline.pictures import Picture, picture_of
from offline.sources import TRUTHFULQA, read_rows

Messages = list[dict[str, str]]
_NEEDED = "'prompt', 'chosen' and 'rejected'"


@dataclass(frozen=True)
class Pair:
    """One prompt with a preferred and a dispreferred response.

    Attributes:
        id: the data's own id, else the number of its line or row (from 1).
        where: file and line, for messages.
        prompt: raw text, or chat messages that await the model's chat template.
        chosen, rejected: the response texts.
        question: for raw text around which we put a template, the span [start, end) that is not
            template; None when all of it is the data's.
        picture: the image that the prompt is about; it stands before the text of a chat's first
            user message, and where raw text has the model's image token.
    """

    id: str
    where: str
    prompt: str | Messages
    chosen: str
    rejected: str
    question: tuple[int, int] | None = None
    picture: Picture | None = None

    @property
    def prompt_fingerprint(self) -> str:
        """sha256 (first 16 hex digits) of the prompt with its image, to find overlap with other
        data sets."""
        if self.picture is not None:
            return digest([self.prompt, self.picture.sha256])[:16]
        return digest(self.prompt)[:16]

    @property
    def fingerprint(self) -> str:
        """sha256 (first 16 hex digits) of prompt, image and both responses."""
        parts = [self.prompt, self.chosen, self.rejected]
        return digest(parts + ([self.picture.sha256] if self.picture is not None else []))[:16]


@dataclass(frozen=True)
class PairSet:
    """The pairs of one source, in its order, with the facts that identify the source.

    Attributes:
        drawn: facts about how these pairs were chosen and made from the source, JSON-able.
    """

    name: str
    sha256: str
    total: int
    pairs: list[Pair]
    drawn: Mapping[str, Any] = field(default_factory=dict)

    def swapped(self) -> "PairSet":
        """The same pairs with chosen and rejected exchanged: what steers the other way."""
        pairs = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in self.pairs]
        return replace(self, pairs=pairs, drawn={**self.drawn, "swapped": True})


def load_pairs(
    source: str,
    *,
    chat: bool = False,
    limit: int | None = None,
    seed: int = 0,
    split: str = "train",
    allow_image_urls: bool = False,
) -> PairSet:
    """Reads preference pairs.

    Args:
        source: a .jsonl, .csv or .parquet file, a folder written by `datasets`, or a hub id.
        chat: turn a string prompt into one user message.
        limit: draw this many pairs with `seed`; they keep the data's order.
        split: which split of a folder or hub data set.
        allow_image_urls: download images that the data names by http(s) addresses.

    Raises:
        InputError: naming file, line and field.
    """
    name, sha256, rows = read_rows(source, split)
    reader = _Reader(chat, image_folder(source), allow_image_urls)
    pairs = [reader.pair(row, where, number) for number, (where, row) in enumerate(rows, 1)]
    if not pairs:
        raise InputError(f"{name}: holds no preference pairs")
    total = len(pairs)
    if sha256 is None:
        sha256 = digest([pair.fingerprint for pair in pairs])
    if limit is not None and limit < total:
        kept = sorted(random.Random(seed).sample(range(total), limit))
        pairs = [pairs[index] for index in kept]
    return PairSet(name, sha256, total, pairs)


def image_folder(source: str) -> Path:
    """Where the relative image paths of a file or folder begin."""
    return Path(source).parent if Path(source).is_file() else Path(source)


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Writes JSON lines that `load_pairs` reads back: id, prompt, chosen, rejected, and image, a
    file in the folder `<name>.images` beside them."""
    lines = []
    for pair in pairs:
        row: dict[str, Any] = {
            name: getattr(pair, name) for name in ("id", "prompt", "chosen", "rejected")
        }
        if pair.picture is not None:
            name = f"{pair.picture.sha256[:16]}.{pair.picture.ending}"
            folder = path.with_name(f"{path.name.removesuffix('.jsonl')}.images")
            folder.mkdir(exist_ok=True)
            write_aside(folder / name, pair.picture.payload)
            row["image"] = f"{folder.name}/{name}"
        lines.append(json.dumps(row))
    write_aside(path, "".join(f"{line}\n" for line in lines).encode())


@dataclass(frozen=True)
class _Reader:
    """What rows are read with.

    Attributes:
        chat: turn a string prompt into one user message.
        folder: where relative image paths begin.
    """

    chat: bool
    folder: Path
    allow_urls: bool

    def pair(self, row: Any, where: str, number: int) -> Pair:
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: found {kind_of(row)}, expected an object with {_NEEDED}")
        if set(TRUTHFULQA) <= set(row):
            return _truthfulqa(row, where, number, self.chat)
        for name in ("chosen", "rejected"):
            if row.get(name) is None:
                raise InputError(f"{where}: '{name}' is missing, expected {_NEEDED}")
        prompt = prompt_of(row, where)
        chosen, rejected = (
            response_of(row, name, prompt, where) for name in ("chosen", "rejected")
        )
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise InputError(f"{where}: 'prompt' is empty, expected text or messages")
        if self.chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        pair = Pair(
            _id(row, where, number), where, prompt, chosen, rejected,
            picture=row_picture(row, where, self.folder, self.allow_urls),
        )  # fmt: skip
        return require_two_responses(pair, "chosen", "rejected")


def row_picture(
    row: Mapping[str, Any],
    where: str,
    folder: Path,
    allow_urls: bool,
    spoken: Iterable[str] = ("prompt", "chosen", "rejected"),
) -> Picture | None:
    """A row's one image, if it has one.

    Args:
        spoken: the fields that may hold messages.

    Raises:
        InputError: more than one, messages that show one that is not there, or see `picture_of`.
    """
    value, images = row.get("image"), row.get("images")
    if value is not None and images is not None:
        raise InputError(f"{where}: it has both 'image' and 'images', expected one of them")
    if images is not None:
        if not isinstance(images, list) or len(images) != 1:
            found = f"{len(images)} images" if isinstance(images, list) else kind_of(images)
            raise InputError(f"{where}: 'images' holds {found}, expected a list of one image")
        value = images[0]
    if value is None:
        if any(_has_image(row.get(name)) for name in spoken):
            raise InputError(f"{where}: its messages show an image, but 'image' is missing")
        return None
    return picture_of(value, where, folder, allow_urls=allow_urls)


def _truthfulqa(row: Mapping[str, Any], where: str, number: int, chat: bool) -> Pair:
    """The benchmark's question-and-answer form, or one user message."""
    for name in TRUTHFULQA:
        if row[name] is not None and not isinstance(row[name], str):
            raise InputError(f"{where}: '{name}' is {kind_of(row[name])}, expected text")
    question, best = ((row[name] or "").strip() for name in ("Question", "Best Answer"))
    # The first incorrect answer: one pair per question, as N counts questions.
    wrong = (row["Incorrect Answers"] or "").split(";")[0].strip()
    if not question:
        raise InputError(f"{where}: 'Question' is empty, expected text")
    if chat:
        messages = [{"role": "user", "content": question}]
        pair = Pair(_id(row, where, number), where, messages, best, wrong)
    else:
        span = (3, 3 + len(question))
        text = f"Q: {question}\nA:"
        pair = Pair(_id(row, where, number), where, text, f" {best}", f" {wrong}", span)
    return require_two_responses(pair, "Best Answer", "Incorrect Answers")


def require_two_responses(pair: Pair, chosen: str, rejected: str) -> Pair:
    """`pair`, unless a response is empty or both are the same.

    Args:
        chosen, rejected: what the data calls them, for the message.
    """
    for name, text in ((chosen, pair.chosen), (rejected, pair.rejected)):
        if not text.strip():
            raise InputError(f"{pair.where}: '{name}' is empty, expected text")
    if pair.chosen.strip() == pair.rejected.strip():
        raise InputError(
            f"{pair.where}: '{chosen}' and '{rejected}' are identical, expected two responses"
        )
    return pair


def same_question(prompt: str | Messages) -> list[str | Messages]:
    """The same question as text, as a chat, and in TruthfulQA's question-and-answer form."""
    if not isinstance(prompt, str):
        if len(prompt) != 1:
            return [prompt]
        text = prompt[0]["content"]
    else:
        text = prompt
    question = text.strip()
    if question.startswith("Q: ") and question.endswith("\nA:"):
        question = question[3:-3].strip()
    forms = dict.fromkeys([text, question, f"Q: {question}\nA:"])
    return [prompt, *forms, *([{"role": "user", "content": form}] for form in forms)]


def prompt_of(row: Mapping[str, Any], where: str) -> str | Messages:
    """A row's prompt: its own, a question about an image, or what its two conversations start
    with."""
    prompt = row.get("prompt")
    shows = row.get("image") is not None or row.get("images") is not None
    if prompt is None and shows and isinstance(row.get("question"), str):
        prompt = row["question"]
    if isinstance(prompt, str):
        return prompt
    if prompt is not None:
        return _messages(prompt, "prompt", where)
    if isinstance(row["chosen"], str):
        raise InputError(f"{where}: 'prompt' is missing, expected {_NEEDED}")
    # TRL's implicit prompt: what the two conversations have in common at their start.
    chosen, rejected = (_messages(row[name], name, where) for name in ("chosen", "rejected"))
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    return chosen[:common]


def response_of(row: Mapping[str, Any], name: str, prompt: str | Messages, where: str) -> str:
    """The response under `name`: text, or the one assistant message behind the prompt."""
    value = row[name]
    if isinstance(value, str):
        return value
    messages = _messages(value, name, where)
    if row.get("prompt") is None and not isinstance(prompt, str):
        messages = messages[len(prompt) :]
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise InputError(
            f"{where}: '{name}' holds the roles {roles} after the prompt, "
            "expected exactly one 'assistant' message"
        )
    if isinstance(prompt, str):
        raise InputError(f"{where}: '{name}' holds messages but 'prompt' is text, expected alike")
    return messages[0]["content"]


def _messages(value: Any, name: str, where: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: '{name}' is {kind_of(value)}, expected text or chat messages")
    first_user = True
    messages = []
    for index, message in enumerate(value):
        place = f"{name}[{index}]"
        if not isinstance(message, Mapping):
            raise InputError(
                f"{where}: '{place}' is {kind_of(message)}, expected an object with "
                "'role' and 'content'"
            )
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise InputError(f"{where}: '{place}.role' is {kind_of(role)}, expected text")
        may_show = role == "user" and first_user
        first_user = first_user and role != "user"
        if isinstance(content, list):
            content = _text_of(content, f"{place}.content", may_show, where)
        if not isinstance(content, str):
            raise InputError(f"{where}: '{place}.content' is {kind_of(content)}, expected text")
        messages.append({"role": role, "content": content})
    return messages


def _text_of(parts: list[Any], place: str, may_show: bool, where: str) -> str:
    """The text of a message that comes in parts; an image may come before it, and only in a
    conversation's first user message, where the pair's picture goes."""
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image" and any(part[key] is not None for key in part if key != "type"):
            raise InputError(
                f"{where}: '{place}[{index}]' names an image of its own; the row's 'image' is the "
                'place for it, beside {"type": "image"} alone'
            )
        elif kind != "image":
            raise InputError(
                f"{where}: '{place}[{index}]' is {kind_of(part)}, expected a part of type 'text' "
                "or 'image'"
            )
        elif index or not may_show:
            raise InputError(
                f"{where}: '{place}[{index}]' is an image; one image is known, before the text of "
                "the first user message"
            )
    return "".join(texts)


def _has_image(value: Any) -> bool:
    return isinstance(value, list) and any(
        isinstance(part, Mapping) and part.get("type") == "image"
        for message in value
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        for part in message["content"]
    )


def _id(row: Mapping[str, Any], where: str, number: int) -> str:
    value = row.get("id")
    if value is None:
        return str(number)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f"{where}: 'id' is {kind_of(value)}, expected text or a whole number")
    return str(value)


def kind_of(value: Any) -> str:
    """What a wrong value is, for messages."""
    if value is None:
        return "missing"
    shown = json.dumps(value, default=str)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def digest(value: str | Iterable[Any]) -> str:
    """sha256 (hex) of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
