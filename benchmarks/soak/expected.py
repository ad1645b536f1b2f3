"""What a right answer and its receipt look like, worked out here once more."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.soak.asks import Ask, Wish, span
from benchmarks.soak.client import Answer
from benchmarks.soak.world import Vector, World


@dataclass(frozen=True)
class Part:
    """One vector's part in an answer; tokens start <= p < end are shifted."""

    vector: Vector
    strength: float
    positions: str
    layers: tuple[int, ...]
    start: int
    end: float

    def steers(self, position: int) -> bool:
        return self.start <= position < self.end


def parts(ask: Ask, prompt: int, guest: Vector | None, world: World) -> list[Part]:
    """The vectors of a request whose prompt has `prompt` tokens."""
    border = prompt if ask.border is None else ask.border
    return [_part(wish, world.vectors.get(wish.name, guest), border) for wish in ask.wishes]


def _part(wish: Wish, vector: Vector | None, border: int) -> Part:
    if vector is None:
        raise KeyError(wish.name)
    positions = wish.positions or vector.positions
    before, after = span(positions)
    return Part(
        vector=vector,
        strength=vector.strength if wish.strength is None else wish.strength,
        positions=positions,
        layers=wish.layers or vector.layers,
        start=0 if before is None else max(0, border - before),
        end=float("inf") if after is None else border + after,
    )


def steered(found: Iterable[Part], positions: Iterable[int]) -> int:
    """How many of these positions are shifted by at least one vector."""
    found = list(found)
    return sum(any(part.steers(position) for part in found) for position in positions)


def receipt_problem(ask: Ask, answer: Answer, world: World, guests: list[Vector]) -> str | None:
    """What is wrong with a complete answer's receipt.

    Args:
        guests: the vectors that may have had the guest's name meanwhile.
    """
    if not ask.wishes:
        return None if not _steered(answer.receipt) else f"steered unasked: {answer.receipt}"
    if answer.receipt is None:
        return "no receipt"
    problem = "the name of the guest, but no guest"
    candidates: list[Vector | None] = [*guests] or [None]
    for guest in candidates:
        try:
            wanted = _wanted(parts(ask, len(answer.prompt), guest, world), answer)
        except KeyError:
            continue
        if (problem := _difference(answer.receipt, wanted)) == "":
            return None
    return problem


def _steered(receipt: dict[str, Any] | None) -> bool:
    return bool(receipt and (receipt.get("steered") or receipt.get("vectors")))


def _wanted(found: list[Part], answer: Answer) -> dict[str, Any]:
    length = len(answer.prompt)
    return {
        "steered": True,
        "source": "request",
        "vectors": {
            (
                part.vector.name,
                part.vector.digest[:12],
                part.strength,
                span(part.positions),
                part.layers,
            )
            for part in found
        },
        "prompt_tokens": steered(found, range(length)),
        # The last token of an answer is never fed back, so that nothing was shifted for it.
        "generated_tokens": steered(found, range(length, length + len(answer.tokens) - 1)),
    }


def _difference(receipt: dict[str, Any], wanted: dict[str, Any]) -> str:
    try:
        vectors = {
            (v["name"], v["digest"], v["strength"], span(v["positions"]), tuple(v["layers"]))
            for v in receipt["vectors"]
        }
        if vectors != wanted["vectors"]:
            return f"vectors {receipt['vectors']}, wanted {wanted['vectors']}"
    except (KeyError, TypeError, ValueError) as error:
        return f"receipt {receipt}: {error!r}"
    for name in ("steered", "source", "prompt_tokens", "generated_tokens"):
        if receipt.get(name) != wanted[name]:
            return f"{name} is {receipt.get(name)!r}, wanted {wanted[name]!r}"
    return ""


def guest_of(answer: Answer, world: World) -> Vector | None:
    """Which guest an answer's receipt names."""
    for vector in (answer.receipt or {}).get("vectors", []):
        for guest in world.guests:
            if guest.name == vector["name"] and guest.digest.startswith(vector["digest"]):
                return guest
    return None
