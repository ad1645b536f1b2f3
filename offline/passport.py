"""The artifact's passport: every fact about where a vector comes from, JSON-able."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from statistics import median
from typing import Any

from grains_vllm import __version__
from offline.groups import Record
from offline.model import Decoder
from offline.options import ExtractOptions, Method
from offline.pairs import PairSet

_LAYOUT = 2  # of the tensors in a group that is kept, see groups.py


def write_passport(
    decoder: Decoder, data: PairSet, options: ExtractOptions, records: Sequence[Record]
) -> dict[str, Any]:
    """METHOD step 7, but for the figures per layer, which come with the directions."""
    used = sum(record["used"] for record in records)
    passport = {
        "method": options.method.value,
        "options": options.facts(pair.picture is not None for pair in data.pairs),
        **_sources(decoder, data),
        "examples": [
            {key: record[key] for key in ("id", "fingerprint", "prompt_fingerprint", "used")}
            for record in records
        ],
        "examples_with_image": sum(pair.picture is not None for pair in data.pairs),
        "examples_used": used,
        "examples_dropped": len(records) - used,
        "versions": {
            "grains-vllm": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        },
    }
    if options.method is Method.grains:
        passport["completeness"] = completeness(records, options.ig_tolerance)
        passport["packed_examples"] = sum(record["packed"] for record in records)
    return passport


def example_prompts(passport: Mapping[str, Any]) -> list[str]:
    """Fingerprints of the prompts that a vector was made from, as far as its passport says."""
    examples = passport.get("examples")
    found = [
        example.get("prompt_fingerprint")
        for example in (examples if isinstance(examples, list) else [])
        if isinstance(example, Mapping)
    ]
    return [value for value in found if isinstance(value, str)]


def manifest(decoder: Decoder, data: PairSet, options: ExtractOptions) -> dict[str, Any]:
    """The facts that must agree for a run to go on from another's finished groups."""
    drawn = [pair.fingerprint for pair in data.pairs]
    sources = _sources(decoder, data)
    return {
        "version": __version__, "layout": _LAYOUT,
        **sources, "examples": drawn,
        "options": options.facts(pair.picture is not None for pair in data.pairs),
    }  # fmt: skip


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
        "data": {"name": data.name, "sha256": data.sha256, "total": data.total, **data.drawn},
    }
