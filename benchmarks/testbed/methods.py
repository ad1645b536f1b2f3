"""The vectors that compete: GrAInS, its rivals, and what should do nothing.

Every method gets the same 50 pairs and, later, the same choice of layers and strength.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from grains_vllm.vectors import SteeringVector, write_aside
from offline.extract import extract, finish
from offline.model import Decoder
from offline.options import AttributionMethod, Baseline, ExtractOptions, Method, Read
from offline.pairs import PairSet
from offline.passport import Record

OPTIONS = ExtractOptions(k=3)  # at most 5 of about 25 words of a prompt are planted cues
GRAINS = "grains"
# The variant for answers without a decisive word: read where the answer's words are chosen, and
# attributed against the trained mask token.
GRAINS_RESPONSE = "grains-response"
VARIANTS = {
    GRAINS_RESPONSE: replace(OPTIONS, read=Read.response_mean, baseline=Baseline.mask_token),
    "caa-last": ExtractOptions(method=Method.caa, read=Read.response_end),
    "caa-first": ExtractOptions(method=Method.caa, read=Read.response_start),
    "caa-mean": ExtractOptions(method=Method.caa, read=Read.response_mean),
    "pca-diff": ExtractOptions(method=Method.pca_diff),
    "icv": ExtractOptions(method=Method.icv),
}
RANDOM = ("random", "random-tokens", "random-tokens-raw")
TITLES = {
    "base": "base",
    GRAINS: "GrAInS",
    GRAINS_RESPONSE: "GrAInS, read over the answer",
    "opposite": "opposite vector",
    "label-swap": "label swap",
    "caa-last": "CAA, last answer token",
    "caa-first": "CAA, first answer token",
    "caa-mean": "CAA, mean over the answer",
    "pca-diff": "RepE (PCA of differences)",
    "icv": "ICV",
    "random": "random direction",
    "random-tokens": "random tokens masked",
    "random-tokens-raw": "random tokens, raw norm",
    "lora-sft": "LoRA, SFT",
    "lora-dpo": "LoRA, DPO",
}


@dataclass(frozen=True)
class Draws:
    """How many seeds the random methods get."""

    directions: int = 10
    tokens: int = 3


@dataclass(frozen=True)
class Candidate:
    """One vector of one method.

    Attributes:
        method: a key of TITLES.
        draw: which seed of a random method.
        matched: is measured at GrAInS's point instead of one of its own.
    """

    method: str
    vector: SteeringVector
    draw: int = 0
    matched: bool = False

    @property
    def name(self) -> str:
        return f"{self.method}-{self.draw}" if self.method in RANDOM else self.method


def candidates(decoder: Decoder, train: PairSet, folder: Path, draws: Draws) -> Iterator[Candidate]:
    """Extracts every vector into `folder`; those already there are read."""

    def made(name: str, options: ExtractOptions, data: PairSet = train) -> SteeringVector:
        return extracted(decoder, data, options, folder / f"{name}.safetensors")[0]

    grains = made(GRAINS, OPTIONS)
    yield Candidate(GRAINS, grains)
    yield Candidate("opposite", replace(grains, directions=-grains.directions))
    yield Candidate("label-swap", made("label-swap", OPTIONS, swapped(train)))
    for name, options in VARIANTS.items():
        yield Candidate(name, made(name, options))
    for draw in range(draws.directions):
        yield Candidate("random", random_vector(grains, draw), draw)
    for draw in range(draws.tokens):
        options = replace(OPTIONS, attribution=AttributionMethod.random, seed=draw)
        vector = made(f"random-tokens-{draw}", options)
        yield Candidate("random-tokens", vector, draw)
        yield Candidate("random-tokens-raw", raw_matched(vector, grains), draw, matched=True)


def extracted(
    decoder: Decoder, data: PairSet, options: ExtractOptions, out: Path
) -> tuple[SteeringVector, list[Record]]:
    """The vector at `out` and its records, extracted if they are not there yet."""
    records = out.with_suffix(".attributions.jsonl")
    if out.is_file() and records.is_file():
        lines = records.read_text().splitlines()
        return SteeringVector.load(out), [json.loads(line) for line in lines]
    out.parent.mkdir(parents=True, exist_ok=True)
    vector, found = extract(decoder, data, options, out)
    assert vector.passport["method"] == options.method, vector.passport["method"]
    write_aside(records, "".join(json.dumps(record) + "\n" for record in found).encode())
    finish(vector, out)
    return vector, found


def swapped(data: PairSet) -> PairSet:
    """The same pairs with chosen and rejected exchanged."""
    pairs = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in data.pairs]
    return replace(data, pairs=pairs)


def random_vector(like: SteeringVector, seed: int) -> SteeringVector:
    """Unit directions drawn evenly from the sphere; the reference norms are `like`'s."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(like.directions.shape, generator=generator)
    return replace(like, directions=rows / rows.norm(dim=1, keepdim=True), passport={})


def raw_matched(vector: SteeringVector, to: SteeringVector) -> SteeringVector:
    """`vector` as long relative to `to` as it was before both were made unit vectors.

    At the same strength, layer l then moves by raw_l(vector) / raw_l(to) of what `to` moves it by.
    """
    ratio = torch.tensor(_raw_norms(vector)) / torch.tensor(_raw_norms(to))
    return replace(vector, reference_norms=(to.reference_norms * ratio).float())


def _raw_norms(vector: SteeringVector) -> list[float]:
    return [layer["raw_norm"] for layer in vector.passport["layers"]]
