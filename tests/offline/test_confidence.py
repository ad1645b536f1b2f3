"""Intervals against a plain loop, and against what they promise."""

import math

import numpy as np
import pytest

from offline.evaluation.confidence import Bootstrap, Figure

DRAW = np.random.default_rng(1)


def test_a_mean_and_its_interval_equal_a_plain_loop():
    values = DRAW.normal(size=80).tolist()
    found = Bootstrap(resamples=4000, seed=3).estimate(Figure(values))
    draw = np.random.default_rng(7)
    means = [np.mean(draw.choice(values, 80)) for _ in range(4000)]
    assert found.value == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.02)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.02)


def test_perplexity_weighs_texts_by_their_tokens():
    logps, tokens = [-10.0, -2.0, -30.0], [5.0, 1.0, 10.0]
    found = Bootstrap().estimate(Figure(logps, tokens, perplexity=True))
    assert found.value == pytest.approx(math.exp(42 / 16))
    assert found.low < found.value < found.high


def test_pairing_is_what_makes_a_small_steady_difference_certain():
    base = DRAW.normal(scale=10, size=200)
    steered = base + DRAW.normal(loc=0.5, scale=0.1, size=200)
    paired = Bootstrap().difference(Figure(steered.tolist()), Figure(base.tolist()))
    assert paired.value == pytest.approx(0.5, abs=0.05)
    assert 0.4 < paired.low < paired.high < 0.6
    other = np.random.default_rng(5).permutation(base)
    unpaired = Bootstrap().difference(Figure(steered.tolist()), Figure(other.tolist()))
    assert unpaired.low < 0 < unpaired.high


def test_intervals_cover_the_truth_as_often_as_they_say():
    bootstrap = Bootstrap(confidence=0.9, resamples=400)
    hits = 0
    for _ in range(300):
        base = DRAW.normal(size=60)
        difference = DRAW.normal(loc=1, size=60)
        found = bootstrap.difference(Figure((base + difference).tolist()), Figure(base.tolist()))
        hits += found.low <= 1 <= found.high
    assert 0.83 < hits / 300 < 0.96


def test_the_same_seed_repeats_and_others_differ():
    values = Figure(DRAW.normal(size=30).tolist())
    assert Bootstrap(seed=1).estimate(values) == Bootstrap(seed=1).estimate(values)
    assert Bootstrap(seed=1).estimate(values) != Bootstrap(seed=2).estimate(values)


def test_one_item_has_no_interval_and_unequal_items_no_difference():
    found = Bootstrap().estimate(Figure([3.0]))
    assert (found.value, found.low, found.high) == (3.0, None, None)
    with pytest.raises(ValueError, match="2 items against 1"):
        Bootstrap().difference(Figure([1.0, 2.0]), Figure([1.0]))
