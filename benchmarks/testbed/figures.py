"""What attribution found, from an extraction's records."""

from collections.abc import Callable
from statistics import median

import torch

from offline.passport import Record
from offline.selection import select


def hit_rates(
    records: list[Record], planted: Callable[[list[str]], tuple[set[int], set[int]]]
) -> dict[str, float]:
    """Shares of examples whose strongest token, or one of whose three strongest, is a planted cue;
    of each sign, over the examples that hold such a cue."""
    hits: dict[str, list[bool]] = {}
    for record in records:
        chosen = select(torch.tensor(record["scores"]), record["eligible"], 3)
        for sign, tokens, cues in zip(
            ("positive", "negative"), chosen, planted(record["tokens"]), strict=True
        ):
            if cues:
                hits.setdefault(f"{sign}_top1", []).append(bool(cues & set(tokens[:1])))
                hits.setdefault(f"{sign}_top3", []).append(bool(cues & set(tokens)))
    return {name: sum(found) / len(found) for name, found in hits.items()}


def completeness(records: list[Record]) -> dict[str, float | None]:
    """Median and largest gap, and the points that the median example took."""
    gaps = [record["gap"] for record in records if record["gap"] is not None]
    return {
        "gap_median": median(gaps) if gaps else None,
        "gap_max": max(gaps) if gaps else None,
        "points_median": median(record["points"] for record in records),
    }
