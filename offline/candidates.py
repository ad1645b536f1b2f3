"""The vectors that a sweep compares: artifacts, and variants made of kept deltas."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from grains_vllm.vectors import SteeringVector
from offline.errors import InputError
from offline.imports import OWN_LENGTHS
from offline.options import Direction, Mode

ESTIMATORS = "mean,pca,positive"


def load(
    artifacts: Sequence[Path],
    deltas: Path | None,
    estimators: str | None,
    on_note: Callable[[str], None] = lambda note: None,
) -> dict[str, SteeringVector]:
    """Vectors by name: an artifact's file name, an estimator as it is written.

    Args:
        estimators: a direction, a mode, or both (`pca:positive`), joined by commas.

    Raises:
        InputError, ArtifactError: naming the file or option.
    """
    found: dict[str, SteeringVector] = {}
    for path in artifacts:
        if path.stem in found:
            raise InputError(f"two artifacts are called '{path.stem}', rename one of them")
        found[path.stem] = SteeringVector.load(path)
    if deltas is None:
        if estimators is not None:
            raise InputError("--estimators makes vectors of --deltas, which is missing")
        return _alike(found)
    from offline.kept_deltas import load as load_deltas

    kept = load_deltas(deltas)
    digests = {vector.digest: name for name, vector in found.items()}
    for part in (part.strip() for part in (estimators or ESTIMATORS).split(",")):
        vector = kept.vector(*_estimator(part, estimators or ESTIMATORS))
        if part in found:
            raise InputError(f"two vectors are called '{part}', rename the artifact")
        if vector.digest in digests:
            on_note(f"'{part}' is the same vector as '{digests[vector.digest]}'")
            continue
        digests[vector.digest] = part
        found[part] = vector
    return _alike(found)


def facts(vector: SteeringVector) -> dict[str, Any]:
    """What a table says about a vector."""
    options = vector.passport.get("options")
    options = options if isinstance(options, dict) else {}
    return {
        "digest": vector.digest,
        "method": vector.passport.get("method"),
        "direction": options.get("direction"),
        "mode": options.get("mode"),
    }


def imported(vectors: Mapping[str, SteeringVector]) -> list[str]:
    """Those of which a strength of 1 is an imported length, and not the usual ||h||."""
    return [
        name
        for name, vector in vectors.items()
        if vector.passport.get("strength_unit") == OWN_LENGTHS
    ]


def factor(vector: SteeringVector, usual_norms: Sequence[float]) -> float:
    """How many of the vector's own lengths the usual ||h|| is: the median over its layers."""
    ratios = [
        usual_norms[layer] / float(vector.reference_norms[layer])
        for layer in vector.layers
        if vector.reference_norms[layer] > 0
    ]
    return float(f"{median(ratios):.3g}")


def _estimator(part: str, text: str) -> tuple[Direction, Mode]:
    direction, mode = Direction.mean, Mode.contrast
    for word in part.split(":"):
        if word in {choice.value for choice in Direction}:
            direction = Direction(word)
        elif word in {choice.value for choice in Mode}:
            mode = Mode(word)
        else:
            known = ", ".join(choice.value for choice in (*Direction, *Mode))
            raise InputError(
                f"--estimators is '{text}', expected some of {known}, or two such as pca:positive"
            )
    return direction, mode


def _alike(vectors: dict[str, SteeringVector]) -> dict[str, SteeringVector]:
    if not vectors:
        raise InputError("name an artifact to sweep, or --deltas to make vectors of")
    first = next(iter(vectors.values()))
    for name, vector in vectors.items():
        vector.model.require(first.model, f"'{name}' (unlike the first vector)")
    return vectors
