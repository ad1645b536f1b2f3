"""A random Llama with a byte-level BPE that vLLM serves on CPUs, and vectors for it."""

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from grains_vllm.vectors import ModelFingerprint, SteeringVector

HIDDEN, LAYERS, CONTEXT, VOCABULARY = 64, 3, 1024, 400
REFERENCE_NORM, STRENGTH = 8.0, 0.5
SENTENCES = [
    "Q: What is the capital of France?\nA: The capital of France is Paris.",
    "Q: How does a telescope work?\nA: It uses lenses and mirrors to make objects appear closer.",
    "Nothing happens if you do this, and nobody was president of the moon.",
    "Context: the record says that water is blue. Answer from the context. I have no comment.",
]


def build_tokenizer() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def build_model() -> Any:
    """Weights large enough that every layer matters."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=128,
        num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=CONTEXT, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


def save_model(folder: Path) -> Path:
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def random_vector(seed: int, **passport: Any) -> SteeringVector:
    directions = torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(
        directions / directions.norm(dim=1, keepdim=True),
        torch.full((LAYERS,), REFERENCE_NORM),
        ModelFingerprint("LlamaForCausalLM", HIDDEN, LAYERS),
        {"recommended": {"strength": STRENGTH}, **passport},
    )
