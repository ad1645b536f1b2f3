"""Prefix caching: each KV block is keyed by what has steered the tokens up to its end, no more.

A block that ends before the first steered token keeps vLLM's own key, so that a request steered in
its answer only shares its prompt's KV with everybody. vLLM chains the keys, so a block's key need
only tell what has happened up to there.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from grains_vllm.marker import TermMarker, marker_of
from grains_vllm.selection import RESERVED


def block_key(terms: Sequence[TermMarker], block_end: int) -> str:
    """What steers the tokens before `block_end`; "" if nothing does.

    Two requests with the same tokens get the same key exactly if the same tokens of this prefix
    are shifted alike: a span that goes on beyond the block counts as open.
    """
    return ";".join(
        f"{term['key']}:{here}" for term in terms if (here := _spans_before(term, block_end))
    )


def _spans_before(term: TermMarker, block_end: int) -> str:
    return ",".join(
        f"{start}:" + ("" if end is None or end >= block_end else str(end))
        for start, end in term["spans"]
        if start < block_end
    )


def _reach(request: Any, block_end: int) -> int:
    """Up to where steering may change the KV of tokens before `block_end`.

    Where a model lets the tokens of an image see each other (Gemma 3), the part of an image that
    lies in a block depends on the part behind it.
    """
    for feature in request.mm_features or ():
        place = feature.mm_position
        if place.offset < block_end < place.offset + place.length:
            return int(place.offset + place.length)
    return block_end


def _generate_block_hash_extra_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> Any:
        found = original(request, start_token_idx, end_token_idx, start_mm_idx)
        marker = marker_of(request)
        if marker and (mine := block_key(marker["terms"], _reach(request, end_token_idx))):
            keys, next_mm_idx = found
            # A pair (tag, value), as vLLM's own keys are since it tags them.
            return (*(keys or ()), (RESERVED, mine)), next_mm_idx
        return found

    return generate_block_hash_extra_keys


EXTRA_KEYS = {"generate_block_hash_extra_keys": _generate_block_hash_extra_keys}
