"""What every command shares: messages, exit codes, progress, and looking before leaping."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from grains_vllm.vectors import ArtifactError
from offline.errors import InputError

stderr = Console(stderr=True, highlight=False)


@contextmanager
def input_errors(on_interrupt: str = "") -> Iterator[None]:
    """Turns what the user can mend into a message and exit code 2, Ctrl-C into 130."""
    try:
        yield
    except (InputError, ArtifactError) as error:
        stderr.print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        stderr.print(f"interrupted; {on_interrupt}" if on_interrupt else "interrupted")
        raise typer.Exit(130) from None


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr with rate and remaining time; yields a function that advances it."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=stderr) as bar:
        task = bar.add_task("examples", total=total)
        yield lambda: bar.advance(task)


class _Rate(ProgressColumn):
    """Examples per second."""

    def render(self, task: Task) -> Text:
        return Text("- /s" if not task.speed else f"{task.speed:.2f} /s")


def require_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises InputError unless `value` is allowed."""
    if value not in allowed:
        raise InputError(f"{option} is '{value}', expected one of {', '.join(allowed)}")


def require_writable(path: Path, force: bool) -> None:
    """Raises InputError unless `path` can be made, and is new or may be overwritten."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file name")
    if path.exists() and not force:
        raise InputError(f"{path}: exists; --force overwrites it")
    try:
        # Asking the operating system misleads for root and on read-only mounts: try it.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({os.strerror(error.errno or 0)})") from error
