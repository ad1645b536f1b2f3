"""Where rows come from: JSONL, JSON, CSV and parquet files, folders and hub ids of `datasets`."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from offline.errors import InputError

TRUTHFULQA = ("Question", "Best Answer", "Incorrect Answers")
_FORMS = (("prompt", "chosen", "rejected"), TRUTHFULQA)
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_MAX_DEPTH = 100  # of JSON
_MAX_FIELD = 2**27  # characters; the library's own limit is shorter than a long prompt
Rows = Iterator[tuple[str, Any]]


def read_rows(
    source: str,
    split: str,
    config: str | None = None,
    forms: Sequence[Sequence[str]] = _FORMS,
) -> tuple[str, str | None, Rows]:
    """A source's name (never a path), the sha256 of its file if it is one, and (where, row) pairs.

    Args:
        source: a .jsonl, .json (a list), .csv or .parquet file, a folder written by `datasets`, or
            a hub id.
        split: which split of a folder or hub data set.
        config: which configuration of a hub data set, where it has several.
        forms: sets of columns, of which a CSV file must have one.

    Raises:
        InputError: the source cannot be read; while iterating, naming the line.
    """
    path = Path(source)
    if path.is_file():
        return path.name, hashlib.sha256(path.read_bytes()).hexdigest(), _file_rows(path, forms)
    looks_like_a_file = path.suffix.lower() in _SUFFIXES or source.startswith(("/", "."))
    if not source or (looks_like_a_file and not path.is_dir()):
        raise InputError(f"--data is '{source}': no such file")
    name = path.name if path.is_dir() else source
    return name, None, _dataset_rows(source, name, split, config)


def _file_rows(path: Path, forms: Sequence[Sequence[str]]) -> Rows:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return _csv_rows(path, forms)
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix == ".jsonl":
        return _jsonl_rows(path)
    if suffix == ".json":
        return _json_rows(path)
    raise InputError(f"{path.name}: unknown kind of file, expected one of {', '.join(_SUFFIXES)}")


def _jsonl_rows(path: Path) -> Rows:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        yield where, _json(line, where)


def _json_rows(path: Path) -> Rows:
    rows = _json(_text(path), path.name)
    if not isinstance(rows, list):
        raise InputError(f"{path.name}: holds a {type(rows).__name__}, expected a list of objects")
    return ((f"{path.name}, item {number}", row) for number, row in enumerate(rows, 1))


def _json(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds half a character ({error})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    if _is_deeper(value, _MAX_DEPTH):
        raise InputError(f"{where}: holds lists or objects nested more than {_MAX_DEPTH} deep")
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(_is_deeper(one, depth - 1) for one in inner)


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """A table's row; within its cells, keys are gone that are null because other rows have them."""
    return {column: _without_nulls(cell) for column, cell in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        # A message's content may be null in its own right, beside a tool call.
        kept = {key: one for key, one in value.items() if one is not None or key == "content"}
        return {key: _without_nulls(one) for key, one in kept.items()}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _csv_rows(path: Path, forms: Sequence[Sequence[str]]) -> Rows:
    csv.field_size_limit(_MAX_FIELD)
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    columns = reader.fieldnames or []
    if columns and not any(set(names) <= set(columns) for names in forms):
        raise InputError(
            f"{path.name}: its columns are {list(columns)}, expected "
            f"{' or '.join(str(list(names)) for names in forms)}"
        )
    if len(set(columns)) < len(columns):
        raise InputError(f"{path.name}: its columns are {list(columns)}, expected each name once")
    try:
        for row in reader:
            where = f"{path.name}, line {reader.line_num}"
            if None in row:
                raise InputError(
                    f"{where}: {len(row[None])} more fields than columns; a text with commas needs "
                    "quotes around it"
                )
            yield where, row
    except csv.Error as error:
        raise InputError(f"{path.name}, line {reader.line_num}: not valid CSV ({error})") from error


def _parquet_rows(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path.name}: not a readable parquet file ({error})") from error
    return ((f"{path.name}, row {number}", _filled(row)) for number, row in enumerate(rows, 1))


def _dataset_rows(source: str, name: str, split: str, config: str | None) -> Rows:
    import datasets

    images: list[str] = []
    try:
        if Path(source, "state.json").is_file() or Path(source, "dataset_dict.json").is_file():
            data = datasets.load_from_disk(source)
            if isinstance(data, datasets.DatasetDict):
                data = data[split]
        else:
            data = datasets.load_dataset(source, config, split=split)
        for column, kind in data.features.items():
            one = getattr(kind, "feature", kind)
            if isinstance(one, datasets.Image):  # as files, which are smaller than pixels
                files = datasets.Image(decode=False)
                data = data.cast_column(column, files if one is kind else datasets.List(files))
                images.append(column)
    except Exception as error:  # `datasets` raises many kinds; all of them mean "cannot be read"
        raise InputError(
            f"{name}: no such file, and not readable as a data set with split '{split}' "
            f"({type(error).__name__}: {error})"
        ) from error
    return _read(data, name, images)


def _read(data: Any, name: str, images: Sequence[str]) -> Rows:
    number = 0
    try:
        for number, row in enumerate(data, 1):
            files = {column: _files(row[column]) for column in images}
            yield f"{name}, row {number}", _filled(row) | files
    except Exception as error:  # cells are decoded here, by whatever they need
        raise InputError(
            f"{name}, row {number + 1}: cannot be read ({type(error).__name__}: {error})"
        ) from error


def _files(cell: Any) -> Any:
    """An image, or a list of them, where `datasets` has put it: it may be in its own cache."""
    if isinstance(cell, list):
        return [_files(one) for one in cell]
    if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
        return Path(cell["path"])
    return cell


def _text(path: Path) -> str:
    try:
        # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8 text ({error})") from error
