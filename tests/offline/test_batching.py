"""What one forward holds: how many rows, what is kept of them, and what happens when it is full."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from offline.attribution import Attributor
from offline.baselines import baseline_embedding
from offline.batching import ROWS, TOKENS, Room, out_of_memory
from offline.blocks import recomputed
from offline.deltas import read_streams
from offline.objective import contrast
from offline.options import Baseline, ExtractOptions, Objective, Read
from tests.offline.worlds import build_decoder, token_pairs

ROOT = Path(__file__).parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def llama():
    return build_decoder("llama")


@pytest.fixture(scope="module")
def pairs(llama, tmp_path_factory):
    return token_pairs(3, llama.tokenizer, tmp_path_factory.mktemp("pairs"))


def attribute(decoder, pairs, room, **options):
    options = ExtractOptions(**{"ig_points": 8, **options})
    baseline = baseline_embedding(decoder, Baseline.mean)
    return Attributor(decoder, options, baseline, room).attribute(pairs)


@pytest.mark.parametrize(
    ("lengths", "rows_each", "expected"),
    [
        ([10] * 20, 1, ROWS),
        ([10] * 20, 2, ROWS // 2),
        ([TOKENS // ROWS] * 20, 1, ROWS),
        ([TOKENS // ROWS + 1] * 20, 1, ROWS - 1),
        ([TOKENS // 2] * 20, 2, 1),
        ([10, 10, TOKENS // 3 + 1, 10], 1, 2),  # padded to the longest, three would be too many
        ([TOKENS * 3, 10], 1, 1),
    ],
)
def test_rows_by_length(lengths, rows_each, expected):
    room = Room()
    assert room.fit(lengths, rows_each) == expected
    assert expected == 1 or expected * rows_each * max(lengths[:expected]) <= TOKENS
    assert Room(rows=16).fit(lengths, rows_each) == 16 // rows_each


def test_rooms_shrink_and_then_keep_less():
    for room in (Room(), Room(rows=8)):
        notes = []
        room.on_note = notes.append
        sizes = [room.fit([100] * 20, 1)]
        while sizes[-1] > 1:
            assert room.shrink(sizes[-1], 1, 100, GPU)
            sizes.append(room.fit([100] * 20, 1))
        assert sizes == [8, 4, 2, 1]
        assert not room.recomputes(100, GPU)
        assert room.shrink(1, 1, 100, GPU) and room.recomputes(100, GPU)
        assert not room.shrink(1, 1, 100, GPU)
        assert notes[0] == (
            "too little memory for 8 x 100 tokens per forward; going on with half as many"
        )
        assert "computed twice" in notes[-1] and len(notes) == 4
    assert not Room(recompute=False).shrink(1, 1, 100, GPU)
    assert Room().recomputes(TOKENS + 1, CPU) and not Room().recomputes(TOKENS, CPU)
    assert not Room().recomputes(TOKENS + 1, GPU)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mistral-window"])
def test_recomputing_changes_no_score_and_keeps_less(architecture, pairs):
    decoder = build_decoder(architecture)
    plain = attribute(decoder, pairs, Room(recompute=False))
    again = attribute(decoder, pairs, Room(recompute=True))
    for one, two in zip(plain, again, strict=True):
        torch.testing.assert_close(one.scores, two.scores, rtol=1e-5, atol=1e-7)
    assert all("forward" not in vars(block) for block in decoder.blocks)

    def kept() -> int:
        sizes: dict[int, int] = {}

        def count(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(count, lambda tensor: tensor):
            prompt = decoder.embed(pairs[0].prompt_ids).requires_grad_()
            contrast(decoder, [pairs[0]], [prompt], False, Objective.mean)
        return sum(sizes.values())

    everything = kept()
    with recomputed(decoder.blocks):
        assert kept() < everything / 2


def test_a_prompt_that_is_cut_into_single_points_has_the_same_scores(llama, pairs, monkeypatch):
    whole = attribute(llama, pairs, Room(rows=64))
    sizes, real = [], torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda out, leaves: sizes.append(len(leaves)) or real(out, leaves)
    )
    cut = attribute(llama, pairs, Room(tokens=pairs[0].length))
    assert 1 in sizes and max(sizes) <= 2
    for one, two in zip(whole, cut, strict=True):
        torch.testing.assert_close(one.scores, two.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_one_point_that_does_not_fit_is_recomputed(llama, pairs, monkeypatch, error):
    expected = attribute(llama, pairs, Room())
    notes, real, inside = [], torch.autograd.grad, []

    def grad(output, leaves):
        twice = "forward" in vars(llama.blocks[0])
        inside.append((len(leaves), twice))
        if not twice:
            raise error
        return real(output, leaves)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    results = attribute(llama, pairs, Room(on_note=notes.append))
    assert [size for size, twice in inside if not twice] == [8, 4, 2, 1]
    assert len(notes) == 4 and "activations are computed twice" in notes[-1]
    for one, two in zip(results, expected, strict=True):
        torch.testing.assert_close(one.scores, two.scores, rtol=1e-4, atol=1e-6)
    with pytest.raises(type(error)):
        attribute(llama, pairs, Room(recompute=False))


def test_other_errors_are_not_taken_for_a_lack_of_memory(llama, pairs, monkeypatch):
    assert not out_of_memory(RuntimeError("shape mismatch"))

    def grad(output, leaves):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(torch.autograd, "grad", grad)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        attribute(llama, pairs, Room())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_reading_streams_computes_hardly_any_logits(architecture, pairs):
    decoder, seen = build_decoder(architecture), []
    head = decoder.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, _a, out: seen.append(tuple(out.shape[:2])))
    read_streams(decoder, pairs[0], Read.response_end)
    handle.remove()
    assert seen == [(2, 1)]


HOLES = """
import torch
from offline.batching import return_freed_memory

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024

if {fix}:
    return_freed_memory()
for _ in range(2):  # glibc learns from what is freed in the first turn
    tensors = [torch.ones(2**20) for _ in range(64)]  # 4 MiB each
    full = resident()
    tensors = tensors[::2]
print(full - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's heap")
def test_freed_tensors_between_others_go_back_to_the_system():
    freed = [
        int(subprocess.check_output([sys.executable, "-c", HOLES.format(fix=fix)], cwd=ROOT))
        for fix in (False, True)
    ]
    assert freed[1] > 100 > freed[0]
