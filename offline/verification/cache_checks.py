"""The prefix cache: shared by what is equal, and by nothing else."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from offline.verification.bench import SLACK, Bench, fresh_salt
from offline.verification.outcome import UNKNOWN, Outcome, judged
from offline.verification.probes import NONE, Probe, Reading, gap


def check_cache(bench: Bench, vector: str, strength: float) -> Iterator[Outcome]:
    """Yields what cached-token counts say, if there are any, and what the answers say."""
    salt = fresh_salt()
    steered = {"steering": vector, "steering_strength": strength, "steering_positions": "all"}

    def read(fields: Mapping[str, Any], salt: str = salt) -> Reading:
        probe = Probe(bench.prompt, fields, scored=False, answer=2, salt=salt)
        return bench.target.ask([probe])[0]

    plain, again = read(NONE), read(NONE)
    first, second = read(steered), read(steered)
    other = read({**steered, "steering_strength": strength / 2})
    generation = read({**steered, "steering_positions": "generation"})
    yield from _counts(vector, plain, again, first, second, other, generation)
    # What the counts cannot show: that an answer is the one that a cold cache would have given.
    cold = read(steered, fresh_salt())
    yield from _answers(bench, vector, plain, again, first, cold)


def _counts(
    vector: str,
    plain: Reading,
    again: Reading,
    first: Reading,
    second: Reading,
    other: Reading,
    generation: Reading,
) -> Iterator[Outcome]:
    check = "cached tokens tell steerings apart"
    shared = "generation-only shares the prompt's cache"
    if again.cached is None:
        for name in (check, shared):
            why = "the server does not report cached tokens (--enable-prompt-tokens-details)"
            yield Outcome(name, vector, UNKNOWN, why)
        return
    if again.cached == 0:
        for name in (check, shared):
            why = "not even plain repeats are cached: no prefix caching, or blocks are too large"
            yield Outcome(name, vector, UNKNOWN, why)
        return
    readings = {
        "plain": plain, "again": again, "steered": first, "again, steered": second,
        "half as strong": other,
    }  # fmt: skip
    good = not plain.cached and not first.cached and not other.cached and bool(second.cached)
    words = ", ".join(f"{name} {reading.cached}" for name, reading in readings.items())
    yield judged(check, vector, good, words)
    yield judged(
        shared, vector, generation.cached == again.cached,
        f"{generation.cached} cached tokens, plain repeats {again.cached}",
    )  # fmt: skip


def _answers(
    bench: Bench, vector: str, plain: Reading, again: Reading, first: Reading, cold: Reading
) -> Iterator[Outcome]:
    check = "steered after plain equals steered with a cold cache"
    noise = max(gap(plain, again), bench.solo, bench.batch)
    effect = gap(replace(cold, answer=cold.answer[:1]), replace(plain, answer=plain.answer[:1]))
    if effect <= 10 * SLACK * noise:
        why = f"steering changes the first token by {effect:.1e}, the cache alone by {noise:.1e}"
        yield Outcome(check, vector, UNKNOWN, why)
        return
    found = gap(first, cold)
    words = "identical bits" if found == 0 else f"within {found:.1e}"
    # An effect is infinite where the likeliest tokens are all others; a nat is large, too.
    allowed = max(SLACK * noise, 1e-4 * min(effect, 1.0))
    yield judged(check, vector, found <= allowed, words)
