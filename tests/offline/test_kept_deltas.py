"""Kept deltas give every direction and mode, bit for bit as runs of their own."""

import dataclasses
import itertools
import json

import pytest
import safetensors.torch
import torch

from offline import kept_deltas
from offline.errors import InputError
from offline.extract import extract
from offline.options import Direction, ExtractOptions, Mode
from offline.pairs import load_pairs
from tests.offline.worlds import build_decoder, rows, write_jsonl

COUNT = 11


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run whose selection leaves some examples without T- and one without T+."""
    folder = tmp_path_factory.mktemp("kept")
    data = load_pairs(str(write_jsonl(folder / "pairs.jsonl", rows(COUNT))))
    decoder = build_decoder("llama")

    def select(scores, eligible, k):
        if len(eligible) == lengths[0]:
            return [], [1]
        return [1, 2], [] if len(eligible) % 2 else [3]

    lengths = sorted({1 + len(pair.prompt.split()) for pair in data.pairs})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("offline.groups.select", select)
        made = {}
        for direction, mode in itertools.product(Direction, Mode):
            options = ExtractOptions(ig_points=2, direction=direction, mode=mode)
            kept = []
            made[direction, mode] = extract(decoder, data, options, on_deltas=kept.append)
    first = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("offline.groups.select", select)
        extract(decoder, data, ExtractOptions(ig_points=2), on_deltas=first.append)
    return folder, first[0], made


def test_every_direction_and_mode_equals_a_run_of_its_own(world):
    folder, kept, made = world
    path = folder / "deltas.safetensors"
    kept.save(path)
    again = kept_deltas.load(path)
    used = {}
    for (direction, mode), (vector, _) in made.items():
        other = again.vector(direction, mode)
        assert other.digest == vector.digest
        facts = json.loads(json.dumps(vector.passport))
        assert json.loads(json.dumps(other.passport)) == facts
        used[mode] = facts["examples_used"]
    assert 2 <= used[Mode.contrast] < used[Mode.positive] < COUNT
    assert len({vector.digest for vector, _ in made.values()}) == 6
    own = made[Direction.mean, Mode.contrast][0]
    assert again.vector_digest == own.digest
    assert str(folder) not in path.read_bytes().decode("latin-1")


def test_the_deltas_are_those_behind_the_vector(world):
    _, kept, made = world
    vector, records = made[Direction.mean, Mode.contrast]
    with_both = [row for row, has in enumerate(kept.has_negative.tolist()) if has]
    difference = (kept.positive - kept.negative)[with_both].mean(0)
    torch.testing.assert_close(vector.directions, difference / difference.norm(dim=1, keepdim=True))
    used = [index for index, record in enumerate(records) if record["used"]]
    assert kept.examples[with_both].tolist() == used
    assert all(record["vector_digest"] == vector.digest for record in records)


def test_the_runs_seed_draws_the_halves(world):
    _, kept, _ = world
    stability = []
    for seed in (0, 1):
        options = {**kept.passport["options"], "seed": seed}
        other = dataclasses.replace(kept, passport={**kept.passport, "options": options})
        layers = other.vector(Direction.mean, Mode.positive).passport["layers"]
        stability.append([layer["stability"] for layer in layers])
    assert stability[0] != stability[1]


def damaged(path, folder, change=None, **facts):
    """A copy of the file with other tensors or other metadata."""
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = json.loads(file.metadata()["grains-deltas"])
    if change is not None:
        change(tensors)
    metadata |= facts
    text = json.dumps(metadata)
    copy = folder / "copy.safetensors"
    safetensors.torch.save_file(tensors, copy, metadata={"grains-deltas": text})
    return copy


BAD = [
    ({"change": lambda t: t.pop("norms")}, r"holds the tensors .* expected"),
    ({"change": lambda t: t.update(extra=torch.zeros(1))}, r"holds the tensors"),
    ({"change": lambda t: t.update(positive=t["positive"][:, :2].clone())}, "positive is torch.f"),
    ({"change": lambda t: t.update(norms=t["norms"].double())}, "norms is torch.float64"),
    ({"change": lambda t: t["negative"].fill_(float("nan"))}, "negative holds a NaN"),
    ({"change": lambda t: t["examples"].fill_(0)}, "expected different numbers below 11"),
    ({"version": 2}, "version is 2, this release reads 1"),
    ({"model": {"hidden_size": 32}}, "model is .* expected an object"),
    ({"passport": {}}, "passport.options is missing"),
    ({"vector_digest": 3}, "vector_digest is missing"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_damaged_files_are_refused(world, tmp_path, changes, message):
    _, kept, _ = world
    kept.save(tmp_path / "deltas.safetensors")
    with pytest.raises(InputError, match=r"^copy\.safetensors: .*" + message):
        kept_deltas.load(damaged(tmp_path / "deltas.safetensors", tmp_path, **changes))


def test_other_files_are_refused(world, tmp_path):
    _, _, made = world
    vector = made[Direction.mean, Mode.contrast][0]
    vector.save(tmp_path / "v.safetensors")
    with pytest.raises(InputError, match="not a file of kept deltas"):
        kept_deltas.load(tmp_path / "v.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read as a safetensors file"):
        kept_deltas.load(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="no such file"):
        kept_deltas.load(tmp_path / "absent")
