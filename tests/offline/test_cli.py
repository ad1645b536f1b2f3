"""The command: its files, its messages, its exit codes, a real Ctrl-C."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import offline.recipe
from grains_vllm.vectors import ModelFingerprint, SteeringVector
from offline import kept_deltas
from offline.cli import app
from offline.options import Direction, Mode
from offline.pairs import load_pairs
from tests.offline.worlds import build_model, rows, save_model, write_jsonl

ROOT = Path(__file__).parents[2]
QUICK = ["--ig-points", "8", "--k", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def pairs(tmp_path):
    return write_jsonl(tmp_path / "pairs.jsonl", rows(20))


def grains(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def extract(model, pairs, out, *more):
    return grains("extract", "--model", model, "--data", pairs, "--out", out, *QUICK, *more)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_extract_writes_an_artifact_that_inspect_reads(model, pairs, tmp_path):
    out, side = tmp_path / "v.safetensors", tmp_path / "scores.jsonl"
    result = extract(model, pairs, out, "--attributions", side, "--limit", "9")
    assert result.exit_code == 0, result.output
    assert "Completeness" in result.stdout and "Layers" in result.stdout
    assert "examples" in result.stderr and "see --chat" in result.stderr
    assert names(tmp_path) == ["pairs.jsonl", "scores.jsonl", "v.safetensors"]
    assert f"wrote {out}" in result.stdout and f"wrote {side}" in result.stdout.replace("\n", "")
    lines = [json.loads(line) for line in side.read_text().splitlines()]
    assert len(lines) == 9
    assert all(len(line["tokens"]) == len(line["scores"]) for line in lines)
    inspected = grains("inspect", out)
    assert inspected.exit_code == 0 and "9 used, 0 dropped" in inspected.stdout
    passport = json.loads(grains("inspect", out, "--json").stdout)
    assert passport["digest"] == SteeringVector.load(out).digest
    assert passport["model_id"] == "tiny" and passport["data"]["name"] == "pairs.jsonl"
    assert str(tmp_path) not in json.dumps(passport)
    assert len(passport["examples"]) == 9


def test_json_is_the_only_thing_on_stdout(model, pairs, tmp_path):
    out = tmp_path / "v.safetensors"
    result = extract(model, pairs, out, "--json", "--layers", "0,2", "--strength", "0.3")
    report = json.loads(result.stdout)
    assert report["recommended"]["layers"] == [0, 2] and report["recommended"]["strength"] == 0.3
    assert report["examples_used"] + report["examples_dropped"] == 20
    vector = SteeringVector.load(out)
    assert vector.recommended_layers == [0, 2] and vector.recommended_strength == 0.3


def test_attributions_stand_beside_the_artifact_and_say_whose_they_are(model, pairs, tmp_path):
    out, beside = tmp_path / "my.safetensors", tmp_path / "my.attributions.jsonl"
    more = ("--deltas", tmp_path / "d.safetensors", "--limit", "6")
    result = extract(model, pairs, out, *more)
    assert result.exit_code == 0, result.output
    told = result.stdout.replace("\n", "")
    assert all(f"wrote {path}" in told for path in (out, beside, more[1]))
    digest = SteeringVector.load(out).digest
    records = [json.loads(line) for line in beside.read_text().splitlines()]
    assert len(records) == 6 and {record["vector_digest"] for record in records} == {digest}
    kept = kept_deltas.load(more[1])
    assert kept.vector_digest == kept.vector(Direction.mean, Mode.contrast).digest == digest
    for path in (out, more[1]):  # only the attributions are left to be in the way
        path.unlink()
    result = extract(model, pairs, out, *more)
    assert result.exit_code == 2 and "my.attributions.jsonl: exists; --force" in result.stderr
    assert not out.exists()
    assert extract(model, pairs, out, *more, "--force").exit_code == 0


@pytest.mark.parametrize("method", ["caa", "pca-diff", "icv", "random"])
def test_rivals_write_the_same_format_and_nothing_else(model, pairs, tmp_path, method):
    out = tmp_path / "v.safetensors"
    result = grains(
        "extract", "--model", model, "--data", pairs, "--out", out, "--method", method,
        "--limit", "5", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert names(tmp_path) == ["pairs.jsonl", "v.safetensors"]
    vector = SteeringVector.load(out)
    assert vector.passport["method"] == method and vector.layers == [0, 1, 2]
    assert all(report["raw_norm"] > 0 for report in vector.passport["layers"])
    inspected = grains("inspect", out)
    assert inspected.exit_code == 0 and method in inspected.stdout


def truthful_rows(count):
    return [
        {
            "question": f"w3 w{n + 4} w{n + 5} w7", "best_answer": f"w1 w{n}",
            "incorrect_answers": [f"w2 w{n} w9", "w5"],
        }
        for n in range(count)
    ]  # fmt: skip


def test_a_recipe_is_all_that_is_needed(model, tmp_path):
    data, out = write_jsonl(tmp_path / "hub.jsonl", truthful_rows(40)), tmp_path / "v.safetensors"
    own = tmp_path / "mine.yaml"
    text = (Path(offline.recipe.FOLDER) / "truthfulqa.yaml").read_text()
    own.write_text(
        text.replace("calibration: 50, validation: 150", "calibration: 6, validation: 9")
    )
    command = ("extract", "--recipe", own, "--model", model, "--out", out, "--device", "cpu")
    result = grains(*command, "--data", data, "--ig-points", "4", "--k", "2", "--no-chat", "--json")
    assert result.exit_code == 0, result.output
    assert names(tmp_path) == [
        "hub.jsonl", "mine.yaml", "v.attributions.jsonl", "v.safetensors", "v.test.jsonl",
        "v.validation.jsonl",
    ]  # fmt: skip
    report = json.loads(result.stdout)
    assert report["files"]["test"] == "v.test.jsonl" and report["options"]["k"] == 2
    recipe = report["data"]["recipe"]
    assert recipe["name"] == "mine" and recipe["split"] == "calibration"
    assert recipe["sizes"] == {"calibration": 6, "validation": 9, "test": 25}
    seen = {example["prompt_fingerprint"] for example in report["examples"]}
    for part, count in (("validation", 9), ("test", 25)):
        others = {p.prompt_fingerprint for p in load_pairs(str(tmp_path / f"v.{part}.jsonl")).pairs}
        assert len(others) == count and not seen & others
        seen |= others
    result = grains(*command, "--data", data, "--force", "--method", "caa", "--limit", "5")
    assert result.exit_code == 0, result.output
    vector = SteeringVector.load(out)
    assert vector.passport["method"] == "caa" and vector.passport["options"]["chat"] is True
    assert len(vector.passport["examples"]) == 5


def test_a_chat_recipe_without_a_chat_template_says_what_to_do(tmp_path, tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("models") / "plain")
    (folder / "chat_template.jinja").unlink()
    data = write_jsonl(tmp_path / "hub.jsonl", truthful_rows(40))
    own = tmp_path / "mine.yaml"
    text = (Path(offline.recipe.FOLDER) / "truthfulqa.yaml").read_text()
    own.write_text(
        text.replace("calibration: 50, validation: 150", "calibration: 6, validation: 9")
    )
    out = tmp_path / "v.safetensors"
    result = grains(
        "extract", "--recipe", own, "--model", folder, "--out", out, "--data", data,
    )  # fmt: skip
    assert result.exit_code == 2 and "--no-chat makes text prompts" in result.stderr
    assert names(tmp_path) == ["hub.jsonl", "mine.yaml"]


def test_gaps_above_the_tolerance_are_warned_about(model, pairs, tmp_path):
    more = ("--ig-points", "1", "--ig-tolerance", "0.0001")
    result = extract(model, pairs, tmp_path / "v.safetensors", *more)
    assert result.exit_code == 0 and "warning:" in result.stdout


def test_chat_prompts(model, pairs, tmp_path):
    result = extract(model, pairs, tmp_path / "v.safetensors", "--chat")
    assert result.exit_code == 0 and "see --chat" not in result.stderr


BAD = [
    ({"--data": "absent.jsonl"}, "--data is 'absent.jsonl': no such file"),
    ({"--data": ""}, "--data is '': no such file"),
    ({"--data": "absent/folder"}, "not readable as a data set with split 'train'"),
    ({"--model": "absent"}, "model 'absent' cannot be loaded"),
    ({"--model": "./absent"}, "model './absent': no such folder"),
    ({"--k": "0"}, "--k is 0, expected 1 or more"),
    ({"--k": "40"}, "--k is 40, but the prompt has only"),
    ({"--ig-points": "0"}, "--ig-points is 0"),
    ({"--ig-batch": "0"}, "--ig-batch is 0"),
    ({"--ig-tolerance": "nan"}, "--ig-tolerance is nan"),
    ({"--strength": "inf"}, "--strength is inf"),
    ({"--layers": "2-9"}, "--layers is '2-9', the model's layers are 0 to 2"),
    ({"--layers": "x"}, "--layers is 'x', expected such as"),
    ({"--layers": "2-1"}, "--layers is '2-1': 2-1 runs backwards"),
    ({"--layers": "0-999999999"}, "--layers is '0-999999999', the model's layers are 0 to 2"),
    ({"--layers": "²"}, "--layers is '²', expected such as"),
    ({"--seed": "-1"}, "--seed is -1, expected 0 to"),
    ({"--seed": str(2**80)}, "expected 0 to 2**63 - 1"),
    ({"--device": "mps"}, "--device is 'mps', expected cpu, cuda, cuda:N or auto"),
    ({"--out": "x" * 300}, ": File name too long"),
    ({"--attributions": "v.safetensors"}, "--out and --attributions are the same file"),
    ({"--out": "pairs.jsonl", "--force": None}, "--data and --out are the same file"),
    ({"--dtype": "int8"}, "--dtype is 'int8', expected one of float32, bfloat16"),
    ({"--device": "cuda"}, "PyTorch finds no CUDA device"),
    ({"--blocks": "model.h"}, "--blocks is 'model.h'"),
    ({"--out": "absent/v.safetensors"}, "cannot be written (No such file or directory)"),
    ({"--out": "."}, "is a folder"),
    ({"--attributions": "absent/a.jsonl"}, "cannot be written"),
    ({"--mask": "blur"}, "Invalid value for '--mask'"),
    ({"--unknown": "1"}, "No such option"),
    ({"--method": "caa"}, "--k: has no meaning with --method caa; leave it out"),
    ({"--method": "caa", "--k": None, "--deltas": "d.safetensors"}, "--deltas: has no meaning"),
    ({"--method": "caa", "--k": None, "--read": "prompt-end"}, "--read is 'prompt-end', where"),
    ({"--method": "random", "--k": None, "--read": "response-end"}, "--read: has no meaning"),
    ({"--method": "magic"}, "Invalid value for '--method'"),
    ({"--recipe": "nosuch"}, "expected faitheval, mmhal, spa-vl, toxigen, truthfulqa or a .yaml"),
    ({"--recipe": "mmhal"}, "no preference pairs to extract from, it only evaluates"),
    ({"--recipe": "truthfulqa"}, "recipe 'truthfulqa' expects ['question', 'best_answer'"),
    ({"--data": None}, "--data is missing: name pairs to extract from, or a --recipe"),
    ({"--deltas": "v.safetensors"}, "--out and --deltas are the same file"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=str)
def test_bad_input_writes_nothing(model, pairs, tmp_path, monkeypatch, changes, message):
    if changes.get("--device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    arguments = {"--model": model, "--data": pairs, "--out": "v.safetensors", "--k": "3"} | changes
    flags = {"--force"}
    given = [pair for pair in arguments.items() if pair[1] is not None or pair[0] in flags]
    result = grains("extract", *(x for pair in given for x in pair if x is not None))
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output and result.stdout == ""
    assert names(tmp_path) == ["pairs.jsonl"]


def test_nan_weights_write_nothing(pairs, tmp_path_factory, tmp_path):
    folder = save_model(tmp_path_factory.mktemp("models") / "broken")
    model = build_model("llama")
    model.lm_head.weight.data[0, 0] = float("nan")
    model.save_pretrained(folder)
    result = extract(folder, pairs, tmp_path / "v.safetensors")
    assert result.exit_code == 2 and "'lm_head.weight' holds a NaN" in result.stderr
    assert names(tmp_path) == ["pairs.jsonl"]


def test_existing_out_needs_force(model, pairs, tmp_path):
    out = tmp_path / "v.safetensors"
    out.write_bytes(b"precious")
    result = extract(model, pairs, out)
    assert result.exit_code == 2 and "--force overwrites it" in result.stderr
    assert out.read_bytes() == b"precious"
    assert extract(model, pairs, out, "--force").exit_code == 0
    SteeringVector.load(out)


def test_inspect_refuses_a_broken_artifact(tmp_path):
    path = tmp_path / "v.safetensors"
    path.write_bytes(b"no")
    result = grains("inspect", path)
    assert result.exit_code == 2 and "cannot be read as a safetensors file" in result.stderr


def test_gguf_there_and_back(model, pairs, tmp_path):
    out, there = tmp_path / "v.safetensors", tmp_path / "v.gguf"
    extract(model, pairs, out)
    result = grains("export", out, "--out", there, "--model-hint", "llama")
    assert result.exit_code == 0 and "layer 0 is left out" in result.stderr
    back, by_hand = tmp_path / "back.safetensors", tmp_path / "by_hand.safetensors"
    assert grains("import", there, "--out", back, "--model", model).exit_code == 0
    size = ("--architecture", "LlamaForCausalLM", "--hidden-size", 32, "--num-layers", 3)
    assert grains("import", there, "--out", by_hand, *size).exit_code == 0
    original, loaded = SteeringVector.load(out), SteeringVector.load(back)
    torch.testing.assert_close(loaded.directions[1:], original.directions[1:])
    torch.testing.assert_close(loaded.reference_norms[1:], original.reference_norms[1:])
    assert loaded.model == original.model and not loaded.directions[0].any()
    assert SteeringVector.load(by_hand).digest == loaded.digest
    inspected = grains("inspect", back)
    assert inspected.exit_code == 0 and "0 (none)" in inspected.stdout
    result = grains("import", there, "--out", tmp_path / "x.safetensors")
    assert result.exit_code == 2 and "give --model" in result.stderr
    result = grains("export", out, "--out", there, "--model-hint", "llama")
    assert result.exit_code == 2 and "--force" in result.stderr


def test_ctrl_c_leaves_no_artifact_and_the_same_command_goes_on(model, tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows(96))
    out = tmp_path / "v.safetensors"

    def asked(path):
        found = ("extract", "--model", model, "--data", pairs, "--out", path, "--k", "3")
        return [*map(str, found), "--ig-points", "64"]

    process = subprocess.Popen(
        [sys.executable, "-m", "offline", *asked(out)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell's background job ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    partial = tmp_path / "v.safetensors.partial"
    deadline = time.monotonic() + 300
    while not (partial / "group-00001.safetensors").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"the same command goes on" in messages and b"Traceback" not in messages
    assert not out.exists() and names(tmp_path) == ["pairs.jsonl", "v.safetensors.partial"]
    groups = len(names(partial)) - 1
    assert 2 <= groups < 12

    whole = tmp_path / "whole.safetensors"
    for path in (out, whole):
        assert grains(*asked(path)).exit_code == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_the_command_says_what_to_install_where_only_the_plugin_is():
    code = "import sys; sys.modules['typer'] = None; from offline.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "grains needs typer: pip install 'grains-vllm[offline]'\n"


def test_inspect_shows_what_it_understands_of_a_strangers_passport(tmp_path):
    passport = {
        "model_id": "a[/]b", "method": "[/red] [bold]x", "data": "file", "options": "x",
        "completeness": {"min": 1}, "layers": [{}, {"layer": 0, "stability": "hi"}],
        "examples_used": 3,
    }  # fmt: skip
    vector = SteeringVector(
        torch.eye(2, 4), torch.ones(2), ModelFingerprint("LlamaForCausalLM", 4, 2), passport
    )
    vector.save(tmp_path / "v.safetensors")
    result = grains("inspect", tmp_path / "v.safetensors")
    assert result.exit_code == 0, result.output
    assert "a[/]b" in result.stdout and "[bold]x" in result.stdout


def test_a_full_disk_is_a_message(model, pairs, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "v.safetensors")

    monkeypatch.setattr("offline.partial.write_aside", full)
    result = extract(model, pairs, tmp_path / "v.safetensors")
    assert result.exit_code == 2
    assert "v.safetensors: No space left on device" in result.stderr


def test_import_refuses_two_descriptions_of_the_model(model, tmp_path):
    (tmp_path / "c.gguf").write_bytes(b"")
    more = ("--model", model, "--hidden-size", "5")
    result = grains("import", tmp_path / "c.gguf", "--out", tmp_path / "v", *more)
    assert result.exit_code == 2 and "--model says it all" in result.stderr
