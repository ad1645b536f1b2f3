"""N deltas per layer become one unit direction per layer, with figures that say how good it is."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grains_vllm.vectors import SteeringVector
from offline.options import Direction, Mode

_SPLITS = 16
_ITS_OWN = ("recommended", "sweep")  # what a passport says of one vector alone


@dataclass(frozen=True)
class LayerDiagnostics:
    """How trustworthy one layer's direction v is; see `diagnose` for the rows d_i.

    Attributes:
        explained_variance: sum_i <d_i, v>^2 / sum_i ||d_i||^2; rows are centred first for
            pca-centered only. None without rows.
        stability: mean over seeded random splits of the examples into halves of the cosine
            between the two halves' directions; None below 4 examples.
        cosine: cos(v+, v-); None where there are no two sets, or one of them is zero.
        median_norm: median ||h_l|| where the vector was read; the artifact's reference norm.
        raw_norm: the direction's length before it was made a unit vector. Principal components
            are unit vectors themselves, so it says little there.
        mean_norm: ||mean of d_i||, which is how far apart the two sides really are, whatever
            the way of making directions; compare with median_norm. None without rows.
    """

    layer: int
    explained_variance: float | None
    stability: float | None
    cosine: float | None
    median_norm: float
    raw_norm: float
    mean_norm: float | None


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


def unit(vector: Tensor) -> Tensor:
    """`vector` scaled to length 1; a zero vector stays zero."""
    length = vector.norm()
    return vector / length if length > 0 else torch.zeros_like(vector)


def directions(
    positive: Tensor, negative: Tensor, norms: Tensor, kind: Direction, mode: Mode, seed: int
) -> tuple[Tensor, Tensor, list[LayerDiagnostics]]:
    """Unit directions, reference norms and diagnostics (GrAInS, direction step).

    The rows of the diagnostics are D+_i - D-_i (mode contrast) or D+_i (positive).

    Args:
        positive, negative: D+ and D- of N examples, [N, layers, hidden].
        norms: ||h_l||, [reads, layers].
        seed: of the split halves.

    Returns:
        [layers, hidden] float32, [layers] float32, and one LayerDiagnostics per layer.
    """
    contrast = mode is Mode.contrast

    def both(chosen: Tensor) -> tuple[Tensor, Tensor]:
        plus = _set_directions(positive[chosen], kind)
        return plus, _set_directions(negative[chosen], kind) if contrast else torch.zeros_like(plus)

    def half(chosen: Tensor) -> Tensor:
        plus, minus = both(chosen)
        return plus - minus

    plus, minus = both(torch.arange(len(positive)))
    rows = positive.double() - negative.double() if contrast else positive.double()
    return diagnose(
        plus - minus, rows, norms, half, seed, centred=kind is Direction.pca_centered,
        cosines=[cosine(a, b) for a, b in zip(plus, minus, strict=True)],
    )  # fmt: skip


def diagnose(
    raw: Tensor,
    rows: Tensor,
    norms: Tensor,
    estimate: Callable[[Tensor], Tensor],
    seed: int,
    *,
    centred: bool = False,
    cosines: Sequence[float | None] | None = None,
) -> tuple[Tensor, Tensor, list[LayerDiagnostics]]:
    """Makes raw directions unit vectors and says how good each layer's is; see `directions`.

    Args:
        raw: the directions from all examples, [layers, hidden] float64.
        rows: what each example says, [N, layers, hidden] float64.
        estimate: raw directions from the examples with the given indices alone.
        centred: whether the explained variance is about the rows' mean.
    """
    halves = [(estimate(one), estimate(two)) for one, two in _splits(len(rows), seed)]
    reference = norms.double().quantile(0.5, dim=0)
    vectors, reports = [], []
    for layer in range(len(raw)):
        vector, mean = unit(raw[layer]), rows[:, layer].mean(0)
        spread = rows[:, layer] - mean if centred else rows[:, layer]
        total = float(spread.square().sum())
        pairs = [cosine(one[layer], two[layer]) for one, two in halves]
        known = [value for value in pairs if value is not None]
        vectors.append(vector)
        reports.append(
            LayerDiagnostics(
                layer=layer,
                explained_variance=float((spread @ vector).square().sum()) / total
                if total
                else 0.0,
                stability=sum(known) / len(known) if known else None,
                cosine=None if cosines is None else cosines[layer],
                median_norm=float(reference[layer]),
                raw_norm=float(raw[layer].norm()),
                mean_norm=float(mean.norm()),
            )
        )
    return torch.stack(vectors).float(), reference.float(), reports


def cosine(a: Tensor, b: Tensor) -> float | None:
    """cos(a, b) of two vectors [hidden]; None if one of them is zero."""
    product = float(a.norm() * b.norm())
    return float(a @ b) / product if product > 0 else None


def opposite(vector: SteeringVector) -> SteeringVector:
    """The vector that steers the other way; what was recommended for `vector` is left out."""
    passport = {key: vector.passport[key] for key in vector.passport if key not in _ITS_OWN}
    passport["opposite_of"] = vector.digest
    # Adding zero turns the -0.0 of layers without a direction into 0.0.
    return dataclasses.replace(vector, directions=-vector.directions + 0.0, passport=passport)


def _set_directions(deltas: Tensor, kind: Direction) -> Tensor:
    """`set_direction` of every layer: [N, layers, hidden] -> [layers, hidden] float64."""
    return torch.stack([set_direction(rows, kind) for rows in deltas.unbind(1)])


def _splits(examples: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    if examples < 4:
        return []
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(examples, generator=generator) for _ in range(_SPLITS)]
    return [(order[: examples // 2], order[examples // 2 :]) for order in orders]
