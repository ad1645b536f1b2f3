"""`grains evaluate`: base against steered in one report, with intervals and side effects."""

import json
import math
import os
import shlex
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from grains_vllm.positions import Positions, PositionsError
from grains_vllm.vectors import SteeringVector, write_aside
from offline.console import (
    AllowImageUrls,
    Force,
    Json,
    Restart,
    input_errors,
    progress,
    require_different,
    require_writable,
    stderr,
)
from offline.errors import InputError

Many = list[str]


def evaluate(
    model: Annotated[str, typer.Option(help="Served name (with --url), else folder or hub id.")],
    out: Annotated[Path, typer.Option(help="The report to write, such as X.evaluation.json.")],
    task: Annotated[
        Many,
        typer.Option(
            help="truthfulqa-mc1, -mc2, -gen, toxigen, faitheval, mmlu or any lm-eval task; pairs, "
            "perplexity, controls, distinct; judged:truthfulqa, judged:pairs; about images: mmhal, "
            "spa-vl, judged:spa-vl. Repeatable."
        ),
    ],
    url: Annotated[str | None, typer.Option(help="A running server with --enable-grains.")] = None,
    steered: Annotated[
        Many | None, typer.Option(help="With --url: a model alias, NAME:VECTOR. Repeatable.")
    ] = None,
    vector: Annotated[
        list[Path] | None,
        typer.Option(help="An artifact: served without --url; with it, checked for overlap."),
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Without --url; of every vector.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Without --url; such as 8-15,20, of every vector.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="Without --url; all, generation, prompt:1+generation, ...")
    ] = None,
    serve_args: Annotated[
        str, typer.Option(help="Without --url; more flags for vllm serve, in one text.")
    ] = "",
    data: Annotated[
        str | None, typer.Option(help="Preference pairs: for pairs, distinct, judged:pairs.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Texts (.txt, .jsonl): perplexity.")] = None,
    controls: Annotated[
        Path | None, typer.Option(help="prompt and completion (.jsonl): controls.")
    ] = None,
    task_data: Annotated[
        Many | None,
        typer.Option(help="NAME=FILE, a task's data instead of the hub's. Repeatable."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of the images that a task's data names; else beside the data."),
    ] = None,
    allow_image_urls: AllowImageUrls = False,
    goal: Annotated[
        Many | None, typer.Option(help="An lm-eval task that is no side effect. Repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first items of every task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="lm-eval's.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Of a generated answer.")] = 256,
    chat: Annotated[bool, typer.Option(help="Prompts become a chat's user message.")] = False,
    exclude_overlap: Annotated[
        bool, typer.Option(help="Leave out questions that made or chose the vector.")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id; by default the server's model.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 32,
    api_key: Annotated[
        str | None, typer.Option(envvar="GRAINS_API_KEY", help="Of --url.", show_default=False)
    ] = None,
    judge_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server.")] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="Its key: GRAINS_JUDGE_API_KEY in the environment.")
    ] = None,
    harness_results: Annotated[
        Path | None, typer.Option(help="Folder for lm-eval's own results and samples.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    force: Force = False,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Compare a model with and without steering: tasks, intervals, side effects."""
    with input_errors(f"the same command goes on from {out.name}.partial, if it is there"):
        missing = [name for name in ("httpx", "scipy") if find_spec(name) is None]
        if missing:
            raise InputError(
                f"{', '.join(missing)} is not installed: pip install 'grains-vllm[eval]'"
            )
        vectors = vector or []
        _require_target(url, steered, vectors, strength, layers, positions, serve_args)
        if not 0 < confidence < 1:
            raise InputError(f"--confidence is {confidence}, expected a number between 0 and 1")
        if seed < 0:
            raise InputError(f"--seed is {seed}, expected 0 or more")
        require_different(data=data, text=text, controls=controls, out=out)
        require_writable(out, force)
        if (judge_url is None) != (judge_model is None):
            raise InputError("--judge-url and --judge-model go together")

        if images is not None and not images.is_dir():
            raise InputError(f"--images is '{images}', which is no folder")

        from offline.evaluation.image_data import Images
        from offline.evaluation.plan import Plan

        plan = Plan(
            task, data, text, controls, _named_files(task_data or []), goal or [], chat, limit,
            num_fewshot, max_tokens, harness_results, Images(images, allow_image_urls),
        )  # fmt: skip
        plan.require_complete(judge_url is not None)
        source = tokenizer or model
        if not plan.online and Path(source).is_dir():
            # Everything is here: nobody is to ask the hub whether there is something newer.
            for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
                os.environ.setdefault(name, "1")

        from offline.endpoint import Endpoint
        from offline.evaluation.confidence import Bootstrap
        from offline.evaluation.connection import own_server, running_server
        from offline.evaluation.evaluate import document, manifest, measure_all
        from offline.evaluation.judge import Judge
        from offline.evaluation.overlap import seen_by
        from offline.evaluation.plan import make_tasks
        from offline.evaluation.report import show
        from offline.partial import PartialRun, discard

        notes: list[str] = []

        def note(words: str) -> None:
            if words not in notes:
                notes.append(words)
                stderr.print(f"note: {words}")

        artifacts = {path.name: SteeringVector.load(path) for path in vectors}
        seen = seen_by(artifacts, exclude_overlap)
        if not artifacts:
            note("overlap with calibration data is not checked; --vector names the artifact")
        for name in seen.silent:
            note(f"{name} does not say what it was made from, so its overlap is not checked")
        judge = None
        if judge_url is not None and judge_model is not None:
            key = os.environ.get("GRAINS_JUDGE_API_KEY")
            judge = Judge(Endpoint(judge_url, key, concurrency), judge_model)
        tasks = make_tasks(plan, seen, judge, progress, note)
        for made in tasks:
            if count := made.facts.get("excluded"):
                note(f"{made.name}: {count} questions that made or chose the vector are left out")
        if url is None:
            served: Any = own_server(
                model, artifacts, vectors, strength, layers, positions, shlex.split(serve_args),
                tokenizer, concurrency,
            )  # fmt: skip
        else:
            served = running_server(url, api_key, model, steered or [], tokenizer, concurrency)
        started = time.monotonic()
        with served as target:
            facts = manifest(target, tasks)
            with PartialRun(out, facts, restart) as partial:
                outcomes = measure_all(target, tasks, partial, _say)
        result = document(
            target, tasks, outcomes, Bootstrap(confidence, seed=seed),
            {
                "vectors": {name: {"digest": found.digest} for name, found in artifacts.items()},
                "overlap_checked": bool(artifacts) and not seen.silent,
                "notes": notes,
                "seconds": round(time.monotonic() - started, 1),
            },
        )  # fmt: skip
        text_form = json.dumps(result, indent=1, sort_keys=True, allow_nan=False)
        write_aside(out, text_form.encode())
        discard(out)
        if as_json:
            print(text_form)
        else:
            show(result)
            print(f"wrote {out}")


def _require_target(
    url: str | None,
    steered: Many | None,
    vectors: list[Path],
    strength: float | None,
    layers: str | None,
    positions: str | None,
    serve_args: str,
) -> None:
    names = [path.stem for path in vectors]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InputError(f"--vector: two files are called '{name}', rename one of them")
    if url is not None:
        if not steered:
            raise InputError("--steered is missing: which model alias, such as NAME:truthful?")
        own = {
            "--strength": strength, "--layers": layers, "--positions": positions,
            "--serve-args": serve_args or None,
        }  # fmt: skip
        for option, value in own.items():
            if value is not None:
                raise InputError(f"{option} is for a server of one's own; --url has its catalogue")
        return
    if steered:
        raise InputError("--steered is for a running server (--url); here --vector is steered by")
    if not vectors:
        raise InputError("--vector is missing (or --url with --steered for a running server)")
    if strength is not None and not math.isfinite(strength):
        raise InputError(f"--strength is {strength}, expected a finite number")
    if positions is not None:
        try:
            Positions.parse(positions)
        except PositionsError as error:
            raise InputError(f"--positions is '{positions}': {error}") from None


def _named_files(values: Many) -> dict[str, str]:
    files = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not (name and equals and file):
            raise InputError(f"--task-data is '{value}', expected NAME=FILE")
        if name in files:
            raise InputError(f"--task-data gives '{name}' twice")
        if not Path(file).exists():
            raise InputError(f"--task-data {name}: '{file}' is no file or folder")
        files[name] = file
    return files


def _say(task: str, setting: str, kept: bool) -> None:
    stderr.print(f"{task}, {setting}{': done by the interrupted run' if kept else ''}")
