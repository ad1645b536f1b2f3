"""Runs one engine with vLLM's other features switched on: reads a JSON job, writes a JSON result.

Unlike engine_process.py it has a tokenizer, takes several answers per prompt, adapters, grammars
and calls to the workers between its batches, and reports vLLM's own counters.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # Two workers may share one processor.
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
)


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

    from tests.vision import picture

    as_on_gpus(
        job["engine"].pop("async_scheduling", False), job["engine"].pop("forked_workers", False)
    )
    llm = LLM(
        job["model"],
        max_model_len=256,
        block_size=32,
        disable_log_stats=False,
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "max_num_batched_tokens": 256,  # Small: batches of long prompts come in chunks.
            **job["engine"],
        },
    )

    def params(request: dict[str, Any]) -> Any:
        regex = request.get("regex")
        return SamplingParams(
            n=request.get("n", 1),
            seed=request.get("seed"),
            max_tokens=request.get("max_tokens", 4),
            temperature=request.get("temperature", 0),
            logprobs=0,
            prompt_logprobs=request.get("prompt_logprobs"),
            ignore_eos=regex is None,
            # Reported log-probabilities are those before the bias.
            logit_bias={token: -100.0 for token in request.get("never", ())} or None,
            structured_outputs=StructuredOutputsParams(regex=regex) if regex else None,
            extra_args=request.get("extra_args"),
        )

    def lora(request: dict[str, Any]) -> Any:
        path = request.get("lora")
        return LoRARequest(Path(path).name, 1, path) if path else None

    def sample(output: Any) -> dict[str, Any]:
        steps = zip(output.logprobs, output.token_ids, strict=True)
        return {
            "text": output.text,
            "tokens": list(output.token_ids),
            "logprobs": [step[token].logprob for step, token in steps],
        }

    def prompt(request: dict[str, Any]) -> dict[str, Any]:
        found = {"prompt_token_ids": request["prompt"]}
        if images := [picture(seed, tuple(size)) for seed, size in request.get("images", ())]:
            found["multi_modal_data"] = {"image": images}
        return found

    def answer(output: Any) -> dict[str, Any]:
        return {
            "prompt": list(output.prompt_token_ids),
            "receipt": getattr(output, "grains", None),
            "prompt_logprobs": [
                next(iter(step.values())).logprob for step in (output.prompt_logprobs or [])[1:]
            ],
            "cached": output.num_cached_tokens,
            "samples": [sample(one) for one in output.outputs],
            **sample(output.outputs[0]),
        }

    def run(step: dict[str, Any]) -> dict[str, Any]:
        if "rpc" in step:
            llm.collective_rpc(step["rpc"], kwargs=step.get("kwargs"))
            return {}
        if step.get("fresh_cache", True):
            llm.reset_prefix_cache()
        requests = step["requests"]
        prompts = [prompt(request) for request in requests]
        if width := step.get("beam"):
            beams = llm.beam_search(prompts, BeamSearchParams(beam_width=width, max_tokens=4))
            return {
                "beams": [
                    [{"tokens": beam.tokens, "score": beam.cum_logprob} for beam in one.sequences]
                    for one in beams
                ]
            }
        outputs = llm.generate(
            prompts,
            [params(request) for request in requests],
            lora_request=[lora(request) for request in requests],
            use_tqdm=False,
        )
        return {"answers": [answer(output) for output in outputs]}

    result = {name: run(step) for name, step in job["steps"].items()}
    result["counters"] = {
        metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")
    }
    Path(result_path).write_text(json.dumps(result))


def as_on_gpus(async_scheduling: bool, forked_workers: bool) -> None:
    """What vLLM does on GPUs but not on CPUs: steps are sent off ahead of the last one's results,
    and workers are forks."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        original(vllm_config)
        if forked_workers:
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        if async_scheduling:
            scheduler = vllm_config.scheduler_config
            scheduler.async_scheduling = True
            scheduler.scheduler_cls = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)


if __name__ == "__main__":
    main(*sys.argv[1:])
