"""Choosing: the best allowed point, by rules that a person can check by hand."""

import math
from dataclasses import replace

import pytest

from offline.errors import InputError
from offline.scoring import ItemScore, Measures, Point, Suite
from offline.sweep import Limits, choose, recommend, sweep
from offline.transformers_scorer import TransformersScorer
from tests.offline.test_scoring import ITEMS, pair, vector
from tests.offline.worlds import build_decoder

POINTS = [
    Point("v", layers, strength)
    for layers, strength in (((1,), 0.4), ((1,), 0.2), ((0, 1), -0.2), ((0,), -0.2), ((2,), 0.3))
]


def measures(accuracy=0.5, margin=0.0, exact=0.0, controls=1.0, perplexity=10.0):
    return Measures(accuracy, margin, exact, controls, perplexity)


def test_the_metric_decides_then_margin_strength_and_layers():
    keep = [True] * 5
    by = [measures(0.5), measures(0.7), measures(0.9), measures(0.9), measures(0.8, margin=5)]
    assert choose(POINTS, by, keep, "margin") == 4
    assert choose(POINTS, by, keep, "accuracy") == 3  # equal to 2 but for fewer layers
    by[2] = replace(by[2], margin=0.1)
    assert choose(POINTS, by, keep, "accuracy") == 2
    assert choose(POINTS, [measures()] * 5, keep, "exact") == 1  # the smallest |strength|
    assert choose(POINTS, by, [False, True, False, False, False], "accuracy") == 1
    assert choose(POINTS, by, [False] * 5, "accuracy") is None


def test_limits_hold_at_their_border():
    limits, base = Limits(0.95, 0.03), measures(perplexity=100.0)
    assert limits.allow(measures(controls=0.95, perplexity=103.0), base)
    assert not limits.allow(measures(controls=0.949, perplexity=100.0), base)
    assert not limits.allow(measures(perplexity=103.1), base)
    assert Limits().allow(measures(controls=0.0, perplexity=1e9), base)
    with pytest.raises(ValueError, match="no controls"):
        limits.allow(Measures(1, 1, 1, None, 1.0), base)


@pytest.fixture(scope="module")
def world():
    decoder = build_decoder()
    suite = Suite([pair([5, 6], [7]), pair([15], [17, 18])], controls=ITEMS[:2], texts=ITEMS[1:])
    return TransformersScorer(decoder, {"v": vector(decoder)}), suite


def test_result_of_a_sweep(world):
    scorer, suite = world
    points = [Point("v", (1,), 0.0), Point("v", (0, 2), 0.7, "generation")]
    seen = []
    result = sweep(scorer, suite, points, "margin", on_point=lambda *told: seen.append(told))
    assert [index for index, _ in seen] == [None, 0, 1]
    names = set(result["base"])
    assert {name: result["points"][0][name] for name in names} == result["base"]  # strength 0
    assert result["points"][1]["margin"] != result["base"]["margin"]
    assert result["points"][1]["layers"] == [0, 2]
    assert result["points"][1]["positions"] == "generation"
    assert result["limits"] == {"min_controls": None, "max_perplexity_increase": None}


def test_finished_points_are_not_measured_again(world):
    scorer, suite = world
    points = [Point("v", (1,), strength) for strength in (0.1, 0.2, 0.3)]
    done = {}
    whole = sweep(scorer, suite, points, on_point=done.__setitem__)
    del done[1]
    seen = []
    again = sweep(
        scorer, suite, points, done=done, on_point=lambda index, found: seen.append(index)
    )
    assert again == whole and seen == [1]
    assert sweep(None, suite, points, done={**done, 1: done[0]})["points"][1]["strength"] == 0.2


def test_bad_calls(world):
    scorer, suite = world
    with pytest.raises(InputError, match="no point"):
        sweep(scorer, suite, [])
    with pytest.raises(InputError, match="metric is 'best'"):
        sweep(scorer, suite, POINTS, "best")


def test_a_nan_is_named(world):
    _, suite = world

    class Broken:
        def score(self, items, points):
            for number, point in enumerate(points):
                bad = math.nan if point is not None and point.strength == 0.2 else -1.0
                yield number, [ItemScore(bad, True) for _ in items]

    with pytest.raises(InputError, match=r"strength=0\.2.*log-likelihoods are not finite"):
        sweep(Broken(), suite, POINTS)


def test_recommendation_leaves_the_vector_alone(world):
    scorer, suite = world
    before = replace(scorer.vectors["v"], passport={"method": "x", "recommended": {"layers": [0]}})
    result = sweep(scorer, suite, [Point("v", (1, 2), 0.25, "prompt")], "exact")
    after = recommend(before, result, {"points": 1})
    assert after.digest == before.digest and after.passport["method"] == "x"
    assert after.passport["sweep"] == {"points": 1}
    recommended = after.passport["recommended"]
    assert recommended["layers"] == [1, 2] and recommended["strength"] == 0.25
    assert recommended["positions"] == "prompt" and recommended["source"] == "grains sweep"
    assert recommended["base"] == result["base"]
    assert recommended["scores"]["margin"] == result["points"][0]["margin"]
