"""Tiny random models of many architectures, a word-level tokenizer and preference pairs."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from offline.model import Decoder, as_decoder
from offline.prompts import TokenPair, tokenise

HIDDEN, LAYERS, CONTEXT = 32, 3, 64
WORDS = [f"w{index}" for index in range(60)]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<mask>", "<user>", "<assistant>", "<system>"]
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}<{{ message.role }}> {{ message.content | trim }} <eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "mistral-window", "gemma2", "gemma3", "gpt2"]
RECURRENT = ["lfm2", "qwen3next", "granitehybrid"]


def build_tokenizer() -> Any:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, ":", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        mask_token="<mask>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
        chat_template=CHAT_TEMPLATE,
    )


def build_model(architecture: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    vocabulary = len(SPECIAL) + 1 + len(WORDS)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if architecture == "gpt2":
        config = tf.GPT2Config(
            vocab_size=vocabulary, n_embd=HIDDEN, n_layer=LAYERS, n_head=2, n_positions=CONTEXT,
            initializer_range=0.2, **ids,
        )  # fmt: skip
        return tf.GPT2LMHeadModel(config).eval()
    kind, _, window = architecture.partition("-")
    classes = {
        "llama": (tf.LlamaConfig, tf.LlamaForCausalLM),
        "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM),
        "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM),
        "mistral": (tf.MistralConfig, tf.MistralForCausalLM),
        "gemma2": (tf.Gemma2Config, tf.Gemma2ForCausalLM),
        "gemma3": (tf.Gemma3TextConfig, tf.Gemma3ForCausalLM),
        "gemma4": (tf.Gemma4TextConfig, tf.Gemma4ForCausalLM),
        "lfm2": (tf.Lfm2Config, tf.Lfm2ForCausalLM),
        "qwen3next": (tf.Qwen3NextConfig, tf.Qwen3NextForCausalLM),
        "granitehybrid": (tf.GraniteMoeHybridConfig, tf.GraniteMoeHybridForCausalLM),
    }
    make_config, make_model = classes[kind]
    more: dict[str, Any] = {}
    if kind == "mistral":
        more["sliding_window"] = 4 if window else None
    if kind.startswith("gemma"):
        more |= {"sliding_window": 32, "query_pre_attn_scalar": 16}
    if kind == "gemma4":  # a share of every token goes to each block beside its embedding
        more |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": vocabulary}
    if kind == "lfm2":
        more |= {
            "layer_types": ["conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
        }
    if kind == "qwen3next":
        more |= {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1,
            "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        }  # fmt: skip
    if kind == "granitehybrid":
        more |= {
            "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 4, "mamba_d_head": 16,
            "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16,
            "num_local_experts": 0, "shared_intermediate_size": 32,
            "position_embedding_type": "rope",
        }  # fmt: skip
    config = make_config(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=CONTEXT,
        initializer_range=0.2, **more, **ids,
    )  # fmt: skip
    return make_model(config).eval()


def build_decoder(architecture: str = "llama") -> Decoder:
    return as_decoder(build_model(architecture), build_tokenizer(), architecture)


def save_model(folder: Path, architecture: str = "llama") -> Path:
    build_model(architecture).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Preference pairs of varying lengths, as plain dictionaries."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    return [
        {"id": f"p{n}", "prompt": text(6, 12), "chosen": "w1 " + text(1, 4),
         "rejected": "w2 " + text(1, 4)}
        for n in range(count)
    ]  # fmt: skip


def write_jsonl(path: Path, items: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def token_pairs(count: int, tokenizer: Any, folder: Path, seed: int = 0) -> list[TokenPair]:
    from offline.pairs import load_pairs

    data = load_pairs(str(write_jsonl(folder / "pairs.jsonl", rows(count, seed))))
    return [tokenise(pair, tokenizer) for pair in data.pairs]
