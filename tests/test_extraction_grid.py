"""benchmarks.extraction_grid: figures of two machines are not mixed, no memory is no success."""

import json

import pytest

import benchmarks.extraction_grid as grid
from benchmarks.overhead.record import OTHERWISE


@pytest.fixture
def run(tmp_path, monkeypatch):
    out = tmp_path / "grid.json"
    monkeypatch.setenv("COLUMNS", "200")

    def run(found, *more):
        words = f"grid --shapes 4x256 --prompts 64 --contestants grains --out {out}".split()
        monkeypatch.setattr("sys.argv", [*words, *more])
        monkeypatch.setattr(grid, "run", lambda cell, timeout: next(found))
        grid.main()

    return out, run


def runs(out):
    return [run for cell in json.loads(out.read_text())["cells"].values() for run in cell["runs"]]


def test_memory_that_nobody_limited_is_a_failure_and_tried_again(run, capsys):
    out, measured = run
    good, bad = {"seconds_per_point": 1.0}, {"too_little_memory": True, "limit_gib": None}
    with pytest.raises(SystemExit, match="out of memory: 4x256/64/grains"):
        measured(iter([good, bad]), "--repeats", "2")
    assert "does not fit" in " ".join(capsys.readouterr().out.split())
    assert runs(out) == [good, bad]
    measured(iter([good]), "--repeats", "2")
    assert runs(out) == [good, good]


def test_memory_that_was_limited_is_a_figure(run):
    out, measured = run
    limited = {"too_little_memory": True, "limit_gib": 1.0}
    measured(iter([limited]), "--repeats", "1", "--memory-gib", "1")
    measured(iter([]), "--repeats", "1", "--memory-gib", "1")
    assert runs(out) == [limited]


@pytest.mark.parametrize("change", ["hardware", "not JSON", "[]"])
def test_figures_of_another_machine_are_refused_and_kept(run, capsys, change):
    out, measured = run
    measured(iter([{"seconds_per_point": 1.0}]), "--repeats", "1")
    report = json.loads(out.read_text())
    report["hardware"]["gpu"] = "another"
    text = json.dumps(report) if change == "hardware" else change
    out.write_text(text)
    with pytest.raises(SystemExit) as refused:
        measured(iter([]), "--repeats", "1")
    assert refused.value.code == OTHERWISE
    assert str(out) in capsys.readouterr().err and out.read_text() == text
