"""The whole path from pairs to artifact, inside one process."""

import dataclasses

import pytest
import torch

from grains_vllm.vectors import SteeringVector
from offline.attribution import Attributor
from offline.baselines import baseline_embedding
from offline.blocks import record_blocks
from offline.deltas import deltas
from offline.errors import InputError
from offline.extract import GROUP, extract, finish
from offline.options import (
    AttributionMethod,
    Baseline,
    Direction,
    ExtractOptions,
    Mask,
    Method,
    Mode,
    Objective,
    Read,
)
from offline.pairs import load_pairs
from offline.prompts import tokenise
from tests.offline.worlds import ARCHITECTURES, RECURRENT, WORDS, build_decoder, rows, write_jsonl

QUICK = ExtractOptions(ig_points=8, k=3)


@pytest.fixture(scope="module")
def llama():
    return build_decoder("llama")


@pytest.fixture
def data(tmp_path):
    return load_pairs(str(write_jsonl(tmp_path / "pairs.jsonl", rows(GROUP + 3))))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture, data, tmp_path):
    decoder, notes = build_decoder(architecture), []
    out = tmp_path / "v.safetensors"
    vector, records = extract(decoder, data, QUICK, out, on_note=notes.append)
    assert (tmp_path / "v.safetensors.partial").is_dir() and not out.exists()
    finish(vector, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "v.safetensors"]
    loaded = SteeringVector.load(out, decoder.fingerprint)
    assert loaded.digest == vector.digest and loaded.layers == [0, 1, 2]
    assert len(records) == len(data.pairs)
    passport = loaded.passport
    assert passport["examples_used"] + passport["examples_dropped"] == len(records)
    assert passport["model_id"] == architecture and passport["options"]["k"] == 3
    assert passport["data"]["sha256"] == data.sha256
    assert passport["completeness"]["points"] == {"8": len(records)}
    assert [report["layer"] for report in passport["layers"]] == [0, 1, 2]
    assert "recommended" not in passport
    packed = 0 if architecture == "mistral-window" else len(records)
    assert passport["packed_examples"] == packed
    assert any("took two rows each" in note for note in notes) == (packed == 0)
    assert any("see --chat" in note for note in notes)


@pytest.mark.parametrize("architecture", RECURRENT)
def test_vectors_of_recurrent_models_do_not_depend_on_the_order_of_pairs(architecture, tmp_path):
    # In one row, answers of one token do not feel each other; those of the others do.
    long = {"prompt": " ".join(WORDS[:30]), "chosen": "w1", "rejected": "w2"}
    data = load_pairs(str(write_jsonl(tmp_path / "pairs.jsonl", [long, *rows(4)])))
    decoder = build_decoder(architecture)
    options = dataclasses.replace(QUICK, ig_points=4)
    vector, records = extract(decoder, data, options)
    turned = dataclasses.replace(data, pairs=data.pairs[::-1])
    other, _ = extract(decoder, turned, options)
    assert not any(record["packed"] for record in records)
    cosines = torch.cosine_similarity(vector.directions, other.directions)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="--mask attention hides tokens from attention, but"):
        extract(decoder, data, dataclasses.replace(options, mask=Mask.attention))


@pytest.mark.parametrize("method", [Method.caa, Method.random])
def test_methods_without_attribution_need_no_leaf(method, data):
    decoder = build_decoder("gemma4")
    with pytest.raises(InputError, match="cannot be attributed"):
        extract(decoder, data, QUICK)
    vector, _ = extract(decoder, data, ExtractOptions(method=method))
    norms = []
    for pair in data.pairs:
        tokens = tokenise(pair, decoder.tokenizer)
        for ids in (tokens.chosen_ids, tokens.rejected_ids):
            with record_blocks(decoder.blocks, [(-1, None)]) as outputs, torch.no_grad():
                ids = ids if method is Method.caa else []
                decoder.model(input_ids=torch.tensor([tokens.prompt_ids + ids]))
            norms.append(torch.cat([norm for _, norm in outputs]))
    expected = torch.stack(norms).quantile(0.5, dim=0)
    torch.testing.assert_close(vector.reference_norms, expected, rtol=1e-4, atol=1e-5)


def test_what_the_data_has_to_say_is_said(llama, tmp_path):
    items = [*rows(3), {"prompt": "<bos> w3", "chosen": "w1", "rejected": "w2"}]
    items.append({"prompt": "w3", "chosen": "w1", "rejected": "w1"})
    data = load_pairs(str(write_jsonl(tmp_path / "pairs.jsonl", items)), limit=4)
    notes = []
    vector, _ = extract(llama, data, ExtractOptions(method=Method.caa), on_note=notes.append)
    assert any("1 of 5 rows are left out, such as pairs.jsonl, line 5" in note for note in notes)
    assert any("1 prompts begin with the tokenizer's special tokens" in note for note in notes)
    assert vector.passport["data"]["left_out"] == 1


def test_pad_baseline_that_is_zero_is_pointed_out(llama, data, tmp_path):
    notes = []
    options = dataclasses.replace(QUICK, baseline=Baseline.pad)
    extract(llama, data, options, tmp_path / "a", on_note=notes.append)
    assert any("--baseline pad is --baseline zero" in note for note in notes)


def test_vector_is_the_mean_delta_of_the_recorded_choices(llama, data, tmp_path):
    vector, records = extract(llama, data, QUICK, tmp_path / "v")
    b = baseline_embedding(llama, Baseline.mean)
    total, norms = torch.zeros_like(vector.directions), []
    for pair, record in zip(data.pairs, records, strict=True):
        tokens = tokenise(pair, llama.tokenizer)
        plus, minus = record["positive"], record["negative"]
        assert all(record["scores"][i] > 0 for i in plus) and len(plus) <= 3
        assert all(record["scores"][i] < 0 for i in minus) and 0 not in plus + minus
        if record["used"]:
            delta = deltas(llama, tokens, plus, minus, b, Read.prompt_end)
            total += delta.positive - delta.negative
            norms.append(delta.norms[0])
    expected = total / total.norm(dim=1, keepdim=True)
    torch.testing.assert_close(vector.directions, expected, rtol=1e-4, atol=1e-5)
    expected_norms = torch.stack(norms).quantile(0.5, dim=0)
    torch.testing.assert_close(vector.reference_norms, expected_norms, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"direction": Direction.pca},
        {"direction": Direction.pca_centered},
        {"mode": Mode.positive},
        {"mask": Mask.mask_token},
        {"mask": Mask.attention},
        {"read": Read.response_end},
        {"attribution": AttributionMethod.random},
        {"attribution": AttributionMethod.smoothgrad, "smoothgrad_samples": 3},
        {"attribution": AttributionMethod.gradient_x_input},
        {"baseline": Baseline.zero},
        {"baseline": Baseline.mask_token},
        {"objective": Objective.sum},
        {"objective": Objective.first_token},
        {"read": Read.response_start},
    ],
    ids=str,
)
def test_every_option_reaches_the_vector(llama, data, tmp_path, changes):
    plain, _ = extract(llama, data, QUICK, tmp_path / "a")
    other, _ = extract(llama, data, dataclasses.replace(QUICK, **changes), tmp_path / "b")
    assert plain.digest != other.digest
    for name, value in changes.items():
        assert other.passport["options"][name] == value


def test_batches_and_their_memory_change_nothing(llama, data, tmp_path):
    one, _ = extract(llama, data, QUICK, tmp_path / "a", batch_rows=1)
    two, _ = extract(llama, data, QUICK, tmp_path / "b", batch_rows=33)
    torch.testing.assert_close(one.directions, two.directions, rtol=1e-3, atol=1e-5)


def test_examples_without_a_needed_set_are_dropped_and_counted(llama, data, tmp_path, monkeypatch):
    def one_sided(scores, eligible, k):
        return ([1], []) if len(eligible) % 2 else ([1], [2])

    monkeypatch.setattr("offline.groups.select", one_sided)
    vector, records = extract(llama, data, QUICK, tmp_path / "v")
    dropped = sum(len(record["tokens"]) % 2 for record in records)
    assert vector.passport["examples_dropped"] == dropped > 0
    positive = dataclasses.replace(QUICK, mode=Mode.positive)
    assert extract(llama, data, positive, tmp_path / "w")[0].passport["examples_dropped"] == 0
    monkeypatch.setattr("offline.groups.select", lambda scores, eligible, k: ([1], []))
    with pytest.raises(InputError, match="0 of 11 examples have tokens of the needed signs"):
        extract(llama, data, QUICK, tmp_path / "x")
    assert not (tmp_path / "x.partial").exists()


def interrupt(_count):
    raise KeyboardInterrupt


def test_interrupted_run_goes_on_to_the_same_bits(llama, data, tmp_path, monkeypatch):
    whole, records = extract(llama, data, QUICK, tmp_path / "a")

    with pytest.raises(KeyboardInterrupt):
        extract(llama, data, QUICK, tmp_path / "b", on_examples=interrupt)
    kept = sorted(path.name for path in (tmp_path / "b.partial").iterdir())
    assert kept == ["group-00000.safetensors", "lock", "manifest.json"]
    attributed, real = [], Attributor.attribute

    def counting(self, pairs):
        attributed.extend(pairs)
        return real(self, pairs)

    monkeypatch.setattr(Attributor, "attribute", counting)
    again, again_records = extract(llama, data, QUICK, tmp_path / "b")
    assert len(attributed) == len(data.pairs) - GROUP
    assert again.digest == whole.digest and again.passport == whole.passport
    assert again_records == records


def test_leftovers_of_another_run_are_refused(llama, data, tmp_path):
    extract(llama, data, QUICK, tmp_path / "v")
    other = dataclasses.replace(QUICK, k=2, seed=5)
    with pytest.raises(
        InputError, match=r"options.k was 3, now 2; options.seed was 0, now 5.*--restart"
    ):
        extract(llama, data, other, tmp_path / "v")
    assert (tmp_path / "v.partial").is_dir()
    assert (
        extract(llama, data, other, tmp_path / "v", restart=True)[0].passport["options"]["k"] == 2
    )


def test_damaged_group_is_computed_again(llama, data, tmp_path):
    whole, _ = extract(llama, data, QUICK, tmp_path / "v")
    (tmp_path / "v.partial" / "group-00001.safetensors").write_bytes(b"half")
    assert extract(llama, data, QUICK, tmp_path / "v")[0].digest == whole.digest


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"prompt": "w3 w4"}, r"line 12: --k is 4, but the prompt has only 3 tokens \(2 of them"),
        ({"prompt": "w3 " * 70}, r"line 12: prompt and response have 7\d tokens, .* takes 64"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(llama, data, tmp_path, item, message):
    items = [*rows(GROUP + 3), rows(1)[0] | item]
    data = load_pairs(str(write_jsonl(tmp_path / "pairs.jsonl", items)))
    with pytest.raises(InputError, match=message):
        extract(llama, data, dataclasses.replace(QUICK, k=4), tmp_path / "v", strict_k=True)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_default_k_may_be_more_than_a_short_prompt_has(llama, tmp_path):
    data = load_pairs(
        str(write_jsonl(tmp_path / "x.jsonl", [*rows(4), rows(1)[0] | {"prompt": "w3 w4"}]))
    )
    _, records = extract(llama, data, dataclasses.replace(QUICK, k=10), tmp_path / "v")
    assert len(records[-1]["positive"]) + len(records[-1]["negative"]) <= 2


def test_a_second_run_for_the_same_artifact_is_refused_while_the_first_runs(llama, data, tmp_path):
    messages = []

    def second(_count):
        with pytest.raises(InputError) as error:
            extract(llama, data, dataclasses.replace(QUICK, k=1), tmp_path / "v", restart=True)
        messages.append(str(error.value))

    vector, _ = extract(llama, data, QUICK, tmp_path / "v", on_examples=second)
    assert set(messages) == {"v.partial: another run is making this artifact"}
    assert vector.digest == extract(llama, data, QUICK, tmp_path / "w")[0].digest


def test_a_late_error_keeps_what_an_earlier_run_left(llama, data, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        extract(llama, data, QUICK, tmp_path / "v", on_examples=interrupt)

    def fail(*_):
        raise InputError("late")

    with monkeypatch.context() as patched:
        patched.setattr("offline.extract._vector", fail)
        with pytest.raises(InputError, match="late"):
            extract(llama, data, QUICK, tmp_path / "v")
        assert (tmp_path / "v.partial" / "group-00000.safetensors").is_file()
        with pytest.raises(InputError, match="late"):
            extract(llama, data, QUICK, tmp_path / "w")
    assert not (tmp_path / "w.partial").exists()


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
@pytest.mark.parametrize("restart", [False, True])
def test_what_is_not_a_partial_folder_is_left_alone(llama, data, tmp_path, kind, restart):
    place, mine = tmp_path / "v.partial", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    if kind == "file":
        place.write_text("precious")
    elif kind == "link":
        place.symlink_to(mine)
    else:
        mine.rename(place)
    with pytest.raises(InputError, match="in the way, and not a folder of an interrupted run"):
        extract(llama, data, QUICK, tmp_path / "v", restart=restart)
    assert "precious" in (
        place.read_text() if kind == "file" else (place / "thesis.txt").read_text()
    )


def test_an_unreadable_manifest_is_refused_until_restart(llama, data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        extract(llama, data, QUICK, tmp_path / "v", on_examples=interrupt)
    (tmp_path / "v.partial" / "manifest.json").write_text("[1]")
    with pytest.raises(InputError, match=r"its manifest cannot be read .*--restart discards it"):
        extract(llama, data, QUICK, tmp_path / "v")
    assert extract(llama, data, QUICK, tmp_path / "v", restart=True)


def test_wrong_tokenizer_is_refused(data, tmp_path):
    decoder = build_decoder("llama")
    decoder.tokenizer.add_tokens(["w100"])
    items = [rows(1)[0] | {"prompt": "w3 w4 w5 w100"}]
    data = load_pairs(str(write_jsonl(tmp_path / "x.jsonl", items)))
    with pytest.raises(InputError, match=r"token id 69 is beyond the 69 embeddings of model"):
        extract(decoder, data, QUICK, tmp_path / "v")


def test_too_little_memory_is_an_input_error_that_keeps_finished_groups(
    llama, data, tmp_path, monkeypatch
):
    from offline import groups as module

    real, calls = module.deltas, []

    def deltas_until_full(*arguments):
        calls.append(1)
        if len(calls) > GROUP:
            raise torch.OutOfMemoryError("pretend")
        return real(*arguments)

    monkeypatch.setattr(module, "deltas", deltas_until_full)
    with pytest.raises(InputError, match="too little memory for one example"):
        extract(llama, data, QUICK, tmp_path / "v")
    assert (tmp_path / "v.partial" / "group-00000.safetensors").is_file()


def test_half_precision_gives_nearly_the_same_vector(llama, data, tmp_path):
    half = build_decoder("llama")
    half.model.to(torch.bfloat16)
    options = dataclasses.replace(QUICK, ig_points=32)
    full_vector, _ = extract(llama, data, options, tmp_path / "a")
    half_vector, records = extract(half, data, options, tmp_path / "b")
    assert half_vector.passport["dtype"] == "bfloat16"
    assert all(record["packed"] for record in records)
    cosines = (full_vector.directions * half_vector.directions).sum(1)
    assert cosines.min() > 0.8
