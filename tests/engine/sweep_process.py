"""Scores with one vLLM engine and with transformers, in a process of its own; writes JSON."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")

LENGTH = 110  # of the longest item in `tricky`


def tricky() -> list[Any]:
    """Items that share whole blocks of 32 tokens, also such that hold the start of an answer."""
    from offline.scoring import Item

    ids = [(7 * n) % 150 + 8 for n in range(200)]
    items = []
    for prompt in (1, 20, 31, 32, 33, 64, 70):  # 32 and 64: the last prompt token ends a block
        start, common = tuple(ids[:prompt]), tuple(ids[prompt : prompt + 36])
        items += [
            Item(start, (9, 10, 11)),
            Item(start, (12, 13)),
            Item(start, (*common, 14, 15)),  # answers alike over a block's end
            Item(start, (*common, 16)),
            Item(start, (*common, 16)),  # the same again
        ]
    return items


def main(folder: Path, result_path: Path) -> None:
    from random import Random

    from benchmarks.sycophancy import world
    from grains_vllm.vectors import SteeringVector
    from offline.backends import transformers_back_end
    from offline.engine_scorer import EngineScorer
    from offline.errors import InputError
    from offline.grid import grid
    from offline.pairs import load_pairs
    from offline.scoring import Point, Suite
    from offline.suite import load_suite
    from offline.sweep import Limits, sweep
    from offline.transformers_scorer import TransformersScorer

    model = Path(world.__file__).parent / "model"
    back_end = transformers_back_end(str(model), "float32", "cpu")
    assert back_end.decoder is not None
    vectors = {name: SteeringVector.load(folder / f"{name}.safetensors") for name in ("one", "two")}
    places = "all,prompt,generation,prompt:1+generation,prompt:3+generation:2"
    points = grid(vectors, "2;1-3", "0,0.2,-0.4", places)
    rng = Random(0)
    world.write_pairs(folder / "pairs.jsonl", "validation", 20, 1)
    controls = [world.sample_control(rng) for _ in range(10)]
    lines = [{"prompt": control.prompt, "completion": control.instructed} for control in controls]
    (folder / "controls.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "texts.txt").write_text("".join(world.sample_text(rng) + "\n" for _ in range(5)))
    suite = load_suite(
        load_pairs(str(folder / "pairs.jsonl")), back_end.tokenizer, back_end.config,
        folder / "controls.jsonl", folder / "texts.txt",
    ).suite  # fmt: skip

    by_hooks = TransformersScorer(back_end.decoder, vectors)
    engine = EngineScorer(str(model), vectors, points, LENGTH, {"dtype": "float32"})
    asked: list[int] = []
    run = engine._run

    def counted(items: Any, points: Any, jobs: Any, share: bool, found: Any) -> None:
        asked.append(len(jobs))
        run(items, points, jobs, share, found)
        assert share or len(jobs) == 0 or all(job in found for job in jobs)

    engine._run = counted  # type: ignore[method-assign]
    items, result = tricky(), {}
    for name, scorer in (("transformers", by_hooks), ("vllm", engine)):
        scores = dict(scorer.score(items, [None, *points]))
        result["asked"] = list(asked)
        result[name] = {
            "tricky": [[asdict(score) for score in scores[n]] for n in range(len(points) + 1)],
            "sweep": sweep(scorer, suite, points, "margin", Limits(0.9, 0.05)),
        }
    assert isinstance(suite, Suite)
    result["share"] = engine._share
    result["items"], result["points"] = len(items), len(points) + 1
    try:
        list(engine.score(items, [Point("one", (0,), 0.1)]))
    except InputError as error:
        result["refused"] = str(error)
    result_path.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
