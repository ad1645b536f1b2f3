"""Embeddings that stand for "no token": the start of the integration path and of masking."""

import torch
from torch import Tensor

from offline.errors import InputError
from offline.model import Decoder
from offline.options import Baseline, Mask
from offline.prompt_inputs import PromptInputs

_CHUNK = 8192


def baseline_embedding(decoder: Decoder, baseline: Baseline) -> Tensor:
    """The baseline b of METHOD step 2: [hidden] float32.

    `mean` is the mean embedding of the tokenizer's vocabulary (rows beyond it are padding of the
    matrix, not tokens).

    Raises:
        InputError: `pad` or `mask-token` with a tokenizer that has no such token.
    """
    if baseline is Baseline.zero:
        # As long as an embedding, which some models project to the hidden size afterwards.
        return torch.zeros_like(decoder.embed([0])[0]).float()
    if baseline in (Baseline.pad, Baseline.mask_token):
        return _token(decoder, "--baseline", baseline)
    rows = decoder.model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(min(len(decoder.tokenizer), rows))
    # Through the layer, not its weight: some models scale inside the embedding layer.
    total = sum(decoder.embed(chunk).double().sum(0) for chunk in ids.split(_CHUNK))
    return (total / len(ids)).float()  # type: ignore[union-attr]


def prompt_baseline(prompt: PromptInputs, baseline: Tensor, kind: Baseline) -> Tensor:
    """The baseline of one prompt: [hidden] or, where it has an image, [T, hidden], float32.

    An image feature has no token that could stand for it: image positions get the mean feature of
    their image, but for `zero`, which is zero everywhere.
    """
    if kind is Baseline.zero or not prompt.image_tokens.any():
        return baseline
    rows = baseline.repeat(len(prompt.embeds), 1)
    rows[prompt.image_tokens] = prompt.embeds[prompt.image_tokens].double().mean(0).float()
    return rows


def mask_embedding(decoder: Decoder, mask: Mask, baseline: Tensor) -> Tensor | None:
    """What replaces a masked position: [hidden] float32, or None for `attention`."""
    if mask is Mask.attention:
        return None
    if mask is Mask.baseline:
        return baseline
    return _token(decoder, "--mask", mask)


def _token(decoder: Decoder, option: str, choice: Baseline | Mask) -> Tensor:
    """The embedding of the token that `choice` names: "pad" or "mask-token"."""
    kind = "pad_token" if choice.value == "pad" else "mask_token"
    token_id = getattr(decoder.tokenizer, f"{kind}_id", None)
    if token_id is None:
        raise InputError(
            f"{option} {choice}: the tokenizer of model '{decoder.name}' has no {kind}"
        )
    rows = decoder.model.get_input_embeddings().weight.shape[0]
    if token_id >= rows:
        raise InputError(
            f"{option} {choice}: the {kind} of model '{decoder.name}' has id {token_id}, "
            f"beyond its {rows} embeddings"
        )
    return decoder.embed([token_id])[0].float()
