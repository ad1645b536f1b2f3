"""Less hallucination? GrAInS and its rivals, chosen on validation, reported once on test.

    python -m benchmarks.hallucination --seeds 1 2 3 --out build/hallucination

Each finished piece is kept in the out folder, so that a second run goes on where the first stopped.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.hallucination import plots
from benchmarks.hallucination.judged import Sizes
from benchmarks.hallucination.study import Study
from benchmarks.hallucination.table import COLUMNS, document
from benchmarks.testbed.show import cell, point_text, tell
from benchmarks.testbed.store import Result
from grains_vllm.vectors import write_aside
from offline.plot_style import save

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("build/hallucination"))
    parser.add_argument(
        "--publish", action="store_true", help="also write table and plots to benchmarks/results"
    )
    args = parser.parse_args()
    seeds: dict[int, dict[str, Result]] = {}
    for seed in args.seeds:
        study = Study(seed, args.out / f"seed-{seed}", Sizes(), note=partial(tell, seed))
        study.run()
        seeds[seed] = {name: study.store.read(name) for name in study.store.names()}
    found = document(seeds)
    show(found)
    payload = json.dumps(found, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
    figures = {"comparison": plots.comparison(found), "doses": plots.doses(seeds)}
    for folder in (args.out, *([RESULTS] if args.publish else [])):
        write_aside(folder / "hallucination-cpu.json", payload)
        for name, figure in figures.items():
            save(figure, folder / f"hallucination-{name}.png")


def show(found: dict[str, Any]) -> None:
    out = Console(width=170)
    rows = Table(title=found["title"], caption=found["note"], title_justify="left")
    rows.add_column("method")
    for name in COLUMNS:
        rows.add_column(name, justify="right")
    for row in found["rows"]:
        rows.add_row(row["method"], *(cell(row["values"].get(name), name) for name in COLUMNS))
    out.print(rows)
    for row in found["rows"]:
        if row["chosen"]:
            points = ", ".join(point_text(chosen["point"]) for chosen in row["chosen"])
            out.print(f"{row['method']}: {points}")
    for name in ("reduction", "k", "attribution"):
        out.print(f"{name}:", found[name])


if __name__ == "__main__":
    main()
