"""The served log-probabilities equal a transformers forward with the shift in hooks."""

import pytest
import torch

from tests.engine.jobs import EIGHT, prompt
from tests.engine.reference import token_logprobs
from tests.server.serving import MODEL, serve
from tests.tiny import save_world

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_served_logprobs_equal_transformers(name, tmp_path):
    catalogue = save_world(tmp_path, name)
    default = {"steering": "b"} if name == "gpt2" else None
    if default:
        catalogue.write_text(catalogue.read_text() + "default: b\n")
    # The tiny world's tokenizer only dresses up the ids that are sent; both have room for 128.
    with serve(tmp_path / name, catalogue, "--tokenizer", str(MODEL)) as server:
        for seed, asked in enumerate([None, {"steering": "none"}, *EIGHT]):
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
            expected = token_logprobs(name, tokens, generated, _meaning(asked, default))
            found = torch.tensor(answer.logprobs.token_logprobs[1:])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def _meaning(asked, default):
    """The steering that the reference applies for what the request says."""
    if asked is None:
        return default
    return None if asked["steering"] == "none" else asked
