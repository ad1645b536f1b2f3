"""Which part of an image each image token stands for, so that people can see attributions on it.

A view is a grid over a part of the image: rows x columns cells, one token each. How a processor
cuts an image is its own affair; grids are known for the processors below, and a layout that does
not fit the tokens that are there gives no view rather than a wrong one.
"""

import base64
import io
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from offline.model import Decoder
from offline.prompts import TokenPair
from offline.vision import ImagePrompt, process

Box = tuple[float, float, float, float]
_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_THUMBNAIL = 448  # pixels, the longer side
_LOSSLESS = 128  # up to this size as PNG


def image_record(decoder: Decoder, pair: TokenPair) -> dict[str, Any]:
    """What the record of an example says about its image: name, sha256, size in pixels, a
    thumbnail as a data: URL, `spans` ([start, end) of the tokens that are the image's) and views.

    A view has a name, rows, columns, `box` (left, top, right, bottom of the part that it covers,
    as fractions of the image's size) and `positions`: row by row, the prompt position of the token
    that stands for a cell, or null.
    """
    assert pair.image is not None
    image = pair.image.picture.image
    return {
        "name": pair.image.picture.name,
        "sha256": pair.image.picture.sha256,
        "width": image.width,
        "height": image.height,
        "thumbnail": _thumbnail(image),
        "spans": _spans(pair.image.image_tokens),
        "views": _views(decoder, pair.image, image.width, image.height),
    }


def _spans(flags: Sequence[bool]) -> list[list[int]]:
    runs = (list(run) for mine, run in groupby(range(len(flags)), flags.__getitem__) if mine)
    return [[run[0], run[-1] + 1] for run in runs]


def _views(decoder: Decoder, image: ImagePrompt, width: int, height: int) -> list[dict[str, Any]]:
    positions = [index for index, flag in enumerate(image.image_tokens) if flag]
    kind = decoder.model.config.model_type
    processor = decoder.processor
    if kind == "llava":
        return _clip_views(processor.image_processor, positions, width, height)
    if kind == "llava_next":
        return _tiled_views(processor, positions, width, height)
    inputs = process(processor, image.text, image.picture, image.special)
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        frames, rows, columns = inputs["image_grid_thw"][0].tolist()
        merge = processor.image_processor.merge_size
        if frames != 1:
            return []
        return _one_view("whole image", positions, rows // merge, columns // merge, _WHOLE)
    if kind == "gemma3":
        side = math.isqrt(int(decoder.model.config.mm_tokens_per_image))
        # Pan and scan adds crops behind the whole image; which part they show is not handed on.
        return _one_view("whole image", positions[: side * side], side, side, _WHOLE)
    return []


def _clip_views(
    processor: Any, positions: Sequence[int], width: int, height: int
) -> list[dict[str, Any]]:
    """LLaVA 1.5: the shorter side is made to fit, and the middle cropped."""
    side = math.isqrt(len(positions))
    positions = positions[len(positions) - side * side :]  # a class token would come first
    if getattr(processor, "do_pad", False) and width != height:
        return []
    box = _WHOLE
    shortest = _size(processor, "shortest_edge")
    if getattr(processor, "do_center_crop", False) and shortest:
        crop = processor.crop_size
        scale = shortest / min(width, height)
        across, down = crop["width"] / (width * scale), crop["height"] / (height * scale)
        if across > 1 or down > 1:
            return []
        box = ((1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2)
    return _one_view("whole image" if box == _WHOLE else "middle", positions, side, side, box)


def _tiled_views(
    processor: Any, positions: Sequence[int], width: int, height: int
) -> list[dict[str, Any]]:
    """LLaVA 1.6: the whole image made square; then tiles of it, a separator ending each row."""
    from transformers.models.llava_next.processing_llava_next import select_best_resolution

    size = _size(processor.image_processor, "shortest_edge") or _size(
        processor.image_processor, "height"
    )
    if not size:
        return []
    side = size // processor.patch_size
    best = select_best_resolution([height, width], processor.image_processor.image_grid_pinpoints)
    features, separators = processor._get_unpadded_features(
        height, width, side, side, best[0] // size, best[1] // size
    )
    rows = separators
    columns = features // rows if rows else 0
    if side * side + features + separators != len(positions) or rows * columns != features:
        return []
    tiles = positions[side * side :]
    cells = [
        tiles[row * (columns + 1) + column] for row in range(rows) for column in range(columns)
    ]
    return [
        *_one_view("whole image", positions[: side * side], side, side, _WHOLE),
        *_one_view("tiles", cells, rows, columns, _WHOLE),
    ]


def _one_view(
    name: str, positions: Sequence[int], rows: int, columns: int, box: Box
) -> list[dict[str, Any]]:
    if rows < 1 or rows * columns != len(positions):
        return []
    return [
        {
            "name": name,
            "rows": rows,
            "columns": columns,
            "box": list(box),
            "positions": list(positions),
        }
    ]


def _size(processor: Any, name: str) -> int | None:
    size = processor.size
    value = size.get(name) if hasattr(size, "get") else getattr(size, name, None)
    return None if value is None else int(value)


def _thumbnail(image: Any) -> str:
    small = image.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    exact = max(small.size) <= _LOSSLESS
    payload = io.BytesIO()
    small.save(payload, "PNG" if exact else "JPEG", **({} if exact else {"quality": 80}))
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(payload.getvalue()).decode()}"
