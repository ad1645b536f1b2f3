"""Host store and device slots."""

import pytest
import torch

from grains_vllm.bank import GRACE, Bank, Store
from grains_vllm.catalogue import VectorEntry
from grains_vllm.errors import GrainsConfigError
from grains_vllm.vectors import ArtifactError
from tests.tiny import HIDDEN, REFERENCE_NORM, random_vector

MODEL = random_vector("llama", 0).model


@pytest.fixture
def entries(tmp_path):
    made = []
    for seed in range(4):
        vector = random_vector("llama", seed)
        vector.save(tmp_path / f"{seed}.safetensors")
        made.append(
            VectorEntry(
                f"v{seed}", str(tmp_path / f"{seed}.safetensors"), vector.digest, 0.5, (1, 3)
            )
        )
    return made


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def term(entry, layers=(1, 3), scale="relative"):
    key = f"{entry.name} {layers} {scale}"
    return {"slot": key, "vector": entry.digest, "layers": list(layers), "scale": scale}


@pytest.fixture
def bank(entries):
    store = Store(MODEL, [0, 1, 3])
    store.replace(entries)
    return Bank(store, 2, HIDDEN, torch.device("cpu"))


def test_a_slot_holds_the_chosen_layers_and_gains(bank, entries):
    slot = bank.acquire(term(entries[2], layers=(3,)))
    other = bank.acquire(term(entries[1], scale="absolute"))
    assert {slot, other} == {0, 1}
    directions = random_vector("llama", 2).directions
    assert torch.equal(bank.directions[2, slot], directions[3])
    assert not bank.directions[:2, slot].any()
    assert bank.gains[:, slot].tolist() == [0, 0, REFERENCE_NORM]
    assert bank.gains[:, other].tolist() == [0, 1, 1]


def test_the_device_holds_the_vectors_and_nothing_else(entries):
    store = Store(MODEL, [0, 1, 3])
    store.replace(entries)
    bank = Bank(store, len(entries), HIDDEN, torch.device("cpu"))
    for entry in entries:
        bank.acquire(term(entry))
    vectors, layers, float32 = len(entries), 3, 4
    assert bank.slots == bank.resident == vectors
    assert bank.directions.nbytes == vectors * layers * HIDDEN * float32
    assert bank.num_bytes == bank.directions.nbytes + vectors * layers * float32


def test_the_least_recently_used_free_slot_is_given_away(bank, entries):
    a, b, c, d = (term(entry) for entry in entries)
    first = bank.acquire(a)
    bank.acquire(b)
    with pytest.raises(RuntimeError, match="all 2 slots are in use"):
        bank.acquire(c)
    bank.release(a["slot"])
    assert bank.acquire(a) == first and bank.evictions == 0 and bank.loads == 2
    bank.release(a["slot"])
    bank.release(b["slot"])
    bank.acquire(a)  # now the more recently used
    bank.release(a["slot"])
    assert bank.acquire(c) != first
    assert (bank.in_use, bank.resident, bank.evictions, bank.loads) == (1, 2, 1, 3)
    assert bank.acquire(d) == first
    assert torch.equal(bank.directions[1, first], random_vector("llama", 3).directions[1])


def test_two_users_of_one_slot_both_have_to_leave(bank, entries):
    a, b, c, _ = (term(entry) for entry in entries)
    slot = bank.acquire(a)
    assert bank.acquire(a) == slot
    bank.acquire(b)
    bank.release(a["slot"])
    with pytest.raises(RuntimeError):
        bank.acquire(c)
    bank.release(a["slot"])
    assert bank.acquire(c) == slot


def test_retired_vectors_stay_while_needed_and_for_a_while(entries):
    clock = Clock()
    store = Store(MODEL, [1], clock)
    store.replace(entries[:2])
    store.replace(entries[1:2])
    assert entries[0].digest in store
    clock.now = GRACE + 1
    store.replace(entries[1:2], keep=[entries[0].digest])
    assert entries[0].digest in store
    store.replace(entries[1:2])
    assert entries[0].digest not in store and store.digests == [entries[1].digest]
    store.replace(entries[:1])
    clock.now = 2 * GRACE + 5
    store.replace(entries[1:2])
    assert entries[0].digest in store  # it has come back, and is retired anew


def test_files_are_read_once_and_a_bad_one_changes_nothing(entries, tmp_path):
    store = Store(MODEL, [1])
    store.replace(entries[:2])
    (tmp_path / "0.safetensors").unlink()
    (tmp_path / "2.safetensors").write_bytes(b"half a file")
    store.replace(entries[:2])
    with pytest.raises(ArtifactError, match=r"2\.safetensors: cannot be read"):
        store.replace(entries[1:])
    assert store.digests == sorted(entry.digest for entry in entries[:2])
    random_vector("llama", 9).save(tmp_path / "3.safetensors")
    with pytest.raises(GrainsConfigError, match="is not the file that was checked"):
        store.replace(entries[3:])
