"""Every release's sources have what the package touches, in the shape that it needs.

Not in the default run, since the sources have to be fetched: `make matrix`.
"""

import pytest

from grains_vllm import doors, plugin
from grains_vllm.layers import _OUTPUT_OF
from grains_vllm.plugin import TouchPoint
from tests.matrix.fetch import folder
from tests.matrix.forwards import FORWARDS
from tests.matrix.reads import READS
from tests.matrix.routes import routes
from tests.matrix.source_tree import SourceTree, digest
from tests.matrix.versions import RELEASES

# Every group of touch points that plugin.py has, whatever it is called.
TOUCHED = [
    point
    for group in vars(plugin).values()
    if isinstance(group, tuple)
    for point in group
    if isinstance(point, TouchPoint)
]
each_release = pytest.mark.parametrize("version", RELEASES, scope="session")


@each_release
@pytest.mark.parametrize("point", dict.fromkeys(TOUCHED), ids=str)
def test_touch_points(tree: SourceTree, point: TouchPoint):
    assert tree.problem(point) is None


@each_release
@pytest.mark.parametrize(
    "point", [pytest.param(p, id=f"{file}:{p}") for file, points in READS.items() for p in points]
)
def test_attributes_read(tree: SourceTree, point: TouchPoint):
    assert tree.problem(point) is None


@each_release
@pytest.mark.parametrize("layer", _OUTPUT_OF)
def test_layer_forwards(tree: SourceTree, layer: str):
    """The forward is one that somebody has read to fill in the table of layers.py."""
    code = tree.code_of(f"{layer}.forward")
    name = layer.removeprefix("vllm.model_executor.models.")
    assert digest(code) in FORWARDS[name], f"not read yet, {digest(code)}:\n{code}"


@each_release
def test_routes(version: str):
    """Somebody has decided about every route of the API server (grains_vllm/doors.py)."""
    found = routes(folder(version) / "vllm" / "entrypoints")
    assert {"/v1/chat/completions", "/invocations", "/v1/realtime"} <= found
    assert sorted(route for route in found if not doors.decided(route)) == []


def test_the_releases_span_what_plugin_admits():
    minors = {tuple(map(int, version.split(".")[:2])) for version in RELEASES}
    assert minors == {(0, minor) for minor in range(plugin.OLDEST[1], plugin.NEWEST[1] + 1)}
    assert plugin.OLDEST[0] == plugin.NEWEST[0] == 0


def test_a_symbol_that_is_not_there_is_found_missing(tmp_path):
    """The reader itself: what it calls present is present, and the rest is not."""
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("from vllm.inner import Moved\n")
    (package / "inner.py").write_text(
        "class Base:\n"
        "    def load(self):\n"
        "        self.late = 1\n"
        "class Moved(Base):\n"
        "    field: int\n"
        "    def __init__(self, first, *, second=None):\n"
        "        self.early = other.foreign = first\n"
    )
    tree = SourceTree(tmp_path)

    def missing(name: str, *parameters: str) -> bool:
        return tree.problem(TouchPoint("vllm", name, parameters)) is not None

    for name in ("Moved", "Moved.field", "Moved.early", "Moved.late", "Moved.load"):
        assert not missing(name), name
    assert not missing("Moved.__init__", "first", "second")
    assert missing("Moved.__init__", "third")
    for name in ("Base", "Moved.foreign", "Moved.later", "inner.Base.early"):
        assert missing(name), name
