"""Finished groups of examples beside the artifact, so that an interrupted run can go on."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from grains_vllm.vectors import write_aside
from offline.errors import InputError


def folder_of(out: Path) -> Path:
    """Where the finished groups of the run that makes `out` are kept."""
    return out.with_name(out.name + ".partial")


def discard(out: Path) -> None:
    """Removes them."""
    if folder_of(out).exists():
        shutil.rmtree(folder_of(out))


class PartialRun:
    """The folder `<out>.partial`: manifest.json and one safetensors file per finished group.

    Nothing is written before the first group is finished.
    """

    def __init__(self, out: Path, manifest: Mapping[str, Any], restart: bool) -> None:
        """Opens the folder.

        Args:
            manifest: JSON-able facts that decide the result; a folder with others is refused.
            restart: discard what is there.

        Raises:
            InputError: the folder belongs to another run; says which facts differ.
        """
        self.folder = folder_of(out)
        self.manifest = dict(manifest)
        if restart:
            discard(out)
        elif self.folder.exists():
            self._require_same()

    def load(self, group: int) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
        """The tensors and records of a finished group; None if it is missing or damaged."""
        try:
            with safetensors.safe_open(self._path(group), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, json.loads(file.metadata()["records"])
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(self, group: int, tensors: dict[str, Tensor], records: list[dict[str, Any]]) -> None:
        """Keeps a finished group."""
        if not self.folder.exists():
            self.folder.mkdir()
            write_aside(self.folder / "manifest.json", _json(self.manifest).encode())
        payload = safetensors.torch.save(tensors, metadata={"records": json.dumps(records)})
        write_aside(self._path(group), payload)

    def _path(self, group: int) -> Path:
        return self.folder / f"group-{group:05d}.safetensors"

    def _require_same(self) -> None:
        try:
            found = json.loads((self.folder / "manifest.json").read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.folder.name}: not a folder of an interrupted run ({error}); "
                "--restart discards it"
            ) from error
        here, there = _flat(self.manifest), _flat(found)
        differing = [name for name in sorted(here | there) if here.get(name) != there.get(name)]
        if differing:
            facts = "; ".join(f"{n} was {there.get(n)!r}, now {here.get(n)!r}" for n in differing)
            raise InputError(
                f"{self.folder.name}: left by a run that differs from this one ({facts}); repeat "
                "that run's command to go on with it, or --restart discards it"
            )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True)
