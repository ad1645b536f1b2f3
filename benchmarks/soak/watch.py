"""Memory of the server's processes and what /metrics says, every few seconds."""

import asyncio
import time
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

MIB = 2**20
# What is kept of /metrics; the plugin's all begin with "grains:".
_VLLM = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "queued",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prefix_cache_hits_total": "cache_hits",
    "vllm:prefix_cache_queries_total": "cache_queries",
    "vllm:iteration_tokens_total_count": "steps",
}

# What a process is, by a word of its command line (vLLM sets it for all but the first).
_PROCESSES = {
    "VLLM::EngineCore": "engine core",
    "VLLM::Worker": "worker",
    " serve ": "API server",
    "": "others",
}


# What a mapping is, by the start of its name in /proc/PID/smaps: the main thread's malloc; other
# threads' malloc, Python's objects, tensors and the KV cache; queues between processes; libraries.
KINDS = {"[heap]": "heap", "[": "anonymous", "/dev/shm/": "shared", "": "files"}


def memory() -> dict[str, dict[str, float]]:
    """MiB resident in this process's children, the server's, by what they are and by kind."""
    found = {name: dict.fromkeys(KINDS.values(), 0.0) for name in _PROCESSES.values()}
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
            maps = process.memory_maps()
        except psutil.Error:  # It has just ended.
            continue
        name = next(n for word, n in _PROCESSES.items() if word in command)
        for mapped in maps:
            kind = next(k for start, k in KINDS.items() if mapped.path.startswith(start))
            found[name][kind] += mapped.rss / MIB
    return found


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """The sums over labels of what is worth watching."""
    text = (await client.get("/metrics", timeout=30)).text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = _VLLM.get(sample.name, sample.name)
            if name == sample.name and not name.startswith("grains:"):
                continue
            if not name.endswith(("_created", "_bucket")):
                found[name] = found.get(name, 0.0) + sample.value
    return found


async def workers(client: httpx.AsyncClient) -> dict[str, float]:
    """What the worker says of itself, through vLLM's development route."""
    response = await client.post("/collective_rpc", json={"method": "grains_stats"}, timeout=60)
    response.raise_for_status()
    stats: dict[str, float] = response.json()["results"][0]
    return stats


async def watch(client: httpx.AsyncClient, every: float, series: list[dict[str, Any]]) -> None:
    """Appends a point to `series` every so many seconds until it is cancelled."""
    began = time.monotonic()
    while True:
        series.append(
            {
                "seconds": time.monotonic() - began,
                "mib": memory(),
                "metrics": await metrics(client),
                "workers": await workers(client),
            }
        )
        await asyncio.sleep(every)
