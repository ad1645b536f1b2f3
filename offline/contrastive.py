"""The rival estimators: directions from the responses' own activations, or from a die.

- CAA: per layer, the mean over examples of d = h_l(x, y+) - h_l(x, y-).
- PCA-diff (RepE): per layer, the first principal component of the d. It is uncentred, because
  RepE flips the sign of every other difference, which leaves their second moments alone and makes
  their mean vanish. The labels give the sign: <v, mean of d> >= 0.
- ICV: the d of all layers as one long vector per example; their first (centred) principal
  component, a unit vector with the sign of the mean, plus their mean.
- Random: Gaussian directions, one per layer.
"""

import torch
from torch import Tensor

from offline.directions import LayerDiagnostics, diagnose, set_direction, unit
from offline.errors import InputError
from offline.options import Direction, Method


def raw_directions(differences: Tensor, method: Method) -> Tensor:
    """The directions before normalisation, [layers, hidden] float64.

    Args:
        differences: h_l(x, y+) - h_l(x, y-), [N, layers, hidden].
        method: caa, pca-diff or icv.

    Raises:
        InputError: another method.
    """
    rows = differences.double()
    if method is Method.caa:
        return rows.mean(0)
    if method is Method.pca_diff:
        return torch.stack([set_direction(layer, Direction.pca) for layer in rows.unbind(1)])
    if method is not Method.icv:
        raise InputError(
            f"the method is {method}, expected {Method.caa}, {Method.pca_diff} or {Method.icv}"
        )
    long = rows.flatten(1)
    component = set_direction(long, Direction.pca_centered)
    return (component + long.mean(0)).view(rows.shape[1:])


def contrastive_directions(
    positive: Tensor, negative: Tensor, norms: Tensor, method: Method, seed: int
) -> tuple[Tensor, Tensor, list[LayerDiagnostics]]:
    """Unit directions, reference norms and diagnostics of caa, pca-diff or icv.

    Args:
        positive, negative: h_l(x, y+) and h_l(x, y-) of N examples, [N, layers, hidden].
        norms: their norms, [2 N, layers].
        seed: of the split halves.

    Returns:
        As offline.directions.directions; the diagnostics' rows are the differences.
    """
    differences = positive.double() - negative.double()
    return diagnose(
        raw_directions(differences, method), differences, norms,
        lambda examples: raw_directions(differences[examples], method), seed,
    )  # fmt: skip


def random_directions(
    norms: Tensor, hidden: int, seed: int
) -> tuple[Tensor, Tensor, list[LayerDiagnostics]]:
    """Gaussian directions of length 1, and the reference norms from `norms` [reads, layers]."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(norms.shape[1], hidden, generator=generator, dtype=torch.float64)
    reference = norms.double().quantile(0.5, dim=0)
    reports = [
        LayerDiagnostics(layer, None, None, None, float(median), float(row.norm()), None)
        for layer, (median, row) in enumerate(zip(reference, raw, strict=True))
    ]
    return torch.stack([unit(row) for row in raw]).float(), reference.float(), reports
