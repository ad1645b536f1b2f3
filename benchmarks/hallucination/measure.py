"""How a model of the tiny world answers: greedy answers, and the rates that sum them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.hallucination.drawing import picture
from benchmarks.hallucination.vocabulary import NO, YES
from benchmarks.hallucination.world import (
    Question,
    Split,
    sample_controls,
    sample_questions,
    sample_texts,
)
from benchmarks.tiny.text import perplexity

MAX_ANSWER_TOKENS = 3  # word, full stop, <eos>


@torch.inference_mode()
def greedy_answers(
    model: Any, processor: Any, questions: Sequence[Question], batch_size: int = 64
) -> list[str]:
    """The greedy answer to each question, without special tokens: `no .`"""
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        part = questions[start : start + batch_size]
        texts = [
            processor.apply_chat_template(
                question.messages, add_generation_prompt=True, tokenize=False
            )
            for question in part
        ]
        batch = processor(
            images=[picture(question.scene) for question in part],
            text=texts,
            padding=True,
            add_special_tokens=False,
            return_tensors="pt",
        )
        output = model.generate(
            **batch, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False, num_beams=1
        )
        generated = output[:, batch["input_ids"].shape[1] :]
        answers += processor.batch_decode(generated, skip_special_tokens=True)
    return answers


def right_answers(model: Any, processor: Any, questions: Sequence[Question]) -> float:
    """Share of questions answered exactly as they should be."""
    answers = greedy_answers(model, processor, questions)
    right = sum(a == q.instructed for a, q in zip(answers, questions, strict=True))
    return right / len(questions)


def control_accuracy(model: Any, processor: Any, count: int, seed: int) -> float:
    return right_answers(model, processor, sample_controls(count, seed))


def existence_rates(
    model: Any, processor: Any, split: Split, count: int, seed: int
) -> dict[str, float]:
    """Over things that are not there, the shares of yes (hallucinated) and of no; over things that
    are, the share of yes (present)."""
    absent = list(sample_questions(split, False, count, seed))
    answers = greedy_answers(model, processor, absent)
    present = list(sample_questions(split, True, count, seed))
    return {
        "hallucinated": answers.count(f"{YES} .") / count,
        "denied": answers.count(f"{NO} .") / count,
        "present": right_answers(model, processor, present),
    }


def text_perplexity(model: Any, processor: Any, count: int, seed: int) -> float:
    return perplexity(model, processor.tokenizer, sample_texts(count, seed))
