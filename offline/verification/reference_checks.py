"""An engine's log-probabilities against those of transformers, with and without steering."""

from collections.abc import Iterator, Mapping

from grains_vllm.catalogue import VectorEntry
from offline.verification.bench import Bench
from offline.verification.outcome import UNKNOWN, Outcome, judged
from offline.verification.probes import NONE, Reading
from offline.verification.reference import Reference, Terms

# What counts as equal: rounding of the engine's dtype, or four times what plain requests differ by.
FLOORS = {"float32": 2e-4, "float16": 0.05, "bfloat16": 0.2}
PLAIN_LIMITS = {"float32": 1e-3, "float16": 0.5, "bfloat16": 1.0}


def check_reference(
    bench: Bench, reference: Reference, entries: Mapping[str, VectorEntry], dtype: str
) -> Iterator[Outcome]:
    """Yields plain first, then each vector under several positions, then two together."""

    def difference(reading: Reading, terms: Terms) -> float:
        tokens = [*bench.prompt, *(token for token, _ in reading.answer)]
        expected = reference.logprobs(tokens, len(bench.prompt), terms)
        found = [*reading.prompt, *(top[token] for token, top in reading.answer)]
        return max(abs(a - b) for a, b in zip(found, expected, strict=True))

    plain = difference(bench.read(NONE), ())
    limit = PLAIN_LIMITS.get(dtype, PLAIN_LIMITS["bfloat16"])
    words = f"at most {plain:.1e} in {dtype}, {limit:g} allowed"
    yield judged("transformers: plain", "", plain <= limit, words)
    allowed = max(FLOORS.get(dtype, FLOORS["bfloat16"]), 4 * plain)

    def compare(check: str, name: str, reading: Reading, terms: Terms) -> Outcome:
        found, blind = difference(reading, terms), difference(reading, ())
        words = f"at most {found:.1e} in {dtype}, {allowed:.1e} allowed; unsteered {blind:.2g}"
        if found <= allowed and blind <= 2 * allowed:
            return Outcome(check, name, UNKNOWN, f"{words}: too little to tell")
        return judged(check, name, found <= allowed, words)

    for name, entry in entries.items():
        yield compare(
            "transformers: as configured", name, bench.read({"steering": name}),
            [(entry, entry.strength, entry.positions)],
        )  # fmt: skip
        for factor, positions in ((-1, "all"), (1, "prompt"), (1, "generation")):
            strength = factor * entry.strength
            asked = {
                "steering": name, "steering_strength": strength, "steering_positions": positions
            }  # fmt: skip
            sign = "-s" if factor < 0 else "s"
            yield compare(
                f"transformers: {sign}, {positions}", name, bench.read(asked),
                [(entry, strength, positions)],
            )  # fmt: skip
    if len(entries) > 1:
        pair = list(entries.items())[:2]
        yield compare(
            "transformers: two vectors", "+".join(name for name, _ in pair),
            bench.read({"steering": ",".join(name for name, _ in pair)}),
            [(entry, entry.strength, entry.positions) for _, entry in pair],
        )  # fmt: skip
