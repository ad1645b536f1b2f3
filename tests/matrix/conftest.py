"""One parsed release at a time, and at the end the table of all of them."""

from collections import Counter, defaultdict
from functools import lru_cache

import pytest
from rich.console import Console
from rich.table import Table

from tests.matrix.fetch import folder
from tests.matrix.source_tree import SourceTree

# [release][aspect][outcome] -> how many checks ended so
_OUTCOMES: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))


@lru_cache(maxsize=1)  # Tests run release by release; a parsed one takes 250 MB.
def _tree(version: str) -> SourceTree:
    return SourceTree(folder(version))


@pytest.fixture
def tree(version: str) -> SourceTree:
    if not folder(version).is_dir():
        pytest.fail(f"the sources of vLLM {version} are not there: make matrix")
    return _tree(version)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    version = getattr(item, "callspec", None) and item.callspec.params.get("version")
    if version and (report.when == "call" or report.failed):
        _OUTCOMES[version][item.function.__name__][report.outcome] += 1
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _OUTCOMES:
        return
    aspects = list(dict.fromkeys(name for row in _OUTCOMES.values() for name in row))
    table = Table("vLLM", *(name.removeprefix("test_").replace("_", " ") for name in aspects))
    for version, row in _OUTCOMES.items():
        cells = []
        for aspect in aspects:
            good, bad = row[aspect]["passed"], row[aspect]["failed"]
            cells.append(f"{good} of {good + bad}")
        table.add_row(version, *cells)
    Console(width=100).print(table)
