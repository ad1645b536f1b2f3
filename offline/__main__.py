"""The console script `grains`; says what to install where only the plugin is."""

import sys


def main() -> None:
    """Runs the command line of offline.cli."""
    try:
        from offline.cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"grains needs {error.name}: pip install 'grains-vllm[offline]'")
    run()


if __name__ == "__main__":
    main()
