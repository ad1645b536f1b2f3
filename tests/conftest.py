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

# These files ask the same engines (the fixture `engine`).
_ENGINES = {
    f"tests/engine/test_{name}.py"
    for name in ("parity", "prefix_cache", "receipts", "refusals", "unsteered", "v2_runner")
}


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With -n, files are given out whole, those that share engines together, in their order: the
    slow ones come first."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "engines" if file in _ENGINES else file

    config.option.loadscopereorder = False
    return Scheduling(config, log)
