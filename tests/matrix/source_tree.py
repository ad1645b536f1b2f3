"""One release of vLLM, read but never imported: griffe follows re-exports and inheritance."""

import ast
import hashlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

import griffe

from grains_vllm.plugin import TouchPoint


class SourceTree:
    """The package `vllm` below a folder."""

    def __init__(self, folder: Path) -> None:
        loader = griffe.GriffeLoader(search_paths=[folder], allow_inspection=False)
        self._package = loader.load("vllm", try_relative_path=False)

    def problem(self, point: TouchPoint) -> str | None:
        """Why this release lacks the symbol in the shape that is needed, else None.

        Unlike TouchPoint.problem, knows what the methods of a class assign to `self`.
        """
        owner, _, name = str(point).rpartition(".")
        try:
            holder = self._find(owner)
            found = holder[name]
        except (KeyError, griffe.GriffeError) as error:
            if not isinstance(error, KeyError) or not self._assigns(owner, name):
                return f"{point}: {type(error).__name__}: {error}"
            return None
        if not point.parameters:
            return None
        names = {parameter.name for parameter in getattr(found, "parameters", ())}
        missing = [parameter for parameter in point.parameters if parameter not in names]
        return f"{point}: has no parameter {', '.join(missing)}" if missing else None

    def code_of(self, method: str) -> str:
        """A method's code without comments, docstring and formatting.

        Raises:
            KeyError: its class does not exist, or inherits it.
        """
        owner, _, name = method.rpartition(".")
        (definition,) = _tree(self._find(owner).members[name]).body
        assert isinstance(definition, ast.FunctionDef)
        if ast.get_docstring(definition) is not None:
            del definition.body[0]
        return ast.unparse(definition)

    def _find(self, path: str) -> griffe.Object:
        if path == "vllm":
            return self._package
        found = self._package[path.removeprefix("vllm.")]
        return found.final_target if found.is_alias else found

    def _assigns(self, owner: str, name: str) -> bool:
        """Whether a method of a class or of one of its bases sets `self.NAME`.

        griffe looks for that in __init__ only.
        """
        try:
            found = self._find(owner)
        except (KeyError, griffe.GriffeError):
            return False
        if not isinstance(found, griffe.Class):
            return False
        return any(name in set(_set_on_self(cls)) for cls in (found, *found.mro()))


def digest(code: str) -> str:
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def _set_on_self(cls: griffe.Class) -> Iterator[str]:
    for node in _own_nodes(_tree(cls).body[0]):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            yield node.attr


def _own_nodes(cls: ast.AST) -> Iterator[ast.AST]:
    """What a class says, without the classes inside it, whose `self` is another."""
    for node in ast.iter_child_nodes(cls):
        if not isinstance(node, ast.ClassDef):
            yield node
            yield from _own_nodes(node)


def _tree(found: griffe.Object | griffe.Alias) -> ast.Module:
    lines = Path(str(found.filepath)).read_text().splitlines()
    return ast.parse(textwrap.dedent("\n".join(lines[found.lineno - 1 : found.endlineno])))
