"""One engine per (model, mode, dtype, grains, runner), shared by all tests that need it."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.engine.jobs import JOBS
from tests.tiny import save_world
from tests.warm import run_python

Answers = dict[str, Any]
UNSTEERED = ("alone", "mixed", "after refusals")  # batches that a plain engine is asked too


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    for name in ("llama", "gpt2"):
        save_world(folder, name)
    return folder


@pytest.fixture(scope="session")
def engine(worlds: Path) -> Callable[..., Answers]:
    """engine(model, mode, dtype, grains=..., runner=...) -> result by batch name, of one run."""

    @cache
    def run(
        model: str, mode: str, dtype: str = "float32", grains: bool = True, runner: str = "v1"
    ) -> Answers:
        engine_args: dict[str, Any] = {"dtype": dtype}
        if mode == "eager":
            engine_args["enforce_eager"] = True
        else:
            engine_args["compilation_config"] = {"mode": int(mode)}
        if grains:
            engine_args["additional_config"] = {"grains": {"config": str(worlds / f"{model}.yaml")}}
        batches = JOBS if grains else {name: plain(JOBS[name]) for name in UNSTEERED}
        job = {
            "model": str(worlds / model),
            "runner": runner,
            "engine": engine_args,
            "batches": batches,
        }
        stem = worlds / f"{model}-{mode}-{dtype}-{'grains' if grains else 'plain'}-{runner}"
        # The yardstick is a vLLM that has not even loaded the plugin.
        results = run_job(stem, job, {} if grains else {"VLLM_PLUGINS": "none"})
        assert results["runner"] == runner
        return results

    return run


def run_job(
    stem: Path,
    job: dict[str, Any],
    environment: dict[str, str] | None = None,
    module: str = "tests.engine.engine_process",
) -> Answers:
    """Runs an engine process on STEM.job.json; returns its result."""
    asked, answered = stem.with_suffix(".job.json"), stem.with_suffix(".result.json")
    asked.write_text(json.dumps(job))
    v2 = job.get("runner") == "v2"
    done = run_python("-m", module, asked, answered, environment=environment, v2_runner=v2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    results: Answers = json.loads(answered.read_text())
    return results


def plain(batch: dict[str, Any]) -> dict[str, Any]:
    """The same requests without steering."""
    requests = [{**request, "extra_args": None} for request in batch["requests"]]
    return {**batch, "requests": requests}
