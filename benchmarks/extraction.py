"""How fast attribution is, against captum's IntegratedGradients at equal completeness.

Both get the same random Llama, examples, objective, mean baseline and Gauss-Legendre points. captum
runs around the plain way to compute the objective (one forward per response, all logits), with the
points that each example needed here (its fairest case: it has no adaptive rule), and with the one
number of points that brings every example within the tolerance. A last line puts captum around our
own objective, which shows what its surroundings cost by themselves.

    python -m benchmarks.extraction --out extraction.json
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from grains_vllm.vectors import write_aside
from offline.attribution import Attribution, Attributor
from offline.batching import Room
from offline.model import Decoder, as_decoder
from offline.objective import contrast
from offline.options import ExtractOptions, Objective
from offline.pairs import Pair
from offline.prompts import TokenPair
from offline.quadrature import FIRST

TOLERANCE = ExtractOptions().ig_tolerance


def build_decoder(args: argparse.Namespace) -> Decoder:
    torch.manual_seed(args.seed)
    config = transformers.LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=8 * args.hidden // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 32,
        initializer_range=args.init,
    )
    return as_decoder(transformers.LlamaForCausalLM(config), None, "random Llama")


def build_pairs(args: argparse.Namespace) -> list[TokenPair]:
    generator = torch.Generator().manual_seed(args.seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(3, args.vocabulary, (length,), generator=generator).tolist()

    pairs = []
    for index in range(args.examples):
        prompt = ids(args.prompt - 10, args.prompt + 10)
        pair = Pair(str(index), f"example {index}", f"random prompt {index}", "a", "b")
        texts, flags = [str(token) for token in prompt], [True] * len(prompt)
        chosen, rejected = (ids(args.response - 3, args.response + 3) for _ in range(2))
        pairs.append(TokenPair(pair, prompt, chosen, rejected, texts, flags))
    return pairs


def plain_objective(decoder: Decoder, pair: TokenPair, prompts: Tensor) -> Tensor:
    """The same F as one would write it down: a forward per response, logits everywhere."""
    means = []
    for ids in (pair.chosen_ids, pair.rejected_ids):
        response = decoder.embed(ids).expand(len(prompts), -1, -1)
        logits = decoder.model(inputs_embeds=torch.cat([prompts, response], 1)).logits
        logps = logits[:, len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
        targets = torch.tensor(ids).expand(len(prompts), -1)[..., None]
        means.append(logps.gather(2, targets).mean((1, 2)))
    return means[0] - means[1]


def captum_scores(
    decoder: Decoder, pair: TokenPair, baseline: Tensor, points: int, rows: int, ours: bool
) -> Tensor:
    from captum.attr import IntegratedGradients

    def forward(prompts: Tensor) -> Tensor:
        if ours:
            return contrast(decoder, [pair] * len(prompts), list(prompts), True, Objective.mean)
        return plain_objective(decoder, pair, prompts)

    prompt = decoder.embed(pair.prompt_ids)[None]
    return (
        IntegratedGradients(forward)
        .attribute(
            prompt,
            baseline.expand_as(prompt).contiguous(),
            n_steps=points,
            method="gausslegendre",
            internal_batch_size=rows,
        )[0]
        .sum(1)
    )


def gap(scores: Tensor, ours: Attribution) -> float:
    change = ours.f_input - ours.f_baseline
    return abs(float(scores.sum()) - change) / max(abs(change), 1e-6)


def fixed_points(
    decoder: Decoder, pairs: Sequence[TokenPair], baseline: Tensor, ours: Sequence[Attribution]
) -> int:
    """The smallest doubling of 32 with which every example's gap is what ours was at worst."""
    worst = max(TOLERANCE, *(result.gap or 0.0 for result in ours))
    points = FIRST
    while points < ExtractOptions().ig_max_points:
        gaps = [
            gap(captum_scores(decoder, pair, baseline, points, 8, ours=True), result)
            for pair, result in zip(pairs, ours, strict=True)
        ]
        if max(gaps) <= worst:
            break
        points *= 2
    return points


def timed(compute: Callable[[], Any]) -> float:
    start = time.perf_counter()
    compute()
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads[0])
    decoder, pairs = build_decoder(args), build_pairs(args)
    baseline = decoder.model.get_input_embeddings().weight.double().mean(0).float()

    def ours() -> list[Attribution]:
        return Attributor(decoder, ExtractOptions(), baseline, Room(args.rows)).attribute(pairs)

    def captum(points: Sequence[int], our_objective: bool = False) -> list[Tensor]:
        return [
            captum_scores(decoder, pair, baseline, count, args.rows, our_objective)
            for pair, count in zip(pairs, points, strict=True)
        ]

    results = ours()
    # A Kronrod rule has one point more than twice its Gauss rule; captum gets the round number.
    needed = [result.points // 2 * 2 for result in results]
    fixed = [fixed_points(decoder, pairs, baseline, results)] * len(pairs)
    contestants: dict[str, Callable[[], Any]] = {
        "grains": ours,
        "captum, points as needed per example": lambda: captum(needed),
        "captum, one fixed number of points": lambda: captum(fixed),
        "captum around our objective, as needed": lambda: captum(needed, our_objective=True),
    }
    differences = [
        float((theirs - mine.scores).abs().max() / mine.scores.abs().max())
        for theirs, mine in zip(captum(needed), results, strict=True)
    ]
    seconds: dict[str, dict[str, list[float]]] = {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        runs: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(args.repeats):  # interleaved, so that a slow spell hits all alike
            for name, compute in contestants.items():
                runs[name].append(timed(compute))
        seconds[str(threads)] = runs
    gaps = [result.gap or 0.0 for result in results]
    return {
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "points_needed": needed,
        "points_fixed": fixed[0],
        "gap": {"median": statistics.median(gaps), "max": max(gaps)},
        "largest_relative_difference_to_captum": max(differences),
        "packed_examples": sum(result.packed for result in results),
        "seconds": seconds,
        "hardware": {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "captum")},
        },
    }


def show(report: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"points needed {report['points_needed']}, fixed {report['points_fixed']}; worst gap "
        f"{report['gap']['max']:.4f}; scores differ from captum's by at most "
        f"{report['largest_relative_difference_to_captum']:.1e} of the largest"
    )
    for threads, runs in report["seconds"].items():
        table = Table("", "seconds (median)", "times grains", title=f"{threads} thread(s)")
        medians = {name: statistics.median(values) for name, values in runs.items()}
        for name, seconds in medians.items():
            table.add_row(name, f"{seconds:.2f}", f"{seconds / medians['grains']:.2f}")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--init", type=float, default=0.02, help="standard deviation of weights")
    parser.add_argument("--examples", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=60, help="tokens, give or take 10")
    parser.add_argument("--response", type=int, default=10, help="tokens, give or take 3")
    parser.add_argument("--rows", type=int, default=8, help="rows per forward, for all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures here (JSON)")
    args = parser.parse_args()
    report = measure(args)
    show(report)
    if args.out is not None:
        write_aside(args.out, json.dumps(report, indent=2).encode())


if __name__ == "__main__":
    main()
