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
        known_state = state.is_file() and status != 2
        return status, json.loads(state.read_text()) if known_state else {}

    return run


def test_a_failure_stops_nobody_and_is_written_down(run):
    known = {
        "fails": Step(("-c", "print('the reason'); raise SystemExit(7)"), 60, 1),
        "hangs": Step(("-c", "import time; print('waits', flush=True); time.sleep(60)"), 5, 1),
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


def test_what_was_measured_elsewhere_begins_afresh(run, tmp_path):
    # As a record of another machine: gone on with it is refused, from nothing it works.
    refuses = COUNTS.replace("sys.exit(", f"sys.exit({script.OTHERWISE} if before else ")
    known = {"step": Step(("-c", refuses, RESULT, "0"), 60, 1)}
    unfinished = {"status": "unfinished", "seconds": 1, "result": {"runs": 5}}
    (tmp_path / "state.json").write_text(json.dumps({"step": unfinished}))
    status, state = run(known)
    assert (status, state["step"]["status"], state["step"]["result"]) == (0, "done", {"runs": 1})


def test_a_failure_takes_the_place_of_no_result(run, capsys):
    def failing(status):
        return {"step": Step(("-c", f"raise SystemExit({status})"), 60, 1)}

    run({"step": counting(0)})
    status, state = run(failing(7), "--again")
    assert status == 1
    assert (state["step"]["status"], state["step"]["result"]) == ("done", {"runs": 1})
    assert state["step"]["again"]["status"] == "failed"
    run(failing(7), "--show")
    assert "failed, the earlier result is kept" in capsys.readouterr().out
    assert run(failing(7))[0] == 0  # it was done, and is not asked for once more
    assert "again" not in run({"step": counting(0)}, "--again")[1]["step"]
    # What was half measured is kept too.
    run({"half": counting(script.UNFINISHED)})
    state = run({"half": failing(7)["step"]}, "--again")[1]
    assert (state["half"]["status"], state["half"]["result"]) == ("failed", {"runs": 1})


@pytest.mark.parametrize("text", ["", "[]", '{"probe": []}', '{"probe": {"status": "done"}}'])
def test_what_is_no_state_is_refused_in_a_line_and_kept(run, tmp_path, capsys, text):
    (tmp_path / "state.json").write_text(text)
    assert run({"step": counting(0)})[0] == 2
    assert (tmp_path / "state.json").read_text() == text
    printed = capsys.readouterr().err
    assert "is no state of these steps" in printed and printed.count("\n") == 1


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_result_that_is_none_is_a_failure(run, text):
    writes = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
    status, state = run({"step": Step(("-c", writes, RESULT, text), 60, 1), "next": counting(0)})
    assert status == 1 and state["next"]["status"] == "done"
    assert state["step"]["status"] == "failed" and "result" not in state["step"]
    assert "is no result" in state["step"]["log"]


def test_the_state_may_be_in_a_new_folder(run, tmp_path):
    state = tmp_path / "new" / "folder" / "state.json"
    assert run({"step": counting(0)}, "--state", str(state))[0] == 0
    assert json.loads(state.read_text())["step"]["status"] == "done"


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


def test_v2_is_the_runner_of_the_speeds_on_a_gpu():
    runners = {
        name: step.command[step.command.index("--runner") + 1]
        for name, step in steps(tiny=False).items()
        if "--runner" in step.command
    }
    assert {name for name, runner in runners.items() if runner == "1"} == {
        "identity-v1", "overhead-8b-v1", "reference-v1",
    }  # fmt: skip
    assert {"overhead-8b", "overhead-1.5b", "overhead-4b", "kernels"} < set(runners)


def test_kernels_counted_before_a_failure_are_kept(tmp_path, monkeypatch):
    import benchmarks.kernels.__main__ as kernels

    asked = []

    def run(engine, folder, runner):
        asked.append(runner)
        if engine.steered:
            raise RuntimeError("no such kernel")
        counted = {"compiled": 3, "other": 1, "kernels": {"triton_a": 3, "b": 1}}
        return {
            "model": {"family": "llama", "layers": 4}, "steered_layers": [], "together": 1,
            "plain": counted,
        }  # fmt: skip

    monkeypatch.setattr(kernels, "run", run)
    out = tmp_path / "kernels.json"
    words = f"kernels --models llama --rounds 0 --runner 2 --out {out}"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(RuntimeError):
        kernels.main()
    report = json.loads(out.read_text())
    assert list(report["engines"]) == ["llama, 4 layers, plain"]
    assert report["summary"][0]["compiled"] == 3
    assert report["settings"]["runner"] == 2 and asked == [2, 2]


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
