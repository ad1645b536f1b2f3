"""vLLM's `LLM`, imported late: whoever steers with transformers only need not have vLLM."""

import os
from typing import Any

from offline.errors import InputError


def import_llm(option: str) -> Any:
    """The class `vllm.LLM`, with its log kept off stdout, which belongs to --json.

    Args:
        option: what the user chose, for the message.

    Raises:
        InputError: vLLM is missing.
    """
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise InputError(f"{option}: vLLM cannot be imported ({error})") from error
    if current_platform.is_cpu():  # nothing to overlap with, and it starts sooner
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return LLM


def on_cpu() -> bool:
    """Whether vLLM would compute on a CPU; `import_llm` says first if there is no vLLM."""
    import_llm("--backend vllm")
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def refusals(images: bool = False) -> tuple[type[Exception], ...]:
    """What `LLM.generate` raises when it refuses a request; in vLLM 0.32 the second is no
    ValueError any more.

    Args:
        images: whether requests have images, whose places in a prompt may not be found.
    """
    from vllm.exceptions import VLLMValidationError

    return (ValueError, VLLMValidationError, *([RuntimeError] if images else []))
