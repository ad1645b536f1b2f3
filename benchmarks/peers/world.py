"""What every contestant gets: one random model on disk, two vectors, the same prompts."""

import json
from pathlib import Path
from random import Random
from typing import Any

from grains_vllm.vectors import ModelFingerprint, SteeringVector

LAYERS, HIDDEN, VOCABULARY = 8, 512, 32000
PROMPT = 64  # tokens, all prompts alike, so that nobody has to pad
NAMES = ("a", "b")
# A third of a typical ||h|| in this model: enough to change answers.
STRENGTH = 8.0


def save(folder: Path, seed: int) -> None:
    """Writes model/, one artifact per vector and steering.yaml; and, for the peers that add plain
    rows, added.json: per vector the rows [layers, hidden] that are added to the stream."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=1376,
        num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=8,
        max_position_embeddings=512, initializer_range=0.08,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    added: dict[str, Any] = {}
    lines = [f"slots: {len(NAMES)}", "vectors:"]
    for name in NAMES:
        rows = torch.randn(LAYERS, HIDDEN)
        rows /= rows.norm(dim=1, keepdim=True)
        vector = SteeringVector(
            rows,
            torch.full((LAYERS,), STRENGTH),
            ModelFingerprint("LlamaForCausalLM", HIDDEN, LAYERS),
        )
        vector.save(folder / f"{name}.safetensors")
        lines.append(f"  {name}: {{path: {name}.safetensors, strength: 1}}")
        added[name] = (STRENGTH * rows).tolist()
    (folder / "steering.yaml").write_text("\n".join(lines) + "\n")
    (folder / "added.json").write_text(json.dumps(added))


def prompts(count: int, seed: str, length: int = PROMPT) -> list[list[int]]:
    """Random prompts; another seed gives others, so that no prefix cache knows them."""
    rng = Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(length)] for _ in range(count)]
