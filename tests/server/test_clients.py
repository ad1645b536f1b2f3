"""Programs that others wrote, as they are: the official openai client and vLLM's own benchmark.

Whatever form a request takes, its log-probabilities are those of one greedy decoding with
transformers and hooks.
"""

import asyncio
import json
import re

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.server import environment
from grains_vllm.vectors import SteeringVector
from offline.steer import steered
from tests.server.serving import MODEL
from tests.warm import run_python

pytestmark = pytest.mark.engine

MESSAGES = [
    {"role": "system", "content": "honest quiet river agreeable . record : mira color red ."},
    {"role": "user", "content": "claim : mira color blue . mira color ?"},
]
TOLERANCE = 1e-4
TOKENS = 16  # the least that the responses endpoint can be asked for
# What a request says, and what it means: vector, strength, positions.
HOW = {
    "plain": ({"model": "tiny"}, None),
    "alias": ({"model": "tiny:truthful"}, ("truthful", 0.5, "all")),
    "extra body": (
        {"model": "tiny", "extra_body": {"vllm_xargs": {"steering": "polite=0.8"}}},
        ("polite", 0.8, "all"),
    ),
    "both": (
        {
            "model": "tiny:truthful",
            "extra_body": {"vllm_xargs": {"steering_positions": "prompt:1+generation"}},
        },
        ("truthful", 0.5, "prompt:1+generation"),
    ),
}


@pytest.fixture(scope="module")
def prompts(server):
    """The tokens that each endpoint makes of MESSAGES, or that it is sent."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # vLLM lets the tokenizer write a second BOS here, or not: it is asked.
    answer = server.client.responses.create(
        model="tiny", input=MESSAGES, extra_body={"enable_response_messages": True}
    )
    return {
        "chat": ids,
        "completions": ids,
        "responses": answer.model_extra["input_messages"][0]["tokens"],
    }


@pytest.fixture(scope="module")
def expected(server, prompts):
    """By HOW and endpoint: the log-probabilities of the greedy answer's tokens."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    found = {
        endpoint: [_decode(server, model, ids, meaning) for _, meaning in HOW.values()]
        for endpoint, ids in prompts.items()
    }
    for rows in map(torch.tensor, found.values()):
        # Equality below means something: no two ways of steering come near each other.
        assert (torch.cdist(rows, rows) + torch.eye(len(rows))).min() > 0.1
    return {
        (how, endpoint): logprobs
        for endpoint, rows in found.items()
        for how, logprobs in zip(HOW, rows, strict=True)
    }


@torch.no_grad()
def _decode(server, model, prompt, meaning):
    ids, logprobs = list(prompt), []
    for _ in range(TOKENS):
        if meaning is None:
            logits = model(torch.tensor([ids])).logits
        else:
            name, strength, positions = meaning
            vector = SteeringVector.load(server.log.with_name(f"{name}.safetensors"))
            with steered(model, vector, strength, positions=positions, prompt_length=len(prompt)):
                logits = model(torch.tensor([ids])).logits
        best = logits[0, -1].log_softmax(-1).max(0)
        ids.append(int(best.indices))
        logprobs.append(float(best.values))
    return logprobs


# Per endpoint: the client's method, what to ask, and the log-probabilities of a whole answer or of
# one piece of a stream.
def _chat_logprobs(piece):
    parts = [choice.logprobs.content for choice in piece.choices if choice.logprobs]
    return [token.logprob for content in parts for token in content or []]


def _completion_logprobs(piece):
    parts = [choice.logprobs for choice in piece.choices if choice.logprobs]
    return [logprob for part in parts for logprob in part.token_logprobs]


def _response_logprobs(piece):
    if hasattr(piece, "output"):
        return [token.logprob for token in piece.output[0].content[0].logprobs]
    if piece.type == "response.output_text.delta":
        return [token.logprob for token in piece.logprobs]
    return []


ENDPOINTS = {
    "chat": (
        lambda client: client.chat.completions.create,
        {"messages": MESSAGES, "max_tokens": TOKENS, "logprobs": True},
        _chat_logprobs,
    ),
    "completions": (
        lambda client: client.completions.create,
        {"max_tokens": TOKENS, "logprobs": 0},
        _completion_logprobs,
    ),
    "responses": (
        lambda client: client.responses.create,
        {
            "input": MESSAGES,
            "max_output_tokens": TOKENS,
            "include": ["message.output_text.logprobs"],
        },
        _response_logprobs,
    ),
}


def _body(endpoint, how, prompts, **more):
    asked, _ = HOW[how]
    body = {**ENDPOINTS[endpoint][1], **asked, "temperature": 0, **more}
    # A token without text, such as EOS, would leave no trace in a stream of responses.
    whole = {"ignore_eos": True, "skip_special_tokens": False}
    body["extra_body"] = {**whole, **asked.get("extra_body", {})}
    return {**body, "prompt": prompts[endpoint]} if endpoint == "completions" else body


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("how", HOW)
def test_the_client(server, expected, prompts, how, endpoint, stream):
    create, _, read = ENDPOINTS[endpoint]
    answer = create(server.client)(**_body(endpoint, how, prompts, stream=stream))
    pieces = list(answer) if stream else [answer]
    found = [logprob for piece in pieces for logprob in read(piece)]
    assert found == pytest.approx(expected[how, endpoint], abs=TOLERANCE)


def test_the_async_client_asks_all_of_it_at_once(server, expected, prompts):
    cases = [
        (how, endpoint, stream) for how in HOW for endpoint in ENDPOINTS for stream in (False, True)
    ]

    async def ask(client, how, endpoint, stream):
        create, _, read = ENDPOINTS[endpoint]
        answer = await create(client)(**_body(endpoint, how, prompts, stream=stream))
        pieces = [piece async for piece in answer] if stream else [answer]
        return [logprob for piece in pieces for logprob in read(piece)]

    async def ask_all():
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, *case) for case in cases))

    for case, found in zip(cases, asyncio.run(ask_all()), strict=True):
        assert found == pytest.approx(expected[case[:2]], abs=TOLERANCE), case


def test_an_async_error_is_the_clients_own_exception(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await client.responses.create(
                model="tiny", input="x", extra_body={"vllm_xargs": {"steering": "nobody"}}
            )

    with pytest.raises(openai.BadRequestError, match="unknown vector 'nobody'"):
        asyncio.run(ask())


PROMPTS = 6


@pytest.fixture(scope="module")
def bench(server, tmp_path_factory):
    """bench(*flags) -> what `vllm bench serve` found, the answers' texts among it."""
    folder = tmp_path_factory.mktemp("bench")

    def run(*flags):
        done = run_python(
            *("-m", "vllm.entrypoints.cli.main", "bench", "serve", "--base-url", server.url),
            *("--tokenizer", MODEL, "--dataset-name", "random", "--seed", "0"),
            *("--random-input-len", "24", "--random-output-len", "12"),
            *("--num-prompts", PROMPTS, "--temperature", "0", "--disable-tqdm"),
            *("--save-result", "--save-detailed", "--result-dir", folder),
            *("--result-filename", "result.json", *flags),
            environment=environment(),
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").unlink()
        assert (result["completed"], result["failed"]) == (PROMPTS, 0), result["errors"]
        return result

    return run


def _counted(server):
    """How many requests the server has steered with `truthful`."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    found = re.findall(r'^grains:requests_total\{.*vector="truthful".*\} (.*)$', text, re.MULTILINE)
    return sum(map(float, found))


def test_vllm_bench_measures_steered_requests(server, bench):
    """The same prompts each time: what the answers say tells how they were steered."""
    before = _counted(server)
    plain = bench("--model", "tiny")["generated_texts"]
    alias = bench("--model", "tiny:truthful")["generated_texts"]
    fields = {"vllm_xargs": {"steering": "truthful", "steering_strength": 0.5}}
    extra = bench("--model", "tiny", "--extra-body", json.dumps(fields))["generated_texts"]
    assert alias == extra
    assert all(mine != theirs for mine, theirs in zip(alias, plain, strict=True))
    # What the benchmark calls LoRA modules are just names of models, and aliases are such.
    modules = ("--lora-modules", "tiny:truthful", "tiny", "--lora-assignment", "round-robin")
    mixed = bench("--model", "tiny", *modules)["generated_texts"]
    assert mixed == [(plain if n % 2 else alias)[n] for n in range(PROMPTS)]
    assert _counted(server) - before == 2.5 * PROMPTS
