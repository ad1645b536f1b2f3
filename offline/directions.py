"""N deltas per layer become one unit direction per layer, with figures that say how good it is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from offline.options import Direction, Mode

_SPLITS = 16


@dataclass(frozen=True)
class LayerDiagnostics:
    """How trustworthy one layer's direction v is.

    Attributes:
        explained_variance: sum_i <d_i, v>^2 / sum_i ||d_i||^2 over the N rows d_i = D+_i - D-_i
            (mode contrast) or D+_i (positive); rows are centred first for pca-centered only.
        stability: mean over seeded random splits of the examples into halves of the cosine
            between the two halves' directions; None below 4 examples.
        cosine: cos(v+, v-); None in mode positive, or where one is zero.
        median_norm: median ||h_l|| where the vector was read; the artifact's reference norm.
        raw_norm: ||v+ - v-|| (or ||v+||) before normalisation. For pca v+ and v- are unit.
        mean_norm: ||mean(D+) - mean(D-)|| (or ||mean(D+)||), which is what masking really moved,
            whatever the way of making directions; compare with median_norm.
    """

    layer: int
    explained_variance: float
    stability: float | None
    cosine: float | None
    median_norm: float
    raw_norm: float
    mean_norm: float


def set_direction(deltas: Tensor, kind: Direction) -> Tensor:
    """v+ or v- of one layer from its deltas [N, hidden]: [hidden] float64.

    `mean` keeps the mean's length; the principal components are unit vectors whose sign is such
    that their product with the mean delta is not negative.
    """
    deltas = deltas.double()
    mean = deltas.mean(0)
    if kind is Direction.mean:
        return mean
    rows = deltas - mean if kind is Direction.pca_centered else deltas
    if not rows.any():
        return torch.zeros_like(mean)
    component = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    return -component if component @ mean < 0 else component


def raw_direction(positive: Tensor, negative: Tensor, kind: Direction, mode: Mode) -> Tensor:
    """v+ - v- (contrast) or v+ (positive) before normalisation: [hidden] float64."""
    plus = set_direction(positive, kind)
    return plus if mode is Mode.positive else plus - set_direction(negative, kind)


def unit(vector: Tensor) -> Tensor:
    """`vector` scaled to length 1; a zero vector stays zero."""
    length = vector.norm()
    return vector / length if length > 0 else torch.zeros_like(vector)


def directions(
    positive: Tensor, negative: Tensor, norms: Tensor, kind: Direction, mode: Mode, seed: int
) -> tuple[Tensor, Tensor, list[LayerDiagnostics]]:
    """Unit directions, reference norms and diagnostics (GrAInS, direction step).

    Args:
        positive, negative: D+ and D- of N examples, [N, layers, hidden].
        norms: ||h_l||, [reads, layers].
        seed: of the split halves.

    Returns:
        [layers, hidden] float32, [layers] float32, and one LayerDiagnostics per layer.
    """
    layers = positive.shape[1]
    reference = norms.double().quantile(0.5, dim=0)
    splits = _splits(len(positive), seed)
    vectors, reports = [], []
    for layer in range(layers):
        plus, minus = positive[:, layer].double(), negative[:, layer].double()
        raw = raw_direction(plus, minus, kind, mode)
        rows = plus - minus if mode is Mode.contrast else plus
        cosine = None
        if mode is Mode.contrast:
            cosine = _cosine(set_direction(plus, kind), set_direction(minus, kind))
        centred = rows - rows.mean(0) if kind is Direction.pca_centered else rows
        total = float(centred.square().sum())
        explained = float((centred @ unit(raw)).square().sum()) / total if total > 0 else 0.0
        halves = [
            _cosine(
                raw_direction(plus[one], minus[one], kind, mode),
                raw_direction(plus[two], minus[two], kind, mode),
            )
            for one, two in splits
        ]
        known = [value for value in halves if value is not None]
        vectors.append(unit(raw))
        reports.append(
            LayerDiagnostics(
                layer=layer,
                explained_variance=explained,
                stability=sum(known) / len(known) if known else None,
                cosine=cosine,
                median_norm=float(reference[layer]),
                raw_norm=float(raw.norm()),
                mean_norm=float(rows.mean(0).norm()),
            )
        )
    return torch.stack(vectors).float(), reference.float(), reports


def _splits(examples: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    if examples < 4:
        return []
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(examples, generator=generator) for _ in range(_SPLITS)]
    return [(order[: examples // 2], order[examples // 2 :]) for order in orders]


def _cosine(a: Tensor, b: Tensor) -> float | None:
    product = float(a.norm() * b.norm())
    return float(a @ b) / product if product > 0 else None
