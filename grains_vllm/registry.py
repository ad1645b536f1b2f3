"""The catalogue that requests are admitted by, which may change while the server runs.

One API server process keeps it in memory, and so does `LLM`. Several API server processes share a
file: the process that starts them makes a private folder before (`share`), and they find it through
the environment. A look at the catalogue is then one `stat`, and every request of every process sees
a change as soon as it is published.
"""

import asyncio
import atexit
import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from grains_vllm.catalogue import Catalogue, catalogue_of
from grains_vllm.errors import GrainsConfigError
from grains_vllm.log_lines import logger

# Set by `share` for the API servers that are started next; not for operators.
STATE = "GRAINS_STATE"
# Set by operators: start with steering turned off.
DISABLE = "GRAINS_DISABLE"
TURN_PATIENCE_S = 60.0
# Writing takes a millisecond; a process that was stopped while it did must not stop the others.
_LOCK_PATIENCE_S = 2.0


@dataclass(frozen=True)
class Snapshot:
    """What holds for a request at the moment it is admitted.

    Attributes:
        catalogue: the vectors that it may name, the default and the canary.
        enabled: False while the kill switch is on: who asks for steering is refused (503), who does
            not is served plain, without default and canary.
    """

    catalogue: Catalogue
    enabled: bool

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {"catalogue": self.catalogue.to_json(), "enabled": self.enabled}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Snapshot":
        """The inverse of `to_json`."""
        return cls(Catalogue.from_json(data["catalogue"]), data["enabled"])


class Registry:
    """The catalogue of one server, as one of its front ends sees it."""

    def __init__(self, store: "_Memory | _File") -> None:
        self._store = store

    @classmethod
    def of(cls, vllm_config: Any) -> "Registry | None":
        """The registry of a front end of this engine; None for an engine without grains.

        Raises:
            GrainsConfigError: GRAINS_DISABLE is neither 0 nor 1, or several API servers were
                started without `share`.
        """
        if (catalogue := catalogue_of(vllm_config)) is None:
            return None
        if vllm_config.parallel_config._api_process_count == 1:
            return cls(_Memory(_first(catalogue)))
        folder = os.environ.get(STATE, "")
        registry = cls(_File(Path(folder)))
        try:
            registry.snapshot()
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise GrainsConfigError(
                f"--api-server-count: the API servers share no catalogue ({STATE}={folder}: "
                f"{error}); start them with `vllm serve`"
            ) from error
        return registry

    def snapshot(self) -> Snapshot:
        """What holds now; cheap enough for every request."""
        return self._store.read()

    def publish(self, catalogue: Catalogue) -> None:
        """Admits requests by this catalogue from now on, in every front end."""
        self._store.update(lambda now: replace(now, catalogue=catalogue))

    def set_enabled(self, enabled: bool) -> None:
        """The kill switch; does not wait for a change of the catalogue under way.

        Raises:
            TimeoutError: another front end does not let go of the file.
        """
        self._store.update(lambda now: replace(now, enabled=enabled))

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """One change of the catalogue at a time, in all front ends together.

        Raises:
            TimeoutError: the changes of others take longer than TURN_PATIENCE_S.
        """
        until = time.monotonic() + TURN_PATIENCE_S
        # Asked again and again: a thread that waits could not be cancelled.
        while (end_turn := self._store.take_turn()) is None:
            if time.monotonic() > until:
                raise TimeoutError(f"other changes have been under way for {TURN_PATIENCE_S:g} s")
            await asyncio.sleep(0.02)
        try:
            yield
        finally:
            end_turn()


def share(vllm_config: Any) -> None:
    """Makes the file that several API servers will share, if this process is about to start them.

    The folder is readable by this user alone and is removed when this process exits.
    """
    parallel = vllm_config.parallel_config
    launching = parallel._api_process_rank == -1 and parallel._api_process_count > 1
    catalogue = catalogue_of(vllm_config)
    if catalogue is None or not launching:
        return
    folder = Path(tempfile.mkdtemp(prefix="grains-"))
    # Held for good: cleaners of temporary folders leave one alone that somebody has locked.
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)
    atexit.register(_remove, folder, os.getpid())
    _File(folder).create(_first(catalogue))
    os.environ[STATE] = str(folder)


def disabled_at_start() -> bool:
    """GRAINS_DISABLE.

    Raises:
        GrainsConfigError: it is neither 0 nor 1.
    """
    value = os.environ.get(DISABLE) or "0"
    if value not in ("0", "1"):
        raise GrainsConfigError(f"{DISABLE}: {value!r} is not one of 0, 1")
    return value == "1"


def _first(catalogue: Catalogue) -> Snapshot:
    if disabled := disabled_at_start():
        logger().warning("grains: steering enabled=false (%s=1)", DISABLE)
    return Snapshot(catalogue, enabled=not disabled)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # A forked child has inherited the exit handler.
        shutil.rmtree(folder, ignore_errors=True)


class _Memory:
    """The snapshot of the only front end."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._writing, self._turn = threading.Lock(), threading.Lock()

    def read(self) -> Snapshot:
        return self._snapshot

    def update(self, change: Callable[[Snapshot], Snapshot]) -> None:
        with self._writing:
            self._snapshot = change(self._snapshot)

    def take_turn(self) -> Callable[[], None] | None:
        return self._turn.release if self._turn.acquire(blocking=False) else None


class _File:
    """The snapshot of several front ends: `state.json`, replaced as a whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "state.json"
        self._seen: tuple[int, Snapshot] | None = None

    def create(self, snapshot: Snapshot) -> None:
        self._write(snapshot, time.time_ns())

    def read(self) -> Snapshot:
        version = os.stat(self._path).st_mtime_ns
        seen = self._seen
        if seen is None or seen[0] != version:
            with open(self._path, encoding="utf-8") as file:
                # Of the file that was opened, which may be newer than the one looked at.
                version = os.fstat(file.fileno()).st_mtime_ns
                seen = self._seen = (version, Snapshot.from_json(json.load(file)))
        return seen[1]

    def update(self, change: Callable[[Snapshot], Snapshot]) -> None:
        with self._locked():
            snapshot = change(self.read())
            # Two changes within one tick of the clock must not look like one.
            self._write(snapshot, max(time.time_ns(), os.stat(self._path).st_mtime_ns + 1))

    def take_turn(self) -> Callable[[], None] | None:
        return self._lock("turn.lock")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        until = time.monotonic() + _LOCK_PATIENCE_S
        while (unlock := self._lock("write.lock")) is None:
            if time.monotonic() > until:
                raise TimeoutError(f"{self._folder}/write.lock is held by another process")
            time.sleep(0.001)
        try:
            yield
        finally:
            unlock()

    def _lock(self, name: str) -> Callable[[], None] | None:
        """Takes a lock file and returns what lets go of it; None while somebody else has it."""
        lock = os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return partial(os.close, lock)

    def _write(self, snapshot: Snapshot, version: int) -> None:
        aside = self._folder / "state.aside"
        aside.write_text(json.dumps(snapshot.to_json()), encoding="utf-8")
        os.utime(aside, ns=(version, version))
        os.replace(aside, self._path)
