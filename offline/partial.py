"""Finished groups of examples beside the artifact, so that an interrupted run can go on."""

import fcntl
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from grains_vllm.vectors import tensors_of, write_aside
from offline.errors import InputError

Tensors = dict[str, Tensor]
Records = list[dict[str, Any]]

_MANIFEST, _LOCK, _GROUPS = "manifest.json", "lock", "group-*.safetensors"


def to_bytes(tensors: Tensors, records: Records) -> bytes:
    """A group as a safetensors file whose metadata holds the records as JSON."""
    return safetensors.torch.save(tensors, metadata={"records": json.dumps(records)})


def from_bytes(payload: bytes) -> tuple[Tensors, Records]:
    """What `to_bytes` was given."""
    tensors, metadata = tensors_of(payload)
    return tensors, json.loads(metadata["records"])


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The facts of two manifests that are not the same: names and both values."""
    one, two = _flat(there), _flat(here)
    return [
        (name, one.get(name), two.get(name))
        for name in sorted(one | two)
        if one.get(name) != two.get(name)
    ]


def folder_of(out: Path) -> Path:
    """Where the finished groups of the run that makes `out` are kept."""
    return out.with_name(out.name + ".partial")


def discard(out: Path) -> None:
    """Removes them."""
    if folder_of(out).exists():
        shutil.rmtree(folder_of(out))


class PartialRun:
    """The folder `<out>.partial`: a manifest, a lock, and one safetensors file per finished group.

    A context manager. While it is open no other run can make the same artifact. A run that fails
    for its input leaves what an earlier run has left, and nothing of its own; one that is
    interrupted leaves its finished groups.
    """

    def __init__(self, out: Path, manifest: Mapping[str, Any], restart: bool) -> None:
        """Prepares to open the folder.

        Args:
            manifest: JSON-able facts that decide the result; a folder with others is refused.
            restart: discard the groups that are there.
        """
        self.folder = folder_of(out)
        self.manifest = dict(manifest)
        self.restart = restart

    def __enter__(self) -> "PartialRun":
        """Opens the folder.

        Raises:
            InputError: the folder belongs to another run, which may be running now, or is no
                folder of a run at all.
        """
        if self.folder.is_symlink() or (self.folder.exists() and not self._is_ours()):
            raise InputError(f"{self.folder}: in the way, and not a folder of an interrupted run")
        self._is_new = not self.folder.exists()
        self.folder.mkdir(exist_ok=True)
        self._lock = (self.folder / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise InputError(f"{self.folder.name}: another run is making this artifact") from None
        try:
            self._open()
        except InputError:
            self._lock.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None and issubclass(kind, InputError)
        empty = not any(self.folder.glob(_GROUPS))
        if self._is_new and (failed or (kind is not None and empty)):
            shutil.rmtree(self.folder)
        self._lock.close()

    def load(self, group: int) -> tuple[Tensors, Records] | None:
        """The tensors and records of a finished group; None if it is missing or damaged."""
        try:
            return from_bytes(self._path(group).read_bytes())
        except (OSError, KeyError, TypeError, ValueError):
            return None

    def save(self, group: int, tensors: Tensors, records: Records) -> None:
        """Keeps a finished group."""
        write_aside(self._path(group), to_bytes(tensors, records))

    def _path(self, group: int) -> Path:
        return self.folder / f"group-{group:05d}.safetensors"

    def _is_ours(self) -> bool:
        if not self.folder.is_dir():
            return False
        names = {path.name for path in self.folder.iterdir()}
        return _MANIFEST in names or names <= {_LOCK}

    def _open(self) -> None:
        manifest = self.folder / _MANIFEST
        if self.restart:
            for path in [manifest, *self.folder.glob(_GROUPS)]:
                path.unlink(missing_ok=True)
        if manifest.exists():
            self._require_same(manifest)
        else:
            write_aside(manifest, json.dumps(self.manifest, indent=2, sort_keys=True).encode())

    def _require_same(self, manifest: Path) -> None:
        try:
            differing = differences(json.loads(manifest.read_text()), self.manifest)
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(
                f"{self.folder.name}: its manifest cannot be read ({error}); --restart discards it"
            ) from error
        if differing:
            facts = "; ".join(f"{name} was {was!r}, now {now!r}" for name, was, now in differing)
            raise InputError(
                f"{self.folder.name}: left by a run that differs from this one ({facts}); repeat "
                "that run's command to go on with it, or --restart discards it"
            )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat
