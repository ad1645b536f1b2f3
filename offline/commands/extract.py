"""`grains extract`: one steering direction per layer from preference pairs."""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from grains_vllm.vectors import write_aside
from offline.console import (
    Force,
    Json,
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
    Mode,
    Objective,
    Read,
)

_DEFAULTS = ExtractOptions()


def extract(
    model: Annotated[str, typer.Option(help="Folder or hub id of a causal language model.")],
    data: Annotated[str, typer.Option(help="Pairs: .jsonl, .csv, .parquet, a folder or hub id.")],
    out: Annotated[Path, typer.Option(help="The artifact to write (.safetensors).")],
    limit: Annotated[int | None, typer.Option(help="Draw this many examples.")] = None,
    seed: Annotated[int, typer.Option(help="Of drawing, random scores, split halves.")] = 0,
    split: Annotated[str, typer.Option(help="Split of a folder or hub data set.")] = "train",
    chat: Annotated[bool, typer.Option(help="Make string prompts a chat's user message.")] = False,
    k: Annotated[
        int | None, typer.Option("--k", help=f"Most tokens per set T+ and T- ({_DEFAULTS.k}).")
    ] = None,
    objective: Annotated[Objective, typer.Option()] = _DEFAULTS.objective,
    attribution: Annotated[AttributionMethod, typer.Option()] = _DEFAULTS.attribution,
    baseline: Annotated[Baseline, typer.Option()] = _DEFAULTS.baseline,
    ig_points: Annotated[
        int | None, typer.Option(help="Fixed number of points; by default 32, 65, 128, 257.")
    ] = None,
    ig_max_points: Annotated[
        int, typer.Option(help="Where the adaptive numbers end.")
    ] = _DEFAULTS.ig_max_points,
    ig_tolerance: Annotated[
        float, typer.Option(help="Completeness gap that is good enough.")
    ] = _DEFAULTS.ig_tolerance,
    ig_batch: Annotated[int, typer.Option(help="Rows per forward.")] = 8,
    smoothgrad_samples: Annotated[int, typer.Option()] = _DEFAULTS.smoothgrad_samples,
    smoothgrad_noise: Annotated[
        float, typer.Option(help="Noise as a share of the embeddings' spread.")
    ] = _DEFAULTS.smoothgrad_noise,
    mask: Annotated[Mask, typer.Option(help="What replaces a selected token.")] = _DEFAULTS.mask,
    read: Annotated[Read, typer.Option(help="Where deltas are read.")] = _DEFAULTS.read,
    direction: Annotated[Direction, typer.Option()] = _DEFAULTS.direction,
    mode: Annotated[Mode, typer.Option()] = _DEFAULTS.mode,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="'auto' spreads a model over several devices.")
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(help="Name of the block list, such as model.layers.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Recommend these layers, such as 8-15,20.")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Recommend this strength.")] = None,
    attributions: Annotated[
        Path | None, typer.Option(help="Also write tokens, scores and choices (JSONL).")
    ] = None,
    force: Force = False,
    restart: Annotated[bool, typer.Option(help="Discard what an interrupted run left.")] = False,
    as_json: Json = False,
) -> None:
    """Compute one steering direction per layer from preference pairs."""
    with input_errors(f"the same command goes on from {out.name}.partial, if it is there"):
        options = ExtractOptions(
            objective=objective,
            attribution=attribution,
            baseline=baseline,
            ig_points=ig_points,
            ig_max_points=ig_max_points,
            ig_tolerance=ig_tolerance,
            smoothgrad_samples=smoothgrad_samples,
            smoothgrad_noise=smoothgrad_noise,
            k=_DEFAULTS.k if k is None else k,
            mask=mask,
            read=read,
            direction=direction,
            mode=mode,
            chat=chat,
            limit=limit,
            seed=seed,
        )
        require_choice("--dtype", dtype, ("float32", "bfloat16"))
        if ig_batch < 1:
            raise InputError(f"--ig-batch is {ig_batch}, expected 1 or more")
        if strength is not None and not math.isfinite(strength):
            raise InputError(f"--strength is {strength}, expected a finite number")
        require_different(data=data, out=out, attributions=attributions)
        for path in (out, attributions):
            if path is not None:
                require_writable(path, force)

        from offline import summary
        from offline.extract import extract as run
        from offline.extract import finish
        from offline.model import load_decoder
        from offline.pairs import load_pairs

        pairs = load_pairs(data, chat=chat, limit=limit, seed=seed, split=split)
        decoder = load_decoder(
            model, dtype=dtype, device=device, device_map=device_map, blocks=blocks
        )
        recommended = _recommendation(layers, strength, len(decoder.blocks))
        notes: list[str] = []

        def note(text: str) -> None:
            notes.append(text)
            stderr.print(f"note: {text}")

        with progress(len(pairs.pairs)) as advance:
            vector, records = run(
                decoder, pairs, options, out,
                batch_rows=ig_batch, restart=restart, recommended=recommended,
                strict_k=k is not None, on_examples=advance, on_note=note,
            )  # fmt: skip
        if attributions is not None:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_aside(attributions, lines.encode())
        finish(vector, out)
        if as_json:
            print(summary.as_json(vector, out=out.name, notes=notes))
        else:
            summary.show(vector)
            print(f"wrote {out}")


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
