"""The processes that share one run: how they exchange results, and how one's failure ends all.

torchrun and `accelerate launch` start them and say by environment variables who is who. They only
exchange bytes, over gloo, so it makes no difference whether they compute on GPUs.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import typer

from offline.console import message_of, stderr
from offline.errors import InputError

_PATIENCE = timedelta(days=7)  # one process may be busy for long; launchers notice dead ones
_DATA, _ERROR = b"+", b"-"


class OthersFailedError(Exception):
    """Another process of the team has failed; its message is what users see."""


@dataclass(frozen=True)
class Team:
    """This process among `size` that share one run; alone by default.

    Attributes:
        rank: 0 for the process that leads, which alone reads and writes files and shows progress.
        local_rank: the number among the processes of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

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
        if self.size == 1:
            return [payload]
        import torch
        from torch.distributed import all_gather

        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        all_gather(sizes, torch.tensor([len(payload)]))
        lengths = [int(size) for size in sizes]
        mine = torch.zeros(max(lengths), dtype=torch.uint8)
        mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in lengths]
        all_gather(parts, mine)
        return [
            part[:length].numpy().tobytes() for part, length in zip(parts, lengths, strict=True)
        ]

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
    from torch import distributed

    try:
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    except ValueError as error:  # one of the launcher's variables is missing
        raise InputError(f"WORLD_SIZE is {size}, but torchrun has not set all: {error}") from error
    team = Team(distributed.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")))
    if not team.leads:
        from transformers.utils import logging

        logging.disable_progress_bar()  # all of them load the same model
        logging.set_verbosity_error()
    try:
        yield team
        team.share()
    except OthersFailedError:
        raise typer.Exit(2) from None
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        team.fail(message)
        raise typer.Exit(2) from None
    finally:
        distributed.destroy_process_group()
