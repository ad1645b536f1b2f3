"""Scores equal those of one unpadded forward per item; measures equal hand-made sums."""

import math
from dataclasses import replace

import pytest
import torch

from grains_vllm.positions import PositionsError
from grains_vllm.vectors import SteeringVector
from offline.blocks import stream_of
from offline.pairs import Pair
from offline.prompts import TokenPair
from offline.scoring import Item, ItemScore, Point, Suite, measure, pair_margins
from offline.transformers_scorer import TransformersScorer
from tests.offline.worlds import build_decoder

ITEMS = [
    Item((1, 9, 10, 11, 12), (13, 14)),
    Item((1, 20), (21, 22, 23, 24)),
    Item((1, 30, 31, 32, 33, 34, 35), (36,)),
]


def vector(decoder, seed=0):
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
    norms = torch.full((3,), 4.0)
    return SteeringVector(rows / rows.norm(dim=1, keepdim=True), norms, decoder.fingerprint)


def by_hand(decoder, item, point, direction):
    """One item by itself, the shift written out in float64, all logits."""
    ids = torch.tensor([item.prompt_ids + item.response_ids])
    answer = torch.arange(ids.shape[1]) >= len(item.prompt_ids)
    handles = []

    def hook(layer):
        def shift(_module, _inputs, output):
            h = stream_of(output).double()
            u = h + point.strength * 4.0 * direction.directions[layer].double()
            moved = u * h.norm(dim=-1, keepdim=True) / u.norm(dim=-1, keepdim=True)
            last = torch.arange(len(ids[0])) == len(item.prompt_ids) - 1
            here = {
                "all": answer | ~answer, "prompt": ~answer, "generation": answer,
                "prompt:1": last, "prompt:1+generation": last | answer,
            }  # fmt: skip
            new = torch.where(here[point.positions][:, None], moved, h).float()
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return shift

    for layer in () if point is None else point.layers:
        handles.append(decoder.blocks[layer].register_forward_hook(hook(layer)))
    try:
        with torch.no_grad():
            logps = decoder.model(ids).logits[0].log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    first = len(item.prompt_ids) - 1
    rows = logps[first:-1]
    chosen = rows.gather(1, torch.tensor(item.response_ids)[:, None])[:, 0]
    return float(chosen.sum()), bool((rows.argmax(1) == torch.tensor(item.response_ids)).all())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_rows", [1, 2, 32])
def test_scores_equal_one_forward_per_item(architecture, batch_rows):
    decoder = build_decoder(architecture)
    direction = vector(decoder)
    points = [None] + [
        Point("v", layers, strength, positions)
        for layers, strength in (((1,), 0.5), ((0, 2), -0.8))
        for positions in ("all", "prompt", "generation", "prompt:1", "prompt:1+generation")
    ]
    found = dict(TransformersScorer(decoder, {"v": direction}, batch_rows).score(ITEMS, points))
    sums = set()
    for number, point in enumerate(points):
        for item, score in zip(ITEMS, found[number], strict=True):
            logp, greedy = by_hand(decoder, item, point, direction)
            assert score.logp == pytest.approx(logp, abs=1e-4)
            assert score.greedy is greedy
        sums.add(round(sum(score.logp for score in found[number]), 3))
    assert len(sums) == len(points)  # the points really differ


def test_a_point_knows_whether_the_border_matters():
    for positions in ("all", "prompt+generation", "generation+prompt"):
        assert not Point("v", (0,), 1.0, positions).needs_border
    for positions in ("prompt", "generation", "prompt:1+generation", "prompt+generation:9"):
        assert Point("v", (0,), 1.0, positions).needs_border
    with pytest.raises(PositionsError):
        _ = Point("v", (0,), 1.0, "end").needs_border


def test_greedy_answers_are_recognised():
    decoder = build_decoder()
    prompt = [1, 9, 10, 11]
    with torch.no_grad():
        answer = decoder.model.generate(
            torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=None
        )[0, 4:].tolist()
    other = [*answer[:2], (answer[2] + 1) % 60]
    items = [Item(tuple(prompt), tuple(ids)) for ids in (answer, other)]
    ((_, scores),) = TransformersScorer(decoder, {}).score(items, [None])
    assert [score.greedy for score in scores] == [True, False]


def test_strength_zero_changes_no_bit():
    decoder = build_decoder()
    scorer = TransformersScorer(decoder, {"v": vector(decoder)})
    found = dict(
        scorer.score(ITEMS, [None, Point("v", (0, 1), 0.0), Point("v", (2,), 0.0, "prompt")])
    )
    assert found[0] == found[1] == found[2]


def pair(chosen, rejected):
    return TokenPair(Pair("1", "", "x", "a", "b"), [1], chosen, rejected, ["x"], [True])


def test_measures_by_hand():
    suite = Suite(
        [pair([5, 6], [7]), pair([5], [7, 8, 9, 10])],
        controls=[Item((1,), (2,)), Item((1,), (3,)), Item((1,), (4,)), Item((1,), (5,))],
        texts=[Item((1,), (2, 3, 4)), Item((1,), (2,))],
    )
    scores = [
        ItemScore(-2.0, True), ItemScore(-1.5, False),  # -1.0 against -1.5 per token
        ItemScore(-3.0, False), ItemScore(-4.0, True),  # -3.0 against -1.0
        ItemScore(-1, True), ItemScore(-1, True), ItemScore(-1, True), ItemScore(-1, False),
        ItemScore(-6.0, False), ItemScore(-2.0, False),
    ]  # fmt: skip
    assert pair_margins(suite, scores) == [0.5, -2.0]
    found = measure(suite, scores)
    assert (found.accuracy, found.margin, found.exact) == (0.5, -0.75, 0.5)
    assert found.controls == 0.75
    assert found.perplexity == pytest.approx(math.exp(8 / 4))
    bare = replace(suite, controls=(), texts=())
    assert measure(bare, scores[:4]).controls is None
    assert measure(bare, scores[:4]).perplexity is None
