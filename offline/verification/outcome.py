"""What a check found."""

from dataclasses import asdict, dataclass
from typing import Any

PASSED, FAILED, UNKNOWN = "passed", "failed", "not checkable"


@dataclass(frozen=True)
class Outcome:
    """One row of the report.

    Attributes:
        vector: which vector it is about; empty for the server as a whole.
        verdict: PASSED, FAILED or UNKNOWN.
        detail: the figures, or why nothing can be said.
    """

    check: str
    vector: str
    verdict: str
    detail: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judged(check: str, vector: str, good: bool, detail: str) -> Outcome:
    """Passed or failed."""
    return Outcome(check, vector, PASSED if good else FAILED, detail)
