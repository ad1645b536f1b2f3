"""The files of a sweep: where the chosen vector and the table go, and what they say."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grains_vllm import __version__
from offline.errors import InputError
from offline.pairs import PairSet
from offline.partial import PartialRun
from offline.scoring import Measures

_ABOUT = ("created_with", "model_id", "backend", "data", "limits", "metric", "strengths_multiplied")


def target_path(artifacts: Sequence[Path], deltas: Path | None, out: Path | None) -> Path:
    """Where the chosen vector goes. Only one vector by itself has an obvious place: its own."""
    if out is not None:
        if out.suffix != ".safetensors":
            raise InputError(f"--out is '{out}', expected a .safetensors file")
        return out
    if len(artifacts) != 1 or deltas is not None:
        raise InputError("--out is missing: say where the chosen one of several vectors goes")
    return artifacts[0]


def table_path(target: Path) -> Path:
    """`v.sweep.json` beside `v.safetensors`."""
    return target.with_name(target.stem + ".sweep.json")


def versions(backend: str) -> dict[str, str]:
    """What has made a table."""
    names = ["torch", "transformers", *(["vllm"] if backend == "vllm" else [])]
    return {
        "grains-vllm": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def summary(document: Mapping[str, Any], pairs: PairSet, more: Mapping[str, Any]) -> dict[str, Any]:
    """What the chosen vector's passport says about the sweep."""
    about = {name: document[name] for name in _ABOUT if name in document}
    # So that an evaluation can tell whether its questions have chosen the vector.
    prompts = [pair.prompt_fingerprint for pair in pairs.pairs]
    validation = {**document["data"]["validation"], "prompt_fingerprints": prompts}
    about["data"] = {**document["data"], "validation": validation}
    return {**about, "points": len(document["points"]), **more}


def keep(partial: PartialRun, index: int | None, found: Measures) -> None:
    """Keeps a finished point; None is the model without steering."""
    partial.save(_group(index), {}, [vars(found)])


def finished(partial: PartialRun, count: int) -> dict[int | None, Measures]:
    """What an earlier run has kept of `count` points."""
    groups = {index: partial.load(_group(index)) for index in (None, *range(count))}
    return {index: Measures(**group[1][0]) for index, group in groups.items() if group is not None}


def _group(index: int | None) -> int:
    return 0 if index is None else index + 1
