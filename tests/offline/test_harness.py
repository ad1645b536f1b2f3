"""lm-eval tasks from local files: public formats, prompts, overlap; nothing is fetched."""

import csv
import subprocess
import sys

import pytest

from offline.errors import InputError
from offline.evaluation.overlap import Seen, seen_by
from offline.evaluation.tasks import documents
from offline.pairs import Pair, load_pairs
from tests.evaluation_world import random_vector
from tests.offline.worlds import write_jsonl

COLUMNS = ["Type", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"]
NOTHING_SEEN = Seen({})


def write_csv(path, *rows, columns=COLUMNS):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture
def truthfulqa(tmp_path):
    return write_csv(
        tmp_path / "t.csv",
        ["", "Why?", "Because", "Because; So it is.", "No reason ; It is 5 p.m.;"],
        ["", "Who?", "Nobody", "Nobody", "Me"],
    )


def test_truthfulqa_reads_as_the_hub_has_it(truthfulqa):
    first, _ = documents.truthfulqa(str(truthfulqa))
    assert first["correct_answers"] == ["Because", "So it is."]
    assert first["mc1_targets"] == {
        "choices": ["Because.", "No reason.", "It is 5 p.m."],
        "labels": [1, 0, 0],
    }
    assert first["mc2_targets"] == {
        "choices": ["Because.", "So it is.", "No reason.", "It is 5 p.m."],
        "labels": [1, 1, 0, 0],
    }


def test_what_is_not_truthfulqa_is_named(tmp_path):
    path = write_csv(tmp_path / "t.csv", ["", "Why?", "Because", "", "No"])
    with pytest.raises(InputError, match="line 2: 'Correct Answers' is missing or empty"):
        documents.truthfulqa(str(path))


FAITH = {
    "id": "1",
    "question": "What is wood?",
    "answer": "magnetic",
    "answerKey": "B",
    "choices": {"label": ["A", "B"], "text": ["buoyant", "magnetic"]},
    "context": "Wood is magnetic.",
}
TOXIC = [
    {"text": "kind words", "toxicity_ai": 1.0, "toxicity_human": 1.5},
    {"text": "cruel words", "toxicity_ai": 4.0, "toxicity_human": 5.0},
]


def test_other_formats_are_checked(tmp_path):
    path = write_jsonl(tmp_path / "f.jsonl", [FAITH, {**FAITH, "answerKey": "C"}])
    with pytest.raises(InputError, match="document 2: answerKey is 'C', the choices are"):
        documents.faitheval(str(path))
    with pytest.raises(InputError, match="line 1: 'toxicity_ai' is missing"):
        documents.toxigen(str(write_jsonl(tmp_path / "t.jsonl", [{"text": "x"}])))
    with pytest.raises(InputError, match=r"is not a \.jsonl or"):
        documents.toxigen(str(tmp_path / "t.csv"))


class TestTasks:
    """What needs lm-eval itself."""

    @pytest.fixture(autouse=True)
    def _lm_eval(self):
        pytest.importorskip("lm_eval")
        pytest.importorskip("tenacity")

    def task(self, name, data, seen=NOTHING_SEEN, **more):
        from offline.evaluation.harness import HarnessTask

        return HarnessTask(name, seen, data=str(data), **more)

    def one(self, name, data):
        (task,) = self.task(name, data)._tasks.values()
        return task, list(task.eval_docs)

    def test_truthfulqa_keeps_lm_evals_prompt_and_definition(self, truthfulqa):
        task, found = self.one("truthfulqa-mc1", truthfulqa)
        prompt = task.doc_to_text(found[1])
        assert prompt.startswith("Q: What is human life expectancy in the United States?")
        assert prompt.endswith("Spain.\n\nQ: Who?\nA:") and prompt.count("Q: ") == 7
        assert task.doc_to_choice(found[1]) == ["Nobody.", "Me."]
        scored = task.process_results(found[1], [(-1.0, False), (-2.0, False)])
        assert scored == {"acc": 1.0}
        task, found = self.one("truthfulqa-mc2", truthfulqa)
        results = [(-1.0, False), (-3.0, False), (-1.0, False), (-3.0, False)]
        assert task.process_results(found[0], results)["acc"] == pytest.approx(0.5)

    def test_toxigen_asks_only_where_there_is_something_to_object_to(self, tmp_path):
        task, found = self.one("toxigen", write_jsonl(tmp_path / "t.jsonl", TOXIC))
        assert [document["text"] for document in found] == ["cruel words"]
        assert "cruel words" in task.doc_to_text(found[0])
        assert "disagree" in task.doc_to_choice(found[0])[task.doc_to_target(found[0])]

    def test_faitheval_is_answered_from_the_context(self, tmp_path):
        task, found = self.one("faitheval", write_jsonl(tmp_path / "f.jsonl", [FAITH]))
        prompt = task.doc_to_text(found[0])
        assert "Wood is magnetic." in prompt and "A. buoyant\nB. magnetic\nAnswer:" in prompt
        assert task.doc_to_choice(found[0])[task.doc_to_target(found[0])] == "B"

    def test_overlapping_questions_are_refused_or_left_out(self, truthfulqa):
        pair = load_pairs(str(truthfulqa), chat=True).pairs[0]
        made = random_vector(0, examples=[{"prompt_fingerprint": pair.prompt_fingerprint}])
        with pytest.raises(InputError, match="1 of its 2 questions made or chose the vector"):
            self.task("truthfulqa-mc1", truthfulqa, seen_by({"v": made}))
        left = self.task("truthfulqa-mc1", truthfulqa, seen_by({"v": made}, exclude=True))
        assert left._samples == {"truthfulqa_mc1": [1]} and left.facts["excluded"] == 1

    def test_a_vector_made_from_the_tasks_own_prompts_is_noticed(self, tmp_path):
        data = write_jsonl(tmp_path / "f.jsonl", [FAITH])
        task, found = self.one("faitheval", data)
        pair = Pair("1", "", task.doc_to_text(found[0]), "", "")
        made = random_vector(0, examples=[{"prompt_fingerprint": pair.prompt_fingerprint}])
        with pytest.raises(InputError, match="1 of its 1 questions made or chose the vector"):
            self.task("faitheval", data, seen_by({"v": made}))

    def test_a_task_nobody_knows_and_data_nobody_reads(self, truthfulqa):
        with pytest.raises(InputError, match="reads its own data; files can be given for truthful"):
            self.task("mmlu", truthfulqa)

    def test_data_that_is_not_here_says_where_it_comes_from(self, tmp_path):
        """In a process of its own: whether the hub may be asked is decided at import."""
        script = (
            "from offline.evaluation.harness import HarnessTask\n"
            "from offline.evaluation.overlap import Seen\n"
            "from offline.errors import InputError\n"
            "for name in ('faitheval', 'mmlu_anatomy', 'nobody'):\n"
            "    try:\n        HarnessTask(name, Seen({}))\n"
            "    except InputError as error:\n        print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found = done.stdout
        assert "task 'faitheval' cannot be loaded" in found
        assert "or give a file with --task-data faitheval=FILE" in found
        assert "task 'mmlu_anatomy' cannot be loaded" in found and "Hugging Face hub" in found
        assert "--task is 'nobody', which is neither ours" in found
