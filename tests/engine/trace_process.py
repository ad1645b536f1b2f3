"""Runs one engine step by step, and writes down what every token of every batch was given.

Reads a JSON job, writes a JSON result. What is written down is read where the layers read it: the
buffers of the first decoder layer at the moment of its forward, beside the positions that the model
itself gets. Whose row it is, the runner's own batch says.
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

    from vllm import LLM, SamplingParams

    llm = LLM(
        job["model"], skip_tokenizer_init=True, max_model_len=256, block_size=32, **job["engine"]
    )
    assert llm.llm_engine.vllm_config.use_v2_model_runner == (job["runner"] == "v2")
    steps = llm.collective_rpc(lambda worker: record(worker.model_runner))[0]
    engine, outputs = llm.llm_engine, {}
    arrivals = dict(enumerate(job["requests"]))
    for step in range(1000):
        for number, request in list(arrivals.items()):
            if request.get("arrives", 0) <= step:
                del arrivals[number]
                params = SamplingParams(
                    max_tokens=request["max_tokens"],
                    temperature=0,
                    logprobs=0,
                    detokenize=False,
                    ignore_eos=True,
                    extra_args=request["extra_args"],
                )
                engine.add_request(str(number), {"prompt_token_ids": request["prompt"]}, params)
        for number, request in enumerate(job["requests"]):
            if request.get("cancelled") == step:
                engine.abort_request([str(number)])
        if step % 10 == 9:  # as an idle rank of a data-parallel engine does
            llm.collective_rpc("execute_dummy_batch")
        for output in engine.step():
            if output.finished:
                outputs[output.request_id] = answer(output.outputs[0])
        if not arrivals and not engine.has_unfinished_requests():
            break
    trace = list(steps)
    # The workers hear of the last to finish with the next batch.
    llm.generate([{"prompt_token_ids": [2]}], SamplingParams(max_tokens=1), use_tqdm=False)
    stats = llm.collective_rpc("grains_stats")[0]
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    result = {
        "steps": trace,
        "answers": outputs,
        "preemptions": metrics["vllm:num_preemptions"],
        "left": {name: stats[name] for name in ("requests", "slots_in_use")},
    }
    Path(result_path).write_text(json.dumps(result))


def answer(output: Any) -> dict[str, Any]:
    pairs = zip(output.logprobs, output.token_ids, strict=True)
    return {
        "tokens": list(output.token_ids),
        "logprobs": [step[token].logprob for step, token in pairs],
    }


def record(runner: Any) -> list[Any]:
    """The list to which each forward of `runner` adds what its layers read.

    "rows": [request, position, slots, bits of the strengths] of each token; "added": what vectors
    add to it on each layer, times 1, 2, 3, ... (one number says which vectors, and how strong);
    "tail": how many entries after the last token are not zero. A dummy batch has a tail only.
    """
    import torch

    name = "prepare_inputs" if hasattr(runner, "prepare_inputs") else "_prepare_inputs"
    prepare_inputs, dummy_run = getattr(runner, name), runner._dummy_run
    owners: list[str] = []

    def prepare_and_note(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare_inputs(scheduler_output, *args, **kwargs)
        batch = prepared if name == "prepare_inputs" else runner.input_batch
        owners[:] = [
            req_id.partition("-")[0]  # vLLM appends random digits to our number
            for req_id in batch.req_ids
            for _ in range(scheduler_output.num_scheduled_tokens[req_id])
        ]
        return prepared

    def forget_and_run(*args: Any, **kwargs: Any) -> Any:
        owners.clear()
        return dummy_run(*args, **kwargs)

    setattr(runner, name, prepare_and_note)
    runner._dummy_run = forget_and_run
    layers = runner.get_model().model.layers
    probe = torch.arange(1.0, layers[0].grains_direction.shape[1] + 1)
    steps: list[Any] = []

    def note(layer: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        positions = named["positions"] if "positions" in named else inputs[0]
        tokens = len(owners)
        assert len(positions) == tokens or not owners
        slot, strength = layer.grains_slot, layer.grains_strength
        added = [
            sum(
                strength[:tokens, part]
                * (other.grains_gain * (other.grains_direction @ probe))[slot[:tokens, part]]
                for part in range(slot.shape[1])
            ).tolist()
            for other in layers
        ]
        # Raw bits: the two runners must agree on every one of them.
        bits = strength.view(torch.int32)[:tokens].tolist()
        rows = zip(owners, positions[:tokens].tolist(), slot[:tokens].tolist(), bits, strict=True)
        steps.append(
            {
                "rows": [list(row) for row in rows],
                "added": list(zip(*added, strict=True)),
                "tail": int((slot[tokens:] != 0).sum() + (strength[tokens:] != 0).sum()),
            }
        )

    layers[0].register_forward_pre_hook(note, with_kwargs=True)
    return steps


if __name__ == "__main__":
    main(*sys.argv[1:])
