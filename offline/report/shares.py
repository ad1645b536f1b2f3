"""How much of an artifact's attributions lies on images, and how much on text."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from offline.report.image_field import image_tokens
from offline.report.records import Record

IMAGE, TEXT, REST = "image", "text", "other text"


@dataclass(frozen=True)
class Shares:
    """Means over the prompts with an image, per kind of token that any of them has.

    Attributes:
        prompts: how many have an image.
        absolute: share of the sum of |scores|.
        total: sum of scores, in nats.
        plus, minus: tokens in T+ and T-.
    """

    prompts: int
    tokens: dict[str, float]
    absolute: dict[str, float]
    total: dict[str, float]
    plus: dict[str, float]
    minus: dict[str, float]


def shares(records: Sequence[Record]) -> Shares | None:
    """The means, or None if no record has an image."""
    records = [record for record in records if record.get("image") is not None]
    if not records:
        return None
    kinds = [_kinds(record) for record in records]
    shown = [kind for kind in (IMAGE, TEXT, REST) if any(kind in found for found in kinds)]
    counted: dict[str, dict[str, float]] = {}
    for name in ("tokens", "absolute", "total", "plus", "minus"):
        rows = [_row(name, record, found) for record, found in zip(records, kinds, strict=True)]
        counted[name] = {kind: fmean(row.get(kind, 0.0) for row in rows) for kind in shown}
    return Shares(prompts=len(records), **counted)


def _kinds(record: Record) -> list[str]:
    """Of every token; other text cannot be chosen: template, special, or not asked for."""
    flags = zip(image_tokens(record), record["eligible"], strict=True)
    return [IMAGE if image else TEXT if eligible else REST for image, eligible in flags]


def _row(name: str, record: Record, kinds: Sequence[str]) -> dict[str, float]:
    """One prompt's sums per kind."""
    scores, found = record["scores"], dict.fromkeys(kinds, 0.0)
    if name in ("plus", "minus"):
        for position in record["positive" if name == "plus" else "negative"]:
            found[kinds[position]] += 1
        return found
    for score, kind in zip(scores, kinds, strict=True):
        found[kind] += 1 if name == "tokens" else abs(score) if name == "absolute" else score
    whole = sum(found.values())
    if name != "absolute" or not whole:
        return found
    return {kind: value / whole for kind, value in found.items()}
