"""Result files (JSON with a "kind"): sweeps, evaluations, baselines; reading and checking."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offline.errors import InputError
from offline.report.shapes import FLAG, NUMBER, TEXT, WHOLE, Each, Maybe, parse, require

SWEEP, EVALUATION, BASELINES = "grains-sweep", "grains-evaluation", "grains-baselines"
METRICS = ("accuracy", "exact", "margin")
_MEASURES = {
    name: Maybe(NUMBER) for name in ("accuracy", "margin", "exact", "controls", "perplexity")
}
_INTERVAL = {"value": Maybe(NUMBER), "low": Maybe(NUMBER), "high": Maybe(NUMBER)}
_SHAPES: dict[str, Any] = {
    SWEEP: {
        "backend": TEXT,
        "model_id": TEXT,
        "metric": TEXT,
        "limits": Each(Maybe(NUMBER)),
        "data": Each(Maybe({"name": TEXT})),
        "vectors": Each({"digest": TEXT}),
        "base": _MEASURES,
        "points": [
            {
                "vector": TEXT,
                "layers": [WHOLE],
                "strength": NUMBER,
                "positions": TEXT,
                "allowed": FLAG,
                **_MEASURES,
            }
        ],
        "chosen": Maybe(WHOLE),
    },
    EVALUATION: {
        "settings": [TEXT],
        "confidence": NUMBER,
        "tasks": [
            {
                "task": TEXT,
                "metric": TEXT,
                "higher_is_better": Maybe(FLAG),
                "side_effect": FLAG,
                "n": Maybe(WHOLE),
                "values": Each(_INTERVAL),
                "differences": Each(_INTERVAL),
            }
        ],
    },
    BASELINES: {
        "title": TEXT,
        "columns": [{"name": TEXT, "higher_is_better": Maybe(FLAG)}],
        "rows": [
            {
                "method": TEXT,
                "values": Each({"mean": Maybe(NUMBER), "sd": Maybe(NUMBER), "n": Maybe(NUMBER)}),
            }
        ],
    },
}


def read_result(path: Path) -> dict[str, Any]:
    """Reads and checks one result file.

    Raises:
        InputError: naming file and field.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8 text ({error})") from error
    document = parse(text, path.name)
    kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(kind, str) or kind not in _SHAPES:
        known = ", ".join(_SHAPES)
        raise InputError(f"{path.name}: its 'kind' is {kind!r}, expected one of {known}")
    if document.get("version") != 1:
        raise InputError(
            f"{path.name}: its 'version' is {document.get('version')!r}, this release reads 1"
        )
    require(document, _SHAPES[kind], path.name)
    if kind == SWEEP:
        _require_sweep(document, path.name)
    if kind == EVALUATION and not document["settings"]:
        raise InputError(f"{path.name}: 'settings' is empty, expected the base at least")
    return document


def steered_digests(document: Mapping[str, Any]) -> set[str]:
    """The vectors that an evaluation steered with, as far as it says."""
    target = document.get("target")
    steered = target.get("steered") if isinstance(target, Mapping) else None
    facts = steered.values() if isinstance(steered, Mapping) else ()
    digests = (fact.get("digest") for fact in facts if isinstance(fact, Mapping))
    return {digest for digest in digests if isinstance(digest, str)}


def _require_sweep(document: dict[str, Any], where: str) -> None:
    metric, points, chosen = document["metric"], document["points"], document["chosen"]
    if metric not in METRICS:
        raise InputError(f"{where}: 'metric' is {metric!r}, expected one of {', '.join(METRICS)}")
    if not points:
        raise InputError(f"{where}: 'points' is empty, expected one or more")
    if chosen is not None and not 0 <= chosen < len(points):
        raise InputError(f"{where}: 'chosen' is {chosen}, but there are {len(points)} points")
    for number, point in enumerate([document["base"], *points]):
        place = f"points[{number - 1}]" if number else "base"
        if point[metric] is None:
            raise InputError(f"{where}: '{place}.{metric}' is null, but it is the metric")
        if number and not point["layers"]:
            raise InputError(f"{where}: '{place}.layers' is empty, expected one or more")
        if number and point["vector"] not in document["vectors"]:
            raise InputError(f"{where}: '{place}.vector' is not one of 'vectors'")
