import numpy as np
import pytest

from offline.quadrature import gauss_legendre, kronrod, ladder


def moment_error(rule, degree):
    """Of the integral of (2 x - 1)^degree over [0, 1], known in closed form."""
    exact = 0.0 if degree % 2 else 1 / (degree + 1)
    return abs(np.dot(rule.weights, (2 * np.array(rule.nodes) - 1) ** degree) - exact)


@pytest.mark.parametrize("count", [7, 32, 128])
def test_kronrod_is_exact_to_its_degree_and_no_further(count):
    rule = kronrod(count)
    assert len(rule.nodes) == 2 * count + 1
    assert max(moment_error(rule, degree) for degree in range(3 * count + 2)) < 1e-13
    if count == 7:
        assert moment_error(rule, 3 * count + 3) > 1e-9


def test_kronrod_has_the_published_nodes_of_the_15_point_rule():
    """QUADPACK's qk15 (Piessens et al., 1983)."""
    published = [
        0.991455371120812639,
        0.864864423359769073,
        0.586087235467691130,
        0.207784955007898,
    ]
    added = sorted(2 * np.array(kronrod(7).nodes[7:]) - 1, reverse=True)
    np.testing.assert_allclose(added[:4], published, atol=1e-14)
    np.testing.assert_allclose(max(kronrod(7).weights[:7]) * 2, 0.209482141084727828, atol=1e-14)


@pytest.mark.parametrize("count", [32, 128])
def test_kronrod_keeps_the_gauss_nodes_in_order_and_interlaces(count):
    gauss, extension = gauss_legendre(count), kronrod(count)
    assert extension.kept == count
    assert extension.nodes[:count] == gauss.nodes
    added = np.array(extension.nodes[count:])
    assert np.all(np.searchsorted(np.sort(added), gauss.nodes) == np.arange(1, count + 1))
    assert added.min() > 0 and added.max() < 1 and min(extension.weights) > 0


def test_ladder():
    def sizes(**options):
        return [len(rule.nodes) for rule in ladder(**options)]

    assert sizes(fixed=None, most=257) == [32, 65, 128, 257]
    assert sizes(fixed=None, most=256) == [32, 65, 128]
    assert sizes(fixed=None, most=64) == [32]
    assert sizes(fixed=None, most=8) == [8]
    assert sizes(fixed=50, most=257) == [50]
