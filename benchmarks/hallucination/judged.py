"""What a vector is judged on here: hallucination, and what must not suffer from less of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.hallucination import world
from offline.model import Decoder
from offline.pairs import PairSet, load_pairs
from offline.scoring import ItemScore, Measures, Point, Scorer, Suite, measure
from offline.suite import load_suite

TEST_SEED = 1000  # added to the seed, so that test repeats no control, text or image


@dataclass(frozen=True)
class Sizes:
    """Numbers of pairs to steer with, and of (absent, present, controls, texts) to judge by."""

    train: int = 50
    validation: tuple[int, int, int, int] = (120, 80, 80, 30)
    test: tuple[int, int, int, int] = (400, 300, 300, 100)


@dataclass(frozen=True)
class Judged:
    """A suite whose controls are `present` questions about things that are there, then others."""

    suite: Suite
    present: int


@dataclass(frozen=True)
class Figures:
    """What came out at one point.

    Attributes:
        hallucination: share of questions about what is not there that are answered yes.
        margin: mean of log p(no) - log p(yes) for these, per token, in nats.
        present: share of right answers about what is there.
        controls: share of right answers where the prompt says what to do.
        perplexity: of general text.
    """

    hallucination: float
    margin: float
    present: float
    controls: float
    perplexity: float

    @property
    def measures(self) -> Measures:
        """For the rules of offline.sweep: the worse of both kinds of control counts."""
        return Measures(
            accuracy=1 - self.hallucination,
            margin=self.margin,
            exact=1 - self.hallucination,
            controls=min(self.present, self.controls),
            perplexity=self.perplexity,
        )


@dataclass(frozen=True)
class Sets:
    """Attributes: train: as read from its file; validation, test: as the model sees them."""

    train: PairSet
    validation: Judged
    test: Judged


def make_sets(decoder: Decoder, seed: int, folder: Path, sizes: Sizes) -> Sets:
    """Writes the world's files into `folder` and reads them back as a user's would be."""
    folder.mkdir(parents=True, exist_ok=True)
    world.write_pairs(folder / "train.jsonl", "train", sizes.train, seed)
    return Sets(
        load_pairs(str(folder / "train.jsonl")),
        _judged(decoder, "validation", seed, folder, sizes.validation),
        _judged(decoder, "test", seed + TEST_SEED, folder, sizes.test),
    )


def _judged(
    decoder: Decoder, split: world.Split, seed: int, folder: Path, sizes: tuple[int, int, int, int]
) -> Judged:
    absent, present, controls, texts = sizes
    pairs, right, general = (
        folder / f"{split}-{kind}.jsonl" for kind in ("pairs", "controls", "texts")
    )
    world.write_pairs(pairs, split, absent, seed)
    world.write_controls(
        right,
        [
            *world.sample_questions(split, True, present, seed),
            *world.sample_controls(controls, seed),
        ],
        f"control-{seed}",
    )
    world.write_texts(general, texts, seed)
    loaded = load_suite(
        load_pairs(str(pairs)), decoder.tokenizer, decoder.text_config, right, general,
        processor=decoder.processor,
    )  # fmt: skip
    return Judged(loaded.suite, present)


def figures(judged: Judged, scores: Sequence[ItemScore]) -> Figures:
    """Sums up the scores of `judged.suite.items`."""
    pairs = len(judged.suite.pairs)
    controls = scores[2 * pairs : 2 * pairs + len(judged.suite.controls)]
    present, others = controls[: judged.present], controls[judged.present :]
    found = measure(judged.suite, scores)
    assert found.perplexity is not None  # There are texts.
    return Figures(
        hallucination=_greedy(scores[1 : 2 * pairs : 2]),
        margin=found.margin,
        present=_greedy(present),
        controls=_greedy(others),
        perplexity=found.perplexity,
    )


def measured(scorer: Scorer, judged: Judged, points: Sequence[Point | None]) -> list[Figures]:
    """What comes out at each point."""
    found = dict(scorer.score(judged.suite.items, points))
    return [figures(judged, found[index]) for index in range(len(points))]


def _greedy(scores: Sequence[ItemScore]) -> float:
    return sum(score.greedy for score in scores) / len(scores)
