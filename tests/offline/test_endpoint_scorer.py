"""What is sent and how answers are read; tests/server compares the figures with a real server."""

import pytest

from offline.endpoint_scorer import EndpointScorer
from offline.errors import InputError
from offline.scoring import Item, Point
from tests.offline.test_endpoint import server

ITEM = Item((5, 6), (7, 8))


def entries(*ranks):
    found = [None, {"6": {"logprob": -9.0, "rank": 9}}]
    found += [
        {str(7 + number): {"logprob": -0.5 - number, "rank": rank}}
        for number, rank in enumerate(ranks)
    ]
    return {"choices": [{"prompt_logprobs": found}]}


def scorer(url):
    return EndpointScorer(url, {("v", (1, 2)): "m:v"}, "m", api_key="secret")


def test_requests_say_what_is_steered_and_where_answers_begin():
    points = [None, Point("v", (1, 2), 0.5), Point("v", (1, 2), -1.0, "generation")]
    with server(lambda *_: (200, {}, entries(1, 1))) as (url, asked, _):
        found = dict(scorer(url).score([ITEM], points))
    assert all(score.logp == -2.0 and score.greedy for (score,) in found.values())
    bodies = [body for body, key in asked if key == "Bearer secret"]
    assert [body["model"] for body in bodies] == ["m", "m:v", "m:v"]
    assert [body["vllm_xargs"] for body in bodies] == [
        {"steering": "none"},
        {"steering_strength": 0.5, "steering_positions": "all"},
        {
            "steering_strength": -1.0,
            "steering_positions": "generation",
            "steering_prompt_tokens": 2,
        },
    ]
    assert all(body["prompt"] == [5, 6, 7, 8] for body in bodies)
    assert all(body["max_tokens"] == 1 and body["prompt_logprobs"] == 0 for body in bodies)


def test_an_answer_with_one_unlikely_token_is_not_greedy():
    with server(lambda *_: (200, {}, entries(1, 2))) as (url, *_):
        ((_, (score,)),) = scorer(url).score([ITEM], [None])
    assert not score.greedy


def test_layers_that_no_alias_steers_are_refused_before_anything_is_sent():
    with server(lambda *_: (200, {}, entries(1, 1))) as (url, asked, _):
        with pytest.raises(InputError, match=r"no model alias serves vector 'v' at layers \[1\]"):
            list(scorer(url).score([ITEM], [None, Point("v", (1,), 0.5)]))
        assert not asked


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"choices": [{"text": "x"}]}, "it has no prompt_logprobs"),
        (
            {"choices": [{"prompt_logprobs": [None]}]},
            "prompt_logprobs of 1 tokens, the prompt has 4",
        ),
    ],
)
def test_servers_that_do_not_score_prompts_are_named(answer, message):
    with (
        server(lambda *_: (200, {}, answer)) as (url, *_),
        pytest.raises(InputError, match=message),
    ):
        list(scorer(url).score([ITEM], [None]))
