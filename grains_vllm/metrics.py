"""What Prometheus sees of steering: events of the front end, and what the workers report.

Events are counters: with several API servers prometheus_client adds up those of all processes. What
the workers report is the same whichever API server asks, so it must not be added up: those are
gauges of the most recent value, also where they only ever grow (evictions, loads, fills).

Nothing is registered before the first event or scrape, and once per process whatever the number of
engines in it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from grains_vllm.log_lines import Sparingly, logger
from grains_vllm.selection import FIELDS

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge

UNSTEERED = "none"  # the `vector` of a request that the canary left alone; no vector is called so
# What refusals are counted by. A field may come from the request (a misspelt key); labels may not.
REFUSED_FIELDS = frozenset((*FIELDS, "model", "use_beam_search", "vllm_xargs", "extra_args"))
OTHER = "other"

# grains_stats' key -> (metric, help)
_WORKER_FACTS = {
    "slots": ("slots", "Vectors that can steer requests at the same time."),
    "slots_in_use": ("slots_in_use", "Slots whose vector steers a request now."),
    "vectors_resident": ("vectors_resident", "Vectors that lie in a slot, in use or not."),
    "waiting": ("requests_waiting", "Requests that wait for a slot."),
    "evictions": ("evictions", "Vectors that made room for another one, since the start."),
    "loads": ("loads", "Vectors copied into a slot, since the start."),
    "fills": ("fills", "Batches whose tokens' steering was written, since the start."),
    "fill_seconds": ("fill_seconds", "Host time spent on fills, since the start."),
    "steered_tokens": ("steered_tokens", "Tokens whose forward pass was shifted, since the start."),
    "bank_bytes": ("bank_bytes", "Device memory of the slots."),
    "store_bytes": ("store_bytes", "Host memory of the catalogue's vectors."),
}
_REFUSAL_LINES_S, _WAITING_LINES_S, _STALE_LINES_S = 10.0, 60.0, 60.0


@dataclass
class _Metrics:
    requests: "Counter"
    prompt_tokens: "Counter"
    generation_tokens: "Counter"
    refusals: "Counter"
    reloads: "Counter"
    stale: "Counter"
    workers: "dict[str, Gauge]"
    # Counter.labels() costs more than an increment; there are only so many vectors and sources.
    children: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def child(self, metric: "Counter | Gauge", *labels: str) -> Any:
        key = (metric, *labels)
        found = self.children.get(key)
        if found is None:
            found = self.children[key] = metric.labels(*labels)
        return found


@cache
def _metrics() -> _Metrics:
    from prometheus_client import Counter, Gauge

    def counter(name: str, text: str, *labels: str) -> Counter:
        return Counter(f"grains:{name}", text, labels)

    return _Metrics(
        requests=counter(
            "requests",
            "Requests that steering was decided for; one of several vectors counts for each.",
            "vector",
            "source",
        ),
        prompt_tokens=counter(
            "steered_prompt_tokens", "Prompt tokens of finished steered requests.", "vector"
        ),
        generation_tokens=counter(
            "steered_generation_tokens", "Generated tokens of finished steered requests.", "vector"
        ),
        refusals=counter("refusals", "Requests refused, by the field that is wrong.", "field"),
        reloads=counter("catalogue_reloads", "Changes of the catalogue, by outcome.", "outcome"),
        stale=counter(
            "worker_stats_failures", "Scrapes that the workers did not answer (in time)."
        ),
        workers={
            key: Gauge(f"grains:{name}", text, ["engine"], multiprocess_mode="mostrecent")
            for key, (name, text) in _WORKER_FACTS.items()
        },
    )


def register() -> None:
    """Makes every metric exist, so that a server that has steered nothing yet shows zeros."""
    _metrics()


def admitted(marker: Mapping[str, Any] | None) -> None:
    """Counts a request by its marker (`extra_args["grains"]`); plain ones (None) do not count."""
    if marker is None:
        return
    metrics, source = _metrics(), marker["source"]
    for term in marker["terms"]:
        metrics.child(metrics.requests, term["name"], source).inc()
    if not marker["terms"]:
        metrics.child(metrics.requests, UNSTEERED, source).inc()


def finished(receipt: Any) -> None:
    """Counts the steered tokens of a request that has ended.

    Args:
        receipt: anything whose `to_json()` has `vectors` (each with `name`), `prompt_tokens` and
            `generated_tokens`; where vectors carry counts of their own, those count.
    """
    facts, metrics = receipt.to_json(), _metrics()
    for vector in facts["vectors"]:
        for counter, key in (
            (metrics.prompt_tokens, "prompt_tokens"),
            (metrics.generation_tokens, "generated_tokens"),
        ):
            metrics.child(counter, vector["name"]).inc(vector.get(key, facts[key]))


_refusal_lines = Sparingly(_REFUSAL_LINES_S)


def refused(field: str, reason: str = "") -> None:
    """Counts and logs a refused request; a flood of them is one line per field and ten seconds.

    Args:
        field: which field was wrong; names that this package does not know count as "other".
        reason: the message that the client got.
    """
    label = field if field in REFUSED_FIELDS else OTHER
    metrics = _metrics()
    metrics.child(metrics.refusals, label).inc()
    held = _refusal_lines.held_back(label)
    if held is not None:
        # JSON's quotes: a client's line breaks stay within the line.
        logger().info(
            "grains: refused field=%s held_back=%d reason=%s", label, held, json.dumps(reason)
        )


def reloaded(outcome: str, **facts: Any) -> None:
    """Counts and logs a change of the catalogue.

    Args:
        outcome: "applied", "refused", "rolled_back" or "failed"; a label, so few constant words.
        facts: more for the log line; never a label.
    """
    metrics = _metrics()
    metrics.child(metrics.reloads, outcome).inc()
    more = "".join(f" {name}={json.dumps(value, default=str)}" for name, value in facts.items())
    log = logger().info if outcome == "applied" else logger().warning
    log("grains: catalogue outcome=%s%s", outcome, more)


_waiting_lines = Sparingly(_WAITING_LINES_S)


def observe_workers(stats: Iterable[Mapping[str, float] | None], engine: str = "0") -> None:
    """Takes over what the workers of one engine report (`collective_rpc("grains_stats")`).

    They do the same things, each on its part of the model, so the largest figure of all counts.

    Args:
        engine: the data-parallel rank, as in vLLM's own label of that name.
    """
    metrics = _metrics()
    reports = [report for report in stats if report]
    found = {}
    for key, gauge in metrics.workers.items():
        values = [report[key] for report in reports if key in report]
        if values:
            found[key] = max(values)
            metrics.child(gauge, engine).set(found[key])
    if found.get("waiting"):
        held = _waiting_lines.held_back(engine)
        if held is not None:
            logger().warning(
                "grains: engine=%s waiting=%d slots=%d slots_in_use=%d evictions=%d: requests "
                "wait for a free slot",
                engine,
                *(found.get(key, 0) for key in ("waiting", "slots", "slots_in_use", "evictions")),
            )


_stale_lines = Sparingly(_STALE_LINES_S)


def workers_silent(reason: str) -> None:
    """Counts and logs a scrape that shows old figures because the workers did not answer."""
    _metrics().stale.inc()
    held = _stale_lines.held_back("workers")
    if held is not None:
        logger().warning(
            "grains: worker_stats=stale held_back=%d reason=%s", held, json.dumps(reason)
        )
