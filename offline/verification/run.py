"""All checks of one target, in an order that lets later ones notice what earlier ones left."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from offline.errors import InputError
from offline.verification.batch_checks import check_batch
from offline.verification.bench import Bench, prepare
from offline.verification.cache_checks import check_cache
from offline.verification.outcome import FAILED, UNKNOWN, Outcome, judged
from offline.verification.probes import NotAnswered, Target
from offline.verification.receipt_checks import check_plain_receipt, check_receipts
from offline.verification.steering_checks import check_two, check_vector, strength_of


@dataclass(frozen=True)
class Findings:
    """Outcomes, and the yardstick that they were measured with."""

    outcomes: list[Outcome]
    bench: Bench

    @property
    def good(self) -> bool:
        return all(outcome.verdict != FAILED for outcome in self.outcomes)


def verify(
    target: Target,
    vectors: Sequence[str],
    digests: Mapping[str, str],
    more: Callable[[Bench, Mapping[str, float]], Iterator[tuple[str, Iterable[Outcome]]]],
) -> Findings:
    """Runs what every target is checked for, then `more`.

    Args:
        vectors: which to check, at least one.
        digests: of artifacts that the server ought to have, by vector.
        more: the target's own checks, by title, given the bench and each vector's strength.

    Raises:
        InputError: the target refuses even what it is compared with.
    """
    try:
        bench = prepare(target)
        strengths = {
            name: strength_of(bench.read({"steering": name}, answer=1), name) for name in vectors
        }
    except NotAnswered as error:
        raise InputError(f"{target.name} cannot be verified: it says {error}") from error
    outcomes = _run("plain", "", _repeats(bench, "plain requests repeat"))
    for name in vectors:
        strength = strengths[name]
        outcomes += _run("steering", name, check_vector(bench, name))
        outcomes += _run("cache", name, check_cache(bench, name, strength))
        outcomes += _run("receipt", name, check_receipts(bench, name, strength, digests.get(name)))
    outcomes += _run("receipt", "", check_plain_receipt(bench))
    for pair in list(pairwise(vectors))[:1]:
        try:
            outcomes += list(check_two(bench, pair))
        except NotAnswered as error:
            why = f"refused: {error}"
            outcomes.append(Outcome("two vectors in one request", "+".join(pair), UNKNOWN, why))
    outcomes += _run("batch", "", check_batch(bench, list(strengths.items())))
    for title, checks in more(bench, strengths):
        outcomes += _run(title, "", checks)
    outcomes += _run("plain", "", _repeats(bench, "plain requests at last"))
    return Findings(outcomes, bench)


def _repeats(bench: Bench, check: str) -> Iterator[Outcome]:
    yield judged(check, "", *bench.same(bench.plain, bench.read()))


def _run(title: str, vector: str, checks: Iterable[Outcome]) -> list[Outcome]:
    """What the checks found; a request that is refused in between has failed."""
    found: list[Outcome] = []
    try:
        for outcome in checks:
            found.append(outcome)
    except NotAnswered as error:
        found.append(judged(f"{title}: a request was refused", vector, False, str(error)))
    return found
