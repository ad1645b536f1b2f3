"""How much one forward with gradients may hold: rows per forward, and what is kept of them."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

_M_MMAP_THRESHOLD = -3  # malloc.h
ROWS, TOKENS = 8, 4096  # of one forward, padding included, where nothing else was asked for


def out_of_memory(error: Exception) -> bool:
    """Whether a device, the CPU included, had too little memory."""
    full = "DefaultCPUAllocator: can't allocate memory"  # has no type of its own
    return isinstance(error, torch.OutOfMemoryError) or full in str(error)


@cache
def return_freed_memory() -> None:
    """Makes glibc return every freed tensor to the system; does nothing with other C libraries.

    By itself glibc learns to keep tensors of up to 32 MiB in its heap, where the inputs of blocks,
    which live long, leave holes between them: three times the memory that is really used.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)


@dataclass
class Room:
    """What fits into one forward; becomes smaller, for good, when the device runs out of memory.

    Attributes:
        rows: most rows, whatever their length. None: at most ROWS rows and `tokens` tokens.
        recompute: whether only the inputs of decoder blocks are kept for the backward pass, which
            then computes the blocks once more. None: on a CPU for a row of more than TOKENS
            tokens, since there a process that takes too much is killed without warning; elsewhere
            once a single row has proved too large.
        on_note: told what has changed, in one line.
    """

    rows: int | None = None
    recompute: bool | None = None
    on_note: Callable[[str], None] = lambda note: None
    tokens: int = TOKENS

    def fit(self, lengths: Sequence[int], rows_each: int) -> int:
        """How many of the first examples share the next forward, 1 or more.

        Args:
            lengths: tokens of each example's longest row.
            rows_each: rows that an example takes.
        """
        if self.rows is not None:
            return max(1, self.rows // rows_each)
        count, longest = 0, 0
        for length in lengths[: max(1, ROWS // rows_each)]:
            longest = max(longest, length)
            if count and (count + 1) * rows_each * longest > self.tokens:
                break
            count += 1
        return count

    def recomputes(self, longest: int, device: torch.device) -> bool:
        """Whether a forward whose longest row has `longest` tokens keeps block inputs only."""
        if self.recompute is None:
            return device.type == "cpu" and longest > TOKENS
        return self.recompute

    def shrink(self, examples: int, rows_each: int, longest: int, device: torch.device) -> bool:
        """Makes less fit than the forward that ran out of memory; False if it was the least."""
        rows = examples * rows_each
        what = f"too little memory for {rows} x {longest} tokens"
        if examples > 1:
            if self.rows is not None:
                self.rows = max(1, rows // 2)
            else:
                self.tokens = rows * longest // 2
            self.on_note(f"{what} per forward; going on with half as many")
        elif not self.recomputes(longest, device) and self.recompute is None:
            self.recompute = True
            self.on_note(f"{what}; activations are computed twice instead of kept from now on")
        else:
            return False
        return True
