"""One vector: does it fire, does nothing else, and does its strength mean what it says?"""

from collections.abc import Iterator
from dataclasses import replace

from grains_vllm.positions import IMAGE
from offline.verification.bench import FLOOR, Bench
from offline.verification.outcome import FAILED, PASSED, UNKNOWN, Outcome, judged
from offline.verification.probes import NONE, Reading

ASSUMED_STRENGTH = 0.2  # where no receipt says the vector's own
NO_IMAGE = "it steers image tokens only, of which a prompt of text has none"
_FRACTIONS = (1.0, 0.1, 0.01, 0.001)
_OPPOSITE, _ALIKE = -0.8, 0.5  # cosines; rounding in half precision lies around 0


def strength_of(reading: Reading, vector: str) -> float:
    """The vector's own strength, as its receipt says, else an assumption."""
    for term in (reading.receipt or {}).get("vectors", ()):
        if term.get("name") == vector and term.get("strength"):
            return float(term["strength"])
    return ASSUMED_STRENGTH


def steers_nothing(reading: Reading, vector: str) -> bool:
    """Whether the receipt says that a vector has positions of which a prompt of text has none."""
    terms = (reading.receipt or {}).get("vectors", ())
    return any(term.get("name") == vector and term.get("positions") == IMAGE for term in terms)


def check_vector(bench: Bench, vector: str) -> Iterator[Outcome]:
    """Yields an outcome per check."""
    named = bench.read({"steering": vector})
    fired, check = named, "steering fires"
    if bench.target.has_aliases:
        fired, check = bench.read({}, alias=vector), "steering fires (alias)"
    if steers_nothing(named, vector):
        yield Outcome(check, vector, UNKNOWN, NO_IMAGE)
    else:
        yield judged(check, vector, *bench.differs(fired, bench.plain))
    if bench.target.has_aliases:
        yield judged("alias equals request fields", vector, *bench.same(fired, named))
    zero = bench.read({"steering": vector, "steering_strength": 0})
    yield judged("strength 0 equals plain", vector, *bench.same(zero, bench.plain))
    yield from _signs(bench, vector, strength_of(named, vector))
    yield _generation(bench, vector, strength_of(named, vector))
    after = bench.read(NONE)
    yield judged("plain after steered traffic", vector, *bench.same(after, bench.plain))


def _signs(bench: Bench, vector: str, strength: float) -> Iterator[Outcome]:
    """+s against -s; and, where s is small enough for it, whether they are opposites."""

    def read(value: float) -> Reading:
        return bench.read(
            {"steering": vector, "steering_strength": value, "steering_positions": "all"}, answer=1
        )

    tried, cosine = 1.0, 0.0
    for fraction in _FRACTIONS:
        up, down = read(fraction * strength), read(-fraction * strength)
        if fraction == 1:
            yield judged("+s and -s differ", vector, *bench.differs(up, down))
        effects = [
            [new - old for new, old in zip(reading.prompt, bench.plain.prompt, strict=True)]
            for reading in (up, down)
        ]
        smallest = min(max(abs(value) for value in effect) for effect in effects)
        if smallest <= max(bench.effect, 20 * FLOOR):
            break
        tried, cosine = fraction, _cosine(*effects)
        if cosine < _OPPOSITE:
            break
    words = f"cosine of their effects {cosine:.3f} at {tried:g} s"
    if cosine < _OPPOSITE:
        verdict = PASSED
    elif tried <= 0.01 and cosine > _ALIKE:
        verdict = FAILED
    else:
        verdict, words = UNKNOWN, f"{words}; smaller effects drown in rounding"
    yield Outcome("small +s and -s are opposites", vector, verdict, words)


def _cosine(one: list[float], other: list[float]) -> float:
    lengths = [sum(value * value for value in effect) ** 0.5 for effect in (one, other)]
    return sum(a * b for a, b in zip(one, other, strict=True)) / (lengths[0] * lengths[1])


def _generation(bench: Bench, vector: str, strength: float) -> Outcome:
    """Positions: the prompt keeps its scores, the answer does not."""
    check = "positions: generation only"
    found = bench.read(
        {"steering": vector, "steering_strength": strength, "steering_positions": "generation"}
    )
    # The first generated token is chosen where the prompt ends, so it belongs to the prompt.
    same, words = bench.same(_first(found), _first(bench.plain))
    if not same:
        return judged(check, vector, False, f"prompt {words}")
    if found.answer[0][0] != bench.plain.answer[0][0]:
        return Outcome(check, vector, UNKNOWN, f"prompt: {words}; the answers' starts differ")
    differ, effect = bench.differs(found, bench.plain)
    return judged(check, vector, differ, f"prompt: {words}; answer: {effect}")


def _first(reading: Reading) -> Reading:
    return replace(reading, answer=reading.answer[:1])


def check_two(bench: Bench, vectors: tuple[str, str]) -> Iterator[Outcome]:
    """Two vectors in one request: neither of the two alone, and in either order the same."""
    both, turned, first, second = (
        bench.read({"steering": names, "steering_positions": "all"})
        for names in (",".join(vectors), ",".join(reversed(vectors)), *vectors)
    )
    name = "+".join(vectors)
    good, words = bench.differs(both, first)
    also, more = bench.differs(both, second)
    yield judged("two vectors in one request", name, good and also, f"{words} and {more}")
    yield judged("their order does not matter", name, *bench.same(both, turned))
