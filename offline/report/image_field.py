"""The image of an attribution record: what the field must hold, and which tokens are the image's.

A report may be made from a stranger's file, so a thumbnail is a PNG or JPEG in the record itself:
no address, and no SVG, which may hold a script.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from offline.errors import InputError
from offline.report.shapes import NUMBER, TEXT, WHOLE, Maybe, require

_VIEW = {
    "name": TEXT,
    "rows": WHOLE,
    "columns": WHOLE,
    "box": [NUMBER],
    "positions": [Maybe(WHOLE)],
}
_IMAGE = {
    "name": TEXT,
    "sha256": TEXT,
    "width": WHOLE,
    "height": WHOLE,
    "thumbnail": TEXT,
    "spans": [[WHOLE]],
    "views": [_VIEW],
}
_THUMBNAIL = re.compile(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/]+={0,2})")
_BEGINS = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST = 100_000  # pixels on a side


def require_image(record: Mapping[str, Any], where: str) -> None:
    """Checks a record's 'image'; its 'tokens' have been checked.

    Raises:
        InputError: naming place and field.
    """
    image, length = record["image"], len(record["tokens"])
    require(image, _IMAGE, where, "image")
    for name in ("width", "height"):
        if not 1 <= image[name] <= _LARGEST:
            raise InputError(
                f"{where}: 'image.{name}' is {image[name]}, expected 1 to {_LARGEST} pixels"
            )
    if not _SHA256.fullmatch(image["sha256"]):
        raise InputError(
            f"{where}: 'image.sha256' is '{image['sha256'][:70]}', expected 64 hexadecimal digits"
        )
    _require_thumbnail(image["thumbnail"], where)
    _require_spans(image["spans"], length, where)
    flags, taken = image_tokens(record), set[int]()
    for number, view in enumerate(image["views"]):
        _require_view(view, flags, taken, where, f"image.views[{number}]")


def image_tokens(record: Mapping[str, Any]) -> list[bool]:
    """Which tokens of a record are the image's; none without an image. Some may be in no cell of a
    view: row separators of LlavaNext, crops of Gemma 3."""
    flags = [False] * len(record["tokens"])
    for start, end in (record.get("image") or {"spans": []})["spans"]:
        flags[start:end] = [True] * (end - start)
    return flags


def _require_spans(spans: Sequence[Sequence[int]], length: int, where: str) -> None:
    if not spans:
        raise InputError(f"{where}: 'image.spans' is empty, expected one [start, end] or more")
    done = 0
    for number, span in enumerate(spans):
        if len(span) != 2 or not done <= span[0] < span[1] <= length:
            raise InputError(
                f"{where}: 'image.spans[{number}]' is {span[:3]}, expected [start, end], "
                f"{done} to {length}, start < end"
            )
        done = span[1]


def _require_thumbnail(thumbnail: str, where: str) -> None:
    match = _THUMBNAIL.fullmatch(thumbnail)
    if match:
        try:
            if base64.b64decode(match[2], validate=True).startswith(_BEGINS[match[1]]):
                return
        except binascii.Error:
            pass
    found = thumbnail if len(thumbnail) <= 40 else f"{thumbnail[:40]}..."
    raise InputError(
        f"{where}: 'image.thumbnail' is {found!r}, expected a PNG or JPEG as "
        "data:image/png;base64,... or data:image/jpeg;base64,..."
    )


def _require_view(
    view: Mapping[str, Any], flags: Sequence[bool], taken: set[int], where: str, field: str
) -> None:
    """Checks one view; adds its positions to those `taken` by the views before it.

    Args:
        flags: which tokens are the image's.
    """
    rows, columns, positions = view["rows"], view["columns"], view["positions"]
    for name in ("rows", "columns"):
        if view[name] < 1:
            raise InputError(f"{where}: '{field}.{name}' is {view[name]}, expected 1 or more")
    if len(positions) != rows * columns:
        raise InputError(
            f"{where}: '{field}.positions' has {len(positions)} entries for "
            f"{rows} rows of {columns}"
        )
    box = view["box"]
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise InputError(
            f"{where}: '{field}.box' is {box[:5]}, expected [left, top, right, bottom] as "
            "fractions, 0 to 1, left < right and top < bottom"
        )
    for position in positions:
        if position is None:
            continue
        if not (0 <= position < len(flags) and flags[position]):
            raise InputError(
                f"{where}: '{field}.positions' holds the position {position}, which is in none of "
                "'image.spans'"
            )
        if position in taken:
            raise InputError(f"{where}: '{field}.positions' holds the position {position} again")
        taken.add(position)
