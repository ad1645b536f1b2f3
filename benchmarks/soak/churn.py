"""A ninth vector that is added, replaced and taken away while requests name it."""

import asyncio
import time
from collections import Counter
from random import Random

import httpx

from benchmarks.soak.world import GUEST, Vector, World

ROUTE = "/v1/grains"


class Churn:
    """Changes the catalogue now and then, and remembers who had the guest's name when.

    Attributes:
        changes: how often each kind of change was made.
        problems: answers of the routes that should not be.
    """

    def __init__(self, world: World, client: httpx.AsyncClient, seed: int) -> None:
        self._world, self._client, self._rng = world, client, Random(f"{seed} churn")
        self._now: Vector | None = None
        # (since when, who may be the guest from then on); None is nobody.
        self._history: list[tuple[float, set[Vector | None]]] = [(0.0, {None})]
        self.changes: Counter[str] = Counter()
        self.problems: list[str] = []

    def possible(self, began: float, ended: float) -> set[Vector | None]:
        """Whoever may have had the guest's name at some time between."""
        found: set[Vector | None] = set()
        for index, (since, vectors) in enumerate(self._history):
            until = self._history[index + 1][0] if index + 1 < len(self._history) else ended
            if since <= ended and until >= began:
                found |= vectors
        return found

    async def run(self, every: float) -> None:
        """Makes one change every so many seconds, until it is cancelled."""
        while True:
            await asyncio.sleep(every * self._rng.uniform(0.5, 1.5))
            nobody = self._now is None
            kind = self._rng.choice(
                ("add", "reload") if nobody else ("replace", "remove", "reload")
            )
            await self.change(kind)

    async def change(self, kind: str, guest: Vector | None = None) -> None:
        """Makes one change; `guest` is drawn where it is not given."""
        if guest is None and kind != "remove":
            guest = self._rng.choice(self._world.guests)
        if kind == "reload":
            # As an operator would: the file first, then the word.
            self._world.write(guest)
            await self._send("POST", "reload", guest)
        elif kind == "remove":
            await self._send("DELETE", f"vectors/{GUEST}", None)
        else:
            assert guest is not None
            settings = {**guest.settings, "file": guest.settings["path"]}
            del settings["path"]
            body = {"name": GUEST, **settings, "replace": True}
            await self._send("POST", "vectors", guest, body)
        self.changes[kind] += 1

    async def _send(
        self, method: str, path: str, after: Vector | None, body: object = None
    ) -> None:
        self._history.append((time.monotonic(), {self._now, after}))
        response = await self._client.request(method, f"{ROUTE}/{path}", json=body, timeout=60)
        if response.status_code >= 300:
            self.problems.append(f"{method} {path}: {response.status_code} {response.text[:300]}")
            after = self._now
        self._now = after
        self._history.append((time.monotonic(), {after}))
