"""`grains sweep`: which layers, strength and vector work best within side-effect limits."""

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from grains_vllm import __version__
from grains_vllm.vectors import write_aside
from offline import grid, sweep_files
from offline.console import (
    AllowImageUrls,
    Chat,
    DeviceMap,
    Dtype,
    Json,
    ModelName,
    Restart,
    Split,
    input_errors,
    progress,
    require_choice,
    require_different,
    require_writable,
    stderr,
)
from offline.errors import InputError


def sweep(
    model: ModelName,
    data: Annotated[str, typer.Option(help="Validation pairs, in any form that extract takes.")],
    artifacts: Annotated[list[Path] | None, typer.Argument(help="Vectors to try.")] = None,
    controls: Annotated[
        Path | None, typer.Option(help="Answers to keep: prompt and completion (.jsonl).")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text whose perplexity is to stay (.txt lines, .jsonl).")
    ] = None,
    deltas: Annotated[
        Path | None, typer.Option(help="Kept deltas from which --estimators make vectors.")
    ] = None,
    estimators: Annotated[
        str | None, typer.Option(help="Such as mean,pca,positive,pca:positive.")
    ] = None,
    layers: Annotated[
        str, typer.Option(help="single, all, ranges, ranges:4, lists (8-15,20); joined by ';'.")
    ] = grid.LAYERS,
    strengths: Annotated[
        str | None,
        typer.Option(
            help=f"Numbers with commas; by default {grid.STRENGTHS} of the usual length of the "
            "residual stream, also for imported vectors, whose strengths are in other units."
        ),
    ] = None,
    positions: Annotated[
        str, typer.Option(help="With commas, such as all,generation,prompt:1+generation.")
    ] = grid.POSITIONS,
    metric: Annotated[str, typer.Option(help="accuracy, exact or margin.")] = "accuracy",
    min_controls: Annotated[
        float | None, typer.Option(help="Least share of controls kept (0.95).")
    ] = None,
    max_increase: Annotated[
        float | None,
        typer.Option("--max-perplexity-increase", help="Most increase of perplexity (0.03)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Draw this many pairs.")] = None,
    seed: Annotated[int, typer.Option(help="Of drawing.")] = 0,
    split: Split = "train",
    chat: Chat = False,
    allow_image_urls: AllowImageUrls = False,
    backend: Annotated[str, typer.Option(help="transformers or vllm.")] = "transformers",
    dtype: Dtype = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto (transformers).")] = "auto",
    device_map: DeviceMap = None,
    batch: Annotated[int, typer.Option(help="Rows per forward (transformers).")] = 32,
    engine_args: Annotated[
        str | None, typer.Option(help="More arguments of vLLM's LLM, as a JSON object.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the chosen vector goes; by default its own file.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="A folder for plots (PNG).")] = None,
    force: Annotated[bool, typer.Option(help="Overwrite what an earlier sweep wrote.")] = False,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Measure vectors at many layers and strengths; recommend the best within limits.

    The chosen layers, strength and positions are written into the vector's passport, from which
    servers take their defaults. Exit code 1: no point keeps the limits.
    """
    with input_errors("the same command goes on from its .sweep.json.partial, if it is there"):
        require_choice("--backend", backend, ("transformers", "vllm"))
        require_choice("--dtype", dtype, ("float32", "bfloat16"))
        require_choice("--metric", metric, ("accuracy", "exact", "margin"))
        if batch < 1:
            raise InputError(f"--batch is {batch}, expected 1 or more")
        target = sweep_files.target_path(artifacts or [], deltas, out)
        table = sweep_files.table_path(target)
        for option, path, limit_option, value in (
            ("--controls", controls, "--min-controls", min_controls),
            ("--text", text, "--max-perplexity-increase", max_increase),
        ):
            if path is not None and not path.is_file():
                raise InputError(f"{option} is '{path}': no such file")
            if value is not None and path is None:
                raise InputError(f"{limit_option} is given without {option}, expected both")
            most = 1 if path is controls else math.inf
            if value is not None and not (0 <= value <= most and math.isfinite(value)):
                raise InputError(
                    f"{limit_option} is {value}, expected {'0 to 1' if most == 1 else '0 or more'}"
                )
        require_different(data=data, controls=controls, text=text, deltas=deltas, out=out)
        require_writable(table, force)
        require_writable(target, force or out is None)
        more_args = _engine_args(engine_args, backend)

        from offline import candidates, sweep_table
        from offline.backends import transformers_back_end, vllm_back_end
        from offline.pairs import load_pairs
        from offline.partial import PartialRun, discard
        from offline.scoring import Measures
        from offline.suite import load_suite, require_disjoint
        from offline.sweep import Limits, recommend
        from offline.sweep import sweep as run

        started = time.monotonic()
        vectors = candidates.load(artifacts or [], deltas, estimators, _note)
        points = grid.grid(
            vectors, layers, grid.STRENGTHS if strengths is None else strengths, positions
        )
        unscaled = candidates.imported(vectors) if strengths is None else []
        if unscaled and backend == "vllm":
            raise InputError(
                f"--strengths is missing: '{unscaled[0]}' is imported, so that its strength of 1 "
                "is the length in its file. --backend transformers knows the stream's own length"
            )
        pairs = load_pairs(
            data, chat=chat, limit=limit, seed=seed, split=split, allow_image_urls=allow_image_urls
        )
        for note in pairs.notes:
            _note(note)
        silent = require_disjoint(pairs, vectors)
        if silent:
            _note(
                f"{', '.join(silent)}: the passport names no calibration examples, so that overlap "
                "with the validation pairs cannot be checked"
            )
        if backend == "transformers":
            back_end = transformers_back_end(model, dtype, device, device_map)
        else:
            back_end = vllm_back_end(model, dtype)
        for name, vector in vectors.items():
            vector.model.require(back_end.fingerprint, f"'{name}'")
        sources = load_suite(
            pairs, back_end.tokenizer, back_end.config, controls, text, chat, back_end.processor,
            allow_image_urls=allow_image_urls,
        )  # fmt: skip
        factors = {}
        if unscaled:
            norms = back_end.usual_norms(sources.suite.pairs)
            factors = {name: candidates.factor(vectors[name], norms) for name in unscaled}
            points = grid.scaled(points, factors)
        for name, times in factors.items():
            _note(
                f"'{name}' is imported: the usual length of the stream is {times:g} times its own, "
                "and strengths are multiplied by that"
            )
        limits = Limits(
            _or_default(min_controls, 0.95, controls), _or_default(max_increase, 0.03, text)
        )
        facts = {
            "model_id": back_end.name,
            "backend": backend,
            "data": sources.facts,
            "vectors": {name: candidates.facts(vector) for name, vector in vectors.items()},
            **({"strengths_multiplied": factors} if factors else {}),
        }
        manifest = {
            **facts,
            "version": __version__,
            "weights": back_end.weights,
            "dtype": dtype,
            "engine_args": more_args,
            "grid": {"layers": layers, "strengths": strengths, "positions": positions},
            "drawn": {"limit": limit, "seed": seed, "chat": chat},
        }
        with PartialRun(table, manifest, restart) as partial:
            done = sweep_files.finished(partial, len(points))
            with progress(len(points) + 1 - len(done), "points") as advance:

                def keep(index: int | None, found: Measures) -> None:
                    sweep_files.keep(partial, index, found)
                    advance(1)

                scorer = back_end.scorer(
                    sources.suite.items, vectors, points, batch, more_args, _note
                )
                result = run(scorer, sources.suite, points, metric, limits, keep, done)
        document = {
            "kind": "grains-sweep",
            "version": 1,
            "created_with": sweep_files.versions(backend),
            **facts,
            **result,
            "seconds": round(time.monotonic() - started, 3),
        }
        if result["chosen"] is not None:
            chosen = vectors[result["points"][result["chosen"]]["vector"]]
            about = sweep_files.summary(document, pairs, {"seed": seed, "dtype": dtype})
            recommend(chosen, result, about).save(target)
        text_out = json.dumps(document, indent=1, sort_keys=True, allow_nan=False)
        write_aside(table, text_out.encode())
        discard(table)
        if plots is not None:
            _plot(document, plots)
        if as_json:
            print(text_out)
        else:
            sweep_table.show(document)
            print(f"wrote {table}")
        base = result["base"]
        if result["chosen"] is None:
            if not limits.allow(Measures(**base), Measures(**base)):
                _note(
                    f"the model without steering keeps only {base['controls']:.3f} of the controls"
                )
            stderr.print("no point keeps the limits; nothing is recommended", soft_wrap=True)
            raise typer.Exit(1)
        best = result["points"][result["chosen"]]
        if best[metric] <= base[metric]:
            _note(
                f"the chosen point is no better than the model without steering: {metric} "
                f"{best[metric]:.3f} against {base[metric]:.3f}"
            )
        _note(f"recommended in {target}")


def _note(text: str) -> None:
    stderr.print(f"note: {text}", soft_wrap=True)


def _or_default(value: float | None, default: float, source: Path | None) -> float | None:
    if source is None:
        return None
    return default if value is None else value


def _engine_args(text: str | None, backend: str) -> dict[str, Any]:
    if text is None:
        return {}
    if backend != "vllm":
        raise InputError("--engine-args belongs to --backend vllm")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"--engine-args is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"--engine-args is '{text}', expected a JSON object")
    return value


def _plot(document: dict[str, Any], folder: Path) -> None:
    from offline import plots

    folder.mkdir(parents=True, exist_ok=True)
    plots.save(plots.dose_response(document), folder / "dose-response.png")
    plots.save(plots.heat_map(document), folder / "heat-map.png")
