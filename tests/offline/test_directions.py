"""Directions of known deltas, their signs and their diagnostics."""

import pytest
import torch

from grains_vllm.vectors import ModelFingerprint, SteeringVector
from offline.directions import directions, opposite, set_direction, unit
from offline.options import Direction, Mode


def cloud(count=40, seed=0):
    """Deltas along 3 e0 with noise that is widest along e1."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 8, generator=generator) * 0.1
    rows[:, 0] += 3.0
    rows[:, 1] += torch.randn(count, generator=generator)
    return rows


def test_mean_keeps_its_length():
    rows = cloud()
    torch.testing.assert_close(set_direction(rows, Direction.mean), rows.double().mean(0))


@pytest.mark.parametrize("sign", [1, -1])
def test_principal_components_point_with_the_mean(sign):
    rows = sign * cloud()
    plain = set_direction(rows, Direction.pca)
    assert sign * plain[0] > 0.95 and float(plain.norm()) == pytest.approx(1)
    centred = set_direction(rows, Direction.pca_centered)
    assert abs(centred[1]) > 0.95 and centred @ rows.double().mean(0) >= 0


def test_modes():
    plus, minus = cloud()[:, None], -cloud(seed=1)[:, None]
    norms = torch.ones(40, 1)
    (both,), _, (report,) = directions(plus, minus, norms, Direction.mean, Mode.contrast, seed=0)
    expected = (plus.mean(0) - minus.mean(0))[0]
    torch.testing.assert_close(both, expected / expected.norm())
    assert report.raw_norm == pytest.approx(float(expected.norm()), rel=1e-5)
    (alone,), _, (report,) = directions(plus, minus, norms, Direction.mean, Mode.positive, seed=0)
    torch.testing.assert_close(alone, plus.mean(0)[0] / plus.mean(0).norm())
    assert report.cosine is None


def test_unit_of_zero_is_zero():
    assert not unit(torch.zeros(3)).any()


@pytest.mark.parametrize("kind", list(Direction))
def test_per_layer_vectors_and_figures(kind):
    plus = torch.stack([cloud(), torch.zeros(40, 8)], dim=1)
    minus = torch.stack([-cloud(seed=1), torch.zeros(40, 8)], dim=1)
    norms = torch.arange(1.0, 81.0).reshape(40, 2)
    norms[-1] *= 100  # the median does not mind
    vectors, reference, reports = directions(plus, minus, norms, kind, Mode.contrast, seed=0)
    assert vectors.dtype == reference.dtype == torch.float32
    assert float(vectors[0].norm()) == pytest.approx(1) and not vectors[1].any()
    torch.testing.assert_close(reference, torch.tensor([40.0, 41.0]))
    first, empty = reports
    rows = (plus - minus)[:, 0].double()
    if kind is Direction.pca_centered:
        rows = rows - rows.mean(0)
    share = (rows @ vectors[0].double()).square().sum() / rows.square().sum()
    assert first.explained_variance == pytest.approx(float(share), rel=1e-5)
    assert first.raw_norm == pytest.approx(
        float((set_direction(plus[:, 0], kind) - set_direction(minus[:, 0], kind)).norm())
    )
    assert first.mean_norm == pytest.approx(float((plus - minus)[:, 0].mean(0).norm()), rel=1e-5)
    assert first.median_norm == 40.0
    if kind is not Direction.pca_centered:
        assert first.stability > 0.9 and first.cosine < -0.9
    assert empty.stability is None and empty.cosine is None and empty.raw_norm == 0


def test_stability_of_noise_is_low_and_seeded():
    generator = torch.Generator().manual_seed(0)
    plus, minus = torch.randn(2, 40, 1, 64, generator=generator)
    arguments = (plus, minus, torch.ones(40, 1), Direction.mean, Mode.contrast)
    first = directions(*arguments, seed=0)[2][0]
    assert abs(first.stability) < 0.3
    assert first == directions(*arguments, seed=0)[2][0]
    assert first.stability != directions(*arguments, seed=1)[2][0].stability


def test_few_examples_have_no_stability():
    rows = cloud(3)[:, None]
    assert (
        directions(rows, -rows, torch.ones(3, 1), Direction.mean, Mode.contrast, 0)[2][0].stability
        is None
    )


def test_the_opposite_vector_steers_the_other_way_and_inherits_no_recommendation():
    rows = torch.nn.functional.normalize(torch.randn(3, 4), dim=1)
    rows[1] = 0
    passport = {"method": "grains", "recommended": {"strength": 0.2}, "sweep": {}}
    vector = SteeringVector(rows, torch.ones(3), ModelFingerprint("X", 4, 3), passport)
    other = opposite(vector)
    assert torch.equal(other.directions, -rows) and torch.equal(vector.directions, rows)
    assert other.reference_norms is vector.reference_norms and other.model == vector.model
    assert other.passport == {"method": "grains", "opposite_of": vector.digest}
    assert opposite(other).digest != other.digest
    assert not torch.signbit(other.directions[1]).any()
