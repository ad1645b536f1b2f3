"""lm-evaluation-harness by itself: its own `local-completions`, with an alias as the model.

Its request body is fixed, so the alias is the only way in, and what it asks for are mostly
log-likelihoods of prompts. `grains evaluate`, which knows more, is tested in test_evaluate.py.
"""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grains_vllm.vectors import SteeringVector
from offline.steer import steered
from tests.server.serving import MODEL

pytestmark = pytest.mark.engine

TASK = """task: {name}
custom_dataset: !function made.made
output_type: {kind}
test_split: test
doc_to_text: "{{{{record}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: {metric}}}]
{more}
"""
MADE = """import datasets

RECORDS = [
    {"record": "system : honest quiet river . record : mira color red .", "answer": 0},
    {"record": "user : claim : mira color blue . mira color ?", "answer": 1},
    {"record": "the old river is quiet and the road", "answer": 0},
]


def made(**_):
    return {"test": datasets.Dataset.from_list(RECORDS)}
"""
SETTINGS = {"tiny": None, "tiny:truthful": "truthful", "tiny:polite": "polite"}


@pytest.fixture(scope="module")
def results(server, tmp_path_factory):
    """What lm-eval says of each of SETTINGS."""
    for name in ("lm_eval", "tenacity"):
        pytest.importorskip(name)
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    (folder / "made.py").write_text(MADE)
    choices = 'doc_to_choice: [" mira color red .", " mira blue"]'
    for name, kind, metric, more in (
        ("choices", "multiple_choice", "acc", choices),
        ("whole", "loglikelihood_rolling", "bits_per_byte", ""),
    ):
        text = TASK.format(name=name, kind=kind, metric=metric, more=more)
        if kind == "loglikelihood_rolling":  # the target is the text
            text = text.replace('doc_to_text: "{{record}}"', 'doc_to_text: ""')
            text = text.replace('doc_to_target: "{{answer}}"', 'doc_to_target: "{{record}}"')
        (folder / f"{name}.yaml").write_text(text)
    # Reading lm-eval's own 14 000 tasks takes longer than this test.
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return {
        name: lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": name,
                "base_url": f"{server.url}/v1/completions",
                "tokenizer": str(MODEL),
                "tokenizer_backend": "huggingface",
                "num_concurrent": 4,
                "max_length": 256,
            },
            tasks=["choices", "whole"],
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
        )
        for name in SETTINGS
    }


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@torch.no_grad()
def logp(model, server, name, ids, first):
    """Sum of the log-likelihoods of `ids` from the index `first` on."""
    context = nullcontext()
    if name is not None:
        vector = SteeringVector.load(server.log.with_name(f"{name}.safetensors"))
        context = steered(model, vector, 0.5)
    with context:
        rows = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return float(rows.gather(1, torch.tensor(ids[1:])[:, None])[first - 1 :].sum())


def test_log_likelihoods_are_those_of_the_steered_model(server, results, model):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def tokens(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    totals = []
    for setting, vector in SETTINGS.items():
        samples = results[setting]["samples"]
        total = 0.0
        for sample in samples["choices"]:
            for (context, choice), response in zip(
                sample["arguments"], sample["resps"], strict=True
            ):
                ids, first = tokens(context + choice), len(tokens(context))
                total += (found := float(response[0][0]))
                assert found == pytest.approx(logp(model, server, vector, ids, first), abs=2e-4)
        for sample in samples["whole"]:
            ids = [tokenizer.bos_token_id, *tokens(sample["arguments"][0][0])]
            total += (found := float(sample["resps"][0][0]))
            assert found == pytest.approx(logp(model, server, vector, ids, 1), abs=2e-4)
        totals.append(total)
    assert len({round(total) for total in totals}) == len(SETTINGS)  # it makes a difference
