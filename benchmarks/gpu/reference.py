"""The expected log-probabilities: transformers in float32, the shift written out in float64 hooks.

Shares no code with the product.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.world import REFERENCE_NORM, Size, vector


class Reference:
    """The model of `world.write`, on the GPU if there is one, with exact float32 products."""

    def __init__(self, model: Path, size: Size) -> None:
        from transformers import AutoModelForCausalLM

        torch.backends.cuda.matmul.allow_tf32 = False
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        )
        self._model, self._size = loaded.eval().to(self._device), size

    def logprobs(
        self, prompt: list[int], answer: list[int], steering: dict[str, Any] | None
    ) -> list[float]:
        """log p of each token after the first, prompt and answer."""
        ids = torch.tensor([prompt + answer], device=self._device)
        with ExitStack() as stack, torch.no_grad():
            if steering:
                number = int(steering["steering"].removeprefix("v"))
                rows = vector(self._size, number).directions.double().to(self._device)
                window = _window(
                    steering.get("steering_positions", "all"), len(prompt), ids.shape[1]
                ).to(self._device)
                gain = steering["steering_strength"] * REFERENCE_NORM
                for block, row in zip(self._model.model.layers, rows, strict=True):
                    handle = block.register_forward_hook(_shift(gain * row, window))
                    stack.callback(handle.remove)
            logits = self._model(ids).logits[0, :-1].double()
        chosen: list[float] = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
        return chosen


def _window(positions: str, border: int, length: int) -> torch.Tensor:
    """[length, 1] bool: which tokens are steered."""
    column = torch.arange(length)[:, None]
    return {"all": column >= 0, "prompt": column < border, "generation": column >= border}[
        positions
    ]


def _shift(added: torch.Tensor, window: torch.Tensor) -> Any:
    def shift(_module: Any, _inputs: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        h = stream.double()
        u = h + added
        moved = torch.where(window, u * (h.norm(dim=-1) / u.norm(dim=-1))[..., None], h)
        new = moved.to(stream.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return shift
