"""GGUF control vectors, as llama.cpp and repeng write them, to and from the artifact.

Their tensor `direction.N` is added to the residual stream after block N, counted from 0; its
length is the strength. llama.cpp numbers directions from 1 on, so block 0 can have none; and it
does not restore the norm of the stream, so equal strengths do not steer exactly alike.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch

from grains_vllm.vectors import ModelFingerprint, SteeringVector
from offline.errors import InputError

_ARCHITECTURE = "controlvector"
_NAME = re.compile(r"direction\.(\d+)")


def read_gguf(path: Path, model: ModelFingerprint) -> SteeringVector:
    """The artifact that steers `model` at strength 1 by the lengths in the file.

    Layers without a tensor get no direction; reference norms are the tensors' lengths.

    Raises:
        InputError: not a control vector, or one that does not fit `model`.
    """
    try:
        reader = gguf.GGUFReader(os.fspath(path))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{path.name}: not a readable GGUF file ({error})") from error
    architecture = _field(reader, "general.architecture")
    if architecture != _ARCHITECTURE:
        raise InputError(
            f"{path.name}: general.architecture is {architecture!r}, expected '{_ARCHITECTURE}'"
        )
    rows = torch.zeros(model.num_layers, model.hidden_size)
    seen: set[int] = set()
    for tensor in reader.tensors:
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            raise InputError(f"{path.name}: tensor '{tensor.name}', expected direction.N only")
        layer = int(match[1])
        if layer in seen:
            raise InputError(f"{path.name}: two tensors for layer {layer}")
        seen.add(layer)
        if layer >= model.num_layers:
            raise InputError(
                f"{path.name}: tensor '{tensor.name}', but the model's layers are 0 to "
                f"{model.num_layers - 1}"
            )
        if tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            raise InputError(
                f"{path.name}: tensor '{tensor.name}' has type {tensor.tensor_type.name}, "
                "expected F32 or F16"
            )
        values = torch.from_numpy(np.array(tensor.data, dtype=np.float32)).flatten()
        if len(values) != model.hidden_size:
            raise InputError(
                f"{path.name}: tensor '{tensor.name}' has {len(values)} values, the model's "
                f"hidden size is {model.hidden_size}"
            )
        if not torch.isfinite(values).all():
            raise InputError(f"{path.name}: tensor '{tensor.name}' holds a NaN or infinity")
        rows[layer] = values
    norms = rows.norm(dim=1)
    if not norms.any():
        raise InputError(f"{path.name}: holds no direction that is not zero")
    passport = {
        "method": "imported from a GGUF control vector",
        "data": {"name": path.name},
        "model_hint": _field(reader, f"{_ARCHITECTURE}.model_hint"),
    }
    return SteeringVector(rows / norms.clamp_min(1e-30)[:, None], norms, model, passport)


def write_gguf(
    vector: SteeringVector, path: Path, model_hint: str, note: Callable[[str], None]
) -> None:
    """Writes direction * reference norm of every layer, so that scale 1 means strength 1.

    Args:
        model_hint: llama.cpp's name of the architecture, such as "llama" or "qwen2".
        note: told what the format cannot hold.

    Raises:
        InputError: nothing is left to write.
    """
    layers = [layer for layer in vector.layers if layer > 0]
    if 0 in vector.layers:
        note("layer 0 is left out: llama.cpp's control vectors start at layer 1")
    if vector.layers and not layers:
        raise InputError("the vector has a direction in layer 0 only, which GGUF cannot hold")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writer = gguf.GGUFWriter(os.fspath(aside), _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(layers))
        for layer in layers:
            row = vector.directions[layer] * vector.reference_norms[layer]
            writer.add_tensor(f"direction.{layer}", row.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _field(reader: gguf.GGUFReader, name: str) -> str | None:
    field = reader.get_field(name)
    return None if field is None else str(field.contents())
