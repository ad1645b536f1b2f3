"""Scores against captum, against completeness, and against themselves batched otherwise."""

import pytest
import torch
from captum.attr import IntegratedGradients

from offline.attribution import Attributor
from offline.baselines import baseline_embedding, mask_embedding
from offline.batching import Room
from offline.errors import InputError
from offline.options import AttributionMethod, Baseline, ExtractOptions, Mask, Objective
from tests.offline.worlds import build_decoder, build_model, token_pairs


def plain_objective(decoder, pair, prompts, objective=Objective.mean):
    """F by ordinary forwards over all tokens, written without offline.objective."""
    values = []
    for ids in (pair.chosen_ids, pair.rejected_ids):
        response = decoder.embed(ids).expand(len(prompts), -1, -1)
        logits = decoder.model(inputs_embeds=torch.cat([prompts, response], 1)).logits
        start = prompts.shape[1]
        logps = logits[:, start - 1 : -1].log_softmax(-1)
        tokens = torch.tensor(ids)[None, :, None].expand(len(prompts), -1, 1)
        logps = logps.gather(2, tokens)[..., 0]
        values.append(logps.mean(1) if objective is Objective.mean else logps.sum(1))
    return values[0] - values[1]


def attribute(decoder, pairs, rows=16, **options):
    options = ExtractOptions(**options)
    baseline = baseline_embedding(decoder, options.baseline)
    return Attributor(decoder, options, baseline, Room(rows)).attribute(pairs)


@pytest.fixture(scope="module")
def llama():
    return build_decoder("llama")


@pytest.fixture(scope="module")
def pairs(llama, tmp_path_factory):
    return token_pairs(5, llama.tokenizer, tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mistral-window"])
def test_integrated_gradients_equal_captum(architecture, pairs):
    decoder = build_decoder(architecture)
    baseline = baseline_embedding(decoder, Baseline.mean)
    for objective in (Objective.mean, Objective.sum):
        results = attribute(decoder, pairs, ig_points=24, objective=objective)
        for pair, ours in zip(pairs, results, strict=True):

            def forward(prompts, pair=pair, objective=objective):
                return plain_objective(decoder, pair, prompts, objective)

            prompt = decoder.embed(pair.prompt_ids)[None]
            theirs = (
                IntegratedGradients(forward)
                .attribute(
                    prompt,
                    baseline.expand_as(prompt).contiguous(),
                    n_steps=24,
                    method="gausslegendre",
                )[0]
                .sum(1)
            )
            difference = (ours.scores - theirs).abs().max() / theirs.abs().max()
            assert difference < 1e-4
            assert ours.f_input == pytest.approx(float(forward(prompt)), abs=2e-5)


def test_scores_add_up_and_points_grow_until_they_do(llama, pairs):
    for result in attribute(llama, pairs, ig_tolerance=1e-3):
        change = result.f_input - result.f_baseline
        assert float(result.scores.sum()) == pytest.approx(change, rel=1.1e-3)
        assert result.gap == pytest.approx(abs(float(result.scores.sum()) / change - 1), rel=1e-6)
        assert result.points in (32, 65, 128, 257)


def test_zero_baseline_goes_to_the_limit_and_reports_its_gap(llama, pairs):
    results = attribute(llama, pairs, baseline=Baseline.zero, ig_tolerance=1e-6, ig_max_points=100)
    assert {result.points for result in results} == {65}
    assert all(result.gap > 1e-6 for result in results)
    assert {result.points for result in attribute(llama, pairs, ig_max_points=8)} == {8}


def test_batching_changes_nothing(llama, pairs):
    together = attribute(llama, pairs, rows=7, ig_tolerance=1e-3)
    for pair, batched in zip(pairs, together, strict=True):
        (alone,) = attribute(llama, [pair], rows=1, ig_tolerance=1e-3)
        assert alone.points == batched.points
        torch.testing.assert_close(alone.scores, batched.scores, rtol=1e-4, atol=1e-6)


def test_packed_scores_equal_two_row_scores(llama, pairs, monkeypatch):
    packed = attribute(llama, pairs, ig_points=16)
    monkeypatch.setattr("offline.attribution.may_pack", lambda decoder, pair: False)
    apart = attribute(llama, pairs, ig_points=16)
    assert all(result.packed for result in packed) and not any(r.packed for r in apart)
    for one, two in zip(packed, apart, strict=True):
        torch.testing.assert_close(one.scores, two.scores, rtol=1e-4, atol=1e-6)


def test_every_example_is_tried_before_it_is_packed(llama, pairs, monkeypatch):
    monkeypatch.setattr("offline.attribution.may_pack", lambda decoder, pair: pair.length % 2 == 0)
    for order in (pairs, pairs[::-1]):
        results = attribute(llama, order, ig_points=2)
        assert [result.packed for result in results] == [pair.length % 2 == 0 for pair in order]


def test_gradient_x_input(llama, pairs):
    results = attribute(llama, pairs, attribution=AttributionMethod.gradient_x_input)
    for pair, result in zip(pairs, results, strict=True):
        prompt = llama.embed(pair.prompt_ids)[None].requires_grad_()
        (gradient,) = torch.autograd.grad(plain_objective(llama, pair, prompt).sum(), prompt)
        expected = (gradient * prompt)[0].sum(1).double()
        torch.testing.assert_close(result.scores, expected.detach(), rtol=1e-4, atol=1e-6)
        assert result.gap is None and result.points == 1


def test_smoothgrad_with_hardly_any_noise_is_gradient_x_input(llama, pairs):
    plain = attribute(llama, pairs, attribution=AttributionMethod.gradient_x_input)
    options = {"attribution": AttributionMethod.smoothgrad, "smoothgrad_samples": 4}
    quiet = attribute(llama, pairs, smoothgrad_noise=1e-6, **options)
    loud = attribute(llama, pairs, smoothgrad_noise=0.2, **options)
    for one, two, three in zip(plain, quiet, loud, strict=True):
        torch.testing.assert_close(one.scores, two.scores, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(one.scores, three.scores, rtol=1e-2)
        assert two.points == 4


@pytest.mark.parametrize("method", ["random", "smoothgrad"])
def test_drawn_scores_depend_on_seed_and_example_not_on_order(llama, pairs, method):
    options = {"attribution": AttributionMethod(method), "smoothgrad_samples": 3}
    forwards, backwards = (attribute(llama, group, **options) for group in (pairs, pairs[::-1]))
    for one, two in zip(forwards, backwards[::-1], strict=True):
        torch.testing.assert_close(one.scores, two.scores, rtol=1e-4, atol=1e-6)
    if method == "random":
        shared = min(len(pair.prompt_ids) for pair in pairs)
        assert len({float(result.scores[:shared].sum()) for result in forwards}) == len(pairs)
    other = attribute(llama, pairs, seed=1, **options)
    assert not torch.allclose(forwards[0].scores, other[0].scores, rtol=1e-3)


def test_out_of_memory_halves_the_batch_and_goes_on(llama, pairs, monkeypatch):
    expected = attribute(llama, pairs, ig_points=8)
    real, sizes = torch.autograd.grad, []

    def grad(output, leaves):
        sizes.append(len(leaves))
        if len(leaves) > 3:
            raise torch.OutOfMemoryError("pretend")
        return real(output, leaves)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    results = attribute(llama, pairs, ig_points=8, rows=16)
    assert sizes[:4] == [16, 8, 4, 2]
    for one, two in zip(results, expected, strict=True):
        torch.testing.assert_close(one.scores, two.scores, rtol=1e-4, atol=1e-6)


def test_a_single_row_too_large_is_not_tried_for_ever(llama, pairs, monkeypatch):
    def grad(output, leaves):
        raise torch.OutOfMemoryError("pretend")

    monkeypatch.setattr(torch.autograd, "grad", grad)
    with pytest.raises(torch.OutOfMemoryError):
        attribute(llama, pairs, ig_points=8)


def test_nan_gradients_are_refused(llama, pairs, monkeypatch):
    monkeypatch.setattr(
        torch.autograd, "grad", lambda _o, leaves: [torch.full_like(x, torch.nan) for x in leaves]
    )
    with pytest.raises(InputError, match=r"pairs.jsonl, line 1: the gradient holds a NaN"):
        attribute(llama, pairs, ig_points=8)


def test_baselines():
    decoder = build_decoder("gemma3")  # scales inside its embedding layer
    model = build_model("gemma3")
    ids = torch.arange(len(decoder.tokenizer))
    expected = model.get_input_embeddings()(ids).mean(0)
    torch.testing.assert_close(baseline_embedding(decoder, Baseline.mean), expected)
    assert not baseline_embedding(decoder, Baseline.zero).any()
    pad, mask = decoder.embed([0, 4]).float()
    assert torch.equal(baseline_embedding(decoder, Baseline.pad), pad)
    some = torch.ones(3)
    assert torch.equal(mask_embedding(decoder, Mask.mask_token, some), mask)
    assert torch.equal(mask_embedding(decoder, Mask.pad, some), pad)
    assert mask_embedding(decoder, Mask.baseline, some) is some
    assert mask_embedding(decoder, Mask.attention, some) is None
    decoder.tokenizer.mask_token = None
    with pytest.raises(InputError, match=r"--mask mask-token: the tokenizer .* has no mask_token"):
        mask_embedding(decoder, Mask.mask_token, some)


def test_mean_baseline_leaves_out_rows_beyond_the_vocabulary():
    decoder = build_decoder("llama")
    expected = baseline_embedding(decoder, Baseline.mean)
    decoder.model.resize_token_embeddings(200, mean_resizing=False)
    decoder.model.get_input_embeddings().weight.data[100:] = 1000.0
    torch.testing.assert_close(baseline_embedding(decoder, Baseline.mean), expected)
