"""Several artifacts beside each other."""

from collections.abc import Callable, Sequence

from offline.plot_points import MEASURES
from offline.report import facts
from offline.report.inputs import Subject

Number = Callable[[float | None], str]


def comparison(subjects: Sequence[Subject], number: Number) -> list[tuple[str, list[str]]]:
    """Rows of a label and one text per artifact; `number` writes figures."""
    columns = [_column(subject, number) for subject in subjects]
    return [(label, [column[label] for column in columns]) for label in columns[0]]


def _column(subject: Subject, number: Number) -> dict[str, str]:
    passport, rows = subject.vector.passport, facts.layer_rows(subject)
    gaps = facts.mapping(passport.get("completeness"))
    above = facts.number(gaps.get("above_tolerance"))
    metric = facts.mapping(passport.get("recommended")).get("metric")
    scores = [
        f"{MEASURES.get(name, name)} {number(value)}, base {number(base)}"
        for name, base, value in facts.recommended_scores(passport)
        if name == metric
    ]

    def best(name: str) -> str:
        known = [row[name] for row in rows if row[name] is not None]
        return number(max(known, default=None))

    return {
        **{label: str(value) for label, value in facts.main_facts(subject) if label in _MAIN},
        "Sweep's result": scores[0] if scores else number(None),
        "Median gap": number(facts.number(gaps.get("median"))),
        "Above tolerance": number(None) if above is None else f"{above:g}",
        "Best explained variance": best("explained_variance"),
        "Best stability": best("stability"),
        "Digest": subject.vector.digest[:16],
    }


_MAIN = ("Model", "Method", "Data", "Examples", "Recommended", "Chosen by")
