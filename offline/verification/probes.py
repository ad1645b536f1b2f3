"""What is asked of whoever is verified, and what it answered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

NONE: Mapping[str, Any] = {"steering": "none"}  # unsteered also where the server steers by default


@dataclass(frozen=True)
class Probe:
    """One greedy request.

    Attributes:
        tokens: the prompt's token ids.
        fields: steering fields (`vllm_xargs`).
        alias: ask for the model alias of this vector; without aliases, the same as its name.
        scored: wants the prompt's log-probabilities, for which vLLM does not read its prefix cache.
        answer: how many tokens to generate.
        salt: requests with different salts share no prefix cache.
    """

    tokens: tuple[int, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    alias: str | None = None
    scored: bool = True
    answer: int = 4
    salt: str = ""


@dataclass(frozen=True)
class Reading:
    """The answer to a probe.

    Attributes:
        prompt: log-probability of each prompt token after the first; empty unless scored.
        answer: the generated tokens, each with the log-probabilities of the likeliest by token id.
        cached: prompt tokens from the prefix cache, or None where that is not reported.
        receipt: what the answer says about its steering, if it says something.
    """

    prompt: tuple[float, ...]
    answer: tuple[tuple[int, Mapping[int, float]], ...]
    cached: int | None
    receipt: Mapping[str, Any] | None


class Target(Protocol):
    """A server or an engine.

    Attributes:
        name: for the report.
        vectors: the names that can be asked for.
        longest: most tokens of a request, prompt and answer together.
        has_aliases: whether vectors are also model names.
    """

    name: str
    vectors: Sequence[str]
    longest: int
    has_aliases: bool

    def ask(self, probes: Sequence[Probe], together: bool = False) -> list[Reading]:
        """Answers in order; `together` in one batch, else one after the other.

        Raises:
            NotAnswered: it refuses one of them.
        """

    def sample(self, count: int, length: int, seed: int) -> list[tuple[int, ...]]:
        """Random texts of the model itself, as token ids: prompts that suit any vocabulary."""


class NotAnswered(Exception):
    """A probe was refused; the message says why, `status` is HTTP's where there is one."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


def gap(one: Reading, other: Reading) -> float:
    """The largest difference of two readings' log-probabilities, as long as the texts agree."""
    gaps = [0.0, *(abs(a - b) for a, b in zip(one.prompt, other.prompt, strict=True))]
    for (token, ours), (their_token, theirs) in zip(one.answer, other.answer, strict=False):
        common = ours.keys() & theirs.keys()
        gaps += [abs(ours[key] - theirs[key]) for key in common] or [float("inf")]
        if token != their_token:
            break
    return max(gaps)
