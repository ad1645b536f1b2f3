"""From a pair to token ids, and which prompt tokens may be selected.

Template and special tokens (BOS, chat markup, the "Q:" and "A:" around a question) get scores but
are never eligible. What is template is decided by rendering, not by patterns.
"""

from dataclasses import dataclass
from typing import Any

from offline.chat_text import Span, render
from offline.errors import InputError
from offline.pairs import Pair
from offline.vision import ImagePrompt, image_prompt, sources


@dataclass(frozen=True)
class TokenPair:
    """A pair as the model sees it.

    Attributes:
        pair: where it came from.
        prompt_ids: T token ids, special and template tokens included.
        chosen_ids, rejected_ids: the response tokens, without the prompt.
        tokens: the T prompt tokens as text, for people.
        eligible: T flags; True where the token belongs to a message's content or holds an image
            feature.
        image: the prompt as the processor laid it out, if it has an image.
    """

    pair: Pair
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    tokens: list[str]
    eligible: list[bool]
    image: ImagePrompt | None = None

    @property
    def image_tokens(self) -> list[bool]:
        """T flags; True where an image feature stands."""
        return list(self.image.image_tokens) if self.image else [False] * len(self.prompt_ids)

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
    is_chat = not isinstance(pair.prompt, str)
    chat = None
    if isinstance(pair.prompt, str):
        text, contents = pair.prompt, [pair.question or (0, len(pair.prompt))]
    else:
        show = pair.picture is not None
        chat = render(pair.prompt, tokenizer, pair.where, processor, show=show)
        text, contents = chat.text, chat.contents
    # A chat template writes BOS itself; raw text gets the tokenizer's own special tokens.
    ids, offsets = encode(tokenizer, text, special=not is_chat)
    if not ids:
        raise InputError(f"{pair.where}: 'prompt' has no tokens")
    special = set(tokenizer.all_special_ids)
    if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        special.discard(tokenizer.unk_token_id)  # an unknown word is content
    eligible = [
        token not in special and any(_overlap(span, content) for content in contents)
        for token, span in zip(ids, offsets, strict=True)
    ]
    image = None
    prompt_ids = ids
    if pair.picture is not None:
        image = image_prompt(processor, text, pair.picture, not is_chat, pair.where)
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
    responses = {}
    for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        said = response if chat is None else chat.lead(response) + response
        responses[name] = response_ids(tokenizer, text, ids, said, special=not is_chat)
        if not responses[name]:
            raise InputError(f"{pair.where}: '{name}' has no tokens")
    if responses["chosen"] == responses["rejected"]:
        raise InputError(
            f"{pair.where}: 'chosen' and 'rejected' are identical to this tokenizer, "
            "expected two responses"
        )
    tokens = tokenizer.convert_ids_to_tokens(prompt_ids)
    return TokenPair(
        pair, prompt_ids, responses["chosen"], responses["rejected"], tokens, eligible, image
    )


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
