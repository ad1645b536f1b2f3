"""Small random vision-language models with their processors, as transformers and vLLM load them.

Like tests.tiny: weights large enough that every layer, and every image, matters.
"""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

from grains_vllm.vectors import ModelFingerprint, SteeringVector
from tests import tiny

VOCAB, HIDDEN, LAYERS = 128, tiny.HIDDEN, tiny.LAYERS["llama"]
# Name -> the class that config.json names, and the side of the square image that the tower sees.
ARCHITECTURE = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
}
NAMES = tuple(ARCHITECTURE)
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
    "orange": (250, 140, 20),
    "purple": (130, 40, 160),
}
SHAPES = ("circle", "square", "triangle", "bar")
# The order is the order of their ids; each family uses what it knows.
_SPECIAL = [
    *("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>", "<end>"),
    *("<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
]
_IDS = {token: index for index, token in enumerate(_SPECIAL)}
_NEWLINES = ["\n", "\n\n", "\n\n\n", "\n\n\n\n"]  # Gemma 3's processor writes them around an image.
WORDS = [
    *COLOURS,
    *SHAPES,
    *[
        "a",
        "the",
        "is",
        "are",
        "what",
        "which",
        "colour",
        "shape",
        "picture",
        "in",
        "of",
        "on",
        "left",
        "right",
        "there",
        "no",
        "yes",
        "not",
        "and",
    ],
    *["describe", "see", "count", "one", "two", "three", "big", "small", ".", ",", ":", "?"],
]
# What stands in the prompt where an image is; processors turn it into as many tokens as they need.
PLACEHOLDER = {
    "llava": "<image>",
    "llava_next": "<image>",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
}
# The token that holds one image feature each.
IMAGE_TOKEN = {
    "llava": "<image>",
    "llava_next": "<image>",
    "qwen2_vl": "<|image_pad|>",
    "qwen2_5_vl": "<|image_pad|>",
    "gemma3": "<image_soft_token>",
}


def image_token_id(name: str) -> int:
    return _IDS[IMAGE_TOKEN[name]]


def chat_template(name: str) -> str:
    """Content is text or a list of parts; only Gemma's template writes <bos>, as the real one."""
    start = "<bos>" if name == "gemma3" else ""
    return (
        f"{start}{{% for message in messages %}}<{{{{ message.role }}}}> "
        "{% if message.content is string %}{{ message.content | trim }}"
        "{% else %}{% for part in message.content %}"
        f"{{% if part.type == 'image' %}}{PLACEHOLDER[name]}"
        "{% else %} {{ part.text | trim }}{% endif %}"
        "{% endfor %}{% endif %} <end>"
        "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    )


def build_tokenizer(name: str) -> Any:
    """Whole words; runs of line breaks are tokens, other white space is none."""
    known = [*_SPECIAL, *_NEWLINES, *WORDS]
    known += [f"w{number}" for number in range(VOCAB - len(known))]
    words = {word: index for index, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split(Regex(r"\n+|[.,:?]"), "isolated"),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", words["<bos>"])]
    )
    named = {"image_token": IMAGE_TOKEN[name]}
    if name.startswith("qwen"):
        named |= {
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        }
    if name == "gemma3":
        named |= {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=named,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(name),
    )


def build_config(name: str) -> Any:
    text = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,  # head size 32: the smallest that vLLM serves on CPUs
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": _IDS["<pad>"],
        "bos_token_id": _IDS["<bos>"],
        "eos_token_id": _IDS["<eos>"],
        "tie_word_embeddings": False,
    }
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    if name in ("llava", "llava_next"):
        # 6 x 6 features, or 4 x 4 per tile.
        side = 24 if name == "llava" else 16
        vision = tf.CLIPVisionConfig(
            image_size=side, patch_size=4, num_hidden_layers=3, projection_dim=32, **tower
        )
        common = {
            "vision_config": vision,
            "text_config": tf.LlamaConfig(**text),
            "image_token_index": _IDS["<image>"],
            "image_seq_length": (side // 4) ** 2,
            "tie_word_embeddings": False,
        }
        if name == "llava":
            return tf.LlavaConfig(**common)
        return tf.LlavaNextConfig(image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]], **common)
    if name.startswith("qwen"):
        common = {
            "text_config": {
                **text,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [4, 6, 6],
                },
            },
            "image_token_id": _IDS["<|image_pad|>"],
            "video_token_id": _IDS["<|video_pad|>"],
            "vision_start_token_id": _IDS["<|vision_start|>"],
            "vision_end_token_id": _IDS["<|vision_end|>"],
            "tie_word_embeddings": False,
        }
        grid = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
        if name == "qwen2_vl":
            vision = {**grid, "embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2}
            return tf.Qwen2VLConfig(vision_config=vision, **common)
        vision = {
            **grid,
            "hidden_size": 32,
            "out_hidden_size": HIDDEN,
            "intermediate_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        }
        return tf.Qwen2_5_VLConfig(vision_config=vision, **common)
    kinds = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    text |= {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24}
    text |= {"layer_types": kinds, "tie_word_embeddings": True}
    return tf.Gemma3Config(
        text_config=text,
        vision_config={**tower, "image_size": 32, "patch_size": 4, "num_hidden_layers": 2},
        mm_tokens_per_image=16,
        boi_token_index=_IDS["<start_of_image>"],
        eoi_token_index=_IDS["<end_of_image>"],
        image_token_index=_IDS["<image_soft_token>"],
        tie_word_embeddings=True,
    )


@cache
def build_processor(name: str) -> Any:
    """The family's own processor, for images of a few dozen pixels a side."""
    tokenizer = build_tokenizer(name)
    if name in ("llava", "llava_next"):
        side = 24 if name == "llava" else 16
        size = {
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
        }
        like = {
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "chat_template": tokenizer.chat_template,
        }
        if name == "llava":
            return tf.LlavaProcessor(tf.CLIPImageProcessor(**size), tokenizer, **like)
        pinpoints = [[16, 32], [32, 16], [32, 32]]
        images = tf.LlavaNextImageProcessor(**size, image_grid_pinpoints=pinpoints)
        return tf.LlavaNextProcessor(images, tokenizer, **like)
    if name.startswith("qwen"):
        grid = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
        size = {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}  # areas
        kind = tf.Qwen2VLProcessor if name == "qwen2_vl" else tf.Qwen2_5_VLProcessor
        return kind(
            tf.Qwen2VLImageProcessor(**grid, size=size),
            tokenizer,
            tf.Qwen2VLVideoProcessor(**grid, size=size),
            chat_template=tokenizer.chat_template,
        )
    images = tf.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    return tf.Gemma3Processor(
        images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=16
    )


def build_model(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = build_config(name)
    config.architectures = [ARCHITECTURE[name]]  # as if loaded from a folder
    model = getattr(tf, ARCHITECTURE[name])(config).eval()
    # Each part has an initialiser of its own, some far too small: draw every matrix anew.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                # 0.2 as in tests.tiny where rows are 64 long, more for the tower's shorter ones.
                scale = 0.2 if "language_model" in key or "lm_head" in key else 0.3
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    model.tie_weights()
    return model


def build_vision(name: str) -> tuple[Any, Any]:
    """(model, processor) of one of NAMES, on the CPU in float32."""
    return build_model(name), build_processor(name)


def save_vision(folder: Path, name: str) -> Path:
    """Writes FOLDER/NAME, which transformers and vLLM load; returns its path."""
    path = folder / name
    model, processor = build_vision(name)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    old_tower_names(path)
    return path


def random_vector(name: str, seed: int) -> SteeringVector:
    """The same directions as tests.tiny's Llama gets."""
    fingerprint = ModelFingerprint(ARCHITECTURE[name], HIDDEN, LAYERS)
    return replace(tiny.random_vector("llama", seed), model=fingerprint)


def save_vision_world(folder: Path, name: str) -> Path:
    """As tests.tiny.save_world: FOLDER/NAME, four vectors and NAME.yaml, whose path it returns."""
    save_vision(folder, name)
    return tiny.save_catalogue(folder, name, lambda seed: random_vector(name, seed))


def old_tower_names(path: Path) -> None:
    """Renames the tower's weights in a saved model as transformers 4 wrote them, in place.

    transformers 5 leaves `vision_model` out of CLIP's and SigLIP's names; vLLM looks for it, and
    transformers reads both.
    """
    file = path / "model.safetensors"
    tower = re.compile(r"(^|\.)vision_tower\.(?!vision_model\.)")
    weights = load_file(file)
    renamed = {tower.sub(r"\1vision_tower.vision_model.", key): weights[key] for key in weights}
    if renamed.keys() != weights.keys():
        save_file(renamed, file, metadata={"format": "pt"})


def picture(seed: int, size: tuple[int, int] = (40, 24)) -> Image.Image:
    """A picture [width, height] of two coloured shapes on a coloured ground, fixed by the seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    colours = list(COLOURS.values())
    ground = draw(len(colours))
    image = Image.new("RGB", size, colours[ground])
    canvas = ImageDraw.Draw(image)
    for side in range(2):
        fill = colours[(ground + 1 + draw(len(colours) - 1)) % len(colours)]
        left, right = side * size[0] // 2 + 1, (side + 1) * size[0] // 2 - 2
        top, bottom = draw(size[1] // 4), size[1] - 2 - draw(size[1] // 4)
        shape = SHAPES[draw(len(SHAPES))]
        if shape == "circle":
            canvas.ellipse((left, top, right, bottom), fill=fill)
        elif shape == "triangle":
            canvas.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=fill)
        elif shape == "square":
            canvas.rectangle((left, top, right, bottom), fill=fill)
        else:
            middle = (top + bottom) // 2
            canvas.rectangle((left, middle - 2, right, middle + 2), fill=fill)
    return image
