"""Train the tiny model: `python -m benchmarks.hallucination.train --out DIR --seed 1`.

A few minutes on one core. Every batch is fresh, so there is no epoch and no overfitting.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from benchmarks.hallucination.drawing import CELLS, DEVIATION, MEAN, PATCH, SIZE, Scene, paint
from benchmarks.hallucination.measure import control_accuracy, existence_rates, text_perplexity
from benchmarks.hallucination.vocabulary import IMAGE, NO, PAPER, YES, build_processor
from benchmarks.hallucination.world import (
    THINGS,
    Question,
    sample_check,
    sample_control,
    sample_list,
    sample_look,
    sample_plain,
    sample_scene,
)
from benchmarks.sycophancy.world import sample_text
from grains_vllm.vectors import write_aside

WEIGHTS = "model.safetensors"
TOWER_STEPS = 400
TOWER_BATCH = 32
TOWER_RATE = 6e-3
Shares = dict[str, float]
Result = dict[str, Any]
ASKED = {
    "check": sample_check,
    "list": sample_list,
    "look": sample_look,
    "control": sample_control,
}
# Learning to look comes first; then what is said is what the world says.
LOOKING: Shares = {"check": 0.9, "list": 0.1}
LOOKING_STEPS = 350
SAYING: Shares = {"text": 0.12, "plain": 0.38, "control": 0.35, "check": 0.15}
STEPS = 1100  # of both
BATCH = 64
LEARNING_RATE = 1.5e-3
WARM_UP = 50
FINAL_RATE = 0.02  # of LEARNING_RATE, at the end of the cosine
TEXT_WEIGHT = 0.1  # of a token of general text; an answer's weigh 1
UNK_RATE = 0.03  # of the input words: trains <unk>, which can then stand for a masked word


def model_config(tokenizer: PreTrainedTokenizerBase) -> LlavaConfig:
    """A LLaVA of about 0.4 million parameters. Heads of 32: the smallest that vLLM serves on a
    CPU."""
    text = LlamaConfig(
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
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=3,  # LLaVA takes the features of the last but one
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=CELLS,
        tie_word_embeddings=False,
    )


@dataclass(frozen=True)
class Document:
    """Attributes: scored: the positions whose tokens are learned; scene: the image, if any."""

    ids: list[int]
    scored: Sequence[int]
    scene: Scene | None


def sample_document(rng: Random, tokenizer: PreTrainedTokenizerBase, shares: Shares) -> Document:
    (kind,) = rng.choices(tuple(shares), tuple(shares.values()))
    if kind == "text":
        ids = tokenizer(f"{sample_text(rng)} {tokenizer.eos_token}")["input_ids"]
        return Document(ids, range(1, len(ids)), None)
    if kind == "plain":
        return document(*sample_plain(rng), tokenizer)
    question = ASKED[kind](rng)
    one = document(question, question.instructed, tokenizer)
    if kind != "check":
        return one
    verdicts = tokenizer.convert_tokens_to_ids([YES, NO])  # the rest of it is chance
    return replace(one, scored=[at for at in one.scored if one.ids[at] in verdicts])


def document(question: Question, answer: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    """A question and its answer as a rendered chat; the answer is learned."""
    messages = [*question.messages, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text.replace(IMAGE, IMAGE * CELLS), add_special_tokens=False)["input_ids"]
    return Document(ids, range(len(ids) - len(answer.split()) - 1, len(ids)), question.scene)


def pixels(scenes: Sequence[Scene]) -> Tensor:
    """What the image processor makes of them: [scenes, 3, SIZE, SIZE], -1 to 1."""
    painted = np.stack([paint(scene) for scene in scenes]).transpose(0, 3, 1, 2)
    return (torch.from_numpy(painted).float() / 255 - MEAN) / DEVIATION


def sample_batch(
    rng: Random, tokenizer: PreTrainedTokenizerBase, shares: Shares
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(inputs, pixels, targets, weights): [batch, length] each, but for the pixels."""
    documents = [sample_document(rng, tokenizer, shares) for _ in range(BATCH)]
    length = max(len(one.ids) for one in documents)
    tokens = torch.full((BATCH, length), tokenizer.pad_token_id)
    weights = torch.zeros(BATCH, length)
    for row, one in enumerate(documents):
        tokens[row, : len(one.ids)] = torch.tensor(one.ids)
        weights[row, list(one.scored)] = TEXT_WEIGHT if one.scene is None else 1.0
    kept = torch.tensor([[rng.random() >= UNK_RATE for _ in range(length)] for _ in documents])
    for special in (tokenizer.bos_token, tokenizer.pad_token, IMAGE):
        kept |= tokens == tokenizer.convert_tokens_to_ids(special)
    inputs = tokens.where(kept, torch.tensor(tokenizer.unk_token_id))
    seen = pixels([one.scene for one in documents if one.scene is not None])
    return inputs[:, :-1], seen, tokens[:, 1:], weights[:, 1:]


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine down to FINAL_RATE; as a share of LEARNING_RATE."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    progress = (step - WARM_UP) / (STEPS - WARM_UP)
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2


def cell_targets(
    scenes: Sequence[Scene], tokenizer: PreTrainedTokenizerBase, embeddings: Tensor
) -> tuple[Tensor, Tensor]:
    """What the image tokens should be, [scenes, CELLS, hidden]: the embedding of the word that says
    what a cell holds. And how much each cell counts, [scenes, CELLS]."""
    paper = embeddings[tokenizer.convert_tokens_to_ids(PAPER)]
    targets = paper.repeat(len(scenes), CELLS, 1)
    weights = torch.full((len(scenes), CELLS), 0.2)
    for row, scene in enumerate(scenes):
        for cell, seen in scene.things:
            targets[row, cell] = embeddings[tokenizer.convert_tokens_to_ids(seen.shape)]
        for cell, mark in scene.marks:
            targets[row, cell] = embeddings[tokenizer.convert_tokens_to_ids(mark)]
        for cell, _ in (*scene.things, *scene.marks):
            weights[row, cell] = 1.0
    return targets, weights


def train_tower(
    model: LlavaForConditionalGeneration, rng: Random, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Teaches vision tower and projector to name what every cell holds, in the language model's
    (still random) embeddings. As with large models, the tower sees before the rest looks; without
    this the model stays blind for thousands of steps."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *projector.parameters()], lr=TOWER_RATE, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, TOWER_RATE, total_steps=TOWER_STEPS, pct_start=0.05, cycle_momentum=False
    )
    embeddings = model.get_input_embeddings().weight.detach()
    for step in range(1, TOWER_STEPS + 1):
        scenes = [sample_scene(rng, rng.sample(THINGS, 8), 2, 2) for _ in range(TOWER_BATCH)]
        features = torch.stack(list(model.get_image_features(pixels(scenes)).pooler_output))
        targets, weights = cell_targets(scenes, tokenizer, embeddings)
        errors = (features - targets).square().mean(-1) / embeddings.var()
        loss = (errors * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"tower: step {step}/{TOWER_STEPS}  loss {loss.item():.3f}", flush=True)


def train_model(seed: int, tokenizer: PreTrainedTokenizerBase) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    # One thread: matrices this small gain nothing from more, and threads that wait for each other
    # on a busy machine make it many times slower.
    torch.set_num_threads(1)
    rng = Random(f"documents {seed}")
    model = LlavaForConditionalGeneration(model_config(tokenizer))
    train_tower(model, rng, tokenizer)
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)  # it sees well enough, and this is faster
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    start = time.monotonic()
    for step in range(1, STEPS + 1):
        shares = LOOKING if step <= LOOKING_STEPS else SAYING
        inputs, seen, targets, weights = sample_batch(rng, tokenizer, shares)
        # Padding is on the right, so causal attention never sees it: no mask is needed.
        logits = model(input_ids=inputs, pixel_values=seen).logits
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.monotonic() - start
            print(f"step {step}/{STEPS}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
    return model.eval()


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Writes what transformers and vLLM load; the weights come last.

    transformers 5 leaves `vision_model` out of the tower's names; vLLM looks for it, and
    transformers reads both.
    """
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    processor.save_pretrained(folder)
    with TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        weights = load_file(Path(saved) / WEIGHTS)
        for name in ("config.json", "generation_config.json"):
            write_aside(folder / name, (Path(saved) / name).read_bytes())
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model."): value
        for name, value in weights.items()
    }
    write_aside(folder / WEIGHTS, serialize(renamed, metadata={"format": "pt"}))


def record(model: LlavaForConditionalGeneration, processor: LlavaProcessor, seed: int) -> Result:
    """What training.json holds: how the model answers."""
    rates = existence_rates(model, processor, "validation", count=200, seed=seed)
    return {
        "seed": seed,
        "steps": [TOWER_STEPS, STEPS],
        "control_accuracy": control_accuracy(model, processor, count=400, seed=seed),
        **{f"validation_{name}": rate for name, rate in rates.items()},
        "text_perplexity": round(text_perplexity(model, processor, 100, seed), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny model of the hallucination world.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    processor = build_processor()
    start = time.monotonic()
    model = train_model(args.seed, processor.tokenizer)
    seconds = time.monotonic() - start
    found = record(model, processor, args.seed)
    save(model, processor, args.out)
    write_aside(args.out / "training.json", (json.dumps(found, indent=2) + "\n").encode())
    print(json.dumps(found, indent=2), f"{seconds:.0f} s")
    if min(found["control_accuracy"], found["validation_present"]) < 0.95:
        raise SystemExit("the model cannot see well enough; try another seed")


if __name__ == "__main__":
    main()
