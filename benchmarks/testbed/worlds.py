"""A world by name: how to train its models, and what is said in it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from offline.model import Decoder, load_decoder

NAMES = ("sycophancy", "tone")


@dataclass(frozen=True)
class World:
    """What every world offers.

    Attributes:
        train_model: (seed, tokenizer) -> a causal language model.
        write_pairs: (path, split, count, seed); splits are train, validation and test.
        write_controls: (path, count, seed): prompts with one right response.
        write_texts: (path, count, seed): general text.
        planted: (prompt tokens) -> positions whose tokens speak for chosen, and for rejected.
        metric: what chooses points (see offline.sweep.METRICS); `exact` where a prompt has one
            answer of each kind, `accuracy` where answers vary.
        judged: (model, tokenizer, test prompts, seed) -> figures of its greedy answers, or None.
    """

    name: str
    build_tokenizer: Callable[[], Any]
    train_model: Callable[[int, Any], Any]
    write_pairs: Callable[[Path, Any, int, int], None]
    write_controls: Callable[[Path, int, int], None]
    write_texts: Callable[[Path, int, int], None]
    planted: Callable[[list[str]], tuple[set[int], set[int]]]
    metric: str
    judged: Callable[[Any, Any, int, int], dict[str, float]] | None = None

    def model(self, seed: int, folder: Path) -> Decoder:
        """The model of `seed`, trained if `folder` does not hold it yet."""
        if not (folder / "model.safetensors").is_file():
            tokenizer = self.build_tokenizer()
            model = self.train_model(seed, tokenizer)
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)  # last: this file says that all are there
        return load_decoder(str(folder), device="cpu")


def load_world(name: str) -> World:
    """`name` is one of NAMES."""
    vocabulary, train, world = (
        import_module(f"benchmarks.{name}.{part}") for part in ("vocabulary", "train", "world")
    )
    functions = (
        vocabulary.build_tokenizer, train.train_model, world.write_pairs, world.write_controls,
        world.write_texts, world.planted,
    )  # fmt: skip
    measure = import_module(f"benchmarks.{name}.measure")
    if not hasattr(measure, "judge"):
        return World(name, *functions, metric="exact")

    def judged(model: Any, tokenizer: Any, count: int, seed: int) -> dict[str, float]:
        questions = [row[0] for row in world.sample_pairs("test", count, seed)]
        prompts = [question.prompt for question in questions]
        return measure.judge(measure.answers(model, tokenizer, prompts), questions)

    return World(name, *functions, metric="accuracy", judged=judged)
