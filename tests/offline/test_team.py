"""Several real processes that share one run, against one process that does all of it."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore
from typer.testing import CliRunner

from offline.cli import app
from offline.errors import InputError
from offline.extract import extract
from offline.model import load_decoder
from offline.options import ExtractOptions, Method
from offline.pairs import load_pairs
from offline.team import Post, Team, joined
from tests.offline.worlds import rows, save_model, write_jsonl

ROOT = Path(__file__).parents[2]
EXAMPLES = 20  # three groups

METHODS = ("caa", "pca-diff", "icv", "random")

# Runs the functions that its first argument names, one after the other in one team.
SCRIPT = """
import os
import sys
from pathlib import Path
import typer
from offline.console import input_errors
from offline.extract import extract
from offline.model import load_decoder
from offline.options import ExtractOptions, Method
from offline.pairs import load_pairs
from offline.team import joined

def every_method(model, data, folder, team):
    decoder, pairs = load_decoder(model, device="cpu"), load_pairs(data)
    for method in ("caa", "pca-diff", "icv", "random"):
        vector, _ = extract(
            decoder, pairs, ExtractOptions(method=Method(method), k=3), team=team
        )
        vector.save(Path(folder) / f"{method}-{team.rank}.safetensors")

def failing(model, data, folder, team):
    import offline.attribution
    from offline.errors import InputError
    decoder, pairs = load_decoder(model, device="cpu"), load_pairs(data)
    if team.rank == 1:
        def attribute(self, pairs):
            raise InputError(f"{pairs[0].pair.where}: cannot be done")
        offline.attribution.Attributor.attribute = attribute
    extract(
        decoder, pairs, ExtractOptions(ig_points=8, k=3), Path(folder) / "v.safetensors", team=team
    )

def other_data(model, data, folder, team):
    decoder, pairs = load_decoder(model, device="cpu"), load_pairs(data, limit=9 + team.rank)
    extract(decoder, pairs, ExtractOptions(ig_points=8), team=team)

def restarted(folder, team):
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    for number in range(4):
        mine = f"{attempt} {team.rank} {number}"
        found = [part.decode() for part in team.share(mine.encode())]
        assert found == [f"{attempt} {rank} {number}" for rank in range(team.size)], found
        if (attempt, team.rank, number) == ("0", 1, 2):
            os._exit(7)
    Path(folder, f"done-{attempt}-{team.rank}").touch()

if __name__ == "__main__":
    try:
        with input_errors(), joined() as team:
            for name in sys.argv[1].split(","):
                globals()[name](*sys.argv[2:], team)
    except typer.Exit as end:  # what the command line does
        sys.exit(end.exit_code)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("team")
    save_model(folder / "tiny")
    write_jsonl(folder / "pairs.jsonl", rows(EXAMPLES))
    (folder / "script.py").write_text(SCRIPT)
    return folder


def launch(*arguments, restarts=0):
    """torchrun with two processes; each with as many threads as the test itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", str(restarts)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True
    )


def arguments(world, out, *more):
    """Of `grains`."""
    found = "extract", "--model", world / "tiny", "--data", world / "pairs.jsonl", "--out", out
    return [*map(str, found), "--ig-points", "8", "--k", "3", "--device", "cpu", *map(str, more)]


def test_two_processes_make_the_same_files_and_go_on_from_one(world, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    names = ["v.safetensors", "v.attributions.jsonl", "deltas.safetensors"]

    def asked(folder):
        return arguments(
            world, tmp_path / folder / names[0], "--deltas", tmp_path / folder / names[2]
        )

    alone = CliRunner().invoke(app, asked("one"))
    assert alone.exit_code == 0, alone.output

    # Two processes go on with what one has left behind: its first group.
    def interrupt(_count):
        raise KeyboardInterrupt

    decoder = load_decoder(str(world / "tiny"), device="cpu")
    data = load_pairs(str(world / "pairs.jsonl"))
    options = ExtractOptions(ig_points=8, k=3)
    with pytest.raises(KeyboardInterrupt):
        extract(decoder, data, options, tmp_path / "two" / names[0], on_examples=interrupt)
    kept = tmp_path / "two" / f"{names[0]}.partial" / "group-00000.safetensors"
    assert kept.is_file()
    done = launch("-m", "offline", *asked("two"))
    assert done.returncode == 0, done.stderr
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(names)
    # Shown once, although both have run.
    assert done.stdout.count("wrote ") == 3 and done.stdout.count("Completeness") == 1
    assert done.stderr.count("see --chat") == 1
    assert len(re.findall(rf"{EXAMPLES}/{EXAMPLES}", done.stderr)) == 1


@pytest.fixture(scope="module")
def shared(world, tmp_path_factory):
    """A team that makes a vector with every method, and then fails."""
    folder = tmp_path_factory.mktemp("shared")
    script = world / "script.py", "every_method,failing"
    return launch(*script, world / "tiny", world / "pairs.jsonl", folder), folder


def test_every_method_can_be_shared(world, shared, tmp_path):
    done, folder = shared
    decoder = load_decoder(str(world / "tiny"), device="cpu")
    data = load_pairs(str(world / "pairs.jsonl"))
    for method in METHODS:
        vector, _ = extract(decoder, data, ExtractOptions(method=Method(method), k=3))
        vector.save(tmp_path / method)
        for rank in (0, 1):
            found = folder / f"{method}-{rank}.safetensors"
            assert found.exists(), done.stderr
            assert found.read_bytes() == (tmp_path / method).read_bytes()


def test_the_error_of_one_process_ends_all_with_one_message(shared):
    done, folder = shared
    assert done.returncode != 0
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert messages == ["error: process 1: pairs.jsonl, line 9: cannot be done"]
    assert "[rank" not in done.stderr  # no process has left with a traceback
    assert not (folder / "v.safetensors").exists()


def test_processes_that_read_different_data_are_refused(world, tmp_path):
    done = launch(
        world / "script.py", "other_data", world / "tiny", world / "pairs.jsonl", tmp_path
    )
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and "not the same run as in process 0" in messages[0]


def test_an_error_that_all_processes_have_is_shown_once(world, tmp_path):
    more = "--device-map", "auto"
    done = launch("-m", "offline", *arguments(world, tmp_path / "v.safetensors", *more))
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert messages == ["error: --device-map spreads one process over the GPUs; start just one"]
    assert "[rank" not in done.stderr and done.returncode != 0


def test_a_restart_by_the_launcher_begins_anew(world, tmp_path):
    """One process dies in the middle; what it had said then is not taken for what it says now."""
    done = launch(world / "script.py", "restarted", tmp_path, restarts=1)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done-1-0", "done-1-1"]


def test_who_waits_hears_ctrl_c():
    code = """
from torch.distributed import HashStore
from offline.team import Post
print("waits", flush=True)
Post(HashStore(), 0, 2).exchange(b"")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell's background job ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert process.stdout.readline() == b"waits\n"
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, messages = process.communicate(timeout=60)
    finally:
        process.kill()
    assert messages.endswith(b"KeyboardInterrupt\n")


def test_payloads_of_any_size_reach_all_and_do_not_stay():
    store = HashStore()
    sizes = [0, 1, 2**20, 2**20 + 1, 3_000_000, 5]

    def run(rank):
        post = Post(store, rank, 3)
        found = [post.exchange(bytes([65 + rank]) * (size + rank)) for size in sizes]
        post.leave()
        return found

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(run, range(3)))
    expected = [[bytes([65 + rank]) * (size + rank) for rank in range(3)] for size in sizes]
    assert results == [expected] * 3
    # Those of the last round, and who has left; a store counts a key of its own.
    assert store.num_keys() <= 3 * (1 + 1) + 3 + 1


def test_devices(monkeypatch):
    assert Team().device("cuda:1", "auto") == "cuda:1"
    second = Team(rank=5, size=8, local_rank=1)
    with pytest.raises(InputError, match="--device is 'cuda:0', but each of 8 processes"):
        second.device("cuda:0", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert second.device("auto", None) == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert second.device("auto", None) == second.device("cuda", None) == "cuda:1"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(InputError, match="process 1 of this machine finds 1 GPUs"):
        second.device("cuda", None)


def test_without_a_launcher_there_is_a_team_of_one(monkeypatch):
    with joined() as team:
        assert team == Team() and team.share(b"mine") == [b"mine"]
    monkeypatch.setenv("WORLD_SIZE", "2")  # but no RANK: a cluster's variable, not a launcher's
    with joined() as team:
        assert team.size == 1
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"torchrun has not set all.*MASTER_ADDR"), joined():
        pass


def test_commands_that_share_nothing_are_refused_under_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    result = CliRunner().invoke(app, ["inspect", "v.safetensors"])
    assert result.exit_code == 2
    assert "2 processes of `grains inspect` would all do the same" in result.stderr
