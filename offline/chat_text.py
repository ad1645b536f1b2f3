"""Chats as text: what a model's chat template makes of messages, and where each content stands.

Nothing is guessed from patterns: templates are rendered, with contents and with sentinels.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from offline.errors import InputError
from offline.pairs import Messages, same_until, text_of

Span = tuple[int, int]
_NOTHING: Mapping[str, Any] = {}
_ANSWER = "zqanswerqz"
# Thoughts that a template knows it may leave out of the history, as servers then do too.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# What only says to which call a tool's result belongs; most templates go by the order.
_LABELS = ("name", "tool_call_id")


@dataclass(frozen=True)
class ChatText:
    """A rendered chat that awaits its answer.

    Attributes:
        contents: the spans [start, end) of the messages' contents in the text.
        answered: the same chat with an answer behind it.
    """

    text: str
    contents: list[Span]
    answered: Callable[[str], str] = field(repr=False)

    def lead(self, response: str) -> str:
        """What the template puts between this text and an answer: " " where a prompt ends with
        `ASSISTANT:` and an answered one goes on `ASSISTANT: Yes`, or thoughts that are empty;
        mostly nothing."""
        try:
            closing = self.answered(_ANSWER).rpartition(_ANSWER)[2]
            whole = self.answered(response)
        except InputError:  # a template that takes no answers
            return ""
        if not whole.startswith(self.text):
            return ""
        rest = whole[len(self.text) :].removesuffix(closing)
        found = next((x for x in (response, response.strip()) if rest.endswith(x)), rest)
        lead = rest.removesuffix(found)
        # White space may be the response's own.
        return lead if lead.strip() or not response[:1].isspace() else ""

    def before(self, responses: Sequence[str]) -> tuple[str, list[str]]:
        """What the template writes before any of these answers, as thoughts that are empty; and
        the answers as they stand behind it.

        A space, and what is written before some of the answers only, is part of the answers.
        """
        leads = [self.lead(response) for response in responses]
        shared = leads[0].rstrip(" ") if len(set(leads)) == 1 else ""
        if not shared.strip():
            shared = ""
        return shared, [
            lead.removeprefix(shared) + response
            for lead, response in zip(leads, responses, strict=True)
        ]


@dataclass(frozen=True)
class _Template:
    """A chat template with all that a prompt gives it but its messages.

    Attributes:
        source: Jinja.
        parts: whether it reads contents that are lists of typed parts.
        show: whether an image stands before the text of the first user message.
        given: keyword arguments, `tools` and `documents` among them.
    """

    tokenizer: Any
    source: str
    where: str
    parts: bool = False
    show: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)

    def write(
        self, messages: Messages, *, answered: bool = False, without: str | None = None
    ) -> str:
        """The text for `messages`, which awaits an answer, or the end of its last one.

        Args:
            answered: the last message is the answer, and complete.
            without: the name in `given` that is left out.
        """
        turns = [dict(message) for message in messages]
        for turn in turns if self.parts else ():
            if isinstance(turn.get("content"), str):
                turn["content"] = [{"type": "text", "text": turn["content"]}]
        if self.show:
            first = next((turn for turn in turns if turn["role"] == "user"), None)
            if first is None:
                raise InputError(f"{self.where}: it has an image, but no message of role 'user'")
            first["content"].insert(0, {"type": "image"})
        goes_on = not answered and continues(messages)
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.source, tokenize=False,
                add_generation_prompt=not answered and not goes_on, continue_final_message=goes_on,
                **{name: value for name, value in self.given.items() if name != without},
            )  # fmt: skip
        except Exception as error:  # templates raise whatever jinja or their own checks raise
            roles = [message["role"] for message in messages]
            raise InputError(
                f"{self.where}: the chat template refuses these messages (roles {roles}): {error}"
            ) from error


def continues(messages: Messages) -> bool:
    """Whether an answer goes on where the last message ends, as in TRL."""
    return messages[-1]["role"] == "assistant"


def render(
    messages: Messages,
    tokenizer: Any,
    where: str,
    processor: Any = None,
    *,
    show: bool = False,
    given: Mapping[str, Any] = _NOTHING,
) -> ChatText:
    """The chat template's text for `messages`.

    Args:
        processor: of a model that takes images; its chat template comes before the tokenizer's.
        show: put an image before the text of the first user message.
        given: see `Pair.given`.

    Raises:
        InputError: there is no template, it refuses the messages or takes no image, it shows
            nothing of a content, a key or what is given, or contents cannot be found in its text.
    """
    source = chat_template(tokenizer, processor, "tools" in given)
    if not source:
        raise InputError(
            f"{where}: 'prompt' holds chat messages, but the model's tokenizer has no chat template"
        )
    parts = processor is not None and _takes_parts(tokenizer, source)
    if show and not parts:
        raise InputError(f"{where}: it has an image, but the model's chat template takes none")
    template = _Template(tokenizer, source, where, parts, show, _keywords(given, tokenizer, where))
    text = template.write(messages)
    _require_shown(template, messages, text)

    def answered(answer: str) -> str:
        *earlier, last = messages
        if continues(messages):
            turns = [*earlier, {**last, "content": text_of(last) + answer}]
        else:
            turns = [*messages, {"role": "assistant", "content": answer}]
        return template.write(turns, answered=True)

    return ChatText(text, _contents(template, messages, text), answered)


def chat_template(tokenizer: Any, processor: Any = None, tools: bool = False) -> str | None:
    """The model's chat template, if it has one.

    Args:
        tools: the one for prompts with tools, where the model has several, as in transformers.
    """
    own = getattr(processor, "chat_template", None)
    found = own or getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        return (found.get("tool_use") if tools else None) or found.get("default")
    return found


def _takes_parts(tokenizer: Any, source: str) -> bool:
    """Whether a template reads contents that are lists of typed parts, as those with images are."""
    message = {"role": "user", "content": "zqpartqz"}
    try:
        text = _Template(tokenizer, source, "", parts=True).write([message])
    except InputError:
        return False
    return "zqpartqz" in text and "'text'" not in text


def _keywords(given: Mapping[str, Any], tokenizer: Any, where: str) -> dict[str, Any]:
    """Keyword arguments of `apply_chat_template`."""
    variables = given.get("chat_template_kwargs", {})
    decided = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
    ours = sorted(decided & variables.keys())
    if ours:
        raise InputError(
            f"{where}: 'chat_template_kwargs' holds '{ours[0]}', which is no variable of a "
            "template; it follows from the rest of the row, or is not to be chosen"
        )
    return {name: given[name] for name in ("tools", "documents") if name in given} | variables


def _require_shown(template: _Template, messages: Messages, text: str) -> None:
    """Refuses what the template silently drops."""

    def changes(turns: Messages, without: str | None = None) -> bool:
        try:
            return template.write(turns, without=without) != text
        except InputError:
            return True

    for name in template.given:
        is_known = name not in ("tools", "documents") and _names(template, name)
        if not is_known and not changes(messages, name):
            raise InputError(f"{template.where}: the chat template shows nothing of '{name}'")
    for index, message in enumerate(messages):
        for key in message.keys() - {"role", "content"}:
            fewer = {name: value for name, value in message.items() if name != key}
            is_known = (key in _THOUGHTS and _names(template, key)) or (
                key in _LABELS and message["role"] in ("tool", "function")
            )
            if not is_known and not changes([*messages[:index], fewer, *messages[index + 1 :]]):
                raise InputError(
                    f"{template.where}: the chat template shows nothing of '{key}' in message "
                    f"{index} (role '{message['role']}')"
                )


def _names(template: _Template, variable: str) -> bool:
    return re.search(rf"\b{re.escape(variable)}\b", template.source) is not None


def _contents(template: _Template, messages: Messages, text: str) -> list[Span]:
    """The spans of the messages' contents, or of what the template leaves of them."""
    contents = {index: text_of(m) for index, m in enumerate(messages) if text_of(m).strip()}
    marks = {index: f"zq{index}content{index}qz" for index in contents}

    def put(texts: Mapping[int, str]) -> Messages:
        return [
            {**message, "content": texts[index]} if index in texts else message
            for index, message in enumerate(messages)
        ]

    try:
        skeleton = template.write(put(marks))
        # Many templates strip contents; others leave thoughts out, which takes more renderings.
        for pieces in (contents, {index: content.strip() for index, content in contents.items()}):
            spans = _splice(skeleton, marks, pieces, text)
            if spans is not None:
                return spans
        left = {
            index: _left(skeleton, marks[index], template.write(put({**marks, index: content})))
            for index, content in contents.items()
        }
        if all(piece is not None and _is_of(piece, contents[i]) for i, piece in left.items()):
            spans = _splice(skeleton, marks, {i: str(piece) for i, piece in left.items()}, text)
            if spans is not None:
                return spans
    except InputError:  # a template that takes no sentinels
        pass
    return _search(template, contents, text, lambda index: put({index: marks[index]}))


def _splice(
    skeleton: str, marks: Mapping[int, str], pieces: Mapping[int, str], expected: str
) -> list[Span] | None:
    """Spans of `pieces` in `expected`, if putting them for all marks gives `expected`."""
    if not all(mark in skeleton for mark in marks.values()):
        return None
    by_mark = {mark: pieces[index] for index, mark in marks.items()}
    spliced, spans, done = "", [], 0
    for found in re.finditer("|".join(marks.values()) or "(?!)", skeleton):
        spliced += skeleton[done : found.start()]
        piece = by_mark[found[0]]
        spans.append((len(spliced), len(spliced) + len(piece)))
        spliced, done = spliced + piece, found.end()
    return spans if spliced + skeleton[done:] == expected else None


def _left(skeleton: str, mark: str, rendered: str) -> str | None:
    """What stands in `rendered` where `skeleton` has the mark; None where more is different."""
    count = skeleton.count(mark)
    if not count:
        return None
    length, odd = divmod(len(rendered) - len(skeleton), count)
    length += len(mark)
    start = skeleton.index(mark)
    piece = rendered[start : start + max(length, 0)]
    return piece if not odd and skeleton.replace(mark, piece) == rendered else None


def _is_of(piece: str, content: str) -> bool:
    """Whether a piece is what a content leaves when at most one passage is taken out."""
    piece, content = piece.strip(), content.strip()
    kept = same_until(piece, content) + same_until(piece[::-1], content[::-1])
    return piece in content or kept >= len(piece)


def _search(
    template: _Template,
    contents: Mapping[int, str],
    text: str,
    without: Callable[[int], Messages],
) -> list[Span]:
    """The contents in their order, where the template's own text depends on them."""
    spans: list[Span] = []
    done = 0
    for index, content in contents.items():
        at = text.find(content.strip(), done)
        if at < 0 or _is_dropped(template, without(index), text):
            raise InputError(
                f"{template.where}: the content of message {index} does not appear in the prompt "
                "that the chat template renders, so template and content cannot be told apart"
            )
        done = at + len(content.strip())
        spans.append((at, done))
    return spans


def _is_dropped(template: _Template, others: Messages, text: str) -> bool:
    try:
        return template.write(others) == text
    except InputError:
        return False
