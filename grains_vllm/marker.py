"""The marker: what the front end writes into a request for scheduler, workers and receipts.

It travels in `SamplingParams.extra_args` under the reserved key, as plain JSON-able data, and says
everything in absolute terms, so that nobody after the front end needs the catalogue.
"""

from collections.abc import Iterable
from typing import Any, TypedDict

import numpy as np

from grains_vllm.positions import Positions
from grains_vllm.selection import RESERVED, Choice


class TermMarker(TypedDict):
    """One vector's part: the positions in its spans get strength times its row.

    Attributes:
        key: equal only for parts that shift a token alike.
        spans: disjoint [start, end) in order (end None: no limit); empty where the request has no
            such token.
    """

    key: str
    name: str
    vector: str
    layers: list[int]
    scale: str
    slot: str
    strength: float
    positions: str
    spans: list[tuple[int, int | None]]


class Marker(TypedDict, total=False):
    """See the module.

    Attributes:
        terms: canonical order; empty for a request that a canary left alone.
        digest: Steering.digest, or "".
        prompt_tokens: where the prompt ends for `positions`.
        source: "request", "default" or "canary".
        fraction: the canary's share, where it threw its dice.
        layer_output: "unchecked" where how the layers hand on their stream is the YAML's word.
    """

    terms: list[TermMarker]
    digest: str
    prompt_tokens: int
    source: str
    fraction: float
    layer_output: str


def build(
    choice: Choice,
    border: int,
    held: Iterable[tuple[str, int, int]] = (),
    unchecked: bool = False,
) -> Marker | None:
    """The marker of a request, or None if there is nothing to say about it.

    Args:
        border: how many of its tokens count as prompt.
        held: what else than text they hold, as Positions.spans takes it.
        unchecked: Catalogue.unchecked.
    """
    if choice.steering is None and choice.fraction is None:
        return None
    terms: list[TermMarker] = []
    held = list(held)
    for term in choice.steering.terms if choice.steering else ():
        terms.append(
            {
                "key": f"{term.slot_key}:{np.float32(term.strength).tobytes().hex()}",
                "name": term.entry.name,
                "vector": term.entry.digest,
                "layers": list(term.layers),
                "scale": term.entry.scale,
                "slot": term.slot_key,
                "strength": term.strength,
                "positions": term.positions,
                "spans": Positions.parse(term.positions).spans(border, held),
            }
        )
    marker: Marker = {
        "terms": terms,
        "digest": choice.steering.digest if choice.steering else "",
        "prompt_tokens": border,
        "source": choice.source,
    }
    if choice.fraction is not None:
        marker["fraction"] = choice.fraction
    if unchecked:
        marker["layer_output"] = "unchecked"
    return marker


def marker_of(request: Any) -> Marker | None:
    """The marker of anything that has `sampling_params`: a request of any of vLLM's layers."""
    params = getattr(request, "sampling_params", None)
    extra = getattr(params, "extra_args", None)
    return extra.get(RESERVED) if extra else None
