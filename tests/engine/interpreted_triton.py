"""vLLM's V2 model runner on a CPU: its Triton kernels run in Triton's interpreter, one program
instance after the other.

A test-only arrangement. vLLM uses Triton on a CPU only where Triton has a back end "cpu" whose
driver is active; the interpreter needs none, so a stand-in says so. What it shows is the runner's
bookkeeping on real batches; it says nothing of compiled kernels, CUDA graphs or streams.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def select_v2_runner() -> None:
    """Makes engines of this process, and of those it forks, use the V2 model runner.

    To be called before vLLM or Triton is imported.
    """
    os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
    from triton.backends import backends
    from triton.runtime.interpreter import InterpreterBuilder

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(
            InterpreterBuilder, name, _with_a_bool_mask(getattr(InterpreterBuilder, name), place)
        )


def _with_a_bool_mask(method: Callable[..., Any], place: int) -> Callable[..., Any]:
    """The interpreter takes no masks of other types, though its own operators make such ones."""

    def masked(self: Any, *args: Any, **kwargs: Any) -> Any:
        mask = args[place]
        mask = type(mask)(mask.data.astype(bool), mask.dtype)
        return method(self, *args[:place], mask, *args[place + 1 :], **kwargs)

    return masked
