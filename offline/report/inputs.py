"""Which files a report is about, and which of them belong together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grains_vllm.vectors import SteeringVector
from offline.errors import InputError
from offline.report.records import Record, mismatch, read_records
from offline.report.results import EVALUATION, SWEEP, read_result, steered_digests

ARTIFACT, ATTRIBUTIONS, RESULT = ".safetensors", ".jsonl", ".json"


@dataclass(frozen=True)
class Result:
    """A result file: its name, and what it holds."""

    name: str
    document: dict[str, Any]


@dataclass(eq=False)
class Subject:
    """An artifact with what belongs to it.

    Attributes:
        name: the file's name without its ending.
        records: its attributions, or None where there are none.
        sweeps: those that tried this vector.
    """

    name: str
    vector: SteeringVector
    records: list[Record] | None = None
    sweeps: list[Result] = field(default_factory=list)


@dataclass
class Inputs:
    """Everything a page shows. `sweeps` are those that came without any artifact."""

    subjects: list[Subject] = field(default_factory=list)
    sweeps: list[Result] = field(default_factory=list)
    evaluations: list[Result] = field(default_factory=list)
    baselines: list[Result] = field(default_factory=list)


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Reads the given files, and those beside an artifact that are named after it.

    A given file takes the place of one that would be found beside the artifact.

    Raises:
        InputError, ArtifactError: a file cannot be read, or belongs to none of the artifacts.
    """
    paths = list({path.resolve(): path for path in paths}.values())
    for path in paths:
        if path.suffix not in (ARTIFACT, ATTRIBUTIONS, RESULT):
            raise InputError(
                f"{path}: unknown kind of file, expected an artifact ({ARTIFACT}), attributions "
                f"({ATTRIBUTIONS}) or results ({RESULT})"
            )
        if not path.is_file():
            raise InputError(f"{path}: no such file")
    inputs = Inputs()
    artifacts = [path for path in paths if path.suffix == ARTIFACT]
    names = [path.stem for path in artifacts]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"two artifacts are called '{twice[0]}', rename one of them")
    for path in artifacts:
        inputs.subjects.append(Subject(path.stem, SteeringVector.load(path)))
    for path in paths:
        if path.suffix == ATTRIBUTIONS:
            _give_attributions(path, inputs.subjects)
        elif path.suffix == RESULT:
            _give_result(path, inputs, inputs.subjects)
    for path, subject in zip(artifacts, inputs.subjects, strict=True):
        _look_beside(path, subject, inputs)
    return inputs


def _look_beside(path: Path, subject: Subject, inputs: Inputs) -> None:
    attributions = path.with_name(f"{path.stem}.attributions.jsonl")
    if subject.records is None and attributions.is_file():
        _give_attributions(attributions, [subject])
    sweep = path.with_name(f"{path.stem}.sweep.json")
    if not subject.sweeps and sweep.is_file():
        _give_result(sweep, inputs, [subject], SWEEP)
    evaluation = path.with_name(f"{path.stem}.evaluation.json")
    given = {result.name for result in inputs.evaluations}
    if evaluation.name not in given and evaluation.is_file():
        _give_result(evaluation, inputs, [subject], EVALUATION)


def _give_attributions(path: Path, subjects: Sequence[Subject]) -> None:
    records = read_records(path)
    reasons = {subject.name: mismatch(records, subject.vector) for subject in subjects}
    owners = [subject for subject in subjects if reasons[subject.name] is None]
    if not owners:
        raise _stranger(path, (f"'{name}': {reason}" for name, reason in reasons.items()))
    for owner in owners:
        owner.records = records


def _give_result(
    path: Path, inputs: Inputs, subjects: Sequence[Subject], kind: str | None = None
) -> None:
    document = read_result(path)
    result = Result(path.name, document)
    if kind is not None and document["kind"] != kind:
        raise InputError(f"{path.name}: its 'kind' is '{document['kind']}', expected '{kind}'")
    if document["kind"] == EVALUATION:
        digests = steered_digests(document)
        if digests and subjects:
            _owners(path, "steered with", digests, subjects)
        inputs.evaluations.append(result)
    elif document["kind"] != SWEEP:
        inputs.baselines.append(result)
    elif not subjects:
        inputs.sweeps.append(result)
    else:
        tried = {facts["digest"] for facts in document["vectors"].values()}
        for owner in _owners(path, "tried", tried, subjects):
            owner.sweeps.append(result)


def _owners(path: Path, verb: str, digests: set[str], subjects: Sequence[Subject]) -> list[Subject]:
    owners = [subject for subject in subjects if subject.vector.digest in digests]
    if not owners:
        names = ", ".join(sorted(digest[:16] for digest in digests))
        known = (f"'{s.name}' is the vector {s.vector.digest[:16]}" for s in subjects)
        raise _stranger(path, (f"it {verb} {names}", *known))
    return owners


def _stranger(path: Path, reasons: Iterable[str]) -> InputError:
    known = "; ".join(reasons) or "no artifact is given"
    return InputError(f"{path.name}: does not belong to the artifact ({known})")
