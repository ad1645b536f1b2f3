"""The arms of the comparison: which engine is asked, and how each request is steered."""

from dataclasses import dataclass
from typing import Any

Steering = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way of asking.

    Attributes:
        grains: asks the engine with the plugin; otherwise one that has never loaded it.
        steering: the requests' steering fields, taken in turn; empty: nobody is steered.
        vectors: how many vectors the catalogue must have.
    """

    grains: bool
    steering: tuple[Steering, ...] = ()
    vectors: int = 1


def _combinations(vectors: int, strengths: int) -> tuple[Steering, ...]:
    """Every (vector, strength) once, neighbours differing in the vector."""
    return tuple(
        {"steering": f"v{vector}", "steering_strength": round(0.05 + 0.01 * strength, 2)}
        for strength in range(strengths)
        for vector in range(vectors)
    )


PLAIN = "plain"
ARMS = {
    PLAIN: Arm(grains=False),
    # The same engine once more: what a ratio looks like when there is no difference.
    "plain again": Arm(grains=False),
    "idle": Arm(grains=True),
    "one": Arm(grains=True, steering=_combinations(1, 1)),
    "16": Arm(grains=True, steering=_combinations(16, 1), vectors=16),
    "256": Arm(grains=True, steering=_combinations(16, 16), vectors=16),
    "256 vectors": Arm(grains=True, steering=_combinations(256, 1), vectors=256),
    "generation": Arm(
        grains=True,
        steering=tuple({**s, "steering_positions": "generation"} for s in _combinations(1, 1)),
    ),
}
DEFAULT = tuple(name for name in ARMS if name != "256 vectors")
