"""Embeddings that stand for "no token": the start of the integration path and of masking."""

import torch
from torch import Tensor

from offline.errors import InputError
from offline.model import Decoder
from offline.options import Baseline, Mask

_CHUNK = 8192


def baseline_embedding(decoder: Decoder, baseline: Baseline) -> Tensor:
    """The baseline b of METHOD step 2: [hidden] float32.

    `mean` is the mean embedding of the tokenizer's vocabulary (rows beyond it are padding of the
    matrix, not tokens).

    Raises:
        InputError: `pad` with a tokenizer that has no pad token.
    """
    if baseline is Baseline.zero:
        # As long as an embedding, which some models project to the hidden size afterwards.
        return torch.zeros_like(decoder.embed([0])[0]).float()
    if baseline is Baseline.pad:
        return _token(decoder, "pad_token", "--baseline pad")
    rows = decoder.model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(min(len(decoder.tokenizer), rows))
    # Through the layer, not its weight: some models scale inside the embedding layer.
    total = sum(decoder.embed(chunk).double().sum(0) for chunk in ids.split(_CHUNK))
    return (total / len(ids)).float()  # type: ignore[union-attr]


def mask_embedding(decoder: Decoder, mask: Mask, baseline: Tensor) -> Tensor | None:
    """What replaces a masked position: [hidden] float32, or None for `attention`."""
    if mask is Mask.attention:
        return None
    if mask is Mask.baseline:
        return baseline
    return _token(decoder, "pad_token" if mask is Mask.pad else "mask_token", f"--mask {mask}")


def _token(decoder: Decoder, kind: str, option: str) -> Tensor:
    token_id = getattr(decoder.tokenizer, f"{kind}_id", None)
    if token_id is None:
        raise InputError(f"{option}: the tokenizer of model '{decoder.name}' has no {kind}")
    return decoder.embed([token_id])[0].float()
