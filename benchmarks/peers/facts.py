"""What is right or wrong about an answer, whatever it cost: compared with a script with hooks."""

from collections.abc import Callable
from typing import Any

from benchmarks.peers.process import PeerProcess
from benchmarks.peers.world import NAMES, prompts

TOKENS = 16
LONG = 130  # tokens: four full blocks of vLLM's prefix cache and two more
UNKNOWN = "nobody"

# (prompt, vector) -> the answer's tokens
Reference = Callable[[list[int], str | None], list[int]]


def reference_of(process: PeerProcess) -> Reference:
    def answer(prompt: list[int], name: str | None) -> list[int]:
        tokens: list[int] = process.ask([prompt], [name], TOKENS)["tokens"][0]
        return tokens

    return answer


def facts(peer: PeerProcess, reference: Reference, seed: int) -> dict[str, Any]:
    """Asks one contestant that steers.

    Returns:
        equal: share of its answers' tokens that equal the reference's, all with the first vector;
        unsteered: share that equal the reference's without steering (how much "equal" says);
        mixed: `equal` for a batch of both vectors and none, or why that cannot be asked;
        second_vector: one long prompt with the first vector, then with the second: prompt tokens
        taken from the cache the second time, and the share of tokens that are its own answer with
        an empty cache;
        unknown: what becomes of a vector's name that does not exist.
    """
    first, second = NAMES
    few = prompts(4, f"facts {seed}")
    expected = [reference(prompt, first) for prompt in few]
    plain = [reference(prompt, None) for prompt in few]
    steered = peer.ask(few, [first] * 4, TOKENS)
    if "error" in steered:
        return {"error": steered["error"]}
    mixed_names = [first, second, None]
    mixed = peer.ask(few[:3], mixed_names, TOKENS)
    mixed_expected = [reference(p, name) for p, name in zip(few, mixed_names, strict=False)]
    (long,) = prompts(1, f"long {seed}", LONG)
    peer.ask([long], [first], TOKENS)
    again = peer.ask([long], [second], TOKENS)
    alone = peer.ask([long], [second], TOKENS, fresh=True)
    unknown = peer.ask(few[:1], [UNKNOWN], TOKENS)
    return {
        "equal": _share(steered["tokens"], expected),
        "unsteered": _share(steered["tokens"], plain),
        "mixed": mixed.get("error") or _share(mixed["tokens"], mixed_expected),
        "second_vector": {
            "cached": again.get("cached", [None])[0],
            "equal": again.get("error") or _share(again["tokens"], alone["tokens"]),
        },
        "unknown": _unknown(unknown, plain[0], expected[0]),
    }


def _unknown(answer: dict[str, Any], plain: list[int], steered: list[int]) -> str:
    if "error" in answer:
        return f"refused: {answer['error'].partition('; known')[0][:160]}"
    (tokens,) = answer["tokens"]
    if tokens == plain:
        return "answered without steering, no error"
    return "answered as with another vector" if tokens == steered else "answered in some way"


def _share(found: list[list[int]], expected: list[list[int]]) -> float:
    pairs = [pair for a, b in zip(found, expected, strict=True) for pair in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)
