"""Memory of the server's processes and what /metrics says, every few seconds."""

import asyncio
import time
from collections.abc import Sequence
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
}


# What a process is, by a word of its command line (vLLM sets it for all but the first).
_PROCESSES = {
    "VLLM::EngineCore": "engine core",
    "VLLM::Worker": "worker",
    " serve ": "API server",
    "": "others",
}


def memory() -> dict[str, float]:
    """MiB resident in the server's processes, which are children of this one, by what they are."""
    found = dict.fromkeys(_PROCESSES.values(), 0.0)
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
            name = next(n for word, n in _PROCESSES.items() if word in command)
            found[name] += process.memory_info().rss / MIB
        except psutil.Error:  # It has just ended.
            continue
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
                "rss_mib": memory(),
                "metrics": await metrics(client),
                "workers": await workers(client),
            }
        )
        await asyncio.sleep(every)


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Least squares: how much `values` grow per second."""
    if len(times) < 2:
        return 0.0
    middle_t, middle_v = sum(times) / len(times), sum(values) / len(values)
    spread = sum((t - middle_t) ** 2 for t in times)
    both = sum((t - middle_t) * (v - middle_v) for t, v in zip(times, values, strict=True))
    return both / spread if spread else 0.0
