"""Questions that made or chose a vector are found in whatever form they come."""

import pytest

from offline.errors import InputError
from offline.evaluation.overlap import seen_by
from offline.pairs import load_pairs
from tests.evaluation_world import random_vector
from tests.offline.worlds import write_jsonl

QUESTION = "What is the moon?"
FORMS = {
    "text": QUESTION,
    "question-and-answer": f"Q: {QUESTION}\nA:",
    "chat": [{"role": "user", "content": QUESTION}],
}


def vector(tmp_path, prompt, **passport):
    path = write_jsonl(
        tmp_path / "calibration.jsonl", [{"prompt": prompt, "chosen": "a", "rejected": "b"}]
    )
    fingerprints = [pair.prompt_fingerprint for pair in load_pairs(str(path)).pairs]
    examples = [{"id": "1", "prompt_fingerprint": value} for value in fingerprints]
    return random_vector(0, examples=examples, **passport), fingerprints


@pytest.mark.parametrize("test", FORMS)
@pytest.mark.parametrize("calibration", FORMS)
def test_overlap_is_refused_in_every_form(tmp_path, calibration, test):
    seen = seen_by({"v.safetensors": vector(tmp_path, FORMS[calibration])[0]})
    with pytest.raises(InputError, match=r"test: 1 of its 2 questions .*number 2 is among the "
                       r"calibration examples of v.safetensors"):  # fmt: skip
        seen.keep("test", [["Another?"], ["something else", FORMS[test]]])
    assert seen.keep("test", [["Another?"], [f"{QUESTION} Really?"]]) == [0, 1]


def test_overlap_can_be_left_out_but_not_all_of_it(tmp_path):
    seen = seen_by({"v.safetensors": vector(tmp_path, QUESTION)[0]}, exclude=True)
    assert seen.keep("test", [["a"], [QUESTION], ["b"]]) == [0, 2]
    with pytest.raises(InputError, match="all of its 1 questions"):
        seen.keep("test", [[QUESTION]])


def test_validation_pairs_of_a_sweep_count_too(tmp_path):
    _, fingerprints = vector(tmp_path, "Chosen by?")
    sweep = {"data": {"validation": {"prompt_fingerprints": fingerprints}}}
    made, _ = vector(tmp_path, QUESTION, sweep=sweep)
    with pytest.raises(InputError, match="among the validation pairs of v"):
        seen_by({"v": made}).keep("test", [["Chosen by?"]])


def test_an_artifact_without_its_origin_is_named():
    assert seen_by({"v.safetensors": random_vector(0)}).silent == ["v.safetensors"]
