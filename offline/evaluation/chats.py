"""Requests whose prompt holds an image: chats, because only the server can render them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from pydantic import BaseModel

from offline.answer_forms import ChatTokens, ScoredChat, scores_of
from offline.chat_text import continues
from offline.endpoint import Body, Endpoint
from offline.endpoint_scorer import UNSTEERED
from offline.errors import InputError
from offline.evaluation.target import Setting
from offline.pairs import Messages, Pair
from offline.pictures import Picture

_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id"}  # those that vLLM reads
_GROUP = 128  # bodies and answers in memory at once: an image is large, and so is what it scores
_Form = TypeVar("_Form", bound=BaseModel)
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class AnswerScore:
    """The sum of a given answer's token log-likelihoods in nats, and their number."""

    logp: float
    tokens: int


def messages_of(pair: Pair) -> list[dict[str, Any]]:
    """The messages of a pair with a picture, which stands before the text of the first user's.

    Raises:
        InputError: see `require_chat`.
    """
    assert pair.picture is not None
    messages: list[dict[str, Any]] = [dict(message) for message in require_chat(pair)]
    user = next(message for message in messages if message["role"] == "user")
    user["content"] = with_image(pair.picture, user["content"])
    return messages


def prompt_body(pair: Pair) -> Body:
    """The fields of a request that hold the prompt of a pair with a picture.

    Raises:
        InputError: see `require_chat`.
    """
    # Answers are text, whatever tools the prompt shows.
    choice = {"tool_choice": "none"} if "tools" in pair.given else {}
    return {"messages": messages_of(pair), **pair.given, **choice}


def require_chat(pair: Pair) -> Messages:
    """The prompt of a pair with a picture.

    Raises:
        InputError: it is no chat, no user speaks in it, or a request cannot hold it.
    """
    if isinstance(pair.prompt, str):
        raise InputError(
            f"{pair.where}: its prompt is text with an image, and requests with an image are "
            "chats; --chat makes the text a user message"
        )
    if not any(message["role"] == "user" for message in pair.prompt):
        raise InputError(f"{pair.where}: no message of a user, before whose text the image stands")
    if continues(pair.prompt):
        raise InputError(
            f"{pair.where}: its prompt ends with what the assistant has begun to say, which is not "
            "carried in requests with an image"
        )
    for message in pair.prompt:
        for key in message.keys() - _KEYS:
            raise InputError(
                f"{pair.where}: a message has '{key}', which requests with an image do not carry"
            )
    return pair.prompt


def with_image(picture: Picture, text: str) -> list[dict[str, Any]]:
    """The content of a message: an image, then a text."""
    return [
        {"type": "image_url", "image_url": {"url": picture.data_url}},
        {"type": "text", "text": text},
    ]


def steering(setting: Setting, **more: Any) -> Body:
    """The fields of a request that say how it is steered."""
    asked = {**setting.xargs, **more}
    return {"model": setting.model, **({"vllm_xargs": asked} if asked else {})}


def post_chats(
    endpoint: Endpoint,
    bodies: Iterable[Body],
    form: type[_Form],
    read: Callable[[_Form], _Read],
    on_done: Callable[[int], None] = lambda count: None,
) -> list[_Read]:
    """What `read` makes of every answer, in order; see `Endpoint.post_all` for errors."""
    found: list[_Read] = []
    waiting = iter(bodies)
    while group := list(islice(waiting, _GROUP)):
        found += endpoint.post_all(
            "/v1/chat/completions", group, form, lambda _, answer: read(answer), on_done
        )
    return found


def prompt_tokens(
    endpoint: Endpoint,
    model: str,
    pairs: Sequence[Pair],
    on_done: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """The token ids of every prompt, images among them, as the server renders it for an answer."""
    setting = Setting("", model, UNSTEERED)
    bodies = ({**_scored(pair), **steering(setting)} for pair in pairs)
    return post_chats(endpoint, bodies, ChatTokens, lambda found: found.prompt_token_ids, on_done)


def score_answers(
    endpoint: Endpoint,
    asked: Sequence[tuple[Pair, str, list[int]]],
    setting: Setting,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[AnswerScore]:
    """The log-likelihoods of given answers, each as the template writes it behind its prompt.

    Args:
        asked: a pair with a picture, an answer to its prompt, and the prompt's own tokens (see
            `prompt_tokens`), which tell where the answer begins.

    Raises:
        InputError: with the answer behind it, a prompt does not begin with its own tokens.
    """

    def body(pair: Pair, answer: str, prompt: list[int]) -> Body:
        border = {"steering_prompt_tokens": len(prompt)} if setting.border else {}
        return {
            **_scored(pair, {"role": "assistant", "content": answer}),
            "add_generation_prompt": False,
            "continue_final_message": True,
            "prompt_logprobs": 0,  # vLLM: of every prompt token itself, and of no other candidate
            **steering(setting, **border),
        }

    bodies = (body(*one) for one in asked)
    found = post_chats(endpoint, bodies, ScoredChat, _tokens, on_done)
    return [
        _score(pair, prompt, tokens) for (pair, _, prompt), tokens in zip(asked, found, strict=True)
    ]


def _scored(pair: Pair, *answer: dict[str, str]) -> Body:
    body = prompt_body(pair)
    return {
        **body,
        "messages": [*body["messages"], *answer],
        "max_tokens": 1,
        "temperature": 0,
        "return_token_ids": True,
    }


def _tokens(answer: ScoredChat) -> list[tuple[int, float]]:
    """Every prompt token with its log-likelihood; the first token has none, which counts as 0."""
    ids = answer.prompt_token_ids
    scores = scores_of(ids, answer.prompt_logprobs)
    return list(zip(ids, [0.0, *(score.logprob for score in scores)], strict=True))


def _score(pair: Pair, prompt: list[int], tokens: list[tuple[int, float]]) -> AnswerScore:
    border = len(prompt)
    if len(tokens) <= border or [token for token, _ in tokens[:border]] != prompt:
        raise InputError(
            f"{pair.where}: the server's chat template writes this prompt in another way when an "
            "answer follows, so nobody can tell where the answer begins"
        )
    return AnswerScore(sum(logp for _, logp in tokens[border:]), len(tokens) - border)
