"""Several engines behind several API servers: whoever gets a request steers it, all know the same
catalogue, and /metrics is that of one deployment."""

import json
import re
import stat
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.test_features import SCORED, TOLERANCE, characters, errors
from tests.server.operating import KEY, WORDS, asking, complete, models, operated, same
from tests.server.test_metrics import scrape
from tests.tiny import build_model, random_vector, save_world

pytestmark = pytest.mark.engine
REPEATS = 8
MANY = 16  # connections; they land on either process as the kernel pleases


@pytest.fixture(scope="module")
def temporary():
    """Where the processes keep temporary files; a short path, since sockets are among them."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory, temporary):
    """Two ranks, and as many API servers, which is what vLLM starts by itself."""
    folder = tmp_path_factory.mktemp("parallel")
    catalogue = save_world(folder, "llama")
    (folder / "allowed").mkdir()
    for seed, name in ((0, "same"), (5, "other")):
        random_vector("llama", seed).save(folder / "allowed" / f"{name}.safetensors")
    with catalogue.open("a") as file:
        file.write("admin: {folder: allowed, max_vectors: 10}\n")
    characters().save_pretrained(folder / "llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        with operated(folder / "llama", catalogue, "--data-parallel-size", "2") as running:
            yield running
    assert not list(temporary.glob("grains-*"))


def post(server, body):
    """One request on a connection of its own, which the kernel gives to either API server."""
    return httpx.post(
        f"{server.url}/v1/completions",
        json={"model": "tiny", **body},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=120,
    )


def test_there_are_two_of_each(server, temporary):
    found = asking(server)("GET", "capabilities").json()
    assert (found["api_servers"], found["data_parallel_size"]) == (2, 2)
    log = server.log.read_text()
    assert all(f"(ApiServer_{number} " in log for number in range(2))
    (state,) = temporary.glob("grains-*")
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def scored(server, request):
    """The answer in the form that `errors` takes."""
    body = {
        "prompt": request["prompt"], "max_tokens": 6, "temperature": 0, "echo": True,
        "logprobs": 0, "return_token_ids": True, "ignore_eos": True,
    }  # fmt: skip
    if request["extra_args"]:
        body["vllm_xargs"] = request["extra_args"]
    answer = post(server, body)
    assert answer.status_code == 200, answer.text
    choice = json.loads(answer.text)["choices"][0]
    logprobs = choice["logprobs"]["token_logprobs"]
    sample = {"tokens": choice["token_ids"][-6:], "logprobs": logprobs[-6:]}
    return {"prompt_logprobs": logprobs[1:-6], "samples": [sample]}


def finished(server):
    """How many requests each engine has answered up to their last token."""
    return Counter(
        {
            sample.labels["engine"]: sample.value
            for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
            for sample in family.samples
            if sample.name == "vllm:request_success_total"
            and sample.labels["finished_reason"] == "length"
        }
    )


def test_every_engine_steers(server):
    before, requests = finished(server), SCORED * REPEATS
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda request: scored(server, request), requests))
    worst = max(errors(build_model("llama"), requests, answers))
    print(f"2 engines, 2 API servers: float32 max error {worst:.1e}")
    assert worst < TOLERANCE
    by_engine = finished(server) - before
    assert by_engine.total() == len(requests)
    assert len(by_engine) == 2


def statuses(server, **asked):
    """The statuses of many completions at once."""
    body = {"prompt": WORDS, "max_tokens": 1, **asked}
    with ThreadPoolExecutor(MANY) as pool:
        return set(pool.map(lambda _: post(server, body).status_code, range(MANY)))


def processes(server, line):
    """The API servers that have logged a line with these words."""
    found = re.findall(rf"\((ApiServer_\d+) .*{re.escape(line)}", server.log.read_text())
    return set(found)


def by_both(server, line, act):
    """Acts until both API servers have logged the line: the kernel may favour one of them."""
    for _ in range(50):
        if processes(server, line) == {"ApiServer_0", "ApiServer_1"}:
            return
        act()
    raise AssertionError(f"{line!r} was only logged by {processes(server, line)}")


def test_a_bad_request_is_refused_by_every_api_server(server):
    asked = {"vllm_xargs": {"steering": "z"}}
    answer = post(server, {"prompt": "a", **asked})
    assert answer.status_code == 400 and "unknown vector 'z'" in answer.text
    by_both(server, "unknown vector 'z'", lambda: statuses(server, **asked))
    assert statuses(server, **asked) == {400}


def test_metrics_are_those_of_one_deployment(server):
    before, many = scrape(server.url), 12
    body = {"model": "tiny:a", "prompt": [5, 6, 7, 8], "max_tokens": 2, "ignore_eos": True}
    for _ in range(many):
        answer = post(server, body)
        assert answer.raise_for_status().json()["grains"]["steered"]
    for _ in range(4):  # whichever process answers
        seen = scrape(server.url)
        grown = Counter()
        for (name, *labels), value in seen.items():
            # Each engine has figures of its own.
            key = (name,) if name == "grains:steered_tokens" else (name, *labels)
            grown[key] += value - before.get((name, *labels), 0)
        assert grown["grains:requests_total", "a", "request"] == many
        assert grown["grains:steered_prompt_tokens_total", "a"] == many * 4
        assert grown["grains:steered_tokens",] == many * 4 + many
        assert {seen["grains:slots", engine] for engine in "01"} == {4}


def digests(ask, name):
    """What `name` means to whoever answers each of many connections."""
    answers = [ask("GET", f"vectors/{name}") for _ in range(MANY)]
    assert {answer.status_code for answer in answers} == {200}
    return {answer.json()["digest"] for answer in answers}


def test_a_change_through_one_is_a_change_for_all(server):
    ask, begun = asking(server), models(server)
    steered, _ = complete(server, "tiny:a", prompt=WORDS)
    for turn in range(8):
        file = ("same.safetensors", "other.safetensors")[turn % 2]
        answer = ask("POST", "vectors", name="hot", file=file, strength=0.5, replace=True)
        assert answer.status_code == (200 if turn else 201), answer.text
        assert digests(ask, "hot") == {answer.json()["digest"]}
        assert statuses(server, model="tiny:hot") == {200}
    assert not same(complete(server, "tiny:hot", prompt=WORDS)[0], steered)
    assert ask("DELETE", "vectors/hot").is_success
    assert statuses(server, model="tiny:hot") == {400}
    by_both(server, "unknown alias 'tiny:hot'", lambda: statuses(server, model="tiny:hot"))

    # Several at once: none is lost, whichever processes they went through.
    names = [f"v{number}" for number in range(6)]
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(
            pool.map(
                lambda name: ask(
                    "POST", "vectors", name=name, file="same.safetensors", strength=0.5
                ),
                names,
            )
        )
    assert [answer.status_code for answer in answers] == [201] * len(names)
    expected = begun | {f"tiny:{name}" for name in names}
    assert all(models(server) == expected for _ in range(4))
    assert same(complete(server, "tiny:v5", prompt=WORDS)[0], steered)
    more = {"file": "other.safetensors", "strength": 0.5, "replace": True}
    with ThreadPoolExecutor(len(names)) as pool:
        by_both(
            server,
            "outcome=applied",
            lambda: list(pool.map(lambda name: ask("POST", "vectors", name=name, **more), names)),
        )
    full = ask("POST", "vectors", name="v6", file="same.safetensors", strength=0.5)
    assert full.status_code == 409
    assert all(ask("DELETE", f"vectors/{name}").is_success for name in names)
    assert models(server) == begun


def test_the_kill_switch_stops_all(server):
    ask = asking(server)
    assert ask("POST", "disable").json() == {"enabled": False}
    assert statuses(server, model="tiny:b") == {503}
    assert statuses(server) == {200}
    by_both(server, "switched off", lambda: statuses(server, model="tiny:b"))
    assert ask("POST", "enable").json() == {"enabled": True}
    assert statuses(server, model="tiny:b") == {200}
