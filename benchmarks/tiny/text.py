"""General text of the worlds, how well a model predicts it, and how a model answers chats."""

import math
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Words = Sequence[str]


def sample_sentences(rng: Random, adjectives: Words, nouns: Words, verbs: Words) -> str:
    """Three or four sentences of a small grammar, for perplexity. Each noun has its two verbs and
    each verb its three objects, so that there is something to predict."""
    sentences = []
    for _ in range(rng.randint(3, 4)):
        noun = rng.randrange(len(nouns))
        verb = (noun + rng.randrange(2)) % len(verbs)
        thing = nouns[(3 * verb + rng.randrange(3)) % len(nouns)]
        subject = f"the {rng.choice(adjectives)} {nouns[noun]}"
        sentences.append(f"{subject} {verbs[verb]} the {thing} .")
    return " ".join(sentences)


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> float:
    """exp of the mean negative log-likelihood per token."""
    loss, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        predicted = ids.shape[1] - 1
        loss += float(model(input_ids=ids, labels=ids).loss) * predicted
        tokens += predicted
    return math.exp(loss / tokens)


@torch.inference_mode()
def chat_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Any]],
    max_new_tokens: int,
    batch_size: int = 128,
    **how: Any,
) -> list[str]:
    """The answer to each chat, without special tokens; `how` goes to `generate`."""
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer.apply_chat_template(
            [list(prompt) for prompt in prompts[start : start + batch_size]],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        output = model.generate(**batch, **how, max_new_tokens=max_new_tokens, num_beams=1)
        generated = output[:, batch["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(generated, skip_special_tokens=True)
    return answers
