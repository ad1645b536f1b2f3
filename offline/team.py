"""The processes that share one run: how they exchange results, and how one's failure ends all.

torchrun and `accelerate launch` start them and say by environment variables who is who. They only
exchange bytes, through the key-value store by which such processes find each other: it needs no
threads, and it makes no difference whether they compute on GPUs.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import typer

from offline.console import message_of, stderr
from offline.errors import InputError

_DATA, _ERROR = b"+", b"-"
_PIECE = 2**20  # bytes; the store refuses values above 8 MiB
_PAUSE = 0.05  # seconds


class OthersFailedError(Exception):
    """Another process of the team has failed; its message is what users see."""


class Post:
    """Exchanges bytes in rounds, over a torch.distributed.Store."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._rounds = count()
        self._kept: list[str] = []  # keys of the last round

    def exchange(self, payload: bytes) -> list[bytes]:
        """What every process has given in this round, by rank; waits for all of them."""
        number = next(self._rounds)
        mine = f"{number}/{self._rank}"
        pieces = [payload[start : start + _PIECE] for start in range(0, len(payload), _PIECE)]
        keys = [f"{mine}/{place}" for place in range(len(pieces))]
        for key, piece in zip(keys, pieces, strict=True):
            self._store.set(key, piece)
        self._store.set(mine, str(len(pieces)))
        found = [self._read(number, rank) for rank in range(self._size)]
        # All have entered this round, so nobody reads the one before any more.
        for key in self._kept:
            self._store.delete_key(key)
        self._kept = [mine, *keys]
        return found

    def leave(self) -> None:
        """Waits, in the process that may hold the store, until nobody needs it any more."""
        self._store.set(f"left/{self._rank}", b"")
        if self._rank == 0:
            for rank in range(self._size):
                self._await(f"left/{rank}")

    def _read(self, number: int, rank: int) -> bytes:
        theirs = f"{number}/{rank}"
        self._await(theirs)
        pieces = range(int(self._store.get(theirs)))
        return b"".join(self._store.get(f"{theirs}/{place}") for place in pieces)

    def _await(self, key: str) -> None:
        """Waits as long as it takes: one process may be busy, and launchers notice dead ones."""
        while not self._store.check([key]):  # its own `wait` would not hear a Ctrl-C
            time.sleep(_PAUSE)


@dataclass(frozen=True)
class Team:
    """This process among `size` that share one run; alone by default.

    Attributes:
        rank: 0 for the process that leads, which alone reads and writes files and shows progress.
        local_rank: the number among the processes of this machine.
        post: how they exchange results; None for one alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    post: Post | None = None

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, payload: bytes = b"") -> list[bytes]:
        """What every process has given, by rank; waits for all of them.

        Raises:
            OthersFailedError: a process has left `joined` with an error instead.
        """
        parts = self._exchange(_DATA + payload)
        failed = {rank: part[1:].decode() for rank, part in enumerate(parts) if part[:1] == _ERROR}
        if failed:
            self._tell(failed)
            raise OthersFailedError
        return [part[1:] for part in parts]

    def fail(self, message: str) -> None:
        """Tells the others, in place of what they wait for, that this process cannot go on."""
        parts = self._exchange(_ERROR + message.encode())
        self._tell(
            {rank: part[1:].decode() for rank, part in enumerate(parts) if part[:1] == _ERROR}
        )

    def device(self, asked: str, device_map: str | None) -> str:
        """The --device of this process: each has a GPU of its own where GPUs are used.

        Raises:
            InputError: the options name devices themselves, or there are too few GPUs.
        """
        if self.size == 1:
            return asked
        import torch

        if device_map is not None:
            raise InputError("--device-map spreads one process over the GPUs; start just one")
        if asked not in ("cuda", "cpu", "auto"):
            raise InputError(
                f"--device is '{asked}', but each of {self.size} processes takes a GPU of its own; "
                "expected cuda, cpu or auto"
            )
        if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
            return "cpu"
        if not torch.cuda.is_available():
            raise InputError("--device is 'cuda', but PyTorch finds no CUDA device here")
        if self.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {self.local_rank} of this machine finds {torch.cuda.device_count()} "
                "GPUs; start one process per GPU"
            )
        return f"cuda:{self.local_rank}"

    def _exchange(self, payload: bytes) -> list[bytes]:
        return [payload] if self.post is None else self.post.exchange(payload)

    def _tell(self, failed: dict[int, str]) -> None:
        """Prints each message once; then all may end, for launchers end the rest with the first."""
        if self.leads:
            for message in dict.fromkeys(failed.values()):
                ranks = [str(rank) for rank, found in failed.items() if found == message]
                whose = "" if len(ranks) == self.size else f"process {', '.join(ranks)}: "
                stderr.print(f"error: {whose}{message}", soft_wrap=True)
        self._exchange(_DATA)


def launched() -> int:
    """How many processes a launcher has started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def joined() -> Iterator[Team]:
    """The team that this process was launched into; errors that users can mend end all of it.

    Without torchrun or `accelerate launch` that is a team of one, whose errors pass through.
    """
    size = launched()
    if size == 1:
        yield Team()
        return
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://"))
    except ValueError as error:  # one of the launcher's variables is missing
        raise InputError(f"WORLD_SIZE is {size}, but torchrun has not set all: {error}") from error
    # The store outlives the processes: what those before a restart have left is not for these.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    post = Post(PrefixStore(f"grains/{attempt}", store), rank, size)
    team = Team(rank, size, int(os.environ.get("LOCAL_RANK", "0")), post)
    if not team.leads:
        from transformers.utils import logging

        logging.disable_progress_bar()  # all of them load the same model
        logging.set_verbosity_error()
    failed = False
    try:
        yield team
        team.share()
    except OthersFailedError:
        failed = True
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        team.fail(message)
        failed = True
    post.leave()
    if failed:
        raise typer.Exit(2)
