"""Does it work? Every method, chosen on validation and reported once on test.

    python -m benchmarks.testbed --world sycophancy --seeds 1 2 3 --out build/testbed

Each finished piece is kept in the out folder, so that a second run goes on where the first stopped.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.testbed import plots, served, summary
from benchmarks.testbed.data import Sizes
from benchmarks.testbed.methods import Draws
from benchmarks.testbed.show import console, main_table, tell
from benchmarks.testbed.store import Result
from benchmarks.testbed.study import Study
from benchmarks.testbed.worlds import NAMES, load_world
from grains_vllm.vectors import write_aside
from offline.plot_style import save

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", choices=NAMES, default="sycophancy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("build/testbed"))
    parser.add_argument(
        "--serve", action=argparse.BooleanOptionalAction, default=True,
        help="measure once more through vllm serve",
    )  # fmt: skip
    parser.add_argument(
        "--publish", action="store_true", help="also write table and plots to benchmarks/results"
    )
    args = parser.parse_args()
    folder = args.out / args.world
    world = load_world(args.world)
    seeds: dict[int, dict[str, Result]] = {}
    differences: dict[str, Any] = {}
    for seed in args.seeds:
        study = Study(
            world, seed, folder / f"seed-{seed}", Sizes(), Draws(),
            note=partial(tell, seed),
        )  # fmt: skip
        study.run()
        if args.serve:
            served.serve(study)
        differences[str(seed)] = served.differences(study)
        names = (name for name in study.store.names() if not name.startswith("ablation-"))
        seeds[seed] = {name: study.store.read(name) for name in names}

    note = (
        f"means and standard deviations over model seeds {', '.join(map(str, args.seeds))} "
        "(random methods: and their draws); points chosen on validation with controls >= 0.95 and "
        "perplexity <= +3%, reported on test"
    )
    document = summary.table(args.world, world.metric, seeds, note)
    document["attribution"] = summary.attribution(seeds)
    document["verdict"] = summary.verdict(document, world.metric)
    document["served"] = {"differences": differences, "largest": largest(differences)}
    main_table(document, world.metric)
    for name in ("verdict", "attribution"):
        console.print(name, document[name])
    console.print("largest |vllm serve - transformers|:", document["served"]["largest"])

    payload = json.dumps(document, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
    figures = {
        "comparison": plots.comparison(document, world.metric),
        "doses": plots.doses(seeds, world.metric),
    }
    for target in (folder, *([RESULTS] if args.publish else [])):
        write_aside(target / f"testbed-{args.world}-cpu.json", payload)
        for name, figure in figures.items():
            save(figure, target / f"testbed-{args.world}-{name}.png")


def largest(differences: dict[str, Any]) -> dict[str, float]:
    """The largest difference of each measure over seeds and methods; {} if nothing was served."""
    found: dict[str, float] = {}
    for methods in differences.values():
        for measures in methods.values():
            for name, value in measures.items():
                found[name] = max(value, found.get(name, 0.0))
    return found


if __name__ == "__main__":
    main()
