"""A running server as a target, over its public OpenAI-compatible HTTP alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from offline.answer_forms import Models, Piece, Probed, Receipt, Samples, Steps, Usage, scores_of
from offline.endpoint import Body, Endpoint, Refused
from offline.errors import InputError
from offline.verification.probes import NONE, NotAnswered, Probe, Reading

_TIMEOUT_S = 120.0
_TOP = 5  # candidates per generated token
_PATH = "/v1/completions"


class HttpTarget:
    """See probes.Target; also knows what only a server can do: streaming and refusing."""

    has_aliases = True

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        """Asks the server what it serves.

        Args:
            model: the served name; needed if there are several.

        Raises:
            InputError: it cannot be reached, or `model` is not served or ambiguous.
        """
        self.endpoint = Endpoint(url, api_key, timeout_s=_TIMEOUT_S)
        self.name = self.endpoint.name
        cards = {card.id: card for card in self.endpoint.get("/v1/models", Models).data}
        bases = [name for name, card in cards.items() if card.parent not in cards]
        if model is None and len(bases) != 1:
            raise InputError(f"--model is missing: the server has {', '.join(bases)}")
        if model is not None and model not in bases:
            raise InputError(f"--model is '{model}', the server has {', '.join(bases)}")
        self.model: str = bases[0] if model is None else model
        self.vectors: Sequence[str] = [
            name.removeprefix(f"{self.model}:")
            for name, card in cards.items()
            if card.parent == self.model and name.startswith(f"{self.model}:")
        ]
        self.longest: int = cards[self.model].max_model_len or 512

    def ask(self, probes: Sequence[Probe], together: bool = False) -> list[Reading]:
        """See probes.Target."""
        bodies = [self._body(probe) for probe in probes]
        with _refusals():
            if together:
                return self.endpoint.post_all(
                    _PATH, bodies, Probed, lambda number, answer: _reading(probes[number], answer)
                )
            return [
                self.endpoint.post(_PATH, body, Probed, partial(_reading, probe))
                for probe, body in zip(probes, bodies, strict=True)
            ]

    def sample(self, count: int, length: int, seed: int) -> list[tuple[int, ...]]:
        """See probes.Target."""
        body = {
            "model": self.model, "prompt": "Hello", "max_tokens": length, "temperature": 1,
            "top_k": 50, "seed": seed, "n": count, "ignore_eos": True, "logprobs": 0,
            "return_tokens_as_token_ids": True, "vllm_xargs": dict(NONE),
        }  # fmt: skip

        def read(answer: Samples) -> list[tuple[int, ...]]:
            found = [tuple(choice.logprobs.tokens) for choice in answer.choices]
            if [len(tokens) for tokens in found] != [length] * count:
                raise ValueError(f"expected {count} answers of {length} tokens")
            return found

        with _refusals():
            return self.endpoint.post(_PATH, body, Samples, read)

    def refusal(self, probe: Probe, stream: bool) -> NotAnswered | None:
        """What the server says against a request, or None if it takes it."""
        found = self.endpoint.refusal(_PATH, {**self._body(probe), "stream": stream})
        return None if found is None else NotAnswered(found.reason, found.status)

    def stream(self, probe: Probe) -> Reading:
        """A probe (not scored) whose answer comes in pieces."""
        body = {**self._body(probe), "stream": True, "stream_options": {"include_usage": True}}
        with _refusals():
            return self.endpoint.stream(_PATH, body, Piece, _joined)

    def _body(self, probe: Probe) -> Body:
        return {
            "model": self.model if probe.alias is None else f"{self.model}:{probe.alias}",
            "prompt": list(probe.tokens), "max_tokens": probe.answer, "temperature": 0,
            "ignore_eos": True, "logprobs": _TOP, "return_tokens_as_token_ids": True,
            **({"prompt_logprobs": 0} if probe.scored else {}),
            **({"cache_salt": probe.salt} if probe.salt else {}),
            **({"vllm_xargs": dict(probe.fields)} if probe.fields else {}),
        }  # fmt: skip


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except Refused as error:
        raise NotAnswered(error.reason, error.status) from error


def _reading(probe: Probe, answer: Probed) -> Reading:
    choice = answer.choices[0]
    scores = scores_of(probe.tokens, choice.prompt_logprobs) if probe.scored else []
    prompt = tuple(score.logprob for score in scores)
    return Reading(prompt, _steps([choice.logprobs]), _cached(answer.usage), _facts(answer.grains))


def _joined(pieces: Sequence[Piece]) -> Reading:
    """The reading of a streamed answer."""
    for piece in pieces:
        if piece.error is not None:
            raise NotAnswered(str(piece.error), 200)
    parts = [choice.logprobs for piece in pieces for choice in piece.choices]
    usage = next((piece.usage for piece in reversed(pieces) if piece.usage), None)
    receipt = next((piece.grains for piece in reversed(pieces) if piece.grains), None)
    return Reading((), _steps(parts), _cached(usage), _facts(receipt))


def _steps(parts: Sequence[Steps | None]) -> tuple[tuple[int, dict[int, float]], ...]:
    found = [step for part in parts if part for step in part.pairs]
    if not found:
        raise ValueError("it has no tokens")
    return tuple(found)


def _cached(usage: Usage | None) -> int | None:
    details = None if usage is None else usage.prompt_tokens_details
    return None if details is None else details.cached_tokens or 0


def _facts(receipt: Receipt | None) -> dict[str, Any] | None:
    return None if receipt is None else receipt.model_dump(exclude_unset=True)
