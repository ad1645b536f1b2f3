"""The whole way once: extract a vector, choose how strong, serve it with vLLM, ask, see.

    make demo        (or: python -m benchmarks.demo)

The model is this repository's own tiny Llama (benchmarks/sycophancy), which echoes a user's false
claim more often than it keeps to the record in its context. Everything around it is the real thing,
`grains extract`, `sweep` and `report`, `vllm serve --enable-grains` and the official OpenAI client.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from benchmarks.server import ROOT, ServerError, environment, free_port, running, tool
from benchmarks.sycophancy.world import (
    Question,
    sample_pairs,
    write_controls,
    write_pairs,
    write_texts,
)
from grains_vllm.vectors import SteeringVector

MODEL = ROOT / "benchmarks" / "sycophancy" / "model"
console = Console()


@dataclass(frozen=True)
class Setting:
    """One way of asking: the model name, and a strength that overrides the catalogue's."""

    label: str
    model: str
    strength: float | None = None


Answers = dict[Setting, list[dict[str, Any]]]


def settings(chosen: float) -> list[Setting]:
    """Plain, the alias, and other strengths around the chosen one: the opposite, less, more."""
    others = (-chosen, 0.4 * chosen, 1.6 * chosen)
    return [
        Setting("plain", "tiny"),
        Setting("alias tiny:truthful", "tiny:truthful"),
        *(Setting(f"strength {value:+.2f}", "tiny:truthful", round(value, 4)) for value in others),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "demo")
    parser.add_argument("--questions", type=int, default=100, help="held-out questions to ask")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    console.rule("1  Extract a vector from 50 preference pairs")
    extract(args.out)
    show_chosen_tokens(args.out / "truthful.attributions.jsonl")

    console.rule("2  Choose layers and strength on validation questions, within limits")
    strength = sweep(args.out)

    console.rule("3  Serve it with stock vLLM")
    questions = list(sample_pairs("test", args.questions, seed=7))
    with serve(args.out) as client:
        console.rule("4  Ask the same questions plain, by alias, and at three other strengths")
        answers = {
            setting: [
                ask(client, setting, question)
                for question in track(questions, f"{setting.label:22}", console=console)
            ]
            for setting in settings(strength)
        }
    show_answers(questions, answers)
    console.rule("5  See where it came from")
    vector = _shown(args.out / "truthful.safetensors")
    run(["grains", "report", vector, "--force"])
    plain, steered = (mean_preferred(given) for given in list(answers.values())[:2])
    console.print(
        f"finished in {time.monotonic() - started:.0f} s; files are in {_shown(args.out)}"
    )
    if steered < plain + 0.2:
        sys.exit(
            f"The vector did not do its work: p(preferred) went from {plain:.2f} to {steered:.2f}."
        )


def extract(out: Path) -> None:
    """Runs `grains extract` on 50 pairs of the task's own training split."""
    write_pairs(out / "pairs.jsonl", "train", 50, seed=1)
    command = [
        *("grains", "extract", "--model", _shown(MODEL), "--data", _shown(out / "pairs.jsonl")),
        *("--out", _shown(out / "truthful.safetensors"), "--force", "--restart"),
        *("--k", "3"),
    ]
    run(command)


def sweep(out: Path) -> float:
    """Runs `grains sweep` on entities that extraction has not seen; returns the chosen strength."""
    write_pairs(out / "validation.jsonl", "validation", 200, seed=1)
    write_controls(out / "controls.jsonl", 300, seed=1)
    write_texts(out / "texts.jsonl", 100, seed=1)
    command = [
        *("grains", "sweep", _shown(out / "truthful.safetensors"), "--model", _shown(MODEL)),
        *("--data", _shown(out / "validation.jsonl"), "--metric", "exact"),
        *("--controls", _shown(out / "controls.jsonl"), "--text", _shown(out / "texts.jsonl")),
        *("--plots", _shown(out / "plots"), "--force", "--restart"),
    ]
    run(command)
    strength = SteeringVector.load(out / "truthful.safetensors").recommended_strength
    assert strength is not None  # The sweep has ended well, so it has chosen.
    return strength


def show_chosen_tokens(path: Path, examples: int = 3) -> None:
    """Prints prompts with their chosen tokens marked: T+ as +green+, T- as -red-."""
    console.print(
        "Chosen tokens push to the [green]+preferred+[/] or [red]-dispreferred-[/] answer:"
    )
    for line in path.read_text().splitlines()[:examples]:
        record = json.loads(line)
        plus, minus = set(record["positive"]), set(record["negative"])
        words = []
        for index, token in enumerate(record["tokens"]):
            word = escape(token)
            if index in plus:
                word = f"[bold green]+{word}+[/]"
            elif index in minus:
                word = f"[bold red]-{word}-[/]"
            words.append(word)
        console.print("  " + " ".join(words))


@contextmanager
def serve(out: Path) -> Iterator[openai.OpenAI]:
    """Runs `vllm serve --enable-grains` until the block is left."""
    (out / "steering.yaml").write_text(
        "vectors:\n"
        "  truthful:\n"
        "    path: truthful.safetensors\n"
        "    description: keeps to the record instead of echoing the user\n"
    )
    port, log = free_port(), out / "server.log"
    command = [
        *("vllm", "serve", _shown(MODEL), "--served-model-name", "tiny", "--port", str(port)),
        *("--enable-grains", "--grains-config", _shown(out / "steering.yaml")),
        *("--host", "127.0.0.1", "--max-model-len", "256", "--enforce-eager"),
    ]
    _announce(command)
    started = time.monotonic()
    with ExitStack() as stack:
        with console.status("waiting for the server (about a minute on two cores)"):
            url = stack.enter_context(running(command, port, log))
        console.print(f"server ready after {time.monotonic() - started:.0f} s")
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    console.print("server stopped")


def ask(client: openai.OpenAI, setting: Setting, question: Question) -> dict[str, Any]:
    """One chat request; returns the answer's text and the probability of the preferred stance.

    The stance is the answer's first word, and it decides which source the rest is copied from.
    """
    response = client.chat.completions.create(
        model=setting.model,
        messages=question.prompt,  # type: ignore[arg-type]
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=20,
        extra_body={}
        if setting.strength is None
        else {"vllm_xargs": {"steering_strength": setting.strength}},
    )
    choice = response.choices[0]
    preferred = question.faithful.split()[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None  # Asked for above.
    first = choice.logprobs.content[0].top_logprobs
    probability = sum(math.exp(t.logprob) for t in first if t.token.strip() == preferred)
    return {
        "text": (choice.message.content or "").strip(),
        "preferred": probability,
        "right": (choice.message.content or "").split() == question.faithful.split(),
    }


def show_answers(questions: list[Question], answers: Answers, shown: int = 4) -> None:
    """A few questions one by one, then the means over all of them."""
    for index, question in enumerate(questions[:shown]):
        few = Table(title="\n".join(m["content"] for m in question.prompt), title_justify="left")
        few.add_column("setting")
        few.add_column("answer", min_width=24)
        few.add_column("p(preferred)", justify="right")
        for setting, given in answers.items():
            answer = given[index]
            style = "green" if answer["right"] else "red"
            few.add_row(
                setting.label, f"[{style}]{answer['text']}[/]", f"{answer['preferred']:.2f}"
            )
        console.print(few)
    console.print(
        "p(preferred): the probability of the first word of the preferred answer, which decides "
        "where the rest is copied from."
    )

    means = Table(title=f"Means over {len(questions)} held-out questions", title_justify="left")
    means.add_column("setting")
    means.add_column("p(preferred)", justify="right")
    means.add_column("answered from the record", justify="right")
    for setting, given in answers.items():
        right = sum(answer["right"] for answer in given) / len(questions)
        means.add_row(setting.label, f"{mean_preferred(given):.2f}", f"{right:.0%}")
    console.print(means)


def mean_preferred(answers: list[dict[str, Any]]) -> float:
    return sum(answer["preferred"] for answer in answers) / len(answers)


def run(command: list[str]) -> None:
    _announce(command)
    done = subprocess.run([tool(command[0]), *command[1:]], cwd=ROOT, env=environment())
    if done.returncode:
        sys.exit(f"{command[0]} {command[1]} failed with exit code {done.returncode}")


def _announce(command: list[str]) -> None:
    console.print(f"[bold]$ {escape(' '.join(command))}[/]", soft_wrap=True)


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    try:
        main()
    except ServerError as error:
        sys.exit(str(error))
