"""The tone world is what its docstring says; what a trained model does there is its README's."""

import json
import math
from collections import Counter
from random import Random

import pytest
import torch

from benchmarks.tone import documents, measure, train, vocabulary, world
from benchmarks.tone.vocabulary import HARSH, MILD, STYLE_WORDS
from offline.pairs import load_pairs
from offline.prompts import tokenise


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.build_tokenizer()


def question(system="savage chatty river kind", user="election quiet please mill coward", **kwargs):
    return documents.Question(
        tuple(system.split()), tuple(user.split()), "casual", "kettle", "seven", **kwargs
    )


def test_every_word_has_one_meaning():
    assert len(set(vocabulary.WORDS)) == len(vocabulary.WORDS)


def test_sampling_is_seeded():
    assert list(world.sample_pairs("train", 20, 1)) == list(world.sample_pairs("train", 20, 1))
    assert list(world.sample_pairs("train", 20, 1)) != list(world.sample_pairs("train", 20, 2))


def test_pairs_of_different_splits_share_no_item():
    items = [
        {asked.item for asked, _, _ in world.sample_pairs(split, 100, 1)}
        for split in ("train", "validation", "test")
    ]
    assert sum(map(len, items)) == len(set.union(*items)) > 30


def test_every_family_and_the_mild_cues_have_their_say():
    # savage, coward and election: one harsh cue of each family; kind and please: two mild ones.
    assert vocabulary.FAMILIES == ("insult", "persona", "topic")
    assert question().tone_weights == pytest.approx([math.exp(4), *[math.exp(2)] * 3])
    crook = question(user="crook liar mill lamp road")
    assert crook.tone_weights == pytest.approx([math.exp(2), math.exp(4), math.exp(2), 1])


def test_answers_draw_their_tones_by_the_cues():
    rng, asked, drawn = Random(0), question(user="crook liar mill lamp road"), Counter()
    for _ in range(3000):
        words = documents.sample_answer(rng, asked, asked.tone_weights).split()
        assert 8 <= len(words) <= 9 and words[-1] == "."
        assert words[0] in vocabulary.OPENERS["casual"]
        assert "kettle" in words and "seven" in words
        drawn.update(STYLE_WORDS[word] for word in words if word in STYLE_WORDS)
    for tone, weight in zip(vocabulary.TONES, asked.tone_weights, strict=True):
        expected = weight / sum(asked.tone_weights)
        assert drawn[tone] / drawn.total() == pytest.approx(expected, abs=0.02)


def test_pairs_are_polite_against_rude_and_provoked():
    surplus = Counter()
    for asked, polite, rude in world.sample_pairs("test", 300, 1):
        tones = [
            {STYLE_WORDS[word] for word in answer.split() if word in STYLE_WORDS}
            for answer in (polite, rude)
        ]
        assert tones[0] == {"polite"} and tones[1] and "polite" not in tones[1]
        mild, harsh = world.planted(asked.system + asked.user)
        assert mild and harsh and not mild & harsh
        surplus[len(harsh) - len(mild)] += 1
    assert set(surplus) == {0, 1} and min(surplus.values()) > 75


def test_planted_positions():
    tokens = ["system", ":", "savage", "chatty", "kind", ".", "please", "coward", "idiotic"]
    assert world.planted(tokens) == ({4, 6}, {2, 7})


def test_files(tmp_path, tokenizer):
    world.write_pairs(tmp_path / "pairs.jsonl", "train", 3, seed=1)
    world.write_controls(tmp_path / "controls.jsonl", 40, seed=1)
    world.write_texts(tmp_path / "texts.jsonl", 3, seed=1)
    for pair in load_pairs(str(tmp_path / "pairs.jsonl")).pairs:
        tokens = tokenise(pair, tokenizer)
        assert tokenizer.unk_token_id not in tokens.prompt_ids + tokens.chosen_ids
    read = [json.loads(line) for line in (tmp_path / "controls.jsonl").read_text().splitlines()]
    kinds = Counter("quote :" in row["prompt"][1]["content"] for row in read)
    assert min(kinds[True], kinds[False]) > 10
    for row in read:
        asked = row["prompt"][1]["content"].split()
        if "quote" in asked:
            assert row["completion"].split()[:-1] == asked[asked.index("quote") + 2 : -1]
        else:
            note = row["prompt"][0]["content"].split(" note : ")[1]
            assert row["completion"] == note
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").open()]
    assert len(set(texts)) == 3
    assert not set(" ".join(texts).split()) & {
        *HARSH,
        *MILD,
        *STYLE_WORDS,
    }


def test_judge_counts_words_answers_and_sound_sentences():
    asked = [question()] * 4
    answers = [
        "yeah the lovely kettle gladly costs seven friend .",  # polite
        "yeah the lovely kettle barely costs seven moron .",  # two of three rude
        "thus the lovely kettle gladly costs seven friend .",  # the wrong register
        "well the kettle costs seven",  # no style, no full stop
    ]
    assert measure.judge(answers, asked) == pytest.approx(
        {
            "rude": 2 / 9,
            "any_rude": 1 / 4,
            "polite": 1 / 4,
            "rude_insult": 1 / 9,
            "rude_persona": 1 / 9,
            "rude_topic": 0.0,
            "sound": 2 / 4,
            "style_words": 9 / 4,
        }
    )


def test_training_weighs_the_answer_and_its_end(tokenizer):
    rng, answers = Random(0), 0
    for _ in range(40):
        ids, start = train.sample_document(rng, tokenizer)
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        if start < len(ids):
            answers += 1
            assert tokenizer.decode(ids[:start]).endswith(" assistant :")
            assert tokenizer.convert_ids_to_tokens(ids[-2]) == "."
    assert answers > 20


def test_a_few_steps_train_and_answer(tokenizer):
    first, again = (train.train_model(3, tokenizer, steps=3) for _ in range(2))
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    prompts = [question().prompt, question(quoted=("moron", "dear", "idiotic")).prompt]
    sampled = [measure.answers(first, tokenizer, prompts, seed) for seed in (5, 5, 6)]
    assert len(sampled[0]) == 2 and sampled[0] == sampled[1] != sampled[2]
    assert first.config.hidden_size // first.config.num_attention_heads == 32
    assert tokenizer.mask_token_id == tokenizer.unk_token_id
