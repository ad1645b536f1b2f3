"""Lets vLLM find the plugin in a bare checkout: its entry points, where nothing can be installed.

vLLM asks importlib.metadata for entry points, which reads NAME-VERSION.dist-info folders on the
path; this writes one from pyproject.toml.
"""

from importlib.metadata import entry_points
from pathlib import Path

import tomllib

from benchmarks.server import ROOT
from grains_vllm.vectors import write_aside

GROUP = "vllm.general_plugins"


def folder_for_path(work: Path) -> Path | None:
    """A folder to put on PYTHONPATH, or None where the project is installed."""
    if any(point.name == "grains" for point in entry_points(group=GROUP)):
        return None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    site = work / "site"
    folder = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    described = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    write_aside(folder / "METADATA", described.encode())
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), ""]
    write_aside(folder / "entry_points.txt", "\n".join(lines).encode())
    return site
