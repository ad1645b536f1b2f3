"""Controls, texts and validation pairs become token ids; what cannot be used is named."""

import json
from dataclasses import replace

import pytest

from grains_vllm.vectors import SteeringVector
from offline.errors import InputError
from offline.pairs import load_pairs
from offline.scoring import Item
from offline.suite import load_suite, require_disjoint
from tests.offline.worlds import build_decoder, build_tokenizer, rows, write_jsonl
from tests.tiny import random_vector


@pytest.fixture(scope="module")
def decoder():
    return build_decoder()


@pytest.fixture
def pairs(tmp_path):
    return load_pairs(str(write_jsonl(tmp_path / "pairs.jsonl", rows(3))))


def load(decoder, pairs, tmp_path, controls=None, texts=None, chat=False):
    paths = []
    for name, content in (("controls.jsonl", controls), ("texts.txt", texts)):
        path = None
        if content is not None:
            path = tmp_path / name
            path.write_text(
                content
                if isinstance(content, str)
                else "".join(json.dumps(x) + "\n" for x in content)
            )
        paths.append(path)
    return load_suite(pairs, decoder.tokenizer, decoder.text_config, *paths, chat)


def test_items_are_pairs_then_controls_then_texts(decoder, pairs, tmp_path):
    controls = [
        {"prompt": "w1 w2", "completion": "w3"},
        {
            "prompt": [{"role": "user", "content": "w1 w2"}],
            "completion": [{"role": "assistant", "content": "w3"}],
        },
    ]
    found = load(decoder, pairs, tmp_path, controls, "w5 w6 w7\n\nw8 w9\r\n")
    ids = {word: id for word, id in build_tokenizer().get_vocab().items()}
    suite = found.suite
    assert len(suite.items) == 2 * 3 + 2 + 2
    assert suite.controls[0] == Item((ids["<bos>"], ids["w1"], ids["w2"]), (ids["w3"],))
    chat = ["<bos>", "<user>", "w1", "w2", "<eos>", "<assistant>"]
    assert suite.controls[1] == Item(tuple(ids[word] for word in chat), (ids["w3"],))
    assert suite.texts[0] == Item((ids["<bos>"],), (ids["w5"], ids["w6"], ids["w7"]))
    assert suite.texts[1] == Item((ids["<bos>"],), (ids["w8"], ids["w9"]))
    assert found.facts["controls"]["items"] == 2 and found.facts["texts"]["name"] == "texts.txt"
    assert found.facts["validation"]["sha256"] == pairs.sha256


def test_chat_makes_a_string_prompt_a_message(decoder, pairs, tmp_path):
    as_text = [{"prompt": "w1 w2", "completion": "w3"}]
    as_chat = [{"prompt": [{"role": "user", "content": "w1 w2"}], "completion": "w3"}]
    text = load(decoder, pairs, tmp_path, as_text, chat=True).suite.controls
    assert text == load(decoder, pairs, tmp_path, as_chat).suite.controls


@pytest.mark.parametrize(
    ("controls", "texts", "message"),
    [
        ([{"prompt": "w1"}], None, "controls.jsonl, line 1: 'completion' is missing"),
        ([{"completion": "w1"}], None, "controls.jsonl, line 1: 'prompt' is missing"),
        (["w1"], None, "controls.jsonl, line 1: found str"),
        ([{"prompt": "w1", "completion": 3}], None, "'completion' is int 3"),
        ([{"prompt": "w1", "completion": ""}], None, "'completion' has no tokens"),
        ([], None, "--controls is 'controls.jsonl', which holds nothing"),
        (None, "\n \n", "--text is 'texts.txt', which holds nothing"),
        (None, "w1 " * 80, "text 1: 81 tokens, the model takes 64"),
        ([{"prompt": "w1 " * 70, "completion": "w1"}], None, "control 1: 72 tokens"),
    ],
)
def test_refusals(decoder, pairs, tmp_path, controls, texts, message):
    with pytest.raises(InputError, match=message):
        load(decoder, pairs, tmp_path, controls, texts)


def test_a_tokenizer_of_another_model_is_refused(decoder, pairs):
    config = type("Config", (), {"vocab_size": 10})()
    with pytest.raises(InputError, match=r"line 1: token id .* vocabulary of 10"):
        load_suite(pairs, decoder.tokenizer, config)


@pytest.mark.parametrize("form", ["same", "chat"])
def test_calibration_examples_are_no_validation_pairs(pairs, form):
    second = pairs.pairs[1]
    if form == "chat":
        second = replace(second, prompt=[{"role": "user", "content": second.prompt}])
    examples = [{"id": "x", "prompt_fingerprint": second.prompt_fingerprint}]
    vector = replace(random_vector("llama", 0), passport={"examples": examples})
    with pytest.raises(InputError, match=r"1 of 3 pairs .* 'mine' was made \(ids p1\)"):
        require_disjoint(pairs, {"mine": vector})


def test_disjoint_and_silent_vectors(pairs):
    known = {"examples": [{"id": "x", "prompt_fingerprint": "0" * 16}]}
    vectors: dict[str, SteeringVector] = {
        "known": replace(random_vector("llama", 0), passport=known),
        "silent": random_vector("llama", 1),
    }
    assert require_disjoint(pairs, vectors) == ["silent"]
