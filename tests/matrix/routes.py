"""The HTTP routes that a release's sources attach, read off its code."""

import ast
from collections.abc import Iterator
from pathlib import Path

_ATTACH = {
    "get", "post", "put", "patch", "delete", "websocket", "mount", "api_route", "add_api_route",
}  # fmt: skip


def routes(folder: Path) -> set[str]:
    """Paths, as templates, of every route below `folder`."""
    return {
        path for file in folder.rglob("*.py") for path in _attached(ast.parse(file.read_text()))
    }


def _attached(tree: ast.AST) -> Iterator[str]:
    """First arguments of calls such as `router.post("/score")`; a path of a client's call would be
    read too, and have to be decided about."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(attr=verb), args=[ast.Constant(value=str(path)), *_]
            ) if verb in _ATTACH and path.startswith("/"):
                yield path
