import functools
import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from offline.errors import InputError
from offline.pairs import Pair, load_pairs, write_pairs
from offline.pictures import picture_of

ROW = {"prompt": "Is it red?", "chosen": "No.", "rejected": "Yes."}


def encoded(colour: tuple[int, ...] = (250, 0, 0), kind: str = "PNG", **options: Any) -> bytes:
    payload = io.BytesIO()
    mode = "RGBA" if len(colour) == 4 else "RGB"
    Image.new(mode, (6, 4), colour).save(payload, kind, **options)
    return payload.getvalue()


def pairs_of(folder: Path, *rows: dict[str, Any], **options: Any) -> list[Pair]:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(ROW | row) for row in rows))
    return load_pairs(str(path), **options).pairs


def test_paths_are_relative_to_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded())
    monkeypatch.chdir("/")
    first, second, plain = pairs_of(
        tmp_path, {"image": "images/a.png"}, {"images": ["images/a.png"]}, {}
    )
    assert plain.picture is None
    for pair in (first, second):
        assert pair.picture is not None
        assert pair.picture.name == "images/a.png"
        assert pair.picture.image.size == (6, 4)
        assert pair.picture.image.getpixel((0, 0)) == (250, 0, 0)
        assert pair.picture.data_url.startswith("data:image/png;base64,")


def test_the_image_is_part_of_the_question(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "b.png").write_bytes(encoded((0, 0, 250)))
    a, b, none = pairs_of(tmp_path, {"image": "a.png"}, {"image": "b.png"}, {})
    assert len({pair.prompt_fingerprint for pair in (a, b, none)}) == 3
    assert len({pair.fingerprint for pair in (a, b, none)}) == 3


def test_spa_vl_rows_hold_a_question_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "spa.parquet"
    rows = [
        {"image": {"bytes": encoded(kind="JPEG"), "path": "1.jpg"}, "question": "Is it red?",
         "chosen": "No.", "rejected": "Yes."},
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (pair,) = load_pairs(str(path), chat=True).pairs
    assert pair.prompt == [{"role": "user", "content": "Is it red?"}]
    assert pair.picture is not None and pair.picture.name == "1.jpg"
    assert pair.picture.data_url.startswith("data:image/jpeg;base64,")


def test_folders_of_datasets_keep_files(tmp_path: Path) -> None:
    import datasets

    image = Image.open(io.BytesIO(encoded()))
    datasets.Dataset.from_list([ROW | {"image": image}]).cast_column(
        "image", datasets.Image()
    ).save_to_disk(str(tmp_path / "set"))
    (pair,) = load_pairs(str(tmp_path / "set")).pairs
    assert pair.picture is not None and pair.picture.image.size == (6, 4)


def test_messages_in_parts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded())
    parts = [{"type": "image"}, {"type": "text", "text": "Is it red?"}]
    system = {"role": "system", "content": "Be short."}
    prompt = [system, {"role": "user", "content": parts}]
    (pair,) = pairs_of(tmp_path, {"image": "a.png", "prompt": prompt})
    assert pair.prompt == [system, {"role": "user", "content": "Is it red?"}]
    for wrong, reason in (
        ({"prompt": prompt}, "its messages show an image, but 'image' is missing"),
        (
            {"image": "a.png", "prompt": [{"role": "user", "content": parts[::-1]}]},
            r"prompt\[0\].content\[1\]' is an image; one image is known, before the text",
        ),
        (
            {"image": "a.png", "prompt": [{"role": "user", "content": [{"type": "video"}]}]},
            r"content\[0\]' is dict .*expected a part of type 'text' or 'image'",
        ),
        ({"images": ["a.png", "a.png"]}, "'images' holds 2 images"),
        ({"images": ["a.png"], "image": "a.png"}, "both 'image' and 'images'"),
        (
            {
                "image": "a.png",
                "prompt": [{"role": "user", "content": [{"type": "image", "path": "b.png"}]}],
            },
            r"content\[0\]' names an image of its own",
        ),
    ):
        with pytest.raises(InputError, match=f"pairs.jsonl, line 1: .*{reason}"):
            pairs_of(tmp_path, wrong)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("missing.png", "'image' is 'missing.png': no such file"),
        ("notes.txt", "notes.txt is not an image that can be read"),
        ("half.png", "half.png is a damaged image file"),
        (3, "'image' is int, expected the path"),
        ("", "expected the path of an image file"),
        ("https://example.org/a.png", "the URL https.*--allow-image-urls"),
        ("file:///a.png", "expected a path or an http"),
        ("data:image/png;base64,AAAA", "expected a path or an http"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, value: Any, reason: str) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "half.png").write_bytes(encoded()[:50])
    with pytest.raises(InputError, match=f"x, line 3: .*{reason}"):
        picture_of(value, "x, line 3", tmp_path)


def test_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    (tmp_path / "a.jpg").write_bytes(encoded(kind="JPEG", exif=exif))
    assert picture_of("a.jpg", "x", tmp_path).image.size == (4, 6)


def test_pixels_are_those_that_vllm_sees(tmp_path: Path) -> None:
    from vllm.multimodal.media.image import ImageMediaIO

    palette = Image.new("P", (6, 4), 3)
    palette.putpalette([200, 30, 10] * 4)
    palette.save(tmp_path / "0.png", transparency=3)
    (tmp_path / "1.png").write_bytes(encoded((10, 200, 30, 80)))
    (tmp_path / "2.png").write_bytes(encoded((10, 200, 30, 0)))
    (tmp_path / "3.jpg").write_bytes(encoded((10, 200, 30), "JPEG"))
    Image.new("LA", (6, 4), (90, 100)).save(tmp_path / "4.png")
    for path in sorted(tmp_path.iterdir()):
        theirs = ImageMediaIO().load_bytes(path.read_bytes()).media
        assert picture_of(path.name, "x", tmp_path).image.tobytes() == theirs.tobytes()


def test_a_jpeg_with_more_pictures_is_a_jpeg(tmp_path: Path) -> None:
    one, other = (Image.new("RGB", (6, 4), colour) for colour in ("red", "blue"))
    one.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[other])
    picture = picture_of("a.jpg", "x", tmp_path)
    assert picture.ending == "jpg" and picture.data_url.startswith("data:image/jpeg;base64,")
    with pytest.raises(InputError, match="no such file"):
        picture_of("A" * 5000, "x", tmp_path)


def test_written_pairs_are_read_back(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded())
    pairs = pairs_of(tmp_path, {"image": "a.png"}, {})
    (tmp_path / "out").mkdir()
    write_pairs(tmp_path / "out" / "v.test.jsonl", pairs)
    back = load_pairs(str(tmp_path / "out" / "v.test.jsonl")).pairs
    assert [pair.fingerprint for pair in back] == [pair.fingerprint for pair in pairs]
    assert len(list((tmp_path / "out" / "v.test.images").iterdir())) == 1


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls_where_they_are_allowed(tmp_path: Path, address: str) -> None:
    (pair,) = pairs_of(tmp_path, {"image": f"{address}/a.png"}, allow_image_urls=True)
    assert pair.picture is not None and pair.picture.payload == encoded()
    with pytest.raises(InputError, match=r"line 1: the image at .*404"):
        pairs_of(tmp_path, {"image": f"{address}/b.png"}, allow_image_urls=True)
