"""What steering is judged by: log-likelihoods of given answers, and the figures made of them.

An item is a prompt and an answer to score; a point is one way of steering. Whoever can score items
at points (a transformers model, a vLLM engine, a server) is a Scorer, and all of them must agree.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from grains_vllm.positions import Positions
from offline.prompts import TokenPair
from offline.vision import ImagePrompt


@dataclass(frozen=True)
class Item:
    """A prompt and an answer, each of at least one token.

    Attributes:
        image: the prompt as the processor laid it out, if it has an image.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    image: ImagePrompt | None = None

    @property
    def image_tokens(self) -> tuple[bool, ...]:
        """A flag per prompt token; True where an image feature stands."""
        return self.image.image_tokens if self.image else (False,) * len(self.prompt_ids)


@dataclass(frozen=True)
class ItemScore:
    """One item's result.

    Attributes:
        logp: sum of the answer's token log-likelihoods, in nats.
        greedy: every answer token is the single most likely one, so that greedy decoding would
            have said exactly this.
    """

    logp: float
    greedy: bool


@dataclass(frozen=True)
class Point:
    """One way of steering.

    Attributes:
        vector: the name under which the scorer knows it.
        positions: a text that grains_vllm.positions reads, such as `prompt:1+generation`.
    """

    vector: str
    layers: tuple[int, ...]
    strength: float
    positions: str = "all"

    @property
    def needs_border(self) -> bool:
        """Whether it matters where the answer begins: prompt and answer are not steered alike.

        Raises:
            PositionsError: `positions` cannot be read.
        """
        return Positions.parse(self.positions).needs_border


class Scorer(Protocol):
    """Scores the same items at many points."""

    def score(
        self, items: Sequence[Item], points: Sequence[Point | None]
    ) -> Iterator[tuple[int, list[ItemScore]]]:
        """Yields (index of a point, one score per item), each point once, in any order.

        Args:
            points: None stands for the model without steering.
        """


@dataclass(frozen=True)
class Suite:
    """What a point is judged on.

    Attributes:
        pairs: preference pairs; their answers should move.
        controls: items whose answer should stay the greedy one.
        texts: general text, the first token as the prompt; its perplexity should stay.
    """

    pairs: Sequence[TokenPair]
    controls: Sequence[Item] = ()
    texts: Sequence[Item] = ()

    @property
    def items(self) -> list[Item]:
        """All of it, for `Scorer.score`: chosen and rejected of every pair, controls, texts."""
        paired = [
            Item(tuple(pair.prompt_ids), tuple(ids), pair.image)
            for pair in self.pairs
            for ids in (pair.chosen_ids, pair.rejected_ids)
        ]
        return [*paired, *self.controls, *self.texts]


@dataclass(frozen=True)
class Measures:
    """What came out at one point.

    Attributes:
        accuracy: share of pairs whose chosen answer is more likely per token than the rejected.
        margin: mean over pairs of logp(chosen) - logp(rejected), each per token, in nats.
        exact: share of pairs whose chosen answer is exactly the greedy one.
        controls: share of controls whose answer is exactly the greedy one; None without controls.
        perplexity: exp of the mean negative log-likelihood per token; None without texts.
    """

    accuracy: float
    margin: float
    exact: float
    controls: float | None
    perplexity: float | None


def measure(suite: Suite, scores: Sequence[ItemScore]) -> Measures:
    """Sums up the scores of `suite.items`."""
    count = len(suite.pairs)
    margins = pair_margins(suite, scores)
    controls = scores[2 * count : 2 * count + len(suite.controls)]
    texts = scores[2 * count + len(suite.controls) :]
    perplexity = None
    if texts:
        tokens = sum(len(item.response_ids) for item in suite.texts)
        perplexity = math.exp(-sum(score.logp for score in texts) / tokens)
    return Measures(
        accuracy=sum(margin > 0 for margin in margins) / count,
        margin=sum(margins) / count,
        exact=sum(score.greedy for score in scores[: 2 * count : 2]) / count,
        controls=sum(score.greedy for score in controls) / len(controls) if controls else None,
        perplexity=perplexity,
    )


def pair_margins(suite: Suite, scores: Sequence[ItemScore]) -> list[float]:
    """Per pair logp(chosen) - logp(rejected), each per token."""
    return [
        scores[2 * index].logp / len(pair.chosen_ids)
        - scores[2 * index + 1].logp / len(pair.rejected_ids)
        for index, pair in enumerate(suite.pairs)
    ]
