"""Which vector steers which token: one vectorised fill of the buffers before each forward.

The core knows requests, slots and positions, and nothing of vLLM's model runners; an adapter per
runner (runner_v1.py) tells it who comes, who goes and what the next batch looks like.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Route:
    """How one request is steered.

    Attributes:
        positions: "all", "prompt" or "generation".
        prompt_len: tokens of the prompt; a token is generated iff its position is not below it,
            which stays true when a preempted request is computed again.
    """

    slot: int
    strength: float
    positions: str
    prompt_len: int


class Routing:
    """The per-token buffers of one worker and the table of steered requests.

    Attributes:
        slot: [max_tokens] int32 on the device; 0 is "not steered".
        strength: [max_tokens] float32 on the device.
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self._table: dict[str, Route] = {}
        # Slot and strength lie side by side, so that one copy moves both.
        self._host = torch.zeros(max_tokens, 2, dtype=torch.int32)
        self._device = torch.zeros(max_tokens, 2, dtype=torch.int32, device=device)
        self._host_slot = self._host.numpy()[:, 0]
        self._host_strength = self._host.view(torch.float32).numpy()[:, 1]
        self.slot = self._device[:, 0]
        self.strength = self._device.view(torch.float32)[:, 1]
        self._written = 0  # Rows of the buffers that may be other than zero.

    def add(self, req_id: str, route: Route) -> None:
        self._table[req_id] = route

    def discard(self, req_id: str) -> None:
        self._table.pop(req_id, None)

    def fill(self, req_ids: list[str], num_scheduled: np.ndarray, num_computed: np.ndarray) -> None:
        """Describes the next batch to the layers.

        Args:
            req_ids: the requests in batch order.
            num_scheduled: [requests] tokens of each in this batch.
            num_computed: [requests] tokens of each that earlier batches have computed.
        """
        if not self._table:
            if self._written:
                self._write(np.zeros(0, np.int32), np.zeros(0, np.float32))
            return
        routes = [self._table.get(req_id) for req_id in req_ids]
        slots = np.array([route.slot if route else 0 for route in routes], np.int32)
        strengths = np.array([route.strength if route else 0.0 for route in routes], np.float32)
        slot, strength = np.repeat(slots, num_scheduled), np.repeat(strengths, num_scheduled)
        self._clear_other_positions(routes, num_scheduled, num_computed, slot, strength)
        self._write(slot, strength)

    def _clear_other_positions(
        self,
        routes: list[Route | None],
        num_scheduled: np.ndarray,
        num_computed: np.ndarray,
        slot: np.ndarray,
        strength: np.ndarray,
    ) -> None:
        ends = np.cumsum(num_scheduled)
        for index, route in enumerate(routes):
            if route is None or route.positions == "all":
                continue
            start = int(ends[index] - num_scheduled[index])
            end = int(ends[index])
            prompt_end = min(max(start + route.prompt_len - int(num_computed[index]), start), end)
            off = (
                slice(prompt_end, end) if route.positions == "prompt" else slice(start, prompt_end)
            )
            slot[off], strength[off] = 0, 0.0

    def _write(self, slot: np.ndarray, strength: np.ndarray) -> None:
        used = len(slot) if slot.any() else 0
        rows = max(used, self._written)
        before = self._host_slot[:rows], self._host_strength[:rows]
        after = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
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
