"""What each choice inside GrAInS is worth: one change at a time, chosen and judged as ever.

python -m benchmarks.testbed.ablations --seeds 1 2 --out build/testbed
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.testbed.choice import choose_point, measured, measures_json, point_json
from benchmarks.testbed.data import Sizes
from benchmarks.testbed.figures import completeness, hit_rates
from benchmarks.testbed.methods import OPTIONS, Draws, extracted
from benchmarks.testbed.show import ablation_table, tell
from benchmarks.testbed.store import Result
from benchmarks.testbed.study import Study
from benchmarks.testbed.summary import created_with, spread
from benchmarks.testbed.worlds import NAMES, load_world
from grains_vllm.vectors import write_aside
from offline.options import (
    AttributionMethod,
    Baseline,
    Direction,
    ExtractOptions,
    Mask,
    Mode,
    Objective,
    Read,
)
from offline.pairs import load_pairs

DEFAULT = "default"
CHOSEN = "the variant that validation chooses"
_MASKED: dict[str, Any] = {"baseline": Baseline.mask_token, "mask": Mask.baseline}


def variants() -> dict[str, tuple[int, ExtractOptions]]:
    """(number of pairs, options) by name; the default is what the testbed's GrAInS is."""
    pairs = Sizes().train
    changes: dict[str, dict[str, Any]] = {
        DEFAULT: {},
        **{f"k = {k}": {"k": k} for k in (1, 2, 5, 10)},
        "estimator: pca": {"direction": Direction.pca},
        "estimator: pca-centered": {"direction": Direction.pca_centered},
        "v+ alone": {"mode": Mode.positive},
        "objective: sum": {"objective": Objective.sum},
        "objective: first-token": {"objective": Objective.first_token},
        "baseline: zero": {"baseline": Baseline.zero},
        "baseline: mask-token": _MASKED,
        "first-token and mask-token": {"objective": Objective.first_token, **_MASKED},
        "mask: mask-token": {"mask": Mask.mask_token},
        "mask: attention": {"mask": Mask.attention},
        "read: response-start": {"read": Read.response_start},
        "read: response-end": {"read": Read.response_end},
        "gradient x input": {"attribution": AttributionMethod.gradient_x_input},
        "SmoothGrad": {"attribution": AttributionMethod.smoothgrad},
        "random scores": {"attribution": AttributionMethod.random},
    }
    found = {name: (pairs, replace(OPTIONS, **change)) for name, change in changes.items()}
    return found | {f"N = {count}": (count, OPTIONS) for count in (10, 25, 100)}


def run(study: Study) -> dict[str, Result]:
    """Every variant on one seed; what is on disk is not computed again."""
    results = {}
    for name, (count, options) in variants().items():
        slug = "".join(c if c.isalnum() else "-" for c in name)
        results[name] = study.store.kept(
            f"ablation-{slug}", partial(_measure, study, slug, count, options)
        )
        study.note(f"ablation {name}")
    return results


def _measure(study: Study, slug: str, count: int, options: ExtractOptions) -> Result:
    folder = study.folder / "ablations"
    folder.mkdir(exist_ok=True)
    data = folder / f"train-{count}.jsonl"
    study.world.write_pairs(data, "train", count, study.seed)
    vector, records = extracted(
        study.decoder, load_pairs(str(data)), options, folder / f"{slug}.safetensors"
    )
    scorer = study.scorer({slug: vector})
    # Coarse, then fine: there are many variants.
    choice = choose_point(
        scorer, study.sets.validation, slug, study.layers, study.world.metric, coarse=True
    )
    reports = [measures_json(m) for m in measured(scorer, study.sets.test, [choice.point])]
    return {
        "options": {"pairs": count, **{k: v for k, v in asdict(options).items()}},
        "used": sum(record["used"] for record in records),
        "point": point_json(choice.point),
        "validation": measures_json(choice.validation[0]),
        "test": reports[0],
        **hit_rates(records, study.world.planted),
        **completeness(records),
    }


def document(world: str, metric: str, seeds: dict[int, dict[str, Result]]) -> dict[str, Any]:
    """Means over seeds, as "grains-baselines", with every seed's result."""
    rows = []
    first = next(iter(seeds.values()))
    for name in [*first, CHOSEN]:
        figures: dict[str, list[float]] = {}
        for results in seeds.values():
            found = results[best(results, metric) if name == CHOSEN else name]
            row = {metric: found["test"][metric], **{c: found.get(c) for c in _COLUMNS}}
            for column, value in row.items():
                if value is not None:
                    figures.setdefault(column, []).append(value)
        rows.append({"method": name, "values": {c: spread(v) for c, v in figures.items()}})
    better = {metric: True, **_COLUMNS}
    return {
        "kind": "grains-baselines",
        "version": 1,
        "title": f"GrAInS in the {world} world, one change at a time",
        "note": f"means over seeds {', '.join(map(str, seeds))}; a point of its own for each row",
        "columns": [{"name": c, "higher_is_better": b} for c, b in better.items()],
        "rows": rows,
        "chosen": {str(seed): best(results, metric) for seed, results in seeds.items()},
        "seeds": {str(seed): results for seed, results in seeds.items()},
        "created_with": created_with(),
    }


def best(results: Mapping[str, Result], metric: str) -> str:
    """The variant that validation likes best: metric, then margin, then the default."""

    def rank(name: str) -> tuple[float, float, bool]:
        found = results[name]["validation"]
        if found is None:
            return (-1.0, 0.0, False)
        return found[metric], found["margin"], name == DEFAULT

    return max(results, key=rank)


_COLUMNS = {
    "positive_top1": True,
    "negative_top1": True,
    "positive_top3": True,
    "negative_top3": True,
    "gap_median": False,
    "gap_max": False,
    "points_median": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", choices=NAMES, default="sycophancy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("build/testbed"))
    parser.add_argument("--result", type=Path, help="write the table here too (JSON)")
    args = parser.parse_args()
    world = load_world(args.world)
    seeds = {}
    for seed in args.seeds:
        study = Study(
            world, seed, args.out / args.world / f"seed-{seed}", Sizes(), Draws(),
            note=partial(tell, seed),
        )  # fmt: skip
        seeds[seed] = run(study)
    found = document(args.world, world.metric, seeds)
    payload = json.dumps(found, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
    write_aside(args.out / args.world / "ablations.json", payload)
    if args.result is not None:
        write_aside(args.result, payload)
    ablation_table(found)


if __name__ == "__main__":
    main()
