"""Small result files (sweep, evaluation, baselines), as the commands write them."""

from typing import Any

MEASURES = ("accuracy", "margin", "exact", "controls", "perplexity")
BASE = dict(zip(MEASURES, (0.4, -0.3, 0.34, 0.99, 9.0), strict=True))


def sweep(digest: str, vector: str = "v", positions: tuple[str, ...] = ("all",)) -> dict[str, Any]:
    """Three layer sets at three strengths; the point of layers 1-2 at 0.2 is chosen."""
    points = [
        {
            "vector": vector, "layers": layers, "strength": strength, "positions": place,
            "accuracy": 0.4 + strength, "margin": 2 * strength, "exact": 0.5 + len(layers) / 10,
            "controls": 0.99 - strength / 2, "perplexity": 9 + strength, "allowed": strength < 0.3,
        }
        for place in positions
        for layers in ([0], [2], [1, 2])
        for strength in (0.1, 0.2, 0.4)
    ]  # fmt: skip
    return {
        "kind": "grains-sweep", "version": 1, "created_with": {}, "backend": "transformers",
        "model_id": "tiny", "metric": "accuracy", "base": dict(BASE), "points": points, "chosen": 7,
        "limits": {"min_controls": 0.85, "max_perplexity_increase": 0.03}, "seconds": 1.0,
        "data": {"validation": {"name": "val.jsonl", "pairs": 20}, "controls": None},
        "vectors": {vector: {"digest": digest, "method": "grains"}},
    }  # fmt: skip


def evaluation(digest: str) -> dict[str, Any]:
    """One goal that got better, one side effect that got worse and one that did not change."""

    def task(name: str, side_effect: bool, higher: bool, change: tuple[float, float, float]) -> Any:
        low, value, high = change
        return {
            "task": name, "metric": "acc", "higher_is_better": higher, "n": 817,
            "side_effect": side_effect,
            "values": {s: {"value": 0.5, "low": 0.4, "high": 0.6} for s in ("base", "v")},
            "differences": {"v": {"value": value, "low": low, "high": high}},
        }  # fmt: skip

    return {
        "kind": "grains-evaluation", "version": 1, "created_with": {}, "confidence": 0.9,
        "settings": ["base", "v"],
        "target": {"steered": {"v": {"digest": digest, "layers": [1], "strength": 0.2}}},
        "provenance": {"notes": ["overlap is not checked"]},
        "tasks": [
            task("goal-task", False, True, (0.02, 0.06, 0.08)),
            task("dear-task", True, False, (0.01, 0.02, 0.03)),
            task("calm-task", True, True, (-0.02, 0.01, 0.03)),
        ],
    }  # fmt: skip


def baselines() -> dict[str, Any]:
    return {
        "kind": "grains-baselines", "version": 1, "title": "A small world", "note": "by seed",
        "columns": [{"name": "exact", "higher_is_better": True, "unit": "share"}],
        "rows": [
            {"method": "random direction", "values": {"exact": {"mean": 0.3, "sd": 0.04, "n": 10}}},
            {"method": "not run", "values": {}},
        ],
        "created_with": {},
    }  # fmt: skip
