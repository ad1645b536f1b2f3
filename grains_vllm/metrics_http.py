"""ASGI middleware: asks the workers for their figures when somebody scrapes /metrics.

Workers are other processes, and most of what they know is of no interest between two scrapes. A
scrape never fails for it: whoever does not answer in time leaves the old figures standing, and
`grains:worker_stats_failures` says so.
"""

import asyncio
import time
from typing import Any

from grains_vllm import metrics
from grains_vllm.changes import ask_workers

PATH = "/metrics"
SHORTEST_INTERVAL_S = 1.0
# Utility calls wait for the engine's current step; Prometheus by default waits for 10 seconds.
PATIENCE_S = 2.0


class MetricsMiddleware:
    """For vLLM's --middleware list; `scope["app"].state.engine_client` is the engine."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._asking: asyncio.Task[None] | None = None
        self._asked = float("-inf")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # endswith: with --root-path the path begins with it.
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith(PATH):
            engine = getattr(scope["app"].state, "engine_client", None)
            if engine is not None:
                await self._refresh(engine)
        await self._app(scope, receive, send)

    async def _refresh(self, engine: Any) -> None:
        metrics.register()
        if self._asking is None:
            now = time.monotonic()
            if now - self._asked < SHORTEST_INTERVAL_S:
                return
            self._asked = now
            self._asking = asyncio.create_task(self._ask(engine))
        # Never cancelled and never two at a time: an engine that is busy gets no pile of questions.
        _, late = await asyncio.wait({self._asking}, timeout=PATIENCE_S)
        if late:
            metrics.workers_silent(f"no answer within {PATIENCE_S:g} s")

    async def _ask(self, engine: Any) -> None:
        try:
            stats = await ask_workers(engine, "grains_stats")
            # One rank's workers after the other's, and as many on each.
            ranks = max(1, len(getattr(engine.engine_core, "core_engines", ())))
            workers = len(stats) // ranks
            for rank in range(ranks):
                part = stats[rank * workers : (rank + 1) * workers]
                metrics.observe_workers(part, engine=str(rank))
        except Exception as error:  # A dead engine, in whichever way: the scrape goes on.
            metrics.workers_silent(f"{type(error).__name__}: {error}")
        finally:
            self._asking = None
