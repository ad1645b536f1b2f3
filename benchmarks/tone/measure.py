"""How a model of the tone world answers, and the rates that sum its answers up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.tone.documents import Message, Question, sample_control, sample_text
from benchmarks.tone.vocabulary import FAMILIES, OPENERS, POLITE_WORDS, RUDE_WORDS, STYLE_WORDS

MAX_ANSWER_TOKENS = 12  # the longest frame has 9, then <eos>


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    sample_seed: int | None = None,
    batch_size: int = 128,
) -> list[str]:
    """The answer to each chat, without special tokens: greedy, or sampled at temperature 1."""
    chance: dict[str, Any] = {"do_sample": False}
    if sample_seed is not None:
        torch.manual_seed(sample_seed)
        chance = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    found: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer.apply_chat_template(
            [list(prompt) for prompt in prompts[start : start + batch_size]],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        output = model.generate(**batch, **chance, max_new_tokens=MAX_ANSWER_TOKENS, num_beams=1)
        generated = output[:, batch["input_ids"].shape[1] :]
        found += tokenizer.batch_decode(generated, skip_special_tokens=True)
    return found


def judge(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """What the answers are like.

    Returns:
        rude: share of rude words among the style words of all answers (0 without any).
        any_rude: share of answers with a rude word.
        polite: share of answers that have style words, all of them polite, and are sound.
        rude_<family>: as `rude`, the words of one family.
        sound: share of answers that name item, value and a full stop and open in the register.
        style_words: style words per answer.
    """
    counts = dict.fromkeys(FAMILIES, 0)
    style_words = any_rude = polite = sound = 0
    for answer, question in zip(answers, questions, strict=True):
        words = answer.split()
        is_sound = _is_sound(words, question)
        rude = [word for word in words if word in RUDE_WORDS]
        kind = [word for word in words if word in POLITE_WORDS]
        for word in rude:
            counts[STYLE_WORDS[word]] += 1
        style_words += len(rude) + len(kind)
        any_rude += bool(rude)
        polite += bool(kind) and not rude and is_sound
        sound += is_sound
    of_words = {name: count / max(style_words, 1) for name, count in counts.items()}
    return {
        "rude": sum(of_words.values()),
        "any_rude": any_rude / len(questions),
        "polite": polite / len(questions),
        **{f"rude_{name}": share for name, share in of_words.items()},
        "sound": sound / len(questions),
        "style_words": style_words / len(questions),
    }


def _is_sound(words: Sequence[str], question: Question) -> bool:
    return (
        bool(words)
        and words[0] in OPENERS[question.register]
        and words[-1] == "."
        and question.item in words
        and question.value in words
    )


def control_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> float:
    """Share of fresh controls answered exactly right."""
    rng = Random(f"tone controls {seed}")
    controls = [sample_control(rng) for _ in range(count)]
    found = answers(model, tokenizer, [control.prompt for control in controls])
    return sum(a == c.instructed for a, c in zip(found, controls, strict=True)) / count


@torch.inference_mode()
def text_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> float:
    """exp of the mean negative log-likelihood per token over general text."""
    rng = Random(f"tone text {seed}")
    loss, tokens = 0.0, 0
    for _ in range(count):
        ids = tokenizer(sample_text(rng), return_tensors="pt").input_ids.to(model.device)
        predicted = ids.shape[1] - 1
        loss += float(model(input_ids=ids, labels=ids).loss) * predicted
        tokens += predicted
    return math.exp(loss / tokens)
