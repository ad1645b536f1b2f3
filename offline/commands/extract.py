"""`grains extract`: one steering direction per layer from preference pairs."""

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grains_vllm.checks import MAX_STRENGTH
from grains_vllm.vectors import write_aside
from offline.console import (
    AllowImageUrls,
    Chat,
    DeviceMap,
    Dtype,
    Force,
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
from offline.options import (
    AttributionMethod,
    Baseline,
    Direction,
    ExtractOptions,
    Mask,
    Method,
    Mode,
    Objective,
    Read,
    Tokens,
)
from offline.team import joined

if TYPE_CHECKING:
    from offline.recipe_form import Recipe

_DEFAULTS = ExtractOptions()
_FIELDS = tuple(field.name for field in dataclasses.fields(ExtractOptions))
_WHAT = {
    "validation": ": for `grains sweep`, disjoint from the pairs above",
    "test": ": for `grains evaluate`, disjoint from both",
}
_OF_GRAINS = (
    "ig_batch",
    "recompute",
    "attributions",
    "deltas",
)  # besides the fields of ExtractOptions


def extract(
    context: typer.Context,
    model: ModelName,
    out: Annotated[Path, typer.Option(help="The artifact to write (.safetensors).")],
    data: Annotated[
        str | None, typer.Option(help="Pairs: .jsonl, .csv, .parquet, a folder or hub id.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A known data set with its settings, or your own .yaml.")
    ] = None,
    method: Annotated[
        Method, typer.Option(help="GrAInS, or what it is compared with.")
    ] = _DEFAULTS.method,
    limit: Annotated[
        int | None, typer.Option(help="Draw this many examples; with a recipe, for calibration.")
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Of drawing (a recipe draws with its own), random scores and directions, "
            "split halves."
        ),
    ] = 0,
    split: Split = "train",
    chat: Chat = False,
    allow_image_urls: AllowImageUrls = False,
    k: Annotated[
        int | None,
        typer.Option(
            "--k",
            help="Most tokens per set T+ and T-; by default 10, and 50 in prompts with an image.",
        ),
    ] = _DEFAULTS.k,
    tokens: Annotated[
        Tokens, typer.Option(help="Which tokens of prompts with an image may be selected.")
    ] = _DEFAULTS.tokens,
    objective: Annotated[
        Objective, typer.Option(help="How a response's token log-likelihoods become one number.")
    ] = _DEFAULTS.objective,
    attribution: Annotated[AttributionMethod, typer.Option()] = _DEFAULTS.attribution,
    baseline: Annotated[
        Baseline, typer.Option(help="The embedding that stands for no token.")
    ] = _DEFAULTS.baseline,
    ig_points: Annotated[
        int | None, typer.Option(help="Fixed number of points; by default 32, 65, 128, 257.")
    ] = None,
    ig_max_points: Annotated[
        int, typer.Option(help="Where the adaptive numbers end.")
    ] = _DEFAULTS.ig_max_points,
    ig_tolerance: Annotated[
        float, typer.Option(help="Completeness gap that is good enough.")
    ] = _DEFAULTS.ig_tolerance,
    ig_batch: Annotated[
        int | None,
        typer.Option(help="Rows per forward; by default 8, fewer above 4096 tokens in all."),
    ] = None,
    recompute: Annotated[
        bool | None,
        typer.Option(
            help="Compute activations twice instead of keeping them for the backward pass; by "
            "default where one row is too large, which on a CPU means above 4096 tokens."
        ),
    ] = None,
    smoothgrad_samples: Annotated[int, typer.Option()] = _DEFAULTS.smoothgrad_samples,
    smoothgrad_noise: Annotated[
        float, typer.Option(help="Noise as a share of the embeddings' spread.")
    ] = _DEFAULTS.smoothgrad_noise,
    mask: Annotated[Mask, typer.Option(help="What replaces a selected token.")] = _DEFAULTS.mask,
    read: Annotated[
        Read | None,
        typer.Option(
            help="Where block outputs are read; by default prompt-end for grains and random, "
            "response-end for the others. response-mean suits answers without a decisive word."
        ),
    ] = None,
    direction: Annotated[Direction, typer.Option()] = _DEFAULTS.direction,
    mode: Annotated[Mode, typer.Option()] = _DEFAULTS.mode,
    dtype: Dtype = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    device_map: DeviceMap = None,
    blocks: Annotated[
        str | None, typer.Option(help="Name of the block list, such as model.layers.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Recommend these layers, such as 8-15,20.")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Recommend this strength.")] = None,
    attributions: Annotated[
        Path | None,
        typer.Option(help="Where tokens, scores and choices go (JSONL); by default beside --out."),
    ] = None,
    deltas: Annotated[
        Path | None, typer.Option(help="Also keep the deltas behind the vector (.safetensors).")
    ] = None,
    force: Force = False,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Compute one steering direction per layer from preference pairs."""
    values = locals().copy()  # the arguments, as types rather than text
    given = {
        name
        for name in values.keys() - {"context"}
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    going_on = f"the same command goes on from {out.name}.partial, if it is there"
    with input_errors(going_on), joined() as team:
        require_choice("--dtype", dtype, ("float32", "bfloat16"))
        if ig_batch is not None and ig_batch < 1:
            raise InputError(f"--ig-batch is {ig_batch}, expected 1 or more")
        if strength is not None and not abs(strength) <= MAX_STRENGTH:
            limits = f"-{MAX_STRENGTH:g} to {MAX_STRENGTH:g}"
            raise InputError(f"--strength is {strength}, expected {limits}")
        plan = _recipe(recipe, data)
        asked = {name: values[name] for name in _FIELDS if name in given}
        options = ExtractOptions(**{**(_options(plan) if plan else {}), **asked})
        options.require_meaning(name for name in given if name in (*_FIELDS, *_OF_GRAINS))
        files = _files(out, options.method, attributions, deltas, plan is not None)
        require_different(data=data, **files)
        for path in files.values() if team.leads else ():
            require_writable(path, force)

        from offline import summary
        from offline.chat_text import chat_template
        from offline.extract import extract as run
        from offline.extract import finish
        from offline.kept_deltas import KeptDeltas
        from offline.model import load_decoder
        from offline.pairs import load_pairs, write_pairs

        if plan is None:
            assert data is not None
            sets = {
                "": load_pairs(
                    data,
                    chat=chat,
                    limit=limit,
                    seed=seed,
                    split=split,
                    allow_image_urls=allow_image_urls,
                )
            }
        else:
            from offline.recipe import load_splits

            chosen = split if "split" in given else None
            sets = load_splits(
                plan, data, split=chosen, chat=options.chat, calibration=limit,
                allow_image_urls=allow_image_urls,
            )  # fmt: skip
        pairs = next(iter(sets.values()))
        team.share()  # What one process finds wrong by now spares all of them the model.
        decoder = load_decoder(
            model,
            dtype=dtype,
            device=team.device(device, device_map),
            device_map=device_map,
            blocks=blocks,
        )
        if plan and options.chat and not chat_template(decoder.tokenizer, decoder.processor):
            raise InputError(
                f"recipe '{plan.name}' makes chat prompts, but the tokenizer of model "
                f"'{decoder.name}' has no chat template; --no-chat makes text prompts"
            )
        recommended = _recommendation(layers, strength, len(decoder.blocks))
        notes: list[str] = []
        kept: list[KeptDeltas] = []

        def note(text: str) -> None:
            notes.append(text)
            stderr.print(f"note: {text}")

        with progress(len(pairs.pairs), visible=team.leads) as advance:
            vector, records = run(
                decoder, pairs, options, out,
                batch_rows=ig_batch, recompute=recompute, team=team, restart=restart,
                recommended=recommended, strict_k="k" in given,
                on_examples=advance, on_note=note, on_deltas=kept.append,
            )  # fmt: skip
        if not team.leads:
            return
        if "attributions" in files:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_aside(files["attributions"], lines.encode())
        if "deltas" in files:
            kept[0].save(files["deltas"])
        for name in ("validation", "test"):
            if name in files:
                write_pairs(files[name], sets[name].pairs)
        finish(vector, out)
        if as_json:
            names = {name: path.name for name, path in files.items()}
            print(summary.as_json(vector, files=names, out=out.name, notes=notes))
        else:
            summary.show(vector)
            for name, path in files.items():
                print(f"wrote {path}" + _WHAT.get(name, ""))


def _recipe(name: str | None, data: str | None) -> "Recipe | None":
    if name is None:
        if data is None:
            raise InputError("--data is missing: name pairs to extract from, or a --recipe")
        return None
    from offline.recipe import load_recipe, require_pairs

    plan = load_recipe(name)
    require_pairs(plan)
    return plan


def _options(recipe: "Recipe") -> dict[str, Any]:
    return {**recipe.options, "chat": recipe.format == "chat"}


def _files(
    out: Path, method: Method, attributions: Path | None, deltas: Path | None, splits: bool
) -> dict[str, Path]:
    """What is written, by the name of its option; companions of the artifact stand beside it."""
    stem = out.name.removesuffix(".safetensors")
    files = {"out": out}
    if method is Method.grains:
        files["attributions"] = attributions or out.parent / f"{stem}.attributions.jsonl"
        if deltas is not None:
            files["deltas"] = deltas
    if splits:
        files |= {name: out.parent / f"{stem}.{name}.jsonl" for name in ("validation", "test")}
    return files


def _recommendation(
    layers: str | None, strength: float | None, num_layers: int
) -> dict[str, Any] | None:
    if layers is None and strength is None:
        return None
    facts: dict[str, Any] = {"source": "given to grains extract"}
    if layers is not None:
        facts["layers"] = _layers(layers, num_layers)
    if strength is not None:
        facts["strength"] = strength
    return facts


def _layers(text: str, num_layers: int) -> list[int]:
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        if match is None:
            raise InputError(f"--layers is '{text}', expected such as 8-15,20")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"--layers is '{text}': {part} runs backwards")
        if last >= num_layers:
            raise InputError(f"--layers is '{text}', the model's layers are 0 to {num_layers - 1}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)
