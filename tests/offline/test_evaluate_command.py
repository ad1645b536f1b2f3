"""What `grains evaluate` refuses before it reads data or starts anything."""

import sys

import pytest
from typer.testing import CliRunner

from offline.cli import app
from tests.evaluation_world import random_vector

URL = ["--url", "http://127.0.0.1:9", "--steered", "m:v"]
TEXT = ["--task", "perplexity", "--text", "t.txt"]
JUDGE = ["--judge-url", "http://x", "--judge-model", "m"]
CASES = {
    "no alias": (["--url", "http://x", *TEXT], "--steered is missing"),
    "no target": (TEXT, "--vector is missing (or --url"),
    "alias without url": (["--steered", "m:v", *TEXT], "--steered is for a running server"),
    "strength with url": ([*URL, "--strength", "1", *TEXT], "--strength is for a server of one's"),
    "strength": (["--vector", "v.safetensors", "--strength", "nan", *TEXT], "a finite number"),
    "positions": (["--vector", "v.safetensors", "--positions", "x", *TEXT], "--positions is 'x':"),
    "pairs": ([*URL, "--task", "pairs"], "--task pairs needs --data"),
    "controls": ([*URL, "--task", "controls"], "--task controls needs --controls"),
    "twice": ([*URL, *TEXT, "--task", "perplexity"], "--task perplexity is given twice"),
    "judge": ([*URL, "--task", "judged:truthfulqa"], "needs --judge-url and --judge-model"),
    "mmhal's judge": ([*URL, "--task", "mmhal"], "--task mmhal needs --judge-url"),
    "mmhal's name": ([*URL, "--task", "judged:mmhal", *JUDGE], "it is called mmhal"),
    "images": ([*URL, "--task", "spa-vl", "--images", "x"], "--images is 'x', which is no folder"),
    "half a judge": ([*URL, *TEXT, "--judge-model", "m"], "go together"),
    "rubric": (
        [*URL, "--task", "judged:x", *JUDGE, "--data", "d"],
        "judged:x names no rubric, expected mmhal, pairs, spa-vl, truthfulqa",
    ),
    "task data": ([*URL, *TEXT, "--task-data", "mmlu"], "expected NAME=FILE"),
    "task data file": ([*URL, *TEXT, "--task-data", "mmlu=x"], "'x' is no file"),
    "unused data": ([*URL, *TEXT, "--task-data", "mmlu=t.txt"], "names 'mmlu', which is no --task"),
    "unused goal": ([*URL, *TEXT, "--goal", "arc_easy"], "--goal names 'arc_easy'"),
    "limit": ([*URL, *TEXT, "--limit", "0"], "--limit is 0"),
    "confidence": ([*URL, *TEXT, "--confidence", "95"], "--confidence is 95"),
    "same file": ([*URL, "--task", "perplexity", "--text", "x.json"], "are the same file"),
    "nobody there": ([*URL, *TEXT], "no answer after 5 attempts"),
    "address": (["--url", "x", "--steered", "m:v", *TEXT], "'x' is no address"),
    "no strength": (["--vector", "weak.safetensors", *TEXT], "--strength is missing"),
    "layers": (["--vector", "v.safetensors", "--layers", "9", *TEXT], "--layers is '9'"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("offline.endpoint.FIRST_WAIT_S", 0.01)
    (tmp_path / "t.txt").write_text("The moon is blue.\n")
    random_vector(0).save("v.safetensors")
    random_vector(0, recommended={}).save("weak.safetensors")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", "--model", "m", "--out", "x.json", *arguments])


@pytest.mark.parametrize("case", CASES)
def test_bad_options_are_named(folder, case):
    arguments, message = CASES[case]
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert not (folder / "x.json").exists() and not (folder / "x.json.partial").exists()


def test_without_lm_eval_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("offline.evaluation.harness_tasks.find_spec", lambda name: None)
    result = run(*URL, "--task", "mmlu")
    assert result.exit_code == 2
    assert "pip install 'grains-vllm[eval]'" in result.stderr


def test_without_its_own_libraries_too(folder, monkeypatch):
    monkeypatch.setattr("offline.commands.evaluate.find_spec", lambda name: None)
    result = run(*URL, *TEXT)
    assert result.exit_code == 2
    assert "httpx, scipy is not installed: pip install 'grains-vllm[eval]'" in result.stderr
