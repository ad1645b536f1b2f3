"""From a pair to token ids, and which prompt tokens may be selected.

Template and special tokens (BOS, chat markup, the "Q:" and "A:" around a question) get scores but
are never eligible. What is template is decided by rendering, not by patterns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offline.chat_text import Span, render
from offline.errors import InputError
from offline.pairs import Messages, Pair
from offline.vision import ImagePrompt, image_prompt, sources


@dataclass(frozen=True)
class TokenPair:
    """A pair as the model sees it.

    Attributes:
        pair: where it came from.
        prompt_ids: T token ids, special and template tokens included, up to where an answer begins.
        chosen_ids, rejected_ids: the response tokens, without the prompt.
        tokens: the T prompt tokens as text, for people.
        eligible: T flags; True where the token belongs to a message's content or holds an image
            feature.
        image: the prompt as the processor laid it out, if it has an image.
        lead: how many of the last prompt tokens a template writes only once there is an answer.
    """

    pair: Pair
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    tokens: list[str]
    eligible: list[bool]
    image: ImagePrompt | None = None
    lead: int = 0

    @property
    def image_tokens(self) -> list[bool]:
        """T flags; True where an image feature stands."""
        return list(self.image.image_tokens) if self.image else [False] * len(self.prompt_ids)

    @property
    def asked_ids(self) -> list[int]:
        """The prompt as it awaits an answer that is yet to be made."""
        return self.prompt_ids[: len(self.prompt_ids) - self.lead]

    @property
    def length(self) -> int:
        """Tokens of the prompt with the longer response."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def tokenise(pair: Pair, tokenizer: Any, processor: Any = None) -> TokenPair:
    """Tokenises prompt and responses with a fast tokenizer.

    A response's ids are what joint tokenisation of prompt + response adds to the prompt's ids;
    where joining changes the prompt's own tokens, the response is tokenised alone.

    Args:
        processor: of a model that takes images.

    Raises:
        InputError: the template refuses the messages, contents cannot be found in the rendered
            prompt, a response has no tokens, or a prompt has an image and there is no processor.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"the tokenizer {type(tokenizer).__name__} is not a fast one, which is needed to know "
            "which prompt characters a token covers"
        )
    if pair.picture is not None and processor is None:
        raise InputError(f"{pair.where}: it has an image, but the model takes text alone")
    laid = lay_out(
        pair.prompt, [pair.chosen, pair.rejected], tokenizer, pair.where, processor,
        show=pair.picture is not None, given=pair.given,
    )  # fmt: skip
    contents = laid.contents if pair.question is None else [pair.question]
    ids = laid.ids
    special = set(tokenizer.all_special_ids)
    if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        special.discard(tokenizer.unk_token_id)  # an unknown word is content
    eligible = [
        token not in special and any(_overlap(span, content) for content in contents)
        for token, span in zip(ids, laid.offsets, strict=True)
    ]
    image = None
    prompt_ids = ids
    if pair.picture is not None:
        image = image_prompt(processor, laid.text, pair.picture, laid.special, pair.where)
        prompt_ids = list(image.ids)
        eligible = [
            shows or (source is not None and eligible[source])
            for shows, source in zip(image.image_tokens, sources(ids, prompt_ids), strict=True)
        ]
    if not any(eligible):
        raise InputError(
            f"{pair.where}: none of the {len(ids)} prompt tokens is eligible, all are special or "
            "template tokens"
        )
    chosen, rejected = laid.responses
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response:
            raise InputError(f"{pair.where}: '{name}' has no tokens")
    if chosen == rejected:
        raise InputError(
            f"{pair.where}: 'chosen' and 'rejected' are identical to this tokenizer, "
            "expected two responses"
        )
    tokens = tokenizer.convert_ids_to_tokens(prompt_ids)
    return TokenPair(pair, prompt_ids, chosen, rejected, tokens, eligible, image, laid.lead)


@dataclass(frozen=True)
class Layout:
    """A prompt as text and tokens, and answers as the tokens behind it.

    Attributes:
        text: all that stands before an answer.
        contents: the spans of `text` that are the data's.
        special: whether the tokenizer adds its own special tokens.
        ids, offsets: the prompt's tokens, and where each stands in `text`.
        lead: how many of them a template writes only once there is an answer.
        responses: the token ids of each answer.
    """

    text: str
    contents: list[Span]
    special: bool
    ids: list[int]
    offsets: list[Span]
    lead: int
    responses: list[list[int]]


def lay_out(
    prompt: str | Messages,
    responses: Sequence[str],
    tokenizer: Any,
    where: str,
    processor: Any = None,
    *,
    show: bool,
    given: Mapping[str, Any],
) -> Layout:
    """Renders and tokenises a prompt with its answers.

    Args:
        show: the prompt has an image.
        given: see `Pair.given`.

    Raises:
        InputError: see `render`, or the prompt has no tokens.
    """
    lead = 0
    if isinstance(prompt, str):
        text, contents, special = prompt, [(0, len(prompt))], takes_special(tokenizer, prompt)
        ids, offsets = encode(tokenizer, text, special)
    else:
        special = False  # a chat template writes BOS itself
        chat = render(prompt, tokenizer, where, processor, show=show, given=given)
        text, contents = chat.text, chat.contents
        ids, offsets = encode(tokenizer, text, special)
        before, behind = chat.before(responses)
        longer = encode(tokenizer, text + before, special)
        if before and longer[0][: len(ids)] == ids:
            lead, text, responses = len(longer[0]) - len(ids), text + before, behind
            ids, offsets = longer
        else:
            responses = [before + response for response in behind]
    if not ids:
        raise InputError(f"{where}: 'prompt' has no tokens")
    found = [response_ids(tokenizer, text, ids, response, special) for response in responses]
    return Layout(text, contents, special, ids, offsets, lead, found)


def takes_special(tokenizer: Any, text: str) -> bool:
    """Whether raw text gets the tokenizer's own special tokens: not if it begins with them, as a
    prompt does that a chat template has written."""
    own, plain = (encode(tokenizer, text, special)[0] for special in (True, False))
    first = own[: len(own) - len(plain)]
    return not first or plain[: len(first)] != first


def encode(tokenizer: Any, text: str, special: bool) -> tuple[list[int], list[Span]]:
    """Token ids and where each token stands in `text`; `special` adds the tokenizer's own."""
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
    # Some tokenizers close every text; a prompt or an answer is not yet at its end.
    while ids and special and ids[-1] == tokenizer.eos_token_id and offsets[-1] == (0, 0):
        if len(ids) == 1:
            break
        ids, offsets = ids[:-1], offsets[:-1]
    return ids, offsets


def response_ids(
    tokenizer: Any, text: str, prompt_ids: list[int], response: str, special: bool
) -> list[int]:
    """The ids that `response` has behind `text`, whose own ids are `prompt_ids`."""
    joint, _ = encode(tokenizer, text + response, special)
    if joint[: len(prompt_ids)] == prompt_ids and len(joint) > len(prompt_ids):
        return joint[len(prompt_ids) :]
    return encode(tokenizer, response, special=False)[0]


def _overlap(token: Span, content: Span) -> bool:
    return max(token[0], content[0]) < min(token[1], content[1])
