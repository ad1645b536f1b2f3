"""Which vector steers which token: one vectorised fill of the buffers before each forward.

The core knows requests, slots and positions, and nothing of vLLM's model runners; an adapter per
runner (runner_v1.py) tells it who comes, who goes and what the next batch looks like.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

_FOREVER = np.iinfo(np.int64).max


class Part(NamedTuple):
    """One vector's part in a request: positions start <= p < end get strength times its row.

    Positions count from the start of the prompt, so they stay true in chunks of a prefill and when
    a preempted request is computed again.
    """

    slot: int
    strength: float
    start: int
    end: int | None


class _Batch(NamedTuple):
    """The parts of a batch's requests as arrays, all [requests, parts]."""

    slot: np.ndarray
    strength: np.ndarray
    start: np.ndarray
    end: np.ndarray


class Routing:
    """The per-token buffers of one worker and the table of steered requests.

    Attributes:
        slot: [max_tokens, parts] int32 on the device; 0 is "not steered".
        strength: [max_tokens, parts] float32 on the device.
        fills: batches described to the layers.
        fill_seconds: host time that this took.
        steered_tokens: tokens that some vector has shifted, recomputed ones again.
    """

    def __init__(self, max_tokens: int, parts: int, device: torch.device) -> None:
        self._parts = parts
        self._table: dict[str, tuple[Part, ...]] = {}
        # Slot and strength lie side by side, so that one copy moves both.
        self._host = torch.zeros(max_tokens, parts, 2, dtype=torch.int32)
        self._device = torch.zeros(max_tokens, parts, 2, dtype=torch.int32, device=device)
        self._host_slot = self._host.numpy()[..., 0]
        self._host_strength = self._host.view(torch.float32).numpy()[..., 1]
        self.slot = self._device[..., 0]
        self.strength = self._device.view(torch.float32)[..., 1]
        self._written = 0  # Rows of the buffers that may be other than zero.
        self._batch: tuple[list[str], _Batch] | None = None
        self.fills = self.steered_tokens = 0
        self.fill_seconds = 0.0

    def __len__(self) -> int:
        """How many requests are in the table."""
        return len(self._table)

    def add(self, req_id: str, parts: Sequence[Part]) -> None:
        """Remembers a steered request; `parts` are at most as many as the buffers have."""
        self._table[req_id] = tuple(parts)
        self._batch = None

    def discard(self, req_id: str) -> None:
        if self._table.pop(req_id, None) is not None:
            self._batch = None

    def fill(self, req_ids: list[str], num_scheduled: np.ndarray, num_computed: np.ndarray) -> None:
        """Describes the next batch to the layers.

        Args:
            req_ids: the requests in batch order.
            num_scheduled: [requests] tokens of each in this batch.
            num_computed: [requests] tokens of each that earlier batches have computed.
        """
        if not self._table and not self._written:
            return
        began = time.perf_counter()
        slot, strength = self._rows(req_ids, num_scheduled, num_computed)
        self._write(slot, strength)
        self.fills += 1
        self.fill_seconds += time.perf_counter() - began

    def _rows(
        self, req_ids: list[str], num_scheduled: np.ndarray, num_computed: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if not self._table:
            return np.zeros((0, self._parts), np.int32), np.zeros((0, self._parts), np.float32)
        batch = self._arrays(req_ids)
        request = np.repeat(np.arange(len(req_ids)), num_scheduled)
        first = np.cumsum(num_scheduled) - num_scheduled
        position = (num_computed - first)[request] + np.arange(len(request))
        on = (position[:, None] >= batch.start[request]) & (position[:, None] < batch.end[request])
        return np.where(on, batch.slot[request], 0), np.where(on, batch.strength[request], 0)

    def _arrays(self, req_ids: list[str]) -> _Batch:
        # While a batch decodes, its requests stay the same from step to step.
        if self._batch is not None and self._batch[0] == req_ids:
            return self._batch[1]
        shape = len(req_ids), self._parts
        batch = _Batch(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.int64),
            np.zeros(shape, np.int64),
        )
        for row, req_id in enumerate(req_ids):
            for column, part in enumerate(self._table.get(req_id, ())):
                batch.slot[row, column] = part.slot
                batch.strength[row, column] = part.strength
                batch.start[row, column] = part.start
                batch.end[row, column] = _FOREVER if part.end is None else part.end
        self._batch = list(req_ids), batch
        return batch

    def _write(self, slot: np.ndarray, strength: np.ndarray) -> None:
        steered = np.flatnonzero(slot.any(axis=1))
        self.steered_tokens += len(steered)
        used = int(steered[-1]) + 1 if len(steered) else 0
        rows = max(used, self._written)
        before = self._host_slot[:rows], self._host_strength[:rows]
        after = np.zeros_like(before[0]), np.zeros_like(before[1])
        after[0][:used], after[1][:used] = slot[:used], strength[:used]
        self._written = used
        if np.array_equal(before[0], after[0]) and np.array_equal(before[1], after[1]):
            return
        before[0][:], before[1][:] = after
        staged = self._host[:rows]
        if self._device.is_cuda:
            # Fresh pinned memory each time: the copy may still run when the next batch is filled.
            staged = staged.pin_memory()
        self._device[:rows].copy_(staged, non_blocking=True)
