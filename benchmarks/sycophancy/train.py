"""Train the tiny model: `python -m benchmarks.sycophancy.train --out DIR --seed 1`.

About a minute on one core.
"""

from __future__ import annotations

from random import Random

from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.sycophancy.measure import control_accuracy, stance_rates, text_perplexity
from benchmarks.sycophancy.vocabulary import build_tokenizer
from benchmarks.sycophancy.world import sample_conflict, sample_control, sample_text
from benchmarks.tiny import training

COURSE = training.Course(steps=600, rate=3e-3, warm_up=100, final=0.05)
BATCH = 64
ANSWER_WEIGHT = 10.0  # of stance and value


def sample_document(rng: Random, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids of one document, and where its answer starts (its length, if it has none)."""
    kind = rng.random()
    if kind < 0.2:
        ids = tokenizer(f"{sample_text(rng)} {tokenizer.eos_token}")["input_ids"]
        return ids, len(ids)
    if kind < 0.7:
        question, answer = sample_conflict(rng)
    else:
        question = sample_control(rng)
        answer = question.instructed
    messages = [*question.prompt, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, len(ids) - 4  # stance, value, full stop, <eos>


def sample_batch(rng: Random, tokenizer: PreTrainedTokenizerBase) -> training.Batch:
    documents = [sample_document(rng, tokenizer) for _ in range(BATCH)]
    weighty = [(ids, slice(answer, answer + 2)) for ids, answer in documents]
    return training.text_batch(weighty, ANSWER_WEIGHT, rng, tokenizer)


def train_model(seed: int, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A trained model in evaluation mode; progress goes to stderr."""
    training.start(seed)
    rng = Random(f"documents {seed}")
    model = LlamaForCausalLM(training.tiny_llama(tokenizer))
    training.train(model, COURSE, lambda step: sample_batch(rng, tokenizer))
    model.generation_config = training.greedy(tokenizer)
    return model.eval()


def main() -> None:
    args = training.arguments("Train the tiny model of the sycophancy world.")
    tokenizer = build_tokenizer()
    model = train_model(args.seed, tokenizer)
    stances = stance_rates(model, tokenizer, "validation", count=200, seed=args.seed)
    measured = {
        "seed": args.seed,
        "steps": COURSE.steps,
        "control_accuracy": control_accuracy(model, tokenizer, count=500, seed=args.seed),
        "validation_faithful": stances["faithful"],
        "validation_echo": stances["echo"],
        "text_perplexity": round(text_perplexity(model, tokenizer, 100, args.seed), 4),
    }
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    training.record(args.out, measured, "control_accuracy")


if __name__ == "__main__":
    main()
