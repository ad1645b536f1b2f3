"""One real vLLM engine: which kernels a decode step runs, counted by torch.profiler.

A process of its own, because vLLM keeps global state: reads a JSON job, writes a JSON result.
"""

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

# In this process, where the profiler is; Inductor's C++ kernels then announce themselves to it.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
)

STEPS = 8  # decode steps that are counted
REQUESTS = 4
PROMPT = 16  # tokens


def main(job_path: str, result_path: str) -> None:
    """Args: a job {"model", "engine": arguments of LLM, "steering": [xargs or null, ...]}."""
    from vllm import LLM

    job = json.loads(Path(job_path).read_text())
    llm = LLM(job["model"], skip_tokenizer_init=True, load_format="dummy", **job["engine"])
    config = llm.llm_engine.vllm_config
    compiled = config.compilation_config
    result = {
        "mode": compiled.mode.name,
        "cudagraph_mode": compiled.cudagraph_mode.name,
        "v2_runner": bool(config.use_v2_model_runner),
        "kernels": [decode_step(llm, steering) for steering in job["steering"]],
    }
    Path(result_path).write_text(json.dumps(result))


def decode_step(llm: Any, steering: dict[str, Any] | None) -> dict[str, float]:
    """Runs of each kernel in one decode step: a longer answer less a shorter one, by the step."""
    few, many = (_profile(llm, steering, 4 + steps) for steps in (0, STEPS))
    counts = {name: (many[name] - few[name]) / STEPS for name in many}
    return {name: count for name, count in sorted(counts.items()) if count}


def _profile(llm: Any, steering: dict[str, Any] | None, tokens: int) -> Counter[str]:
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    gpu = torch.cuda.is_available()
    prompts = [{"prompt_token_ids": list(range(2 + i, 2 + i + PROMPT))} for i in range(REQUESTS)]
    params = SamplingParams(
        max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, extra_args=steering
    )

    def generate() -> None:
        llm.reset_prefix_cache()
        llm.generate(prompts, params, use_tqdm=False)

    generate()  # What happens only once is not counted.
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        generate()
        if gpu:
            torch.cuda.synchronize()
    events = profiler.events() or []
    if gpu:
        return Counter(event.name for event in events if event.device_type == DeviceType.CUDA)
    return Counter(_own_name(event.name) for event in events if _runs(event) and _outermost(event))


def _runs(event: Any) -> bool:
    """Whether it is a compiled kernel or an operator, and not a span around some."""
    return "cpp_fused" in event.name or "::" in event.name


def _outermost(event: Any) -> bool:
    """What an operator calls in turn is part of it."""
    parent = event.cpu_parent
    return parent is None or (not _runs(parent) and _outermost(parent))


def _own_name(name: str) -> str:
    """Without the number of the graph, which says which piece of the model it belongs to."""
    return re.sub(r"^graph_\d+_", "", name)


if __name__ == "__main__":
    main(*sys.argv[1:])
