"""Receipts: what an answer says about its steering, against what was asked for."""

from collections.abc import Iterator, Mapping
from typing import Any

from offline.verification.bench import ANSWER_TOKENS, Bench
from offline.verification.outcome import Outcome, judged
from offline.verification.probes import NONE

_DIGITS = 12


def check_receipts(
    bench: Bench, vector: str, strength: float, digest: str | None
) -> Iterator[Outcome]:
    """Yields an outcome per vector.

    Args:
        digest: of the artifact that the server ought to have, if one was given.
    """
    prompt, fed_back = len(bench.prompt), ANSWER_TOKENS - 1  # the last token shifts nothing
    counts = {"all": (prompt, fed_back), "prompt": (prompt, 0), "generation": (0, fed_back)}
    for places, (of_prompt, of_answer) in counts.items():
        asked = {
            "steering": vector,
            "steering_strength": strength,
            "steering_positions": places,
        }
        receipt = bench.read(asked, answer=ANSWER_TOKENS).receipt
        expected = {
            "steered": True,
            "source": "request",
            "prompt_tokens": of_prompt,
            "generated_tokens": of_answer,
        }
        of_term = {"name": vector, "strength": strength, "positions": places}
        if digest is not None:
            of_term["digest"] = digest[:_DIGITS]
        wrong = _wrong(receipt, expected, of_term)
        if wrong:
            yield judged("the receipt is right", vector, False, f"positions {places}: {wrong}")
            return
    known = "" if digest is not None else "; its digest is compared with --vector NAME=FILE"
    yield judged(
        "the receipt is right", vector, True,
        f"{prompt} prompt and {fed_back} generated tokens, as sent and fed back{known}",
    )  # fmt: skip


def check_plain_receipt(bench: Bench) -> Iterator[Outcome]:
    """Who asked for no steering is told of none."""
    receipt = bench.read(NONE).receipt
    good = not (receipt and receipt.get("steered"))
    yield judged("unsteered answers claim no steering", "", good, f"receipt: {receipt}")


def _wrong(
    receipt: Mapping[str, Any] | None, expected: Mapping[str, Any], of_term: Mapping[str, Any]
) -> str:
    if receipt is None:
        return "there is no receipt"
    terms = receipt.get("vectors") or [{}]
    if len(terms) > 1:
        return f"{len(terms)} vectors instead of one"
    found = [
        f"{name} is {has.get(name)!r}, expected {value!r}"
        for has, wanted in ((receipt, expected), (terms[0], of_term))
        for name, value in wanted.items()
        if has.get(name) != value
    ]
    return "; ".join(found)
