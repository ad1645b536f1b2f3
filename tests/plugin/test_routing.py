"""The per-token buffers against a token-by-token recount, whatever a scheduler comes up with."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from grains_vllm.routing import Part, Routing
from tests.tally import print_tally

SIZE = 96  # tokens
TRIED = Counter()


@pytest.fixture(scope="module", autouse=True)
def tally(request):
    yield
    print_tally(request, TRIED)


def recount(batch, table, parts):
    """What each row of the buffers should hold, one token and one part at a time."""
    rows = []
    for req_id, scheduled, computed in batch:
        for position in range(computed, computed + scheduled):
            row = [(0, 0.0)] * parts
            for column, part in enumerate(table.get(req_id, ())):
                here = any(
                    start <= position and (end is None or position < end)
                    for start, end in part.spans
                )
                strength = float(np.float32(part.strength))
                if here and strength != 0:
                    row[column] = part.slot, strength
            rows.append(row)
    return rows + [[(0, 0.0)] * parts] * (SIZE - len(rows))


def rows_of(routing):
    pairs = zip(routing.slot.tolist(), routing.strength.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in pairs]


def steered(rows):
    return sum(any(strength for _, strength in row) for row in rows)


def routing_of(parts=1, **requests):
    routing = Routing(SIZE, parts, torch.device("cpu"))
    for req_id, mine in requests.items():
        routing.add(req_id, mine)
    return routing


def fill(routing, *batch):
    """Fills for requests given as (id, scheduled, computed)."""
    ids, scheduled, computed = (list(column) for column in zip(*batch, strict=True))
    routing.fill(ids, np.array(scheduled), np.array(computed), sum(scheduled))


# --- any trace -----------------------------------------------------------------------------------

_FAR = 10**10  # more than int32 holds
_WINDOW = st.builds(
    lambda start, length: [(start, None if length is None else start + length)],
    st.one_of(st.integers(0, 40), st.just(_FAR)),
    st.one_of(st.none(), st.integers(-9, 20), st.just(_FAR)),
)
# Text between images, or images between texts.
_KIND = st.builds(
    lambda edges, open_end: (
        [tuple(edges[number : number + 2]) for number in range(0, len(edges) - 1, 2)]
        + ([(edges[-1], None)] if len(edges) % 2 and open_end else [])
    ),
    st.lists(st.one_of(st.integers(0, 60), st.just(_FAR)), max_size=9, unique=True).map(sorted),
    st.booleans(),
)
_PART = st.builds(
    Part,
    st.integers(0, 4),
    st.sampled_from([-1.5, 0.25, 3.0, 1e-30, 0.0, -0.0, 1e-46]),
    st.one_of(_WINDOW, _KIND),
)
_EVERYWHERE = st.builds(
    Part, st.integers(0, 4), st.sampled_from([-1.5, 0.25]), st.just([(0, None)])
)
_NAMES = ["a", "b", "c", "d", "e", "f"]


class World:
    """A scheduler's view of its requests: where each stands, and in which order they are run."""

    def __init__(self, data, parts, part):
        self._data, self._parts, self._part = data, parts, part
        self.routing = Routing(SIZE, parts, torch.device("cpu"))
        self.table, self.computed, self.order = {}, {}, []
        self.dtype = self.draw(st.sampled_from(["int32", "int64"]), "dtype")

    def draw(self, strategy, label):
        return self._data.draw(strategy, label)

    def somebody(self):
        return self.draw(st.sampled_from(self.order), "who")

    def comes(self, name=None):
        name = name or next((name for name in _NAMES if name not in self.order), None)
        if name is None:
            return
        self.order.append(name)
        self.computed[name] = self.draw(st.sampled_from([0, 0, 7, 30]), "cached")
        parts = self.draw(st.lists(self._part, max_size=self._parts), "parts")
        if parts:
            self.table[name] = parts
            self.routing.add(name, parts)

    def goes(self, name):
        self.order.remove(name)
        self.table.pop(name, None)
        self.routing.discard(name)

    def run(self, counts):
        """One step; compares every row and every counter."""
        routing, batch = self.routing, [(n, c, self.computed[n]) for n, c in counts.items()]
        before, fills = steered(rows_of(routing)), routing.fills
        tokens = routing.steered_tokens
        # Equal ids are not always the same objects, and V1's list is the same object every time.
        ids = self.order if list(counts) == self.order else [f"{name} "[:-1] for name in counts]
        scheduled, computed = (np.array([x[i] for x in batch], self.dtype) for i in (1, 2))
        routing.fill(ids, scheduled, computed, sum(counts.values()))
        wanted = recount(batch, self.table, self._parts)
        assert rows_of(routing) == wanted
        assert routing.steered_tokens == tokens + steered(wanted)
        assert routing.fills == fills + bool(self.table or before)
        for name, count in counts.items():
            self.computed[name] += count
        TRIED["batches"] += 1

    def event(self, kind):
        if kind == "comes" or not self.order:
            self.comes()
        elif kind == "goes":
            self.goes(self.somebody())
        elif kind == "its id comes again":
            name = self.somebody()
            place = self.order.index(name)
            self.goes(name)
            self.comes(name)
            self.order.insert(place, self.order.pop())
        elif kind == "other order":
            self.order[:] = self.draw(st.permutations(self.order), "order")
        elif kind == "jump":  # preempted and resumed, drafts rejected, blocks lost
            self.computed[self.somebody()] = self.draw(st.integers(0, 60), "to")
        elif kind == "chunks":
            width = SIZE // len(self.order)
            self.run({n: self.draw(st.integers(1, width), "tokens") for n in self.order})
        elif kind == "some are skipped":
            chosen = self.draw(st.sets(st.sampled_from(self.order)), "who")
            self.run({name: 1 for name in self.order if name in chosen})
        elif kind == "uneven":  # as many tokens as requests
            first, last = self.order[0], self.order[-1]
            if first != last:
                self.run({**dict.fromkeys(self.order, 1), first: 0, last: 2})


_EVENTS = [
    *("comes", "goes", "its id comes again", "other order", "jump"),
    *("chunks", "some are skipped", "uneven"),
]


@settings(
    max_examples=400, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    data=st.data(),
    parts=st.integers(1, 3),
    part=st.sampled_from([_PART, _EVERYWHERE, st.one_of(_PART, _EVERYWHERE)]),
)
def test_every_token_of_every_batch_gets_its_own(data, parts, part):
    """Between any two events the batch decodes on, so that steps with nothing to do are met too."""
    world = World(data, parts, part)
    for _ in range(data.draw(st.integers(1, 4), "requests")):
        world.comes()
    for kind in data.draw(st.lists(st.sampled_from(_EVENTS), max_size=12), "events"):
        event(kind)
        world.event(kind)
        for _ in range(data.draw(st.integers(0, 6), "decodes")):
            world.run(dict.fromkeys(world.order, 1))


# --- particular cases ----------------------------------------------------------------------------


def test_the_tail_of_a_longer_batch_is_cleared():
    routing = routing_of(a=[Part(1, 2.0, [(0, None)])])
    fill(routing, ("a", 40, 0))
    fill(routing, ("a", 1, 40))
    assert rows_of(routing) == [[(1, 2.0)]] + [[(0, 0.0)]] * (SIZE - 1)
    routing.discard("a")
    fill(routing, ("b", 5, 0))
    assert not routing.slot.any() and not routing.strength.any()


def test_a_batch_of_nobody_clears_the_buffers():
    """Dummy tokens, as an idle rank computes them beside a busy one."""
    routing, nobody = routing_of(a=[Part(1, 2.0, [(0, None)])]), np.zeros(0, np.int64)
    fill(routing, ("a", 4, 0))
    for _ in range(2):
        routing.fill([], nobody, nobody, 0)
        assert not routing.slot.any() and not routing.strength.any()
    fill(routing, ("a", 1, 4))
    assert rows_of(routing)[:2] == [[(1, 2.0)], [(0, 0.0)]]


@pytest.mark.parametrize("start", [0, 3])
def test_an_unchanged_batch_copies_nothing(start):
    routing = routing_of(a=[Part(1, 2.0, [(start, None)])])
    fill(routing, ("a", 1, 3))
    version = routing.slot._version
    fill(routing, ("a", 1, 4))
    routing.add("elsewhere", [Part(0, 1.0, [(0, None)])])
    fill(routing, ("a", 1, 5))
    assert routing.slot._version == version
    fill(routing, ("a", 2, 6))
    assert routing.slot._version > version


@pytest.mark.parametrize(
    ("parts", "described"),
    [
        ({"a": [Part(0, 1.0, [(0, None)])]}, [0]),
        ({"a": [Part(0, 1.0, [(0, 120)]), Part(1, 1.0, [(7, None)])]}, [0, 7, 120]),
        ({"a": [Part(0, 1.0, [(50, 51)])], "b": [Part(1, 1.0, [(0, None)])]}, [0, 50, 51]),
        # Anew at each step until the last span but one has been passed.
        ({"a": [Part(0, 1.0, [(0, 2), (4, 5), (9, None)])]}, [0, 1, 2, 3, 4, 5, 9]),
    ],
)
def test_a_batch_that_decodes_on_is_described_anew_where_a_window_begins_or_ends(
    monkeypatch, parts, described
):
    found, refill = [], Routing._refill
    monkeypatch.setattr(
        Routing, "_refill", lambda self, *batch: (found.append(batch[2][0]), refill(self, *batch))
    )
    routing = routing_of(2, **parts)
    for position in range(200):
        fill(routing, ("a", 1, position), ("b", 1, position))
        batch = [("a", 1, position), ("b", 1, position)]
        assert rows_of(routing) == recount(batch, parts, 2)
    assert found == described
    assert routing.fills == 200 and routing.fill_seconds > 0


def test_nothing_is_counted_while_nobody_is_steered():
    routing = routing_of()
    fill(routing, ("a", 5, 0))
    assert (routing.fills, routing.steered_tokens, routing.fill_seconds) == (0, 0, 0.0)


def test_more_requests_than_ever_before():
    parts = {f"r{number}": [Part(number, 1.0 + number, [(0, None)])] for number in range(SIZE)}
    routing = routing_of(**parts)
    for gone in range(0, SIZE, 2):
        routing.discard(f"r{gone}")
        parts.pop(f"r{gone}")
    batch = [(f"r{number}", 1, 3) for number in range(SIZE)]
    fill(routing, *batch)
    assert len(routing) == SIZE // 2
    assert rows_of(routing) == recount(batch, parts, 1)


def test_what_cannot_be_is_an_error():
    routing = routing_of(a=[Part(1, 2.0, [(0, None)])])
    routing.discard("never seen")
    with pytest.raises(ValueError, match="num_tokens is 1, but 3 are scheduled"):
        routing.fill(["a"], np.array([3]), np.array([0]), 1)
    with pytest.raises(ValueError, match="negative"):
        routing.fill(["a"], np.array([-1]), np.array([0]), -1)
    with pytest.raises(RuntimeError, match="size"):
        fill(routing, ("a", SIZE + 1, 0))
    with pytest.raises(ValueError, match="shape"):
        routing.add("b", [Part(1, 2.0, [(0, None)])] * 2)
