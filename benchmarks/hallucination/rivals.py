"""The vectors that compete, all from the same pairs: GrAInS over all tokens, over the text's alone
and the image's alone, and its rivals."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.testbed.methods import extracted, random_vector
from grains_vllm.vectors import SteeringVector
from offline.model import Decoder
from offline.options import AttributionMethod, ExtractOptions, Method, Read, Tokens
from offline.pairs import PairSet
from offline.passport import Record

GRAINS = "grains"
KS = (3, 10, 50)  # 50, the default for prompts with an image, is every token of these prompts
VARIANTS = {"grains-text": Tokens.text, "grains-image": Tokens.image}
CAA = {
    "caa-last": Read.response_end,
    "caa-first": Read.response_start,
    "caa-mean": Read.response_mean,
}
RANDOM_DIRECTIONS, RANDOM_TOKENS = 5, 3
TITLES = {
    "base": "base",
    GRAINS: "GrAInS, image and text",
    "grains-text": "GrAInS, text tokens only",
    "grains-image": "GrAInS, image tokens only",
    "caa-last": "CAA, last answer token",
    "caa-first": "CAA, first answer token",
    "caa-mean": "CAA, mean over the answer",
    "random": "random direction",
    "random-tokens": "random tokens masked",
    "opposite": "opposite vector",
}


@dataclass(frozen=True)
class Rival:
    """One vector of one method, a key of TITLES; random methods have several draws."""

    method: str
    vector: SteeringVector
    draw: int | None = None

    @property
    def name(self) -> str:
        return self.method if self.draw is None else f"{self.method}-{self.draw}"


def grains(
    decoder: Decoder, data: PairSet, k: int, folder: Path
) -> tuple[SteeringVector, list[Record]]:
    """GrAInS over text and image together."""
    return extracted(decoder, data, ExtractOptions(k=k), folder / f"{GRAINS}-{k}.safetensors")


def rivals(
    decoder: Decoder, data: PairSet, k: int, own: SteeringVector, folder: Path
) -> Iterator[Rival]:
    """Everything that GrAInS, with its k, is compared with; made in `folder` as needed."""

    def made(name: str, options: ExtractOptions) -> SteeringVector:
        return extracted(decoder, data, options, folder / f"{name}.safetensors")[0]

    for name, tokens in VARIANTS.items():
        yield Rival(name, made(f"{name}-{k}", ExtractOptions(k=k, tokens=tokens)))
    for name, read in CAA.items():
        yield Rival(name, made(name, ExtractOptions(method=Method.caa, read=read)))
    yield Rival("opposite", replace(own, directions=-own.directions))
    for draw in range(RANDOM_DIRECTIONS):
        yield Rival("random", random_vector(own, draw), draw)
    for draw in range(RANDOM_TOKENS):
        options = ExtractOptions(k=k, attribution=AttributionMethod.random, seed=draw)
        yield Rival("random-tokens", made(f"random-tokens-{k}-{draw}", options), draw)
