"""From the names of tasks to tasks that can be measured, with their data read and checked."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offline.errors import InputError
from offline.evaluation.answer_tasks import DistinctTask, JudgedTask
from offline.evaluation.answers import Answers, Prompt
from offline.evaluation.chats import require_chat
from offline.evaluation.endpoint_tasks import (
    ControlsTask,
    PairsTask,
    PerplexityTask,
    Progress,
    first,
)
from offline.evaluation.evaluate import Task
from offline.evaluation.harness import HarnessTask
from offline.evaluation.harness_tasks import GOALS, require_harness
from offline.evaluation.image_data import (
    JUDGED_SPA_VL,
    MMHAL,
    SPA_VL,
    Images,
    Questions,
    mmhal,
    spa_vl_pairs,
    spa_vl_questions,
)
from offline.evaluation.judge import Judge, Rubric
from offline.evaluation.overlap import Seen
from offline.evaluation.tasks import documents
from offline.pairs import PairSet, load_pairs

JUDGED, TRUTHFULQA = "judged:", "truthfulqa"
_ON_PAIRS = ("pairs", "distinct")
_OWN = (*_ON_PAIRS, "perplexity", "controls")
_ON_IMAGES = (MMHAL, SPA_VL, JUDGED_SPA_VL)


@dataclass(frozen=True)
class Plan:
    """What the command line asks to be measured.

    Attributes:
        tasks: names, in the report's order.
        data, texts, controls: what pairs, distinct and judged tasks, perplexity and controls read.
        task_data: local files by task name; `truthfulqa` stands for all of its tasks.
        goals: lm-eval tasks that steering is for; those we do not know count as side effects.
        chat: make prompts that are text a chat's user message.
        limit: the first so many items of every task.
        max_tokens: of a generated answer.
        raw: folder for lm-eval's own results.
        images: where images are, and whether they may be downloaded.
    """

    tasks: Sequence[str]
    data: str | None = None
    texts: Path | None = None
    controls: Path | None = None
    task_data: Mapping[str, str] = field(default_factory=dict)
    goals: Sequence[str] = ()
    chat: bool = False
    limit: int | None = None
    num_fewshot: int | None = None
    max_tokens: int = 256
    raw: Path | None = None
    images: Images = field(default_factory=Images)

    def require_complete(self, has_judge: bool) -> None:
        """Raises InputError for what can be seen before anything is read or asked."""
        if not self.tasks:
            raise InputError("--task is missing: what is to be measured?")
        for number, name in enumerate(self.tasks):
            if name in self.tasks[:number]:
                raise InputError(f"--task {name} is given twice")
            if name == f"{JUDGED}{MMHAL}":
                raise InputError(f"--task {name}: it is called {MMHAL}")
            needs = {
                "--data": (self._reads_pairs(name), self.data),
                "--text": (name == "perplexity", self.texts),
                "--controls": (name == "controls", self.controls),
                "--judge-url and --judge-model": (_is_judged(name), has_judge or None),
            }
            for option, (needed, given) in needs.items():
                if needed and given is None:
                    raise InputError(f"--task {name} needs {option}")
            if _is_judged(name):
                Rubric.load(name.removeprefix(JUDGED))
            elif name not in (*_OWN, *_ON_IMAGES):
                require_harness()
        for option, name in (
            *(("--task-data", name) for name in self.task_data),
            *(("--goal", name) for name in self.goals),
        ):
            if not any(name in (task, _family(task)) for task in self.tasks):
                raise InputError(f"{option} names '{name}', which is no --task")
        for option, value in (("--limit", self.limit), ("--max-tokens", self.max_tokens)):
            if value is not None and value < 1:
                raise InputError(f"{option} is {value}, expected 1 or more")

    @property
    def online(self) -> bool:
        """Whether a task's data is not at hand in a local file."""
        return any(
            name not in _OWN and not self._reads_pairs(name) and self._file(name) is None
            for name in self.tasks
        )

    def _reads_pairs(self, name: str) -> bool:
        return name in _ON_PAIRS or (
            name.startswith(JUDGED) and name not in _ON_IMAGES and _family(name) != TRUTHFULQA
        )

    def _file(self, name: str) -> str | None:
        return self.task_data.get(name, self.task_data.get(_family(name)))


def make_tasks(
    plan: Plan,
    seen: Seen,
    judge: Judge | None,
    progress: Progress,
    on_note: Callable[[str], None] = lambda note: None,
) -> list[Task]:
    """Reads all data and checks it against what the vectors have seen.

    Raises:
        InputError: data that cannot be read, or overlap; see `Seen.keep`.
    """
    tasks: list[Task] = []
    pairs, answers = None, None
    facts: dict[str, Any] = {}
    if any(plan._reads_pairs(name) for name in plan.tasks):
        pairs, facts = _pairs(str(plan.data), plan, seen)
        for note in pairs.notes:
            on_note(note)
        shown = [Prompt(p, {"chosen": p.chosen, "rejected": p.rejected}) for p in pairs.pairs]
        answers = Answers(shown, plan.max_tokens, progress)
    for name in plan.tasks:
        if name == "pairs" and pairs is not None:
            tasks.append(PairsTask(name, pairs, facts, progress))
        elif name == "distinct" and answers is not None:
            tasks.append(DistinctTask(answers, {**facts, "max_tokens": plan.max_tokens}))
        elif name == "perplexity" and plan.texts is not None:
            found = {"data": _file_facts(plan.texts), "limit": plan.limit}
            tasks.append(PerplexityTask(plan.texts, plan.limit, found, progress))
        elif name == "controls" and plan.controls is not None:
            found = {"data": _file_facts(plan.controls), "limit": plan.limit}
            tasks.append(ControlsTask(plan.controls, plan.chat, plan.limit, found, progress))
        elif name in _ON_IMAGES:
            tasks.append(_image_task(name, plan, seen, judge, progress))
        elif name.startswith(JUDGED) and judge is not None:
            rubric = Rubric.load(name.removeprefix(JUDGED))
            asked, about = answers, facts
            if asked is None or not plan._reads_pairs(name):
                asked, about = _truthfulqa(name, plan, seen, progress)
            about = {**about, "max_tokens": plan.max_tokens}
            tasks.append(JudgedTask(name, asked, rubric, judge, about))
        else:
            tasks.append(_harness_task(name, plan, seen, on_note))
    return tasks


def _harness_task(name: str, plan: Plan, seen: Seen, on_note: Callable[[str], None]) -> HarnessTask:
    return HarnessTask(
        name,
        seen,
        data=plan._file(name),
        side_effect=name not in (*GOALS, *plan.goals),
        limit=plan.limit,
        num_fewshot=plan.num_fewshot,
        max_tokens=plan.max_tokens,
        chat=plan.chat,
        raw=plan.raw,
        on_note=on_note,
    )


def _image_task(name: str, plan: Plan, seen: Seen, judge: Judge | None, progress: Progress) -> Task:
    source = plan._file(name)
    if name == SPA_VL:
        asked, facts = _unseen(spa_vl_pairs(source, plan.images), plan, seen)
        pairs = [prompt.pair for prompt in asked]
        data = facts["data"]
        return PairsTask(name, PairSet(data["name"], data["sha256"], len(pairs), pairs), facts,
                         progress)  # fmt: skip
    assert judge is not None
    read = mmhal if name == MMHAL else spa_vl_questions
    asked, facts = _unseen(read(source, plan.images), plan, seen)
    kinds = ("question_type", "split")
    return JudgedTask(
        name,
        Answers(asked, plan.max_tokens, progress),
        Rubric.load(name.removeprefix(JUDGED)),
        judge,
        {**facts, "max_tokens": plan.max_tokens},
        by=next((kind for kind in kinds if kind in asked[0].facts), None),
    )


def _unseen(questions: Questions, plan: Plan, seen: Seen) -> tuple[list[Prompt], dict[str, Any]]:
    """The questions that no vector has seen, and facts about them."""
    pairs = [prompt.pair for prompt in questions.prompts]
    kept = seen.keep(
        questions.name, [[pair.prompt] for pair in pairs], [pair.picture for pair in pairs]
    )
    facts = {
        "data": {"name": questions.name, "sha256": questions.sha256},
        "limit": plan.limit,
        "excluded": len(pairs) - len(kept),
    }
    return [questions.prompts[index] for index in kept[: plan.limit]], facts


def _pairs(source: str, plan: Plan, seen: Seen) -> tuple[PairSet, dict[str, Any]]:
    """The pairs of a source that no vector has seen, and facts about them."""
    pairs = load_pairs(
        source,
        chat=plan.chat,
        split="test",
        allow_image_urls=plan.images.allow_urls,
        strict=False,
    )
    for pair in pairs.pairs:
        if pair.picture is not None:
            require_chat(pair)
    kept = seen.keep(
        pairs.name,
        [[pair.prompt] for pair in pairs.pairs],
        [pair.picture for pair in pairs.pairs],
        [pair.given for pair in pairs.pairs],
    )
    facts = {
        "data": {"name": pairs.name, "sha256": pairs.sha256, **pairs.drawn},
        "limit": plan.limit,
        "excluded": len(pairs.pairs) - len(kept),
    }
    return first(pairs, kept, plan.limit), facts


def _truthfulqa(
    name: str, plan: Plan, seen: Seen, progress: Progress
) -> tuple[Answers, dict[str, Any]]:
    source = plan._file(name)
    if source is None:
        raise InputError(f"--task {name} needs --task-data {TRUTHFULQA}=TruthfulQA.csv")
    references = documents.truthfulqa(source)
    pairs = load_pairs(source, chat=plan.chat)
    kept = seen.keep(pairs.name, [[pair.prompt] for pair in pairs.pairs])
    shown = [
        Prompt(
            pairs.pairs[index],
            {
                "correct": references[index]["correct_answers"],
                "incorrect": references[index]["incorrect_answers"],
            },
        )
        for index in kept[: plan.limit]
    ]
    facts = {
        "data": {"name": pairs.name, "sha256": pairs.sha256},
        "limit": plan.limit,
        "excluded": len(pairs.pairs) - len(kept),
    }
    return Answers(shown, plan.max_tokens, progress), facts


def _is_judged(name: str) -> bool:
    return name.startswith(JUDGED) or name == MMHAL


def _family(name: str) -> str:
    """`truthfulqa` for truthfulqa-mc1 and judged:truthfulqa; the name itself for others."""
    own = name.removeprefix(JUDGED)
    return TRUTHFULQA if own.partition("-")[0] == TRUTHFULQA else own


def _file_facts(path: Path) -> dict[str, str]:
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
