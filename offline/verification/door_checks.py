"""What only a server has: refusals before an answer begins, streams, a default for everybody."""

from collections.abc import Iterator
from typing import Any

from offline.verification.bench import Bench
from offline.verification.http_target import HttpTarget
from offline.verification.outcome import Outcome, judged
from offline.verification.probes import Probe

NOBODY = "no-such-vector"
_BAD: dict[str, tuple[dict[str, Any], str | None]] = {
    "unknown vector": ({"steering": NOBODY}, None),
    "unknown alias": ({}, NOBODY),
    "strength that is no number": ({"steering": "{vector}", "steering_strength": "strong"}, None),
    "misspelt field": ({"steering": "{vector}", "steering_strenght": 1}, None),
}


def check_refusals(target: HttpTarget, bench: Bench, vector: str) -> Iterator[Outcome]:
    """Bad requests are HTTP 400 with a reason, streaming too."""
    for what, (fields, alias) in _BAD.items():
        asked = {
            name: value.format(vector=vector) if isinstance(value, str) else value
            for name, value in fields.items()
        }
        probe = Probe(bench.prompt[:8], asked, alias, scored=False, answer=1)
        found = {
            way: target.refusal(probe, stream)
            for way, stream in (("at once", False), ("streaming", True))
        }
        words = ", ".join(
            f"{way}: {'accepted' if refusal is None else refusal.status}"
            for way, refusal in found.items()
        )
        good = all(refusal is not None and refusal.status == 400 for refusal in found.values())
        yield judged(f"refused: {what}", "", good, words)


def check_stream(target: HttpTarget, bench: Bench, vector: str) -> Iterator[Outcome]:
    """A streamed answer by alias is the one that comes at once, receipt included."""
    probe = Probe(bench.prompt, {}, vector, scored=False)
    whole, streamed = target.ask([probe])[0], target.stream(probe)
    good, words = bench.same(whole, streamed)
    if good and len(streamed.answer) != len(whole.answer):
        good, words = False, f"{len(streamed.answer)} tokens instead of {len(whole.answer)}"
    if good and streamed.receipt != whole.receipt:
        good, words = False, f"receipt: {streamed.receipt} instead of {whole.receipt}"
    yield judged("streaming gives the same answer", vector, good, words)


def check_default(target: HttpTarget, bench: Bench) -> Iterator[Outcome]:
    """Requests that say nothing are plain, or say that they are not."""
    reading = target.ask([Probe(bench.prompt)])[0]
    check = "requests without steering fields"
    if reading.receipt and reading.receipt.get("steered"):
        names = ", ".join(str(term.get("name")) for term in reading.receipt.get("vectors", ()))
        words = f"steered by the server's {reading.receipt.get('source')}: {names}"
        differ, how = bench.differs(reading, bench.plain)
        yield judged(check, "", differ, f"{words}; {how}")
        return
    good, words = bench.same(reading, bench.plain)
    yield judged(check, "", good, words if good else f"{words}, and no receipt says why")
