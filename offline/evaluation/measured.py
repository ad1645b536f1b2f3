"""What a task finds out about one setting; kept on disk while an evaluation runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from offline.evaluation.confidence import Figure


@dataclass(frozen=True)
class Measured:
    """One figure.

    Attributes:
        ids: the items, in the figure's order; settings are compared item by item.
        higher_is_better: None where neither direction is.
    """

    ids: list[str]
    figure: Figure
    higher_is_better: bool | None


@dataclass(frozen=True)
class Outcome:
    """All figures of a task for one setting, by metric, and counts worth knowing."""

    figures: Mapping[str, Measured]
    counts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Outcome":
        """Reads what `to_json` wrote."""
        return cls(
            {
                metric: Measured(found["ids"], Figure(**found["figure"]), found["higher_is_better"])
                for metric, found in value["figures"].items()
            },
            value["counts"],
        )
