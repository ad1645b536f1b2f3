"""The small models whose layers are counted: shapes alone, and vectors that fit them."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from grains_vllm.vectors import ModelFingerprint, SteeringVector, write_aside

HEAD = 64
LONGEST = 512  # tokens
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


@dataclass(frozen=True)
class Model:
    """Attributes: family: a key of ARCHITECTURES; hidden: a multiple of 64."""

    family: str
    layers: int
    hidden: int
    dtype: str

    def write(self, folder: Path) -> Path:
        """Writes config.json (weights are vLLM's dummies); returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": [ARCHITECTURES[self.family]],
            "model_type": self.family,
            "vocab_size": 1024,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "dtype": self.dtype,
            **(self._gpt2() if self.family == "gpt2" else self._llama()),
        }
        write_aside(folder / "config.json", json.dumps(config, indent=1).encode())
        return folder

    def _gpt2(self) -> dict[str, int]:
        return {
            "n_layer": self.layers,
            "n_embd": self.hidden,
            "n_head": self.hidden // HEAD,
            "n_positions": LONGEST,
        }

    def _llama(self) -> dict[str, int]:
        heads = self.hidden // HEAD
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": 11 * self.hidden // 4,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "max_position_embeddings": LONGEST,
        }

    def write_vectors(self, folder: Path, layers: list[int], together: int) -> Path:
        """Writes vectors a and b for `layers`, `together` per request; returns the YAML."""
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        fingerprint = ModelFingerprint(ARCHITECTURES[self.family], self.hidden, self.layers)
        content: dict[str, object] = {"slots": 2, "max_vectors_per_request": together}
        listed = {}
        for name in "ab":
            rows = torch.randn(self.layers, self.hidden, generator=generator)
            rows /= rows.norm(dim=1, keepdim=True)
            vector = SteeringVector(rows, torch.ones(self.layers), fingerprint)
            vector.save(folder / f"{name}.safetensors")
            listed[name] = {"path": f"{name}.safetensors", "layers": layers, "strength": 0.1}
        path = folder / "steering.yaml"
        write_aside(path, yaml.safe_dump({**content, "vectors": listed}).encode())
        return path
