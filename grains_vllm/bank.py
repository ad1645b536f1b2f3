"""Vectors in a worker: a store on the host, checked once, and a bank of slots on the device.

While it serves, a worker never reads a file: what happens to an artifact on disk changes nothing
until somebody loads it again.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from grains_vllm.catalogue import VectorEntry
from grains_vllm.errors import GrainsConfigError
from grains_vllm.marker import TermMarker
from grains_vllm.vectors import ModelFingerprint, SteeringVector

# A request that a front end has just let through may still be on its way to the workers.
GRACE = 60.0  # seconds


@dataclass
class _Stored:
    directions: torch.Tensor  # [layers, hidden] float32
    norms: torch.Tensor  # [layers] float32
    retired: float | None = None  # when it left the catalogue


class Store:
    """Every vector of the catalogue by digest, and for a while those that have left it."""

    def __init__(
        self,
        model: ModelFingerprint,
        layers: Sequence[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layers = list(layers)
        self._model, self._clock = model, clock
        self._vectors: dict[str, _Stored] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._vectors

    def __getitem__(self, digest: str) -> _Stored:
        return self._vectors[digest]

    @property
    def digests(self) -> list[str]:
        return sorted(self._vectors)

    @property
    def num_bytes(self) -> int:
        return sum(v.directions.nbytes + v.norms.nbytes for v in self._vectors.values())

    def replace(self, entries: Iterable[VectorEntry], keep: Iterable[str] = ()) -> None:
        """Makes the store hold these entries; all of them are read before anything changes.

        Args:
            keep: digests that must stay although no entry names them.

        Raises:
            ArtifactError: a file is damaged or does not fit the model.
            GrainsConfigError: a file is not the one that the front end has read.
        """
        wanted = {entry.digest: entry for entry in entries}
        read = {
            digest: self._read(entry)
            for digest, entry in wanted.items()
            if digest not in self._vectors
        }
        self._vectors.update(read)
        now, kept = self._clock(), set(keep)
        for digest, stored in list(self._vectors.items()):
            if digest in wanted:
                stored.retired = None
                continue
            stored.retired = now if stored.retired is None else stored.retired
            if digest not in kept and now - stored.retired > GRACE:
                del self._vectors[digest]

    def _read(self, entry: VectorEntry) -> _Stored:
        vector = SteeringVector.load(entry.path, self._model)
        if vector.digest != entry.digest:
            raise GrainsConfigError(
                f"vectors.{entry.name}.path: {entry.path} is not the file that was checked "
                f"(digest {entry.digest[:12]} became {vector.digest[:12]})"
            )
        return _Stored(
            vector.directions[self.layers].clone(), vector.reference_norms[self.layers].clone()
        )


class Bank:
    """Slots of vectors on the device, one per vector and nothing besides.

    Attributes:
        directions: [layers, slots, hidden] float32, unit rows; zeros in a slot not yet filled.
        gains: [layers, slots] float32: what a strength of 1 adds, as a length; 0 where a
            vector does not steer that layer.
        loads: how often a slot was filled.
        evictions: how often that cost another vector its slot.
    """

    def __init__(self, store: Store, slots: int, hidden: int, device: torch.device) -> None:
        layers = len(store.layers)
        self._store = store
        self.directions = torch.zeros(layers, slots, hidden, device=device)
        self.gains = torch.zeros(layers, slots, device=device)
        self._free = list(reversed(range(slots)))
        self._slots: dict[str, int] = {}  # by slot key, least recently used first
        self._users: Counter[str] = Counter()
        self.loads = self.evictions = 0

    @property
    def slots(self) -> int:
        return self.gains.shape[1]

    @property
    def resident(self) -> int:
        return len(self._slots)

    @property
    def in_use(self) -> int:
        return len(self._users)

    @property
    def num_bytes(self) -> int:
        return self.directions.nbytes + self.gains.nbytes

    def acquire(self, term: TermMarker) -> int:
        """The slot that holds a vector, for one more user; loads it if need be.

        Raises:
            RuntimeError: every slot is in use, which the gate in the engine core prevents.
        """
        slot = self.preload(term["slot"], term["vector"], term["layers"], term["scale"])
        self._users[term["slot"]] += 1
        return slot

    def preload(self, key: str, digest: str, layers: Sequence[int], scale: str) -> int:
        """Like `acquire`, without a user: the vector stays until somebody needs its slot."""
        slot = self._slots.pop(key, None)
        if slot is None:
            slot = self._empty_slot()
            self._load(slot, digest, layers, scale)
        self._slots[key] = slot
        return slot

    def release(self, key: str) -> None:
        """One user fewer."""
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]

    def _empty_slot(self) -> int:
        if self._free:
            return self._free.pop()
        for key in self._slots:
            if key not in self._users:
                self.evictions += 1
                return self._slots.pop(key)
        raise RuntimeError(f"grains: all {self.slots} slots are in use")

    def _load(self, slot: int, digest: str, layers: Sequence[int], scale: str) -> None:
        vector = self._store[digest]
        rows = torch.tensor([layer in layers for layer in self._store.layers])
        gains = vector.norms if scale == "relative" else torch.ones_like(vector.norms)
        # The same stream as the forward that may still read the slot's former vector.
        self.directions[:, slot] = (vector.directions * rows[:, None]).to(self.directions.device)
        self.gains[:, slot] = (gains * rows).to(self.gains.device)
        self.loads += 1
