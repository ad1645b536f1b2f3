"""The served log-probabilities equal a transformers forward with the shift in hooks.

Here for GPT-2's way of handing on the residual stream; test_parallel.py does it for Llama's.
"""

import pytest
import torch

from tests.engine.jobs import EIGHT, prompt
from tests.engine.reference import token_logprobs
from tests.server.serving import MODEL, serve
from tests.tiny import save_world

pytestmark = pytest.mark.engine

# Those that say nothing get the server's default.
MEANINGS = [(None, {"steering": "b"}), ({"steering": "none"}, None), *((one, one) for one in EIGHT)]


def test_served_logprobs_equal_transformers(tmp_path):
    catalogue = save_world(tmp_path, "gpt2")
    catalogue.write_text(catalogue.read_text() + "default: b\n")
    # The tiny world's tokenizer only dresses up the ids that are sent; both have room for 128.
    with serve(tmp_path / "gpt2", catalogue, "--tokenizer", str(MODEL)) as server:
        for seed, (asked, meaning) in enumerate(MEANINGS):
            tokens = prompt(seed)
            answer = server.client.completions.create(
                model="tiny",
                prompt=tokens,
                max_tokens=4,
                temperature=0,
                echo=True,
                logprobs=0,
                extra_body={
                    "ignore_eos": True,
                    "return_token_ids": True,
                    **({"vllm_xargs": asked} if asked else {}),
                },
            ).choices[0]
            generated = answer.token_ids[-4:]
            expected = token_logprobs("gpt2", tokens, generated, meaning)
            found = torch.tensor(answer.logprobs.token_logprobs[1:])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
