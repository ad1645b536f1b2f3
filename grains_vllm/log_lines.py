"""The package's log lines: key=value, and never as many as there are clients that cause them."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def logger() -> Any:
    """This package's logger; looked up late, because the package is imported without vLLM too.

    A child of the logger `vllm`, the only one that vLLM sets up: under a name of our own, lines of
    level info would go nowhere.
    """
    from vllm.logger import init_logger

    return init_logger("vllm.grains")


class Sparingly:
    """Lets one line per kind and interval through and counts what it holds back.

    Args:
        interval: seconds between two lines of one kind.
    """

    def __init__(self, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._clock = interval, clock
        self._last: dict[str, float] = {}
        self._held: dict[str, int] = {}

    def held_back(self, kind: str) -> int | None:
        """None if this line must wait; else how many did since the last one of its kind."""
        now = self._clock()
        if now - self._last.get(kind, float("-inf")) < self._interval:
            self._held[kind] = self._held.get(kind, 0) + 1
            return None
        self._last[kind] = now
        return self._held.pop(kind, 0)
