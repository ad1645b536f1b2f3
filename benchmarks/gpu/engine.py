"""One vLLM engine in a process of its own: asks it batches, and writes down every bit.

    python -m benchmarks.gpu.engine JOB RESULT

JOB is JSON: `model`, `engine` (arguments of vllm.LLM), `batches` (name -> requests with `prompt`,
token ids, and `extra_args`), `max_tokens`, and `interpreted`: the V2 runner on a CPU, as a trial.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from grains_vllm.vectors import write_aside


def main(job_path: str, result_path: str) -> None:
    # In one process all requests are there before the first step, so that equal batches take equal
    # steps; bits depend on who is computed together with whom.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    job = json.loads(Path(job_path).read_text())
    if job["interpreted"]:
        import_module("tests.engine.interpreted_triton").select_v2_runner()
    from vllm import LLM, SamplingParams

    llm = LLM(job["model"], skip_tokenizer_init=True, max_model_len=256, **job["engine"])
    answers = {}
    for name, batch in job["batches"].items():
        if not llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset")
        outputs = llm.generate(
            [{"prompt_token_ids": request["prompt"]} for request in batch],
            [
                SamplingParams(
                    max_tokens=job["max_tokens"], temperature=0, logprobs=0, prompt_logprobs=0,
                    detokenize=False, ignore_eos=True, extra_args=request["extra_args"],
                )
                for request in batch
            ],
            use_tqdm=False,
        )  # fmt: skip
        answers[name] = [_answer(output) for output in outputs]
    compilation = llm.llm_engine.vllm_config.compilation_config
    facts = {
        "mode": compilation.mode.name,
        "cudagraph_mode": compilation.cudagraph_mode.name,
        "runner": llm.collective_rpc(_runner)[0],
        "plugin_loaded": "grains_vllm.plugin" in sys.modules,
    }
    write_aside(result_path, json.dumps({"facts": facts, "answers": answers}).encode())


def _runner(worker: Any) -> str:
    return type(worker.model_runner).__module__


def _answer(output: Any) -> dict[str, Any]:
    """Tokens, and log p of every token after the first, prompt and answer; JSON keeps all bits."""
    answer = output.outputs[0]
    tokens = list(answer.token_ids)
    prompt = [next(iter(step.values())).logprob for step in output.prompt_logprobs[1:]]
    own = [step[token].logprob for step, token in zip(answer.logprobs, tokens, strict=True)]
    return {
        "tokens": tokens,
        "logprobs": prompt + own,
        "steered": bool(getattr(output, "grains", None)),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
