"""One request over HTTP, answered whole, streamed or abandoned."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.soak.asks import Ask


@dataclass
class Answer:
    """What came back.

    Attributes:
        status: HTTP status; 0 if the client left before there was one.
        complete: whether all of the answer was read.
        receipt: the response's `grains`, or None.
        error: the body of a refusal, or what broke.
        began, ended: seconds of time.monotonic().
    """

    status: int = 0
    complete: bool = False
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    receipt: dict[str, Any] | None = None
    error: str = ""
    began: float = 0.0
    ended: float = 0.0


async def send(client: httpx.AsyncClient, ask: Ask, whole: bool = False, **more: Any) -> Answer:
    """Sends one request; a failed connection is an answer with an error.

    Args:
        whole: read it to its end in one piece, whatever `ask.how` says.
        more: further fields of the body.
    """
    answer = Answer(began=time.monotonic())
    # Every second one that leaves does so while its answer streams.
    stream = not whole and (ask.how == "stream" or (ask.how == "leave" and ask.number % 2 == 0))
    body = {**ask.body, **more, "stream": stream}
    leaves = None if whole or ask.how != "leave" else answer.began + ask.patience
    timeout = httpx.Timeout(300, read=max(ask.patience, 0.01) if leaves and not stream else 300)
    try:
        async with client.stream("POST", f"/v1/{ask.route}", json=body, timeout=timeout) as got:
            answer.status = got.status_code
            if got.status_code != 200:
                answer.error = (await got.aread()).decode(errors="replace")[:500]
            elif stream:
                await _read_stream(got, answer, leaves)
            else:
                _take(json.loads(await got.aread()), answer)
                answer.complete = True
    except httpx.ReadTimeout as error:
        answer.error = "" if leaves else repr(error)
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        answer.error = repr(error)
    answer.ended = time.monotonic()
    return answer


async def _read_stream(response: httpx.Response, answer: Answer, leaves: float | None) -> None:
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            answer.complete = True
            return
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            answer.error = line[:500]
            return
        _take(chunk, answer)
        if leaves and time.monotonic() > leaves:
            return


def _take(content: dict[str, Any], answer: Answer) -> None:
    """Adds a response or a chunk of one to what is known of the answer."""
    answer.receipt = content.get("grains", answer.receipt)
    # A chat has its prompt beside the choices, a completion in the choice.
    answer.prompt = content.get("prompt_token_ids") or answer.prompt
    for choice in content["choices"]:
        answer.prompt = choice.get("prompt_token_ids") or answer.prompt
        answer.tokens += choice.get("token_ids") or []
        logprobs = choice.get("logprobs") or {}
        answer.logprobs += logprobs.get("token_logprobs") or []
        answer.logprobs += [token["logprob"] for token in logprobs.get("content") or []]
