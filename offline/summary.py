"""What a person sees at the end: tables on stdout, or one JSON document."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from grains_vllm.vectors import SteeringVector
from offline.console import stdout


def as_json(vector: SteeringVector, **more: Any) -> str:
    """One JSON document: the passport, the digest and `more`."""
    facts = {**vector.passport, "digest": vector.digest, "directions": vector.layers}
    return json.dumps({**facts, **more}, indent=2, sort_keys=True, allow_nan=False)


def show(vector: SteeringVector) -> None:
    """Prints where a vector comes from and how good each layer's direction is.

    Others write artifacts too, and what a passport holds beyond the format is up to them: facts of
    an unexpected shape are left out here (`--json` shows all).
    """
    console = stdout()
    console.print(_facts(vector))
    gaps = _mapping(vector.passport.get("completeness"))
    if _holds_numbers(gaps, "min", "median", "max", "tolerance", "above_tolerance"):
        console.print(_completeness(gaps))
        if gaps["above_tolerance"]:
            console.print(
                f"warning: {gaps['above_tolerance']} examples have a completeness gap above "
                f"{gaps['tolerance']}; their scores are not reliable. More points "
                "(--ig-max-points) or another --baseline may help."
            )
    console.print(_layers(vector))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _holds_numbers(value: Mapping[str, Any], *names: str) -> bool:
    return all(_is_number(value.get(name)) for name in names)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _facts(vector: SteeringVector) -> Table:
    passport, model = vector.passport, vector.model
    table = Table("", "", show_header=False)
    rows: dict[str, Any] = {
        "digest": vector.digest[:16],
        "model": passport.get("model_id"),
        "architecture": f"{model.architecture}, {model.num_layers} layers x {model.hidden_size}",
        "method": passport.get("method"),
        "data": _mapping(passport.get("data")).get("name"),
        "recipe": _mapping(_mapping(passport.get("data")).get("recipe")).get("name"),
        "examples": _examples(passport),
        "options": _words(_mapping(passport.get("options"))),
        "recommended": _words(_mapping(passport.get("recommended"))),
        "strength 1": passport.get("strength_unit"),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, str(value))
    return table


def _examples(passport: Any) -> str | None:
    if not _holds_numbers(passport, "examples_used", "examples_dropped"):
        return None
    images = passport.get("examples_with_image")
    shown = f", {images} with an image" if _is_number(images) and images else ""
    return f"{passport['examples_used']} used, {passport['examples_dropped']} dropped{shown}"


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_word(value)}" for key, value in options.items() if value is not None)


def _word(value: Any) -> str:
    if isinstance(value, Mapping):  # one for each kind of prompt
        return "/".join(f"{part} ({kind})" for kind, part in value.items())
    return str(value)


def _completeness(gaps: Mapping[str, Any]) -> Table:
    table = Table("gap min", "median", "max", "above", "points: examples", title="Completeness")
    points = ", ".join(f"{count}: {n}" for count, n in _mapping(gaps.get("points")).items())
    table.add_row(
        *(f"{gaps[name]:.4f}" for name in ("min", "median", "max")),
        f"{gaps['above_tolerance']} (> {gaps['tolerance']})",
        points,
    )
    return table


def _layers(vector: SteeringVector) -> Table:
    table = Table("layer", "||h||", title="Layers")
    names = ("explained_variance", "stability", "cosine", "raw_norm", "mean_norm")
    rows = vector.passport.get("layers")
    reports = {
        row["layer"]: row
        for row in (rows if isinstance(rows, list) else [])
        if _holds_numbers(_mapping(row), "layer")
    }
    shown = names if reports else ()
    for name in shown:
        table.add_column({"cosine": "cos(v+, v-)"}.get(name, name.replace("_", " ")))
    for layer in range(vector.num_layers):
        values = (reports.get(layer, {}).get(name) for name in shown)
        table.add_row(
            f"{layer}" if layer in vector.layers else f"{layer} (none)",
            f"{vector.reference_norms[layer]:.4g}",
            *(f"{value:.3f}" if _is_number(value) else "-" for value in values),
        )
    return table
