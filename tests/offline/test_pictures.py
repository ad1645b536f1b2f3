import functools
import http.server
import io
import json
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from offline.errors import InputError
from offline.pairs import Pair, load_pairs, write_pairs
from offline.pictures import file_within, picture_of

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
    # Where `datasets` itself puts files, a path may be absolute; lists are read as files too.
    (tmp_path / "a.png").write_bytes(encoded())
    kind = datasets.Features(
        dict.fromkeys(ROW, datasets.Value("string")) | {"images": datasets.List(datasets.Image())}
    )
    row = ROW | {"images": [str(tmp_path / "a.png")]}
    datasets.Dataset.from_list([row], features=kind).save_to_disk(str(tmp_path / "list"))
    (pair,) = load_pairs(str(tmp_path / "list")).pairs
    assert pair.picture is not None and pair.picture.payload == encoded()


def test_no_images_and_parts_with_a_place(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded())
    parts = [
        {"index": 0, "text": None, "type": "image"},
        {"index": None, "text": "Is it red?", "type": "text"},
    ]
    prompt = [{"role": "user", "content": parts}]
    none, shown = pairs_of(tmp_path, {"images": []}, {"images": ["a.png"], "prompt": prompt})
    assert none.picture is None and shown.picture is not None
    assert shown.prompt == [{"role": "user", "content": "Is it red?"}]
    for wrong, reason in (
        ({"images": [], "prompt": prompt}, "'image' is missing"),
        ({"image": "a.png", "prompt": [{"role": "user", "content": [parts[0] | {"index": 1}]}]},
         "names an image of its own"),
        ({"prompt": [{"role": "user", "content": [parts[1] | {"audio": "b.wav"}]}]},
         "is text with 'audio'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            pairs_of(tmp_path, wrong)


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
        ("exif.jpg", "exif.jpg is a damaged image file"),
        ("bomb.png", r"bomb.png has 9000 x 9000 pixels, expected 67108864 pixels at most"),
        ("huge.png", r"huge.png has more than 67108864 pixels"),
        ("../outside.png", "no such file in 'data', where paths begin and links must end"),
        ("link.png", "no such file in 'data'"),
        ("/outside.png", "no such file in 'data'"),
        ("circle.png", "no such file in 'data'"),
        ("a\0.png", "no such file in 'data'"),
        ({"path": "../outside.png", "bytes": None}, "no such file in 'data'"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, value: Any, reason: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(encoded())
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "half.png").write_bytes(encoded()[:50])
    # Turned by a quarter, and as wide as "abc".
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\0\0\x02\0\0\0\x04abc\0"
    exif += b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    (folder / "exif.jpg").write_bytes(encoded(kind="JPEG", exif=exif))
    for name, side in (("bomb", 9000), ("huge", 60000)):
        payload = bytearray(encoded())
        payload[16:24] = side.to_bytes(4, "big") * 2  # what the header says; its checksum follows
        payload[29:33] = zlib.crc32(payload[12:29]).to_bytes(4, "big")
        (folder / f"{name}.png").write_bytes(payload)
    if value == "/outside.png":
        value = f"{tmp_path}{value}"
    with warnings.catch_warnings(), pytest.raises(InputError, match=f"x, line 3: .*{reason}"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        picture_of(value, "x, line 3", folder)


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(encoded())
    (tmp_path / "2.png").symlink_to("a/1.png")
    assert picture_of("2.png", "x", tmp_path).payload == encoded()
    assert file_within(tmp_path, "a/../2.png") == (tmp_path / "a" / "1.png").resolve()


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
