"""Seeds into one table: means with their spread over seeds and draws."""

from collections.abc import Mapping
from typing import Any

from benchmarks.hallucination.rivals import GRAINS, KS, TITLES
from benchmarks.testbed.store import Result
from benchmarks.testbed.summary import created_with, spread

PAPER = -0.18  # LLaVA-1.6-7B on MMHal-Bench: 0.624 -> 0.514
# Column -> whether higher is better.
COLUMNS: dict[str, bool | None] = {
    "hallucination": False,
    "relative change": False,
    "present": True,
    "controls": True,
    "perplexity increase": False,
    "strength": None,
    "hallucination, without limits": False,
    "present, without limits": True,
}


def document(seeds: Mapping[int, Mapping[str, Result]]) -> dict[str, Any]:
    """The results as a "grains-baselines" document.

    Args:
        seeds: by seed, the results of `Study` by name.
    """
    rows = []
    for method, title in TITLES.items():
        found: dict[str, list[float]] = {}
        chosen = []
        for seed, results in seeds.items():
            for name, result in results.items():
                if name != method and name.rstrip("0123456789") != f"{method}-":
                    continue
                for column, value in _values(result, results["base"]["test"]).items():
                    found.setdefault(column, []).append(value)
                if method != "base":
                    chosen.append({"seed": seed, "point": result["point"], "free": result["free"]})
        figures = {column: spread(numbers) for column, numbers in found.items()}
        rows.append({"method": title, "values": figures, "chosen": chosen})
    return {
        "kind": "grains-baselines",
        "version": 1,
        "title": "Object hallucination in a tiny world",
        "note": (
            f"means and standard deviations over model seeds {', '.join(map(str, seeds))} (random "
            "methods: and their draws); points chosen on validation with present objects and "
            "controls >= 0.95 and perplexity <= +3%, reported on test"
        ),
        "columns": [{"name": name, "higher_is_better": good} for name, good in COLUMNS.items()],
        "rows": rows,
        "reduction": _reduction(seeds),
        "k": {
            str(seed): {
                "chosen": results["attribution"]["k"],
                "validation": {str(k): results[f"k-{k}"]["validation"] for k in KS},
            }
            for seed, results in seeds.items()
        },
        "attribution": {
            name: spread([results["attribution"][name] for results in seeds.values()])
            for name in next(iter(seeds.values()))["attribution"]
        },
        "seeds": {str(seed): dict(results) for seed, results in seeds.items()},
        "created_with": created_with(),
    }


def _values(result: Result, base: Mapping[str, float]) -> dict[str, float]:
    own = result["test"]
    values = {
        **{name: own[name] for name in ("hallucination", "present", "controls", "margin")},
        "relative change": own["hallucination"] / base["hallucination"] - 1,
        "perplexity increase": own["perplexity"] / base["perplexity"] - 1,
    }
    if result.get("point"):
        values["strength"] = result["point"]["strength"]
    if "test_free" in result:
        values |= {
            f"{name}, without limits": result["test_free"][name]
            for name in ("hallucination", "present")
        }
    return values


def _reduction(seeds: Mapping[int, Mapping[str, Result]]) -> dict[str, Any]:
    """What GrAInS changes, by seed, beside the paper's figure."""
    by_seed = {
        str(seed): _values(results[GRAINS], results["base"]["test"])["relative change"]
        for seed, results in seeds.items()
    }
    return {"by_seed": by_seed, "paper": PAPER, "reached": max(by_seed.values()) <= PAPER}
