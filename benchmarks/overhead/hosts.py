"""Both engines alive at once, plain and with grains, so that they can be asked in turns."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol
from urllib.request import Request, urlopen

import psutil  # type: ignore[import-untyped]

from benchmarks.overhead.arms import Arm
from benchmarks.overhead.record import Figures
from benchmarks.server import ROOT, environment, free_port, running

START_LIMIT_S = 1800
LEAST = 16  # requests per measurement, or batch 1 would have no median
LOG_TAIL = 4000  # characters of a log that an error quotes
_SIDES = {False: "plain", True: "grains"}
# vLLM's log of its configuration, and of the runner where it is not V1.
_FACTS = {
    "mode": r"'mode': <CompilationMode\.(\w+)",
    "cudagraph_mode": r"'cudagraph_mode': <CUDAGraphMode\.(\w+)",
    "dtype": r" dtype=torch\.(\w+)",
    "prefix_caching": r"enable_prefix_caching=(\w+)",
}


class HostError(RuntimeError):
    """A benchmark or an engine failed, or did not do what its arm says."""


@dataclass(frozen=True)
class Load:
    """What one measurement asks.

    Attributes:
        size: requests at a time.
        waves: how many times that many requests there are, at least LEAST in all (serve, latency).
        input_len, output_len: tokens of every prompt and answer.
        seed: of the random prompts.
    """

    size: int
    waves: int
    input_len: int
    output_len: int
    seed: int

    @property
    def requests(self) -> int:
        return max(LEAST, self.size * self.waves)


@dataclass(frozen=True)
class Setup:
    """How both engines are started.

    Attributes:
        engine: vLLM's flags, the model first.
        catalogue: the YAML of the one with grains.
        runner: 1 or 2, vLLM's model runner.
        logs: a folder.
    """

    engine: tuple[str, ...]
    catalogue: Path
    runner: int
    logs: Path

    @property
    def model(self) -> str:
        return self.engine[0]

    def flags(self, grains: bool) -> list[str]:
        more = ["--enable-grains", "--grains-config", str(self.catalogue)] if grains else []
        return [*self.engine[1:], *more]

    def variables(self, grains: bool) -> dict[str, str]:
        """VLLM_PLUGINS names something that does not exist where nothing shall be loaded."""
        return {
            "VLLM_PLUGINS": "grains" if grains else "none",
            "VLLM_USE_V2_MODEL_RUNNER": str(self.runner - 1),
            "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        }


class Host(Protocol):
    """Both engines of one bench."""

    def measure(self, arm: Arm, load: Load) -> Figures: ...

    def facts(self) -> dict[str, Any]: ...


class _Worker:
    """benchmarks.overhead.worker as a process."""

    def __init__(self, process: "subprocess.Popen[str]", replies: Any, log: Path) -> None:
        self._process, self._replies, self._log = process, replies, log
        self.process = psutil.Process(process.pid)

    def run(self, bench: str, argv: list[str], arm: Arm) -> dict[str, Any]:
        task = {"bench": bench, "argv": argv, "steering": list(arm.steering)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        line = self._replies.readline()
        reply: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        if "error" in reply:
            tail = self._log.read_text(errors="replace")[-LOG_TAIL:]
            raise HostError(f"vllm bench {bench}: {reply['error']}\n{tail}")
        result: dict[str, Any] = reply["result"]
        return result


@contextmanager
def _worker(log: Path, variables: dict[str, str]) -> Iterator[_Worker]:
    reading, writing = os.pipe()
    with log.open("w") as output, os.fdopen(reading) as replies:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.overhead.worker", str(writing)],
            cwd=ROOT, env={**environment(), **variables}, pass_fds=[writing], text=True,
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        os.close(writing)
        try:
            yield _Worker(process, replies, log)
        finally:
            assert process.stdin is not None
            process.stdin.close()  # its loop ends, and its engine with it
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def servers(setup: Setup) -> Iterator[Host]:
    """Two `vllm serve` and one `vllm bench serve` that asks them."""
    with ExitStack() as stack:
        urls, logs = {}, {}
        for grains, side in _SIDES.items():
            port, logs[grains] = free_port(), setup.logs / f"serve-{side}.log"
            command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", setup.model]
            command += [*setup.flags(grains), "--host", "127.0.0.1", "--port", str(port)]
            command += ["--disable-uvicorn-access-log"]
            urls[grains] = stack.enter_context(
                running(command, port, logs[grains], setup.variables(grains), START_LIMIT_S)
            )
        client = _worker(setup.logs / "serve-client.log", {"VLLM_PLUGINS": "none"})
        yield _Servers(setup.model, urls, logs, stack.enter_context(client))


class _Servers:
    def __init__(
        self, model: str, urls: dict[bool, str], logs: dict[bool, Path], client: _Worker
    ) -> None:
        self._model, self._urls, self._logs, self._client = model, urls, logs, client
        self._processes = {grains: _listening(url) for grains, url in urls.items()}

    def measure(self, arm: Arm, load: Load) -> Figures:
        url, prompts = self._urls[arm.grains], load.requests
        with urlopen(Request(f"{url}/reset_prefix_cache", method="POST"), timeout=60) as reply:
            if not json.load(reply)["success"]:
                raise HostError(f"{url}: the prefix cache could not be reset")
        before, used = _steered(url), _processor_seconds(self._processes[arm.grains])
        argv = [
            "--backend", "openai", "--base-url", url, "--model", self._model,
            "--dataset-name", "random", "--random-input-len", str(load.input_len),
            "--random-output-len", str(load.output_len), "--seed", str(load.seed),
            "--num-prompts", str(prompts), "--max-concurrency", str(load.size),
            "--ignore-eos", "--temperature", "0", "--disable-tqdm",
            # The check would ask, and cache, the first prompt.
            "--ready-check-timeout-sec", "0", "--percentile-metrics", "ttft,tpot,itl,e2el",
        ]  # fmt: skip
        found = self._client.run("serve", argv, arm)
        used = _processor_seconds(self._processes[arm.grains]) - used
        if (found["completed"], found["total_output_tokens"]) != (
            prompts,
            prompts * load.output_len,
        ):
            raise HostError(
                f"{found['completed']} of {prompts} requests completed with "
                f"{found['total_output_tokens']} tokens, expected {prompts * load.output_len}"
            )
        _require(_steered(url) - before, prompts, arm)
        return {
            "per_token_ms": found["median_tpot_ms"],
            "processor_ms": 1000 * used / found["total_output_tokens"],
            "ttft_ms": found["median_ttft_ms"],
            "ttft_mean_ms": found["mean_ttft_ms"],
            "itl_p99_ms": found["p99_itl_ms"],
            "latency_ms": found["median_e2el_ms"],
            "tokens_per_s": found["output_throughput"],
            "seconds": found["duration"],
        }

    def facts(self) -> dict[str, Any]:
        return {_SIDES[grains]: _log_facts(log) for grains, log in self._logs.items()}


@contextmanager
def engines(bench: str, setup: Setup) -> Iterator[Host]:
    """Two processes that run `vllm bench latency` or `throughput`, each with an engine it keeps."""
    with ExitStack() as stack:
        workers = {}
        for grains, side in _SIDES.items():
            log = setup.logs / f"{bench}-{side}.log"
            workers[grains] = stack.enter_context(_worker(log, setup.variables(grains)))
        yield _Engines(bench, setup, workers)


class _Engines:
    def __init__(self, bench: str, setup: Setup, workers: dict[bool, _Worker]) -> None:
        self._bench, self._setup, self._workers = bench, setup, workers
        self._facts: dict[str, Any] = {}

    def measure(self, arm: Arm, load: Load) -> Figures:
        argv = ["--model", self._setup.model, *self._setup.flags(arm.grains)]
        if self._bench == "latency":
            batches = load.requests // load.size
            argv += [
                "--enable-prefix-caching", "--batch-size", str(load.size),
                "--input-len", str(load.input_len), "--output-len", str(load.output_len),
                # The first fills the prefix cache, the others find the same there in every arm.
                "--num-iters-warmup", "1", "--num-iters", str(batches),
            ]  # fmt: skip
            requests = load.size * (batches + 1)
        else:
            argv += [
                "--dataset-name", "random", "--random-input-len", str(load.input_len),
                "--random-output-len", str(load.output_len), "--seed", str(load.seed),
                "--num-prompts", str(load.size),
            ]  # fmt: skip
            requests = load.size
        worker = self._workers[arm.grains]
        used = _processor_seconds(worker.process)
        found = worker.run(self._bench, argv, arm)
        used = _processor_seconds(worker.process) - used
        self._facts[_SIDES[arm.grains]] = found["engine"]
        if found["plugin_loaded"] != arm.grains:
            raise HostError(f"plugin loaded: {found['plugin_loaded']}, expected {arm.grains}")
        if found["requests"] != requests:
            raise HostError(f"{found['requests']} requests were made, expected {requests}")
        _require(found["steered"], requests, arm)
        latencies = found.get("latencies", [found.get("elapsed_time")])
        seconds = median(latencies)
        return {
            "per_token_ms": 1000 * seconds / load.output_len,
            "processor_ms": 1000 * used / (requests * load.output_len),
            "tokens_per_s": load.size * load.output_len / seconds,
            "seconds": seconds,
        }

    def facts(self) -> dict[str, Any]:
        return self._facts


def _require(steered: float, requests: int, arm: Arm) -> None:
    expected = requests if arm.steering else 0
    if steered != expected:
        raise HostError(f"{steered:g} requests were steered, expected {expected}")


def _steered(url: str) -> float:
    """Requests that a server has steered; 0 where the plugin is not loaded."""
    from prometheus_client.parser import text_string_to_metric_families

    with urlopen(f"{url}/metrics", timeout=60) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "grains:requests_total"
    )


def _listening(url: str) -> psutil.Process:
    """The server's process, a child of ours."""
    port = url.rsplit(":", 1)[1]
    return next(child for child in psutil.Process().children() if port in child.cmdline())


def _processor_seconds(process: psutil.Process) -> float:
    """User and system time of a process and all below it."""
    family = [process, *process.children(recursive=True)]
    return sum(times.user + times.system for times in (one.cpu_times() for one in family))


def _log_facts(log: Path) -> dict[str, Any]:
    text = log.read_text(errors="replace")
    # The last line that has it is the engine's: vLLM's defaults and its platform had their say.
    found = {name: re.findall(pattern, text)[-1:] for name, pattern in _FACTS.items()}
    facts: dict[str, Any] = {name: match[0] if match else None for name, match in found.items()}
    return {**facts, "v2_runner": "Using V2 Model Runner" in text}
