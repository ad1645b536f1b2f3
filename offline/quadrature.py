"""Rules for the integral of Integrated Gradients, each with more points than the one before it.

Gauss-Legendre with 32 and 128 points, and after each its Kronrod extension, which adds n + 1 points
to n and keeps those that are computed already (Kronrod, 1965). Doubling costs half as much so.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.polynomial import legendre

FIRST, SECOND = 32, 128


@dataclass(frozen=True)
class Rule:
    """Nodes and weights on [0, 1].

    Attributes:
        kept: how many of the first nodes are all nodes of the rule before, in the same order.
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    kept: int = 0


def ladder(fixed: int | None, most: int) -> list[Rule]:
    """The rules to try one after another: one of `fixed` points, or 32, 65, 128, 257 up to `most`.

    Always at least one: with `most` below 32, Gauss-Legendre with as many points.
    """
    if fixed is not None:
        return [gauss_legendre(fixed)]
    rules = [gauss_legendre(min(FIRST, most))]
    if most >= 2 * FIRST + 1:
        rules.append(kronrod(FIRST))
    if most >= SECOND:
        rules.append(gauss_legendre(SECOND))
    if most >= 2 * SECOND + 1:
        rules.append(kronrod(SECOND))
    return rules


@lru_cache
def gauss_legendre(count: int) -> Rule:
    """Exact for polynomials of degree 2 count - 1."""
    nodes, weights = legendre.leggauss(count)
    return _on_unit_interval(nodes, weights, kept=0)


@lru_cache
def kronrod(count: int) -> Rule:
    """The extension of `gauss_legendre(count)` to 2 count + 1 points, exact to degree 3 count + 1.

    The added nodes are the zeros of the Stieltjes polynomial E of degree n + 1, which is defined by
    the integrals of P_n P_k E being 0 for k <= n (Monegato, 1982).
    """
    n = count
    x, w = legendre.leggauss(3 * n // 2 + 2)  # exact for the products below
    values = legendre.legvander(x, n + 1)
    # E = P_(n+1) + sum of c_j P_j over j = n - 1, n - 3, ...; by symmetry only odd k say anything.
    lower = np.arange((n + 1) % 2, n, 2)
    odd = np.arange(1, n + 1, 2)
    products = (w * values[:, n] * values[:, odd].T) @ values
    coefficients = np.zeros(n + 2)
    coefficients[n + 1] = 1.0
    coefficients[lower], *_ = np.linalg.lstsq(products[:, lower], -products[:, n + 1], rcond=None)
    nodes = np.concatenate([legendre.leggauss(n)[0], legendre.legroots(coefficients).real])
    # The weights that integrate every Legendre polynomial up to degree 2 n.
    moments = np.zeros(2 * n + 1)
    moments[0] = 2.0
    weights = np.linalg.solve(legendre.legvander(nodes, 2 * n).T, moments)
    return _on_unit_interval(nodes, weights, kept=n)


def _on_unit_interval(nodes: np.ndarray, weights: np.ndarray, kept: int) -> Rule:
    return Rule(tuple(((nodes + 1) / 2).tolist()), tuple((weights / 2).tolist()), kept)
