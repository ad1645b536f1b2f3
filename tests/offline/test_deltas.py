"""Masking changes what it should and nothing else; deltas are differences of block outputs."""

import pytest
import torch

from offline.deltas import deltas, masked
from offline.errors import InputError
from offline.options import Read
from tests.offline.worlds import build_decoder, token_pairs


def streams(decoder, embeds, mask=None):
    """h_l at the last position by a forward of its own: [layers, hidden]."""
    with torch.no_grad():
        hidden = []
        handles = [
            block.register_forward_hook(
                lambda _m, _a, out: hidden.append(
                    (out[0] if isinstance(out, tuple) else out)[0, -1]
                )
            )
            for block in decoder.blocks
        ]
        attention = None if mask is None else mask[None]
        decoder.model(inputs_embeds=embeds[None], attention_mask=attention)
        for handle in handles:
            handle.remove()
    return torch.stack(hidden)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def decoder(request):
    return build_decoder(request.param)


@pytest.fixture(scope="module")
def pair(decoder, tmp_path_factory):
    return token_pairs(1, decoder.tokenizer, tmp_path_factory.mktemp("pairs"))[0]


def test_masking_replaces_exactly_the_chosen_positions():
    prompt = torch.randn(6, 4)
    before, replacement = prompt.clone(), torch.full((4,), 7.0)
    result = masked(prompt, [1, 4], replacement)
    assert torch.equal(prompt, before)
    assert (result[[1, 4]] == 7).all()
    assert torch.equal(result[[0, 2, 3, 5]], prompt[[0, 2, 3, 5]])


def test_deltas_at_the_prompts_end(decoder, pair):
    b = torch.full((decoder.fingerprint.hidden_size,), 0.1)
    result = deltas(decoder, pair, [1, 3], [2], b, Read.prompt_end)
    prompt = decoder.embed(pair.prompt_ids)
    whole = streams(decoder, prompt)
    for delta, positions in ((result.positive, [1, 3]), (result.negative, [2])):
        without = prompt.clone()
        without[positions] = b
        expected = whole - streams(decoder, without)
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.norms, whole.norm(dim=-1)[None], rtol=1e-4, atol=1e-5)


def test_deltas_at_the_responses_ends(decoder, pair):
    b = torch.zeros(decoder.fingerprint.hidden_size)
    result = deltas(decoder, pair, [1], [2, 3], b, Read.response_end)
    prompt = decoder.embed(pair.prompt_ids)
    cases = ((result.positive, pair.chosen_ids, [1]), (result.negative, pair.rejected_ids, [2, 3]))
    for row, (delta, ids, positions) in enumerate(cases):
        without = prompt.clone()
        without[positions] = b
        whole = streams(decoder, torch.cat([prompt, decoder.embed(ids)]))
        expected = whole - streams(decoder, torch.cat([without, decoder.embed(ids)]))
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.norms[row], whole.norm(dim=-1), rtol=1e-4, atol=1e-5)


def test_deltas_where_the_responses_words_are_chosen(decoder, pair):
    b = torch.zeros(decoder.fingerprint.hidden_size)
    result = deltas(decoder, pair, [1], [2, 3], b, Read.response_mean)
    prompt = decoder.embed(pair.prompt_ids)
    cases = ((result.positive, pair.chosen_ids, [1]), (result.negative, pair.rejected_ids, [2, 3]))
    for row, (delta, ids, positions) in enumerate(cases):
        without = prompt.clone()
        without[positions] = b
        # One forward per response token, of what stands before it.
        before = [decoder.embed(ids)[:count] for count in range(len(ids))]
        whole = torch.stack([streams(decoder, torch.cat([prompt, part])) for part in before])
        other = torch.stack([streams(decoder, torch.cat([without, part])) for part in before])
        torch.testing.assert_close(delta, (whole - other).mean(0), rtol=1e-4, atol=1e-5)
        norms = whole.norm(dim=-1).mean(0)
        torch.testing.assert_close(result.norms[row], norms, rtol=1e-4, atol=1e-5)


def test_attention_mask_hides_positions_instead(decoder, pair):
    result = deltas(decoder, pair, [1, 3], [2], None, Read.prompt_end)
    prompt = decoder.embed(pair.prompt_ids)
    mask = torch.ones(len(prompt), dtype=torch.long)
    mask[[1, 3]] = 0
    expected = streams(decoder, prompt) - streams(decoder, prompt, mask)
    torch.testing.assert_close(result.positive, expected, rtol=1e-4, atol=1e-5)
    assert result.positive.any()


def test_nan_block_outputs_are_refused(decoder, pair):
    b = torch.full((decoder.fingerprint.hidden_size,), torch.nan)
    with pytest.raises(InputError, match=r"line 1: a block output holds a NaN"):
        deltas(decoder, pair, [1], [2], b, Read.prompt_end)
