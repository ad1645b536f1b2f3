"""Chats as text: what a model's chat template makes of messages, and where each content stands.

Nothing is guessed from patterns: templates are rendered, with contents and with sentinels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from offline.errors import InputError
from offline.pairs import Messages

Span = tuple[int, int]


@dataclass(frozen=True)
class ChatText:
    """A rendered chat that awaits its answer.

    Attributes:
        contents: the span [start, end) of each message's content in the text.
        answered: the same chat with an answer behind it.
    """

    text: str
    contents: list[Span]
    answered: Callable[[str], str] = field(repr=False)

    def lead(self, response: str) -> str:
        """The white space that the template puts between this text and an answer: " " where a
        prompt ends with `ASSISTANT:` and an answered one goes on `ASSISTANT: Yes`; mostly none."""
        if response[:1].isspace():
            return ""
        try:
            whole = self.answered(response)
        except InputError:  # a template that takes no answers
            return ""
        rest = whole[len(self.text) :] if whole.startswith(self.text) else ""
        lead = rest[: max(rest.find(response.strip()), 0)]
        return lead if not lead.strip() else ""


def render(
    messages: Messages, tokenizer: Any, where: str, processor: Any = None, *, show: bool = False
) -> ChatText:
    """The chat template's text for `messages`.

    Args:
        processor: of a model that takes images; its chat template comes before the tokenizer's.
        show: put an image before the text of the first user message.

    Raises:
        InputError: there is no template, it refuses the messages or takes no image, or contents
            cannot be found in its text.
    """
    template = chat_template(tokenizer, processor)
    if not template:
        raise InputError(
            f"{where}: 'prompt' holds chat messages, but the model's tokenizer has no chat template"
        )
    in_parts = processor is not None and _takes_parts(tokenizer, template)
    if show and not in_parts:
        raise InputError(f"{where}: it has an image, but the model's chat template takes none")

    def apply(contents: Sequence[str], answer: str | None = None) -> str:
        turns: list[dict[str, Any]] = [
            {**message, "content": content}
            for message, content in zip(messages, contents, strict=True)
        ]
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        if in_parts:
            for turn in turns:
                turn["content"] = [{"type": "text", "text": turn["content"]}]
        if show:
            first = next((turn for turn in turns if turn["role"] == "user"), None)
            if first is None:
                raise InputError(f"{where}: it has an image, but no message of role 'user'")
            first["content"].insert(0, {"type": "image"})
        return _apply(tokenizer, turns, where, template, awaiting=answer is None)

    contents = [message["content"] for message in messages]
    text = apply(contents)
    sentinels = [f"zq{index}content{index}qz" for index in range(len(messages))]
    skeleton = apply(sentinels)
    # Many templates strip contents, so the stripped ones are tried as well.
    for candidate in (contents, [content.strip() for content in contents]):
        spans = _splice(skeleton, sentinels, candidate, text)
        if spans is not None:
            break
    else:
        spans = _search(text, contents, where)
    return ChatText(text, spans, lambda answer: apply(contents, answer))


def chat_template(tokenizer: Any, processor: Any = None) -> str | None:
    """The model's chat template, if it has one."""
    own = getattr(processor, "chat_template", None)
    return own or getattr(tokenizer, "chat_template", None)


def _takes_parts(tokenizer: Any, template: Any) -> bool:
    """Whether a template reads contents that are lists of typed parts, as those with images are."""
    message = {"role": "user", "content": [{"type": "text", "text": "zqpartqz"}]}
    try:
        text = _apply(tokenizer, [message], "", template, awaiting=True)
    except InputError:
        return False
    return "zqpartqz" in text and "'text'" not in text


def _apply(
    tokenizer: Any, messages: Sequence[Any], where: str, template: Any, *, awaiting: bool
) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=awaiting
        )
    except Exception as error:  # templates raise whatever jinja or their own checks raise
        roles = [message["role"] for message in messages]
        raise InputError(
            f"{where}: the chat template refuses these messages (roles {roles}): {error}"
        ) from error


def _splice(
    skeleton: str, sentinels: Sequence[str], contents: Sequence[str], expected: str
) -> list[Span] | None:
    """Spans of `contents` in `expected`, if putting them for the sentinels gives `expected`."""
    if any(skeleton.count(sentinel) != 1 for sentinel in sentinels):
        return None
    spliced, spans, done = "", [], 0
    for sentinel, content in zip(sentinels, contents, strict=True):
        at = skeleton.index(sentinel)
        if at < done:
            return None
        spliced += skeleton[done:at]
        spans.append((len(spliced), len(spliced) + len(content)))
        spliced, done = spliced + content, at + len(sentinel)
    return spans if spliced + skeleton[done:] == expected else None


def _search(text: str, contents: Sequence[str], where: str) -> list[Span]:
    spans: list[Span] = []
    done = 0
    for index, content in enumerate(contents):
        at = text.find(content.strip(), done)
        if at < 0:
            raise InputError(
                f"{where}: the content of message {index} does not appear in the prompt that the "
                "chat template renders, so template and content cannot be told apart"
            )
        done = at + len(content.strip())
        spans.append((at, done))
    return spans
