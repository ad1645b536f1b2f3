"""The rival estimators against plain forwards and textbook formulas in NumPy."""

import numpy as np
import pytest
import torch

from offline.contrastive import contrastive_directions, random_directions, raw_directions
from offline.errors import InputError
from offline.extract import extract
from offline.options import ExtractOptions, Method, Read
from offline.pairs import Pair, PairSet, load_pairs
from offline.prompts import tokenise
from tests.offline.worlds import build_decoder, rows, write_jsonl

COUNT = 11


@pytest.fixture(scope="module")
def decoder():
    return build_decoder("llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return load_pairs(str(write_jsonl(folder / "pairs.jsonl", rows(COUNT))))


@pytest.fixture(scope="module")
def streams(decoder, data):
    """h_l after each prefix of prompt + response: {read: (h+, h-)}, each [N, layers, hidden]."""
    found = {read: ([], []) for read in Read}
    for pair in data.pairs:
        tokens = tokenise(pair, decoder.tokenizer)
        for side, response in enumerate((tokens.chosen_ids, tokens.rejected_ids)):
            ids = torch.tensor([tokens.prompt_ids + response])
            hidden = []
            handles = [
                block.register_forward_hook(
                    lambda _m, _a, out, to=hidden: to.append(
                        out[0] if not isinstance(out, tuple) else out[0][0]
                    )
                )
                for block in decoder.blocks
            ]
            with torch.no_grad():
                decoder.model(input_ids=ids)
            for handle in handles:
                handle.remove()
            stack, prompt = torch.stack(hidden), len(tokens.prompt_ids)
            found[Read.prompt_end][side].append(stack[:, prompt - 1])
            found[Read.response_start][side].append(stack[:, prompt])
            found[Read.response_end][side].append(stack[:, -1])
            found[Read.response_mean][side].append(stack[:, prompt - 1 : -1].mean(1))
    return {read: tuple(torch.stack(part) for part in both) for read, both in found.items()}


def normalised(rows):
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("read", [None, Read.response_start, Read.response_mean])
def test_caa_is_the_mean_difference_of_the_responses(decoder, data, streams, read):
    vector, records = extract(decoder, data, ExtractOptions(method=Method.caa, read=read))
    plus, minus = streams[read or Read.response_end]
    raw = (plus - minus).mean(0)
    torch.testing.assert_close(vector.directions, normalised(raw), rtol=1e-3, atol=1e-5)
    if read is not Read.response_mean:  # There it is the mean of norms, not the norm of means.
        norms = torch.cat([plus, minus]).norm(dim=-1).quantile(0.5, dim=0)
        torch.testing.assert_close(vector.reference_norms, norms, rtol=1e-4, atol=1e-5)
    passport = vector.passport
    assert passport["method"] == "caa" and passport["examples_used"] == COUNT
    assert (
        passport["options"]["read"] == (read or "response-end") and "k" not in passport["options"]
    )
    for layer, report in enumerate(passport["layers"]):
        assert report["raw_norm"] == pytest.approx(float(raw[layer].norm()), rel=1e-4)
        assert report["mean_norm"] == pytest.approx(report["raw_norm"])
        assert report["cosine"] is None and -1 <= report["stability"] <= 1
    assert all(record["used"] and "scores" not in record for record in records)


def test_swapped_labels_give_the_opposite_vector(decoder, data):
    options = ExtractOptions(method=Method.caa)
    vector, _ = extract(decoder, data, options)
    other, _ = extract(decoder, data.swapped(), options)
    torch.testing.assert_close(other.directions, -vector.directions, rtol=1e-4, atol=1e-6)
    assert other.passport["data"]["swapped"] is True and "swapped" not in vector.passport["data"]
    assert data.swapped().swapped().pairs == data.pairs


def differences(seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(1, 3, 6, dtype=torch.float64)
    return torch.randn(9, 2, 6, generator=generator, dtype=torch.float64) * spread + 0.4


def top_eigenvector(matrix):
    return np.linalg.eigh(matrix)[1][:, -1]


@pytest.mark.parametrize("method", ["grains", "random", "mean", None])
def test_other_methods_are_refused(method):
    with pytest.raises(InputError, match=f"the method is {method}, expected caa, pca-diff or icv"):
        raw_directions(differences(), method)


def test_pca_diff_is_the_top_eigenvector_of_the_second_moments(decoder, data, streams):
    given = differences()
    raw = raw_directions(given, Method.pca_diff).numpy()
    for layer in range(2):
        d = given[:, layer].numpy()
        expected = top_eigenvector(d.T @ d)
        expected *= np.sign(expected @ d.mean(0))
        np.testing.assert_allclose(raw[layer], expected, atol=1e-8)
        # RepE flips every other difference before it centres: nearly the same.
        assert raw[layer] @ d.mean(0) > 0
    assert torch.equal(
        raw_directions(-given, Method.pca_diff), -raw_directions(given, Method.pca_diff)
    )
    vector, _ = extract(decoder, data, ExtractOptions(method=Method.pca_diff))
    plus, minus = streams[Read.response_end]
    expected = raw_directions(plus - minus, Method.pca_diff).float()
    torch.testing.assert_close(vector.directions, expected, rtol=1e-3, atol=1e-4)


def test_icv_is_one_component_over_all_layers_plus_the_mean(decoder, data):
    given = differences(1)
    raw = raw_directions(given, Method.icv).numpy()
    long = given.reshape(9, 12).numpy()
    centred = long - long.mean(0)
    component = top_eigenvector(centred.T @ centred)
    component *= np.sign(component @ long.mean(0))
    np.testing.assert_allclose(raw.ravel(), component + long.mean(0), atol=1e-8)
    zero = torch.zeros_like(given)
    vectors, _, reports = contrastive_directions(given, zero, torch.ones(18, 2), Method.icv, 0)
    np.testing.assert_allclose(
        vectors.numpy(), raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6
    )
    norms = [report.raw_norm for report in reports]
    np.testing.assert_allclose(norms, np.linalg.norm(raw, axis=1))
    vector, _ = extract(decoder, data, ExtractOptions(method=Method.icv))
    assert vector.passport["method"] == "icv" and vector.layers == [0, 1, 2]


def test_random_directions_come_from_the_seed_alone(decoder, data, streams):
    vector, _ = extract(decoder, data, ExtractOptions(method=Method.random, seed=3))
    same, _ = extract(decoder, data, ExtractOptions(method=Method.random, seed=3))
    other, _ = extract(decoder, data, ExtractOptions(method=Method.random, seed=4))
    assert vector.digest == same.digest != other.digest
    assert torch.equal(vector.reference_norms, other.reference_norms)
    norms = streams[Read.prompt_end][0].norm(dim=-1).quantile(0.5, dim=0)
    torch.testing.assert_close(vector.reference_norms, norms, rtol=1e-4, atol=1e-5)
    assert all(
        report["stability"] is report["mean_norm"] is None and report["raw_norm"] > 0
        for report in vector.passport["layers"]
    )
    # Gaussian: no axis is preferred, and layers differ.
    rows, _, _ = random_directions(torch.ones(1, 400), 64, 0)
    assert (rows.square().mean(0) * 64 - 1).abs().max() < 0.35
    assert (rows @ rows.T - torch.eye(400)).abs().max() < 0.6


def test_responses_that_do_not_differ_where_they_are_read_are_refused(decoder):
    pairs = [Pair(str(n), "x", "w3 w4", "w1 w5", f"w1 w{6 + n}") for n in range(2)]
    data = PairSet("same start", "", 2, pairs)
    options = ExtractOptions(method=Method.caa, read=Read.response_start)
    with pytest.raises(InputError, match=r"same start: .* same block outputs at response-start"):
        extract(decoder, data, options)


def test_one_pass_for_an_interrupted_run_as_with_grains(decoder, data, tmp_path):
    def interrupt(_count):
        raise KeyboardInterrupt

    options = ExtractOptions(method=Method.caa)
    with pytest.raises(KeyboardInterrupt):
        extract(decoder, data, options, tmp_path / "v", on_examples=interrupt)
    assert (tmp_path / "v.partial" / "group-00000.safetensors").is_file()
    vector, _ = extract(decoder, data, options, tmp_path / "v")
    assert vector.digest == extract(decoder, data, options)[0].digest
    with pytest.raises(InputError, match=r"options.method was 'caa', now"):
        extract(decoder, data, ExtractOptions(method=Method.icv), tmp_path / "v")
