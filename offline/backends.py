"""Who scores a sweep: a transformers model with hooks, or a vLLM engine with the plugin."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grains_vllm.vectors import ModelFingerprint, SteeringVector
from offline.deltas import read_streams
from offline.errors import InputError
from offline.model import Decoder, load_decoder, load_tokenizer
from offline.options import Read
from offline.prompts import TokenPair
from offline.scoring import Item, Point, Scorer

_LARGE_BANK = 2**30  # bytes
_MOST_READ = 32  # prompts; a median of more is hardly another one


@dataclass(frozen=True)
class BackEnd:
    """A model about to score, loaded as far as reading the data needs it.

    Attributes:
        model: folder or hub id, as given; `name` holds no path.
        config: the text part of the model's config.
        weights: tells two trainings apart.
        decoder: the loaded transformers model; None stands for vLLM.
        processor: of a model that takes images; None elsewhere.
    """

    model: str
    name: str
    tokenizer: Any
    config: Any
    fingerprint: ModelFingerprint
    weights: str
    dtype: str
    decoder: Decoder | None = None
    processor: Any = None

    def usual_norms(self, pairs: Sequence[TokenPair]) -> list[float]:
        """The median ||h|| after every block, where the prompts end; of a transformers model."""
        assert self.decoder is not None
        norms = [
            read_streams(self.decoder, pair, Read.prompt_end)[1][0] for pair in pairs[:_MOST_READ]
        ]
        return torch.stack(norms).median(dim=0).values.tolist()

    def scorer(
        self,
        items: Sequence[Item],
        vectors: Mapping[str, SteeringVector],
        points: Sequence[Point],
        batch_rows: int,
        engine_args: Mapping[str, Any],
        on_note: Callable[[str], None],
    ) -> Scorer:
        """What scores `items` at `points`."""
        if self.decoder is not None:
            from offline.transformers_scorer import TransformersScorer

            return TransformersScorer(self.decoder, vectors, batch_rows)
        from offline.engine_scorer import EngineScorer
        from offline.vllm_import import on_cpu

        longest = max(len(item.prompt_ids) + len(item.response_ids) for item in items)
        engine = EngineScorer(
            self.model, vectors, points, longest, {"dtype": self.dtype, **engine_args},
            images=any(item.image is not None for item in items),
        )  # fmt: skip
        if engine.images and self.fingerprint.architecture.startswith("Gemma3") and on_cpu():
            on_note(
                "on a CPU vLLM lets Gemma 3's image tokens see no later ones, unlike transformers "
                "and vLLM on GPUs: these scores are good for serving on a CPU"
            )
        if engine.bank_bytes > _LARGE_BANK:
            on_note(
                f"the engine holds the vectors of {len(engine.names)} sets of layers in "
                f"{engine.bank_bytes / 2**30:.1f} GiB; fewer sets need less"
            )
        return engine


def transformers_back_end(
    model: str, dtype: str, device: str = "auto", device_map: str | None = None
) -> BackEnd:
    """Loads all of the model."""
    decoder = load_decoder(model, dtype=dtype, device=device, device_map=device_map)
    return BackEnd(
        model, decoder.name, decoder.tokenizer, decoder.text_config, decoder.fingerprint,
        decoder.weights_sha256, dtype, decoder, decoder.processor,
    )  # fmt: skip


def vllm_back_end(model: str, dtype: str) -> BackEnd:
    """Loads tokenizer and config; the engine, which takes minutes, starts when it is to score."""
    import transformers

    folder = Path(model)
    if model.startswith(("/", ".")) and not folder.is_dir():
        raise InputError(f"model '{model}': no such folder")
    name = folder.resolve().name if folder.is_dir() else model
    try:
        tokenizer, processor = load_tokenizer(model)
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model '{name}' cannot be loaded: {error}") from error
    facts = [config.to_json_string(), getattr(config, "_commit_hash", None)]
    if folder.is_dir():
        files = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
        facts += [[file, stat.st_size, stat.st_mtime_ns] for file, stat in files]
    weights = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return BackEnd(
        model, name, tokenizer, config.get_text_config(), ModelFingerprint.of(config), weights,
        dtype, None, processor,
    )  # fmt: skip
