"""Tasks of lm-evaluation-harness, base and steered, with the score of every item."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grains_vllm.vectors import write_aside
from offline.errors import InputError
from offline.evaluation.confidence import Figure
from offline.evaluation.harness_tasks import KNOWN, load, quiet, require_harness
from offline.evaluation.measured import Measured, Outcome
from offline.evaluation.overlap import Seen
from offline.evaluation.target import Setting, Target

_FEWSHOT_SEED = 1234  # lm-eval's own default


class HarnessTask:
    """One task or group of lm-eval; see offline.evaluation.evaluate.Task."""

    def __init__(
        self,
        name: str,
        seen: Seen,
        *,
        data: str | None = None,
        side_effect: bool = True,
        limit: int | None = None,
        num_fewshot: int | None = None,
        max_tokens: int = 256,
        chat: bool = False,
        raw: Path | None = None,
        on_note: Callable[[str], None] = lambda note: None,
    ) -> None:
        """Loads the task and chooses its items: the first `limit` that no vector has seen.

        Args:
            name: one of GOALS, or lm-eval's own name (with `lm-eval:` before it where both have
                it).
            data: a local file in the public format, instead of the hub.
            raw: folder for lm-eval's own results and samples.

        Raises:
            InputError: no such task, its data cannot be read, or overlap; see `Seen.keep`.
        """
        require_harness()
        self.name = name
        self.side_effect = side_effect
        self._raw, self._note = raw, on_note
        self._max_tokens, self._chat = max_tokens, chat
        self._loaded = load(name, data)
        self._tasks: dict[str, Any] = self._loaded["tasks"]
        # Groups may hold groups; the one that was asked for comes first.
        self._group = next(iter(self._loaded["groups"]), None)
        for task in self._tasks.values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
            own = task.get_config("num_fewshot")
            # Tasks that say 0 hold their examples in the prompt already.
            if own != 0:
                task.set_config(key="num_fewshot", value=num_fewshot or own or 0)
        self._samples: dict[str, list[int]] = {}
        excluded = 0
        for key, task in self._tasks.items():
            documents = list(task.eval_docs)
            kept = seen.keep(f"task '{key}'", [_texts(task, document) for document in documents])
            excluded += len(documents) - len(kept)
            self._samples[key] = kept[:limit]
        self.facts = {
            "data": None if data is None else _file_facts(Path(data)),
            "harness_task": name if name not in KNOWN else KNOWN[name][0],
            "versions": {key: task.VERSION for key, task in sorted(self._tasks.items())},
            "num_fewshot": num_fewshot,
            "limit": limit,
            "excluded": excluded,
        }

    def measure(self, target: Target, setting: Setting) -> Outcome:
        """Runs the task once."""
        import lm_eval

        from offline.evaluation.harness_model import SettingLM

        model = SettingLM(target, setting, self._max_tokens, self._chat)
        with quiet():
            try:
                # Not simple_evaluate: it would list this machine's packages for every setting.
                results = lm_eval.evaluate(
                    lm=model,
                    task_dict=self._loaded,
                    samples=self._samples,
                    bootstrap_iters=0,
                    log_samples=True,
                    apply_chat_template=self._chat,
                    fewshot_as_multiturn=self._chat,
                )
            except InputError as error:
                raise InputError(f"task '{self.name}': {error}") from error
            except (OSError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise InputError(
                    f"task '{self.name}', setting '{setting.name}': {reason}"
                ) from error
        if self._raw is not None:
            _write_raw(self._raw / f"{_file(self.name)}.{_file(setting.name)}.json", results)
        outcome = self._outcome(results)
        self._compare_group(results, outcome)
        return outcome

    def _outcome(self, results: Mapping[str, Any]) -> Outcome:
        ids: dict[str, list[str]] = {}
        totals: dict[str, list[float]] = {}
        better: dict[str, bool | None] = {}
        for key, task in self._tasks.items():
            for sample in results["samples"][key]:
                for metric in sample["metrics"]:
                    if not _is_mean(task, metric):
                        self._note(
                            f"task '{key}': metric '{metric}' is no mean over items and is left out"
                        )
                        continue
                    label = metric
                    if sample["filter"] != "none":
                        label = f"{metric}, {sample['filter']}"
                    ids.setdefault(label, []).append(f"{key}/{sample['doc_id']}")
                    totals.setdefault(label, []).append(float(sample[metric]))
                    better[label] = task.higher_is_better().get(metric)
        if not totals:
            raise InputError(f"task '{self.name}' has no metric that is a mean over items")
        return Outcome(
            {
                label: Measured(ids[label], Figure(values), better[label])
                for label, values in totals.items()
            }
        )

    def _compare_group(self, results: Mapping[str, Any], outcome: Outcome) -> None:
        """A group's own figure may weigh its tasks otherwise than by their items."""
        own = results.get("groups", {}).get(self._group, {})
        for label, measured in outcome.figures.items():
            theirs = own.get(f"{label},none")
            values = measured.figure.totals
            ours = sum(values) / len(values)
            if isinstance(theirs, float) and abs(theirs - ours) > 1e-9:
                self._note(
                    f"group '{self._group}': {label} over its items is {ours:.4f}, lm-eval's own "
                    f"mean over its tasks is {theirs:.4f}"
                )


def _texts(task: Any, document: Any) -> list[str]:
    """Every text of a document that could be a prompt, and the prompt that the task makes of it."""
    return [
        text for text in (*document.values(), task.doc_to_text(document)) if isinstance(text, str)
    ]


def _is_mean(task: Any, metric: str) -> bool:
    aggregation = task.aggregation().get(metric)
    return aggregation is None or getattr(aggregation, "__name__", "") == "mean"


def _file_facts(path: Path) -> dict[str, str]:
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)


def _write_raw(path: Path, results: Mapping[str, Any]) -> None:
    """Results and samples; not the configuration, which holds this machine's paths."""
    kept: Sequence[str] = ("results", "groups", "n-shot", "n-samples", "versions", "samples")
    document = {key: results[key] for key in kept if key in results}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, json.dumps(document, indent=1, sort_keys=True, default=str).encode())
