"""What a person sees at the end: tables on stdout, or one JSON document."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from grains_vllm.vectors import SteeringVector


def as_json(vector: SteeringVector, **more: Any) -> str:
    """One JSON document: the passport, the digest and `more`."""
    facts = {**vector.passport, "digest": vector.digest, "directions": vector.layers}
    return json.dumps({**facts, **more}, indent=2, sort_keys=True)


def show(console: Console, vector: SteeringVector) -> None:
    """Prints where a vector comes from and how good each layer's direction is."""
    passport = vector.passport
    console.print(_facts(vector))
    gaps = passport.get("completeness")
    if gaps:
        console.print(_completeness(gaps))
        if gaps["above_tolerance"]:
            console.print(
                f"warning: {gaps['above_tolerance']} examples have a completeness gap above "
                f"{gaps['tolerance']}; their scores are not reliable. More points "
                "(--ig-max-points) or another --baseline may help."
            )
    console.print(_layers(vector))


def _facts(vector: SteeringVector) -> Table:
    passport, model = vector.passport, vector.model
    table = Table("", "", show_header=False)
    rows: dict[str, Any] = {
        "digest": vector.digest[:16],
        "model": passport.get("model_id"),
        "architecture": f"{model.architecture}, {model.num_layers} layers x {model.hidden_size}",
        "method": passport.get("method"),
        "data": (passport.get("data") or {}).get("name"),
        "examples": _examples(passport),
        "options": _words(passport.get("options")),
        "recommended": _words(passport.get("recommended")),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, str(value))
    return table


def _examples(passport: Any) -> str | None:
    if "examples_used" not in passport:
        return None
    return f"{passport['examples_used']} used, {passport['examples_dropped']} dropped"


def _words(options: dict[str, Any] | None) -> str | None:
    if not options:
        return None
    return ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)


def _completeness(gaps: dict[str, Any]) -> Table:
    table = Table("gap min", "median", "max", "above", "points: examples", title="Completeness")
    points = ", ".join(f"{count}: {n}" for count, n in gaps["points"].items())
    table.add_row(
        *(f"{gaps[name]:.4f}" for name in ("min", "median", "max")),
        f"{gaps['above_tolerance']} (> {gaps['tolerance']})",
        points,
    )
    return table


def _layers(vector: SteeringVector) -> Table:
    table = Table("layer", "||h||", title="Layers")
    names = ("explained_variance", "stability", "cosine", "raw_norm", "mean_norm")
    reports = {row["layer"]: row for row in vector.passport.get("layers", [])}
    shown = names if reports else ()
    for name in shown:
        table.add_column({"cosine": "cos(v+, v-)"}.get(name, name.replace("_", " ")))
    for layer in range(vector.num_layers):
        values = (reports.get(layer, {}).get(name) for name in shown)
        table.add_row(
            f"{layer}" if layer in vector.layers else f"{layer} (none)",
            f"{vector.reference_norms[layer]:.4g}",
            *("-" if value is None else f"{value:.3f}" for value in values),
        )
    return table
