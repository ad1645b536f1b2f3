"""The same request once more, alone on an idle server and without its cached KV."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from benchmarks.soak.asks import Ask
from benchmarks.soak.client import Answer, send
from benchmarks.soak.expected import guest_of, parts
from benchmarks.soak.reference import answer_logprobs
from benchmarks.soak.world import World

# A batch of other size adds in another order; log-probabilities of float32, up to 40 tokens deep.
TOLERANCE = 5e-4
Sample = tuple[Ask, Answer]


@dataclass
class Comparison:
    """How far the answers of the rush are from those in quiet.

    Attributes:
        worst: largest difference of a log-probability.
        ties: answers that went another way where two tokens were equally likely within TOLERANCE.
        problems: answers that differ by more; the first ones in words.
    """

    answers: int = 0
    tokens: int = 0
    worst: float = 0.0
    ties: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, label: str, ours: Answer, tokens: list[int], logprobs: list[float]) -> None:
        """Compares up to the first token that is another."""
        self.answers += 1
        if len(ours.tokens) != len(tokens) or len(ours.logprobs) != len(logprobs):
            self.problems.append(f"{label}: {len(ours.tokens)} tokens, alone {len(tokens)}")
            return
        for n, (mine, theirs) in enumerate(zip(ours.tokens, tokens, strict=True)):
            difference = abs(ours.logprobs[n] - logprobs[n])
            if not difference <= TOLERANCE:
                self.problems.append(
                    f"{label}: token {n} is {mine}, alone {theirs}; log-probabilities "
                    f"{ours.logprobs[n]:.6f}, {logprobs[n]:.6f}"
                )
                return
            self.worst = max(self.worst, difference)
            if mine != theirs:
                self.ties += 1
                return
            self.tokens += 1


async def against_solo(
    client: httpx.AsyncClient, samples: Sequence[Sample], seed: int, found: Comparison
) -> None:
    """Sends every sample again, one after another; a salt of its own keeps cached KV away."""
    for ask, answer in samples:
        alone = await send(client, ask, whole=True, cache_salt=f"solo-{seed}-{ask.number}")
        label = f"request {ask.number} {ask.body.get('vllm_xargs', '')} {ask.body['model']}"
        if alone.complete:
            found.add(label, answer, alone.tokens, alone.logprobs)
        else:
            found.problems.append(f"{label}: alone {alone.status} {alone.error}")


def against_reference(samples: Sequence[Sample], world: World) -> Comparison:
    """Scores every sample's own tokens with transformers and float64 hooks."""
    found = Comparison()
    for ask, answer in samples:
        steering = parts(ask, len(answer.prompt), guest_of(answer, world), world)
        expected = answer_logprobs(answer.prompt, answer.tokens, steering)
        found.add(f"request {ask.number} {ask.wishes}", answer, answer.tokens, expected)
    return found
