"""Random requests, and what each of them asks for in so many words."""

from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

from benchmarks.soak.world import GUEST, MOST_VECTORS, SERVED, World
from benchmarks.sycophancy.world import sample_conflict, sample_control

VOCABULARY = range(4, 174)  # of the tiny model, without its special tokens
LONGEST_ANSWER = 40
How = Literal["whole", "stream", "leave"]


@dataclass(frozen=True)
class Wish:
    """One vector's part in a request; None where the catalogue's entry decides."""

    name: str
    strength: float | None = None
    positions: str | None = None
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        route: the endpoint after /v1/.
        body: JSON; everything but `stream`.
        wishes: the vectors that it asks for.
        border: steering_prompt_tokens, or None for the prompt's own end.
        how: answered in one piece, streamed, or abandoned.
        patience: seconds after which an abandoned request is left; a streamed one has begun then.
    """

    number: int
    route: str
    body: dict[str, Any]
    wishes: tuple[Wish, ...]
    border: int | None
    how: How
    patience: float


class Asker:
    """Makes the n-th request of a seed, whatever was asked before.

    Args:
        plain: leave all steering out, for comparison.
    """

    def __init__(self, world: World, seed: int, plain: bool = False) -> None:
        self._vectors = world.vectors
        self._seed, self._plain = seed, plain
        rng = Random(f"{seed} prefixes")
        # Prompts share these, so that the prefix cache has blocks to give, rightly or wrongly.
        self._prefixes = [_tokens(rng, length) for length in (33, 64, 64, 70, 96, 130)]

    def ask(self, number: int) -> Ask:
        rng = Random(f"{self._seed} {number}")
        route, content, length = self._content(rng)
        wishes, fields, alias = ((), {}, "") if self._plain else self._steering(rng)
        border = None
        if wishes and length and rng.random() < 0.1:
            # Of no use, and refused, where all positions are steered.
            while span(fields.get("steering_positions", "all")) == (None, None):
                fields["steering_positions"] = _positions(rng)
            border = fields["steering_prompt_tokens"] = rng.randint(1, length)
            wishes = tuple(replace(w, positions=fields["steering_positions"]) for w in wishes)
        body = {
            "model": f"{SERVED}{alias}",
            **content,
            "max_tokens": rng.randint(1, LONGEST_ANSWER),
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **({"vllm_xargs": fields} if fields else {}),
        }
        how: How = rng.choices(("whole", "stream", "leave"), (5, 4, 1))[0]
        return Ask(number, route, body, wishes, border, how, rng.choice((0.0, 0.05, 0.2, 0.5)))

    def _content(self, rng: Random) -> tuple[str, dict[str, Any], int]:
        """(route, the body's part, tokens of the prompt where they are known)."""
        if rng.random() < 0.25:
            question = sample_conflict(rng)[0] if rng.random() < 0.5 else sample_control(rng)
            body = {"messages": question.prompt, "logprobs": True, "top_logprobs": 0}
            return "chat/completions", body, 0
        head = rng.choice(self._prefixes) if rng.random() < 0.6 else []
        tokens = head + _tokens(rng, rng.randint(1, 60))
        return "completions", {"prompt": tokens, "logprobs": 0}, len(tokens)

    def _steering(self, rng: Random) -> tuple[tuple[Wish, ...], dict[str, Any], str]:
        """(what is wished, the fields that say so, the alias's end)."""
        kind = rng.random()
        if kind < 0.25:
            return (), {"steering": "none"} if kind < 0.03 else {}, ""
        if kind < 0.35:
            return (Wish(GUEST),), {}, f":{GUEST}"
        if kind < 0.65:
            return self._one(rng)
        chosen = rng.sample(tuple(self._vectors), rng.randint(2, MOST_VECTORS))
        strengths = [_strength(rng) for _ in chosen]
        text = ",".join(f"{n}={s}" for n, s in zip(chosen, strengths, strict=True))
        fields: dict[str, Any] = {"steering": text}
        positions = None
        if rng.random() < 0.5:
            positions = fields["steering_positions"] = _positions(rng)
        wishes = (Wish(n, s, positions) for n, s in zip(chosen, strengths, strict=True))
        return tuple(wishes), fields, ""

    def _one(self, rng: Random) -> tuple[tuple[Wish, ...], dict[str, Any], str]:
        name = rng.choice(tuple(self._vectors))
        strength = _strength(rng) if rng.random() < 0.6 else None
        positions = _positions(rng) if rng.random() < 0.5 else None
        fields: dict[str, Any] = {}
        alias = ""
        if rng.random() < 0.4:
            alias = f":{name}"
        else:
            fields["steering"] = name
        if strength is not None and not alias and rng.random() < 0.5:
            fields["steering"] = f"{name}={strength}"
        elif strength is not None:
            fields["steering_strength"] = strength
        if positions is not None:
            fields["steering_positions"] = positions
        layers = self._vectors[name].layers
        fewer = tuple(sorted(rng.sample(layers, rng.randint(1, len(layers)))))
        if rng.random() < 0.3:
            fields["steering_layers"] = fewer[0] if len(fewer) == 1 else list(fewer)
            return (Wish(name, strength, positions, fewer),), fields, alias
        return (Wish(name, strength, positions),), fields, alias


def _tokens(rng: Random, length: int) -> list[int]:
    return [rng.choice(VOCABULARY) for _ in range(length)]


def _strength(rng: Random) -> float:
    return rng.choice((-1, 1)) * round(rng.uniform(0.05, 0.8), 3)


def _positions(rng: Random) -> str:
    """Any of the forms that positions have."""
    if rng.random() < 0.1:
        return "all"
    return "+".join(
        name if rng.random() < 0.3 else f"{name}:{rng.randint(1, 40)}"
        for name in rng.choice((("prompt",), ("generation",), ("prompt", "generation")))
    )


def span(positions: str) -> tuple[int | None, int | None]:
    """(last tokens of the prompt, first tokens of the answer) that a text means; None for all.

    Written again here, apart from the product's own reading.
    """
    if positions == "all":
        return None, None
    numbers: dict[str, int | None] = {"prompt": 0, "generation": 0}
    for part in positions.split("+"):
        name, _, number = part.partition(":")
        numbers[name] = int(number) if number else None
    return numbers["prompt"], numbers["generation"]
