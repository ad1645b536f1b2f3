"""Small random models and vectors, with weights large enough that every layer matters."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from grains_vllm.vectors import ModelFingerprint, SteeringVector

VOCAB, HIDDEN = 128, 64
LAYERS = {"llama": 4, "gpt2": 3}
ARCHITECTURE = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}
# A quarter of a typical ||h|| in these models: steering changes answers without drowning them.
REFERENCE_NORM = 10.0


def build_model(name: str) -> torch.nn.Module:
    """`llama` hands on (hidden, residual), whose sum is the stream; `gpt2` one tensor."""
    torch.manual_seed(0)
    common = {"vocab_size": VOCAB, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}
    if name == "llama":
        config = LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=128,
            num_hidden_layers=LAYERS[name],
            num_attention_heads=2,  # head size 32: the smallest that vLLM serves on CPUs
            num_key_value_heads=1,
            max_position_embeddings=512,
            **common,
        )
        return LlamaForCausalLM(config).eval()
    config = GPT2Config(n_embd=HIDDEN, n_layer=LAYERS[name], n_head=2, n_positions=512, **common)
    return GPT2LMHeadModel(config).eval()


def random_vector(name: str, seed: int) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(LAYERS[name], HIDDEN, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    return SteeringVector(
        directions,
        torch.full((LAYERS[name],), REFERENCE_NORM),
        ModelFingerprint(ARCHITECTURE[name], HIDDEN, LAYERS[name]),
    )


def save_world(folder: Path, name: str) -> Path:
    """Writes FOLDER/NAME (the model), four vectors and NAME.yaml; returns the YAML's path."""
    build_model(name).save_pretrained(folder / name)
    return save_catalogue(folder, name, lambda seed: random_vector(name, seed))


def save_catalogue(folder: Path, name: str, vector_of: Callable[[int], SteeringVector]) -> Path:
    """Writes four vectors and NAME.yaml; returns the YAML's path."""
    # As many slots as vectors; requests that narrow layers need more and wait.
    lines = ["slots: 4", "max_vectors_per_request: 3", "vectors:"]
    for seed, vector in enumerate("abcd"):
        vector_of(seed).save(folder / f"{name}_{vector}.safetensors")
    for vector, more in {
        "a": "",
        "b": "layers: [1], ",
        "c": "positions: prompt, ",
        "d": "positions: generation, scale: absolute, layers: [0, 2], ",
    }.items():
        strength = 4.0 if vector == "d" else 0.5
        lines.append(
            f"  {vector}: {{path: {name}_{vector}.safetensors, {more}strength: {strength}}}"
        )
    path = folder / f"{name}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path
