"""The soak tells memory that fills up from memory that leaks."""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest

from benchmarks.soak.growth import growth, leaks
from benchmarks.soak.watch import memory

POINTS = 101


def series(worker: Callable[[float], float], steps: int) -> list[dict]:
    """As `watch` makes it; `worker` is MiB on the heap over the share of time that has passed."""
    return [
        {
            "mib": {
                "worker": {"heap": worker(n / (POINTS - 1)), "files": 290.0},
                "API server": {"heap": 220.0, "files": 280.0},
            },
            "metrics": {"steps": steps * n / (POINTS - 1)},
        }
        for n in range(POINTS)
    ]


@pytest.mark.parametrize(
    ("worker", "steps", "leaking"),
    [
        pytest.param(lambda t: 220 + 40 * t, 40_000, True, id="as much with every step"),
        pytest.param(lambda t: 220 + 4 * t, 40_000, False, id="what vLLM gains itself"),
        pytest.param(lambda t: 220 + 460 * (1 - math.exp(-12 * t)), 40_000, False, id="a cache"),
        pytest.param(lambda t: 220 + 8 * (t > 0.6), 40_000, False, id="one step"),
        pytest.param(lambda t: 220 + 40 * t, 1000, False, id="too short to say"),
    ],
)
def test_growth_that_goes_on_is_a_leak(worker, steps, leaking):
    found = growth(series(worker, steps))
    assert ["worker" in problem for problem in leaks(found)] == [True] * leaking


def test_growth_is_split_by_quarter_and_kind():
    found = growth(series(lambda t: 220 + 40 * t, 4 * 2**20))
    assert found == {
        "steps": [2**20] * 4,
        "worker": {
            "first": 510.0,
            "last": 550.0,
            "gained": {"heap": [10.0] * 4, "files": [0.0] * 4},
            "bytes_per_step": [10] * 4,
        },
        "API server": {
            "first": 500.0,
            "last": 500.0,
            "gained": {"heap": [0.0] * 4, "files": [0.0] * 4},
            "bytes_per_step": [0] * 4,
        },
    }


def test_a_childs_memory_is_split_by_kind():
    code = "held = bytearray(b'x' * 2**26); print(flush=True); input()"
    before = memory()["others"]
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = memory()["others"]
        child.communicate(b"\n")
    grown = {kind: found[kind] - before[kind] for kind in found}
    assert grown["anonymous"] > 64
    assert 0 < grown["files"] < 64
    assert grown["shared"] == 0
