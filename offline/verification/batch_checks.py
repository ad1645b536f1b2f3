"""Requests of one batch: each gets its own steering, as if it were alone."""

from collections.abc import Iterator, Sequence

from offline.verification.bench import SLACK, Bench
from offline.verification.outcome import UNKNOWN, Outcome, judged
from offline.verification.probes import NONE, Probe, gap

MOST = 12  # probes


def check_batch(bench: Bench, strengths: Sequence[tuple[str, float]]) -> Iterator[Outcome]:
    """Asks for plain and steered requests at once, and for each of them alone.

    Args:
        strengths: vectors, each with the strength to ask for.
    """
    steered = [
        {"steering": name, "steering_strength": factor * strength, "steering_positions": places}
        for factor, places in ((1, "all"), (-1, "all"), (0.5, "prompt"))
        for name, strength in strengths
    ][: MOST - 2]
    fields = [NONE, *steered, NONE]
    # A few tokens fewer each, so that their borders lie at different places of the batch.
    probes = [
        Probe(bench.prompt[: len(bench.prompt) - 3 * number], asked)
        for number, asked in enumerate(fields)
    ]
    alone = bench.target.ask(probes)
    together = bench.target.ask(probes, together=True)
    plain = [Probe(probe.tokens, NONE) for probe in probes]
    plain_alone = bench.target.ask(plain)
    plain_together = bench.target.ask(plain, together=True)
    check = "a mixed batch equals its requests alone"
    noise = max(map(gap, plain_alone, plain_together))
    effect = min(map(gap, alone[1:-1], plain_alone[1:-1]))
    if effect <= max(10 * SLACK * noise, bench.effect):
        why = f"one of the steerings changes {effect:.1e} only, a batch by itself {noise:.1e}"
        yield Outcome(check, "", UNKNOWN, why)
        return
    found = max(map(gap, alone, together))
    # A row that gets another one's steering is off by about the effect.
    # It is infinite where the likeliest tokens are all others; a nat is large, too.
    allowed = max(SLACK * noise, min(effect, 1.0) / 1000)
    words = "identical bits" if found == 0 else f"within {found:.1e}"
    yield judged(
        check, "", found <= allowed,
        f"{len(probes)} requests: {words}; {allowed:.1e} allowed, the smallest effect {effect:.2g}",
    )  # fmt: skip
