"""/metrics of a real server: what requests leave there, and what the workers report."""

import time

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from grains_vllm import metrics_http

pytestmark = pytest.mark.engine

PROMPT = "system : honest quiet river agreeable . record : mira color red . "


def scrape(url):
    """Every sample of ours, by name and labels."""
    time.sleep(metrics_http.SHORTEST_INTERVAL_S)  # or the workers' figures are the last scrape's
    text = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        if family.name.startswith("grains:")
        for sample in family.samples
    }


def ask(server, model="tiny", xargs=None):
    return server.client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=5,
        temperature=0,
        extra_body={"ignore_eos": True, **({"vllm_xargs": xargs} if xargs else {})},
    )


def test_requests_tokens_and_refusals_are_counted(server):
    before = scrape(server.url)
    usage = ask(server, "tiny:truthful").usage
    ask(server, xargs={"steering": "truthful=0.5,polite=0.2"})
    ask(server, xargs={"steering": "polite", "steering_positions": "generation"})
    ask(server)
    with pytest.raises(openai.BadRequestError):
        ask(server, xargs={"steering": "unknown"})
    with pytest.raises(openai.BadRequestError):
        ask(server, xargs={"steering": "polite", "steering_strenght": 1})
    after = scrape(server.url)
    grown = {key: after[key] - before.get(key, 0) for key in after}
    prompt, generated = usage.prompt_tokens, usage.completion_tokens - 1
    found = {
        key: value
        for key, value in grown.items()
        if key[0].endswith("_total") and value and "worker_stats" not in key[0]
    }
    assert found == {
        ("grains:requests_total", "request", "truthful"): 2,
        ("grains:requests_total", "polite", "request"): 2,
        ("grains:steered_prompt_tokens_total", "truthful"): 2 * prompt,
        ("grains:steered_prompt_tokens_total", "polite"): prompt,
        ("grains:steered_generation_tokens_total", "truthful"): 2 * generated,
        ("grains:steered_generation_tokens_total", "polite"): 2 * generated,
        ("grains:refusals_total", "steering"): 1,
        ("grains:refusals_total", "other"): 1,
    }
    assert after["grains:slots", "0"] >= 2
    assert after["grains:vectors_resident", "0"] == 2
    assert after["grains:slots_in_use", "0"] == after["grains:requests_waiting", "0"] == 0
    assert after["grains:bank_bytes", "0"] > 0 and after["grains:store_bytes", "0"] > 0
    assert after["grains:fills", "0"] > before.get(("grains:fills", "0"), 0)
    assert after["grains:fill_seconds", "0"] > 0
    assert after.get(("grains:worker_stats_failures_total",), 0) == 0


def test_refusals_are_logged_in_one_line(server):
    with pytest.raises(openai.BadRequestError):
        ask(server, xargs={"steering": "truthful", "steering_positions": "some\nwhere"})
    lines = [line for line in server.log.read_text().splitlines() if "grains: refused" in line]
    assert any("field=steering_positions" in line and "INFO" in line for line in lines)
