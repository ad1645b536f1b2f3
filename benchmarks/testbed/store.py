"""Results on disk, one JSON file each, so that an interrupted study goes on where it stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grains_vllm.vectors import write_aside

Result = dict[str, Any]


class Store:
    """The results in a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def kept(self, name: str, compute: Callable[[], Result]) -> Result:
        """The result `name`, computed if it is not there."""
        if not self.has(name):
            self.folder.mkdir(parents=True, exist_ok=True)
            payload = json.dumps(compute(), indent=1, sort_keys=True, allow_nan=False)
            write_aside(self._path(name), payload.encode())
        return self.read(name)

    def has(self, name: str) -> bool:
        return self._path(name).is_file()

    def read(self, name: str) -> Result:
        """A result that is there."""
        return json.loads(self._path(name).read_text())

    def names(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
