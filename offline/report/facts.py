"""What an artifact's passport says, as sentences and rows for people."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from offline.plot_points import MEASURES
from offline.plot_style import layers_text
from offline.report.inputs import Subject

Rows = list[tuple[str, Any]]
NOTHING = "nothing"
_METHODS = {"grains": "GrAInS"}
_SHOWN = (
    "method", "options", "model_id", "weights_sha256", "dtype", "blocks", "data", "examples",
    "examples_used", "examples_dropped", "completeness", "layers", "versions", "recommended",
    "sweep", "format_version", "layer_convention", "model",
)  # fmt: skip


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is an object, else an empty one: strangers write passports too."""
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> Any:
    """`value` if it is a number, else None."""
    fits = type(value) in (int, float) and abs(value) <= sys.float_info.max
    return value if fits else None


def summary(subject: Subject) -> str:
    """The passport in two or three sentences."""
    passport, model = subject.vector.passport, subject.vector.model
    used, dropped = _counts(passport)
    source = mapping(passport.get("data")).get("name")
    pairs = "" if used is None else f" from {used:g} of {used + dropped:g} preference pairs"
    pairs += f" in {source}" if pairs and source else ""
    name = passport.get("model_id") or model.architecture
    text = f"A steering vector for {name}, made{pairs} with {method(passport)}."
    recommended = recommendation(passport)
    if recommended == NOTHING:
        return f"{text} It recommends no layers and no strength."
    chooser = mapping(passport.get("recommended")).get("source")
    text += f" Recommended: {recommended}" + (f" ({chooser})" if chooser else "")
    scores = [
        f"{MEASURES.get(name, name)} {value:.3g}" + (f" (base {base:.3g})" if base else "")
        for name, base, value in recommended_scores(passport)
        if name == mapping(passport.get("recommended")).get("metric")
    ]
    return "; ".join([text, *scores]) + "."


def main_facts(subject: Subject) -> Rows:
    """The rows that everybody needs."""
    vector, passport = subject.vector, subject.vector.passport
    model, data = vector.model, mapping(passport.get("data"))
    shape = f"{model.architecture}, {model.num_layers} layers of width {model.hidden_size}"
    rows: Rows = [
        ("Model", passport.get("model_id") or "not said"),
        ("Architecture", shape),
        ("Method", method(passport)),
        ("Data", data.get("name") or "not said"),
        ("Examples", _examples(passport)),
        ("Recommended", recommendation(passport)),
        ("Chosen by", mapping(passport.get("recommended")).get("source") or "nobody yet"),
    ]
    if len(vector.layers) < vector.num_layers:
        rows.insert(2, ("Layers with a direction", layers_text(vector.layers)))
    return [*rows, ("Digest", vector.digest)]


def detail_facts(subject: Subject) -> list[tuple[str, Rows]]:
    """Titled groups of everything else."""
    passport = subject.vector.passport
    origin = {
        **{f"data {key}": value for key, value in mapping(passport.get("data")).items()},
        "weights sha256": passport.get("weights_sha256"),
        "data type": passport.get("dtype"),
        "blocks": passport.get("blocks"),
        "layer convention": passport.get("layer_convention"),
        "format version": passport.get("format_version"),
    }
    more = {key: value for key, value in passport.items() if key not in _SHOWN}
    groups = {
        "Options": mapping(passport.get("options")),
        "Origin": {**origin, **more},
        "Versions": mapping(passport.get("versions")),
        "The sweep that chose": mapping(passport.get("sweep")),
    }
    return [(title, _flat(group)) for title, group in groups.items() if _flat(group)]


def method(passport: Mapping[str, Any]) -> str:
    """The method with its two most telling options."""
    name = str(passport.get("method") or "not said")
    options = mapping(passport.get("options"))
    words = [f"{key} {options[key]}" for key in ("direction", "mode") if options.get(key)]
    return ", ".join([_METHODS.get(name, name), *words])


def recommendation(passport: Mapping[str, Any]) -> str:
    """Layers, strength and positions, or that there are none."""
    return point(mapping(passport.get("recommended"))) or NOTHING


def point(facts: Mapping[str, Any]) -> str:
    """A way of steering in words, as far as it is known."""
    words = []
    layers, strength = facts.get("layers"), number(facts.get("strength"))
    if isinstance(layers, list) and layers:
        words.append(f"{'layers' if len(layers) > 1 else 'layer'} {layers_text(layers)}")
    if strength is not None:
        words.append(f"strength {strength:g}")
    if facts.get("positions"):
        words.append(f"positions {facts['positions']}")
    return ", ".join(words)


def tolerance(subject: Subject) -> float | None:
    """The completeness gap that was good enough."""
    passport = subject.vector.passport
    kept = mapping(passport.get("completeness")).get("tolerance")
    asked = mapping(passport.get("options")).get("ig_tolerance")
    value = number(kept) or number(asked)
    return float(value) if value and value > 0 else None


def recommended_scores(passport: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """(measure, without steering, at the recommended point), as the sweep wrote them."""
    recommended = mapping(passport.get("recommended"))
    scores, base = mapping(recommended.get("scores")), mapping(recommended.get("base"))
    rows = [(name, number(base.get(name)), number(scores[name])) for name in scores]
    return [row for row in rows if row[2] is not None]


def layer_rows(subject: Subject) -> list[dict[str, Any]]:
    """Per layer: the reference norm, whether it is recommended, and the passport's figures."""
    vector, listed = subject.vector, subject.vector.passport.get("layers")
    listed = listed if isinstance(listed, list) else []
    reports = {row["layer"]: row for row in map(mapping, listed) if type(row.get("layer")) is int}
    names = ("explained_variance", "stability", "cosine", "raw_norm", "mean_norm")
    return [
        {
            "layer": layer,
            "norm": float(vector.reference_norms[layer]),
            "direction": layer in vector.layers,
            **{name: number(reports.get(layer, {}).get(name)) for name in names},
        }
        for layer in range(vector.num_layers)
    ]


def _examples(passport: Mapping[str, Any]) -> str:
    used, dropped = _counts(passport)
    if used is None or dropped is None:
        return "not said"
    total = number(mapping(passport.get("data")).get("total"))
    drawn = f", drawn from {total}" if total is not None and total != used + dropped else ""
    return f"{used} used, {dropped} dropped{drawn}"


def _counts(passport: Mapping[str, Any]) -> tuple[Any, Any]:
    counts = number(passport.get("examples_used")), number(passport.get("examples_dropped"))
    return (None, None) if None in counts else counts


def _flat(value: Mapping[str, Any], prefix: str = "") -> Rows:
    rows: Rows = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            rows += _flat(item, f"{prefix}{key} ")
        elif item is not None:
            text = item if isinstance(item, str | int | float) else json.dumps(item)
            rows.append((f"{prefix}{key}".replace("_", " "), str(text)))
    return rows
