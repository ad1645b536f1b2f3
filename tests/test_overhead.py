"""benchmarks.overhead: what is kept, what is compared with what, and who is asked when."""

import asyncio
import json
import math
from argparse import Namespace
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from benchmarks.overhead.__main__ import _schedule, main, show
from benchmarks.overhead.arms import ARMS, DEFAULT, PLAIN
from benchmarks.overhead.record import OTHERWISE, Key, Record, RecordError
from benchmarks.overhead.shapes import SHAPES, write_catalogue, write_model
from benchmarks.overhead.summary import interval, lines
from benchmarks.overhead.worker import _in_turn
from benchmarks.server import ServerError

SETTINGS = {"shape": "cpu", "versions": {"vllm": "0.32.0"}, "flags": ["--dtype", "float32"]}


def recorded(path, times):
    """A record of `serve` at batch 8 from arm -> ms per token, one per round."""
    record = Record(path, SETTINGS)
    for arm, values in times.items():
        for number, value in enumerate(values):
            record.add(Key("serve", 8, number, arm), {"per_token_ms": value, "ttft_ms": 10 * value})
    return record


def test_a_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "overhead.json"
    recorded(path, {PLAIN: [1.0, 2.0], "idle": [1.0]})
    again = Record(path, SETTINGS)
    assert len(again) == 3
    assert Key("serve", 8, 1, PLAIN) in again
    assert Key("serve", 8, 1, "idle") not in again
    # The second round lacks an arm: it is measured again as a whole, the first is kept.
    again.forget_unfinished("serve", [PLAIN, "idle"])
    assert Key("serve", 8, 0, "idle") in again
    assert Key("serve", 8, 1, PLAIN) not in again
    again.forget_unfinished("latency", [PLAIN, "idle", "one"])  # another benchmark's rounds
    assert len(again) == 2


def test_other_settings_are_not_mixed_in(tmp_path):
    path = tmp_path / "overhead.json"
    recorded(path, {PLAIN: [1.0]})
    other = {**SETTINGS, "versions": {"vllm": "0.33.0"}}
    with pytest.raises(RecordError, match=r"versions: .*0\.32\.0.* there, .*0\.33\.0.* now"):
        Record(path, other)


def test_another_driver_is_not_another_machine(tmp_path):
    path = tmp_path / "overhead.json"

    def on(*gpus):
        return {**SETTINGS, "hardware": {"cpus": 16, "gpus": list(gpus)}}

    Record(path, on("NVIDIA H200, 570.1")).add(Key("serve", 8, 0, PLAIN), {"ttft_ms": 1.0})
    assert len(Record(path, on("NVIDIA H200, 580.2"))) == 1
    for other in (on("NVIDIA H100, 570.1"), on("NVIDIA H200, 570.1", "NVIDIA H200, 570.1")):
        with pytest.raises(RecordError, match="hardware"):
            Record(path, other)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {}, "engines": {}, "starts": 1}'])
def test_what_is_no_record_is_refused_in_a_line(tmp_path, monkeypatch, capsys, text):
    path = tmp_path / "overhead.json"
    path.write_text(text)
    with pytest.raises(RecordError, match="is no record"):
        Record(path, SETTINGS)
    argv = ["overhead", "--shape", "tiny", "--work", str(tmp_path / "work")]
    monkeypatch.setattr("sys.argv", [*argv, "--out", str(path)])
    assert main() == OTHERWISE
    monkeypatch.setattr("sys.argv", [*argv, "--show", str(path)])
    assert main() == 1
    assert capsys.readouterr().out.count("is no record") == 2


@pytest.mark.parametrize("nothing", [0.0, math.nan])
def test_nothing_in_plain_has_no_ratio(tmp_path, capsys, nothing):
    from benchmarks.overhead.figure import ratios

    path = tmp_path / "r.json"
    recorded(path, {PLAIN: [nothing, nothing], "idle": [1.0, 2.0], "one": [1.0, nothing]})
    document = json.loads(path.read_text())  # through the file, which must be JSON
    found = lines(document)
    idle = next(x for x in found if (x.arm, x.metric) == ("idle", "per_token_ms"))
    assert (idle.values, idle.ratios, idle.median_ratio) == ((1.0, 2.0), (), None)
    assert idle.verdict == "undecided"
    show(document)
    assert "not measured" in capsys.readouterr().out
    ratios(found, "a title")
    # A round that has it in both counts all the same.
    recorded(path, {PLAIN: [1.0, nothing, 1.0], "idle": [1.5, 1.0, nothing]})
    found = lines(json.loads(path.read_text()))
    assert next(x for x in found if x.arm == "idle").ratios == (1.5,)


def test_a_server_that_does_not_start_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    @contextmanager
    def servers(setup):
        raise ServerError("vllm serve ended early")
        yield

    monkeypatch.setattr("benchmarks.overhead.__main__.servers", servers)
    where = ["--work", str(tmp_path), "--out", str(tmp_path / "o.json")]
    monkeypatch.setattr("sys.argv", ["overhead", "--shape", "tiny", *where])
    assert main() == 1
    assert "vllm serve ended early" in capsys.readouterr().out


def test_ratios_are_taken_within_a_round(tmp_path):
    # The machine is ten times slower in round 1: a ratio of medians would say 1.0 or 10.
    times = {PLAIN: [1.0, 10.0, 1.0], "idle": [1.1, 10.5, 1.0]}
    found = lines(recorded(tmp_path / "r.json", times).document())
    idle = next(x for x in found if (x.arm, x.metric) == ("idle", "per_token_ms"))
    assert idle.ratios == pytest.approx((1.1, 1.05, 1.0))
    assert idle.median_ratio == pytest.approx(1.05)
    assert idle.values == (1.1, 10.5, 1.0)


def test_a_round_without_plain_is_not_compared(tmp_path):
    times = {PLAIN: [2.0], "idle": [2.0, 4.0]}
    found = lines(recorded(tmp_path / "r.json", times).document())
    assert next(x for x in found if x.arm == "idle").ratios == (1.0,)


def test_interval_is_students_on_the_logarithms():
    ratios = [1.02, 0.99, 1.05, 1.01, 1.03]
    logs = [math.log(ratio) for ratio in ratios]
    centre = sum(logs) / 5
    error = math.sqrt(sum((x - centre) ** 2 for x in logs) / 4 / 5)
    reach = 2.7764451 * error  # the table's value for 95% and 4 degrees of freedom
    assert interval(ratios) == pytest.approx((math.exp(centre - reach), math.exp(centre + reach)))
    assert interval([1.0]) == (None, None)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.000, 1.001, 0.999], "met"),
        ([1.100, 1.101, 1.099], "missed"),
        ([0.900, 1.100, 1.050], "undecided"),
        ([1.000], "undecided"),  # one round says nothing
    ],
)
def test_a_target_is_met_or_missed_only_beyond_doubt(tmp_path, ratios, verdict):
    times = {PLAIN: [1.0] * len(ratios), "idle": ratios}
    found = lines(recorded(tmp_path / "r.json", times).document())
    assert next(x for x in found if x.arm == "idle").verdict == verdict
    assert next(x for x in found if x.arm == PLAIN).verdict == ""


def test_a_record_can_be_shown_and_drawn(tmp_path):
    from benchmarks.overhead.figure import ratios

    document = recorded(tmp_path / "r.json", {PLAIN: [1.0, 1.1], "one": [1.2, 1.2]}).document()
    show(document)
    assert len(ratios(lines(document), "a title").axes) == 2  # one per metric


def test_arms_take_turns_and_plain_is_not_always_first():
    args = Namespace(rounds=len(DEFAULT), sizes=[1, 8], arms=list(DEFAULT))
    keys = list(_schedule("serve", args))
    assert len(set(keys)) == len(keys) == len(DEFAULT) * 2 * len(DEFAULT)
    firsts = [keys[n].arm for n in range(0, len(keys), 2 * len(DEFAULT))]
    assert sorted(firsts) == sorted(DEFAULT)
    for start in range(0, len(keys), len(DEFAULT)):  # every arm once before any comes again
        assert {key.arm for key in keys[start : start + len(DEFAULT)]} == set(DEFAULT)


def test_arms_are_what_their_names_say():
    distinct = {name: len({json.dumps(s) for s in arm.steering}) for name, arm in ARMS.items()}
    assert {name: distinct[name] for name in ("idle", "one", "16", "256", "256 vectors")} == {
        "idle": 0, "one": 1, "16": 16, "256": 256, "256 vectors": 256,
    }  # fmt: skip
    for arm in ARMS.values():
        named = {steering["steering"] for steering in arm.steering}
        assert named <= {f"v{number}" for number in range(arm.vectors)}
        assert arm.grains or not arm.steering


def test_every_request_gets_steering_of_its_own():
    asked = []

    async def ask(request, session):
        asked.append((request.extra_body, session))

    async def run(steering, count):
        turn = _in_turn(ask, steering)
        for _ in range(count):
            await turn(SimpleNamespace(extra_body={"temperature": 0}), "session")

    asyncio.run(run([{"steering": "v0"}, {"steering": "v1"}], 3))
    fields = [body["vllm_xargs"]["steering"] for body, _ in asked]
    assert fields == ["v0", "v1", "v0"]
    assert all(body["temperature"] == 0 and session == "session" for body, session in asked)
    asked.clear()
    asyncio.run(run([], 1))
    assert asked == [({"temperature": 0}, "session")]


@pytest.mark.parametrize("name", list(SHAPES))
def test_models_by_shape_load_and_tokens_are_words(tmp_path, name):
    from transformers import AutoConfig, AutoTokenizer

    shape = SHAPES[name]
    model = write_model(tmp_path / "model", shape, longest=64, dtype="bfloat16")
    config = AutoConfig.from_pretrained(model)
    assert (config.num_hidden_layers, config.hidden_size) == (shape.layers, shape.hidden)
    assert config.get_text_config().head_dim == shape.head
    assert config.qkv_bias == shape.qkv_bias
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [3, shape.vocabulary - 1, 57, 57]
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids
    assert tokenizer.num_special_tokens_to_add() == 0


def test_the_catalogue_steers_every_layer(tmp_path):
    from grains_vllm.catalogue import KEY
    from grains_vllm.config import read_catalogue

    path = write_catalogue(tmp_path, SHAPES["tiny"], 3)
    catalogue = read_catalogue({"config": str(path)})
    assert KEY == "grains"
    assert sorted(catalogue.vectors) == ["v0", "v1", "v2"]
    assert all(list(entry.layers) == [0, 1] for entry in catalogue.vectors.values())
