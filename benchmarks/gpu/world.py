"""A random Llama with weights large enough that every layer matters, vectors, and requests."""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

from grains_vllm.vectors import ModelFingerprint, SteeringVector, write_aside

VECTORS = 4
# About a quarter of a typical ||h|| in these models.
REFERENCE_NORM = 10.0
# Eight requests, eight different (vector, strength), and every kind of positions.
STEERINGS: tuple[dict[str, Any], ...] = (
    {"steering": "v0", "steering_strength": 0.5},
    {"steering": "v0", "steering_strength": -0.3},
    {"steering": "v1", "steering_strength": 1.5},
    {"steering": "v1", "steering_strength": 0.2, "steering_positions": "generation"},
    {"steering": "v2", "steering_strength": 0.5, "steering_positions": "prompt"},
    {"steering": "v3", "steering_strength": -0.4},
    {"steering": "v3", "steering_strength": 0.05},
    {"steering": "v2", "steering_strength": 0.9, "steering_positions": "all"},
)


@dataclass(frozen=True)
class Size:
    """A Llama's measures; `spread` is the weights' standard deviation."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    spread: float


SIZES = {
    "tiny": Size(4, 64, 128, 2, 1, 128, 0.2),
    "usual": Size(8, 1024, 2816, 8, 2, 4096, 0.05),
}


def write(folder: Path, size: Size) -> None:
    """Writes FOLDER/model (float32), the vectors, and FOLDER/steering.yaml; once."""
    if (folder / "steering.yaml").is_file():
        return
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, vocab_size=size.vocabulary,
        initializer_range=size.spread, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    listed = {}
    for number in range(VECTORS):
        vector(size, number).save(folder / f"v{number}.safetensors")
        listed[f"v{number}"] = {"path": f"v{number}.safetensors", "strength": 0.5}
    content = yaml.safe_dump({"vectors": listed, "slots": VECTORS})
    write_aside(folder / "steering.yaml", content.encode())


def vector(size: Size, number: int) -> SteeringVector:
    """A random vector for all layers."""
    generator = torch.Generator().manual_seed(number)
    rows = torch.randn(size.layers, size.hidden, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    norms = torch.full((size.layers,), REFERENCE_NORM)
    return SteeringVector(
        rows, norms, ModelFingerprint("LlamaForCausalLM", size.hidden, size.layers)
    )


def requests(size: Size, steered: bool) -> list[dict[str, Any]]:
    """Sixteen prompts of 20 to 95 tokens; if `steered`, every other one is."""
    rng = Random(0)
    prompts = [
        [rng.randrange(2, size.vocabulary) for _ in range(20 + 5 * number)] for number in range(16)
    ]
    return [
        {"prompt": prompt, "extra_args": STEERINGS[number // 2] if steered and number % 2 else None}
        for number, prompt in enumerate(prompts)
    ]
