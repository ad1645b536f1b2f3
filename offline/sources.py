"""Where rows come from: JSONL, JSON, CSV and parquet files, folders and hub ids of `datasets`."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from offline.errors import InputError

TRUTHFULQA = ("Question", "Best Answer", "Incorrect Answers")
_FORMS = (("prompt", "chosen", "rejected"), TRUTHFULQA)
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
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
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: holds half a character ({error})") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON ({error})") from error
        yield where, row


def _json_rows(path: Path) -> Rows:
    try:
        rows = json.loads(_text(path))
        json.dumps(rows, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path.name}: holds half a character ({error})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name}: not valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise InputError(f"{path.name}: holds a {type(rows).__name__}, expected a list of objects")
    return ((f"{path.name}, item {number}", row) for number, row in enumerate(rows, 1))


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
    return ((f"{path.name}, row {number}", row) for number, row in enumerate(rows, 1))


def _dataset_rows(source: str, name: str, split: str, config: str | None) -> Rows:
    import datasets

    try:
        if Path(source, "state.json").is_file() or Path(source, "dataset_dict.json").is_file():
            data = datasets.load_from_disk(source)
            if isinstance(data, datasets.DatasetDict):
                data = data[split]
        else:
            data = datasets.load_dataset(source, config, split=split)
        for column, kind in data.features.items():
            if isinstance(kind, datasets.Image):  # as files, which are smaller than pixels
                data = data.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # `datasets` raises many kinds; all of them mean "cannot be read"
        raise InputError(
            f"{name}: no such file, and not readable as a data set with split '{split}' "
            f"({type(error).__name__}: {error})"
        ) from error
    return ((f"{name}, row {number}", row) for number, row in enumerate(data, 1))


def _text(path: Path) -> str:
    try:
        # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8 text ({error})") from error
