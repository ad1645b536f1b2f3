"""Which vector steers which token: one vectorised fill of the buffers before each forward.

The core knows requests, slots and positions, and nothing of vLLM's model runners; an adapter per
runner tells it who comes, who goes and what the next batch looks like.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

# Columns of the table, all int32: what a token gets (a float32's bits for the strength) and where.
_SLOT, _STRENGTH, _START, _LENGTH = range(4)
_FOREVER = np.iinfo(np.int32).max  # No position gets there.
_NOWHERE = (0, 0, _FOREVER, 0)
_AHEAD = np.arange(1, 33, dtype=np.int32)[:, None]  # steps


class Part(NamedTuple):
    """One vector's part in a request: the positions in its spans get strength times its row.

    Positions count from the start of the prompt, so they stay true in chunks of a prefill and when
    a preempted request is computed again. A strength of 0 steers nothing.

    Attributes:
        spans: disjoint [start, end) in order; an end of None has no limit.
    """

    slot: int
    strength: float
    spans: Sequence[tuple[int, int | None]]


class Routing:
    """The per-token buffers of one worker and the table of steered requests.

    Attributes:
        slot: [max_tokens, parts] int32 on the device; 0 where nothing steers.
        strength: [max_tokens, parts] float32 on the device; 0 is "not steered".
        fills: batches described to the layers.
        fill_seconds: host time that this took.
        steered_tokens: tokens that some vector has shifted, recomputed ones again.
    """

    def __init__(
        self, max_tokens: int, parts: int, device: torch.device, pin_memory: bool = False
    ) -> None:
        self._rows: dict[str, int] = {}  # of the table, by request
        self._free: list[int] = []
        self._bounded: set[str] = set()  # requests steered at some positions only
        # Spans before the last one of each part, for requests that have such: only that one is in
        # the table. They lie in the prompt, so a decoding request has left them behind.
        self._earlier: dict[str, list[tuple[int, np.ndarray]]] = {}
        # [parts, rows, 4]; row 0 is everybody who is not steered.
        self._table = np.full((parts, 1, 4), _NOWHERE, np.int32)
        # Slot and strength lie side by side, so that one copy moves both.
        self._device = torch.zeros(max_tokens, parts, 2, dtype=torch.int32, device=device)
        self.slot = self._device[..., 0]
        self.strength = self._device.view(torch.float32)[..., 1]
        # The device's rows up to the last one that may be other than zero.
        self._written = np.zeros((0, parts), np.int64)
        self._pin_memory = pin_memory
        self._steered = 0  # tokens of the batch in the buffers
        # Batches that leave the buffers as they are: the same requests with the same counts, and
        # what they have computed, step by step (None: whatever that is).
        self._req_ids: list[str] | None = None
        self._scheduled = b""
        self._computed: Iterator[bytes] | None = None
        self.fills = self.steered_tokens = 0
        self.fill_seconds = 0.0

    def __len__(self) -> int:
        """How many requests are in the table."""
        return len(self._rows)

    def add(self, req_id: str, parts: Sequence[Part]) -> None:
        """Remembers a steered request; `parts` are at most as many as the buffers have."""
        self.discard(req_id)
        if not self._free:
            size = self._table.shape[1]
            self._table = np.concatenate((self._table, np.empty_like(self._table)), axis=1)
            self._free = list(range(2 * size - 1, size - 1, -1))
        row = self._free.pop()
        self._table[:, row] = _NOWHERE
        self._table[: len(parts), row] = [_entry(part) for part in parts]
        self._rows[req_id] = row
        if any(len(part.spans) != 1 or tuple(part.spans[0]) != (0, None) for part in parts):
            self._bounded.add(req_id)
        earlier = [
            (number, np.array(part.spans[:-1], np.int64))
            for number, part in enumerate(parts)
            if len(part.spans) > 1 and np.float32(part.strength) != 0
        ]
        if earlier:
            self._earlier[req_id] = earlier
        self._req_ids = None

    def discard(self, req_id: str) -> None:
        """Forgets a request, if it is known."""
        if (row := self._rows.pop(req_id, None)) is not None:
            self._free.append(row)
            self._bounded.discard(req_id)
            self._earlier.pop(req_id, None)
            self._req_ids = None

    def fill(
        self,
        req_ids: list[str],
        num_scheduled: np.ndarray,
        num_computed: np.ndarray,
        num_tokens: int,
    ) -> None:
        """Describes the next batch to the layers.

        Args:
            req_ids: the requests in batch order.
            num_scheduled: [requests] tokens of each in this batch.
            num_computed: [requests] tokens of each that earlier batches have computed.
            num_tokens: the sum of `num_scheduled`.
        """
        if not self._rows and not len(self._written):
            return
        began = perf_counter()
        if not (
            req_ids == self._req_ids
            and num_scheduled.tobytes() == self._scheduled
            and (self._computed is None or num_computed.tobytes() == next(self._computed, None))
        ):
            self._refill(req_ids, num_scheduled, num_computed, num_tokens)
        self.steered_tokens += self._steered
        self.fills += 1
        self.fill_seconds += perf_counter() - began

    def _refill(
        self,
        req_ids: list[str],
        num_scheduled: np.ndarray,
        num_computed: np.ndarray,
        num_tokens: int,
    ) -> None:
        self._req_ids = None
        row = np.fromiter(map(self._rows.get, req_ids, repeat(0)), np.intp, len(req_ids))
        position = num_computed.astype(np.int32, copy=False)
        one_each = 0 < num_tokens == len(req_ids) and bool((num_scheduled == 1).all())
        if not one_each:
            first = np.cumsum(num_scheduled, dtype=np.int32) - num_scheduled
            row = np.repeat(row, num_scheduled)
            if len(row) != num_tokens:
                raise ValueError(f"num_tokens is {num_tokens}, but {len(row)} are scheduled")
            position = np.repeat((position - first).astype(np.int32), num_scheduled)
            position += np.arange(num_tokens, dtype=np.int32)
        found = self._table.take(row, axis=1)  # [parts, tokens, 4]
        # Without a sign, a position before the start is farther from it than any length.
        since = (position - found[..., _START]).view(np.uint32)
        length = found.view(np.uint32)[..., _LENGTH]
        on = since < length
        patched = bool(self._earlier) and self._patch(on, req_ids, num_scheduled, num_computed)
        self._steered = int(np.count_nonzero(on.any(axis=0)))
        self._write(found.view(np.int64)[..., 0], on)
        if self._bounded:
            if patched or not one_each:
                return
            # From here to the end of the part or, modulo 2**32, to its start.
            steps = int((length * on - since).min())
            self._computed = _counting_on(num_computed.copy(), steps - 1)
        else:
            self._computed = None
        self._scheduled = num_scheduled.tobytes()
        self._req_ids = list(req_ids)  # V1 goes on using its list.

    def _patch(
        self,
        on: np.ndarray,
        req_ids: list[str],
        num_scheduled: np.ndarray,
        num_computed: np.ndarray,
    ) -> bool:
        """Adds the spans that are not in the table; whether the batch reaches back to any.

        Args:
            on: [parts, tokens], changed in place.
        """
        patched = False
        for number, req_id in enumerate(req_ids):
            for part, spans in self._earlier.get(req_id, ()):
                computed = int(num_computed[number])
                if computed >= spans[-1, 1]:
                    continue
                patched = True
                first = int(num_scheduled[:number].sum())
                mine = on[part, first : first + int(num_scheduled[number])]
                for start, end in (spans - computed).clip(0):
                    mine[start:end] = True
        return patched

    def _write(self, words: np.ndarray, on: np.ndarray) -> None:
        """Puts slots and strengths on the device.

        Args:
            words: [parts, tokens] int64, a slot and a strength's bits each.
            on: [parts, tokens] where they hold; elsewhere nothing steers.
        """
        used = on.shape[1] if self._steered else 0
        rows = max(used, len(self._written))
        if not rows:
            return
        # Fresh memory each time: the copy may still run when the next batch is filled. (Torch
        # gives a pinned block away again only after the copies from it have ended.)
        staged = torch.empty(
            (rows, *self._device.shape[1:]), dtype=torch.int32, pin_memory=self._pin_memory
        )
        after = staged.numpy().view(np.int64)[..., 0]
        for part in range(len(on)):  # By columns: numpy would go along the shorter axis.
            np.multiply(words[part, :used], on[part, :used], out=after[:used, part])
        after[used:] = 0  # CUDA graphs read on beyond a batch.
        if not np.array_equal(after, self._written):
            self._device[:rows].copy_(staged, non_blocking=True)
        self._written = after[:used]


def _entry(part: Part) -> tuple[int, int, int, int]:
    """The table's row for the last span of a part."""
    strength = np.float32(part.strength)
    if strength == 0 or not part.spans:
        return _NOWHERE
    start, end = part.spans[-1]
    start = min(start, _FOREVER)
    end = _FOREVER if end is None else min(end, _FOREVER)
    return part.slot, int(strength.view(np.int32)), start, max(0, end - start)


def _counting_on(computed: np.ndarray, steps: int) -> Iterator[bytes]:
    """What a decoding batch will have computed, step by step: bytes are the cheapest to compare."""
    while steps > 0:
        ahead = computed + _AHEAD[:steps].astype(computed.dtype)
        size, rows = ahead[0].nbytes, ahead.tobytes()
        for start in range(0, len(rows), size):
            yield rows[start : start + size]
        computed, steps = ahead[-1], steps - len(ahead)
