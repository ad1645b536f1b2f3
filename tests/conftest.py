"""What every test and every process that it starts sees; set before anything loads torch."""

import os

import pytest

# No test may ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Threads change the last bits of a sum, and on tiny models they only wait for each other: so
# one everywhere, in vLLM's workers too, which would else take all processors.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps in one process what shares an engine; else the tests of a file stay together."""
    for item in items:
        engines = {"engine", "worlds"} & set(getattr(item, "fixturenames", ()))
        group = "engines" if engines else f"{item.path.parent.name}-{item.path.stem}"
        item.add_marker(pytest.mark.xdist_group(group))
