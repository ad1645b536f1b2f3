"""What a reader should know before trusting the page: missing pieces, contradictions, doubts."""

from collections.abc import Mapping, Sequence
from typing import Any

from offline.report.facts import mapping, number
from offline.report.inputs import Result, Subject
from offline.report.results import steered_digests


def notes(subject: Subject, evaluations: Sequence[Result]) -> list[str]:
    """What a reader would miss, in plain words."""
    passport, found = subject.vector.passport, []
    recommended = mapping(passport.get("recommended"))
    swept = bool(subject.sweeps) or bool(mapping(passport.get("sweep")))
    if not swept and not recommended:
        found.append("No sweep in this artifact: nobody has chosen layers and strength.")
    elif not swept:
        found.append("No sweep in this artifact: layers and strength were given, not measured.")
    elif not subject.sweeps:
        found.append("A sweep chose layers and strength; its measurements are not in this report.")
    found += [note for sweep in subject.sweeps if (note := _disagreement(subject, sweep.document))]
    if subject.records is None:
        found.append("No attributions here, so the prompts and their tokens cannot be shown.")
    if not isinstance(passport.get("layers"), list):
        found.append("The passport has no figures per layer.")
    about = [steered_digests(result.document) for result in evaluations]
    if not any(not digests or subject.vector.digest in digests for digests in about):
        found.append("No evaluation here: nothing says what this vector does on test data.")
    gaps = mapping(passport.get("completeness"))
    above = number(gaps.get("above_tolerance"))
    if above:
        found.append(
            f"{above:g} example{'s have' if above > 1 else ' has'} a completeness gap above "
            f"{gaps.get('tolerance')}: scores there are not reliable."
        )
    return found


def evaluation_notes(document: Mapping[str, Any]) -> list[str]:
    """What an evaluation itself says about how far to trust it."""
    provenance = mapping(document.get("provenance"))
    listed = provenance.get("notes")
    found = [str(note) for note in listed] if isinstance(listed, list) else []
    for task, settings in mapping(provenance.get("counts")).items():
        alike: dict[str, list[str]] = {}
        for setting, counts in mapping(settings).items():
            words = [
                f"{count} {what}"
                for what, count in mapping(counts).items()
                if isinstance(count, int) and count
            ]
            if words:
                alike.setdefault(", ".join(words), []).append(setting)
        found += [f"{task}: {words} ({', '.join(names)})" for words, names in alike.items()]
    return found


def _disagreement(subject: Subject, sweep: Mapping[str, Any]) -> str | None:
    """How a sweep's choice differs from what the artifact recommends."""
    if sweep["chosen"] is None:
        return None
    best = sweep["points"][sweep["chosen"]]
    if sweep["vectors"][best["vector"]]["digest"] != subject.vector.digest:
        return f"The sweep chose another vector, '{best['vector']}'."
    recommended = mapping(subject.vector.passport.get("recommended"))
    if all(recommended.get(name) == best[name] for name in ("layers", "strength")):
        return None
    return "What the sweep below chose is not what this artifact recommends."
