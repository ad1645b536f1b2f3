"""`grains sweep` on a tiny random model: what it writes, refuses, and goes on with."""

import json
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from grains_vllm.vectors import ModelFingerprint, SteeringVector
from offline.cli import app
from offline.imports import OWN_LENGTHS
from offline.pairs import load_pairs
from offline.transformers_scorer import TransformersScorer
from tests.offline.test_scoring import vector
from tests.offline.worlds import build_decoder, rows, save_model, write_jsonl

PAIRS = 4
MODEL = ModelFingerprint("LlamaForCausalLM", 32, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def world(tmp_path, model):
    """A folder with an artifact, validation pairs, controls and texts."""
    write_jsonl(tmp_path / "pairs.jsonl", rows(PAIRS))
    write_jsonl(tmp_path / "controls.jsonl", [{"prompt": "w1 w2", "completion": "w3"}])
    (tmp_path / "texts.txt").write_text("w4 w5 w6\nw7 w8\n")
    passport = {"method": "grains", "examples": [{"id": "1", "prompt_fingerprint": "0" * 16}]}
    replace(vector(build_decoder()), model=MODEL, passport=passport).save(
        tmp_path / "v.safetensors"
    )
    return tmp_path


def run(world, model, *more, data="pairs.jsonl", vectors=("v.safetensors",), strengths="0,0.3"):
    arguments = ["sweep", *(str(world / name) for name in vectors), "--model", str(model)]
    arguments += ["--data", str(world / data), "--device", "cpu"]
    if "--layers" not in more:
        arguments += ["--layers", "1;all"]
    if "--strengths" not in more and strengths is not None:
        arguments += ["--strengths", strengths]
    # Messages are wrapped for a narrow screen in tests.
    return CliRunner().invoke(app, [*arguments, *more])


def read(path):
    return json.loads(path.read_text())


def test_the_best_point_is_recommended_in_place(world, model):
    before = SteeringVector.load(world / "v.safetensors")
    done = run(
        world, model, "--json", "--controls", str(world / "controls.jsonl"), "--min-controls", "0",
        "--text", str(world / "texts.txt"), "--max-perplexity-increase", "1000",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document == read(world / "v.sweep.json")
    assert document["kind"] == "grains-sweep" and document["version"] == 1
    assert document["limits"] == {"min_controls": 0, "max_perplexity_increase": 1000}
    assert document["data"]["validation"]["pairs"] == PAIRS and len(document["points"]) == 4
    assert document["vectors"]["v"]["digest"] == before.digest
    assert str(world) not in done.stdout
    after = SteeringVector.load(world / "v.safetensors")
    assert (
        after.digest == before.digest and after.passport["examples"] == before.passport["examples"]
    )
    chosen = document["points"][document["chosen"]]
    assert after.recommended_layers == chosen["layers"]
    assert after.recommended_strength == chosen["strength"]
    summary = after.passport["sweep"]
    assert summary["points"] == 4 and summary["backend"] == "transformers"
    prompts = {pair.prompt_fingerprint for pair in load_pairs(str(world / "pairs.jsonl")).pairs}
    assert set(summary["data"]["validation"]["prompt_fingerprints"]) == prompts
    assert not (world / "v.sweep.json.partial").exists()
    # What is there is not overwritten by mistake.
    again = run(world, model)
    assert again.exit_code == 2 and "--force" in again.stderr
    assert run(world, model, "--force").exit_code == 0


def test_a_window_of_positions_is_recommended(world, model):
    both = ("--positions", "all,generation+prompt:1", "--strengths", "0.3", "--layers", "all")
    assert run(world, model, *both).exit_code == 0
    points = read(world / "v.sweep.json")["points"]
    assert [point["positions"] for point in points] == ["all", "prompt:1+generation"]
    assert points[0]["margin"] != points[1]["margin"]
    one = ("--positions", "prompt:1+generation", "--strengths", "0.3", "--layers", "all")
    done = run(world, model, *one, "--force")
    assert done.exit_code == 0, done.output
    assert read(world / "v.sweep.json")["points"] == points[1:]
    after = SteeringVector.load(world / "v.safetensors")
    assert after.recommended_positions == "prompt:1+generation"


def test_out_leaves_the_artifact_alone(world, model):
    bytes_before = (world / "v.safetensors").read_bytes()
    done = run(world, model, "--out", str(world / "chosen.safetensors"))
    assert done.exit_code == 0, done.output
    assert "best by accuracy" in done.stdout
    assert (world / "v.safetensors").read_bytes() == bytes_before
    assert SteeringVector.load(world / "chosen.safetensors").recommended_strength is not None
    assert (world / "chosen.sweep.json").exists() and not (world / "v.sweep.json").exists()


@torch.no_grad()
def usual_norms():
    """The median ||h|| after the first two blocks, where the validation prompts end."""
    decoder = build_decoder()
    norms = []
    for row in rows(PAIRS):
        ids = decoder.tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        states = decoder.model(ids, output_hidden_states=True).hidden_states
        norms.append(torch.stack([state[0, -1].norm() for state in states[1:3]]))
    return torch.stack(norms).median(dim=0).values


def test_imported_vectors_are_tried_at_the_models_own_scale(world, model):
    """As they would be if their lengths were the model's."""
    directions = vector(build_decoder()).directions.clone()
    directions[2] = 0
    usual = torch.cat([usual_norms(), torch.zeros(1)])
    ours = SteeringVector(directions, usual, MODEL)
    theirs = SteeringVector(directions, usual / 40, MODEL, {"strength_unit": OWN_LENGTHS})
    ours.save(world / "ours.safetensors")
    theirs.save(world / "theirs.safetensors")
    points = {}
    for name in ("ours", "theirs"):
        done = run(
            world, model, "--layers", "0;0-1", vectors=(f"{name}.safetensors",), strengths=None
        )
        assert done.exit_code == 0, done.output
        points[name] = read(world / f"{name}.sweep.json")["points"]
    said = " ".join(done.stderr.split())
    assert "'theirs' is imported: the usual length of the stream is 40 times its own" in said
    assert len(points["ours"]) == len(points["theirs"]) == 20
    for one, other in zip(points["ours"], points["theirs"], strict=True):
        assert other["strength"] == pytest.approx(40 * one["strength"])
        assert other["margin"] == pytest.approx(one["margin"], abs=1e-5)
    passport = SteeringVector.load(world / "theirs.safetensors").passport
    assert passport["strength_unit"] == OWN_LENGTHS
    assert passport["sweep"]["strengths_multiplied"] == {"theirs": 40}
    assert passport["recommended"]["strength"] in {point["strength"] for point in points["theirs"]}
    # What is asked for is what servers take.
    more = ("--layers", "0", "--strengths", "0.5", "--force")
    assert run(world, model, *more, vectors=("theirs.safetensors",)).exit_code == 0
    assert [point["strength"] for point in read(world / "theirs.sweep.json")["points"]] == [0.5]


def test_an_engine_cannot_tell_the_scale_of_an_imported_vector(world, model):
    path = world / "v.safetensors"
    replace(SteeringVector.load(path), passport={"strength_unit": OWN_LENGTHS}).save(path)
    done = run(world, model, "--backend", "vllm", strengths=None)
    assert done.exit_code == 2
    assert "--strengths is missing: 'v' is imported" in re.sub(r"\s+", " ", done.stderr)


def test_no_allowed_point_recommends_nothing(world, model):
    before = (world / "v.safetensors").read_bytes()
    done = run(world, model, "--controls", str(world / "controls.jsonl"), "--min-controls", "1")
    assert done.exit_code == 1 and "no point keeps the limits" in done.stderr
    assert (world / "v.safetensors").read_bytes() == before
    document = read(world / "v.sweep.json")
    assert document["chosen"] is None and not any(p["allowed"] for p in document["points"])


def test_an_interrupted_sweep_goes_on(world, model, monkeypatch):
    whole = run(world, model, "--out", str(world / "whole.safetensors"))
    assert whole.exit_code == 0, whole.output
    scored = []
    original = TransformersScorer.score

    def interrupted(self, items, points):
        for number, scores in original(self, items, points):
            if len(scored) == 2:
                raise KeyboardInterrupt
            scored.append(points[number])
            yield number, scores

    with monkeypatch.context() as patch:
        patch.setattr(TransformersScorer, "score", interrupted)
        done = run(world, model)
    assert done.exit_code == 130 and ".sweep.json.partial" in done.stderr
    assert (world / "v.sweep.json.partial").is_dir() and not (world / "v.sweep.json").exists()

    other = run(world, model, "--strengths", "0,0.4")
    assert other.exit_code == 2
    assert "grid.strengths was '0,0.3', now '0,0.4'" in re.sub(r"\s+", " ", other.stderr)

    def counting(self, items, points):
        for number, scores in original(self, items, points):
            scored.append(points[number])
            yield number, scores

    monkeypatch.setattr(TransformersScorer, "score", counting)
    assert run(world, model).exit_code == 0
    assert len(scored) == len(set(scored)) == 5  # the base and four points, each once
    resumed, expected = (read(world / f"{name}.sweep.json") for name in ("v", "whole"))
    assert {**resumed, "seconds": 0} == {**expected, "seconds": 0}


def test_nothing_to_score_needs_no_scorer(world, model, monkeypatch):
    """All points were measured, only the files are missing."""
    monkeypatch.setattr("offline.commands.sweep.write_aside", _raise_interrupt)
    assert run(world, model).exit_code == 130
    monkeypatch.undo()
    monkeypatch.setattr(TransformersScorer, "score", _raise_interrupt)
    assert run(world, model).exit_code == 0


def _raise_interrupt(*_):
    raise KeyboardInterrupt


def test_several_vectors_are_compared(world, model):
    replace(vector(build_decoder(), seed=1), model=MODEL).save(world / "w.safetensors")
    both = ("v.safetensors", "w.safetensors")
    refused = run(world, model, vectors=both)
    assert refused.exit_code == 2 and "--out is missing" in refused.stderr
    done = run(world, model, "--out", str(world / "best.safetensors"), vectors=both)
    assert done.exit_code == 0 and "w: the passport names no calibration examples" in done.stderr
    document = read(world / "best.sweep.json")
    assert [point["vector"] for point in document["points"]] == ["v"] * 4 + ["w"] * 4
    best = document["points"][document["chosen"]]["vector"]
    digest = SteeringVector.load(world / "best.safetensors").digest
    assert digest == document["vectors"][best]["digest"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--strengths", ""], "--strengths is ''"),
        (["--layers", "7"], "--layers is '7', but 'v' steers [0, 1, 2], not [7]"),
        (["--positions", "all,some"], "--positions is 'all,some': 'some' is not one of all"),
        (["--metric", "best"], "--metric is 'best', expected one of accuracy, exact, margin"),
        (["--backend", "jax"], "--backend is 'jax'"),
        (["--min-controls", "0.9"], "--min-controls is given without --controls"),
        (["--max-perplexity-increase", "0.1"], "is given without --text, expected both"),
        (["--controls", "CONTROLS", "--min-controls", "1.5"], "1.5, expected 0 to 1"),
        (["--estimators", "mean"], "--deltas, which is missing"),
        (["--engine-args", "{}"], "--engine-args belongs to --backend vllm"),
        (["--controls", "none.jsonl"], "--controls is 'none.jsonl': no such file"),
        (["--out", "x.json"], "expected a .safetensors file"),
    ],
)
def test_refusals(world, model, more, message):
    before = sorted(path.name for path in world.iterdir())
    more = [str(world / "controls.jsonl") if word == "CONTROLS" else word for word in more]
    done = run(world, model, *more)
    assert done.exit_code == 2
    assert message in re.sub(r"\s+", " ", done.stderr)
    assert sorted(path.name for path in world.iterdir()) == before


def test_a_vector_of_another_model_is_refused(world, model):
    other = replace(vector(build_decoder()), model=ModelFingerprint("GPT2LMHeadModel", 32, 3))
    other.save(world / "v.safetensors")
    done = run(world, model)
    assert done.exit_code == 2 and "GPT2LMHeadModel" in done.stderr


def test_calibration_pairs_are_refused(world, model):
    first = load_pairs(str(world / "pairs.jsonl")).pairs[0]
    passport = {"examples": [{"id": "p0", "prompt_fingerprint": first.prompt_fingerprint}]}
    replace(SteeringVector.load(world / "v.safetensors"), passport=passport).save(
        world / "v.safetensors"
    )
    done = run(world, model)
    assert done.exit_code == 2 and "(ids p0)" in done.stderr


def test_vectors_are_made_of_kept_deltas(world, model):
    made = CliRunner().invoke(app, [
        "extract", "--model", str(model), "--data", str(_others(world)), "--device", "cpu",
        "--ig-points", "8", "--k", "3", "--out", str(world / "x.safetensors"),
        "--deltas", str(world / "x.deltas.safetensors"),
    ])  # fmt: skip
    assert made.exit_code == 0, made.output
    done = run(
        world, model, "--deltas", str(world / "x.deltas.safetensors"), "--estimators",
        "mean,pca,pca:positive", "--out", str(world / "y.safetensors"), vectors=("x.safetensors",),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "'mean' is the same vector as 'x'" in done.stderr
    found = read(world / "y.sweep.json")["vectors"]
    assert {name: (facts["direction"], facts["mode"]) for name, facts in found.items()} == {
        "x": ("mean", "contrast"), "pca": ("pca", "contrast"), "pca:positive": ("pca", "positive"),
    }  # fmt: skip
    assert len({facts["digest"] for facts in found.values()}) == 3
    unknown = run(
        world, model, "--deltas", str(world / "x.deltas.safetensors"), "--estimators", "median",
        "--out", str(world / "z.safetensors"),
    )  # fmt: skip
    assert unknown.exit_code == 2 and "--estimators is 'median'" in unknown.stderr


def _others(world):
    return write_jsonl(world / "calibration.jsonl", rows(12, seed=1))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_plots(world, model):
    done = run(world, model, "--plots", str(world / "plots"))
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in (world / "plots").iterdir())
    assert names == ["dose-response.png", "heat-map.png"]
