"""How the tiny models learn: every batch is fresh, so there is no epoch and no overfitting."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerBase

from grains_vllm.vectors import write_aside

UNK_RATE = 0.03  # of the input words: trains <unk>, which can then stand for a masked word

Documents = Sequence[tuple[list[int], slice]]
Batch = tuple[Mapping[str, Tensor], Tensor, Tensor]


@dataclass(frozen=True)
class Course:
    """AdamW: linear warm-up, then a cosine.

    Attributes:
        rate: the learning rate at its highest.
        warm_up: steps until then.
        final: the learning rate at the end, as a share of `rate`.
    """

    steps: int
    rate: float
    warm_up: int
    final: float

    def share(self, step: int) -> float:
        """The learning rate of a step (from 0) as a share of `rate`."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        progress = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


def tiny_llama(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """A Llama of about 0.2 million parameters. Heads of 32: the smallest that vLLM serves on a
    CPU."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def start(seed: int) -> None:
    """Before the model is made."""
    torch.manual_seed(seed)
    # One thread: matrices this small gain nothing from more, and threads that wait for each other
    # on a busy machine make it many times slower.
    torch.set_num_threads(1)


def text_batch(
    documents: Documents, answer_weight: float, rng: Random, tokenizer: PreTrainedTokenizerBase
) -> Batch:
    """What `train` takes, from (token ids, which of them weigh `answer_weight` instead of 1)."""
    length = max(len(ids) for ids, _ in documents)
    tokens = torch.full((len(documents), length), tokenizer.pad_token_id)
    weights = torch.zeros(len(documents), length)
    for row, (ids, answer) in enumerate(documents):
        tokens[row, : len(ids)] = torch.tensor(ids)
        weights[row, : len(ids)] = 1.0
        weights[row, answer] = answer_weight
    inputs = tokens.clone()
    for row in range(len(documents)):
        for column in range(1, length):  # <bos> stays
            if weights[row, column] and rng.random() < UNK_RATE:
                inputs[row, column] = tokenizer.unk_token_id
    return {"input_ids": inputs[:, :-1]}, tokens[:, 1:], weights[:, 1:]


def train(model: Any, course: Course, batch: Callable[[int], Batch]) -> None:
    """Trains all parameters that want a gradient; progress goes to stderr.

    Args:
        batch: step (from 1) -> the arguments of a forward; the targets [rows, length], and how much
            each of them weighs (a padded one nothing).
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=course.rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, course.share)
    begin = time.monotonic()
    for step in range(1, course.steps + 1):
        inputs, targets, weights = batch(step)
        # Padding is on the right, so causal attention never sees it: no mask is needed.
        logits = model(**inputs).logits
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.monotonic() - begin
            line = f"step {step}/{course.steps}  loss {loss.item():.3f}  {seconds:.0f} s"
            print(line, file=sys.stderr, flush=True)


def greedy(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """How a tiny model answers unless it is told otherwise."""
    return GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def arguments(description: str) -> argparse.Namespace:
    """The command line of a `train` module: out (a folder) and seed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def record(folder: Path, measured: Mapping[str, Any], *must: str) -> None:
    """Writes what was measured beside the model, and shows it.

    Raises:
        SystemExit: one of the shares that `must` be high is below 0.95.
    """
    text = json.dumps(measured, indent=2) + "\n"
    write_aside(folder / "training.json", text.encode())
    print(text, end="")
    if low := {name: measured[name] for name in must if measured[name] < 0.95}:
        raise SystemExit(f"the model has not learned enough, try another seed: {low}")
