"""What is measured on a preference file, on texts and on controls, by log-likelihood alone."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from offline.endpoint_scorer import score_items
from offline.evaluation.chats import prompt_tokens, score_answers
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

    side_effect = False

    def __init__(
        self, name: str, pairs: PairSet, facts: Mapping[str, Any], progress: Progress
    ) -> None:
        self.name, self.facts = name, facts
        self._pairs, self._progress = pairs, progress
        self._shown = [pair for pair in pairs.pairs if pair.picture is not None]
        self._prompts: list[list[int]] | None = None  # of those with a picture, in any setting

    def measure(self, target: Target, setting: Setting) -> Outcome:
        texts = [pair for pair in self._pairs.pairs if pair.picture is None]
        suite = load_suite(
            replace(self._pairs, pairs=texts),
            target.tokenizer,
            _config(target),
            processor=target.processor,
        ).suite
        scores = _score(target, setting, suite.items, self._progress) if texts else []
        of_texts = iter(pair_margins(suite, scores))
        of_shown = iter(self._margins(target, setting) if self._shown else [])
        margins = [
            next(of_texts if pair.picture is None else of_shown) for pair in self._pairs.pairs
        ]
        # Their place: ids may be given twice.
        ids = numbered(len(margins))
        return Outcome(
            {
                "accuracy": Measured(ids, Figure([float(m > 0) for m in margins]), True),
                "margin": Measured(ids, Figure(margins), True),
            }
        )

    def _margins(self, target: Target, setting: Setting) -> list[float]:
        """Of the pairs with a picture."""
        known, endpoint = self._prompts, target.endpoint
        with self._progress(len(self._shown) * (3 if known is None else 2)) as advance:
            if known is None:
                model = target.settings[0].model
                known = self._prompts = prompt_tokens(endpoint, model, self._shown, advance)
            asked = [
                (pair, answer, prompt)
                for pair, prompt in zip(self._shown, known, strict=True)
                for answer in (pair.chosen, pair.rejected)
            ]
            scores = score_answers(endpoint, asked, setting, advance)
        means = [score.logp / score.tokens for score in scores]
        return [chosen - rejected for chosen, rejected in zip(means[::2], means[1::2], strict=True)]


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
            _NO_PAIRS,
            target.tokenizer,
            _config(target),
            controls=self._controls,
            chat=self._chat,
            processor=target.processor,
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
