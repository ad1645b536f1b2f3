"""F and its pieces, against the ordinary forward written out."""

from dataclasses import replace

import pytest
import torch

from offline.model import check_leaf
from offline.objective import (
    Row,
    contrast,
    logits_at,
    may_pack,
    mixes_without_mask,
    response_logps,
    rows_of,
)
from offline.options import Objective
from tests.offline.worlds import (
    ARCHITECTURES,
    RECURRENT,
    build_decoder,
    build_tokenizer,
    token_pairs,
)


def plain_logps(decoder, prompt_ids, response_ids):
    ids = torch.tensor([prompt_ids + response_ids])
    with torch.no_grad():
        logps = decoder.model(input_ids=ids).logits[0].log_softmax(-1)
    start = len(prompt_ids)
    # Logits at position t score token t + 1.
    return torch.stack([logps[start + n - 1, token] for n, token in enumerate(response_ids)])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return token_pairs(6, build_tokenizer(), tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_layouts_equal_the_ordinary_forward(architecture, pairs):
    decoder = build_decoder(architecture)
    check_leaf(decoder, pairs[0].prompt_ids)
    prompts = [decoder.embed(pair.prompt_ids) for pair in pairs]
    packs = [may_pack(decoder, pair) for pair in pairs]
    # A window of 4 tokens binds in every example here; everything else packs.
    assert packs == [architecture != "mistral-window"] * len(pairs)
    for objective in Objective:
        expected = []
        for pair in pairs:
            plus = plain_logps(decoder, pair.prompt_ids, pair.chosen_ids)
            minus = plain_logps(decoder, pair.prompt_ids, pair.rejected_ids)
            reduce = {
                Objective.mean: torch.mean,
                Objective.sum: torch.sum,
                Objective.first_token: lambda logps: logps[0],
            }[objective]
            expected.append(reduce(plus) - reduce(minus))
        for packed in {False, packs[0]}:
            values = contrast(decoder, pairs, prompts, packed, objective)
            torch.testing.assert_close(values, torch.stack(expected), rtol=1e-4, atol=2e-5)


def test_packed_gradients_equal_two_row_gradients(pairs):
    decoder = build_decoder("llama")
    gradients = []
    for packed in (False, True):
        prompts = [decoder.embed(pair.prompt_ids).requires_grad_() for pair in pairs]
        total = contrast(decoder, pairs, prompts, packed, Objective.mean).sum()
        gradients.append(torch.autograd.grad(total, prompts))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_packing_is_refused_when_numbers_disagree(pairs, monkeypatch):
    decoder = build_decoder("llama")
    assert may_pack(decoder, pairs[0])
    # Let y- see y+: what an attention implementation that drops the mask would do.
    monkeypatch.setattr(
        "offline.objective._additive_mask",
        lambda lengths, longest, decoder: torch.full(
            (1, longest, longest), torch.finfo(decoder.dtype).min, dtype=decoder.dtype
        ).triu(1),
    )
    assert not may_pack(decoder, pairs[0])


def test_a_leak_is_seen_in_answers_of_one_token(pairs, monkeypatch):
    """A layer that carries positions on, behind a mask that nobody has asked about."""
    short = [replace(pair, chosen_ids=pair.chosen_ids[:1], rejected_ids=pair.rejected_ids[:1])
             for pair in pairs]  # fmt: skip
    decoder = build_decoder("llama")
    assert all(may_pack(decoder, pair) for pair in short)

    def carry(_module, _args, output):
        return output + 1e-2 * output.cumsum(1)

    decoder.blocks[1].mlp.register_forward_hook(carry)
    assert not any(may_pack(decoder, pair) for pair in (*short, *pairs))
    # However little it is, and whatever the two layouts agree on.
    monkeypatch.setattr("offline.objective._PACKED_TOLERANCE", {torch.float32: 1e9})
    assert not any(may_pack(decoder, pair) for pair in (*short, *pairs))


@pytest.mark.parametrize("architecture", RECURRENT)
def test_layers_that_attention_masks_do_not_reach_are_never_packed(architecture, monkeypatch):
    decoder = build_decoder(architecture)
    monkeypatch.setattr("offline.objective._LEAK_TOLERANCE", {torch.float32: 1e9})
    monkeypatch.setattr("offline.objective._PACKED_TOLERANCE", {torch.float32: 1e9})
    assert mixes_without_mask(decoder)
    assert not mixes_without_mask(build_decoder("gemma3"))


def test_binding_windows_are_refused_whatever_the_numbers(pairs, monkeypatch):
    monkeypatch.setattr("offline.objective._PACKED_TOLERANCE", {torch.float32: 1e9})
    assert may_pack(build_decoder("llama"), pairs[0])
    decoder = build_decoder("mistral-window")
    assert not may_pack(decoder, pairs[0])
    decoder.model.config.sliding_window = pairs[0].length
    assert may_pack(decoder, pairs[0])


def test_rows_do_not_see_their_batch(pairs):
    decoder = build_decoder("llama")
    rows = [
        row
        for pair in pairs
        for packed in (True, False)
        for row in rows_of(pair, decoder.embed(pair.prompt_ids), packed)
    ]
    together = response_logps(decoder, rows)
    for row, batched in zip(rows, together, strict=True):
        alone = response_logps(decoder, [row])[0]
        torch.testing.assert_close(batched[: len(alone)], alone, rtol=1e-4, atol=2e-5)


def test_logits_at_is_undone_and_serves_models_without_a_head(pairs):
    decoder = build_decoder("gemma2")  # soft-caps its logits after the output embedding
    ids = torch.tensor([pairs[0].prompt_ids])
    with torch.no_grad():
        full = decoder.model(input_ids=ids).logits
        positions = torch.tensor([[2, 0]])
        with logits_at(decoder.model, positions) as select:
            picked = select(decoder.model(input_ids=ids).logits)
        assert torch.equal(decoder.model(input_ids=ids).logits, full)
        decoder.model.get_output_embeddings = lambda: None
        with logits_at(decoder.model, positions) as select:
            later = select(decoder.model(input_ids=ids).logits)
    torch.testing.assert_close(picked, full[:, [2, 0]])
    torch.testing.assert_close(later, full[:, [2, 0]])


def test_a_row_without_segments_is_the_prompt_alone():
    decoder = build_decoder("llama")
    row = Row(decoder.embed([1, 5, 6]), (((), 1),))
    assert response_logps(decoder, [row]).shape == (1, 0)
