"""Train the tiny model: `python -m benchmarks.hallucination.train --out DIR --seed 1`.

A few minutes on one core.
"""

from __future__ import annotations

import sys
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
from transformers import (
    CLIPVisionConfig,
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
from benchmarks.tiny import training
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
COURSE = training.Course(steps=1100, rate=1.5e-3, warm_up=50, final=0.02)  # of both
BATCH = 64
TEXT_WEIGHT = 0.1  # of a token of general text; an answer's weigh 1


def model_config(tokenizer: PreTrainedTokenizerBase) -> LlavaConfig:
    """A LLaVA of about 0.4 million parameters."""
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
        text_config=training.tiny_llama(tokenizer),
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


def sample_batch(rng: Random, tokenizer: PreTrainedTokenizerBase, shares: Shares) -> training.Batch:
    documents = [sample_document(rng, tokenizer, shares) for _ in range(BATCH)]
    length = max(len(one.ids) for one in documents)
    tokens = torch.full((BATCH, length), tokenizer.pad_token_id)
    weights = torch.zeros(BATCH, length)
    for row, one in enumerate(documents):
        tokens[row, : len(one.ids)] = torch.tensor(one.ids)
        weights[row, list(one.scored)] = TEXT_WEIGHT if one.scene is None else 1.0
    kept = torch.tensor(
        [[rng.random() >= training.UNK_RATE for _ in range(length)] for _ in documents]
    )
    for special in (tokenizer.bos_token, tokenizer.pad_token, IMAGE):
        kept |= tokens == tokenizer.convert_tokens_to_ids(special)
    inputs = tokens.where(kept, torch.tensor(tokenizer.unk_token_id))
    seen = pixels([one.scene for one in documents if one.scene is not None])
    forward = {"input_ids": inputs[:, :-1], "pixel_values": seen}
    return forward, tokens[:, 1:], weights[:, 1:]


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
            line = f"tower: step {step}/{TOWER_STEPS}  loss {loss.item():.3f}"
            print(line, file=sys.stderr, flush=True)


def train_model(seed: int, tokenizer: PreTrainedTokenizerBase) -> LlavaForConditionalGeneration:
    """A trained model in evaluation mode; progress goes to stderr."""
    training.start(seed)
    rng = Random(f"documents {seed}")
    model = LlavaForConditionalGeneration(model_config(tokenizer))
    train_tower(model, rng, tokenizer)
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)  # it sees well enough, and this is faster

    def batch(step: int) -> training.Batch:
        return sample_batch(rng, tokenizer, LOOKING if step <= LOOKING_STEPS else SAYING)

    training.train(model, COURSE, batch)
    model.generation_config = training.greedy(tokenizer)
    return model.eval()


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Writes what transformers and vLLM load; the weights come last.

    transformers 5 leaves `vision_model` out of the tower's names; vLLM looks for it, and
    transformers reads both.
    """
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
        "steps": [TOWER_STEPS, COURSE.steps],
        "control_accuracy": control_accuracy(model, processor, count=400, seed=seed),
        **{f"validation_{name}": rate for name, rate in rates.items()},
        "text_perplexity": round(text_perplexity(model, processor, 100, seed), 4),
    }


def main() -> None:
    args = training.arguments("Train the tiny model of the hallucination world.")
    processor = build_processor()
    model = train_model(args.seed, processor.tokenizer)
    found = record(model, processor, args.seed)
    save(model, processor, args.out)
    training.record(args.out, found, "control_accuracy", "validation_present")


if __name__ == "__main__":
    main()
