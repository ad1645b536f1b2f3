"""What a figure depends on besides the settings: versions, hardware, and the plugin's own code."""

import hashlib
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import grains_vllm


def versions() -> dict[str, str | None]:
    """Of Python and what serves the model; None for what is not installed."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in ("vllm", "torch", "transformers", "triton")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def code() -> str:
    """A short digest over the plugin's sources, so that two states of it are never mixed up."""
    hasher = hashlib.sha256()
    for path in sorted(Path(grains_vllm.__file__).parent.glob("*.py")):
        hasher.update(path.name.encode() + path.read_bytes())
    return hasher.hexdigest()[:12]


def hardware() -> dict[str, Any]:
    """The processor, its count, how many threads are used (None: the default), and the GPUs."""
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "gpus": gpus(),
    }


def gpus() -> list[str]:
    """Name and driver of every NVIDIA GPU; asks without touching one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    asked = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True)
    return found.stdout.splitlines() if found.returncode == 0 else []


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
