"""benchmarks.gpu: steps that fail or hang cost the others nothing; nothing is done twice."""

import json
import sys

import pytest

import benchmarks.gpu.__main__ as script
from benchmarks.gpu import metadata
from benchmarks.gpu.steps import RESULT, Step, filled, steps

# Each run of it writes down one more time that it ran.
COUNTS = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
before = json.loads(path.read_text())["runs"] if path.is_file() else 0
path.write_text(json.dumps({"runs": before + 1}))
sys.exit(int(sys.argv[2]))
"""


def counting(status):
    return Step(("-c", COUNTS, RESULT, str(status)), 60, 1)


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(known, *more):
        monkeypatch.setattr(script, "steps", lambda tiny: known)
        state = tmp_path / "state.json"
        argv = ["gpu", "--state", str(state), "--work", str(tmp_path / "work"), *more]
        monkeypatch.setattr(sys, "argv", argv)
        status = script.main()
        return status, json.loads(state.read_text()) if state.is_file() else {}

    return run


def test_a_failure_stops_nobody_and_is_written_down(run):
    known = {
        "fails": Step(("-c", "print('the reason'); raise SystemExit(7)"), 60, 1),
        "hangs": Step(("-c", "import time; print('waits', flush=True); time.sleep(60)"), 1.5, 1),
        "works": counting(0),
    }
    status, state = run(known)
    assert status == 1
    assert {name: state[name]["status"] for name in known} == {
        "fails": "failed", "hangs": "out of time", "works": "done",
    }  # fmt: skip
    assert "the reason" in state["fails"]["log"] and "waits" in state["hangs"]["log"]
    assert state["works"]["result"] == {"runs": 1}


def test_what_is_done_is_not_done_again_and_what_is_not_goes_on(run):
    known = {"done": counting(0), "unfinished": counting(script.UNFINISHED)}
    assert run(known)[0] == 1
    status, state = run(known)
    assert status == 1
    assert state["done"]["result"] == {"runs": 1}
    assert state["unfinished"] == {**state["unfinished"], "status": "unfinished"}
    assert state["unfinished"]["result"] == {"runs": 2}
    assert run(known, "--again")[1]["done"]["result"] == {"runs": 1}  # from nothing


def test_a_step_without_time_is_not_begun(run):
    known = {"long": Step(("-c", "pass"), 600, 300), "short": counting(0)}
    status, state = run(known, "--minutes", "1")
    assert status == 1 and list(state) == ["short"]


def test_a_state_can_be_shown_elsewhere(run, tmp_path, capsys):
    measured = {"bench": "serve", "size": 8, "round": 0, "per_token_ms": 2.0, "arm": "plain"}
    found = {"measurements": [measured, {**measured, "arm": "idle", "per_token_ms": 2.5}]}
    done = {"status": "done", "seconds": 1}
    state = {"overhead": {**done, "result": found}, "probe": {**done, "result": {"cuda": "13.0"}}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert run({}, "--show")[0] == 0
    printed = capsys.readouterr().out
    assert "1.250" in printed and '"cuda": "13.0"' in printed


def test_steps_can_be_chosen_by_name(run):
    known = {"one": counting(0), "two": counting(0)}
    assert run(known, "two")[1].keys() == {"two"}
    with pytest.raises(SystemExit):
        run(known, "three")


@pytest.mark.parametrize("tiny", [True, False])
def test_every_step_ends_within_a_call_of_ten_minutes(tiny, tmp_path):
    for step in steps(tiny).values():
        assert step.least < step.seconds <= 600
        command = filled(step, tmp_path / "r.json", tmp_path, step.seconds)
        assert str(tmp_path / "r.json") in command
        assert not {"RESULT", "WORK"} & set(command)
    assert steps(True).keys() == steps(False).keys()


def test_a_bare_checkout_offers_the_plugin(tmp_path, monkeypatch):
    from importlib.metadata import Distribution, entry_points

    assert metadata.folder_for_path(tmp_path) is None  # it is installed here
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    site = metadata.folder_for_path(tmp_path)
    found = next(iter(Distribution.discover(path=[str(site)])))
    offered = {(p.group, p.name, p.value) for p in found.entry_points}
    installed = {
        (group, point.name, point.value)
        for group in ("vllm.general_plugins", "vllm.endpoint_plugins")
        for point in entry_points(group=group)
        if point.name == "grains"
    }
    assert offered == installed != set()
