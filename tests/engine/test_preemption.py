"""Requests that lose their KV in the middle of an answer and are computed again."""

import pytest
import torch

from tests.engine.conftest import run_job
from tests.engine.jobs import CROWDED, CROWDED_BLOCKS
from tests.engine.reference import token_logprobs

pytestmark = pytest.mark.engine


def test_a_generated_token_stays_a_generated_token(worlds):
    result = run_job(
        worlds / "crowded",
        {
            "model": str(worlds / "llama"),
            "engine": {
                "dtype": "float32",
                "enforce_eager": True,
                "num_gpu_blocks_override": CROWDED_BLOCKS,
                "disable_log_stats": False,
                "additional_config": {"grains": {"config": str(worlds / "llama.yaml")}},
            },
            "batches": {"crowded": {"requests": CROWDED}},
        },
    )
    print(f"preemptions: {result['metrics']['vllm:num_preemptions']}")
    assert result["metrics"]["vllm:num_preemptions"] > 0
    worst = 0.0
    for asked, got in zip(CROWDED, result["crowded"]["answers"], strict=True):
        expected = token_logprobs("llama", asked["prompt"], got["tokens"], asked["extra_args"])
        found = torch.tensor(got["logprobs"])
        worst = max(worst, (found - expected[len(asked["prompt"]) - 1 :]).abs().max().item())
    print(f"max error after preemption: {worst}")
    assert worst < 1e-4
