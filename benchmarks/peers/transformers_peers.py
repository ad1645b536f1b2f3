"""The contestants on top of transformers: batched `generate`, one vector for the whole batch."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class Plain:
    """transformers alone; see worker.Peer."""

    def __init__(self, folder: Path) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        path = str(folder / "model")
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.model.to(self.device).eval()
        rows = json.loads((folder / "added.json").read_text())
        self.added = {name: torch.tensor(row, device=self.device) for name, row in rows.items()}

    def generate(
        self, prompts: list[list[int]], steer: list[str | None], tokens: int, fresh: bool
    ) -> dict[str, Any]:
        if len(set(steer)) > 1:
            raise ValueError("one vector for the whole batch")
        name = steer[0]
        ids = torch.tensor(prompts, device=self.device)
        with ExitStack() as stack, torch.inference_mode():
            if name is not None:
                self.steer(name, stack)
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
        return {"tokens": out[:, ids.shape[1] :].tolist()}

    def steer(self, name: str, stack: ExitStack) -> None:
        """Steers until `stack` is closed."""
        raise ValueError("nothing here steers")


class Hooks(Plain):
    """A forward hook on every decoder layer, as a plain script does it."""

    shift: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def steer(self, name: str, stack: ExitStack) -> None:
        for layer, row in zip(self.model.model.layers, self.added[name], strict=True):
            handle = layer.register_forward_hook(self._hook(row))
            stack.callback(handle.remove)

    def _hook(self, row: torch.Tensor) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (type(self).shift(output[0], row), *output[1:])
            return type(self).shift(output, row)

        return hook


class NormHooks(Hooks):
    @staticmethod
    def shift(h: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        u = h + row
        return u * (h.norm(dim=-1, keepdim=True) / u.norm(dim=-1, keepdim=True))


class AdditiveHooks(Hooks):
    @staticmethod
    def shift(h: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return h + row


class Repeng(Plain):
    """repeng's ControlModel, with its `normalize`."""

    def __init__(self, folder: Path) -> None:
        from repeng import ControlModel, ControlVector

        super().__init__(folder)
        layers = range(len(self.model.model.layers))
        self.model = ControlModel(self.model, list(layers))
        self._vectors = {
            name: ControlVector("llama", {n: rows[n].cpu().numpy() for n in layers})
            for name, rows in self.added.items()
        }

    def steer(self, name: str, stack: ExitStack) -> None:
        self.model.set_control(self._vectors[name], normalize=True)
        stack.callback(self.model.reset)


class SteeringVectors(Plain):
    """steering-vectors' `apply`."""

    def steer(self, name: str, stack: ExitStack) -> None:
        from steering_vectors import SteeringVector

        vector = SteeringVector(dict(enumerate(self.added[name])))
        stack.enter_context(vector.apply(self.model))


PEERS: dict[str, Callable[[Path], Plain]] = {
    "transformers": Plain,
    "hooks-norm": NormHooks,
    "hooks-additive": AdditiveHooks,
    "repeng": Repeng,
    "steering-vectors": SteeringVectors,
}
