"""The files of the worlds: JSON lines, and the command that writes preference pairs."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from grains_vllm.vectors import write_aside


def write_rows(path: Path, rows: Iterable[object]) -> None:
    write_aside(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_pairs_command(
    world: str, splits: Iterable[str], write_pairs: Callable[[Path, Any, int, int], None]
) -> None:
    """`python -m benchmarks.WORLD.world --split train --n 50 --seed 1 --out pairs.jsonl`."""
    parser = argparse.ArgumentParser(description=f"Write preference pairs of the {world} world.")
    parser.add_argument("--split", choices=tuple(splits), required=True)
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_pairs(args.out, args.split, args.n, args.seed)
    print(f"{args.n} {args.split} pairs written to {args.out}")
