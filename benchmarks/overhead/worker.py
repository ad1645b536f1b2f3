"""A process that runs vLLM's own benchmarks over and over: imports and engines are paid for once.

    python -m benchmarks.overhead.worker REPLIES

It reads tasks from standard input, one JSON object a line, and answers each with a line on the
file descriptor REPLIES. A task has `bench` (serve, latency or throughput), `argv` as the command
line has it, and `steering`, the requests' steering fields, taken in turn. For latency and
throughput the first task's engine is kept for all that follow.
"""

import asyncio
import itertools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Task = dict[str, Any]


def main() -> None:
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # engines below must not keep the pipe open
    with os.fdopen(descriptor, "w", buffering=1) as replies:
        for line in sys.stdin:
            task = json.loads(line)
            try:
                reply: dict[str, Any] = {"result": BENCHES[task["bench"]](task)}
            except BaseException as error:  # vLLM's parser ends the process on a wrong flag
                traceback.print_exc()
                reply = {"error": f"{type(error).__name__}: {error}"}
            replies.write(json.dumps(reply) + "\n")


def _serve(task: Task) -> dict[str, Any]:
    from vllm.benchmarks import serve
    from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS

    original = ASYNC_REQUEST_FUNCS["openai"]
    ASYNC_REQUEST_FUNCS["openai"] = _in_turn(original, task["steering"])
    try:
        return asyncio.run(serve.main_async(_parsed(serve, task)))
    finally:
        ASYNC_REQUEST_FUNCS["openai"] = original


def _in_turn(ask: Callable[..., Any], steering: list[dict[str, Any]]) -> Callable[..., Any]:
    """vLLM's request function with steering of its own for every request: --extra-body has one."""
    count = itertools.count()

    async def asked(request_func_input: Any, *args: Any, **kwargs: Any) -> Any:
        if steering:
            mine = steering[next(count) % len(steering)]
            body = {**(request_func_input.extra_body or {}), "vllm_xargs": mine}
            request_func_input.extra_body = body
        return await ask(request_func_input, *args, **kwargs)

    return asked


def _latency(task: Task) -> dict[str, Any]:
    from vllm.benchmarks import latency

    return _offline(latency, task)


def _throughput(task: Task) -> dict[str, Any]:
    from vllm.benchmarks import throughput

    return _offline(throughput, task)


def _offline(module: Any, task: Task) -> dict[str, Any]:
    import vllm

    if not isinstance(vllm.LLM, _Kept):
        vllm.LLM = _Kept(vllm.LLM)
    kept = vllm.LLM
    kept.steering, kept.steered, kept.requests = task["steering"], 0, 0
    kept.forget_prefixes()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        module.main(_parsed(module, {**task, "argv": [*task["argv"], "--output-json", str(out)]}))
        result: dict[str, Any] = json.loads(out.read_text())
    return {
        **result,
        "steered": kept.steered,
        "requests": kept.requests,
        "engine": kept.facts(),
        "plugin_loaded": "grains_vllm.plugin" in sys.modules,
    }


class _Kept:
    """Stands in for `vllm.LLM`: one engine for every benchmark, requests steered in turn."""

    def __init__(self, build: Any) -> None:
        self._build, self._llm = build, None
        self.steering: list[dict[str, Any]] = []
        self.steered = self.requests = 0

    def from_engine_args(self, engine_args: Any) -> "_Kept":
        if self._llm is None:
            self._llm = self._build.from_engine_args(engine_args)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def forget_prefixes(self) -> None:
        if self._llm is not None and not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset: blocks are in use")

    def generate(self, prompts: list[Any], sampling_params: Any, **kwargs: Any) -> Any:
        """`LLM.generate`; every arm pays for the same copies of the sampling parameters."""
        given = sampling_params if isinstance(sampling_params, list) else None
        params = [(given[n] if given else sampling_params).clone() for n in range(len(prompts))]
        if self.steering:
            for number, mine in enumerate(params):
                mine.extra_args = dict(self.steering[number % len(self.steering)])
        outputs = self._llm.generate(prompts, params, **kwargs)  # type: ignore[attr-defined]
        self.requests += len(outputs)
        self.steered += sum(bool(getattr(output, "grains", None)) for output in outputs)
        return outputs

    def facts(self) -> dict[str, Any]:
        """What the engine runs: `CompilationMode` and `CUDAGraphMode` by name, and the dtype."""
        config = self._llm.llm_engine.vllm_config  # type: ignore[attr-defined]
        compilation = config.compilation_config
        return {
            "mode": getattr(compilation.mode, "name", str(compilation.mode)),
            "cudagraph_mode": getattr(
                compilation.cudagraph_mode, "name", str(compilation.cudagraph_mode)
            ),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        }


def _parsed(module: Any, task: Task) -> Any:
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()  # as the vllm command has by then; VLLM_PLUGINS says which
    parser = FlexibleArgumentParser()
    module.add_cli_args(parser)
    return parser.parse_args(task["argv"])


BENCHES = {"serve": _serve, "latency": _latency, "throughput": _throughput}

if __name__ == "__main__":
    main()
