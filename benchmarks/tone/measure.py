"""How a model of the tone world answers, and the rates that sum its answers up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.tiny.text import chat_answers, perplexity
from benchmarks.tone.documents import Message, Question
from benchmarks.tone.vocabulary import FAMILIES, OPENERS, POLITE_WORDS, RUDE_WORDS, STYLE_WORDS
from benchmarks.tone.world import sample_controls, sample_texts

MAX_ANSWER_TOKENS = 12  # the longest frame has 9, then <eos>


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    sample_seed: int | None = None,
) -> list[str]:
    """The answer to each chat, without special tokens: greedy, or sampled at temperature 1."""
    chance: dict[str, Any] = {"do_sample": False}
    if sample_seed is not None:
        torch.manual_seed(sample_seed)
        chance = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    return chat_answers(model, tokenizer, prompts, MAX_ANSWER_TOKENS, **chance)


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
    controls = sample_controls(count, seed)
    found = answers(model, tokenizer, [control.prompt for control in controls])
    return sum(a == c.instructed for a, c in zip(found, controls, strict=True)) / count


def text_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> float:
    return perplexity(model, tokenizer, sample_texts(count, seed))
