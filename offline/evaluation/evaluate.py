"""Base against steered: every task in every setting, then differences with intervals."""

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from grains_vllm import __version__
from offline.errors import InputError
from offline.evaluation.confidence import Bootstrap, Figure
from offline.evaluation.measured import Outcome
from offline.evaluation.target import Setting, Target
from offline.partial import PartialRun

KIND, VERSION = "grains-evaluation", 1
Outcomes = Mapping[tuple[str, str], Outcome]  # by task and setting


class Task(Protocol):
    """Something every setting is measured by.

    Attributes:
        side_effect: what steering should leave alone, as opposed to what it is for.
        facts: JSON-able: which data, how many items were left out, who judged.
    """

    @property
    def name(self) -> str: ...
    @property
    def side_effect(self) -> bool: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...

    def measure(self, target: Target, setting: Setting) -> Outcome:
        """Raises InputError where the server or the data do not allow it."""


def manifest(target: Target, tasks: Sequence[Task]) -> dict[str, Any]:
    """What must agree for a run to go on from another's finished tasks."""
    return {
        "version": __version__,
        "target": dict(target.facts),
        "settings": [setting.name for setting in target.settings],
        "tasks": [{"name": task.name, **task.facts} for task in tasks],
    }


def measure_all(
    target: Target,
    tasks: Sequence[Task],
    partial: PartialRun,
    on_start: Callable[[str, str, bool], None] = lambda task, setting, kept: None,
) -> Outcomes:
    """Every task in every setting; what an interrupted run has finished is not done again.

    Args:
        partial: open; keeps one group per task and setting.
        on_start: told task, setting, and whether an earlier run has done it.
    """
    outcomes: dict[tuple[str, str], Outcome] = {}
    units = [(task, setting) for task in tasks for setting in target.settings]
    for number, (task, setting) in enumerate(units):
        kept = partial.load(number)
        on_start(task.name, setting.name, kept is not None)
        if kept is None:
            outcome = task.measure(target, setting)
            partial.save(number, {}, [outcome.to_json()])
        else:
            outcome = Outcome.from_json(kept[1][0])
        outcomes[task.name, setting.name] = outcome
    return outcomes


def document(
    target: Target,
    tasks: Sequence[Task],
    outcomes: Outcomes,
    bootstrap: Bootstrap,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """The "grains-evaluation" document; its first setting is the base.

    Raises:
        InputError: a figure is not finite, or no item was measured in every setting.
    """
    names = [setting.name for setting in target.settings]
    rows = []
    for task in tasks:
        by_setting = {name: outcomes[task.name, name] for name in names}
        for metric, first in by_setting[names[0]].figures.items():
            figures, count = _aligned(task.name, metric, by_setting)
            base = figures[names[0]]
            rows.append(
                {
                    "task": task.name,
                    "metric": metric,
                    "higher_is_better": first.higher_is_better,
                    "side_effect": task.side_effect,
                    "n": count,
                    "values": {
                        name: asdict(bootstrap.estimate(figure)) for name, figure in figures.items()
                    },
                    "differences": {
                        name: asdict(bootstrap.difference(figure, base))
                        for name, figure in figures.items()
                        if name != names[0]
                    },
                }
            )
    counts = {
        task.name: {name: dict(outcomes[task.name, name].counts) for name in names}
        for task in tasks
        if outcomes[task.name, names[0]].counts
    }
    return {
        "kind": KIND,
        "version": VERSION,
        "created_with": _versions(),
        "target": dict(target.facts),
        "settings": names,
        "tasks": rows,
        "confidence": bootstrap.confidence,
        "provenance": {
            **provenance,
            "bootstrap": {"resamples": bootstrap.resamples, "seed": bootstrap.seed},
            "tasks": {task.name: dict(task.facts) for task in tasks},
            "counts": counts,
        },
    }


def _versions() -> dict[str, str]:
    found = {"grains-vllm": __version__, "python": platform.python_version()}
    for name in ("lm_eval", "scipy", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _aligned(
    task: str, metric: str, outcomes: Mapping[str, Outcome]
) -> tuple[dict[str, Figure], int]:
    """Every setting's figure over the items that all of them have, and their number."""
    found = {name: outcome.figures[metric] for name, outcome in outcomes.items()}
    common = set.intersection(*(set(measured.ids) for measured in found.values()))
    if not common:
        raise InputError(f"task '{task}', {metric}: no item was measured in every setting")
    figures = {}
    for name, measured in found.items():
        kept = sorted((key, place) for place, key in enumerate(measured.ids) if key in common)
        figure = measured.figure
        totals = [figure.totals[place] for _, place in kept]
        weights = figure.weights and [figure.weights[place] for _, place in kept]
        if not all(math.isfinite(value) for value in totals):
            raise InputError(
                f"task '{task}', {metric}, setting '{name}': not all values are finite"
            )
        figures[name] = Figure(totals, weights, figure.perplexity)
    return figures, len(common)
