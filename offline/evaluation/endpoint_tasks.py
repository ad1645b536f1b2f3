"""What is measured on a preference file, on texts and on controls, by log-likelihood alone."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from offline.endpoint_scorer import score_items
from offline.evaluation.confidence import Figure
from offline.evaluation.measured import Measured, Outcome
from offline.evaluation.target import Setting, Target
from offline.pairs import PairSet
from offline.scoring import Item, ItemScore, pair_margins
from offline.suite import load_suite

# From a total to a function that advances.
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
_NO_PAIRS = PairSet("", "", 0, [])


class PairsTask:
    """Pair accuracy and margin: is the preferred answer more likely per token, and by how much?"""

    name, side_effect = "pairs", False

    def __init__(self, pairs: PairSet, facts: Mapping[str, Any], progress: Progress) -> None:
        self.facts = facts
        self._pairs, self._progress = pairs, progress

    def measure(self, target: Target, setting: Setting) -> Outcome:
        suite = load_suite(self._pairs, target.tokenizer, _config(target)).suite
        margins = pair_margins(suite, _score(target, setting, suite.items, self._progress))
        # Their place: ids may be given twice.
        ids = numbered(len(margins))
        return Outcome(
            {
                "accuracy": Measured(ids, Figure([float(m > 0) for m in margins]), True),
                "margin": Measured(ids, Figure(margins), True),
            }
        )


class PerplexityTask:
    """Perplexity of given texts, over all of their tokens but each text's first."""

    name, side_effect = "perplexity", True

    def __init__(
        self, texts: Path, limit: int | None, facts: Mapping[str, Any], progress: Progress
    ) -> None:
        self.facts = facts
        self._texts, self._limit, self._progress = texts, limit, progress

    def measure(self, target: Target, setting: Setting) -> Outcome:
        suite = load_suite(_NO_PAIRS, target.tokenizer, _config(target), texts=self._texts).suite
        items = suite.texts[: self._limit]
        scores = _score(target, setting, items, self._progress)
        tokens = [float(len(item.response_ids)) for item in items]
        figure = Figure([score.logp for score in scores], tokens, perplexity=True)
        return Outcome({"perplexity": Measured(numbered(len(scores)), figure, False)})


class ControlsTask:
    """Share of controls whose right answer is exactly the greedy one."""

    name, side_effect = "controls", True

    def __init__(
        self,
        controls: Path,
        chat: bool,
        limit: int | None,
        facts: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        self.facts = facts
        self._controls, self._chat, self._limit = controls, chat, limit
        self._progress = progress

    def measure(self, target: Target, setting: Setting) -> Outcome:
        suite = load_suite(
            _NO_PAIRS, target.tokenizer, _config(target), controls=self._controls, chat=self._chat
        ).suite
        scores = _score(target, setting, suite.controls[: self._limit], self._progress)
        figure = Figure([float(score.greedy) for score in scores])
        return Outcome({"exact": Measured(numbered(len(scores)), figure, True)})


def numbered(count: int) -> list[str]:
    """Names of items that have only their place."""
    return [str(number) for number in range(1, count + 1)]


def first(pairs: PairSet, kept: Sequence[int], limit: int | None) -> PairSet:
    """The first `limit` of the kept pairs."""
    return replace(pairs, pairs=[pairs.pairs[index] for index in kept[:limit]])


def _score(
    target: Target, setting: Setting, items: Sequence[Item], progress: Progress
) -> list[ItemScore]:
    with progress(len(items)) as advance:
        return score_items(
            target.endpoint, items, setting.model, setting.xargs, setting.border, advance
        )


def _config(target: Target) -> Any:
    """What the suite must fit; the server itself refuses ids beyond its vocabulary."""
    # One token less: scoring asks for one new token.
    return SimpleNamespace(vocab_size=float("inf"), max_position_embeddings=target.max_length - 1)
