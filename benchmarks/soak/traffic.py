"""The rush: so many requests at once until time is up, every answer looked at."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import httpx

from benchmarks.soak.asks import Ask, Asker
from benchmarks.soak.churn import Churn
from benchmarks.soak.client import Answer, send
from benchmarks.soak.expected import receipt_problem
from benchmarks.soak.solo import Sample
from benchmarks.soak.world import GUEST, Vector, World

MOST_PROBLEMS = 100


@dataclass
class Ledger:
    """What has happened so far.

    Attributes:
        counts: answers by outcome, and by what they asked for.
        problems: what should not have happened, in words; the first MOST_PROBLEMS.
        samples: complete answers drawn evenly from all of them, to be compared in quiet.
    """

    most_samples: int
    rng: Random
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def problem(self, kind: str, text: str) -> None:
        self.counts[f"problem: {kind}"] += 1
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(f"{kind}: {text}")

    def add(self, ask: Ask, answer: Answer, world: World, guests: set[Vector | None]) -> None:
        """Judges one answer.

        Args:
            guests: who may have had the guest's name while it was asked and answered.
        """
        self.counts["requests"] += 1
        self.counts[f"asked: {ask.how}"] += 1
        self.counts[f"asked: {_kind(ask)}"] += 1
        label = f"request {ask.number} ({ask.how}) {ask.body['model']} {ask.body.get('vllm_xargs')}"
        if answer.complete:
            self._complete(ask, answer, world, guests, label)
        elif answer.status in (0, 200) and ask.how == "leave" and not answer.error:
            self.counts["left early"] += 1
        elif _guest_is_gone(ask, answer) and None in guests:
            # 200 for a stream whose guest went after it had begun, before the engine was asked.
            self.counts[f"refused: no guest, {answer.status}"] += 1
        elif answer.status >= 500:
            self.problem("5xx", f"{label}: {answer.status} {answer.error}")
        elif answer.status >= 400:
            self.problem("4xx", f"{label}: {answer.status} {answer.error}")
        else:
            self.problem("broken", f"{label}: {answer.status} {answer.error}")

    def _complete(
        self, ask: Ask, answer: Answer, world: World, guests: set[Vector | None], label: str
    ) -> None:
        self.counts["complete"] += 1
        self.counts["prompt tokens"] += len(answer.prompt)
        self.counts["generated tokens"] += len(answer.tokens)
        if len(answer.tokens) != ask.body["max_tokens"]:
            self.problem("length", f"{label}: {len(answer.tokens)} tokens")
        known = [guest for guest in guests if guest is not None]
        if problem := receipt_problem(ask, answer, world, known):
            self.problem("receipt", f"{label}: {problem}")
        elif len(self.samples) < self.most_samples:
            self.samples.append((ask, answer))
        elif (place := self.rng.randrange(self.counts["complete"])) < self.most_samples:
            self.samples[place] = (ask, answer)


def _guest_is_gone(ask: Ask, answer: Answer) -> bool:
    named = any(wish.name == GUEST for wish in ask.wishes)
    return named and answer.status in (200, 400) and not answer.tokens and GUEST in answer.error


def _kind(ask: Ask) -> str:
    if not ask.wishes:
        return "plain"
    return "one vector" if len(ask.wishes) == 1 else f"{len(ask.wishes)} vectors"


async def rush(
    client: httpx.AsyncClient,
    asker: Asker,
    churn: Churn,
    world: World,
    ledger: Ledger,
    concurrency: int,
    seconds: float,
    tell: Callable[[str], None],
    first: int = 0,
) -> int:
    """Keeps `concurrency` requests going for so many seconds; returns the next request's number."""
    end = time.monotonic() + seconds
    number = first

    async def one_after_the_other() -> None:
        nonlocal number
        while time.monotonic() < end:
            ask = asker.ask(number)
            number += 1
            answer = await send(client, ask)
            ledger.add(ask, answer, world, churn.possible(answer.began, answer.ended))

    async def progress() -> None:
        while True:
            await asyncio.sleep(30)
            left = end - time.monotonic()
            tell(
                f"{max(left, 0):.0f} s left: {ledger.counts['requests']} requests, "
                f"{ledger.counts['generated tokens']} tokens, {len(ledger.problems)} problems"
            )

    teller = asyncio.create_task(progress())
    await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))
    teller.cancel()
    return number
