"""The deltas of a GrAInS run: every way of making directions from them, without the model.

A file of them is safetensors with the tensors of `KeptDeltas` and one metadata key,
`grains-deltas`: a JSON object {kind, version, model, vector_digest, passport}.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from grains_vllm.vectors import ModelFingerprint, SteeringVector, tensors_of, write_aside
from offline.directions import directions
from offline.errors import InputError
from offline.options import Direction, Mode

KIND, VERSION = "grains-deltas", 1
_DTYPES = {
    "positive": torch.float32, "negative": torch.float32, "norms": torch.float32,
    "examples": torch.int64, "has_negative": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class KeptDeltas:
    """What masking changed, for each of the N examples that have a T+.

    Attributes:
        positive, negative: D+ and D-, [N, layers, hidden] float32.
        norms: ||h_l|| of the unmasked input, [N, reads, layers] float32.
        examples: which entry of the passport's `examples` a row belongs to, [N] int64.
        has_negative: whether the example has a T-, [N] bool; mode contrast leaves the others out.
        model: the model family that they were computed with.
        passport: the run's passport, less what direction and mode decide.
        vector_digest: of the vector that the run's own options give; "" before it is known.
    """

    positive: Tensor
    negative: Tensor
    norms: Tensor
    examples: Tensor
    has_negative: Tensor
    model: ModelFingerprint
    passport: Mapping[str, Any]
    vector_digest: str = ""

    def vector(self, direction: Direction, mode: Mode) -> SteeringVector:
        """The steering vector of these deltas, as the run itself would have made it.

        Raises:
            InputError: fewer than two examples have tokens of the needed signs, or masking
                changes nothing.
        """
        keep = self.has_negative if mode is Mode.contrast else torch.ones_like(self.has_negative)
        name, total = self.passport["data"]["name"], len(self.passport["examples"])
        used = set(self.examples[keep].tolist())
        if len(used) < 2:
            raise InputError(
                f"{name}: {len(used)} of {total} examples have tokens of the needed signs, "
                "expected 2 or more"
            )
        options = {**self.passport["options"], "direction": direction, "mode": mode}
        rows, reference, layers = directions(
            self.positive[keep], self.negative[keep], self.norms[keep].flatten(0, 1),
            direction, mode, options["seed"],
        )  # fmt: skip
        if not rows.any():
            raise InputError(f"{name}: masking changes no block output, so there is no direction")
        passport = {
            **self.passport,
            "options": options,
            "examples": [
                {**example, "used": index in used}
                for index, example in enumerate(self.passport["examples"])
            ],
            "examples_used": len(used),
            "examples_dropped": total - len(used),
            "layers": [dataclasses.asdict(layer) for layer in layers],
        }
        return SteeringVector(rows, reference, self.model, passport)

    def save(self, path: Path) -> None:
        """Writes the file aside and renames it."""
        facts = {
            "kind": KIND,
            "version": VERSION,
            "model": dataclasses.asdict(self.model),
            "vector_digest": self.vector_digest,
            "passport": dict(self.passport),
        }
        tensors = {name: getattr(self, name).contiguous() for name in _DTYPES}
        metadata = {KIND: json.dumps(facts, sort_keys=True, allow_nan=False)}
        write_aside(path, safetensors.torch.save(tensors, metadata=metadata))


def load(path: Path) -> KeptDeltas:
    """Reads and validates a file that `KeptDeltas.save` wrote.

    Raises:
        InputError: naming the file, the field, what was found and what is expected.
    """
    try:
        tensors, metadata = tensors_of(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{path.name}: cannot be read as a safetensors file ({error})") from error
    facts = _facts(metadata, path.name)
    model = ModelFingerprint(**facts["model"])
    _check(tensors, model, len(facts["passport"]["examples"]), path.name)
    return KeptDeltas(
        **tensors, model=model, passport=facts["passport"], vector_digest=facts["vector_digest"]
    )


def _facts(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    if KIND not in metadata:
        raise InputError(
            f"{source}: not a file of kept deltas (no '{KIND}' key in its safetensors metadata)"
        )
    try:
        facts = json.loads(metadata[KIND])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: metadata '{KIND}' is not JSON ({error})") from error
    version = facts.get("version") if isinstance(facts, dict) else None
    if version != VERSION:
        raise InputError(f"{source}: version is {version!r}, this release reads {VERSION}")
    model, passport = facts.get("model"), facts.get("passport")
    sizes = ("architecture", "hidden_size", "num_layers")
    if not isinstance(model, dict) or set(model) != set(sizes):
        raise InputError(f"{source}: model is {model!r}, expected an object with {list(sizes)}")
    kinds = {"options": dict, "data": dict, "examples": list}
    for name, kind in kinds.items():
        if not isinstance(passport, dict) or not isinstance(passport.get(name), kind):
            raise InputError(f"{source}: passport.{name} is missing or no {kind.__name__}")
    if not isinstance(facts.get("vector_digest"), str):
        raise InputError(f"{source}: vector_digest is missing, expected text")
    return facts


def _check(
    tensors: Mapping[str, Tensor], model: ModelFingerprint, examples: int, source: str
) -> None:
    if set(tensors) != set(_DTYPES):
        raise InputError(
            f"{source}: holds the tensors {sorted(tensors)}, expected {sorted(_DTYPES)}"
        )
    count = tensors["examples"].shape[0] if tensors["examples"].dim() else -1
    reads = tensors["norms"].shape[1] if tensors["norms"].dim() == 3 else -1
    stack = (count, model.num_layers, model.hidden_size)
    shapes = {
        "positive": stack, "negative": stack, "norms": (count, reads, model.num_layers),
        "examples": (count,), "has_negative": (count,),
    }  # fmt: skip
    for name, tensor in tensors.items():
        if tensor.dtype != _DTYPES[name] or tuple(tensor.shape) != shapes[name]:
            raise InputError(
                f"{source}: {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {_DTYPES[name]} {list(shapes[name])}"
            )
        if not torch.isfinite(tensor).all():
            raise InputError(f"{source}: {name} holds a NaN or infinity")
    listed = tensors["examples"].tolist()
    if len(set(listed)) < count or not set(listed) <= set(range(examples)):
        raise InputError(
            f"{source}: examples is {listed[:5]}..., expected different numbers below {examples}"
        )
