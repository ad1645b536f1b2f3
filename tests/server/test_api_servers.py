"""Two API server processes, two data-parallel ranks, and one catalogue."""

import re
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.server.operating import KEY, WORDS, asking, complete, models, same, started

pytestmark = pytest.mark.engine

MANY = 16  # connections; they land on either process as the kernel pleases


def digests(ask, name):
    """What `name` means to whoever answers each of many connections."""
    answers = [ask("GET", f"vectors/{name}") for _ in range(MANY)]
    assert {answer.status_code for answer in answers} == {200}
    return {answer.json()["digest"] for answer in answers}


def statuses(server, **asked):
    """The statuses of many completions at once, each over a connection of its own."""

    def status(_):
        return httpx.post(
            f"{server.url}/v1/completions",
            json={"model": "tiny", "prompt": WORDS, "max_tokens": 1, **asked},
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=60,
        ).status_code

    with ThreadPoolExecutor(MANY) as pool:
        return set(pool.map(status, range(MANY)))


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


@pytest.fixture
def temporary(monkeypatch):
    """Where processes keep temporary files; a short path, since sockets are among them."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def test_a_change_through_one_is_a_change_for_all(tmp_path, temporary):
    # As many API servers as ranks is what vLLM starts by itself.
    with started(tmp_path, "--data-parallel-size", "2") as server:
        ask = asking(server)
        found = ask("GET", "capabilities").json()
        assert (found["api_servers"], found["data_parallel_size"]) == (2, 2)
        (state,) = temporary.glob("grains-*")
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        _check_changes(server, ask)
        _check_kill_switch(server, ask)
    assert not list(temporary.glob("grains-*"))


def _check_changes(server, ask):
    truthful, _ = complete(server, "tiny:truthful")
    for turn in range(8):
        file = ("same.safetensors", "other.safetensors")[turn % 2]
        answer = ask("POST", "vectors", name="hot", file=file, strength=0.5, replace=True)
        assert answer.status_code == (200 if turn else 201), answer.text
        assert digests(ask, "hot") == {answer.json()["digest"]}
        assert statuses(server, model="tiny:hot") == {200}
    assert not same(complete(server, "tiny:hot")[0], truthful)
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
    expected = {"tiny", *(f"tiny:{name}" for name in (*names, "truthful", "polite"))}
    assert all(models(server) == expected for _ in range(4))
    assert same(complete(server, "tiny:v5")[0], truthful)
    more = {"file": "other.safetensors", "strength": 0.5, "replace": True}
    with ThreadPoolExecutor(len(names)) as pool:
        by_both(
            server,
            "outcome=applied",
            lambda: list(pool.map(lambda name: ask("POST", "vectors", name=name, **more), names)),
        )
    full = ask("POST", "vectors", name="v6", file="same.safetensors", strength=0.5)
    assert full.status_code == 409


def _check_kill_switch(server, ask):
    assert ask("POST", "disable").json() == {"enabled": False}
    assert statuses(server, model="tiny:polite") == {503}
    assert statuses(server) == {200}
    by_both(server, "switched off", lambda: statuses(server, model="tiny:polite"))
    assert ask("POST", "enable").json() == {"enabled": True}
    assert statuses(server, model="tiny:polite") == {200}
