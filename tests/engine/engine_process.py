"""Runs one vLLM engine in a process of its own: reads a JSON job, writes a JSON result.

A process per engine, because vLLM keeps global state that two engines of one process would share.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
)


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())

    from torch._dynamo.utils import counters
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    llm = LLM(
        job["model"],
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_batched_tokens=256,  # Small: batches of long prompts are prefilled in chunks.
        block_size=32,
        **job["engine"],
    )

    def params(request: dict[str, Any]) -> Any:
        return SamplingParams(
            max_tokens=request.get("max_tokens", 4),
            temperature=0,
            logprobs=0,
            prompt_logprobs=request.get("prompt_logprobs"),
            detokenize=False,
            ignore_eos=True,
            extra_args=request.get("extra_args"),
        )

    def answer(output: Any) -> dict[str, Any]:
        return {
            "prompt_logprobs": [
                next(iter(step.values())).logprob for step in (output.prompt_logprobs or [])[1:]
            ],
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                step[token].logprob
                for step, token in zip(
                    output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True
                )
            ],
            "cached": output.num_cached_tokens,
            "receipt": getattr(output, "grains", None),
        }

    config = llm.llm_engine.vllm_config
    result: dict[str, Any] = {"runner": "v2" if config.use_v2_model_runner else "v1"}
    prompts: dict[str, list[int]] = {}

    def prompt(request: dict[str, Any]) -> list[int]:
        """A request's own tokens, after the conversation that it goes on with."""
        before = request.get("follows")
        if before is None:
            return request["prompt"]
        return prompts[before] + result[before]["answers"][0]["tokens"] + request["prompt"]

    graphs = counters["stats"]["unique_graphs"]
    for name, batch in job["batches"].items():
        if batch.get("fresh_cache", True):
            llm.reset_prefix_cache()
        tokens = [prompt(request) for request in batch["requests"]]
        prompts[name] = tokens[0]
        try:
            outputs = llm.generate(
                [{"prompt_token_ids": ids} for ids in tokens],
                [params(request) for request in batch["requests"]],
                use_tqdm=False,
            )
        except VLLMValidationError as error:
            result[name] = {"error": str(error)}
        else:
            result[name] = {"answers": [answer(output) for output in outputs]}
    if not job["engine"].get("disable_log_stats", True):
        result["metrics"] = {
            metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")
        }
    result["graphs"] = {"start": graphs, "end": counters["stats"]["unique_graphs"]}
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
