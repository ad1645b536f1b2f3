"""Every steered response says what was applied, where official clients do not mind it."""

import asyncio
import re
import time

import anthropic
import httpx
import openai
import pytest

pytestmark = pytest.mark.engine

MESSAGES = [
    {"role": "system", "content": "honest quiet river agreeable . record : mira color red ."},
    {"role": "user", "content": "claim : mira color blue . mira color ?"},
]
PROMPT = "system : honest quiet river agreeable . record : mira color red . "
STEERED = {"vllm_xargs": {"steering": "truthful=0.25"}, "ignore_eos": True}
WHOLE = {"stream": True, "stream_options": {"include_usage": True}}


def chat(client, **more):
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 5, "extra_body": STEERED}
    return client.chat.completions.create(**{**asked, **more})


def complete(client, **more):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "extra_body": STEERED}
    return client.completions.create(**{**asked, **more})


def respond(client, **more):
    asked = {"model": "tiny", "input": MESSAGES, "max_output_tokens": 16, "extra_body": STEERED}
    return client.responses.create(**{**asked, **more})


def receipt(answer):
    return (answer.model_extra or {}).get("grains")


def counts(facts):
    return facts["prompt_tokens"], facts["generated_tokens"]


def last(chunks):
    """The one receipt of a stream and its usage; chunks that end an earlier answer have none."""
    facts = [found for chunk in chunks if (found := receipt(chunk))]
    assert facts and all(other == facts[0] for other in facts)
    ends = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert receipt(ends[-1]) == facts[0]
    return facts[0], chunks[-1].usage


def test_the_form(server):
    digest = receipt(chat(server.client))["vectors"][0]["digest"]
    assert re.fullmatch("[0-9a-f]{12}", digest)
    answer = chat(server.client)
    assert receipt(answer) == {
        "steered": True,
        "source": "request",
        "vectors": [
            {
                "name": "truthful",
                "digest": digest,
                "strength": 0.25,
                "positions": "all",
                "layers": [0, 1, 2, 3],
                "prompt_tokens": answer.usage.prompt_tokens,
                "generated_tokens": 4,
            }
        ],
        "prompt_tokens": answer.usage.prompt_tokens,
        "generated_tokens": 4,
    }


@pytest.mark.parametrize("ask", [chat, complete])
@pytest.mark.parametrize("n", [1, 2])
def test_answers_and_streams(server, ask, n):
    # Choices that end at different times: where one ends, the other may still be running.
    more = {"n": n, "temperature": 1, "seed": 0, "extra_body": {**STEERED, "ignore_eos": False}}
    more["extra_body"]["vllm_xargs"] = {"steering": "truthful=0.25"}
    answer = ask(server.client, max_tokens=60, **more)
    expected = (answer.usage.prompt_tokens, answer.usage.completion_tokens - n)
    assert counts(receipt(answer)) == expected
    facts, usage = last(list(ask(server.client, max_tokens=60, **WHOLE, **more)))
    assert counts(facts) == (usage.prompt_tokens, usage.completion_tokens - n)


def test_several_prompts_are_summed_like_usage(server):
    more = {"prompt": [PROMPT, PROMPT + "user : claim : mira color blue . "], "n": 2}
    answer = complete(server.client, **more)
    assert counts(receipt(answer)) == (answer.usage.prompt_tokens, 4 * 4)
    facts, usage = last(list(complete(server.client, **WHOLE, **more)))
    assert counts(facts) == (usage.prompt_tokens, 4 * 4) == counts(receipt(answer))


def test_responses(server):
    answer = respond(server.client)
    prompt = answer.usage.input_tokens
    assert counts(receipt(answer)) == (prompt, answer.usage.output_tokens - 1)
    *events, end = respond(server.client, stream=True)
    assert end.type in ("response.completed", "response.incomplete")
    assert counts(receipt(end.response)) == (prompt, end.response.usage.output_tokens - 1)
    assert not any("grains" in event.to_json() for event in events)


@pytest.mark.parametrize(
    ("xargs", "prompt", "generated"),
    [
        ({"steering_positions": "prompt"}, None, 0),
        ({"steering_positions": "generation"}, 0, 4),
        ({"steering_positions": "prompt:3"}, 3, 0),
        ({"steering_positions": "generation:2"}, 0, 2),
        ({"steering_positions": "prompt:1+generation:9"}, 1, 4),
        # Five tokens count as prompt; the receipt goes by the request's own prompt all the same.
        ({"steering_positions": "generation", "steering_prompt_tokens": 5}, -5, 4),
        ({"steering_positions": "generation:3", "steering_prompt_tokens": 5}, 3, 0),
    ],
)
def test_positions(server, xargs, prompt, generated):
    answer = complete(
        server.client,
        extra_body={"vllm_xargs": {"steering": "truthful", **xargs}, "ignore_eos": True},
    )
    length = answer.usage.prompt_tokens
    expected = length if prompt is None else length + prompt if prompt < 0 else prompt
    assert counts(receipt(answer)) == (expected, generated)


def test_one_token_is_an_answer_without_steering(server):
    """The only token of the answer is made by the prompt, which is left alone."""
    xargs = {"steering": "truthful", "steering_positions": "generation"}
    answer = complete(server.client, max_tokens=1, extra_body={"vllm_xargs": xargs})
    assert receipt(answer)["steered"] and counts(receipt(answer)) == (0, 0)


def test_several_vectors(server):
    xargs = {"steering": "truthful=0.25,polite=0.125", "steering_layers": [1, 2]}
    facts = receipt(chat(server.client, extra_body={"vllm_xargs": xargs, "ignore_eos": True}))
    assert {vector["name"]: vector["strength"] for vector in facts["vectors"]} == {
        "truthful": 0.25,
        "polite": 0.125,
    }
    assert all(vector["layers"] == [1, 2] for vector in facts["vectors"])
    assert facts["generated_tokens"] == 4


def test_none_for_requests_that_are_not_steered(server):
    for extra_body in ({}, {"vllm_xargs": {"steering": "none"}}):
        for ask in (chat, complete, respond):
            assert receipt(ask(server.client, extra_body=extra_body)) is None
            for chunk in ask(server.client, extra_body=extra_body, stream=True):
                assert "grains" not in chunk.to_json()
    with pytest.raises(openai.BadRequestError) as refused:
        chat(server.client, extra_body={"vllm_xargs": {"steering": "nobody"}})
    assert "grains" not in refused.value.response.json()


def test_clients_that_assemble_streams(server):
    with server.client.chat.completions.stream(
        model="tiny:truthful", messages=MESSAGES, max_tokens=5
    ) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].finish_reason

    async def concurrently():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        async def one(strength):
            xargs = {"steering": f"truthful={strength}"}
            stream = await chat(
                client, stream=True, extra_body={"vllm_xargs": xargs, "ignore_eos": True}
            )
            facts = [found async for chunk in stream if (found := receipt(chunk))]
            return [fact["vectors"][0]["strength"] for fact in facts]

        return await asyncio.gather(*(one(strength / 8) for strength in range(1, 9)))

    assert asyncio.run(concurrently()) == [[strength / 8] for strength in range(1, 9)]


def test_anthropic_messages(server):
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    asked = {"model": "tiny:truthful", "max_tokens": 5, "messages": MESSAGES[1:]}
    answer = client.messages.create(**asked)
    prompt = answer.usage.input_tokens
    assert counts(receipt(answer)) == (prompt, answer.usage.output_tokens - 1)
    events = list(client.messages.create(**asked, stream=True))
    assert [event.type for event in events if receipt(event)] == ["message_delta"]
    assert counts(receipt(events[-2])) == (prompt, events[-2].usage.output_tokens - 1)
    with client.messages.stream(**asked) as stream:
        assert stream.get_final_message().stop_reason
    plain = client.messages.create(**{**asked, "model": "tiny"})
    assert receipt(plain) is None


def test_a_batch_of_chats(server):
    batch = httpx.post(
        f"{server.url}/v1/chat/completions/batch",
        json={"model": "tiny", "messages": [MESSAGES] * 3, "max_tokens": 5, **STEERED},
        timeout=60,
    ).json()
    assert counts(batch["grains"]) == (batch["usage"]["prompt_tokens"], 3 * 4)


def test_the_workers_count_the_same(server):
    """What a receipt says of tokens against what the layers were told to shift."""

    def shifted():
        time.sleep(1.1)  # the workers are asked once per second at most
        text = httpx.get(f"{server.url}/metrics").text
        return float(re.search(r"^grains:steered_tokens(?:\{.*\})? (.*)$", text, re.M)[1])

    before = shifted()
    total = 0
    for number, positions in enumerate(("all", "prompt:4", "generation:3", "prompt:2+generation")):
        # Less than a block each: nothing comes from the prefix cache.
        xargs = {"steering": "truthful", "steering_positions": positions}
        answer = complete(
            server.client,
            prompt=[[20 + number, *range(5, 25)], [30 + number, *range(5, 35)]],
            max_tokens=8,
            n=2,
            extra_body={"vllm_xargs": xargs, "ignore_eos": True},
        )
        facts = receipt(answer)
        # The prompt is computed for each of the answers.
        total += 2 * facts["prompt_tokens"] + facts["generated_tokens"]
    assert shifted() - before == total
