"""The preference pairs that steer in the tone world, and what steering is judged on.

Functions that write files take (path, count, seed), `write_pairs` a split as well.

    python -m benchmarks.tone.world --split train --n 50 --seed 1 --out pairs.jsonl
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Literal

from benchmarks.tiny.files import write_pairs_command, write_rows
from benchmarks.tone.documents import (
    Question,
    sample_answer,
    sample_control,
    sample_question,
    sample_text,
)
from benchmarks.tone.vocabulary import HARSH, ITEMS, MILD, POLITE, TONES

Split = Literal["train", "validation", "test"]

# The model is trained on questions about all items; the pairs of two splits share none.
SPLIT_ITEMS: dict[str, tuple[str, ...]] = {
    "train": ITEMS[:-16],
    "validation": ITEMS[-16:-8],
    "test": ITEMS[-8:],
}


def sample_pairs(split: Split, count: int, seed: int) -> Iterator[tuple[Question, str, str]]:
    """(question, polite answer, rude answer): as many harsh as mild cues or one more, the answers
    drawn independently, every style slot polite or every one rude."""
    rng = Random(f"tone pairs {split} {seed}")
    seen: set[Question] = set()
    while len(seen) < count:
        question = sample_question(rng, SPLIT_ITEMS[split])
        words = question.system + question.user
        harsh, mild = (sum(word in cues for word in words) for cues in (HARSH, MILD))
        if mild == 0 or harsh - mild not in (0, 1) or question in seen:
            continue
        seen.add(question)
        polite = sample_answer(rng, question, [float(tone == POLITE) for tone in TONES])
        yield question, polite, sample_answer(rng, question, [0.0, *question.tone_weights[1:]])


def sample_controls(count: int, seed: int) -> list[Question]:
    rng = Random(f"tone controls {seed}")
    return [sample_control(rng) for _ in range(count)]


def sample_texts(count: int, seed: int) -> list[str]:
    """General text, for perplexity."""
    rng = Random(f"tone text {seed}")
    return [sample_text(rng) for _ in range(count)]


def planted(tokens: Sequence[str]) -> tuple[set[int], set[int]]:
    """Positions of the cues that push to the polite and to the rude answer."""
    polite = {index for index, word in enumerate(tokens) if word in MILD}
    return polite, {index for index, word in enumerate(tokens) if word in HARSH}


def write_pairs(path: Path, split: Split, count: int, seed: int) -> None:
    """One JSON object per line: id, prompt (chat messages), chosen and rejected answers."""
    rows = [
        {
            "id": f"{split}-{seed}-{index:04d}",
            "prompt": question.prompt,
            "chosen": polite,
            "rejected": rude,
        }
        for index, (question, polite, rude) in enumerate(sample_pairs(split, count, seed))
    ]
    write_rows(path, rows)


def write_controls(path: Path, count: int, seed: int) -> None:
    """One JSON object per line: prompt (chat messages) and the one right completion."""
    controls = sample_controls(count, seed)
    write_rows(path, ({"prompt": c.prompt, "completion": c.instructed} for c in controls))


def write_texts(path: Path, count: int, seed: int) -> None:
    """One JSON object per line: general text."""
    write_rows(path, ({"text": text} for text in sample_texts(count, seed)))


if __name__ == "__main__":
    write_pairs_command("tone", SPLIT_ITEMS, write_pairs)
