"""What was measured, in one JSON file that grows, so that an interrupted run goes on."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grains_vllm.vectors import write_aside

# Exit statuses: --minutes were over before everything was measured; and there is a result that
# cannot be gone on with, such as one of another machine.
UNFINISHED, OTHERWISE = 3, 4
Figures = dict[str, Any]


class RecordError(ValueError):
    """A file that cannot be gone on with; the message says what differs."""


@dataclass(frozen=True, order=True)
class Key:
    """One measurement's place in the schedule.

    Attributes:
        bench: serve, latency or throughput.
        size: requests at a time.
        round: from 0.
        arm: a name of `arms.ARMS`.
    """

    bench: str
    size: int
    round: int
    arm: str


class Record:
    """The measurements in a file.

    Attributes:
        settings: everything that a figure depends on, JSON-able; must stay the same.
        engines: what the engines said that they run, by bench and name.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Goes on with the file if it is there.

        Raises:
            RecordError: the file was measured with other settings, or is no record.
        """
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.engines: dict[str, Any] = {}
        self.starts = 0
        self._found: dict[Key, Figures] = {}
        if path.is_file():
            self._take(read(path))

    def _take(self, document: dict[str, Any]) -> None:
        before = document["settings"]
        names = sorted(set(before) | set(self.settings))
        there, now = _without_drivers(before), _without_drivers(self.settings)
        differing = [n for n in names if there.get(n) != now.get(n)]
        if differing:
            listed = "; ".join(
                f"{n}: {before.get(n)!r} there, {self.settings.get(n)!r} now" for n in differing
            )
            raise RecordError(
                f"{self.path} was measured otherwise ({listed}): give another --out, or remove it"
            )
        self.engines, self.starts = document["engines"], document["starts"]
        self._found = measurements(document)

    def __contains__(self, key: Key) -> bool:
        return key in self._found

    def __len__(self) -> int:
        return len(self._found)

    def forget_unfinished(self, bench: str, arms: Sequence[str]) -> None:
        """Drops rounds that lack one of `arms`: ratios must not cross a restart of the engines."""
        groups: dict[tuple[int, int], list[Key]] = {}
        for key in self._found:
            if key.bench == bench:
                groups.setdefault((key.size, key.round), []).append(key)
        for keys in groups.values():
            if not set(arms) <= {key.arm for key in keys}:
                for key in keys:
                    del self._found[key]

    def add(self, key: Key, figures: Figures) -> None:
        """Keeps a measurement, on disk too; a figure that is no number is kept as None."""
        self._found[key] = {
            name: None if isinstance(figure, float) and not math.isfinite(figure) else figure
            for name, figure in figures.items()
        }
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        payload = json.dumps(self.document(), indent=1, sort_keys=True, allow_nan=False)
        write_aside(self.path, payload.encode())

    def document(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "engines": self.engines,
            "starts": self.starts,
            "measurements": [
                {**asdict(key), **figures} for key, figures in sorted(self._found.items())
            ],
        }


def read(path: Path) -> dict[str, Any]:
    """A record's document.

    Raises:
        RecordError: the file cannot be read, or is something else.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(document["settings"], dict) or not isinstance(document["engines"], dict):
            raise TypeError("settings and engines must be objects")
        document["starts"] + 0  # a number
        measurements(document)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecordError(f"{path} is no record: {type(error).__name__}: {error}") from None
    return document


def _without_drivers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings to compare; "NAME, DRIVER" of a GPU says little beyond the name, and varies."""
    hardware = settings.get("hardware")
    if not isinstance(hardware, dict):
        return dict(settings)
    gpus = [gpu.split(",")[0] for gpu in hardware.get("gpus", [])]
    return {**settings, "hardware": {**hardware, "gpus": gpus}}


def measurements(document: Mapping[str, Any]) -> dict[Key, Figures]:
    """The measurements of a record's document, by key."""
    return {key: figures for key, figures in _pairs(document)}


def _pairs(document: Mapping[str, Any]) -> Iterator[tuple[Key, Figures]]:
    for entry in document["measurements"]:
        figures = dict(entry)
        yield Key(*(figures.pop(name) for name in ("bench", "size", "round", "arm"))), figures
