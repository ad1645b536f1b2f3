"""Vectors that come, change and go while a real server runs, and the kill switch."""

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.server.operating import (
    KEY,
    MOST,
    PROMPT,
    WORDS,
    asking,
    complete,
    models,
    same,
    started,
)
from tests.server.serving import Server
from tests.tiny import random_vector

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started(tmp_path_factory.mktemp("admin")) as running:
        yield running


@pytest.fixture
def grains(server):
    """Asks a route under /v1/grains/ as the operator; what a test added is gone afterwards."""
    yield asking(server)
    ask = asking(server)
    ask("POST", "enable")
    for vector in ask("GET", "vectors").json()["data"]:
        if vector["name"] not in ("truthful", "polite"):
            ask("DELETE", f"vectors/{vector['name']}")


def test_added_steers_and_is_listed_until_removed(server, grains):
    plain, _ = complete(server)
    truthful, _ = complete(server, "tiny:truthful")
    with pytest.raises(openai.BadRequestError, match="added"):
        complete(server, "tiny:added")
    added = grains("POST", "vectors", name="added", file="same.safetensors", strength=0.5)
    assert added.status_code == 201, added.text
    assert "tiny:added" in models(server)
    steered, _ = complete(server, "tiny:added")
    assert same(steered, truthful)
    assert not same(steered, plain)
    assert same(complete(server, vllm_xargs={"steering": "added"})[0], truthful)
    assert grains("DELETE", "vectors/added").status_code == 200
    assert "tiny:added" not in models(server)
    with pytest.raises(openai.BadRequestError, match=r"known aliases: tiny:polite, tiny:truthful"):
        complete(server, "tiny:added")
    with pytest.raises(openai.BadRequestError, match="unknown vector 'added'"):
        complete(server, vllm_xargs={"steering": "added"})


def long_answer(server, model, early=None):
    """Streams a long answer; calls `early` with their number after its first tokens."""
    found = []
    for event in server.client.completions.create(
        model=model,
        prompt=WORDS,
        max_tokens=MOST,
        temperature=0,
        logprobs=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        logprobs = event.choices[0].logprobs
        found += zip(logprobs.tokens, logprobs.token_logprobs, strict=True)
        if early is not None and len(found) >= 3:
            early(len(found))
            early = None
    assert len(found) == MOST
    return found


def test_replacing_leaves_running_requests_alone(server, grains):
    assert grains("POST", "vectors", name="hot", file="same.safetensors", strength=0.5).is_success
    old, first = complete(server, "tiny:hot", prompt=f"hot . {PROMPT}")
    assert first == 0
    again, cached = complete(server, "tiny:hot", prompt=f"hot . {PROMPT}")
    assert cached > 0
    assert same(again, old)
    solo = long_answer(server, "tiny:hot")

    replaced = []

    def replace(tokens):
        answer = grains(
            "POST", "vectors", name="hot", file="other.safetensors", strength=0.5, replace=True
        )
        replaced.append((tokens, answer))

    running = long_answer(server, "tiny:hot", replace)
    (tokens, answer) = replaced[0]
    assert answer.status_code == 200, answer.text
    assert tokens < MOST / 2
    assert same(running, solo)

    new, cached = complete(server, "tiny:hot", prompt=f"hot . {PROMPT}")
    assert cached == 0
    assert not same(new, old)
    assert complete(server, "tiny:hot", prompt=f"hot . {PROMPT}")[1] > 0
    assert not same(long_answer(server, "tiny:hot"), solo)
    # The old vector's blocks are still there for whoever asks for that vector.
    assert complete(server, "tiny:truthful", prompt=f"hot . {PROMPT}")[1] > 0
    assert same(complete(server, "tiny:truthful", prompt=f"hot . {PROMPT}")[0], old)


def test_removing_leaves_running_requests_alone(server, grains):
    assert grains("POST", "vectors", name="hot", file="other.safetensors", strength=0.5).is_success
    solo = long_answer(server, "tiny:hot")
    answers = []
    running = long_answer(
        server, "tiny:hot", lambda _: answers.append(grains("DELETE", "vectors/hot"))
    )
    assert answers[0].status_code == 200
    assert same(running, solo)


def test_reload_does_what_a_restart_would(server, grains):
    path = server.log.with_suffix(".yaml")
    text = path.read_text()
    try:
        grains("POST", "vectors", name="added", file="same.safetensors", strength=0.5)
        path.write_text(
            text.replace(
                "admin:", "  kind: {path: allowed/same.safetensors, strength: 0.5}\nadmin:"
            )
        )
        answer = grains("POST", "reload")
        assert answer.status_code == 200, answer.text
        assert (answer.json()["added"], answer.json()["removed"]) == (["kind"], ["added"])
        assert models(server) == {"tiny", "tiny:kind", "tiny:polite", "tiny:truthful"}
        assert same(complete(server, "tiny:kind")[0], complete(server, "tiny:truthful")[0])
        path.write_text(text.replace("truthful.safetensors", "truthfull.safetensors"))
        refused = grains("POST", "reload")
        assert refused.status_code == 422
        assert "truthfull.safetensors" in refused.json()["error"]["message"]
        assert "tiny:kind" in models(server)
    finally:
        path.write_text(text)
        assert grains("POST", "reload").is_success
    assert models(server) == {"tiny", "tiny:polite", "tiny:truthful"}


def test_what_is_refused(server, grains):
    folder = server.log.parent / "allowed"
    whole = (folder / "same.safetensors").read_bytes()
    (folder / "link.safetensors").symlink_to(server.log.parent / "polite.safetensors")
    (folder / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "large.safetensors").write_bytes(whole + bytes(100_000))
    random_vector("gpt2", 3).save(folder / "stranger.safetensors")
    for body, status, word in (
        ({"file": "../polite.safetensors"}, 400, "file"),
        ({"file": "/etc/passwd"}, 400, "file"),
        ({"file": "missing.safetensors"}, 404, "missing.safetensors"),
        ({"file": "link.safetensors"}, 422, "symbolic link"),
        ({"file": "half.safetensors"}, 422, "half.safetensors"),
        ({"file": "large.safetensors"}, 422, "admin.max_bytes"),
        ({"file": "stranger.safetensors"}, 422, "GPT2LMHeadModel"),
        ({"file": "same.safetensors", "layers": [99]}, 422, "layers"),
        ({"file": "same.safetensors", "strength": "0.5"}, 400, "strength"),
        ({"file": "same.safetensors", "path": "x"}, 400, "path"),
        ({"file": "same.safetensors", "name": "polite"}, 409, "replace"),
    ):
        answer = grains("POST", "vectors", **{"name": "refused", "strength": 0.5, **body})
        assert answer.status_code == status, (body, answer.text)
        assert word in answer.json()["error"]["message"]
    assert grains("DELETE", "vectors/unknown").status_code == 404
    assert models(server) == {"tiny", "tiny:polite", "tiny:truthful"}


def test_keys(server):
    for path in ("vectors", "capabilities"):
        assert asking(server, key=None)("GET", path).status_code == 401
        assert asking(server, admin=None)("GET", path).status_code == 200
    for ask in (
        asking(server, key=None),
        asking(server, admin=None),
        asking(server, key="wrong"),
        asking(server, admin="wrong"),
    ):
        assert ask("POST", "disable").status_code == 401
        assert ask("DELETE", "vectors/polite").status_code == 401
        assert ask("POST", "vectors", name="x", file="same.safetensors").status_code == 401
    assert asking(server)("GET", "capabilities").json()["enabled"] is True


def test_kill_switch(server, grains):
    plain, _ = complete(server)
    solo = long_answer(server, "tiny:polite")
    running = long_answer(server, "tiny:polite", lambda _: grains("POST", "disable"))
    # What was admitted before ends as it began.
    assert same(running, solo)
    assert grains("GET", "capabilities").json()["enabled"] is False
    for stream in (False, True):
        for asked in ({"model": "tiny:polite"}, {"vllm_xargs": {"steering": "polite"}}):
            answer = httpx.post(
                f"{server.url}/v1/completions",
                json={"model": "tiny", "prompt": WORDS, "stream": stream, **asked},
                headers={"Authorization": f"Bearer {KEY}"},
                timeout=60,
            )
            assert answer.status_code == 503, answer.text
            assert "switched off" in answer.json()["error"]["message"]
    assert same(complete(server)[0], plain)
    assert same(complete(server, vllm_xargs={"steering": "none"})[0], plain)
    grains("POST", "enable")
    assert same(long_answer(server, "tiny:polite"), solo)


def test_capabilities(server, grains):
    found = grains("GET", "capabilities").json()
    assert found["model"]["architecture"] == "LlamaForCausalLM"
    assert found["layers"] == list(range(found["model"]["num_layers"]))
    assert found["changes"] == {"max_vectors": 8, "max_bytes": 100000}
    assert found["runner"] in ("v1", "v2")
    assert found["api_servers"] == 1


def test_openapi_declares_every_status(server):
    paths = httpx.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
    assert set(paths["/v1/grains/vectors"]["post"]["responses"]) == {
        "200",
        "201",
        "400",
        "401",
        "403",
        "404",
        "409",
        "422",
        "503",
    }
    assert set(paths["/v1/grains/vectors/{name}"]) == {"get", "delete"}
    for name in ("capabilities", "reload", "disable", "enable"):
        assert f"/v1/grains/{name}" in paths
