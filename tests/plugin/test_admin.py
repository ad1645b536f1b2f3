"""The routes under /v1/grains/, with a worker's real store behind them and no engine."""

import asyncio
import json
import os
from argparse import Namespace
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import yaml
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY

from grains_vllm import changes
from grains_vllm.admin import ADMIN_KEY, GrainsEndpoints
from grains_vllm.bank import Store
from grains_vllm.catalogue import Catalogue
from grains_vllm.changes import Refusal
from grains_vllm.config import SCALES
from grains_vllm.errors import GrainsConfigError
from grains_vllm.positions import Positions
from grains_vllm.registry import Registry
from grains_vllm.vectors import ArtifactError
from tests.tiny import LAYERS, random_vector

VECTORS = {
    "truthful": {"path": "one.safetensors", "strength": 0.5},
    "polite": {"path": "two.safetensors", "strength": 0.2, "positions": "prompt"},
}


class Engine:
    """An engine client whose ranks are stores; `ranks` as data-parallel ones answer."""

    def __init__(self, catalogue, ranks=1):
        self.stores = [Store(catalogue.model, catalogue.limits.layers) for _ in range(ranks)]
        for store in self.stores:
            store.replace(catalogue.vectors.values())
        self.down = self.hung = self.errored = False
        self.dead_error = RuntimeError("the engine is dead")
        self.engine_core = SimpleNamespace(
            core_engines=list(range(ranks)), _call_utility_async=self._rank
        )
        self.vllm_config = SimpleNamespace(
            additional_config={"grains": catalogue.to_json()},
            parallel_config=SimpleNamespace(_api_process_count=1, data_parallel_size=ranks),
            use_v2_model_runner=False,
            cache_config=SimpleNamespace(enable_prefix_caching=True),
        )
        self.input_processor = SimpleNamespace(grains_registry=Registry.of(self.vllm_config))

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        return await self._rank("collective_rpc", method, timeout, args, kwargs, engine=0)

    async def _rank(self, utility, method, timeout, args, kwargs, engine):
        assert (utility, method) == ("collective_rpc", "grains_apply")
        if self.down:
            raise self.dead_error
        if self.hung:
            await asyncio.Event().wait()
        (content,) = json.loads(json.dumps(args))  # It travels as data.
        try:
            self.stores[engine].replace(Catalogue.from_json(content).vectors.values())
        except (ArtifactError, GrainsConfigError) as error:
            return [{"vectors": self.stores[engine].digests, "error": str(error)}]
        return [{"vectors": self.stores[engine].digests}]


@pytest.fixture
def more(folder):
    """The folder that vectors may be added from."""
    allowed = folder / "allowed"
    allowed.mkdir()
    random_vector("llama", 7).save(allowed / "kind.safetensors")
    random_vector("llama", 8).save(allowed / "calm.safetensors")
    random_vector("gpt2", 9).save(allowed / "other.safetensors")
    return allowed


@pytest.fixture
def start(catalogue, more, monkeypatch):
    """Starts a server's routes over a YAML with the given top keys."""
    monkeypatch.delenv(ADMIN_KEY, raising=False)

    def start(vectors=VECTORS, served=("tiny",), ranks=1, key=None, **top):
        built = catalogue(vectors, **{"admin": {"folder": "allowed"}, **top})
        return serve(Engine(built, ranks), served, key)

    def serve(engine, served, key):
        if key is not None:
            monkeypatch.setenv(ADMIN_KEY, key)
        app, endpoints = FastAPI(), GrainsEndpoints()
        endpoints.attach_router(app)
        app.state.openai_serving_models = SimpleNamespace(
            base_model_paths=[SimpleNamespace(name=name) for name in served]
        )
        client = TestClient(app)
        client.engine = engine
        asyncio.run(endpoints.init_state(engine, app.state, Namespace(api_key=None)))
        return client

    start.serve = serve
    return start


def names(client):
    return [vector["name"] for vector in client.get("/v1/grains/vectors").json()["data"]]


def put(client, **wish):
    return client.post("/v1/grains/vectors", json={"strength": 0.5, **wish})


def counts(outcome):
    name = "grains:catalogue_reloads_total"
    return REGISTRY.get_sample_value(name, {"outcome": outcome}) or 0


def refused(response, status, *words):
    """Checks an error in OpenAI's shape; its message must hold the words."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status
    assert error["type"]
    for word in words:
        assert word in error["message"]


def test_what_is_added_replaced_and_removed(start, more):
    client = start()
    added = put(client, name="kind", file="kind.safetensors", layers=[1], positions="prompt:2")
    assert added.status_code == 201
    digest = random_vector("llama", 7).digest
    assert added.json() == {
        "object": "grains.vector",
        "name": "kind",
        "digest": digest,
        "strength": 0.5,
        "layers": [1],
        "positions": "prompt:2",
        "scale": "relative",
        "description": "",
        "origin": "",
    }
    assert names(client) == ["kind", "polite", "truthful"]
    assert client.get("/v1/grains/vectors/kind").json() == added.json()
    assert digest in client.engine.stores[0]

    refused(put(client, name="kind", file="calm.safetensors"), 409, "'kind' exists", "replace")
    replaced = put(client, name="kind", file="calm.safetensors", replace=True)
    assert replaced.status_code == 200
    assert replaced.json()["digest"] == random_vector("llama", 8).digest
    # Requests under way still need it.
    assert digest in client.engine.stores[0]

    gone = client.delete("/v1/grains/vectors/kind")
    assert gone.json() == {"object": "grains.vector", "name": "kind", "deleted": True}
    assert names(client) == ["polite", "truthful"]
    refused(client.delete("/v1/grains/vectors/kind"), 404, "'kind'")
    refused(client.get("/v1/grains/vectors/kind"), 404, "'kind'")


def test_the_default_follows_its_name_and_cannot_be_removed(start):
    client = start(default="polite", canary={"name": "truthful", "fraction": 0.5})
    refused(client.delete("/v1/grains/vectors/polite"), 409, "default")
    refused(client.delete("/v1/grains/vectors/truthful"), 409, "canary")
    replaced = put(client, name="polite", file="kind.safetensors", replace=True)
    assert replaced.status_code == 200
    (term,) = client.engine.input_processor.grains_registry.snapshot().catalogue.default.terms
    assert term.entry.digest == random_vector("llama", 7).digest
    assert (term.strength, term.positions) == (0.2, "prompt")  # as the YAML's default resolved


def test_files_that_are_refused(start, more, folder):
    client = start(admin={"folder": "allowed", "max_bytes": 5000})
    (more / "link.safetensors").symlink_to(folder / "one.safetensors")
    (more / "inner").mkdir()
    os.mkfifo(more / "pipe")
    whole = (more / "kind.safetensors").read_bytes()
    (more / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (more / "large.safetensors").write_bytes(whole + bytes(5000))
    before, opened = names(client), len(os.listdir("/proc/self/fd"))
    for file, status, *words in (
        ("missing.safetensors", 404, "missing.safetensors"),
        ("link.safetensors", 422, "symbolic link"),
        ("inner", 422, "not a plain file"),
        ("pipe", 422, "not a plain file"),
        ("half.safetensors", 422, "half.safetensors", "safetensors file"),
        ("large.safetensors", 422, "5000 are allowed by admin.max_bytes"),
        ("other.safetensors", 422, "other.safetensors", "GPT2LMHeadModel"),
    ):
        answer = put(client, name="kind", file=file)
        refused(answer, status, *words)
        assert str(folder) not in answer.text
        assert "/tmp" not in answer.text
    for file in (
        "../one.safetensors",
        "..",
        ".",
        ".hidden",
        "a/b",
        "/etc/passwd",
        "a\\b",
        "",
        "\0",
    ):
        assert put(client, name="kind", file=file).status_code == 422, file  # FastAPI's own here
    refused(put(client, name="none", file="kind.safetensors"), 422, "'none'")
    refused(put(client, name="kind", file="kind.safetensors", layers=[9]), 422, "layers")
    assert names(client) == before
    # Nothing stays open.
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_folder_that_became_a_link(start, more, folder):
    client = start()
    more.rename(folder / "elsewhere")
    more.symlink_to(folder / "elsewhere")
    refused(put(client, name="kind", file="kind.safetensors"), 422, "admin.folder")
    more.unlink()
    refused(put(client, name="kind", file="kind.safetensors"), 422, "admin.folder")


def test_bodies_that_are_refused(start):
    client = start()
    for wish in (
        {"name": "kind"},
        {"file": "kind.safetensors"},
        {"name": "a b", "file": "kind.safetensors"},
        *({"name": f"a{mark}b", "file": "kind.safetensors"} for mark in ":,=/\n\0\u200b"),
        {"name": "kind", "file": "kind.safetensors", "path": "/etc/passwd"},
        {"name": "kind", "file": "kind.safetensors", "strength": "0.5"},
        {"name": "kind", "file": "kind.safetensors", "strength": 1e7},
        {"name": "kind", "file": "kind.safetensors", "strength": True},
        {"name": "kind", "file": "kind.safetensors", "layers": []},
        *(
            {"name": "kind", "file": "kind.safetensors", "layers": [layer]}
            for layer in (-1, 1.5, "1", True)
        ),
        {"name": "kind", "file": "kind.safetensors", "scale": "huge"},
        {"name": "kind", "file": "kind.safetensors", "positions": "here"},
        {"name": "kind", "file": "kind.safetensors", "positions": "prompt:0"},
        {"name": "kind", "file": "kind.safetensors", "replace": 1},
    ):
        assert put(client, **wish).status_code == 422, wish
    for body in ("", "[]", "nothing", '{"name": "kind", "file": "\\ud800"}', '{"strength": NaN}'):
        answer = client.post("/v1/grains/vectors", content=body)
        assert answer.status_code == 422, body


@pytest.mark.parametrize("name", ["höflich", "親切", "v1.2", "a+b", "a-b", "a;b@c!<d>~"])
def test_names(start, name):
    client = start()
    assert put(client, name=name, file="kind.safetensors").status_code == 201
    assert client.delete(f"/v1/grains/vectors/{quote(name, safe='')}").json()["name"] == name


@pytest.mark.parametrize("scale", SCALES)
def test_scales(start, scale):
    answer = put(start(), name="kind", file="kind.safetensors", scale=scale)
    assert answer.json()["scale"] == scale


@pytest.mark.parametrize(
    "positions",
    ["all", "text", "image", "prompt", "generation:3", "prompt:2+generation",
     "generation:1+prompt:1"],
)  # fmt: skip
def test_positions(start, positions):
    answer = put(start(), name="kind", file="kind.safetensors", positions=positions)
    assert answer.status_code == 201
    assert answer.json()["positions"] == str(Positions.parse(positions))


def test_layers_that_were_not_compiled_in(start):
    vectors = {"truthful": {**VECTORS["truthful"], "layers": [0]}}
    client = start(vectors, steered_layers=[0, 1])
    answer = put(client, name="kind", file="kind.safetensors")
    refused(answer, 400, "[2, 3]", "[0, 1]", "steered_layers")
    assert put(client, name="kind", file="kind.safetensors", layers=[0.0]).status_code == 201


def test_limit_on_the_number_of_vectors(start):
    client = start(admin={"folder": "allowed", "max_vectors": 3})
    assert put(client, name="kind", file="kind.safetensors").status_code == 201
    refused(put(client, name="calm", file="calm.safetensors"), 409, "admin.max_vectors", "3")
    assert put(client, name="kind", file="calm.safetensors", replace=True).status_code == 200


def test_a_name_that_a_served_model_would_hide(start, rewrite):
    client = start(served=("tiny", "tiny:kind"))
    refused(put(client, name="kind", file="kind.safetensors"), 409, "tiny:kind")
    rewrite(vectors={**VECTORS, "kind": {"path": "allowed/kind.safetensors", "strength": 1}})
    refused(client.post("/v1/grains/reload"), 409, "tiny:kind")


def test_a_catalogue_that_is_fixed(start):
    client = start(admin=None)
    refused(put(client, name="kind", file="kind.safetensors"), 403, "admin")
    refused(client.delete("/v1/grains/vectors/polite"), 403, "admin")
    refused(client.post("/v1/grains/reload"), 403, "admin")
    assert names(client) == ["polite", "truthful"]
    # The kill switch is for every operator who lets these routes in.
    assert client.post("/v1/grains/disable").json() == {"enabled": False}


@pytest.fixture
def rewrite(folder):
    def rewrite(**top):
        content = {"vectors": VECTORS, "admin": {"folder": "allowed"}, **top}
        (folder / "steering.yaml").write_text(yaml.safe_dump(content))

    return rewrite


def test_reload(start, rewrite):
    client = start(default="polite")
    put(client, name="calm", file="calm.safetensors")
    rewrite(
        vectors={
            "truthful": {**VECTORS["truthful"], "strength": 0.7},
            "kind": {"path": "allowed/kind.safetensors", "strength": 1},
            "polite": VECTORS["polite"],
        },
        default="kind=0.3",
    )
    assert client.post("/v1/grains/reload").json() == {
        "added": ["kind"],
        "replaced": ["truthful"],
        "removed": ["calm"],
        "settings": ["default"],
        "after_restart": ["slots"],
    }
    assert names(client) == ["kind", "polite", "truthful"]
    assert client.get("/v1/grains/vectors/truthful").json()["strength"] == 0.7
    snapshot = client.engine.input_processor.grains_registry.snapshot()
    assert str(snapshot.catalogue.default) == "kind=0.3"
    assert random_vector("llama", 7).digest in client.engine.stores[0]
    # What is compiled in stays.
    assert snapshot.catalogue.limits.slots == 6


def test_a_reload_that_cannot_be_served_changes_nothing(start, rewrite, folder):
    client = start()
    before = client.engine.input_processor.grains_registry.snapshot()
    fewer = {"truthful": {**VECTORS["truthful"], "layers": [0]}}
    counted = counts("refused")
    random_vector("llama", 0).save(folder / "\udc80.safetensors")
    for words, content in (
        (["not valid YAML"], "vectors: ["),
        (["steering.yaml", "'2020-13-45'"], "vectors: {v: {path: 2020-13-45}}"),
        (["steering.yaml", "vectors.v.path", "NUL"], 'vectors: {v: {path: "a\\0b"}}'),
        (["steering.yaml", "vectors.v.path"], 'vectors: {v: {path: "\\udc80.safetensors"}}'),
        (["steering.yaml", "admin.folder"], {"admin": {"folder": "allowed\0"}}),
        (
            ["steering.yaml", "aliases"],
            "a: &a [1,2]\n"
            + "".join(f"a{n}: &a{n} [*a{n - 1 or ''},*a{n - 1 or ''}]\n" for n in range(1, 40)),
        ),
        (["truthfull.safetensors"], {"vectors": {"t": {"path": "truthfull.safetensors"}}}),
        (
            ["GPT2LMHeadModel"],
            {"vectors": {"o": {"path": "allowed/other.safetensors", "strength": 1}}},
        ),
        (["max_vectors_per_request", "2", "3"], {"max_vectors_per_request": 3}),
        (["layer_output"], {"layer_output": "sum"}),
        (["unknown key 'vectorz'"], {"vectorz": {}}),
        (["admin: is missing"], {"admin": None}),
    ):
        if isinstance(content, str):
            (folder / "steering.yaml").write_text(content)
        else:
            rewrite(**content)
        refused(client.post("/v1/grains/reload"), 422, *words)
        assert client.engine.input_processor.grains_registry.snapshot() == before
        counted += 1
        assert counts("refused") == counted
    (folder / "steering.yaml").unlink()
    refused(client.post("/v1/grains/reload"), 422, "cannot be read")

    narrow = start(fewer)
    rewrite()
    refused(narrow.post("/v1/grains/reload"), 422, "[1, 2, 3]", "steered_layers")


def test_workers_that_refuse(start, more):
    client = start(ranks=2)
    before = client.engine.input_processor.grains_registry.snapshot()
    # The second rank is on a machine whose folder has another file under this name.
    second = client.engine.stores[1]
    second._read = lambda entry: (_ for _ in ()).throw(GrainsConfigError("not the file"))
    refused(put(client, name="kind", file="kind.safetensors"), 422, "not the file")
    # The first rank had it already, and has let go of it.
    assert client.engine.stores[0]._vectors[random_vector("llama", 7).digest].retired is not None
    assert client.engine.input_processor.grains_registry.snapshot() == before
    assert names(client) == ["polite", "truthful"]
    client.engine.down = True
    refused(put(client, name="kind", file="kind.safetensors"), 503, "the engine is dead", "undoing")
    assert client.engine.input_processor.grains_registry.snapshot() == before


@pytest.mark.parametrize(
    ("dies", "words"),
    [(True, "the engine is dead"), (False, "the workers did not answer within 0.05 s")],
)
def test_an_engine_that_never_answers(start, monkeypatch, dies, words):
    monkeypatch.setattr(changes, "_GLANCE_S", 0.01)
    monkeypatch.setattr(changes, "PATIENCE_S", 60 if dies else 0.05)
    client = start()
    registry = client.engine.input_processor.grains_registry
    before, client.engine.hung, client.engine.errored = registry.snapshot(), True, dies

    def remove():
        removing = client.app.state.grains.changes.remove("polite")
        asyncio.run(asyncio.wait_for(removing, 30))

    with pytest.raises(Refusal, match=words):
        remove()
    assert registry.snapshot() == before
    # Nobody is kept waiting for that change.
    client.engine.hung = client.engine.errored = False
    remove()
    assert names(client) == ["truthful"]


def test_a_change_does_not_wait_for_good_for_another(start, monkeypatch):
    monkeypatch.setattr("grains_vllm.registry.TURN_PATIENCE_S", 0.05)
    client = start()
    console = client.app.state.grains

    async def both():
        async with console.registry.changing():
            await asyncio.wait_for(console.changes.remove("polite"), 30)

    with pytest.raises(Refusal, match="other changes have been under way") as refusal:
        asyncio.run(both())
    assert refusal.value.status == 503
    assert client.delete("/v1/grains/vectors/polite").status_code == 200


def test_every_rank_gets_a_change(start):
    client = start(ranks=3)
    assert put(client, name="kind", file="kind.safetensors").status_code == 201
    digest = random_vector("llama", 7).digest
    assert all(digest in store for store in client.engine.stores)


def test_admin_key(start):
    client = start(key="schlüssel")
    assert names(client) == ["polite", "truthful"]
    for headers in ({}, {"X-Grains-Admin-Key": "wrong"}, {"X-Grains-Admin-Key": ""}):
        for method, path in (
            ("POST", "vectors"),
            ("DELETE", "vectors/polite"),
            ("POST", "reload"),
            ("POST", "disable"),
            ("POST", "enable"),
        ):
            body = {"name": "kind", "file": "kind.safetensors"} if path == "vectors" else None
            answer = client.request(method, f"/v1/grains/{path}", json=body, headers=headers)
            refused(answer, 401, "X-Grains-Admin-Key")
    right = {"X-Grains-Admin-Key": "schlüssel".encode()}
    assert client.post("/v1/grains/disable", headers=right).json() == {"enabled": False}


def test_an_admin_key_that_is_empty_stops_the_start(start):
    with pytest.raises(GrainsConfigError, match=f"{ADMIN_KEY} is set but empty"):
        start(key=" ")


def test_kill_switch(start):
    client = start()
    registry = client.engine.input_processor.grains_registry
    assert client.post("/v1/grains/disable").json() == {"enabled": False}
    assert not registry.snapshot().enabled
    assert client.get("/v1/grains/capabilities").json()["enabled"] is False
    # Changes go on, and leave it as it is.
    assert put(client, name="kind", file="kind.safetensors").status_code == 201
    assert not registry.snapshot().enabled
    assert client.post("/v1/grains/enable").json() == {"enabled": True}
    assert registry.snapshot().enabled


def test_a_server_without_grains(start, catalogue):
    engine = Engine(catalogue(VECTORS))
    engine.input_processor.grains_registry = None
    client = start.serve(engine, ("tiny",), None)
    refused(client.get("/v1/grains/capabilities"), 404, "--enable-grains")
    refused(client.post("/v1/grains/disable"), 404, "--enable-grains")


def test_capabilities(start):
    client = start()
    found = client.get("/v1/grains/capabilities").json()
    assert found["layers"] == list(range(LAYERS["llama"]))
    assert found["limits"] == {
        "slots": 6,
        "max_vectors_per_request": 2,
        "max_strength": 1e6,
    }
    assert found["changes"] == {"max_vectors": 64, "max_bytes": 2**28}
    assert found["layer_output"] == {"convention": None, "evidence": "known"}
    told = start(layer_output="sum").get("/v1/grains/capabilities").json()
    assert told["layer_output"] == {"convention": "sum", "evidence": "unchecked"}
    assert found["runner"] == "v1"
    assert set(found["versions"]) >= {"grains", "vllm", "torch"}
    assert found["supported"]["composition"] is True
    assert start(admin=None).get("/v1/grains/capabilities").json()["changes"] is None
