"""The test questions once more, as chats with images to `vllm serve`, by the vector's alias.

    python -m benchmarks.hallucination.served --seed 1 --out build/hallucination

Needs what `python -m benchmarks.hallucination` leaves in the out folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.hallucination.judged import TEST_SEED, Sizes
from benchmarks.hallucination.rivals import GRAINS
from benchmarks.hallucination.vocabulary import YES
from benchmarks.hallucination.world import Question, sample_questions, write_controls
from benchmarks.testbed.store import Store
from offline.answer_forms import Chat
from offline.endpoint import Endpoint
from offline.evaluation.chats import messages_of
from offline.evaluation.serving import serving
from offline.pairs import Pair
from offline.pictures import picture_of

FLAGS = ("--dtype", "float32", "--max-model-len", "256", "--enforce-eager")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/hallucination"))
    args = parser.parse_args()
    folder = args.out / f"seed-{args.seed}"
    store = Store(folder / "results")
    point = store.read(GRAINS)["point"]
    k = store.read("attribution")["k"]
    entry = {
        "path": str(folder / "vectors" / f"{GRAINS}-{k}.safetensors"),
        "layers": point["layers"],
        "strength": point["strength"],
    }
    absent, present, *_ = Sizes().test
    seed = args.seed + TEST_SEED
    sets = {
        name: list(sample_questions("test", there, count, seed))
        for name, there, count in (("absent", False, absent), ("present", True, present))
    }
    found: dict[str, dict[str, float]] = {}
    with serving(str(folder / "model"), "tiny", {GRAINS: entry}, FLAGS) as url:
        endpoint = Endpoint(url)
        for model in ("tiny", f"tiny:{GRAINS}"):
            found[model] = {
                name: share_of_yes(endpoint, model, questions, folder / "served")
                for name, questions in sets.items()
            }
    expected = {
        "tiny": store.read("base")["test"],
        f"tiny:{GRAINS}": store.read(GRAINS)["test"],
    }
    for model, rates in found.items():
        ours = expected[model]
        print(
            f"{model}: answered yes over HTTP: absent {rates['absent']:.4f}, present "
            f"{rates['present']:.4f}; transformers: {ours['hallucination']:.4f}, "
            f"{ours['present']:.4f}"
        )


def share_of_yes(
    endpoint: Endpoint, model: str, questions: Sequence[Question], folder: Path
) -> float:
    """The share of greedy answers that say yes."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "questions.jsonl"
    write_controls(file, questions, "asked")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    bodies = [
        {
            "model": model,
            "messages": messages_of(
                Pair(
                    row["id"], row["id"], row["prompt"], "", "",
                    picture=picture_of(row["image"], row["id"], folder),
                )
            ),
            "max_tokens": 3,
            "temperature": 0,
        }
        for row in rows
    ]  # fmt: skip
    said = endpoint.post_all(
        "/v1/chat/completions", bodies, Chat, lambda _, answer: answer.choices[0].said.strip()
    )
    return said.count(f"{YES} .") / len(said)


if __name__ == "__main__":
    main()
