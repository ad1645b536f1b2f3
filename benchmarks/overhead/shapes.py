"""Models by shape alone (vLLM fills in dummy weights), a tokenizer, and vectors that fit them."""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from grains_vllm.vectors import ModelFingerprint, SteeringVector, write_aside

ARCHITECTURE = "LlamaForCausalLM"  # of all, so that only their shapes differ
REFERENCE_NORM = 1.0


@dataclass(frozen=True)
class Shape:
    """What decides a model's speed.

    Attributes:
        head: the size of an attention head.
        feed_forward: the width inside the MLP.
        tied: whether input and output embeddings are one matrix.
        qkv_bias: whether q, k and v have biases, as in Qwen2.
    """

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False


# No vocabulary below 10000, from which `vllm bench latency` draws its tokens.
SHAPES = {
    "tiny": Shape(2, 64, 128, 2, 1, 32, 10240),
    "cpu": Shape(8, 512, 1376, 8, 4, 64, 10240),
    "1.5b": Shape(28, 1536, 8960, 12, 2, 128, 151936, tied=True, qkv_bias=True),  # Qwen2.5-1.5B
    "4b": Shape(36, 2560, 9728, 32, 8, 128, 151936, tied=True),  # Qwen3-4B, no q/k norm
    "8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),  # Llama-3.1-8B
}


def write_model(folder: Path, shape: Shape, longest: int, dtype: str) -> Path:
    """Writes config.json and a tokenizer whose every token is one word; returns the folder.

    Args:
        longest: tokens, prompt and answer together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "vocab_size": shape.vocabulary,
        "qkv_bias": shape.qkv_bias,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": longest,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rope_theta": 10000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": dtype,
        "torch_dtype": dtype,
        # Without it transformers takes large local vocabularies for a broken Mistral tokenizer.
        "transformers_version": version("transformers"),
    }
    write_aside(folder / "config.json", json.dumps(config, indent=1).encode())
    _write_tokenizer(folder, shape.vocabulary)
    return folder


def _write_tokenizer(folder: Path, size: int) -> None:
    """Words `w0`, `w1`, ... so that text and tokens are one to one and lengths are exact."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "</s>", "<unk>", *(f"w{number}" for number in range(size - 3))]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    write_aside(folder / "tokenizer_config.json", json.dumps(settings).encode())


def write_catalogue(folder: Path, shape: Shape, vectors: int) -> Path:
    """Writes `vectors` random vectors for all layers and the YAML that names them v0, v1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = ModelFingerprint(ARCHITECTURE, shape.hidden, shape.layers)
    generator = torch.Generator().manual_seed(0)
    listed = {}
    for number in range(vectors):
        rows = torch.randn(shape.layers, shape.hidden, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        norms = torch.full((shape.layers,), REFERENCE_NORM)
        name = f"v{number}"
        SteeringVector(rows, norms, fingerprint).save(folder / f"{name}.safetensors")
        listed[name] = {"path": f"{name}.safetensors", "strength": 0.1}
    content = {"vectors": listed, "slots": vectors, "max_vectors_per_request": 1}
    path = folder / "steering.yaml"
    write_aside(path, yaml.safe_dump(content).encode())
    return path
