"""How memory grew while requests came in: what levels off, and what does not."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

MIB = 2**20
# Bytes per step of the engine; vLLM itself gains about 60, see the README.
LIMIT = 512
ENOUGH = 8000  # steps in a quarter; with fewer, a single one of the allocator exceeds the limit


def growth(series: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What every process gained in each quarter of the time.

    A cache that fills gains less and less; a leak gains the same with as many requests.

    Args:
        series: at least two points of `watch`, at equal distances.

    Returns:
        `steps`: of the engine, by quarter; and by process `first` and `last` (MiB), `gained` (MiB
        by kind of memory and quarter) and `bytes_per_step` (by quarter, all kinds; None where the
        engine made no step).
    """
    edges = [series[round(part * (len(series) - 1) / 4)] for part in range(5)]
    steps = _gains([edge["metrics"].get("steps", 0.0) for edge in edges])
    found: dict[str, Any] = {"steps": [round(number) for number in steps]}
    for process in series[0]["mib"]:
        kinds = [edge["mib"][process] for edge in edges]
        totals = [sum(kind.values()) for kind in kinds]
        found[process] = {
            "first": round(totals[0], 1),
            "last": round(totals[-1], 1),
            "gained": {
                name: [round(gain, 1) for gain in _gains([kind[name] for kind in kinds])]
                for name in kinds[0]
            },
            "bytes_per_step": [
                round(MIB * gain / number) if number else None
                for gain, number in zip(_gains(totals), steps, strict=True)
            ],
        }
    return found


def leaks(found: dict[str, Any]) -> list[str]:
    """The processes that went on growing by more than LIMIT, in words.

    Nothing is said of a run with fewer than ENOUGH steps in one of its last two quarters.
    """
    if min(found["steps"][2:]) < ENOUGH:
        return []
    late = {name: of["bytes_per_step"][2:] for name, of in found.items() if name != "steps"}
    return [
        f"the {name} grew by {a} and {b} bytes per step in the last two quarters"
        for name, (a, b) in late.items()
        if min(a, b) > LIMIT
    ]


def _gains(values: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(values)]
