"""The choices of one extraction; METHOD's names, spelled as on the command line."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from offline.errors import InputError


class _Choice(str, Enum):
    def __str__(self) -> str:
        return self.value


class Method(_Choice):
    """How preference pairs become one direction per layer: GrAInS, or what it is compared with."""

    grains = "grains"
    caa = "caa"
    pca_diff = "pca-diff"
    icv = "icv"
    random = "random"


class Objective(_Choice):
    """How a response's token log-likelihoods become one number: their mean, their sum, or the
    first one alone."""

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
    mask_token = "mask-token"


class Mask(_Choice):
    """What a selected position is replaced by."""

    baseline = "baseline"
    pad = "pad"
    mask_token = "mask-token"
    attention = "attention"


class Read(_Choice):
    """Where block outputs are compared: the prompt's last token, a response's first token, its
    last token, or the mean over the positions that predict a response's tokens (from the prompt's
    last token to the response's last but one), which is where its words are chosen."""

    prompt_end = "prompt-end"
    response_start = "response-start"
    response_end = "response-end"
    response_mean = "response-mean"


class Direction(_Choice):
    """How N deltas become one direction per layer."""

    mean = "mean"
    pca = "pca"
    pca_centered = "pca-centered"


class Tokens(_Choice):
    """Which prompt tokens may be selected: those of text and image in one ranking, or of one."""

    joint = "joint"
    text = "text"
    image = "image"

    def allow(self, eligible: Sequence[bool], image_tokens: Sequence[bool]) -> list[bool]:
        """The flags of `eligible` that are left."""
        if self is Tokens.joint:
            return list(eligible)
        wanted = self is Tokens.image
        return [
            flag and image is wanted for flag, image in zip(eligible, image_tokens, strict=True)
        ]


class Mode(_Choice):
    """Which deltas take part: both sets, or the preferred response's alone."""

    contrast = "contrast"
    positive = "positive"


TEXT_K, IMAGE_K = 10, 50  # tokens of T+ and T-, see ExtractOptions.most
# What says something to every method; the rest belongs to GrAInS, but for --read.
_COMMON = {"method", "chat", "limit", "seed"}


@dataclass(frozen=True)
class ExtractOptions:
    """Everything that decides the numbers of an artifact, apart from model and data.

    Attributes:
        ig_points: None stands for adaptive numbers, see quadrature.ladder.
        k: None stands for 10, and for 50 in prompts with an image.
        read: None stands for where the method reads: the prompt's end for grains and random, the
            responses' ends for the others.
    """

    method: Method = Method.grains
    objective: Objective = Objective.mean
    attribution: AttributionMethod = AttributionMethod.integrated_gradients
    baseline: Baseline = Baseline.mean
    ig_points: int | None = None
    ig_max_points: int = 257
    ig_tolerance: float = 0.05
    smoothgrad_samples: int = 32
    smoothgrad_noise: float = 0.1
    k: int | None = None
    tokens: Tokens = Tokens.joint
    mask: Mask = Mask.baseline
    read: Read | None = None
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
        if self.read is Read.prompt_end and self._compares_responses:
            raise InputError(
                f"--read is '{self.read}', where --method {self.method} finds no difference "
                f"between two responses; expected {Read.response_start}, {Read.response_end} or "
                f"{Read.response_mean}"
            )

    @property
    def read_at(self) -> Read:
        """Where block outputs are read: `read`, or the method's own place."""
        if self.read is not None:
            return self.read
        return Read.response_end if self._compares_responses else Read.prompt_end

    def most(self, has_image: bool) -> int:
        """How many tokens T+ and T- of a prompt have at most."""
        return self.k if self.k is not None else IMAGE_K if has_image else TEXT_K

    def facts(self, has_image: Iterable[bool] = (False,)) -> dict[str, Any]:
        """The options that mean something to the method and the data, by name.

        Args:
            has_image: of each prompt.
        """
        kinds = sorted(set(has_image))
        most = {("image" if kind else "text"): self.most(kind) for kind in kinds}
        facts = asdict(self) | {"read": self.read_at}
        facts["k"] = next(iter(most.values())) if len(set(most.values())) == 1 else most
        if kinds == [False]:
            del facts["tokens"]
        return {name: value for name, value in facts.items() if self._applies(name)}

    def require_meaning(self, names: Iterable[str]) -> None:
        """Raises InputError if one of the options `names` says nothing to the method."""
        strange = [
            f"--{name.replace('_', '-')}" for name in sorted(names) if not self._applies(name)
        ]
        if strange:
            raise InputError(
                f"{', '.join(strange)}: has no meaning with --method {self.method}; leave it out"
            )

    @property
    def _compares_responses(self) -> bool:
        return self.method in (Method.caa, Method.pca_diff, Method.icv)

    def _applies(self, name: str) -> bool:
        if self.method is Method.grains or name in _COMMON:
            return True
        return name == "read" and self._compares_responses
