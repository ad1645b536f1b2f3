"""The bank: every vector's directions and gains as constant tensors on the device, by slot."""

from dataclasses import dataclass

import torch

from grains_vllm.config import Catalogue
from grains_vllm.errors import GrainsConfigError
from grains_vllm.vectors import ModelFingerprint, SteeringVector


@dataclass(frozen=True)
class Bank:
    """Slots of vectors; slot 0 is all zeros and means "not steered".

    Attributes:
        slots: slot by VectorEntry.slot_key, from 1.
        layers: the global indices of the steered layers on this rank, ascending.
        directions: [layers, slots + 1, hidden] float32, unit rows.
        gains: [layers, slots + 1] float32: what a strength of 1 adds, as a length; 0 where a
            vector does not steer that layer.
    """

    slots: dict[str, int]
    layers: list[int]
    directions: torch.Tensor
    gains: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.directions.nbytes + self.gains.nbytes


def build_bank(
    catalogue: Catalogue, model: ModelFingerprint, layers: list[int], device: torch.device
) -> Bank:
    """Reads every artifact of the catalogue again, here in the worker, and fills the bank.

    Raises:
        ArtifactError: a file is damaged or does not fit the model.
        GrainsConfigError: a file is not the one that the front end has read.
    """
    entries = {entry.slot_key: entry for entry in catalogue.vectors.values()}
    slots = {key: slot for slot, key in enumerate(sorted(entries), start=1)}
    directions = torch.zeros(len(layers), len(slots) + 1, model.hidden_size)
    gains = torch.zeros(len(layers), len(slots) + 1)
    for key, entry in entries.items():
        vector = SteeringVector.load(entry.path, model)
        if vector.digest != entry.digest:
            raise GrainsConfigError(
                f"vectors.{entry.name}.path: {entry.path} changed while the engine was starting "
                f"(digest {entry.digest[:12]} became {vector.digest[:12]})"
            )
        for row, layer in enumerate(layers):
            if layer in entry.layers:
                directions[row, slots[key]] = vector.directions[layer]
                relative = entry.scale == "relative"
                gains[row, slots[key]] = vector.reference_norms[layer] if relative else 1.0
    return Bank(slots, layers, directions.to(device), gains.to(device))
