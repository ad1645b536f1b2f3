"""A verification as a table for people and as JSON."""

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from offline.console import stdout
from offline.verification.outcome import FAILED, PASSED, UNKNOWN
from offline.verification.run import Findings

_STYLES = {PASSED: "green", FAILED: "bold red", UNKNOWN: "yellow"}


def show(findings: Findings, console: Console | None = None) -> None:
    """Prints a row per check, and the verdict."""
    console = console or stdout()
    bench = findings.bench
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("check", "vector"):
        table.add_column(column, overflow="fold")
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for outcome in findings.outcomes:
        table.add_row(
            outcome.check, outcome.vector, outcome.verdict, outcome.detail,
            style=_STYLES[outcome.verdict] if outcome.verdict != PASSED else "",
        )  # fmt: skip
    console.print(f"{bench.target.name}: vectors {', '.join(bench.target.vectors)}")
    console.print(table)
    counts = {
        verdict: sum(outcome.verdict == verdict for outcome in findings.outcomes)
        for verdict in _STYLES
    }
    console.print(
        f"{len(bench.prompt)} random prompt tokens. Plain repeats differ by {bench.solo:.1e}, in "
        f"batches by {bench.batch:.1e}: {bench.tolerance:.1e} counts as equal, more than "
        f"{bench.effect:.1e} as an effect."
    )
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def as_json(findings: Findings, seconds: float) -> dict[str, Any]:
    """The same for machines."""
    bench = findings.bench
    return {
        "target": bench.target.name,
        "good": findings.good,
        "checks": [outcome.to_json() for outcome in findings.outcomes],
        "prompt_tokens": len(bench.prompt),
        "plain_repeats_differ": bench.solo,
        "plain_batches_differ": bench.batch,
        "equal_up_to": bench.tolerance,
        "effect_from": bench.effect,
        "seconds": round(seconds, 1),
    }
