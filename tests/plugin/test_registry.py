"""One catalogue for all front ends of a server, and the switch that turns steering off."""

import asyncio
import fcntl
import json
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from grains_vllm import registry
from grains_vllm.errors import GrainsConfigError
from grains_vllm.registry import DISABLE, STATE, Registry, share


def engine(catalogue, servers=1, rank=0):
    """A VllmConfig's part that registries read."""
    return SimpleNamespace(
        additional_config={} if catalogue is None else {"grains": catalogue.to_json()},
        parallel_config=SimpleNamespace(_api_process_count=servers, _api_process_rank=rank),
    )


@pytest.fixture
def shared(catalogue, monkeypatch):
    """What every API server finds, made as the process does that starts them."""
    monkeypatch.setenv(STATE, "")
    built = catalogue()
    share(engine(built, 2, -1))
    return built


def without(catalogue, name):
    return replace(catalogue, vectors={k: v for k, v in catalogue.vectors.items() if k != name})


def test_one_front_end_keeps_it_in_memory(catalogue, monkeypatch):
    monkeypatch.delenv(STATE, raising=False)
    built = catalogue(default="polite")
    one = Registry.of(engine(built))
    share(engine(built))
    assert STATE not in os.environ
    assert one.snapshot().catalogue == built
    one.set_enabled(False)
    one.publish(without(built, "truthful"))
    assert set(one.snapshot().catalogue.vectors) == {"polite"}
    assert not one.snapshot().enabled
    # Another engine of the same process begins with its own catalogue.
    assert Registry.of(engine(built)).snapshot() == registry.Snapshot(built, True)


def test_an_engine_without_grains_has_none():
    assert Registry.of(engine(None)) is None
    share(engine(None, 2, -1))


def test_kill_switch_at_start(catalogue, monkeypatch):
    for value, enabled in {"1": False, "0": True, "": True}.items():
        monkeypatch.setenv(DISABLE, value)
        assert Registry.of(engine(catalogue())).snapshot().enabled is enabled
    monkeypatch.setenv(DISABLE, "yes")
    with pytest.raises(GrainsConfigError, match="GRAINS_DISABLE: 'yes' is not one of 0, 1"):
        Registry.of(engine(catalogue()))


def test_several_front_ends_see_a_change_at_once(shared):
    one, other = (Registry.of(engine(shared, 2, rank)) for rank in range(2))
    assert one.snapshot() == other.snapshot() == registry.Snapshot(shared, True)
    assert one.snapshot() is one.snapshot()  # not read again
    one.publish(without(shared, "polite"))
    assert set(other.snapshot().catalogue.vectors) == {"truthful"}
    other.set_enabled(False)
    assert not one.snapshot().enabled
    assert set(one.snapshot().catalogue.vectors) == {"truthful"}


def test_two_changes_within_one_tick_of_the_clock(shared, monkeypatch):
    one, other = (Registry.of(engine(shared, 2, rank)) for rank in range(2))
    now = time.time_ns()
    monkeypatch.setattr(registry.time, "time_ns", lambda: now)
    for enabled in (False, True, False, True):
        one.set_enabled(enabled)
        assert other.snapshot().enabled is enabled


def _switch(folder, catalogue, times):
    os.environ[STATE] = folder
    front_end = Registry.of(engine(catalogue, 2, 1))
    for turn in range(times):
        front_end.set_enabled(turn % 2 == 1)
    front_end.set_enabled(False)


def test_processes_lose_no_change_of_another(shared):
    times = 200
    process = multiprocessing.get_context("spawn").Process(
        target=_switch, args=(os.environ[STATE], shared, times)
    )
    process.start()
    front_end, turns = Registry.of(engine(shared, 2, 0)), 0
    while process.is_alive():
        front_end.publish((without(shared, "polite"), shared)[turns % 2])
        turns += 1
    process.join()
    front_end.publish(without(shared, "truthful"))
    assert process.exitcode == 0
    assert turns > times
    assert not front_end.snapshot().enabled
    assert set(front_end.snapshot().catalogue.vectors) == {"polite"}


def test_one_change_at_a_time(shared):
    one, other = (Registry.of(engine(shared, 2, rank)) for rank in range(2))
    order = []

    async def change(front_end, name):
        async with front_end.changing():
            order.append(f"{name} begins")
            await asyncio.sleep(0.1)
            order.append(f"{name} ends")

    async def both():
        first = asyncio.create_task(change(one, "first"))
        await asyncio.sleep(0.02)
        given_up = asyncio.create_task(change(other, "given up"))
        await asyncio.sleep(0.04)
        given_up.cancel()
        other.set_enabled(False)  # The kill switch does not wait.
        assert order == ["first begins"]
        await change(other, "second")
        await first
        await change(one, "third")

    asyncio.run(asyncio.wait_for(both(), 30))
    assert order == [
        f"{name} {what}" for name in ("first", "second", "third") for what in ("begins", "ends")
    ]


@pytest.mark.parametrize("servers", [1, 2])
def test_no_wait_is_without_limit(shared, monkeypatch, servers):
    monkeypatch.setattr(registry, "TURN_PATIENCE_S", 0.05)
    monkeypatch.setattr(registry, "_LOCK_PATIENCE_S", 0.05)
    front_end = Registry.of(engine(shared, servers, 0))

    async def twice():
        async with front_end.changing(), front_end.changing():
            pass

    with pytest.raises(TimeoutError, match="other changes have been under way"):
        asyncio.run(asyncio.wait_for(twice(), 30))
    with (Path(os.environ[STATE]) / "write.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a process that has been stopped would
        if servers > 1:
            with pytest.raises(TimeoutError, match=r"write\.lock is held"):
                front_end.set_enabled(False)
    assert front_end.snapshot().enabled
    front_end.set_enabled(False)
    assert not front_end.snapshot().enabled


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"catalogue": 1, "enabled": true}'])
def test_a_shared_file_that_is_none(catalogue, monkeypatch, tmp_path, content):
    monkeypatch.setenv(STATE, str(tmp_path))
    if content is not None:
        (tmp_path / "state.json").write_text(content)
    with pytest.raises(GrainsConfigError, match=f"--api-server-count: .*{STATE}"):
        Registry.of(engine(catalogue(), 2, 0))


def test_api_servers_that_nobody_gave_a_file(catalogue, monkeypatch):
    monkeypatch.delenv(STATE, raising=False)
    with pytest.raises(GrainsConfigError, match="--api-server-count"):
        Registry.of(engine(catalogue(), 2, 0))


LAUNCHER = """
import json, os, sys
from types import SimpleNamespace
from grains_vllm.registry import STATE, share

for _ in range(2):
    share(SimpleNamespace(
        additional_config={"grains": json.loads(sys.argv[1])},
        parallel_config=SimpleNamespace(_api_process_count=2, _api_process_rank=-1),
    ))
    print(os.environ[STATE])
child = os.fork()
if child == 0:
    sys.exit()
os.waitpid(child, 0)
print(oct(os.stat(os.environ[STATE]).st_mode), flush=True)
sys.exit(3)
"""


def test_folder_is_private_and_goes_with_the_process_that_made_it(catalogue):
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, json.dumps(catalogue().to_json())],
        capture_output=True,
        text=True,
        env={**os.environ, STATE: ""},
    )
    first, second, mode = done.stdout.split()
    assert done.returncode == 3, done.stderr
    assert first != second
    assert int(mode, 8) == stat.S_IFDIR | 0o700
    assert not Path(first).exists()
    assert not Path(second).exists()
