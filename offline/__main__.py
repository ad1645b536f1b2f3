"""The console script `grains`; says what to install where only the plugin is."""

import os
import signal
import sys
from typing import Any


def main() -> None:
    """Runs the command line of offline.cli."""
    # Imports take seconds, and there is nothing to tidy up yet. An exception would not do: what is
    # being imported may take it for a failure of its own.
    before = signal.signal(signal.SIGINT, _interrupted)
    try:
        from offline.cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"grains needs {error.name}: pip install 'grains-vllm[offline]'")
    signal.signal(signal.SIGINT, before)
    run()


def _interrupted(*_: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
