"""The two back ends of a sweep agree: log-likelihoods, greedy answers, and the chosen point."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.hallucination import world as hallucination
from benchmarks.sycophancy import world
from grains_vllm.vectors import ModelFingerprint, SteeringVector
from tests import vision
from tests.warm import run_python

pytestmark = pytest.mark.engine
TOLERANCE = 1e-3


def save_vectors(folder, model, architecture):
    """FOLDER/one.safetensors and two.safetensors: random directions for the model."""
    config = json.loads((model / "config.json").read_text())
    config = config.get("text_config", config)
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    for seed, name in enumerate(("one", "two")):
        rows = torch.randn(layers, hidden, generator=torch.Generator().manual_seed(seed))
        SteeringVector(
            rows / rows.norm(dim=1, keepdim=True), torch.full((layers,), 8.0),
            ModelFingerprint(architecture, hidden, layers),
        ).save(folder / f"{name}.safetensors")  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    save_vectors(folder, Path(world.__file__).parent / "model", "LlamaForCausalLM")
    path = folder / "result.json"
    done = run_python("-m", "tests.engine.sweep_process", folder, path)
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


def grains_sweep(folder, model, backend, *more):
    """`grains sweep` of FOLDER/one.safetensors with FOLDER/pairs.jsonl, which has images."""
    arguments = (
        *("sweep", folder / "one.safetensors", "--out", folder / f"{backend}.safetensors"),
        *("--model", model, "--data", folder / "pairs.jsonl", "--backend", backend),
        *("--metric", "margin", *more),
    )
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return run_python("-m", "offline", *arguments, environment=environment)


def test_back_ends_agree_on_images(tmp_path):
    """The commands' own result files, with images in pairs and controls."""
    model = Path(hallucination.__file__).parent / "model"
    save_vectors(tmp_path, model, "LlavaForConditionalGeneration")
    controls, texts = tmp_path / "controls.jsonl", tmp_path / "texts.jsonl"
    hallucination.write_pairs(tmp_path / "pairs.jsonl", "validation", 8, 1)
    hallucination.write_controls(controls, hallucination.sample_controls(6, 1), "control")
    hallucination.write_texts(texts, 4, 1)
    found = {}
    for backend in ("transformers", "vllm"):
        done = grains_sweep(
            tmp_path, model, backend, "--layers", "1;2-3", "--strengths", "0.2,-0.4",
            "--positions", "all,text,image,generation", "--controls", controls,
            "--min-controls", "0", "--text", texts, "--max-perplexity-increase", "9",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        found[backend] = json.loads((tmp_path / f"{backend}.sweep.json").read_text())
    hooks, engine = found["transformers"], found["vllm"]
    assert len(hooks["points"]) == len(engine["points"]) == 16
    for mine, theirs in zip(
        [hooks["base"], *hooks["points"]], [engine["base"], *engine["points"]], strict=True
    ):
        for name in ("accuracy", "exact", "controls", "margin", "perplexity"):
            assert mine[name] == pytest.approx(theirs[name], abs=TOLERANCE), (mine, name)
    assert len({round(point["margin"], 3) for point in hooks["points"]}) > 10  # they do differ
    assert hooks["chosen"] == engine["chosen"]


def test_an_image_that_vllm_lays_out_otherwise_is_refused(tmp_path):
    """Here because it is told to make it smaller."""
    model = vision.save_vision(tmp_path, "qwen2_vl")
    vision.random_vector("qwen2_vl", 0).save(tmp_path / "one.safetensors")
    vision.picture(0).save(tmp_path / "0.png")
    row = {"image": "0.png", "prompt": [{"role": "user", "content": "what colour is the circle ?"}]}
    row |= {"chosen": "red", "rejected": "blue and green"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    size = {"size": {"shortest_edge": 16 * 16, "longest_edge": 20 * 20}}
    done = grains_sweep(
        tmp_path, model, "vllm", "--engine-args", json.dumps({"mm_processor_kwargs": size}),
        "--layers", "1", "--strengths", "0.2",
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-6000:]
    found = re.search(r"vLLM makes (\d+) tokens of '0.png', .*transformers (\d+)", done.stderr)
    assert found and int(found[1]) < int(found[2]), done.stderr[-3000:]
    assert not (tmp_path / "vllm.sweep.json").exists()
