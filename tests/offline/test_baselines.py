"""Baselines and objectives, down to the numbers of a record."""

import pytest
import torch

from offline.baselines import baseline_embedding, mask_embedding
from offline.errors import InputError
from offline.extract import extract
from offline.options import Baseline, ExtractOptions, Mask, Objective
from offline.pairs import load_pairs
from offline.prompts import tokenise
from tests.offline.worlds import build_decoder, rows, write_jsonl

REDUCE = {
    Objective.mean: torch.mean,
    Objective.sum: torch.sum,
    Objective.first_token: lambda logps: logps[0],
}


@pytest.fixture
def decoder():
    return build_decoder("llama")


def log_likelihoods(decoder, prompt, response):
    """log p of every response token by an ordinary forward of token ids."""
    with torch.no_grad():
        logits = decoder.model(input_ids=torch.tensor([prompt + response])).logits[0]
    scores = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
    return scores.gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("objective", Objective)
def test_f_of_input_and_baseline_as_ordinary_forwards_have_them(decoder, tmp_path, objective):
    data = load_pairs(str(write_jsonl(tmp_path / "x.jsonl", rows(5))))
    options = ExtractOptions(objective=objective, baseline=Baseline.mask_token)
    _, records = extract(decoder, data, options)
    mask = decoder.tokenizer.mask_token_id
    for pair, record in zip(data.pairs, records, strict=True):
        tokens = tokenise(pair, decoder.tokenizer)
        prompts = {
            "f_input": tokens.prompt_ids,
            # The baseline prompt is a row of mask tokens, which token ids can say as well.
            "f_baseline": [mask] * len(tokens.prompt_ids),
        }
        for name, prompt in prompts.items():
            plus, minus = (
                REDUCE[objective](log_likelihoods(decoder, prompt, response))
                for response in (tokens.chosen_ids, tokens.rejected_ids)
            )
            assert record[name] == pytest.approx(float(plus - minus), abs=1e-4)


def test_the_mask_tokens_embedding(decoder):
    row = decoder.model.get_input_embeddings().weight[decoder.tokenizer.mask_token_id]
    assert torch.equal(baseline_embedding(decoder, Baseline.mask_token), row)
    other = torch.zeros(32)
    assert torch.equal(mask_embedding(decoder, Mask.mask_token, other), row)
    assert mask_embedding(decoder, Mask.baseline, other) is other


def test_tokenizers_without_the_token_are_refused(decoder):
    decoder.tokenizer.mask_token = None
    message = "tokenizer of model 'llama' has no mask_token"
    with pytest.raises(InputError, match=f"--baseline mask-token: the {message}"):
        baseline_embedding(decoder, Baseline.mask_token)
    with pytest.raises(InputError, match=f"--mask mask-token: the {message}"):
        mask_embedding(decoder, Mask.mask_token, torch.zeros(32))


def test_tokens_beyond_the_embeddings_are_refused(decoder):
    decoder.tokenizer.add_special_tokens({"mask_token": "<late>"})
    with pytest.raises(
        InputError, match=r"the mask_token of model 'llama' has id 69, beyond its 69"
    ):
        baseline_embedding(decoder, Baseline.mask_token)
