"""A running server as a target, over its public OpenAI-compatible HTTP alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from offline.endpoint import BUSY, Body, Endpoint, Refused, message
from offline.errors import InputError
from offline.verification.probes import NONE, NotAnswered, Probe, Reading

_TIMEOUT_S = 120.0
_TOP = 5  # candidates per generated token


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
        self.endpoint = Endpoint(url, api_key)
        # One connection for all that is asked one by one: a new one takes longer than a tiny model.
        self._client = httpx.Client(
            base_url=self.endpoint.url, headers=self.endpoint.headers, timeout=_TIMEOUT_S
        )
        self.name = self.endpoint.name
        cards = self.endpoint.get("/v1/models")["data"]
        names = {card["id"] for card in cards}
        bases = [card["id"] for card in cards if card.get("parent") not in names]
        if model is None and len(bases) != 1:
            raise InputError(f"--model is missing: the server has {', '.join(bases)}")
        if model is not None and model not in bases:
            raise InputError(f"--model is '{model}', the server has {', '.join(bases)}")
        self.model: str = bases[0] if model is None else model
        self.vectors: Sequence[str] = [
            card["id"].removeprefix(f"{self.model}:")
            for card in cards
            if card.get("parent") == self.model and card["id"].startswith(f"{self.model}:")
        ]
        card = next(card for card in cards if card["id"] == self.model)
        self.longest: int = card.get("max_model_len") or 512

    def ask(self, probes: Sequence[Probe], together: bool = False) -> list[Reading]:
        """See probes.Target."""
        bodies = [self._body(probe) for probe in probes]
        answers = self._all(bodies) if together else [self._one(body) for body in bodies]
        return [_reading(probe, answer) for probe, answer in zip(probes, answers, strict=True)]

    def sample(self, count: int, length: int, seed: int) -> list[tuple[int, ...]]:
        """See probes.Target."""
        body = {
            "model": self.model, "prompt": "Hello", "max_tokens": length, "temperature": 1,
            "top_k": 50, "seed": seed, "n": count, "ignore_eos": True, "logprobs": 0,
            "return_tokens_as_token_ids": True, "vllm_xargs": dict(NONE),
        }  # fmt: skip
        try:
            answer = self.endpoint.post_all(_PATH, [body])[0]
        except Refused as error:
            raise InputError(f"{self.name}: no prompt to verify with: {error.reason}") from error
        return [
            tuple(_id(token) for token in choice["logprobs"]["tokens"])
            for choice in answer["choices"]
        ]

    def refusal(self, probe: Probe, stream: bool) -> NotAnswered | None:
        """What the server says against a request, or None if it takes it."""
        response = self._client.post(_PATH, json={**self._body(probe), "stream": stream})
        if response.status_code == 200:
            return None
        return NotAnswered(message(response), response.status_code)

    def stream(self, probe: Probe) -> Reading:
        """A probe (not scored) whose answer comes in pieces."""
        body = {**self._body(probe), "stream": True, "stream_options": {"include_usage": True}}
        with self._client.stream("POST", _PATH, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise NotAnswered(message(response), response.status_code)
            events = list(_events(response.iter_lines()))
        steps: list[Any] = []
        receipt, usage = None, None
        for event in events:
            if "error" in event:
                raise NotAnswered(str(event["error"]), 200)
            for choice in event.get("choices") or ():
                steps += _steps(choice.get("logprobs"))
            receipt = event.get("grains", receipt)
            usage = event.get("usage") or usage
        return Reading((), tuple(steps), _cached(usage), receipt)

    def _one(self, body: Body) -> Any:
        response = self._client.post(_PATH, json=body)
        if response.status_code == 200:
            return response.json()
        if response.status_code in BUSY:
            return self._all([body])[0]  # which tries again
        raise NotAnswered(message(response), response.status_code)

    def _all(self, bodies: Sequence[Body]) -> list[Any]:
        try:
            return self.endpoint.post_all(_PATH, bodies)
        except Refused as error:
            raise NotAnswered(error.reason, error.status) from error

    def _body(self, probe: Probe) -> Body:
        return {
            "model": self.model if probe.alias is None else f"{self.model}:{probe.alias}",
            "prompt": list(probe.tokens), "max_tokens": probe.answer, "temperature": 0,
            "ignore_eos": True, "logprobs": _TOP, "return_tokens_as_token_ids": True,
            **({"prompt_logprobs": 0} if probe.scored else {}),
            **({"cache_salt": probe.salt} if probe.salt else {}),
            **({"vllm_xargs": dict(probe.fields)} if probe.fields else {}),
        }  # fmt: skip


_PATH = "/v1/completions"


def _reading(probe: Probe, answer: Mapping[str, Any]) -> Reading:
    choice = answer["choices"][0]
    scores = choice.get("prompt_logprobs")
    if probe.scored and scores is None:
        raise InputError("the server returned no prompt_logprobs; verifying needs vLLM's")
    prompt = tuple(
        float(entry[str(token)]["logprob"])
        for token, entry in zip(probe.tokens[1:], (scores or [None])[1:], strict=False)
    )
    return Reading(
        prompt,
        tuple(_steps(choice["logprobs"])),
        _cached(answer.get("usage")),
        answer.get("grains"),
    )


def _steps(logprobs: Mapping[str, Any] | None) -> list[tuple[int, dict[int, float]]]:
    if logprobs is None:
        return []
    return [
        (_id(token), {_id(key): float(value) for key, value in top.items()})
        for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
    ]


def _id(token: str) -> int:
    """`token_id:17`, as vLLM writes tokens on request."""
    return int(token.rpartition(":")[2])


def _cached(usage: Mapping[str, Any] | None) -> int | None:
    details = (usage or {}).get("prompt_tokens_details")
    return None if details is None else int(details.get("cached_tokens") or 0)


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        data = line.removeprefix("data: ")
        if data != line and data != "[DONE]":
            yield json.loads(data)
