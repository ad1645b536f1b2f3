"""The two back ends of a sweep agree: log-likelihoods, greedy answers, and the chosen point."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.sycophancy import world
from grains_vllm.vectors import ModelFingerprint, SteeringVector

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    config = json.loads((Path(world.__file__).parent / "model" / "config.json").read_text())
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    for seed, name in enumerate(("one", "two")):
        rows = torch.randn(layers, hidden, generator=torch.Generator().manual_seed(seed))
        SteeringVector(
            rows / rows.norm(dim=1, keepdim=True), torch.full((layers,), 8.0),
            ModelFingerprint("LlamaForCausalLM", hidden, layers),
        ).save(folder / f"{name}.safetensors")  # fmt: skip
    path = folder / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.sweep_process", str(folder), str(path)],
        cwd=ROOT, env=os.environ, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert done.stdout == ""  # it belongs to --json
    return json.loads(path.read_text())


def test_every_score_agrees(result):
    worst = 0.0
    for hooks, engine in zip(
        result["transformers"]["tricky"], result["vllm"]["tricky"], strict=True
    ):
        for mine, theirs in zip(hooks, engine, strict=True):
            worst = max(worst, abs(mine["logp"] - theirs["logp"]))
            assert mine["greedy"] == theirs["greedy"]
    print(f"largest difference of an answer's log-likelihood: {worst:.1e}")
    assert worst < TOLERANCE


def test_the_cache_was_used_and_its_holes_were_filled(result):
    """Only where cached blocks reach into an answer is an item scored twice."""
    assert result["share"] is True
    # More than are handed to the engine at once: twice all of them, twice those with holes.
    first, again = sum(result["asked"][0::2]), sum(result["asked"][1::2])
    assert first == result["items"] * result["points"]
    assert 0 < again < first


def test_measures_and_choice_agree(result):
    hooks, engine = result["transformers"]["sweep"], result["vllm"]["sweep"]
    assert hooks["chosen"] == engine["chosen"] is not None
    for mine, theirs in zip(
        [hooks["base"], *hooks["points"]], [engine["base"], *engine["points"]], strict=True
    ):
        for name in ("accuracy", "exact", "controls", "margin", "perplexity"):
            assert mine[name] == pytest.approx(theirs[name], abs=TOLERANCE), (mine, name)
    margins = {round(point["margin"], 3) for point in hooks["points"]}
    assert len(margins) > 10  # the points do differ


def test_a_point_that_the_engine_was_not_started_for_is_refused(result):
    assert "not among the points" in result["refused"]
