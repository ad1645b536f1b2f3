"""MMHal-Bench and SPA-VL in their public formats, from files that the tests make."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pytest

from offline.errors import InputError
from offline.evaluation.image_data import Images, mmhal, spa_vl_pairs, spa_vl_questions
from tests.offline.pictures import png
from tests.offline.worlds import write_jsonl

COLOURS = ("red", "green", "blue")


def template(folder, address="https://farm.example/NUMBER_b.png", **changes):
    """MMHal-Bench's response_template.json, with one question per colour."""
    rows = [
        {
            "question_type": "attribute", "question_topic": "animal", "image_id": f"id{n}",
            "image_src": address.replace("NUMBER", str(n)), "image_content": ["Cat", "Tree"],
            "question": f"What colour is cat {n}?", "gt_answer": f"It is {colour}.",
            "model_answer": "",
        } | changes
        for n, colour in enumerate(COLOURS)
    ]  # fmt: skip
    path = folder / "response_template.json"
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("place", ["images/{n}_b.png", "{n}_b.png", "images/id{n}.png"])
def test_mmhal_finds_images_by_the_end_of_their_address_or_by_their_id(tmp_path, place):
    (tmp_path / "images").mkdir()
    for n, colour in enumerate(COLOURS):
        (tmp_path / place.format(n=n)).write_bytes(png(colour))
    found = mmhal(template(tmp_path), Images())
    assert found.name == "response_template.json" and len(found.sha256) == 64
    assert [prompt.question for prompt in found.prompts] == [
        f"What colour is cat {n}?" for n in range(3)
    ]
    assert [prompt.pair.picture.payload for prompt in found.prompts] == [png(c) for c in COLOURS]
    assert found.prompts[1].facts == {
        "question_type": "attribute", "gt_answer": "It is green.", "image_content": ["Cat", "Tree"],
    }  # fmt: skip


def test_mmhal_in_a_folder_of_ones_own_and_in_the_hubs_converted_form(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for n, colour in enumerate(COLOURS):
        (tmp_path / "elsewhere" / f"{n}_b.png").write_bytes(png(colour))
    found = mmhal(template(tmp_path), Images(tmp_path / "elsewhere"))
    assert [prompt.pair.picture.payload for prompt in found.prompts] == [png(c) for c in COLOURS]
    rows = [
        {"question_type": "other", "image_content": ["Cat"], "question": "What is it?",
         "gt_answer": "A cat.", "image": {"bytes": png(colour), "path": None}}
        for colour in COLOURS
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    found = mmhal(str(tmp_path / "test.parquet"), Images())
    assert [prompt.pair.picture.payload for prompt in found.prompts] == [png(c) for c in COLOURS]


def test_addresses_are_asked_only_where_that_is_allowed(tmp_path):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            payload = png(COLOURS[int(self.path[1])])
            self.send_response(200)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        source = template(tmp_path, f"http://127.0.0.1:{server.server_port}/NUMBER.png")
        with pytest.raises(InputError, match=r"item 1: no image file is called '0.png' or 'id0.j"):
            mmhal(source, Images())
        found = mmhal(source, Images(allow_urls=True))
    finally:
        server.shutdown()
        server.server_close()
    assert [prompt.pair.picture.payload for prompt in found.prompts] == [png(c) for c in COLOURS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": " "}, "item 1: 'question' is str \" \", expected text"),
        ({"gt_answer": None}, "item 1: 'gt_answer' is missing, expected text"),
        ({"image_content": "Cat"}, "'image_content' is str \"Cat\", expected a list of texts"),
        ({"image": "no.png"}, "'image' is 'no.png': no such file"),
    ],
)
def test_rows_of_another_form_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        mmhal(template(tmp_path, **changes), Images())


def test_files_of_another_form_are_named(tmp_path):
    path = tmp_path / "x.json"
    for text, message in (
        ("{}", "x.json: holds a dict, expected a list of objects"),
        ("[", "x.json: not valid JSON"),
        ("[]", "x.json: holds no questions"),
        ("[3]", "x.json, item 1: found int 3, expected an object"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            mmhal(str(path), Images())


def rows():
    return [
        {"image": {"bytes": png(colour), "path": f"{n}.png"}, "question": f"What is it, {n}?",
         "chosen": "I see a colour.", "rejected": "Go away.", "class1": "x"}
        for n, colour in enumerate(COLOURS)
    ]  # fmt: skip


def test_spa_vl_from_parquet_from_jsonl_and_from_a_folder_of_datasets(tmp_path):
    data = datasets.Dataset.from_list(rows()).cast_column("image", datasets.Image())
    data.to_parquet(tmp_path / "validation.parquet")
    datasets.DatasetDict({"validation": data}).save_to_disk(tmp_path / "folder")
    for n, colour in enumerate(COLOURS):
        (tmp_path / f"{n}.png").write_bytes(png(colour))
    lines = write_jsonl(
        tmp_path / "x.jsonl", [row | {"image": row["image"]["path"]} for row in rows()]
    )
    for source in (tmp_path / "validation.parquet", lines, tmp_path / "folder"):
        found = spa_vl_pairs(str(source), Images())
        assert [prompt.pair.prompt for prompt in found.prompts] == [
            [{"role": "user", "content": f"What is it, {n}?"}] for n in range(3)
        ]
        assert {(p.pair.chosen, p.pair.rejected) for p in found.prompts} == {
            ("I see a colour.", "Go away.")
        }
        assert [p.pair.picture.payload for p in found.prompts] == [png(c) for c in COLOURS]


def test_test_questions_have_no_answers_and_come_in_two_splits(tmp_path):
    bare = [{key: row[key] for key in ("image", "question")} for row in rows()]
    data = datasets.Dataset.from_list(bare).cast_column("image", datasets.Image())
    data.to_parquet(tmp_path / "harm.parquet")
    datasets.DatasetDict({"harm": data, "help": data.select([2])}).save_to_disk(tmp_path / "both")
    assert len(spa_vl_questions(str(tmp_path / "harm.parquet"), Images()).prompts) == 3
    found = spa_vl_questions(str(tmp_path / "both"), Images())
    assert [prompt.facts["split"] for prompt in found.prompts] == ["harm"] * 3 + ["help"]
    assert found.prompts[3].pair.picture.payload == png("blue")
    with pytest.raises(InputError, match=r"harm.parquet, row 1: 'chosen' is missing"):
        spa_vl_pairs(str(tmp_path / "harm.parquet"), Images())
