"""Several engines behind several API servers: whoever gets a request steers it."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.test_features import SCORED, TOLERANCE, characters, errors
from tests.server.serving import serve
from tests.tiny import build_model, save_world

pytestmark = pytest.mark.engine
REPEATS = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    catalogue = save_world(folder, "llama")
    characters().save_pretrained(folder / "llama")
    flags = ("--data-parallel-size", "2", "--api-server-count", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with serve(folder / "llama", catalogue, *flags) as running:
            yield running


def ask(server, request):
    """One request on a connection of its own, which the kernel gives to either API server."""
    body = {
        "model": "tiny", "prompt": request["prompt"], "max_tokens": 6, "temperature": 0,
        "echo": True, "logprobs": 0, "return_token_ids": True, "ignore_eos": True,
    }  # fmt: skip
    if request["extra_args"]:
        body["vllm_xargs"] = request["extra_args"]
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    choice = json.loads(answer.text)["choices"][0]
    logprobs = choice["logprobs"]["token_logprobs"]
    sample = {"tokens": choice["token_ids"][-6:], "logprobs": logprobs[-6:]}
    return {"prompt_logprobs": logprobs[1:-6], "samples": [sample]}


def test_every_engine_and_every_api_server_steers(server):
    requests = SCORED * REPEATS
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda request: ask(server, request), requests))
    worst = max(errors(build_model("llama"), requests, answers))
    print(f"2 engines, 2 API servers: float32 max error {worst:.1e}")
    assert worst < TOLERANCE
    metrics = httpx.get(f"{server.url}/metrics").text
    finished = {
        sample.labels["engine"]: sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == "vllm:request_success_total"
        and sample.labels["finished_reason"] == "length"
    }
    assert sum(finished.values()) == len(requests)
    assert len(finished) == 2 and min(finished.values()) > 0
    ready = server.log.read_text()
    assert all(f"(ApiServer_{number} " in ready for number in range(2))


def test_a_bad_request_is_refused_by_every_api_server(server):
    for _ in range(REPEATS):
        body = {"model": "tiny", "prompt": "a", "vllm_xargs": {"steering": "z"}}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 400
        assert "unknown vector 'z'" in answer.text
