"""The contestants inside vLLM: without a plugin, with grains-vllm, with hotwire-vllm."""

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.peers.world import LAYERS


class VllmPeer:
    """One engine; see worker.Peer."""

    def __init__(self, kind: str, folder: Path, eager: bool) -> None:
        self._kind = kind
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="none" if kind == "vllm" else kind
        )
        more: dict[str, Any] = {"enforce_eager": eager}
        if kind == "grains":
            more["additional_config"] = {"grains": {"config": str(folder / "steering.yaml")}}
        if kind == "hotwire":
            more |= _prepare_hotwire(folder)
        from vllm import LLM

        self._llm = LLM(
            str(folder / "model"),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=512,
            block_size=32,
            **_share(),
            **more,
        )

    def generate(
        self, prompts: list[list[int]], steer: list[str | None], tokens: int, fresh: bool
    ) -> dict[str, Any]:
        from vllm import SamplingParams

        if fresh:
            self._llm.reset_prefix_cache()
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [
                SamplingParams(
                    max_tokens=tokens,
                    temperature=0,
                    detokenize=False,
                    ignore_eos=True,
                    extra_args=self._extra_args(name),
                )
                for name in steer
            ],
            use_tqdm=False,
        )
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "cached": [output.num_cached_tokens or 0 for output in outputs],
        }

    def _extra_args(self, name: str | None) -> dict[str, Any] | None:
        if name is None:
            return None
        if self._kind == "grains":
            return {"steering": name}
        if self._kind == "hotwire":
            return {"hotwire": json.dumps([{"id": name, "layer": n} for n in range(LAYERS)])}
        raise ValueError("this vLLM has no plugin")


def _share() -> dict[str, float]:
    """The contestants are alive at the same time: each gets a share of a GPU's memory."""
    import torch

    return {"gpu_memory_utilization": 0.2} if torch.cuda.is_available() else {}


def _prepare_hotwire(folder: Path) -> dict[str, Any]:
    """Its vectors as files of its own format; without a GPU, two crutches.

    Triton's interpreter runs the kernel as Python, token by token: right, but nobody's speed. And
    its wrapper of `load_model` is put on the CPU's runner too, which has a `load_model` of its own:
    without that, every request would be answered unsteered.
    """
    import torch

    vectors = folder / "hotwire"
    vectors.mkdir(exist_ok=True)
    for name, rows in json.loads((folder / "added.json").read_text()).items():
        torch.save(torch.tensor(rows), vectors / f"{name}.pt")
    os.environ.update(HOTWIRE_VECTORS=str(vectors), HOTWIRE_SLOTS="64")
    if torch.cuda.is_available():
        return {}
    os.environ["TRITON_INTERPRET"] = "1"
    from hotwire import _patch
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load_model = CPUModelRunner.load_model

    def loaded(self: Any, *args: Any, **kwargs: Any) -> None:
        load_model(self, *args, **kwargs)
        _patch._install_into_model(self)

    CPUModelRunner.load_model = loaded
    return {"enforce_eager": True}
