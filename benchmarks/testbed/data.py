"""The sets of one seed: pairs to steer with, and what validation and test are judged on."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.testbed.worlds import World
from offline.model import Decoder
from offline.pairs import PairSet, load_pairs
from offline.scoring import Suite
from offline.suite import load_suite

TEST_SEED = 1000  # added to the seed of what has no splits, so that test repeats nothing


@dataclass(frozen=True)
class Sizes:
    """Numbers of training pairs, and of (pairs, controls, texts) to judge on."""

    train: int = 50
    validation: tuple[int, int, int] = (200, 150, 60)
    test: tuple[int, int, int] = (500, 400, 200)


@dataclass(frozen=True)
class Sets:
    """Attributes: train: as read from its file; validation, test: as the model sees them."""

    train: PairSet
    validation: Suite
    test: Suite


def make_sets(world: World, decoder: Decoder, seed: int, folder: Path, sizes: Sizes) -> Sets:
    """Writes the world's files into `folder` and reads them back as a user's would be."""
    folder.mkdir(parents=True, exist_ok=True)
    world.write_pairs(folder / "train.jsonl", "train", sizes.train, seed)
    return Sets(
        load_pairs(str(folder / "train.jsonl")),
        _suite(world, decoder, "validation", seed, folder, sizes.validation),
        _suite(world, decoder, "test", seed + TEST_SEED, folder, sizes.test),
    )


def _suite(
    world: World, decoder: Decoder, split: str, seed: int, folder: Path, sizes: tuple[int, int, int]
) -> Suite:
    pairs, controls, texts = (
        folder / f"{split}-{kind}.jsonl" for kind in ("pairs", "controls", "texts")
    )
    world.write_pairs(pairs, split, sizes[0], seed)
    world.write_controls(controls, sizes[1], seed)
    world.write_texts(texts, sizes[2], seed)
    loaded = load_suite(
        load_pairs(str(pairs)), decoder.tokenizer, decoder.text_config, controls, texts
    )
    return loaded.suite
