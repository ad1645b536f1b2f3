"""What goes wrong around a server: clients that leave, broken files, a killed engine, bad input.

One server, in the order of the file: the last test kills it. docs/faults.md says what is promised.
"""

import json
import re
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import psutil
import pytest
import schemathesis
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from prometheus_client.parser import text_string_to_metric_families
from schemathesis.specs.openapi.checks import positive_data_acceptance
from transformers import AutoConfig

from benchmarks.server import ServerError
from grains_vllm import metrics_http
from grains_vllm.selection import FIELDS
from grains_vllm.vectors import ModelFingerprint, SteeringVector
from tests.server.serving import MODEL, serve
from tests.tally import print_tally

pytestmark = pytest.mark.engine

NAMES = ("truthful", "polite", "brief", "later")
PROMPT = "system : honest quiet river agreeable . record : mira color red . "
SLOTS = 2
LONG = 230  # tokens: an answer that takes a while
TOLERANCE = 1e-4
TRIED = Counter()


class Machine:
    """A server that can be killed and started again over the same files."""

    def __init__(self, folder: Path):
        self.folder, self.catalogue = folder, folder / "steering.yaml"
        self.vectors = folder / "vectors"
        self.vectors.mkdir()
        model = AutoConfig.from_pretrained(MODEL)
        for seed, name in enumerate(NAMES):
            rows = torch.randn(
                model.num_hidden_layers,
                model.hidden_size,
                generator=torch.Generator().manual_seed(seed),
            )
            SteeringVector(
                rows / rows.norm(dim=1, keepdim=True),
                torch.full((model.num_hidden_layers,), 5.0),
                ModelFingerprint.of(model),
            ).save(self.vectors / f"{name}.safetensors")
        self.write(NAMES)

    def write(self, names):
        entries = {name: {"path": f"vectors/{name}.safetensors", "strength": 0.5} for name in names}
        self.catalogue.write_text(
            yaml.safe_dump({"vectors": entries, "slots": SLOTS, "admin": {"folder": "vectors"}})
        )

    def start(self):
        self._stack = ExitStack()
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("VLLM_PLUGINS", "grains")
            self.server = self._stack.enter_context(serve(MODEL, self.catalogue))
        self.url = self.server.url

    def stop(self):
        self._stack.close()

    def processes(self):
        """(API server, engine core)."""
        mine = [
            process
            for process in psutil.Process().children()
            if str(self.catalogue) in process.cmdline()
        ]
        (server,) = mine
        (core,) = [p for p in server.children() if "EngineCore" in " ".join(p.cmdline())]
        return server, core

    def admin(self, method, path, **body):
        return httpx.request(method, f"{self.url}/v1/grains/{path}", json=body or None, timeout=60)

    def complete(self, steering=None, tokens=8, **more):
        """The response to a request whose prompt's KV nobody else has."""
        body = {
            **{"model": "tiny", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0},
            **{"logprobs": 0, "ignore_eos": True, "cache_salt": str(time.monotonic_ns())},
            **({"vllm_xargs": {"steering": steering}} if steering else {}),
            **more,
        }
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)

    def answers(self):
        """Log-probabilities of the plain answer and of one per vector."""
        found = {}
        for name in (None, *NAMES):
            response = self.complete(name)
            assert response.status_code == 200, response.text
            found[name] = response.json()["choices"][0]["logprobs"]["token_logprobs"]
        return found

    def figures(self):
        """Samples of /metrics, summed over labels but for the outcomes of reloads."""
        time.sleep(metrics_http.SHORTEST_INTERVAL_S)
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        found = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                outcome = sample.labels.get("outcome")
                found[sample.name if outcome is None else (sample.name, outcome)] += sample.value
        return found

    def comes_to_rest(self):
        """Waits until nothing is held any more; returns what is after 20 seconds."""
        names = ("grains:slots_in_use", "grains:requests_waiting", "vllm:num_requests_running")
        for _ in range(20):
            found = self.figures()
            if not any(found[name] for name in names):
                break
        return {name: found[name] for name in names if found[name]}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("faults"))
    machine.start()
    yield machine
    machine.stop()


@pytest.fixture(scope="module")
def before(machine):
    """The answers of the healthy server."""
    found = machine.answers()
    assert len({str(logprobs) for logprobs in found.values()}) == len(found)
    return found


@pytest.fixture(scope="module", autouse=True)
def tally(request):
    yield
    print_tally(request, TRIED)


def same(found, expected):
    return {
        name: pytest.approx(values, abs=TOLERANCE) for name, values in expected.items()
    } == found


def leave_early(machine, steering, chunks):
    """Reads some of a long stream and goes away; with 0 chunks before there is any."""
    body = {
        **{"model": "tiny", "prompt": PROMPT, "max_tokens": LONG, "stream": True},
        **{"ignore_eos": True, "vllm_xargs": {"steering": steering}},
    }
    timeout = httpx.Timeout(120, read=120 if chunks else 0.5)
    try:
        with httpx.stream("POST", f"{machine.url}/v1/completions", json=body, timeout=timeout) as r:
            for number, _ in enumerate(r.iter_lines()):
                if number == chunks:
                    return
    except httpx.ReadTimeout:
        assert not chunks


def test_clients_that_leave_give_their_slots_back(machine, before):
    begun = machine.figures()
    with ThreadPoolExecutor(12) as pool:
        # More vectors than slots: some of these leave while they wait for one.
        jobs = [
            pool.submit(leave_early, machine, f"{NAMES[n % 4]},{NAMES[(n + 1) % 4]}", 4 * (n % 3))
            for n in range(12)
        ]
        for job in jobs:
            job.result()
    assert machine.comes_to_rest() == {}
    # Not because the answers had come to their ends.
    generated = "vllm:generation_tokens_total"
    assert machine.figures()[generated] - begun[generated] < 12 * LONG / 2
    assert same(machine.answers(), before)
    assert machine.comes_to_rest() == {}


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "deleted"])
def test_a_damaged_artifact_changes_nothing_until_somebody_reloads(machine, before, damage):
    artifact = machine.vectors / "truthful.safetensors"
    content = artifact.read_bytes()
    if damage == "truncated":
        artifact.write_bytes(content[: len(content) // 2])
    elif damage == "overwritten":
        artifact.write_bytes(bytes(len(content)))
    else:
        artifact.unlink()
    try:
        # Four vectors in two slots: each is brought back to the device, from memory.
        evictions = machine.figures()["grains:evictions"]
        assert same(machine.answers(), before)
        assert machine.figures()["grains:evictions"] > evictions
        refused = machine.figures()["grains:catalogue_reloads_total", "refused"]
        for attempt in (1, 2):
            answer = machine.admin("POST", "reload")
            assert answer.status_code == 422, answer.text
            assert "truthful" in answer.json()["error"]["message"]
            outcome = "grains:catalogue_reloads_total", "refused"
            assert machine.figures()[outcome] == refused + attempt
        assert same(machine.answers(), before)
    finally:
        artifact.write_bytes(content)
    healed = machine.admin("POST", "reload")
    assert healed.status_code == 200 and not any(healed.json().values()), healed.text
    assert same(machine.answers(), before)


BROKEN = {
    "not YAML": ("vectors: {truthful: [", "not valid YAML"),
    "empty": ("", "expected a mapping"),
    "no vectors": ("vectors: {}", "vectors"),
    "another kind of thing": ("- truthful\n- polite\n", "expected a mapping"),
    "an unknown key": ("vectors: {a: {path: vectors/polite.safetensors, stength: 1}}", "stength"),
    "a file that is not there": ("vectors: {a: {path: none.safetensors, strength: 1}}", "no such"),
    "a strength that is none": (
        "vectors: {a: {path: vectors/polite.safetensors, strength: .nan}}", "nan is not a number",
    ),
    "a name twice": (
        "vectors: {a: {path: vectors/polite.safetensors, strength: 1},"
        " a: {path: vectors/brief.safetensors, strength: 1}}", "stands here twice",
    ),
    "bytes": (b"\xff\xfe\x00vectors", "not valid YAML"),
    "python": ("vectors: !!python/object/apply:os.system ['true']", "not valid YAML"),
    "a bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\n"
        "vectors: {a: {path: [*c,*c,*c,*c,*c,*c,*c]}}", "known keys",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_yaml_is_refused_and_the_old_one_serves_on(machine, before, case):
    content, message = BROKEN[case]
    listed = machine.admin("GET", "vectors").json()
    machine.catalogue.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        answer = machine.admin("POST", "reload")
        assert answer.status_code == 422, answer.text
        assert message in answer.json()["error"]["message"]
        assert machine.admin("GET", "vectors").json() == listed
        assert machine.complete("truthful").json()["choices"][0]["logprobs"][
            "token_logprobs"
        ] == pytest.approx(before["truthful"], abs=TOLERANCE)
    finally:
        machine.write(NAMES)
    assert machine.admin("POST", "reload").status_code == 200


def test_a_missing_yaml_is_refused_too(machine):
    machine.catalogue.unlink()
    answer = machine.admin("POST", "reload")
    machine.write(NAMES)
    assert answer.status_code == 422 and "cannot be read" in answer.json()["error"]["message"]


# --- bad input -----------------------------------------------------------------------------------

_NAME = st.sampled_from([*NAMES, "nobody", "Truthful", "none", ""])
_NUMBER = st.one_of(st.integers(-(2**70), 2**70), st.floats(-1e7, 1e7), st.floats(-1, 1))
_TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
_SPEC = st.lists(
    st.one_of(_NAME, st.builds("{}={}".format, _NAME, _NUMBER)), min_size=1, max_size=3
).map(",".join)
_PLACES = st.one_of(
    st.sampled_from(["all", "prompt", "generation", "prompt:3", "prompt:2+generation:1"]),
    _TEXT,
)  # fmt: skip
_VALUE = st.one_of(_TEXT, _NUMBER, st.lists(_NUMBER, max_size=3), st.lists(_TEXT, max_size=3))
_FITTING = {
    "steering": _SPEC,
    "steering_strength": _NUMBER,
    "steering_positions": _PLACES,
    "steering_layers": st.one_of(st.integers(-1, 4), st.lists(st.integers(0, 3), max_size=4)),
    "steering_prompt_tokens": st.integers(-1, 20),
    "steering_canary_key": _TEXT,
}
_RIGHT = {
    "steering_strength": st.floats(-2, 2),
    "steering_positions": st.sampled_from(["all", "prompt:3", "generation", "prompt:2+generation"]),
    "steering_layers": st.sampled_from([0, [1, 2], [3]]),
}
_FIELDS = st.one_of(
    st.fixed_dictionaries({"steering": st.sampled_from(NAMES)}, optional=_RIGHT),
    st.fixed_dictionaries({}, optional=_FITTING),
    st.builds(
        lambda name, more: {"steering": name, **more},
        _NAME,
        st.fixed_dictionaries({}, optional=_FITTING),
    ),
    st.dictionaries(
        st.one_of(st.sampled_from([*FIELDS, "grains", "Steering", "grains_a"]), _TEXT), _VALUE
    ),
)
_CONTENT = {
    "completions": {"prompt": PROMPT},
    "chat/completions": {"messages": [{"role": "user", "content": "mira color ?"}]},
}


# Random fields seldom hit this one, which is refused after its stream has begun.
_LATE = {"steering": NAMES[0], "steering_positions": "prompt", "steering_prompt_tokens": 200}


def test_any_fields_are_served_with_a_receipt_or_refused_and_counted(machine):
    refusals = []

    @settings(
        max_examples=250, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(
        fields=_FIELDS,
        route=st.sampled_from(sorted(_CONTENT)),
        stream=st.booleans(),
        alias=st.sampled_from(["", "", "", ":truthful", ":nobody"]),
    )
    @example(fields=_LATE, route="chat/completions", stream=True, alias="")
    def ask(fields, route, stream, alias):
        TRIED["requests"] += 1
        body = {"model": f"tiny{alias}", "max_tokens": 2, "stream": stream, "vllm_xargs": fields}
        response = httpx.post(
            f"{machine.url}/v1/{route}", json={**body, **_CONTENT[route]}, timeout=60
        )
        assert response.status_code in (200, 400), response.text
        text = response.text.replace("data: ", "").replace("[DONE]", "").strip().split("\n\n")
        parts = [json.loads(part) for part in text]
        if response.status_code == 400 or "error" in parts[0]:
            # A prompt shorter than steering_prompt_tokens is only known once a stream has begun.
            TRIED["of these refused"] += 1
            refusals.append(parts[0]["error"])
            return
        receipts = [part["grains"] for part in parts if "grains" in part]
        asked = fields.get("steering", alias) not in ("", "none")
        effect = receipts and receipts[-1]["steered"]
        assert effect or not asked or _is_zero(fields), (fields, alias, response.text)
        assert asked or not effect

    started = machine.figures()["grains:refusals_total"]
    ask()
    assert any("the prompt has" in error["message"] for error in refusals)
    ours = [error for error in refusals if _is_ours(error)]
    assert len(ours) > 50
    others = [error for error in refusals if not _is_ours(error)]
    print("refused by vLLM itself:", {error.get("param") for error in others})
    counted = machine.figures()["grains:refusals_total"] - started
    assert counted == len(ours), others
    assert machine.comes_to_rest() == {}


def _is_ours(error):
    """Our messages begin with the field that they blame; vLLM refuses values of other types."""
    field, message = error.get("param"), error["message"]
    if field == "extra_args":  # Ours name a field within it; vLLM itself refuses huge integers.
        return not message.startswith("extra_args")
    return field is not None and message.startswith(field)


def _is_zero(fields):
    """Whether all strengths are nought for float32, so that there is nothing to do."""
    numbers = [part.partition("=")[2] for part in str(fields.get("steering", "")).split(",")]
    strengths = [fields.get("steering_strength", number or 0.5) for number in numbers]
    return all(abs(float(strength)) < 1e-45 for strength in strengths)


def test_the_admin_routes_keep_to_their_description(machine):
    """schemathesis: data that fits the server's own OpenAPI description, and data that does not."""
    described = schemathesis.openapi.from_url(f"{machine.url}/openapi.json")
    operations = [
        result.ok() for result in described.include(path_regex="^/v1/grains/").get_all_operations()
    ]
    assert len(operations) == 8
    for operation in operations:
        for mode in schemathesis.GenerationMode:

            @settings(
                max_examples=40,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case):
                TRIED[f"{case.method} {case.path}"] += 1
                # For JSON Schema 3.0 is an integer; these routes want 3.
                case.call_and_validate(timeout=60, excluded_checks=[positive_data_acceptance])

            try:
                ask()
            except Unsatisfiable:  # A route without parameters has no data that does not fit.
                assert mode is schemathesis.GenerationMode.NEGATIVE


def test_the_server_is_as_it_was(machine, before):
    """After all of that, and with the kill switch wherever it was left."""
    assert machine.admin("POST", "enable").status_code == 200
    machine.write(NAMES)
    assert machine.admin("POST", "reload").status_code == 200
    assert same(machine.answers(), before)
    log = machine.server.log.read_text()
    # vLLM logs what ends a stream; of ours that is only the field that needs the prompt's length.
    known = re.findall(r"(?:SelectionError|VLLMValidationError): steering_prompt_tokens", log)
    assert log.count("Traceback (most") == len(known), log


def test_a_killed_engine_ends_the_server_and_a_restart_serves_the_same(machine, before):
    server, core = machine.processes()
    with ThreadPoolExecutor(5) as pool:
        jobs = [pool.submit(machine.complete, name, LONG) for name in NAMES]
        time.sleep(0.3)
        core.suspend()  # so that the change is still under way when the engine dies
        change = pool.submit(machine.admin, "POST", "reload")
        time.sleep(0.5)
        core.send_signal(signal.SIGKILL)
        assert change.result().status_code == 503
        for job in jobs:
            # Answered in full before, or an error: never half an answer, never a wrong one.
            with suppress(httpx.TransportError):
                assert job.result().status_code in (200, 500)
    with suppress(httpx.TransportError):
        assert machine.complete("truthful").status_code >= 500
    server.wait(60)
    with pytest.raises(ServerError, match="EngineDeadError"):
        machine.stop()
    machine.start()
    assert same(machine.answers(), before)
    assert machine.comes_to_rest() == {}
