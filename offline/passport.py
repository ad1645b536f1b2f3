"""The artifact's passport: every fact about where a vector comes from, JSON-able."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from statistics import median
from typing import Any

from grains_vllm import __version__
from offline.directions import LayerDiagnostics
from offline.model import Decoder
from offline.options import ExtractOptions
from offline.pairs import PairSet

Record = dict[str, Any]


def write_passport(
    decoder: Decoder,
    data: PairSet,
    options: ExtractOptions,
    records: Sequence[Record],
    layers: Sequence[LayerDiagnostics],
    recommended: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """METHOD step 7. Without a sweep nobody knows good layers and strengths, so `recommended`
    is there only if it is given."""
    used = sum(record["used"] for record in records)
    passport = {
        "method": "grains",
        "options": asdict(options),
        **_sources(decoder, data),
        "examples": [
            {key: record[key] for key in ("id", "fingerprint", "prompt_fingerprint", "used")}
            for record in records
        ],
        "examples_used": used,
        "examples_dropped": len(records) - used,
        "completeness": completeness(records, options.ig_tolerance),
        "packed_examples": sum(record["packed"] for record in records),
        "layers": [asdict(layer) for layer in layers],
        "versions": {
            "grains-vllm": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        },
    }
    if recommended is not None:
        passport["recommended"] = dict(recommended)
    return passport


def manifest(decoder: Decoder, data: PairSet, options: ExtractOptions) -> dict[str, Any]:
    """The facts that must agree for a run to go on from another's finished groups."""
    drawn = [pair.fingerprint for pair in data.pairs]
    sources = _sources(decoder, data)
    return {"version": __version__, **sources, "options": asdict(options), "examples": drawn}


def completeness(records: Sequence[Record], tolerance: float) -> dict[str, Any] | None:
    """Statistics of the gaps |sum A - (F(x) - F(b))| / |F(x) - F(b)|, or None without any."""
    gaps = [record["gap"] for record in records if record["gap"] is not None]
    if not gaps:
        return None
    points = [record["points"] for record in records]
    return {
        "min": min(gaps),
        "median": median(gaps),
        "max": max(gaps),
        "tolerance": tolerance,
        "above_tolerance": sum(gap > tolerance for gap in gaps),
        "points": {str(count): points.count(count) for count in sorted(set(points))},
    }


def _sources(decoder: Decoder, data: PairSet) -> dict[str, Any]:
    return {
        "model_id": decoder.name,
        "weights_sha256": decoder.weights_sha256,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "blocks": decoder.blocks_path,
        "data": {"name": data.name, "sha256": data.sha256, "total": data.total},
    }
