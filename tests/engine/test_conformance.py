"""Both of vLLM's model runners give every token of every batch the same steering, bit for bit.

The same requests in two real engines: prompts in chunks, answers thrown out of the KV cache and
computed again, cancellations at every stage, windows, sums of vectors, all of it in mixed batches.
"""

import pytest
import torch

from tests.engine.conftest import run_job
from tests.engine.jobs import CROWDED_BLOCKS, prompt
from tests.engine.reference import terms_of, token_logprobs
from tests.tiny import HIDDEN, LAYERS

pytestmark = pytest.mark.engine

KINDS = [
    {"steering": "a", "steering_positions": "generation:30"},
    {"steering": "a=-0.4", "steering_positions": "prompt"},
    None,
    {"steering": "b=1", "steering_positions": "prompt:1+generation"},
    {"steering": "c=0.3,d", "steering_positions": "generation"},
    {"steering": "a", "steering_layers": [2]},
    {"steering": "d,b=0.7,a=-0.2", "steering_positions": "prompt:20+generation:7"},
    {"steering": "d"},
    None,
    {"steering": "a=0.6", "steering_positions": "prompt:5"},
]
# Prompts longer and shorter than a step's tokens; they need several times the KV cache there is.
# One is cancelled in the middle of its prompt, one in the middle of its answer, one before both.
REQUESTS = [
    {"prompt": prompt(20, 110), "extra_args": KINDS[3], "max_tokens": 9, "cancelled": 2},
    {"prompt": prompt(21, 30), "extra_args": KINDS[6], "max_tokens": 60, "cancelled": 30},
    *(
        {
            "prompt": prompt(seed, 20 + (37 * seed) % 90),
            "extra_args": kind,
            "max_tokens": 40 + 5 * (seed % 4),
            "arrives": 3 * (seed // 4),
        }
        for seed, kind in enumerate(KINDS)
    ),
    {"prompt": prompt(22, 50), "extra_args": KINDS[0], "max_tokens": 9, "cancelled": 0},
]


@pytest.fixture(scope="module")
def results(worlds):
    yaml = worlds / "conformance.yaml"
    yaml.write_text((worlds / "llama.yaml").read_text().replace("slots: 4", "slots: 8"))
    job = {
        "model": str(worlds / "llama"),
        "engine": {
            "dtype": "float32",
            "enforce_eager": True,
            "max_num_batched_tokens": 48,
            "num_gpu_blocks_override": CROWDED_BLOCKS,
            "disable_log_stats": False,
            "additional_config": {"grains": {"config": str(yaml)}},
        },
        "requests": REQUESTS,
    }
    return {
        runner: run_job(
            worlds / f"conformance-{runner}",
            {**job, "runner": runner},
            module="tests.engine.trace_process",
        )
        for runner in ("v1", "v2")
    }


def test_the_trace_holds_what_it_should(results):
    for result in results.values():
        assert result["preemptions"] > 0
        assert result["left"] == {"requests": 0, "slots_in_use": 0}
        cancelled = {str(i) for i, request in enumerate(REQUESTS) if "cancelled" in request}
        assert set(result["answers"]) == {str(i) for i in range(len(REQUESTS))} - cancelled
        steps = result["steps"]
        seen = {owner for step in steps for owner, *_ in step["rows"]}
        assert len(seen & cancelled) == 2
        chunks = [sum(owner == "0" for owner, *_ in step["rows"]) for step in steps[:2]]
        assert 0 < sum(chunks) < 110, "cancelled in the middle of its prompt"
        assert max(len({owner for owner, *_ in step["rows"]}) for step in steps) > 4
        assert any(not step["rows"] for step in steps), "dummy batches"


def test_every_row_of_every_batch_is_equal_bit_for_bit(results):
    v1, v2 = (results[runner]["steps"] for runner in ("v1", "v2"))
    assert len(v1) == len(v2)
    reordered = 0
    for one, two in zip(v1, v2, strict=True):
        # Each runner orders its batch in its own way; who gets what at which position is compared.
        assert sorted(one["rows"]) == sorted(two["rows"])
        assert one["tail"] == two["tail"] == 0
        reordered += one["rows"] != two["rows"]
    print(f"{len(v1)} batches, {reordered} of them in another order")


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_every_token_is_given_what_an_independent_count_says(results, runner):
    probe = torch.arange(1.0, HIDDEN + 1).double()
    due: dict[str, torch.Tensor] = {}
    for number, request in enumerate(REQUESTS):
        length = len(request["prompt"]) + request["max_tokens"]
        due[str(number)] = torch.zeros(length, LAYERS["llama"], dtype=torch.float64)
        if request["extra_args"]:
            for term in terms_of("llama", len(request["prompt"]), length, request["extra_args"]):
                for layer in term.layers:
                    due[str(number)][term.steered, layer] += term.added[layer] @ probe
    found: dict[str, set[int]] = {owner: set() for owner in due}
    for step in results[runner]["steps"]:
        if not step["rows"]:
            continue
        expected = torch.stack([due[owner][position] for owner, position, *_ in step["rows"]])
        added = torch.tensor(step["added"], dtype=torch.float64)
        torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-3)
        for owner, position, *_ in step["rows"]:
            found[owner].add(position)
    for owner in results[runner]["answers"]:  # All but the last token, which is never fed back.
        assert found[owner] == set(range(len(due[owner]) - 1))


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_answers_are_those_of_the_reference(results, runner):
    worst = 0.0
    for owner, got in results[runner]["answers"].items():
        asked = REQUESTS[int(owner)]
        expected = token_logprobs("llama", asked["prompt"], got["tokens"], asked["extra_args"])
        found = torch.tensor(got["logprobs"])
        worst = max(worst, (found - expected[len(asked["prompt"]) - 1 :]).abs().max().item())
    print(f"max error after preemption, {runner}: {worst}")
    assert worst < 1e-4
