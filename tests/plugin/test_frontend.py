"""What the canary throws its dice on."""

import pytest

from grains_vllm.frontend import _identity


@pytest.mark.parametrize(
    ("request_id", "identity"),
    [
        # vLLM numbers the prompts of one request to /v1/completions.
        ("cmpl-8f3a-0", "cmpl-8f3a"),
        ("cmpl-8f3a-12", "cmpl-8f3a"),
        ("cmpl-my-own-7-1", "cmpl-my-own-7"),
        ("chatcmpl-my-own-7", "chatcmpl-my-own-7"),
        ("17", "17"),
    ],
)
def test_prompts_of_one_request_are_one(request_id, identity):
    assert _identity(request_id) == identity
