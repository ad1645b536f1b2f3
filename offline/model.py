"""The model under study: loading, its decoder blocks, its embeddings, its raw block outputs."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grains_vllm.vectors import ModelFingerprint
from offline.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Decoder:
    """A frozen causal language model with the handles that extraction needs.

    Attributes:
        name: hub id or folder name, never a path.
        blocks: the decoder blocks in order; `blocks_path` is their name inside the model.
        weights_sha256: a digest of sampled weights, which tells two trainings apart.
    """

    name: str
    model: Any
    tokenizer: Any
    blocks: list[nn.Module]
    blocks_path: str
    fingerprint: ModelFingerprint
    weights_sha256: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the input embeddings."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        """Where inputs are sent."""
        return self.model.get_input_embeddings().weight.device

    @property
    def text_config(self) -> Any:
        """The language part of the model's config."""
        return self.model.config.get_text_config()

    def embed(self, ids: list[int] | Tensor) -> Tensor:
        """What the model's embedding layer returns for `ids`: [..., hidden], no gradient."""
        with torch.no_grad():
            return self.model.get_input_embeddings()(torch.as_tensor(ids, device=self.device))


def load_decoder(
    model_id: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    device_map: str | None = None,
    blocks: str | None = None,
) -> Decoder:
    """Loads a model and its tokenizer from a folder or the hub.

    Args:
        dtype: "float32" or "bfloat16".
        device: "cpu", "cuda" or "auto" (cuda if there is one); not used with `device_map`.
        device_map: transformers' `device_map`, such as "auto" for models larger than one device.
        blocks: the name of the block list inside the model, if it is not found by itself.

    Raises:
        InputError: the model cannot be loaded, has no recognisable blocks or holds a NaN.
    """
    import transformers

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device is '{device}', but PyTorch finds no CUDA device here")
    name = Path(model_id).resolve().name if Path(model_id).exists() else model_id
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_id)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_id, dtype=DTYPES[dtype], device_map=device_map
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"model '{name}' cannot be loaded: {first}") from error
    if device_map is None:
        model.to(device)
    return as_decoder(model, tokenizer, name, blocks)


def as_decoder(model: Any, tokenizer: Any, name: str, blocks: str | None = None) -> Decoder:
    """Freezes a loaded transformers model and finds its blocks; see `load_decoder`."""
    model.requires_grad_(False).eval()
    digest = _weights_digest(model, name)
    path = find_blocks(model, name, blocks)
    return Decoder(
        name, model, tokenizer, list(model.get_submodule(path)), path,
        ModelFingerprint.of(model.config), digest,
    )  # fmt: skip


def find_blocks(model: Any, name: str, path: str | None = None) -> str:
    """The name of the decoder block list: as many entries as layers, each returning [.., hidden].

    Raises:
        InputError: no list, or more than one, behaves like that; says which lists there are.
    """
    layers = model.config.get_text_config().num_hidden_layers
    lists = {key: len(m) for key, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    candidates = [key for key, length in lists.items() if length == layers]
    if path is not None:
        if path not in lists:
            raise InputError(f"--blocks is '{path}', but model '{name}' holds the lists {lists}")
        if path not in candidates:
            raise InputError(
                f"--blocks is '{path}' with {lists[path]} entries, but model '{name}' has "
                f"{layers} layers"
            )
        candidates = [path]
    found = [key for key in candidates if _behaves(model, key)]
    if len(found) != 1:
        raise InputError(
            f"model '{name}': {len(found)} of its module lists behave like {layers} decoder blocks "
            f"({found}); name the right one with --blocks; there are {lists}"
        )
    return found[0]


def _behaves(model: Any, path: str) -> bool:
    """Whether one token's forward runs each entry once and gets [1, 1, hidden] from it."""
    hidden = model.config.get_text_config().hidden_size
    shapes: list[Any] = []
    handles = [
        block.register_forward_hook(lambda _m, _a, out: shapes.append(_stream(out)))
        for block in model.get_submodule(path)
    ]
    try:
        device = model.get_input_embeddings().weight.device
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    expected = (1, 1, hidden)
    return len(shapes) == len(handles) and all(
        isinstance(x, Tensor) and tuple(x.shape) == expected for x in shapes
    )


def _stream(output: Any) -> Any:
    """The residual stream in a block's return value (a tensor, or a tuple that starts with it)."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def record_blocks(decoder: Decoder, positions: Tensor) -> Iterator[list[Tensor]]:
    """Records h_l, the residual stream after each block, at one position per row.

    Args:
        positions: [rows] long.

    Yields:
        A list that one forward fills with a float32 tensor [rows, hidden] per block, before the
        final norm (unlike `hidden_states[-1]` of transformers).
    """
    outputs: list[Tensor] = []

    def record(_module: nn.Module, _args: Any, output: Any) -> None:
        stream = _stream(output)
        rows = torch.arange(stream.shape[0], device=stream.device)
        outputs.append(stream[rows, positions.to(stream.device)].float().cpu())

    handles = [block.register_forward_hook(record) for block in decoder.blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def check_leaf(decoder: Decoder, ids: list[int]) -> None:
    """Refuses a model that computes something else from embeddings than from their token ids.

    Attribution differentiates with respect to `inputs_embeds`; a model that scales or adds to
    them only on the `input_ids` path would be attributed wrongly.
    """
    tokens = torch.tensor([ids], device=decoder.device)
    try:
        with torch.no_grad():
            plain = decoder.model(input_ids=tokens, use_cache=False).logits.float()
            leaf = decoder.model(
                inputs_embeds=decoder.embed(tokens), use_cache=False
            ).logits.float()
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"model '{decoder.name}' does not take inputs_embeds: {error}") from error
    if not torch.isfinite(plain).all():
        raise InputError(f"model '{decoder.name}': its logits hold a NaN or infinity")
    gap = (plain - leaf).abs().max() / plain.abs().max().clamp_min(1e-6)
    if gap > (1e-4 if decoder.dtype == torch.float32 else 2e-2):
        raise InputError(
            f"model '{decoder.name}': logits from inputs_embeds differ from logits from input_ids "
            f"by {gap:.2g} of their size, so its embeddings cannot be attributed"
        )


def _weights_digest(model: Any, name: str) -> str:
    """sha256 over up to 64 evenly spaced values of every parameter; refuses NaN weights."""
    hasher = hashlib.sha256()
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    hasher.update(json.dumps(config, sort_keys=True, default=str).encode())
    for key, parameter in sorted(model.named_parameters()):
        if parameter.device.type == "meta":  # offloaded by device_map: not at hand
            continue
        if not torch.isfinite(parameter).all():
            raise InputError(f"model '{name}': the weight '{key}' holds a NaN or infinity")
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        hasher.update(key.encode() + sample.numpy().tobytes())
    return hasher.hexdigest()
