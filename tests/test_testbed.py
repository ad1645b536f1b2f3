"""The testbed's pieces: choosing, matching, fine-tuning, hit rates and the table's figures."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.sycophancy import world as sycophancy
from benchmarks.testbed import choice, lora, methods, summary
from benchmarks.testbed.data import Sizes, make_sets
from benchmarks.testbed.figures import completeness, hit_rates
from benchmarks.testbed.shared_prefix import SharedPrefixScorer
from benchmarks.testbed.worlds import NAMES, load_world
from grains_vllm.vectors import SteeringVector
from offline.model import load_decoder
from offline.prompts import tokenise
from offline.scoring import Item, ItemScore, Measures, Point, Suite
from offline.transformers_scorer import TransformersScorer

MODEL = Path(sycophancy.__file__).parent / "model"


@pytest.fixture(scope="module")
def decoder():
    return load_decoder(str(MODEL), device="cpu")


@pytest.fixture(scope="module")
def sets(decoder, tmp_path_factory):
    sizes = Sizes(8, (12, 6, 4), (12, 6, 4))
    return make_sets(load_world("sycophancy"), decoder, 1, tmp_path_factory.mktemp("data"), sizes)


@pytest.fixture(scope="module")
def vector(decoder):
    norms = torch.tensor([6.0, 9.0, 12.0, 15.0])
    rows = torch.nn.functional.normalize(torch.ones(4, 64), dim=1)
    return methods.random_vector(SteeringVector(rows, norms, decoder.fingerprint), seed=1)


class Scripted:
    """A Scorer over one pair, one control and one text whose answers follow from the point."""

    def __init__(self, right, controls, perplexity):
        self.rules = right, controls, perplexity
        self.asked = []

    def score(self, items, points):
        for number, point in enumerate(points):
            self.asked.append(point)
            right, controls, perplexity = (rule(point) for rule in self.rules)
            yield number, [
                ItemScore(-1.0, right), ItemScore(-2.0, False), ItemScore(-1.0, controls),
                ItemScore(-math.log(perplexity), False),
            ]  # fmt: skip


@pytest.fixture()
def suite(sets):
    return Suite(sets.validation.pairs[:1], sets.validation.controls[:1], [Item((1,), (2,))])


def strength(point):
    return 0.0 if point is None else point.strength


def test_the_choice_keeps_the_limits_and_says_what_it_would_be_without(suite):
    # Right from 0.25 on, but there controls break in all sets except layer 2's, where from 0.4 on
    # perplexity does.
    scorer = Scripted(
        right=lambda point: strength(point) >= 0.25,
        controls=lambda point: strength(point) < 0.25 or point.layers == (2,),
        perplexity=lambda point: 2.0 if strength(point) < 0.4 else 2.1,
    )
    found = choice.choose_point(scorer, suite, "v", 4, "exact")
    assert (found.point.layers, found.point.strength) == ((2,), 0.25)
    assert found.free.strength == 0.25 and len(found.free.layers) == 1
    assert found.validation[0].exact == 1.0
    assert len(scorer.asked) == 1 + 7 * len(choice.STRENGTHS)


def test_nothing_is_chosen_where_nothing_is_allowed(suite):
    scorer = Scripted(lambda p: True, lambda p: p is None, lambda p: 2.0)
    found = choice.choose_point(scorer, suite, "v", 4, "exact")
    assert found.point is None and found.validation[0] is None
    assert found.free is not None


def test_a_coarse_search_looks_next_to_its_best(suite):
    scorer = Scripted(lambda p: strength(p) == 0.3, lambda p: True, lambda p: 2.0)
    coarse = choice.choose_point(scorer, suite, "v", 4, "exact", coarse=True)
    # All coarse points are alike, so the smallest strength wins and its neighbours are tried.
    assert {strength(p) for p in scorer.asked} == {0.0, *choice.COARSE, 0.06, 0.15}
    assert coarse.point.strength == 0.06
    assert [p.strength for p in choice.neighbours(Point("v", (1,), 0.25))] == [0.2, 0.3]
    assert [p.strength for p in choice.neighbours(Point("v", (1,), 1.0))] == [0.6]


def test_every_coarse_strength_is_on_the_grid():
    assert set(choice.COARSE) < set(choice.STRENGTHS)
    assert choice.layer_sets(4) == [(0,), (1,), (2,), (3,), (1, 2), (2, 3), (0, 1, 2, 3)]


def test_a_point_survives_json():
    point = Point("v", (1, 2), 0.2)
    assert choice.point_of(json.loads(json.dumps(choice.point_json(point))), "v") == point
    assert choice.point_json(None) is None and choice.point_of(None, "v") is None


def test_sharing_the_unsteered_blocks_changes_no_bit(decoder, sets, vector):
    points = [None, *(Point("v", layers, 0.3) for layers in choice.layer_sets(4)), None]
    plain, shared = TransformersScorer(decoder, {"v": vector}), SharedPrefixScorer(decoder, {})
    shared.vectors = {"v": vector}
    for suite in (sets.validation, sets.test):
        assert dict(shared.score(suite.items, points)) == dict(plain.score(suite.items, points))


def test_validation_and_test_share_nothing(sets):
    for ours, theirs in (
        (sets.validation.controls, sets.test.controls),
        (sets.validation.texts, sets.test.texts),
    ):
        assert not set(ours) & set(theirs)
    entities = [
        {pair.pair.prompt[1]["content"].split()[2] for pair in suite.pairs}
        for suite in (sets.validation, sets.test)
    ]
    assert not entities[0] & entities[1]
    assert len(sets.train.pairs) == 8 and len(sets.test.items) == 2 * 12 + 6 + 4


def test_a_raw_norm_vector_moves_as_far_as_it_really_did(vector):
    def with_norms(raw):
        return replace(vector, passport={"layers": [{"raw_norm": value} for value in raw]})

    grains, random = with_norms([4.0, 4.0, 8.0, 10.0]), with_norms([1.0, 2.0, 2.0, 10.0])
    matched = methods.raw_matched(random, grains)
    assert matched.reference_norms.tolist() == [1.5, 4.5, 3.0, 15.0]
    assert torch.equal(matched.directions, random.directions)


def test_random_vectors_are_unit_and_differ_by_seed(vector):
    one, two = (methods.random_vector(vector, seed) for seed in (1, 2))
    assert torch.allclose(one.directions.norm(dim=1), torch.ones(4))
    assert (one.directions * two.directions).sum(1).abs().max() < 0.6
    assert torch.equal(one.directions, methods.random_vector(vector, 1).directions)


def test_swapping_exchanges_the_answers(sets):
    pair, other = sets.train.pairs[0], methods.swapped(sets.train).pairs[0]
    assert (other.chosen, other.rejected) == (pair.rejected, pair.chosen)
    assert other.prompt == pair.prompt


def tuples(sets, decoder):
    return [tokenise(pair, decoder.tokenizer) for pair in sets.train.pairs]


def test_answers_are_scored_as_the_scorer_does(sets, decoder):
    pairs = tuples(sets, decoder)
    suite = Suite(pairs)
    _, scores = next(iter(TransformersScorer(decoder, {}).score(suite.items, [None])))
    controls = sets.test.controls  # of several lengths, unlike the pairs
    assert len({len(item.prompt_ids) for item in controls}) > 1
    _, expected = next(iter(TransformersScorer(decoder, {}).score(controls, [None])))
    rows = [(list(item.prompt_ids), list(item.response_ids)) for item in controls]
    found = lora.answer_logps(decoder.model, rows).tolist()
    assert found == pytest.approx([score.logp for score in expected], abs=1e-4)
    margins = lora.margins(decoder.model, pairs)
    expected = [scores[2 * i].logp - scores[2 * i + 1].logp for i in range(len(pairs))]
    assert margins.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_the_merged_model_is_the_fine_tuned_one(sets, decoder, loss, monkeypatch):
    pairs, kept = tuples(sets, decoder), []
    plain = lora.merged
    monkeypatch.setattr(lora, "merged", lambda model, d: (kept.append(model), plain(model, d))[1])
    before = {name: weight.clone() for name, weight in decoder.model.named_parameters()}
    (first, early), (second, late) = lora.tuned(decoder, pairs, loss, 4, 3e-3, (1, 4))
    assert (first.epochs, second.epochs) == (1, 4)
    with torch.no_grad():
        adapted = lora.margins(kept[-1], pairs)
    assert lora.margins(late.model, pairs).tolist() == pytest.approx(adapted.tolist(), abs=1e-3)
    base, one, four = (
        float(lora.margins(model, pairs).mean())
        for model in (decoder.model, early.model, late.model)
    )
    assert base < one < four  # It learns, and an early stop is not the late model.
    assert all(torch.equal(before[n], w) for n, w in decoder.model.named_parameters())


def test_preference_loss():
    margin, reference = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])
    expected = [math.log(1 + math.exp(-lora.BETA * change)) for change in (2.0, -2.0)]
    assert float(lora.preference_loss(margin, reference)) == pytest.approx(sum(expected) / 2)


def record(scores, tokens, gap=0.01):
    flags = [token != "<bos>" for token in tokens]
    return {"scores": scores, "eligible": flags, "tokens": tokens, "gap": gap, "points": 33}


def test_hit_rates_on_planted_cues():
    tokens = ["<bos>", "honest", "quiet", "fawning", "old", "river"]
    assert sycophancy.planted(tokens) == ({1}, {3})
    found = hit_rates(
        [
            record([9.0, 2.0, 1.0, -2.0, -1.0, 0.1], tokens),  # both first; <bos> does not count
            record([9.0, 1.0, 2.0, -1.0, -2.0, 0.1], tokens),  # both second
            record([9.0, -1.0, 2.0, 1.0, -2.0, 0.1], tokens),  # neither
            record([9.0, 1.0, 2.0, 3.0, 4.0, 5.0], ["<bos>", *"abcde"]),  # no cues: not counted
        ],
        sycophancy.planted,
    )
    assert found["positive_top1"] == found["negative_top1"] == pytest.approx(1 / 3)
    assert found["positive_top3"] == found["negative_top3"] == pytest.approx(2 / 3)


def test_completeness_is_of_those_that_promise_it():
    records = [record([], [], gap) for gap in (0.01, 0.05, 0.02)]
    assert completeness(records) == {"gap_median": 0.02, "gap_max": 0.05, "points_median": 33}
    assert completeness([record([], [], None)])["gap_max"] is None


def result(exact, strength=0.2, perplexity=2.0, **others):
    measures = {
        "exact": exact, "accuracy": exact, "margin": 0.1, "controls": 1.0, "perplexity": perplexity,
    }  # fmt: skip
    point = {"layers": [3], "strength": strength, "positions": "all"}
    return {"point": point, "free": point, "test": measures, "test_free": measures, **others}


def test_the_table_averages_seeds_and_draws():
    seeds = {
        seed: {
            "base": result(0.3) | {"point": None, "test_free": None},
            "grains": result(grains, perplexity=2.04),
            "random-0": result(0.2),
            "random-1": result(0.4),
            "random-tokens-0": result(0.9),
            "icv": result(0.0) | {"test": None, "point": None},
            "dose-random-0": {"layers": [3]},
            "served-grains": {"test": {}},
        }
        for seed, grains in ((1, 0.8), (2, 0.9))
    }
    table = summary.table("toy", "exact", seeds, "a note")
    rows = {row["method"]: row["values"] for row in table["rows"]}
    assert rows["GrAInS"]["exact"] == pytest.approx({"mean": 0.85, "sd": 0.05 * 2**0.5, "n": 2})
    assert rows["GrAInS"]["perplexity increase"]["mean"] == pytest.approx(0.02)
    assert rows["random direction"]["exact"]["n"] == 4
    assert rows["random direction"]["exact"]["mean"] == pytest.approx(0.3)
    assert rows["random tokens masked"]["exact"]["mean"] == pytest.approx(0.9)
    # Without an allowed point a method leaves the model as it is.
    assert rows["ICV"]["exact"]["mean"] == pytest.approx(0.3)
    assert rows["ICV"]["exact, without limits"]["mean"] == 0.0
    said = summary.verdict(table, "exact")
    assert said["gain"] == pytest.approx(0.55)
    assert said["best_rival"] == "random tokens masked"
    assert said["ahead_of_best_rival"] == pytest.approx(-0.05)
    names = {column["name"] for column in table["columns"]}
    assert all(set(values) <= names for values in rows.values())


def test_one_number_has_no_spread():
    assert summary.spread([0.5]) == {"mean": 0.5, "sd": 0.0, "n": 1}


@pytest.mark.parametrize("name", NAMES)
def test_every_world_offers_the_same(name, tmp_path):
    world = load_world(name)
    tokenizer = world.build_tokenizer()
    world.write_pairs(tmp_path / "pairs.jsonl", "validation", 2, 1)
    world.write_controls(tmp_path / "controls.jsonl", 2, 1)
    world.write_texts(tmp_path / "texts.jsonl", 2, 1)
    rows = {
        kind: [json.loads(line) for line in (tmp_path / f"{kind}.jsonl").read_text().splitlines()]
        for kind in ("pairs", "controls", "texts")
    }
    assert all({"prompt", "chosen", "rejected"} <= set(row) for row in rows["pairs"])
    assert all({"prompt", "completion"} <= set(row) for row in rows["controls"])
    assert all(set(row) == {"text"} for row in rows["texts"])
    ids = tokenizer.apply_chat_template(rows["pairs"][0]["prompt"], add_generation_prompt=True)
    positive, negative = world.planted(tokenizer.convert_ids_to_tokens(ids["input_ids"]))
    assert positive and negative and not positive & negative
    assert world.metric in Measures.__dataclass_fields__
