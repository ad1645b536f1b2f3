"""What every test and every process that it starts sees; set before anything loads torch."""

import os
from typing import Any

import pytest

# No test may ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Threads change the last bits of a sum, and on tiny models they only wait for each other: so
# one everywhere, in vLLM's workers too, which would else take all processors.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

# Files that share a fixture of the whole session, which starts engines or a server.
_SHARED = {
    f"tests/{folder}/test_{name}.py": fixture
    for folder, fixture, names in (
        ("engine", "engine", "parity prefix_cache receipts refusals unsteered v2_runner"),
        ("server", "server", "clients http lm_eval metrics readme receipts verify"),
        ("server", "vision", "image_evaluate vision"),
    )
    for name in names.split()
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real engines first, or one process waits at the end for the other's."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With -n, files are given out whole, those that share engines together, in their order."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return _SHARED.get(file, file)

    config.option.loadscopereorder = False
    return Scheduling(config, log)
