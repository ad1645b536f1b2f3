"""Steering together with vLLM's other features, each against the same reference as steering alone.

docs/features.md is the table of what is proved here, by hand, or refused at start.
"""

from functools import cache

import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.engine.conftest import run_job
from tests.engine.jobs import prompt
from tests.engine.reference import chosen_logprobs, token_logits
from tests.tiny import VOCAB, build_model, save_world

pytestmark = pytest.mark.engine
TOLERANCE = 1e-4
NEW = 12  # generated tokens

# Unsteered next to every kind of positions, a composition and narrowed layers.
STEERINGS = [
    None,
    {"steering": "a"},
    {"steering": "c"},
    None,
    {"steering": "d"},
    {"steering": "a=0.25", "steering_positions": "generation:4"},
    {"steering": "a=-0.3,b=1.5", "steering_layers": 1},
    {"steering": "a=2", "steering_positions": "prompt:3+generation"},
]
REGEX, LETTERS = "[a-d]{6}", [2 + ord(letter) - ord("!") for letter in "abcd"]


def asked(number, extra_args, length=70, **more):
    return {"prompt": prompt(number, length), "extra_args": extra_args, "max_tokens": NEW, **more}


def looping(number, extra_args):
    """A prompt that repeats itself, so that n-grams have something to propose."""
    return asked(number, extra_args) | {"prompt": (prompt(number, 9) * 8)[:70], "max_tokens": 40}


MIXED = [asked(number, args, 90) for number, args in enumerate(STEERINGS)]
SCORED = [{**request, "prompt_logprobs": 0} for request in MIXED]
LOOPING = [looping(number, args) for number, args in enumerate(STEERINGS)]
FEW = slice(3, None)  # for the V2 runner, whose interpreter takes long
GRAMMAR = [
    asked(5, {"steering": "a"}, 40, regex=REGEX),
    asked(6, None, 40, regex=REGEX),
    asked(7, {"steering": "d"}, 40),
]
SEVERAL = [
    asked(3, {"steering": "a"}, 60, n=3, temperature=1.0),
    asked(4, None, 60, n=3, temperature=1.0),
]
BEAM = prompt(1, 40)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny Llama with a tokenizer of single characters, an adapter, and two relatives of it."""
    folder = tmp_path_factory.mktemp("features")
    catalogue = save_world(folder, "llama")
    (folder / "default.yaml").write_text(catalogue.read_text() + "default: a\n")
    tokenizer = characters()
    tokenizer.save_pretrained(folder / "llama")
    for seed, relative in enumerate(("draft", "other")):
        model = build_model("llama")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.02 * torch.randn(weight.shape, generator=generator)
        model.save_pretrained(folder / relative)
        tokenizer.save_pretrained(folder / relative)
    torch.manual_seed(1)
    projections = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    settings = peft.LoraConfig(r=4, target_modules=projections, init_lora_weights=False)
    peft.get_peft_model(build_model("llama"), settings).save_pretrained(folder / "adapter")
    return folder


def characters():
    vocab = {"<bos>": 0, "<eos>": 1}
    for code in range(ord("!"), 127):
        vocab[chr(code)] = len(vocab)
    vocab["\u0120"] = len(vocab)  # How byte-level vocabularies write a space.
    for rest in range(len(vocab), VOCAB):
        vocab[f"<{rest}>"] = rest
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def weights(world):
    """weights(name) -> the transformers model: "llama", a relative, or the merged "adapter"."""

    @cache
    def load(name):
        model = build_model("llama")
        if name == "adapter":
            return peft.PeftModel.from_pretrained(model, world / name).merge_and_unload().eval()
        return type(model).from_pretrained(world / name).eval()

    return load


@pytest.fixture(scope="module")
def engine(world):
    """engine(name) -> answers by step and vLLM's counters, from one real run."""

    @cache
    def run(name):
        settings, steps = engines(world)[name]
        runner = settings.pop("runner", "v1")
        grains = {"grains": {"config": str(world / "llama.yaml")}}
        job = {
            "model": str(world / "llama"),
            "runner": runner,
            "engine": {"additional_config": grains, **settings},
            "steps": steps,
        }
        return run_job(world / name, job, module="tests.engine.features_process")

    return run


def engines(world):
    """Settings and steps of every engine that is started here."""
    adapted = [
        {
            **request,
            "extra_args": request["extra_args"] or {"steering": "none"},
            "lora": str(world / "adapter") if number % 2 else None,
        }
        for number, request in enumerate(MIXED + MIXED[1:])
    ]
    steered = {"grains": {"config": str(world / "default.yaml")}}
    common = {"mixed": {"requests": SCORED}, "grammar": {"requests": GRAMMAR}}
    drafted = {"looping": {"requests": LOOPING}, "grammar": {"requests": GRAMMAR}}
    parallel = {
        **common,
        "several": {"requests": SEVERAL},
        "first": {"requests": MIXED},
        "cached": {"requests": MIXED, "fresh_cache": False},
    }
    ngram = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    model = {"method": "draft_model", "model": str(world / "draft")}
    return {
        "alone": (
            {},
            {
                **common,
                "several": {"requests": SEVERAL},
                "looping": {"requests": LOOPING},
                "reload": {"rpc": "reload_weights", "kwargs": {"weights_path": f"{world}/other"}},
                "reloaded": {"requests": SCORED[::-1]},
            },
        ),
        # Two places for adapters: with one, vLLM's CPU kernels take the adapter of row -1, which
        # is the only one, for requests without any.
        "lora": (
            {
                "enable_lora": True,
                "max_lora_rank": 8,
                "max_loras": 2,
                "additional_config": steered,
            },
            {
                "adapted": {"requests": adapted},
                "beams": {"beam": 3, "requests": [{"prompt": BEAM}]},
            },
        ),
        "ngram": ({"speculative_config": {**ngram, "num_speculative_tokens": 3}}, drafted),
        # The host takes every draft for accepted until the next step has been sent off.
        "ahead": (
            {
                "speculative_config": {**model, "num_speculative_tokens": 3},
                "async_scheduling": True,
            },
            drafted,
        ),
        "ahead, V2 runner": (
            {
                "runner": "v2",
                "speculative_config": {**model, "num_speculative_tokens": 3},
                "async_scheduling": True,
            },
            {"looping": {"requests": LOOPING[FEW]}},
        ),
        "tensor": ({"tensor_parallel_size": 2}, parallel),
        # Not eager: on CPUs, vLLM prepares the later stages in the warm-up for compilation.
        "pipeline": (
            {
                "pipeline_parallel_size": 2,
                "forked_workers": True,
                "enforce_eager": False,
                "compilation_config": {"mode": 2, "backend": "eager"},
            },
            parallel,
        ),
    }


def errors(model, requests, answers):
    """Per request, the largest |log-probability - reference| over all its tokens and samples."""
    worst = []
    for request, answer in zip(requests, answers, strict=True):
        for one in answer["samples"]:
            ids, border = request["prompt"] + one["tokens"], len(request["prompt"])
            logits = token_logits("llama", model, ids, border, request["extra_args"])
            if "regex" in request:
                logits = logits + allowed(logits, border)
            found = torch.tensor(answer["prompt_logprobs"] + one["logprobs"])
            expected = chosen_logprobs(logits, ids)[-len(found) :]
            worst.append((found - expected).abs().max().item())
    return worst


def allowed(logits, border):
    """What REGEX adds to the logits: six of its letters, then the end."""
    mask = torch.full_like(logits, -torch.inf)
    mask[: border - 1] = 0
    mask[border - 1 : border + 5, LETTERS] = 0
    mask[border + 5 :, 1] = 0
    return mask


def check(label, model, requests, answers):
    worst = max(errors(model, requests, answers))
    print(f"{label}: float32 max error {worst:.1e}")
    assert worst < TOLERANCE


@pytest.mark.parametrize("step", ["mixed", "grammar", "several"])
@pytest.mark.parametrize("name", ["alone", "tensor", "pipeline"])
def test_prompt_logprobs_grammars_and_several_samples(engine, weights, name, step):
    requests = {"mixed": SCORED, "grammar": GRAMMAR, "several": SEVERAL}[step]
    answers = engine(name)[step]["answers"]
    check(f"{name}, {step}", weights("llama"), requests, answers)
    if step == "grammar":
        assert all(set(answer["text"]) <= set("abcd") for answer in answers[:2])
    if step == "several":
        assert all(len({tuple(one["tokens"]) for one in got["samples"]}) == 3 for got in answers)


@pytest.mark.parametrize("name", ["tensor", "pipeline"])
def test_parallel_ranks_answer_alike_from_the_prefix_cache(engine, weights, name):
    result = engine(name)
    cold, warm = result["first"]["answers"], result["cached"]["answers"]
    check(f"{name}, cached", weights("llama"), MIXED, warm)
    assert {answer["cached"] for answer in cold} == {0}
    assert {answer["cached"] for answer in warm} == {64}  # of 90 tokens, in blocks of 32


def test_base_vectors_steer_requests_with_an_adapter(engine, weights):
    answers = engine("lora")["adapted"]["answers"]
    requests = MIXED + MIXED[1:]
    check("lora, adapted", weights("adapter"), requests[1::2], answers[1::2])
    check("lora, base", weights("llama"), requests[0::2], answers[0::2])
    assert max(errors(weights("llama"), requests[1::2], answers[1::2])) > 0.1


def test_beam_search_takes_the_servers_default(engine, weights):
    (beams,) = engine("lora")["beams"]["beams"]
    assert len(beams) == 3
    for beam in beams:
        scores = {
            name: chosen_logprobs(
                token_logits("llama", weights("llama"), beam["tokens"], len(BEAM), args),
                beam["tokens"],
            )[len(BEAM) - 1 :].sum()
            for name, args in {"plain": None, "steered": {"steering": "a"}}.items()
        }
        assert abs(beam["score"] - scores["steered"]) < TOLERANCE
        assert abs(beam["score"] - scores["plain"]) > 0.1


@pytest.mark.parametrize("name", ["ngram", "ahead", "ahead, V2 runner"])
def test_drafts_change_nothing(engine, weights, name):
    """Drafts are accepted at times and rejected at times; windows end at the right token."""
    result, plain = engine(name), engine("alone")
    counters = result["counters"]
    drafted = counters["vllm:spec_decode_num_draft_tokens"]
    assert 0 < counters["vllm:spec_decode_num_accepted_tokens"] < drafted
    for step, requests in {"looping": LOOPING, "grammar": GRAMMAR}.items():
        if step not in result:
            continue
        answers, expected = result[step]["answers"], plain[step]["answers"]
        if name == "ahead, V2 runner":
            requests, expected = requests[FEW], expected[FEW]
        check(f"{name}, {step}", weights("llama"), requests, answers)
        for mine, theirs in zip(answers, expected, strict=True):
            assert mine["tokens"] == theirs["tokens"]
            torch.testing.assert_close(
                torch.tensor(mine["logprobs"]), torch.tensor(theirs["logprobs"]), rtol=0, atol=1e-5
            )


def test_weights_that_are_loaded_anew_are_steered(engine, weights):
    answers = engine("alone")["reloaded"]["answers"]
    check("reloaded", weights("other"), SCORED[::-1], answers)
    assert max(errors(weights("llama"), SCORED[::-1], answers)) > 0.1
