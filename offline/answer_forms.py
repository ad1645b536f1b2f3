"""What is read of a server's answers, and what it must look like.

Every answer becomes one of these forms before anybody uses it (see `Endpoint`). Fields that no form
names are left out; nothing is converted, and every number is finite.
"""

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

_Item = TypeVar("_Item")
Some = Annotated[list[_Item], Field(min_length=1)]


class Form(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


def _number(token: Any) -> Any:
    """`token_id:17`, as vLLM writes tokens on request, and `17`."""
    return int(token.removeprefix("token_id:")) if isinstance(token, str) else token


TokenId = Annotated[NonNegativeInt, BeforeValidator(_number)]


class Card(Form):
    id: str
    parent: str | None = None
    root: str | None = None
    max_model_len: PositiveInt | None = None


class Models(Form):
    """/v1/models."""

    data: Some[Card]


class Version(Form):
    """/version."""

    version: str


class Tokenised(Form):
    """/tokenize."""

    tokens: list[TokenId]


class TokenScore(Form):
    logprob: float
    rank: PositiveInt


PromptScores = list[dict[TokenId, TokenScore] | None]


def scores_of(ids: Sequence[int], entries: PromptScores | None) -> list[TokenScore]:
    """The score of every prompt token after the first, which has none.

    Raises:
        ValueError: there are none, or those of other tokens.
    """
    if entries is None:
        raise ValueError("it has no prompt_logprobs, which vLLM's have")
    if len(entries) != len(ids):
        raise ValueError(f"prompt_logprobs of {len(entries)} tokens, the prompt has {len(ids)}")
    found = [(entry or {}).get(token) for token, entry in zip(ids, entries, strict=True)]
    if None in found[1:]:
        place = found.index(None, 1)
        raise ValueError(f"prompt_logprobs[{place}] has no entry for the token {ids[place]}")
    return [score for score in found[1:] if score is not None]


class _Given(Form):
    prompt_logprobs: PromptScores | None = None


class Scored(Form):
    """/v1/completions: the scores of a given text."""

    choices: Some[_Given]


class ChatTokens(Form):
    """/v1/chat/completions: the prompt's tokens."""

    prompt_token_ids: list[TokenId]


class ScoredChat(ChatTokens):
    """And their scores."""

    prompt_logprobs: PromptScores | None = None


class _Text(Form):
    text: str
    finish_reason: str | None = None

    @property
    def said(self) -> str:
        return self.text


class _Content(Form):
    content: str | None = None  # None: nothing but thoughts or calls


class _Message(Form):
    message: _Content
    finish_reason: str | None = None

    @property
    def said(self) -> str:
        return self.message.content or ""


class Completion(Form):
    """/v1/completions: an answer."""

    choices: Some[_Text]


class Chat(Form):
    """/v1/chat/completions: an answer."""

    choices: Some[_Message]


class _Length(Form):
    completion_tokens: NonNegativeInt


class CountedCompletion(Completion):
    """An answer and its length."""

    usage: _Length


class CountedChat(Chat):
    """An answer and its length."""

    usage: _Length


class _Echo(Form):
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class _Echoed(Form):
    index: int = 0
    logprobs: _Echo


class Echoed(Form):
    """/v1/completions with `echo`: a given text and a token more, and the likeliest at each."""

    choices: Annotated[list[_Echoed], Field(min_length=1, max_length=1)]

    def require(self, count: int) -> None:
        """Raises ValueError unless all of `count` tokens but the first have scores."""
        found = self.choices[0].logprobs
        for name, scores in (
            ("token_logprobs", found.token_logprobs),
            ("top_logprobs", found.top_logprobs),
        ):
            if len(scores) != count:
                raise ValueError(f"{name} of {len(scores)} tokens, expected {count}")
            if not all(score is not None and score != {} for score in scores[1:]):
                raise ValueError(f"{name} holds nothing for some tokens")


class _Tokens(Form):
    tokens: list[TokenId]


class _Sample(Form):
    logprobs: _Tokens


class Samples(Form):
    """/v1/completions: several answers as tokens."""

    choices: Some[_Sample]


class Steps(_Tokens):
    """Generated tokens with the log-probabilities of the likeliest at each place."""

    top_logprobs: list[dict[TokenId, float]]

    @model_validator(mode="after")
    def _alike(self) -> "Steps":
        if len(self.tokens) != len(self.top_logprobs):
            raise ValueError(f"{len(self.tokens)} tokens, {len(self.top_logprobs)} top_logprobs")
        return self

    @property
    def pairs(self) -> list[tuple[int, dict[int, float]]]:
        return list(zip(self.tokens, self.top_logprobs, strict=True))


class _Cached(Form):
    cached_tokens: NonNegativeInt | None = None


class Usage(Form):
    prompt_tokens_details: _Cached | None = None


class _Term(Form, extra="allow"):
    name: str | None = None
    strength: float | None = None


class Receipt(Form, extra="allow"):
    """What an answer says about its steering. Whether that is right is for others to say."""

    vectors: list[_Term] = []


class _Probed(_Given):
    logprobs: Steps


class Probed(Form):
    """/v1/completions: an answer with all that it says."""

    choices: Some[_Probed]
    usage: Usage | None = None
    grains: Receipt | None = None


class _Piece(Form):
    logprobs: Steps | None = None


class Piece(Form):
    """/v1/completions, streamed: one of its events."""

    error: Any = None
    choices: list[_Piece] = []
    usage: Usage | None = None
    grains: Receipt | None = None
