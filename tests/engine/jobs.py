"""The batches that every engine is asked, by name; a plain engine gets them without steering."""

from typing import Any

from tests.tiny import VOCAB


def prompt(seed: int, length: int = 70) -> list[int]:
    return [(seed * 31 + i * (7 + seed)) % (VOCAB - 2) + 2 for i in range(length)]


def request(seed: int, length: int = 70, **extra_args: Any) -> dict[str, Any]:
    """A prompt and its steering; prompt log-probabilities let many tokens be compared."""
    return {
        "prompt": prompt(seed, length),
        "extra_args": extra_args or None,
        "prompt_logprobs": 0,
    }


# Eight requests, eight different (vector, strength), and every kind of positions.
EIGHT = [
    {"steering": "a"},
    {"steering": "a", "steering_strength": -0.3},
    {"steering": "b=1.5"},
    {"steering": "b", "steering_strength": 0.2},
    {"steering": "c"},
    {"steering": "d"},
    {"steering": "a", "steering_strength": 0.25, "steering_positions": "generation"},
    {"steering": "d", "steering_strength": 9, "steering_positions": "all"},
]
# Windows, compositions and narrowed layers; all of them need more slots than there are.
MORE = [
    {"steering": "a", "steering_positions": "prompt:5"},
    {"steering": "a=-0.4", "steering_positions": "generation:2"},
    {"steering": "b=1", "steering_positions": "prompt:1+generation"},
    {"steering": "a=0.3,c=-0.4"},
    {"steering": "d,b=0.7,a=-0.2", "steering_positions": "prompt:20+generation:1"},
    {"steering": "a", "steering_layers": [1, 2]},
    {"steering": "a=0.3,d=2", "steering_layers": [2]},
    {"steering": "d", "steering_strength": -3},
]
GIVEN = [("prompt", 40), ("generation", 40), ("prompt", 1), ("generation", 59), ("prompt", 60)]
_LONG = {"prompt": prompt(1, 130), "max_tokens": 6}
REFUSED = {
    "unknown name": {"steering": "z"},
    "near miss": {"steering": "A"},
    "not a number": {"steering": "a", "steering_strength": "strong"},
    "not finite": {"steering": "a", "steering_strength": float("inf")},
    "reserved key": {"grains": {"slot": "x", "strength": 1.0, "positions": "all"}},
    "misspelt key": {"steering": "a", "steering_strenght": 2},
    "too many vectors": {"steering": "a,b,c,d"},
    "layers that are not served": {"steering": "b", "steering_layers": [0]},
    "unknown positions": {"steering": "a", "steering_positions": "start"},
    "more prompt than there is": {
        "steering": "a",
        "steering_positions": "prompt",
        "steering_prompt_tokens": 131,
    },
    "strength without a vector": {"steering_strength": 0.5},
    "off with a strength": {"steering": "none", "steering_strength": 0.5},
}

# Together they need about three times the KV cache that CROWDED_BLOCKS leaves, and more slots than
# there are: some wait, some are thrown out in the middle of their answer and computed again.
CROWDED_BLOCKS = 14
CROWDED = [
    {"prompt": prompt(seed, 40), "extra_args": args, "max_tokens": 80}
    for seed, args in enumerate(
        [
            {"steering": "a", "steering_positions": "generation:30"},
            {"steering": "a=-0.4", "steering_positions": "prompt"},
            None,
            {"steering": "b=1", "steering_positions": "prompt:1+generation"},
            {"steering": "c=0.3,d", "steering_positions": "generation"},
            {"steering": "a", "steering_layers": [2]},
            {"steering": "a=0.6", "steering_positions": "generation:60"},
            {"steering": "d"},
        ]
    )
]

JOBS: dict[str, Any] = {
    "alone": {"requests": [request(0)]},
    "eight": {
        "requests": [request(seed, 20 + 11 * seed, **args) for seed, args in enumerate(EIGHT)]
    },
    # Every other request unsteered, more tokens than one step takes: chunked prefill, mixed steps.
    "mixed": {
        "requests": [
            request(seed, 90, **(EIGHT[seed] if seed % 2 else {})) for seed in range(len(EIGHT))
        ]
    },
    **{
        f"solo {seed}": {"requests": [request(seed, 20 + 11 * seed, **args)]}
        for seed, args in enumerate(EIGHT)
    },
    "more": {"requests": [request(seed, 20 + 11 * seed, **args) for seed, args in enumerate(MORE)]},
    **{
        f"more solo {seed}": {"requests": [request(seed, 20 + 11 * seed, **args)]}
        for seed, args in enumerate(MORE)
    },
    # A given answer, sent as part of the prompt: scored as if it had been generated.
    "given answers": {
        "requests": [
            request(
                seed,
                60,
                steering="a=2",
                steering_positions=positions,
                steering_prompt_tokens=border,
            )
            for seed, (positions, border) in enumerate(GIVEN)
        ]
    },
    # Prefix caching: one prompt of four full blocks and two tokens, repeated under other steerings.
    "cache plain": {"requests": [_LONG]},
    **{
        f"cache {label}": {"fresh_cache": False, "requests": [{**_LONG, "extra_args": args}]}
        for label, args in {
            "plain again": None,
            "steered": {"steering": "a"},
            "steered again": {"steering": "a=0.5"},
            "other strength": {"steering": "a=0.25"},
            "prompt alone": {"steering": "a", "steering_positions": "prompt"},
            "answer alone": {"steering": "a", "steering_positions": "generation"},
            "answer alone again": {"steering": "a", "steering_positions": "generation"},
            "last prompt tokens": {"steering": "a", "steering_positions": "prompt:5+generation"},
            "other vector": {"steering": "c"},
            "both": {"steering": "a,b"},
            "both again": {"steering": "b,a"},
            "fewer layers": {"steering": "a", "steering_layers": [1]},
            "strength zero": {"steering": "a", "steering_strength": 0},
            "off": {"steering": "none"},
            "plain at last": None,
        }.items()
    },
    **{
        f"cold {label}": {"requests": [{**_LONG, "extra_args": args}]}
        for label, args in {
            "answer alone": {"steering": "a", "steering_positions": "generation"},
            "last prompt tokens": {"steering": "a", "steering_positions": "prompt:5+generation"},
            "prompt alone": {"steering": "a", "steering_positions": "prompt"},
        }.items()
    },
    # A second turn, whose prompt holds the first turn's answer: with that turn's cache, without it.
    **{
        f"{turn} {positions}": {"fresh_cache": turn != "turn two warm", "requests": [asked]}
        for positions in ("all", "prompt", "generation")
        for args in [{"steering": "a=2", "steering_positions": positions}]
        for turn, asked in {
            "turn one": {"prompt": prompt(2, 40), "max_tokens": 70, "extra_args": args},
            "turn two warm": {
                "follows": f"turn one {positions}",
                "prompt": prompt(3, 30),
                "extra_args": args,
            },
            "turn two cold": {
                "follows": f"turn one {positions}",
                "prompt": prompt(3, 30),
                "extra_args": args,
            },
        }.items()
    },
    **{
        f"refused {label}": {"requests": [{**_LONG, "extra_args": args}]}
        for label, args in REFUSED.items()
    },
    "after refusals": {"requests": [request(0)]},
}
