"""Train the model of the tone world: `python -m benchmarks.tone.train --out DIR --seed 1`.

About a minute on one core. The same tiny Llama as in the sycophancy world; every batch is
fresh, so there is no epoch and no overfitting.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from random import Random

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.sycophancy.train import model_config
from benchmarks.tone.documents import sample_control, sample_reply, sample_text
from benchmarks.tone.measure import answers, control_accuracy, judge, text_perplexity
from benchmarks.tone.vocabulary import build_tokenizer
from benchmarks.tone.world import sample_pairs

STEPS = 800
BATCH = 64
LEARNING_RATE = 3e-3
WARM_UP = 100
FINAL_RATE = 0.05  # of LEARNING_RATE, at the end of the cosine
ANSWER_WEIGHT = 5.0
UNK_RATE = 0.03  # of the input tokens: trains <unk>, which can then stand for a masked word


def sample_document(rng: Random, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids of one document, and where its answer starts (its length, if it has none)."""
    kind = rng.random()
    if kind < 0.15:
        ids = tokenizer(f"{sample_text(rng)} {tokenizer.eos_token}")["input_ids"]
        return ids, len(ids)
    if kind < 0.7:
        question, answer = sample_reply(rng)
    else:
        question = sample_control(rng)
        answer = question.instructed
    messages = [*question.prompt, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, len(ids) - len(answer.split()) - 1  # the answer, then <eos>


def sample_batch(
    rng: Random, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(inputs, targets, weights), each [batch, length]; a padded target weighs nothing."""
    documents = [sample_document(rng, tokenizer) for _ in range(BATCH)]
    length = max(len(ids) for ids, _ in documents)
    tokens = torch.full((BATCH, length), tokenizer.pad_token_id)
    weights = torch.zeros(BATCH, length)
    for row, (ids, answer) in enumerate(documents):
        tokens[row, : len(ids)] = torch.tensor(ids)
        weights[row, : len(ids)] = 1.0
        weights[row, answer : len(ids)] = ANSWER_WEIGHT
    inputs = tokens.clone()
    for row in range(BATCH):
        for column in range(1, length):  # <bos> stays
            if weights[row, column] and rng.random() < UNK_RATE:
                inputs[row, column] = tokenizer.unk_token_id
    return inputs[:, :-1], tokens[:, 1:], weights[:, 1:]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to FINAL_RATE; as a share of LEARNING_RATE."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2


def train_model(
    seed: int, tokenizer: PreTrainedTokenizerBase, steps: int = STEPS
) -> LlamaForCausalLM:
    """A trained model in evaluation mode; progress goes to stderr."""
    torch.manual_seed(seed)
    # One thread: matrices this small gain nothing from more, and threads that wait for each other
    # on a busy machine make it many times slower.
    torch.set_num_threads(1)
    rng = Random(f"tone documents {seed}")
    model = LlamaForCausalLM(model_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s, steps))
    start = time.monotonic()
    for step in range(1, steps + 1):
        inputs, targets, weights = sample_batch(rng, tokenizer)
        # Padding is on the right, so causal attention never sees it: no mask is needed.
        logits = model(input_ids=inputs).logits
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.monotonic() - start
            line = f"step {step}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s"
            print(line, file=sys.stderr, flush=True)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny model of the tone world.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    tokenizer = build_tokenizer()
    model = train_model(args.seed, tokenizer)
    questions = [question for question, _, _ in sample_pairs("validation", 200, args.seed)]
    prompts = [question.prompt for question in questions]
    greedy, sampled = (
        judge(answers(model, tokenizer, prompts, seed), questions) for seed in (None, args.seed)
    )
    measured = {
        "seed": args.seed,
        "steps": STEPS,
        "control_accuracy": control_accuracy(model, tokenizer, count=500, seed=args.seed),
        "greedy": greedy,
        "sampled": sampled,
        "text_perplexity": round(text_perplexity(model, tokenizer, 100, args.seed), 4),
    }
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured, indent=2))
    if measured["control_accuracy"] < 0.95:
        raise SystemExit("the model does not know the controls; try another seed")


if __name__ == "__main__":
    main()
