"""What every command shares: messages, exit codes, progress, and looking before leaping."""

import os
import select
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.text import Text

from grains_vllm.vectors import ArtifactError
from offline.errors import InputError

# No markup or emoji: messages quote names that may hold brackets or colons.
stderr = Console(stderr=True, highlight=False, markup=False, emoji=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
AllowImageUrls = Annotated[
    bool, typer.Option("--allow-image-urls", help="Download images that the data has URLs of.")
]
Force = Annotated[bool, typer.Option(help="Overwrite an existing --out.")]
ModelName = Annotated[
    str, typer.Option(help="Folder or hub id of a causal language model; it may take images too.")
]
Split = Annotated[str, typer.Option(help="Split of a folder or hub data set.")]
Chat = Annotated[bool, typer.Option(help="Make string prompts a chat's user message.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
DeviceMap = Annotated[str | None, typer.Option(help="'auto' spreads a model over several devices.")]
Restart = Annotated[bool, typer.Option(help="Discard what an interrupted run left.")]


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a command as Ctrl-C does, with what it has started."""


def stdout() -> Console:
    """For tables. A file or pipe has no edge to fit in, but where COLUMNS says so."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120
    return console


@contextmanager
def input_errors(on_interrupt: str = "") -> Iterator[None]:
    """Turns what the user can mend into a message and exit code 2, Ctrl-C into 130, SIGTERM into
    143. Whoever reads stdout may stop doing so (141)."""
    try:
        yield
        sys.stdout.flush()
    except (InputError, ArtifactError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise typer.Exit(141) from None
        stderr.print(f"error: {message_of(error)}", soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as signal:
        ended = isinstance(signal, Terminated)
        word = "terminated" if ended else "interrupted"
        stderr.print(f"{word}; {on_interrupt}" if on_interrupt else word)
        raise typer.Exit(143 if ended else 130) from None


def _nobody_reads() -> bool:
    """Whether stdout is closed at its other end; what is left for it is thrown away then."""
    try:
        output = sys.stdout.fileno()
    except OSError:
        return False
    poll = select.poll()
    poll.register(output, 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return closed


def message_of(error: Exception) -> str | None:
    """What to say about an error that the user can mend; None for any other."""
    if isinstance(error, InputError | ArtifactError):
        return str(error)
    if isinstance(error, OSError):
        path = "" if error.filename is None else f"{error.filename}: "
        return f"{path}{error.strerror or error}"
    return None


@contextmanager
def progress(
    total: int, what: str = "examples", *, visible: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with rate and remaining time; yields a function that advances it."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Pace()
    with Progress(*columns, console=stderr, disable=not visible) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


class _Pace(ProgressColumn):
    """Items per second and the time left, over the whole run: they finish in groups, which
    misleads the estimate that Rich makes from the last moments."""

    def render(self, task: Task) -> Text:
        if not task.elapsed or not task.completed or task.total is None:
            return Text("")
        rate = task.completed / task.elapsed
        left = timedelta(seconds=round((task.total - task.completed) / rate))
        return Text(f"{rate:.2f} /s, {left} left")


def require_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises InputError unless `value` is allowed."""
    if value not in allowed:
        raise InputError(f"{option} is '{value}', expected one of {', '.join(allowed)}")


def require_different(**paths: str | Path | None) -> None:
    """Raises InputError if two of the options, given by name, mean the same file."""
    seen: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        place = Path(path).resolve()
        if place in seen:
            raise InputError(f"--{seen[place]} and --{option} are the same file: {path}")
        seen[place] = option


def require_writable(path: Path, force: bool) -> None:
    """Raises InputError unless `path` can be made, and is new or may be overwritten."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file name")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is a device or a pipe, expected a file name")
    if path.exists() and not force:
        raise InputError(f"{path}: exists; --force overwrites it")
    try:
        # Asking the operating system misleads for root and on read-only mounts: try it.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({os.strerror(error.errno or 0)})") from error
