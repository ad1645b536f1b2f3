"""How a command ends, and how wide it writes."""

import io
import os
import signal
import subprocess
import sys

import pytest
import typer
from rich.console import Console

from offline import cli, sweep_table
from offline.console import Terminated, input_errors, stdout
from tests.offline.results import sweep


def ended(error, on_interrupt=""):
    with pytest.raises(typer.Exit) as found, input_errors(on_interrupt):
        raise error
    return found.value.exit_code


def test_signals_have_the_exit_codes_of_shells(capsys):
    assert ended(KeyboardInterrupt()) == 130
    assert ended(Terminated(), "run it again") == 143
    assert capsys.readouterr().err == "interrupted\nterminated; run it again\n"


def test_sigterm_ends_a_command_like_ctrl_c(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Terminated):
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_launcher_ends_its_processes_itself(monkeypatch):
    monkeypatch.setattr(cli, "launched", lambda: 2)
    monkeypatch.setattr(cli, "app", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    cli.main()
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_while_modules_are_imported(tmp_path):
    """Also where what is being imported takes every exception for its own failure."""
    (tmp_path / "typer.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    for _ in range(10**6): pass\n"
        "except BaseException:\n    raise ImportError('no typer')\n"
    )
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    done = subprocess.run(
        [sys.executable, "-m", "offline", "inspect", "x"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("written", [1, 10**6])
def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch, capsys, written):
    """As `head`; whether what is written waits in the buffer or not."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(typer.Exit) as found, input_errors():
            print("x" * written)
        print("what nobody reads")
    assert found.value.exit_code == 141 and capsys.readouterr().err == ""


def test_another_broken_pipe_is_an_error(capsys):
    assert ended(BrokenPipeError(32, "Broken pipe")) == 2
    assert "Broken pipe" in capsys.readouterr().err


def test_a_log_file_is_wide_unless_somebody_says_otherwise(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.delenv("COLUMNS", raising=False)
    assert stdout().width == 120
    monkeypatch.setenv("COLUMNS", "70")
    assert stdout().width == 70


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_sweeps_figures_are_whole_at_any_width(monkeypatch, width):
    document = sweep("d", "a-vector-with-a-long-name", ("all", "prompt:1+generation"))
    document["points"][3]["vector"] = "other"
    written = Console(width=width, file=io.StringIO())
    monkeypatch.setattr(sweep_table, "stdout", lambda: written)
    sweep_table.show(document)
    lines = written.file.getvalue().splitlines()
    rows = [line.split() for line in lines if "%" in line]
    assert len(rows) == 11
    assert ["0.2", "0.600", "0.700", "0.400", "0.890", "9.2", "+2.2%"] in [row[-7:] for row in rows]
    assert sum("*" in row for row in rows) == 1
