"""Public data about images: MMHal-Bench's questions, SPA-VL's pairs and its test questions."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from offline.errors import InputError
from offline.evaluation.answers import Prompt
from offline.pairs import Pair, digest, image_folder, kind_of, require_two_responses
from offline.pictures import Picture, file_within, picture_of
from offline.sources import read_rows

MMHAL, SPA_VL, JUDGED_SPA_VL = "mmhal", "spa-vl", "judged:spa-vl"
_HUB = {
    MMHAL: "Shengcao1006/MMHal-Bench",
    SPA_VL: "sqrti/SPA-VL",
    JUDGED_SPA_VL: "sqrti/SPA-VL",
}
_TESTS = ("harm", "help")  # SPA-VL's splits of questions without answers
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Images:
    """Where images may come from.

    Attributes:
        folder: in which those are that the data names; None means beside the data.
        allow_urls: whether those that the data names by an address are downloaded.
    """

    folder: Path | None = None
    allow_urls: bool = False


@dataclass(frozen=True)
class Questions:
    """What is asked, with the facts that identify the data."""

    name: str
    sha256: str
    prompts: list[Prompt]


def mmhal(source: str | None, images: Images) -> Questions:
    """MMHal-Bench: a question about an image, its reference answer, and what the image holds.

    An image is the row's `image` or `image_path`, else a local file that is called like the end of
    `image_src` or like `image_id`, else what is at the address `image_src`.

    Args:
        source: a local file or folder; None is the hub's data set.

    Raises:
        InputError: naming file, row and column.
    """
    texts = ("question_type", "question", "gt_answer")

    def prompt(row: Row, where: str, number: int, folder: Path) -> Prompt:
        facts: dict[str, Any] = {name: _text(row, name, where) for name in texts}
        content = row.get("image_content")
        if not isinstance(content, list) or not all(isinstance(one, str) for one in content):
            raise InputError(
                f"{where}: 'image_content' is {kind_of(content)}, expected a list of texts"
            )
        picture = _mmhal_picture(row, where, folder, images)
        pair = _pair(facts.pop("question"), picture, where, number)
        return Prompt(pair, {**facts, "image_content": content})

    return _read(MMHAL, source, ["test"], None, images, prompt)


def spa_vl_pairs(source: str | None, images: Images) -> Questions:
    """SPA-VL's preference pairs, by default the hub's 7000 of the split validation.

    Args, Raises: as `mmhal`.
    """

    def prompt(row: Row, where: str, number: int, folder: Path) -> Prompt:
        answers = [_text(row, name, where) for name in ("chosen", "rejected")]
        picture = picture_of(row.get("image"), where, folder, allow_urls=images.allow_urls)
        pair = _pair(_text(row, "question", where), picture, where, number, *answers)
        return Prompt(require_two_responses(pair, "chosen", "rejected"), {})

    return _read(SPA_VL, source, ["validation"], "validation", images, prompt)


def spa_vl_questions(source: str | None, images: Images) -> Questions:
    """SPA-VL's questions, by default the hub's test questions: 265 about harm, 265 about help.

    Args, Raises: as `mmhal`.
    """

    def prompt(row: Row, where: str, number: int, folder: Path) -> Prompt:
        picture = picture_of(row.get("image"), where, folder, allow_urls=images.allow_urls)
        return Prompt(_pair(_text(row, "question", where), picture, where, number), {})

    splits = list(_TESTS)
    listing = Path(source or "", "dataset_dict.json")
    if source is not None and listing.is_file():
        found = json.loads(listing.read_text()).get("splits", [])
        splits = [name for name in _TESTS if name in found] or ["test"]
    elif source is not None:
        splits = ["test"]  # files, and folders that hold one split, do not ask
    return _read(JUDGED_SPA_VL, source, splits, "test", images, prompt)


def _read(
    task: str,
    source: str | None,
    splits: list[str],
    config: str | None,
    images: Images,
    prompt: Callable[[Row, str, int, Path], Prompt],
) -> Questions:
    place = source or _HUB[task]
    folder = images.folder or (image_folder(place) if source else Path())
    prompts: list[Prompt] = []
    checksum = None
    try:
        for split in splits:
            name, checksum, rows = read_rows(place, split, None if source else config)
            for number, (where, row) in enumerate(_objects(rows), len(prompts) + 1):
                facts = {"split": split} if len(splits) > 1 else {}
                made = prompt(row, where, number, folder)
                prompts.append(Prompt(made.pair, {**made.facts, **facts}))
    except InputError as error:
        hint = "" if source else f"; or give a file with --task-data {task}=FILE"
        raise InputError(f"{error}{hint}") from error
    if not prompts:
        raise InputError(f"{name}: holds no questions")
    return Questions(name, checksum or digest([p.pair.fingerprint for p in prompts]), prompts)


def _objects(rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Row]]:
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: found {kind_of(row)}, expected an object")
        yield where, row


def _pair(
    question: str, picture: Picture, where: str, number: int, chosen: str = "", rejected: str = ""
) -> Pair:
    messages = [{"role": "user", "content": question}]
    return Pair(str(number), where, messages, chosen, rejected, picture=picture)


def _text(row: Row, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: '{name}' is {kind_of(value)}, expected text")
    return value.strip()


def _mmhal_picture(row: Row, where: str, folder: Path, images: Images) -> Picture:
    for name in ("image", "image_path"):
        if row.get(name) is not None:
            return picture_of(row[name], where, folder, allow_urls=images.allow_urls)
    address = _text(row, "image_src", where)
    last = Path(urlsplit(address).path).name
    names = [last, *(f"{row.get('image_id')}{ending}" for ending in _ENDINGS)]
    for place in (Path(), Path("images")):
        for name in names:
            if file_within(folder, str(place / name)) is not None:
                return picture_of(str(place / name), where, folder)
    if not images.allow_urls:
        raise InputError(
            f"{where}: no image file is called '{last}' or '{row.get('image_id')}.jpg' in "
            f"'{folder.name or '.'}' or its folder 'images' (--images names another); its address "
            "is only asked with --allow-image-urls"
        )
    return picture_of(address, where, folder, allow_urls=True)
