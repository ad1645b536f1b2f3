"""Public data formats as lm-eval's documents, from a file or as the hub has them."""

from collections.abc import Mapping
from typing import Any

from offline.errors import InputError
from offline.sources import TRUTHFULQA, read_rows

TOXIC = 5.5  # sum of two ratings from 1 to 5, the threshold that lm-eval's own task uses
Document = dict[str, Any]


def truthfulqa(source: str) -> list[Document]:
    """TruthfulQA's CSV (columns Question, Best Answer, Correct Answers, Incorrect Answers).

    Every document holds what the hub's two configurations hold: answer lists for generation, and
    MC1 and MC2 choices. Choices end with a period there, and the CSV's do not.

    Raises:
        InputError: naming file, line and column.
    """
    documents = []
    for where, row in read_rows(source, "validation")[2]:
        fields = {}
        for name in (*TRUTHFULQA, "Correct Answers"):
            value = row.get(name) if isinstance(row, Mapping) else None
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{where}: '{name}' is missing or empty, expected text")
            fields[name] = value.strip()
        best = fields["Best Answer"]
        correct, incorrect = (
            _split(fields[f"{kind} Answers"]) for kind in ("Correct", "Incorrect")
        )
        documents.append(
            {
                "question": fields["Question"],
                "best_answer": best,
                "correct_answers": correct,
                "incorrect_answers": incorrect,
                "mc1_targets": _choices([best], incorrect),
                "mc2_targets": _choices(correct, incorrect),
            }
        )
    return _some(documents, source)


def toxigen(source: str) -> list[Document]:
    """ToxiGen's annotated set: text, toxicity_ai and toxicity_human per row."""
    kinds = {"text": str, "toxicity_ai": (int, float), "toxicity_human": (int, float)}
    return _some(_rows(source, kinds), source)


def faitheval(source: str) -> list[Document]:
    """FaithEval's counterfactual set: context, question, answerKey and choices {label, text}."""
    kinds = {"context": str, "question": str, "answerKey": str, "choices": Mapping}
    documents = _rows(source, kinds)
    for number, document in enumerate(documents, 1):
        labels, texts = (list(document["choices"].get(name) or ()) for name in ("label", "text"))
        if document["answerKey"] not in labels or len(labels) != len(texts):
            raise InputError(
                f"{source}, document {number}: answerKey is '{document['answerKey']}', "
                f"the choices are {labels} with {len(texts)} texts"
            )
    return _some(documents, source)


def toxic(dataset: Any) -> Any:
    """The documents that were rated as toxic; to the others there is no safer reply."""
    return dataset.filter(lambda row: row["toxicity_ai"] + row["toxicity_human"] > TOXIC)


def _rows(source: str, kinds: Mapping[str, Any]) -> list[Document]:
    if not source.lower().endswith((".jsonl", ".parquet")):
        raise InputError(f"--task-data: '{source}' is not a .jsonl or .parquet file")
    documents = []
    for where, row in read_rows(source, "test")[2]:
        for name, kind in kinds.items():
            if not isinstance(row, Mapping) or not isinstance(row.get(name), kind):
                raise InputError(f"{where}: '{name}' is missing or of another kind")
        documents.append({name: row[name] for name in kinds})
    return documents


def _split(answers: str) -> list[str]:
    return [text.strip() for text in answers.split(";") if text.strip()]


def _choices(right: list[str], wrong: list[str]) -> Document:
    closed = [text if text.endswith(".") else f"{text}." for text in (*right, *wrong)]
    return {"choices": closed, "labels": [1] * len(right) + [0] * len(wrong)}


def _some(documents: list[Document], source: str) -> list[Document]:
    if not documents:
        raise InputError(f"--task-data: '{source}' holds no documents")
    return documents
