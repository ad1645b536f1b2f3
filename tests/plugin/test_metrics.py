"""Counters, gauges and log lines; several API servers are several processes here as well."""

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client import REGISTRY, generate_latest, make_asgi_app
from starlette.applications import Starlette
from starlette.routing import Mount

from grains_vllm import log_lines, metrics, metrics_http

WORKER = {
    "slots": 4, "slots_in_use": 3, "vectors_resident": 4, "evictions": 7, "loads": 11, "fills": 100,
    "fill_seconds": 0.25, "steered_tokens": 5000, "bank_bytes": 4096, "store_bytes": 8192,
    "waiting": 0,
}  # fmt: skip


def value(name, **labels):
    return REGISTRY.get_sample_value(f"grains:{name}", labels) or 0.0


@pytest.fixture
def delta():
    """delta(name, **labels): how much a counter has grown since the first call for it."""
    before = {}

    def measure(name, **labels):
        key = (name, *sorted(labels.items()))
        now = value(name, **labels)
        return now - before.setdefault(key, now)

    return measure


@pytest.fixture
def lines(monkeypatch):
    """What was logged, whoever else has set up logging."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    log_lines.logger().addHandler(handler)
    log_lines.logger().setLevel(logging.INFO)
    for name in ("_refusal_lines", "_waiting_lines", "_stale_lines"):
        monkeypatch.setattr(metrics, name, log_lines.Sparingly(10.0))
    yield found
    log_lines.logger().removeHandler(handler)
    log_lines.logger().setLevel(logging.NOTSET)


def marker(*names, source="request"):
    return {"terms": [{"name": name} for name in names], "prompt_tokens": 5, "source": source}


def receipt(vectors, prompt, generated):
    facts = {"vectors": vectors, "prompt_tokens": prompt, "generated_tokens": generated}
    return SimpleNamespace(to_json=lambda: facts)


def test_a_composition_counts_for_each_vector_and_every_source_apart(delta):
    series = [("a", "request"), ("b", "request"), ("a", "default"), ("none", "canary")]
    for vector, source in series:
        delta("requests_total", vector=vector, source=source)
    metrics.admitted(marker("a", "b"))
    metrics.admitted(marker("a"))
    metrics.admitted(marker("a", source="default"))
    metrics.admitted(marker(source="canary"))
    metrics.admitted(None)
    found = [delta("requests_total", vector=vector, source=source) for vector, source in series]
    assert found == [2, 1, 1, 1]


def test_tokens_are_counted_when_a_request_ends(delta):
    names = ("steered_prompt_tokens_total", "steered_generation_tokens_total")
    for name in names:
        delta(name, vector="a"), delta(name, vector="b")
    metrics.finished(receipt([{"name": "a"}], 10, 3))
    metrics.finished(
        receipt([{"name": "a", "prompt_tokens": 0, "generated_tokens": 4}, {"name": "b"}], 7, 4)
    )
    metrics.finished(receipt([], 0, 0))
    assert [delta(name, vector="a") for name in names] == [10, 7]
    assert [delta(name, vector="b") for name in names] == [7, 4]


def test_refusals_have_few_labels_whatever_requests_say(delta):
    for field in ("steering_strength", "other"):
        delta("refusals_total", field=field)
    metrics.refused("steering_strength")
    for number in range(50):
        metrics.refused(f"steering_made_up_{number}")
    assert delta("refusals_total", field="steering_strength") == 1
    assert delta("refusals_total", field="other") == 50
    labels = {
        sample.labels["field"]
        for metric in REGISTRY.collect()
        if metric.name == "grains:refusals"
        for sample in metric.samples
    }
    assert labels <= metrics.REFUSED_FIELDS | {"other"}


def test_a_flood_of_refusals_is_one_line_that_a_client_cannot_break(lines, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics, "_refusal_lines", log_lines.Sparingly(10.0, lambda: now[0]))
    for _ in range(1000):
        metrics.refused("steering", 'unknown vector "x"\nERROR fake line')
    metrics.refused("model", "unknown alias")
    now[0] = 10.5
    metrics.refused("steering", "again")
    assert [line.split(" reason=")[0] for line in lines] == [
        "grains: refused field=steering held_back=0",
        "grains: refused field=model held_back=0",
        "grains: refused field=steering held_back=999",
    ]
    assert all("\n" not in line for line in lines)
    assert json.loads(lines[0].split("reason=")[1]) == 'unknown vector "x"\nERROR fake line'


def test_reloads_are_counted_and_logged(delta, lines):
    delta("catalogue_reloads_total", outcome="failed")
    metrics.reloaded("failed", error='no "such"\nfile', vectors=3)
    assert delta("catalogue_reloads_total", outcome="failed") == 1
    assert lines == [
        'grains: catalogue outcome=failed error="no \\"such\\"\\nfile" vectors=3',
    ]


def test_workers_do_the_same_things_so_the_largest_figure_counts(lines):
    metrics.observe_workers([WORKER, {**WORKER, "fill_seconds": 0.5}, None, {"slots": 4}])
    found = [value(name, engine="0") for name in ("slots", "evictions", "fill_seconds")]
    assert found == [4, 7, 0.5]
    assert not lines
    for _ in range(3):
        metrics.observe_workers([{**WORKER, "waiting": 2}])
    assert value("requests_waiting", engine="0") == 2
    assert len(lines) == 1
    assert "engine=0 waiting=2 slots=4 slots_in_use=3 evictions=7" in lines[0]


PROCESS = """
import sys, json
from grains_vllm import metrics
for _ in range(3):
    metrics.admitted({"terms": [{"name": "a"}], "source": "request"})
metrics.observe_workers([json.loads(sys.argv[1])])
"""
SCRAPE = """
from prometheus_client import generate_latest
from vllm.v1.metrics.prometheus import get_prometheus_registry
print(generate_latest(get_prometheus_registry()).decode())
"""


def test_several_api_servers_add_up_events_but_not_what_workers_report(tmp_path):
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def run(code, *arguments):
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout

    for evictions in (7, 9):
        run(PROCESS, json.dumps({**WORKER, "evictions": evictions}))
    scraped = run(SCRAPE).splitlines()
    assert 'grains:requests_total{source="request",vector="a"} 6.0' in scraped
    assert 'grains:evictions{engine="0"} 9.0' in scraped
    assert 'grains:slots{engine="0"} 4.0' in scraped


class Engine:
    """Answers like a worker, after a while, or not at all."""

    def __init__(self, answer=WORKER, seconds=0.0):
        self.answer, self.seconds, self.asked = answer, seconds, 0
        self.engine_core, self.errored = SimpleNamespace(), False

    async def collective_rpc(self, method, args):
        assert (method, args) == ("grains_stats", ())
        self.asked += 1
        await asyncio.sleep(self.seconds)
        if isinstance(self.answer, Exception):
            raise self.answer
        return [self.answer]


def scrape(engine, times=1, path="/metrics"):
    """Bodies of scrapes, one after the other, through the middleware as vLLM installs it."""
    app = Starlette(routes=[Mount("/metrics", make_asgi_app())])
    app.add_middleware(metrics_http.MetricsMiddleware)
    app.state.engine_client = engine

    async def get():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.get(path, follow_redirects=True) for _ in range(times)]

    answers = asyncio.run(get())
    assert all(answer.status_code == 200 for answer in answers)
    return [answer.text for answer in answers]


def test_a_scrape_asks_the_workers_but_not_more_than_once_per_second():
    engine = Engine({**WORKER, "evictions": 123})
    bodies = scrape(engine, times=5)
    assert all('grains:evictions{engine="0"} 123.0' in body for body in bodies)
    assert engine.asked == 1


def test_data_parallel_ranks_are_told_apart():
    class Core:
        core_engines = (b"0", b"1")

        async def _call_utility_async(self, call, method, *args, engine):
            assert (call, method) == ("collective_rpc", "grains_stats")
            return [{**WORKER, "evictions": 10 + int(engine)}, {**WORKER, "evictions": 5}]

    (body,) = scrape(SimpleNamespace(engine_core=Core()))
    assert 'grains:evictions{engine="0"} 10.0' in body
    assert 'grains:evictions{engine="1"} 11.0' in body


def test_scrapes_go_on_without_an_engine():
    assert "python_info" in scrape(None)[0]


@pytest.mark.parametrize(
    "engine, reason",
    [(Engine(RuntimeError("engine died")), "RuntimeError: engine died"), (Engine(seconds=60), "s")],
    ids=["dead", "busy"],
)
def test_an_engine_that_does_not_answer_costs_a_moment_and_is_told(
    engine, reason, delta, lines, monkeypatch
):
    monkeypatch.setattr(metrics_http, "PATIENCE_S", 0.2)
    delta("worker_stats_failures_total")
    started = time.monotonic()
    bodies = scrape(engine, times=2)
    assert time.monotonic() - started < 2
    assert "grains:worker_stats_failures_total" in bodies[0]
    assert delta("worker_stats_failures_total") >= 1
    assert engine.asked == 1, "a busy engine gets one question at a time"
    assert len(lines) == 1 and "worker_stats=stale" in lines[0] and reason in lines[0]


def test_every_metric_of_the_manual_exists_and_the_other_way_round():
    metrics.register()
    text = generate_latest().decode()
    found = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE grains:")}
    found = {name for name in found if not name.endswith("_created")}
    manual = (metrics_http.__file__).rsplit("/", 2)[0] + "/docs/operations.md"
    with open(manual, encoding="utf-8") as file:
        rows = [line.split("`")[1] for line in file if line.startswith("| `grains:")]
    rows = [row for row in rows if not row.startswith("grains: ")]  # log lines
    assert {row.partition("{")[0] for row in rows} == found
