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
    are shifted alike: an interval that goes on beyond the block counts as open.
    """
    return ";".join(
        f"{term['key']}:{term['start']}:"
        + ("" if term["end"] is None or term["end"] >= block_end else str(term["end"]))
        for term in terms
        if term["start"] < block_end
    )


def _generate_block_hash_extra_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> Any:
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        marker = marker_of(request)
        if marker and (mine := block_key(marker["terms"], end_token_idx)):
            # A pair (tag, value), as vLLM's own keys are since it tags them.
            keys = (*(keys or ()), (RESERVED, mine))
        return keys, next_mm_idx

    return generate_block_hash_extra_keys


EXTRA_KEYS = {"generate_block_hash_extra_keys": _generate_block_hash_extra_keys}
