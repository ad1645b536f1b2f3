"""The per-token buffers against a token-by-token recount, over random traces of batches."""

import random

import numpy as np
import torch

from grains_vllm.routing import Part, Routing


def buffers(routing):
    """Per token, the (slot, strength) of its steered parts."""
    return [
        sorted((slot, strength) for slot, strength in zip(*row, strict=True) if slot)
        for row in zip(routing.slot.tolist(), routing.strength.tolist(), strict=True)
    ]


def recount(batch, table, size):
    """What each token should get, one at a time."""
    tokens = []
    for req_id, scheduled, computed in batch:
        for position in range(computed, computed + scheduled):
            tokens.append(
                sorted(
                    (part.slot, part.strength)
                    for part in table.get(req_id, ())
                    if part.start <= position and (part.end is None or position < part.end)
                )
            )
    return tokens + [[]] * (size - len(tokens))


def fill(routing, batch):
    ids, scheduled, computed = zip(*batch, strict=True)
    routing.fill(list(ids), np.array(scheduled), np.array(computed))


def test_random_traces_of_chunks_finishes_and_preemptions():
    rng = random.Random(0)
    for _ in range(50):
        routing, table = Routing(256, 3, torch.device("cpu")), {}
        for step in range(30):
            if len(table) < 8 and rng.random() < 0.5:
                table[f"r{step}"] = tuple(
                    Part(
                        rng.randint(1, 5),
                        rng.choice([-1.5, 0.25, 3.0]),
                        start := rng.randint(0, 40),
                        rng.choice([None, start + rng.randint(0, 9), start + 40]),
                    )
                    for _ in range(rng.randint(1, 3))
                )
                routing.add(f"r{step}", table[f"r{step}"])
            if table and rng.random() < 0.2:
                gone = rng.choice(list(table))
                del table[gone]
                routing.discard(gone)
            ids = [*table, "plain1", "plain2"]
            rng.shuffle(ids)
            # Any computed count may come up again: that is what preemption looks like from here.
            batch = [(i, rng.randint(1, 20), rng.randint(0, 50)) for i in ids[: rng.randint(1, 6)]]
            fill(routing, batch)
            assert buffers(routing) == recount(batch, table, 256)


def test_the_tail_of_a_longer_batch_is_cleared():
    routing = Routing(64, 1, torch.device("cpu"))
    routing.add("a", [Part(1, 2.0, 0, None)])
    fill(routing, [("a", 40, 0)])
    fill(routing, [("a", 1, 40)])
    assert buffers(routing) == [[(1, 2.0)]] + [[]] * 63
    routing.discard("a")
    fill(routing, [("b", 5, 0)])
    assert not routing.slot.any() and not routing.strength.any()


def test_an_unchanged_batch_copies_nothing(monkeypatch):
    routing = Routing(64, 1, torch.device("cpu"))
    routing.add("a", [Part(1, 2.0, 0, None)])
    fill(routing, [("a", 1, 3)])
    version = routing.slot._version
    fill(routing, [("a", 1, 4)])
    assert routing.slot._version == version
    fill(routing, [("a", 2, 5)])
    assert routing.slot._version > version


def test_discarding_a_stranger_is_harmless():
    Routing(8, 1, torch.device("cpu")).discard("never seen")
