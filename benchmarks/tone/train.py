"""Train the model of the tone world: `python -m benchmarks.tone.train --out DIR --seed 1`.

About a minute on one core. The same tiny Llama as in the sycophancy world.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.tiny import training
from benchmarks.tone.documents import sample_control, sample_reply, sample_text
from benchmarks.tone.measure import answers, control_accuracy, judge, text_perplexity
from benchmarks.tone.vocabulary import build_tokenizer
from benchmarks.tone.world import sample_pairs

COURSE = training.Course(steps=800, rate=3e-3, warm_up=100, final=0.05)
BATCH = 64
ANSWER_WEIGHT = 5.0


def sample_document(rng: Random, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids of one document, and where its answer starts (its length, if it has none)."""
    kind = rng.random()
    if kind < 0.15:
        ids = tokenizer(f"{sample_text(rng)} {tokenizer.eos_token}")["input_ids"]
        return ids, len(ids)
    if kind < 0.7:
        question, answer = sample_reply(rng)
    else:
        question = sample_control(rng)
        answer = question.instructed
    messages = [*question.prompt, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, len(ids) - len(answer.split()) - 1  # the answer, then <eos>


def sample_batch(rng: Random, tokenizer: PreTrainedTokenizerBase) -> training.Batch:
    documents = [sample_document(rng, tokenizer) for _ in range(BATCH)]
    weighty = [(ids, slice(answer, len(ids))) for ids, answer in documents]
    return training.text_batch(weighty, ANSWER_WEIGHT, rng, tokenizer)


def train_model(
    seed: int, tokenizer: PreTrainedTokenizerBase, steps: int = COURSE.steps
) -> LlamaForCausalLM:
    """A trained model in evaluation mode; progress goes to stderr."""
    training.start(seed)
    rng = Random(f"tone documents {seed}")
    model = LlamaForCausalLM(training.tiny_llama(tokenizer))
    course = replace(COURSE, steps=steps)
    training.train(model, course, lambda step: sample_batch(rng, tokenizer))
    model.generation_config = training.greedy(tokenizer)
    return model.eval()


def main() -> None:
    args = training.arguments("Train the tiny model of the tone world.")
    tokenizer = build_tokenizer()
    model = train_model(args.seed, tokenizer)
    questions = [question for question, _, _ in sample_pairs("validation", 200, args.seed)]
    prompts = [question.prompt for question in questions]
    greedy, sampled = (
        judge(answers(model, tokenizer, prompts, seed), questions) for seed in (None, args.seed)
    )
    measured = {
        "seed": args.seed,
        "steps": COURSE.steps,
        "control_accuracy": control_accuracy(model, tokenizer, count=500, seed=args.seed),
        "greedy": greedy,
        "sampled": sampled,
        "text_perplexity": round(text_perplexity(model, tokenizer, 100, args.seed), 4),
    }
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    training.record(args.out, measured, "control_accuracy")


if __name__ == "__main__":
    main()
