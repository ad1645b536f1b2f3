"""Vectors that others made, a tensor per layer, as artifacts: GGUF, safetensors and .npz.

A tensor is what is added to the residual stream after a block; its length becomes the reference
norm, so that a strength of 1 means the file's own length.
"""

import hashlib
import io
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from grains_vllm.vectors import ArtifactError, ModelFingerprint, SteeringVector
from offline.errors import InputError
from offline.gguf_vectors import read_gguf

Tensors = dict[int, np.ndarray]
# What `strength_unit` in a passport says; without it the unit is the usual ||h||.
OWN_LENGTHS = "the length of each imported tensor"
_ROOM = 2**20  # bytes for all that is no tensor
_NUMBER = re.compile("[0-9]+")
_DTYPES = ("float16", "float32", "float64")
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin")
_PICKLE = """{name}: a pickle can run code when it is read, so grains reads none.
If you trust it, make a .safetensors of it and import that:

    import torch
    from safetensors.torch import save_file

    tensors = torch.load("{name}", weights_only=True)  # tensors by layer
    rows = {{f"layer.{{n}}": tensors[n].float().contiguous() for n in tensors}}
    save_file(rows, "{stem}.safetensors")"""


def read_vector(
    path: Path, model: ModelFingerprint, note: Callable[[str], None], insists: bool = False
) -> SteeringVector:
    """The artifact that steers `model` at strength 1 by the lengths in the file.

    Layers without a tensor get no direction.

    Args:
        path: a GGUF control vector, or a .safetensors or .npz of tensors by layer.
        note, insists: see `read_gguf`; other files do not say whose they are.

    Raises:
        InputError: another kind of file, or one that does not fit `model`.
    """
    payload = _read(path, model)
    if payload.startswith(b"GGUF"):
        kind = "GGUF control vector"
        tensors, facts = read_gguf(payload, path.name, model, note, insists)
    elif payload.startswith(b"PK"):
        kind, tensors, facts = "npz file", _by_layer(_npz(payload, path, model), path.name), {}
    elif payload[8:9] == b"{":
        kind, tensors, facts = (
            "safetensors file",
            _by_layer(_safetensors(payload, path), path.name),
            {},
        )
    elif payload.startswith(b"\x80") or path.suffix in _PICKLES:
        raise _pickled(path)
    else:
        raise InputError(
            f"{path.name}: neither a GGUF control vector nor a .safetensors or .npz with a tensor "
            "per layer"
        )
    passport = {
        "method": f"imported from a {kind}",
        "data": {"name": path.name, "sha256": hashlib.sha256(payload).hexdigest()},
        "strength_unit": OWN_LENGTHS,
        **facts,
    }
    return _vector(tensors, model, path.name, passport)


def _read(path: Path, model: ModelFingerprint) -> bytes:
    """A copy of the file, which others may overwrite, and no more than a vector can have."""
    most = model.num_layers * model.hidden_size * 8 + _ROOM
    with path.open("rb") as file:
        payload = file.read(most + 1)
    if len(payload) > most and path.suffix in _PICKLES:
        raise _pickled(path)
    if len(payload) > most:
        raise InputError(
            f"{path.name}: larger than {most} bytes, more than {model.num_layers} layers of "
            f"{model.hidden_size} take"
        )
    return payload


def _vector(
    tensors: Tensors, model: ModelFingerprint, name: str, passport: dict[str, Any]
) -> SteeringVector:
    rows = torch.zeros(model.num_layers, model.hidden_size, dtype=torch.float64)
    for layer, tensor in tensors.items():
        if layer >= model.num_layers:
            raise InputError(
                f"{name}: a tensor for layer {layer}, but the model's layers are 0 to "
                f"{model.num_layers - 1} (hidden_states[N] of transformers is after block N - 1)"
            )
        if tensor.dtype.name not in _DTYPES:
            raise InputError(
                f"{name}: the tensor of layer {layer} has type {tensor.dtype.name}, expected "
                f"{', '.join(_DTYPES)}"
            )
        if max(tensor.shape, default=1) != tensor.size or tensor.size != model.hidden_size:
            raise InputError(
                f"{name}: the tensor of layer {layer} has the shape {list(tensor.shape)}, the "
                f"model's hidden size is {model.hidden_size}"
            )
        if not np.isfinite(tensor).all():
            raise InputError(f"{name}: the tensor of layer {layer} holds a NaN or infinity")
        rows[layer] = torch.from_numpy(tensor.astype(np.float64)).flatten()
    norms = rows.norm(dim=1)
    if not norms.any():
        raise InputError(f"{name}: holds no direction that is not zero")
    directions = rows / torch.where(norms > 0, norms, 1.0)[:, None]
    try:
        return SteeringVector(directions.float(), norms.float(), model, passport)
    except ArtifactError as error:
        raise InputError(f"{name}: {error}") from error


def _by_layer(tensors: Mapping[str, np.ndarray], name: str) -> Tensors:
    """Tensors by the one number in their names, which are alike otherwise."""
    found: dict[int, np.ndarray] = {}
    first = next(iter(tensors), "")
    for key, tensor in tensors.items():
        numbers = _NUMBER.findall(key)
        if len(numbers) != 1 or len(numbers[0]) > 6:
            raise InputError(
                f"{name}: the tensor {key[:60]!r}: expected one number in its name, the layer, "
                "counted from 0, such as 'layer.12'"
            )
        if _NUMBER.sub("N", key) != _NUMBER.sub("N", first):
            raise InputError(
                f"{name}: the tensors {first[:60]!r} and {key[:60]!r}: expected names that differ "
                "in their numbers only"
            )
        if int(numbers[0]) in found:
            raise InputError(f"{name}: two tensors for layer {int(numbers[0])}")
        found[int(numbers[0])] = tensor
    if not found:
        raise InputError(f"{name}: holds no tensor")
    return found


def _safetensors(payload: bytes, path: Path) -> dict[str, np.ndarray]:
    try:
        tensors = safetensors.torch.load(payload)
    except Exception as error:  # of several kinds
        raise InputError(f"{path.name}: not a readable safetensors file ({error})") from error
    if {"directions", "reference_norms"} <= set(tensors):
        raise InputError(f"{path.name}: is an artifact already; `grains inspect` shows it")
    return {
        key: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for key, tensor in tensors.items()
    }


def _npz(payload: bytes, path: Path, model: ModelFingerprint) -> dict[str, np.ndarray]:
    """What a .npz holds; a .pt is a zip file too."""
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as file:
            members = file.infolist()
        if any(member.filename.endswith(".pkl") for member in members):
            raise _pickled(path)
        whole = sum(member.file_size for member in members)
        if whole > (most := model.num_layers * model.hidden_size * 8 + _ROOM):
            raise InputError(f"{path.name}: unpacks to {whole} bytes, expected at most {most}")
        with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
            return {key: np.asarray(arrays[key]) for key in arrays.files}
    except InputError:
        raise
    except Exception as error:  # of many kinds: zip, deflate and npy each have their own
        raise InputError(f"{path.name}: not a readable .npz file ({error})") from error


def _pickled(path: Path) -> InputError:
    return InputError(_PICKLE.format(name=path.name, stem=path.stem))
