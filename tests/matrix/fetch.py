"""Fetches the Python sources of every release: `python -m tests.matrix.fetch`.

One wheel after the other is downloaded by pip, unpacked but for its binaries, and deleted. What is
there already is not fetched again.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.matrix.versions import RELEASES

SOURCES = Path(__file__).parents[2] / "build" / "vllm-sources"


def folder(version: str) -> Path:
    """Where a release's package `vllm` lies; exists only when it is complete."""
    return SOURCES / version


def fetch(version: str, distribution: str) -> None:
    """Fetches one release.

    Raises:
        subprocess.CalledProcessError: pip found no wheel; its own words are on stderr.
    """
    SOURCES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SOURCES) as aside:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        # A wheel for whatever Python: its code is read, not run.
        pip += ["--only-binary", ":all:", "--ignore-requires-python", "--dest", aside]
        subprocess.run([*pip, f"{distribution}=={version}"], check=True)
        (wheel,) = Path(aside).glob("*.whl")
        unpacked = Path(aside) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            archive.extractall(
                unpacked, [n for n in names if n.startswith("vllm/") and n.endswith(".py")]
            )
        unpacked.rename(folder(version))


def main() -> None:
    for version, distribution in RELEASES.items():
        if not folder(version).is_dir():
            print(f"vLLM {version}: fetching {distribution}", flush=True)
            fetch(version, distribution)


if __name__ == "__main__":
    main()
