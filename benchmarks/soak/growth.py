"""How memory grew while requests came in: what levels off, and what does not."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

# MiB per 1,000 requests. What vLLM itself gains for good is a fifth of this, see the README.
LIMIT = 0.5
ENOUGH = 4000  # requests in a quarter; with fewer, one step of the allocator exceeds the limit


def growth(series: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What every process gained in each quarter of the time.

    A cache that fills gains less and less; a leak gains the same with as many requests.

    Args:
        series: at least two points of `watch`, at equal distances.

    Returns:
        `requests`: finished ones, by quarter; and by process `first` and `last` (MiB), `gained`
        (MiB by kind of memory and quarter) and `per_1000_requests` (MiB by quarter, all kinds; None
        where no request finished).
    """
    edges = [series[round(part * (len(series) - 1) / 4)] for part in range(5)]
    finished = [edge["metrics"].get("finished", 0.0) for edge in edges]
    requests = _steps(finished)
    found: dict[str, Any] = {"requests": [round(number) for number in requests]}
    for process in series[0]["mib"]:
        kinds = [edge["mib"][process] for edge in edges]
        totals = [sum(kind.values()) for kind in kinds]
        found[process] = {
            "first": round(totals[0], 1),
            "last": round(totals[-1], 1),
            "gained": {
                name: [round(step, 1) for step in _steps([kind[name] for kind in kinds])]
                for name in kinds[0]
            },
            "per_1000_requests": [
                round(1000 * step / number, 3) if number else None
                for step, number in zip(_steps(totals), requests, strict=True)
            ],
        }
    return found


def leaks(found: dict[str, Any]) -> list[str]:
    """The processes that went on growing by more than LIMIT, in words.

    Nothing is said of a run with fewer than ENOUGH requests in one of its last two quarters.
    """
    if min(found["requests"][2:]) < ENOUGH:
        return []
    late = {name: of["per_1000_requests"][2:] for name, of in found.items() if name != "requests"}
    return [
        f"the {name} grew by {a:g} and {b:g} MiB per 1,000 requests in the last two quarters"
        for name, (a, b) in late.items()
        if min(a, b) > LIMIT
    ]


def _steps(values: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(values)]
