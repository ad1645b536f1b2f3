"""vLLM's compile-cache key: of the whole catalogue, only what the graph depends on counts.

vLLM hashes `additional_config` as it stands; another strength, path or description would make the
next start compile everything again, and a catalogue that changes while serving proves it needless.
"""

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

from grains_vllm.catalogue import KEY, catalogue_of


def _compute_hash(original: Callable[..., str]) -> Callable[..., str]:
    @wraps(original)
    def compute_hash(self: Any) -> str:
        catalogue = catalogue_of(self)
        if catalogue is None:
            return original(self)
        hashed = copy.copy(self)
        hashed.additional_config = {**self.additional_config, KEY: catalogue.compiled()}
        return original(hashed)

    return compute_hash


VLLM_CONFIG = {"compute_hash": _compute_hash}
