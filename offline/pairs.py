"""Preference pairs: what a row of data must hold, and what it means.

The words and conventions are TRL's: string prompts are raw text, message lists are chats.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grains_vllm.vectors import write_aside
from offline.errors import InputError
from offline.pictures import Picture, picture_of
from offline.sources import TRUTHFULQA, read_rows

Messages = list[dict[str, Any]]
_NEEDED = "'prompt', 'chosen' and 'rejected'"
_PAIR = ("chosen", "rejected")
# What a chat template takes beside messages, each with its JSON type.
_GIVEN: dict[str, type] = {"tools": list, "documents": list, "chat_template_kwargs": dict}
_CALLS = {"tool_calls", "function_call"}  # a message that calls need not say anything
# Columns of other formats whose text a prompt should hold; what is not read would be dropped.
_PROMPT_LIKE = (
    "question", "query", "instruction", "input", "context", "history", "system", "system_prompt",
    "system_message", "functions", "chat_template", "audio", "audios", "video", "videos",
)  # fmt: skip


class NoPreference(InputError):
    """A row without two responses that differ."""


@dataclass(frozen=True)
class Pair:
    """One prompt with a preferred and a dispreferred response.

    Attributes:
        id: the data's own id, else the number of its line or row (from 1).
        where: file and line, for messages.
        prompt: raw text, or chat messages that await the model's chat template: `role`, `content`,
            and any other key that the template may know.
        chosen, rejected: the response texts.
        question: for raw text around which we put a template, the span [start, end) that is not
            template; None when all of it is the data's.
        picture: the image that the prompt is about; it stands before the text of a chat's first
            user message, and where raw text has the model's image token.
        given: what the chat template gets beside messages: `tools`, `documents`,
            `chat_template_kwargs`.
    """

    id: str
    where: str
    prompt: str | Messages
    chosen: str
    rejected: str
    question: tuple[int, int] | None = None
    picture: Picture | None = None
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt_fingerprint(self) -> str:
        """sha256 (first 16 hex digits) of the prompt with its image and what is given with it, to
        find overlap with other data sets."""
        return digest([self.prompt, *self._beside] if self._beside else self.prompt)[:16]

    @property
    def fingerprint(self) -> str:
        """sha256 (first 16 hex digits) of all that `prompt_fingerprint` covers, and both
        responses."""
        return digest([self.prompt, self.chosen, self.rejected, *self._beside])[:16]

    @property
    def _beside(self) -> list[Any]:
        shown = [] if self.picture is None else [self.picture.sha256]
        return [*shown, dict(self.given)] if self.given else shown


@dataclass(frozen=True)
class PairSet:
    """The pairs of one source, in its order, with the facts that identify the source.

    Attributes:
        drawn: facts about how these pairs were chosen and made from the source, JSON-able.
        notes: what a person should know about that, one line each.
    """

    name: str
    sha256: str
    total: int
    pairs: list[Pair]
    drawn: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
    strict: bool = True,
) -> PairSet:
    """Reads preference pairs.

    Args:
        source: a .jsonl, .csv or .parquet file, a folder written by `datasets`, or a hub id.
        chat: turn a string prompt into one user message.
        limit: draw this many pairs with `seed`; they keep the data's order. Rows without a
            preference are not drawn from, and what else is wrong with a row counts once it is
            drawn.
        split: which split of a folder or hub data set.
        allow_image_urls: download images that the data names by http(s) addresses.
        strict: refuse data in which a row has no preference, where no limit draws among the others.

    Raises:
        InputError: naming file, line and field.
    """
    name, sha256, rows = read_rows(source, split)
    reader = _Reader(chat, image_folder(source), allow_image_urls)
    found: list[Pair | InputError] = []
    undecided: list[NoPreference] = []
    for number, (where, row) in enumerate(rows, 1):
        try:
            found.append(reader.pair(row, where, number))
        except NoPreference as error:
            if strict and limit is None:
                raise
            undecided.append(error)
        except InputError as error:
            if limit is None:
                raise
            found.append(error)
    total = len(found)
    if undecided and total < (limit or 1):
        raise undecided[0]
    if not found:
        raise InputError(f"{name}: holds no preference pairs")
    if sha256 is None:
        sha256 = digest([one.fingerprint if isinstance(one, Pair) else str(one) for one in found])
    if limit is not None and limit < total:
        found = [found[n] for n in sorted(random.Random(seed).sample(range(total), limit))]
    pairs = [one for one in found if isinstance(one, Pair)]
    for one in found:
        if isinstance(one, InputError):
            raise one
    if not undecided:
        return PairSet(name, sha256, total, pairs)
    count = len(undecided)
    note = f"{count} of {total + count} rows are left out, such as {undecided[0]}"
    return PairSet(name, sha256, total, pairs, {"left_out": count}, (note,))


def image_folder(source: str) -> Path:
    """Where the relative image paths of a file or folder begin."""
    return Path(source).parent if Path(source).is_file() else Path(source)


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Writes JSON lines that `load_pairs` reads back: id, prompt, chosen, rejected, what is given
    with the prompt, and image, a file in the folder `<name>.images` beside them."""
    lines = []
    for pair in pairs:
        row: dict[str, Any] = {
            name: getattr(pair, name) for name in ("id", "prompt", "chosen", "rejected")
        } | dict(pair.given)
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
        for name in _PAIR:
            if row.get(name) is None:
                raise InputError(f"{where}: '{name}' is missing, expected {_NEEDED}")
        prompt, (chosen, rejected) = spoken(row, _PAIR, where, self.chat)
        pair = Pair(
            _id(row, where, number), where, prompt, chosen, rejected,
            picture=row_picture(row, where, self.folder, self.allow_urls),
            given=given_with(prompt, row, where),
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
    if images is not None and images != []:
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

    Raises:
        NoPreference: they are not two.
    """
    for name, text in ((chosen, pair.chosen), (rejected, pair.rejected)):
        if not text.strip():
            raise NoPreference(f"{pair.where}: '{name}' is empty, expected text")
    if pair.chosen.strip() == pair.rejected.strip():
        raise NoPreference(
            f"{pair.where}: '{chosen}' and '{rejected}' are identical, expected two responses"
        )
    return pair


def same_question(prompt: str | Messages) -> list[str | Messages]:
    """The same question as text, as a chat, and in TruthfulQA's question-and-answer form."""
    if not isinstance(prompt, str):
        if len(prompt) != 1:
            return [prompt]
        text = text_of(prompt[0])
    else:
        text = prompt
    question = text.strip()
    if question.startswith("Q: ") and question.endswith("\nA:"):
        question = question[3:-3].strip()
    forms = dict.fromkeys([text, question, f"Q: {question}\nA:"])
    return [prompt, *forms, *([{"role": "user", "content": form}] for form in forms)]


def spoken(
    row: Mapping[str, Any], names: Sequence[str], where: str, chat: bool = False
) -> tuple[str | Messages, list[str]]:
    """A row's prompt, and the responses under `names`: texts, or the one assistant message behind
    the prompt.

    The prompt is the row's own, a question about an image, or what the responses begin with (TRL's
    implicit prompt): whole messages, or text up to the start of the word in which they differ.

    Args:
        chat: turn a string prompt into one user message.

    Raises:
        InputError: naming the field; there is none, or a column holds more of the prompt.
    """
    values = [
        row[name] if isinstance(row[name], str) else _messages(row[name], name, where)
        for name in names
    ]
    prompt = _own_prompt(row, where)
    chats = not any(isinstance(value, str) for value in values)
    if prompt is None or (isinstance(prompt, str) and chats and len(values) > 1):
        start = _common_start(values)
        if isinstance(prompt, str) and start:
            _require_within(prompt, "prompt", start, where)
        if start or (prompt is None and chats):
            prompt, values = start, [value[len(start) :] for value in values]
    if prompt is None:
        raise InputError(
            f"{where}: 'prompt' is missing, and {' and '.join(names)} do not begin alike; expected "
            f"{_NEEDED}"
        )
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise InputError(f"{where}: 'prompt' is empty, expected text or messages")
    for name, value in row.items():
        if str(name).lower() in _PROMPT_LIKE:
            _require_within(value, str(name), prompt, where)
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return prompt, [
        _response(value, name, prompt, where) for name, value in zip(names, values, strict=True)
    ]


def given_with(prompt: str | Messages, row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a row gives the chat template beside messages: see `Pair.given`.

    Raises:
        InputError: of another type (JSON text will do), or the prompt is no chat.
    """
    given = {}
    for name, kind in _GIVEN.items():
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: '{name}' is no valid JSON ({error})") from error
        if _says_nothing(value):
            continue
        objects = value if kind is list and isinstance(value, list) else []
        if not isinstance(value, kind) or any(not isinstance(one, dict) for one in objects):
            expected = "a list of objects" if kind is list else "an object"
            raise InputError(f"{where}: '{name}' is {kind_of(value)}, expected {expected}")
        if isinstance(prompt, str):
            raise InputError(
                f"{where}: it has '{name}', which only a chat template can show, but its prompt is "
                "text; make it messages, or a message with --chat"
            )
        given[name] = _json(value, name, where)
    return given


def _own_prompt(row: Mapping[str, Any], where: str) -> str | Messages | None:
    prompt = row.get("prompt")
    shows = any(not _says_nothing(row.get(name)) for name in ("image", "images"))
    if prompt is None and shows and isinstance(row.get("question"), str):
        prompt = row["question"]
    if prompt is None or isinstance(prompt, str):
        return prompt
    return _messages(prompt, "prompt", where)


def _common_start(values: list[Any]) -> Any:
    """What two texts or two conversations begin with, leaving something of each; of values that
    are not alike, nothing."""
    one, two = values[0], values[-1]
    if isinstance(one, str) is not isinstance(two, str):
        return ""
    end = same_until(one, two)
    if not isinstance(one, str):
        return one[: min(end, len(one) - 1, len(two) - 1)]

    def splits_a_word() -> bool:
        return one[end - 1].isalnum() and any(text[end : end + 1].isalnum() for text in (one, two))

    # TRL cuts within words, where a prompt's last token would be another one than in the text.
    while end and (splits_a_word() or not (one[end:].strip() and two[end:].strip())):
        end -= 1
    # As in TRL, a space belongs to the word behind it.
    return one[: end - 1] if one[end - 1 : end] == " " else one[:end]


def same_until(one: Sequence[Any], two: Sequence[Any]) -> int:
    """How many items two sequences have in common at their start."""
    differ = (index for index, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    return next(differ, min(len(one), len(two)))


def _require_within(value: Any, name: str, prompt: str | Messages, where: str) -> None:
    """Refuses a column that says more than the prompt does."""
    texts = [prompt] if isinstance(prompt, str) else [text_of(message) for message in prompt]
    within = isinstance(value, str) and any(value.strip() in text for text in texts)
    if not within and not _says_nothing(value):
        raise InputError(
            f"{where}: '{name}' is {kind_of(value)}, which is no part of the prompt and would be "
            "dropped; put it into the messages of 'prompt', or leave it out"
        )


def text_of(message: Mapping[str, Any]) -> str:
    """A message's content; "" where it has none, as beside tool calls."""
    return message.get("content") or ""


def _response(value: Any, name: str, prompt: str | Messages, where: str) -> str:
    if isinstance(value, str):
        return value
    if len(value) != 1 or value[0]["role"] != "assistant":
        roles = [message["role"] for message in value]
        raise InputError(
            f"{where}: '{name}' holds the roles {roles} after the prompt, "
            "expected exactly one 'assistant' message"
        )
    more = sorted(value[0].keys() - {"role", "content"})
    if more:
        raise InputError(
            f"{where}: '{name}' has an answer with '{more[0]}'; an answer is its 'content' alone"
        )
    if isinstance(prompt, str):
        raise InputError(f"{where}: '{name}' holds messages but 'prompt' is text, expected alike")
    return value[0]["content"]


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
        more = {
            key: _json(part, f"{place}.{key}", where)
            for key, part in message.items()
            if key not in ("role", "content") and not _says_nothing(part)
        }
        if isinstance(content, list):
            content = _joined(content, f"{place}.content", may_show, where)
        if not isinstance(content, str) and (content is not None or not _CALLS & more.keys()):
            raise InputError(f"{where}: '{place}.content' is {kind_of(content)}, expected text")
        said = {"content": content} if "content" in message else {}
        messages.append({"role": role, **said, **more})
    return messages


def _joined(parts: list[Any], place: str, may_show: bool, where: str) -> str:
    """The text of a message that comes in parts; an image may come before it, and only in a
    conversation's first user message, where the pair's picture goes."""
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            more = [key for key in _named(part) if key != "text"]
            if more:
                raise InputError(
                    f"{where}: '{place}[{index}]' is text with '{more[0]}', expected 'text' alone"
                )
        elif kind == "image" and (_named(part) or part.get("index") not in (None, 0)):
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


def _named(part: Mapping[str, Any]) -> list[str]:
    """The keys of a message's part that say something, but for its type and its place."""
    return [key for key in part if key not in ("type", "index") and not _says_nothing(part[key])]


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


def _says_nothing(value: Any) -> bool:
    """Whether a value stands for an absent one: tables have a cell for every key."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _json(value: Any, name: str, where: str) -> Any:
    """`value`, which must be JSON-able: it goes into templates, fingerprints and files."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: '{name}' is {kind_of(value)}, expected JSON") from error
    return value


def kind_of(value: Any) -> str:
    """What a wrong value is, for messages."""
    if value is None:
        return "missing"
    shown = json.dumps(value, default=str)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def digest(value: str | Iterable[Any]) -> str:
    """sha256 (hex) of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
