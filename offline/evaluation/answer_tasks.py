"""What is measured on generated answers: their form, and what a judge says of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from offline.evaluation.answers import Answers
from offline.evaluation.confidence import Figure
from offline.evaluation.endpoint_tasks import numbered
from offline.evaluation.judge import Judge, Rubric
from offline.evaluation.measured import Measured, Outcome
from offline.evaluation.target import BASE, Setting, Target
from offline.evaluation.text_statistics import distinct

_NS = (1, 2, 3)


class DistinctTask:
    """Repetition (distinct-1, -2, -3 of each answer) and length in tokens."""

    name, side_effect = "distinct", True

    def __init__(self, answers: Answers, facts: Mapping[str, Any]) -> None:
        self.facts = facts
        self._answers = answers

    def measure(self, target: Target, setting: Setting) -> Outcome:
        answers = self._answers.of(target, setting)
        ids = numbered(len(answers))
        figures = {
            f"distinct-{n}": Measured(ids, Figure([distinct(a.text, n) for a in answers]), True)
            for n in _NS
        }
        lengths = Figure([float(answer.tokens) for answer in answers])
        figures["answer tokens"] = Measured(ids, lengths, None)
        return Outcome(figures, {"cut": sum(answer.cut for answer in answers)})


class JudgedTask:
    """What a judge says: a verdict per answer, or the win rate of the setting over the base.

    A win rate is asked for in both orders, and counts where both verdicts can be read; the base
    has 0.5 by definition.

    Attributes:
        by: the prompts' fact by whose values the figures are also counted apart.
    """

    side_effect = False

    def __init__(
        self,
        name: str,
        answers: Answers,
        rubric: Rubric,
        judge: Judge,
        facts: Mapping[str, Any],
        by: str | None = None,
    ) -> None:
        self.name, self.by = name, by
        self.facts = {**facts, **judge.facts, **rubric.facts}
        self._answers, self._rubric, self._judge = answers, rubric, judge

    def measure(self, target: Target, setting: Setting) -> Outcome:
        if not self._rubric.compares:
            own = self._answers.of(target, setting)
            return self._outcome(self._ask([{"answer": answer.text} for answer in own]))
        if setting.name == BASE:
            return self._outcome([0.5] * len(self._answers.prompts))
        bases = self._answers.of(target, target.settings[0])
        pairs = list(zip(bases, self._answers.of(target, setting), strict=True))
        ahead = self._ask([{"first": own.text, "second": base.text} for base, own in pairs])
        behind = self._ask([{"first": base.text, "second": own.text} for base, own in pairs])
        unread = sum(score is None for score in (*ahead, *behind))
        scores = [
            None if a is None or b is None else (a + 1 - b) / 2
            for a, b in zip(ahead, behind, strict=True)
        ]
        return self._outcome(scores, unread)

    def _ask(self, shown: Sequence[dict[str, str]]) -> list[float | None]:
        cases = [
            {"question": prompt.question, **prompt.facts, **texts}
            for prompt, texts in zip(self._answers.prompts, shown, strict=True)
        ]
        pictures = [prompt.pair.picture for prompt in self._answers.prompts]
        with self._answers.progress(len(cases)) as advance:
            return self._judge.ask(self._rubric, cases, pictures, advance)

    def _outcome(self, scores: Sequence[float | None], unread: int | None = None) -> Outcome:
        ids = numbered(len(scores))
        read = {key: score for key, score in zip(ids, scores, strict=True) if score is not None}
        figures = {
            metric: Measured(list(read), Figure(list(values)), higher)
            for metric, (values, higher) in self._figures(list(read.values())).items()
        }
        counts: dict[str, Any] = {"unparsed": len(scores) - len(read) if unread is None else unread}
        if self.by is not None:
            counts[f"by {self.by}"] = self._apart(self.by, scores)
        return Outcome(figures, counts)

    def _figures(self, scores: Sequence[float]) -> dict[str, tuple[list[float], bool]]:
        found = [self._rubric.figures(score) for score in scores]
        return {
            metric: ([one[metric][0] for one in found], higher)
            for metric, (_, higher) in self._rubric.figures(0.0).items()
        }

    def _apart(self, by: str, scores: Sequence[float | None]) -> dict[str, dict[str, Any]]:
        """Number of verdicts and means by the prompts' kind."""
        kinds: dict[str, list[float]] = {}
        for prompt, score in zip(self._answers.prompts, scores, strict=True):
            kinds.setdefault(str(prompt.facts[by]), []).extend([] if score is None else [score])
        return {
            kind: {
                "n": len(found),
                **{
                    metric: sum(values) / len(values)
                    for metric, (values, _) in self._figures(found).items()
                    if values
                },
            }
            for kind, found in sorted(kinds.items())
        }
