"""Attributions of an artifact (X.attributions.jsonl): reading, and whether they belong to it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grains_vllm.vectors import SteeringVector
from offline.errors import InputError
from offline.report.image_field import require_image
from offline.report.shapes import FLAG, NUMBER, TEXT, WHOLE, Maybe, parse, require

Record = dict[str, Any]
_RECORD = {
    "id": TEXT,
    "tokens": [TEXT],
    "scores": [NUMBER],
    "eligible": [FLAG],
    "positive": [WHOLE],
    "negative": [WHOLE],
    "used": FLAG,
    "f_input": Maybe(NUMBER),
    "f_baseline": Maybe(NUMBER),
    "gap": Maybe(NUMBER),
    "points": Maybe(WHOLE),
}


def read_records(path: Path) -> list[Record]:
    """Reads and checks the records of extract, one a line.

    Raises:
        InputError: naming file, line and field.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8 text ({error})") from error
    records = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path.name}, line {number}"
            record = parse(line, where)
            require(record, _RECORD, where)
            _require_lengths(record, where)
            if record.get("image") is not None:
                require_image(record, where)
            records.append(record)
    if not records:
        raise InputError(f"{path.name}: holds no attributions")
    return records


def mismatch(records: Sequence[Record], vector: SteeringVector) -> str | None:
    """Why the records do not belong to `vector`, or None if they do."""
    digests = {str(record["vector_digest"]) for record in records if "vector_digest" in record}
    if digests:
        others = sorted(digests - {vector.digest})
        if not others:
            return None
        return f"they are of the vector {others[0][:16]}, this one is {vector.digest[:16]}"
    examples = vector.passport.get("examples")
    if not isinstance(examples, list):
        return "they name no vector, and this artifact's passport lists no examples"
    if len(examples) != len(records):
        return f"they hold {len(records)} examples, the artifact {len(examples)}"
    for number, (record, example) in enumerate(zip(records, examples, strict=True), 1):
        expected = example if isinstance(example, Mapping) else {}
        for name in ("id", "fingerprint", "used"):
            if record.get(name) != expected.get(name):
                return (
                    f"the {name} of example {number} is {record.get(name)!r}, "
                    f"in the artifact {expected.get(name)!r}"
                )
    return None


def _require_lengths(record: Record, where: str) -> None:
    length = len(record["tokens"])
    for name in ("scores", "eligible"):
        if len(record[name]) != length:
            raise InputError(
                f"{where}: '{name}' has {len(record[name])} entries for {length} tokens"
            )
    for name in ("positive", "negative"):
        beyond = [position for position in record[name] if not 0 <= position < length]
        if beyond:
            raise InputError(
                f"{where}: '{name}' holds the position {beyond[0]}, there are {length} tokens"
            )
