"""Offline outputs carry the receipt as `RequestOutput.grains`."""

import json
from pathlib import Path

import pytest

from grains_vllm.positions import Positions
from grains_vllm.vectors import SteeringVector
from tests.engine.jobs import EIGHT, JOBS

pytestmark = pytest.mark.engine

# What the world's YAML says where a request does not: strength, layers, positions.
ENTRIES = {
    "a": (0.5, [0, 1, 2, 3], "all"),
    "b": (0.5, [1], "all"),
    "c": (0.5, [0, 1, 2, 3], "prompt"),
    "d": (4.0, [0, 2], "generation"),
}


def test_receipts_say_what_was_asked_and_how_far_it_reached(engine, worlds: Path):
    answers = engine("llama", "eager")["eight"]["answers"]
    for args, request, answer in zip(EIGHT, JOBS["eight"]["requests"], answers, strict=True):
        name, _, inline = args["steering"].partition("=")
        strength, layers, positions = ENTRIES[name]
        positions = args.get("steering_positions", positions)
        ((start, end),) = Positions.parse(positions).spans(len(request["prompt"]))
        # The last token was never fed back to the layers.
        fed = len(request["prompt"]) + len(answer["tokens"]) - 1
        steered = [p for p in range(fed) if start <= p and (end is None or p < end)]
        facts = answer["receipt"]
        (vector,) = facts["vectors"]
        assert (facts["steered"], facts["source"]) == (True, "request")
        assert vector["name"] == name and vector["positions"] == positions
        assert vector["layers"] == layers
        assert vector["strength"] == float(inline or args.get("steering_strength", strength))
        assert facts["prompt_tokens"] + facts["generated_tokens"] == len(steered)
        assert facts["prompt_tokens"] == sum(p < len(request["prompt"]) for p in steered)
        digest = SteeringVector.load(worlds / f"llama_{name}.safetensors").digest
        assert len(vector["digest"]) == 12 and digest.startswith(vector["digest"])
        assert json.loads(json.dumps(facts)) == facts


def test_plain_outputs_have_none(engine):
    results = engine("llama", "eager")
    assert results["alone"]["answers"][0]["receipt"] is None
    mixed = [answer["receipt"] for answer in results["mixed"]["answers"]]
    assert [receipt is not None for receipt in mixed] == [False, True] * 4
    for label in ("strength zero", "off"):
        assert results[f"cache {label}"]["answers"][0]["receipt"] is None


def test_cached_prompt_tokens_count_as_steered(engine):
    """Their KV was computed with the same steering, or it would not have been taken."""
    results = engine("llama", "eager")
    first, again = (
        results[f"cache {label}"]["answers"][0] for label in ("steered", "steered again")
    )
    assert again["cached"] > first["cached"]
    assert again["receipt"] == first["receipt"]
    assert again["receipt"]["prompt_tokens"] == 130
