"""The choices of one extraction; METHOD's names, spelled as on the command line."""

import math
from dataclasses import dataclass
from enum import Enum

from offline.errors import InputError


class _Choice(str, Enum):
    def __str__(self) -> str:
        return self.value


class Objective(_Choice):
    """How a response's token log-likelihoods become one number."""

    mean = "mean"
    sum = "sum"
    first_token = "first-token"


class AttributionMethod(_Choice):
    """How prompt tokens get their scores."""

    integrated_gradients = "integrated-gradients"
    gradient_x_input = "gradient-x-input"
    smoothgrad = "smoothgrad"
    random = "random"


class Baseline(_Choice):
    """The embedding that stands for "no token"."""

    mean = "mean"
    zero = "zero"
    pad = "pad"


class Mask(_Choice):
    """What a selected position is replaced by."""

    baseline = "baseline"
    pad = "pad"
    mask_token = "mask-token"
    attention = "attention"


class Read(_Choice):
    """The position at which block outputs are compared."""

    prompt_end = "prompt-end"
    response_end = "response-end"


class Direction(_Choice):
    """How N deltas become one direction per layer."""

    mean = "mean"
    pca = "pca"
    pca_centered = "pca-centered"


class Mode(_Choice):
    """Which deltas take part: both sets, or the preferred response's alone."""

    contrast = "contrast"
    positive = "positive"


@dataclass(frozen=True)
class ExtractOptions:
    """Everything that decides the numbers of an artifact, apart from model and data."""

    objective: Objective = Objective.mean
    attribution: AttributionMethod = AttributionMethod.integrated_gradients
    baseline: Baseline = Baseline.mean
    ig_points: int | None = None  # None: adaptive, see quadrature.ladder
    ig_max_points: int = 257
    ig_tolerance: float = 0.05
    smoothgrad_samples: int = 32
    smoothgrad_noise: float = 0.1
    k: int = 10
    mask: Mask = Mask.baseline
    read: Read = Read.prompt_end
    direction: Direction = Direction.mean
    mode: Mode = Mode.contrast
    chat: bool = False
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one = {
            "--ig-points": self.ig_points,
            "--ig-max-points": self.ig_max_points,
            "--smoothgrad-samples": self.smoothgrad_samples,
            "--k": self.k,
            "--limit": self.limit,
        }
        for name, value in at_least_one.items():
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}, expected 1 or more")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed is {self.seed}, expected 0 to 2**63 - 1")
        positive = {
            "--ig-tolerance": self.ig_tolerance,
            "--smoothgrad-noise": self.smoothgrad_noise,
        }
        for name, number in positive.items():
            if not (math.isfinite(number) and number > 0):
                raise InputError(f"{name} is {number}, expected a number above 0")
