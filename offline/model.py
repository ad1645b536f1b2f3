"""The model under study: loading it, its embeddings, and checks that it can be attributed."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grains_vllm.vectors import ModelFingerprint
from offline.batching import out_of_memory
from offline.blocks import find_blocks
from offline.errors import InputError
from offline.prompt_inputs import PromptCache, model_inputs, prompt_inputs
from offline.vision import ImagePrompt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CHECKED = 64


@dataclass
class Decoder:
    """A frozen causal language model with the handles that extraction needs.

    Attributes:
        name: hub id or folder name, never a path.
        blocks: the decoder blocks in order; `blocks_path` is their name inside the model.
        weights_sha256: a digest of sampled weights, which tells two trainings apart.
        processor: of a model that takes images; None elsewhere.
        prompts: what its vision tower has made of the last prompts.
    """

    name: str
    model: Any
    tokenizer: Any
    blocks: list[nn.Module]
    blocks_path: str
    fingerprint: ModelFingerprint
    weights_sha256: str
    processor: Any = None
    prompts: PromptCache = field(default_factory=PromptCache, repr=False)

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
        InputError: the model cannot be loaded, lacks weights, has no recognisable blocks or holds
            a NaN.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", device):
        raise InputError(f"--device is '{device}', expected cpu, cuda, cuda:N or auto")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device is '{device}', but PyTorch finds no CUDA device here")
    if model_id.startswith(("/", ".")) and not Path(model_id).is_dir():
        raise InputError(f"model '{model_id}': no such folder")
    name = Path(model_id).resolve().name if Path(model_id).is_dir() else model_id
    try:
        kind = auto_class(model_id)
        tokenizer, processor = load_tokenizer(model_id)
        model, loading = kind.from_pretrained(
            model_id, dtype=DTYPES[dtype], device_map=device_map, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip() or type(error).__name__
        raise InputError(f"model '{name}' cannot be loaded: {reason}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise InputError(
            f"model '{name}': {len(missing)} weights are missing from its files, such as "
            f"'{missing[0]}', and would be random"
        )
    if device_map is None:
        try:
            model.to(device)
        except RuntimeError as error:  # no such device, or too little memory on it
            first = str(error).splitlines()[0]
            raise InputError(f"model '{name}' does not go to --device {device}: {first}") from error
    return as_decoder(model, tokenizer, name, blocks, processor)


def takes_images(config: Any) -> bool:
    """Whether this is the config of a model that answers questions about images."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    sees = getattr(config, "vision_config", None) is not None
    return sees and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(model_id: str) -> Any:
    """The class of transformers that loads a model, chosen by its config."""
    import transformers

    if takes_images(transformers.AutoConfig.from_pretrained(model_id)):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def load_tokenizer(model_id: str) -> tuple[Any, Any]:
    """(tokenizer, processor) of a model; the processor is None where it takes no images.

    Raises:
        OSError, ValueError, KeyError, ImportError: transformers cannot load one of them.
    """
    import transformers

    processor = None
    if auto_class(model_id) is transformers.AutoModelForImageTextToText:
        processor = transformers.AutoProcessor.from_pretrained(model_id)
    tokenizer = getattr(processor, "tokenizer", None)
    return tokenizer or transformers.AutoTokenizer.from_pretrained(model_id), processor


def model_fingerprint(model_id: str) -> ModelFingerprint:
    """What a vector must have in common with the model; only its config is read.

    Raises:
        InputError: there is no readable config.
    """
    import transformers

    try:
        return ModelFingerprint.of(transformers.AutoConfig.from_pretrained(model_id))
    except (OSError, ValueError) as error:
        name = Path(model_id).resolve().name if Path(model_id).is_dir() else model_id
        reason = str(error).replace(model_id, name)
        raise InputError(f"model '{name}' has no readable config: {reason}") from error


def as_decoder(
    model: Any, tokenizer: Any, name: str, blocks: str | None = None, processor: Any = None
) -> Decoder:
    """Freezes a loaded transformers model and finds its blocks; see `load_decoder`."""
    model.requires_grad_(False).eval()
    digest = _weights_digest(model, name)
    path = find_blocks(model, name, blocks)
    return Decoder(
        name, model, tokenizer, list(model.get_submodule(path)), path,
        ModelFingerprint.of(model.config), digest, processor,
    )  # fmt: skip


def check_leaf(decoder: Decoder, ids: list[int], image: ImagePrompt | None = None) -> None:
    """Refuses a model that computes something else from embeddings than from its ordinary inputs.

    Attribution differentiates with respect to `inputs_embeds`; a model that scales or adds to
    them only on the way from `input_ids` (or pixels) would be attributed wrongly.

    Args:
        ids: a prompt of text.
        image: a prompt with an image, instead of it.
    """
    try:
        with torch.no_grad():
            plain, leaf = (
                _text_logits(decoder, ids) if image is None else _image_logits(decoder, image)
            )
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:  # models raise what they run into
        if out_of_memory(error):
            raise
        raise InputError(
            f"model '{decoder.name}': it does not take inputs_embeds that are no token's, so its "
            f"embeddings cannot be attributed ({error})"
        ) from error
    if not torch.isfinite(plain).all():
        raise InputError(f"model '{decoder.name}': its logits hold a NaN or infinity")
    gap = (plain - leaf).abs().max() / plain.abs().max().clamp_min(1e-6)
    if gap > (1e-4 if decoder.dtype == torch.float32 else 2e-2):
        raise InputError(
            f"model '{decoder.name}': logits from inputs_embeds differ from logits from input_ids "
            f"by {gap:.2g} of their size, so its embeddings cannot be attributed"
        )


def _text_logits(decoder: Decoder, ids: list[int]) -> tuple[Tensor, Tensor]:
    # A few tokens show it, and these are logits of every position.
    tokens = torch.tensor([ids[:_CHECKED]], device=decoder.device)
    plain = decoder.model(input_ids=tokens, use_cache=False).logits
    embeds = decoder.embed(tokens)
    leaf = decoder.model(inputs_embeds=embeds, use_cache=False).logits
    # Attribution goes through points that no token has; some models look tokens up by embedding.
    decoder.model(inputs_embeds=embeds / 2, use_cache=False)
    return plain.float(), leaf.float()


def _image_logits(decoder: Decoder, image: ImagePrompt) -> tuple[Tensor, Tensor]:
    # At the last positions, which see the image and come after it.
    from offline.objective import Row, batch_inputs, logits_at

    last = len(image.ids)
    positions = torch.arange(max(0, last - _CHECKED), last)[None]
    prompt = prompt_inputs(decoder, image.ids, image)
    ordinary = model_inputs(decoder, image)
    from_leaf = batch_inputs(decoder, [Row(prompt.embeds, (((), 1),), prompt)])
    found = []
    for inputs in (ordinary, from_leaf):
        with logits_at(decoder.model, positions) as select:
            found.append(select(decoder.model(**inputs, use_cache=False).logits).float())
    return found[0], found[1]


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
