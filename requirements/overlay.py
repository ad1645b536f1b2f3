"""An environment on top of another: `python requirements/overlay.py DIR PACKAGE ...`.

Run with the Python of the environment below, whose packages the new one sees; PACKAGEs (pip's
requirements) come on top without their dependencies, and win over what is below. So it is small and
quick, and cannot harm the other.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import venv
from pathlib import Path

from install import InstallError, run


def create(folder: Path) -> tuple[Path, list[str]]:
    """Makes an empty one; returns its site-packages, and a pip command that takes requirements."""
    below = sysconfig.get_path("purelib")
    venv.create(folder, clear=True)  # pip too comes from below
    (own,) = (folder / "lib").glob("python*/site-packages")
    # A .pth file's folders come last on sys.path.
    (own / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    pip = [str(folder / "bin" / "python"), "-I", "-m", "pip", "install", "--no-input", "--no-deps"]
    pip += ["--ignore-installed", "--disable-pip-version-check", "--progress-bar", "off"]
    return own, pip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("packages", nargs="+", metavar="PACKAGE")
    args = parser.parse_args()
    folder = args.folder.absolute()
    print(f"Installing {', '.join(args.packages)} into {folder}")
    _, pip = create(folder)
    try:
        run("packages", [*pip, *args.packages], folder / "install.log")
    except InstallError as error:
        print(f"\nERROR: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
