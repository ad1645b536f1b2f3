"""Images on the page: cells, marks and names at known scores, and what a stranger may not bring."""

import base64
import copy
import hashlib
import re

import pytest

from tests.offline.test_report import HOSTILE, MINUS, page, record, records, report, write

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
JPEG = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(40)).decode()
SVG = base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>").decode()
TIMES = "\N{MULTIPLICATION SIGN}"
WHOLE = [0, 0, 1, 1]


def view(rows, columns, positions, name="whole image", box=WHOLE):
    return {"name": name, "rows": rows, "columns": columns, "box": box, "positions": positions}


def image(*views, spans=((2, 7),), **more):
    return {
        "name": "images/3.png", "sha256": "ab" * 32, "width": 640, "height": 480,
        "thumbnail": f"data:image/png;base64,{PNG}", "spans": [list(span) for span in spans],
        "views": list(views), **more,
    }  # fmt: skip


def pictured(number=0, **more):
    """A prompt with 2 rows of 3 cells, the last without a token; the text spells one too."""
    tokens = ["<s>", "<image>", *["<image>"] * 5, "▁what", "▁is", "</s>"]
    scores = [4, 0.1, 0.8, -0.2, 0.2, 0.2, -0.8, 0.4, -0.1, 9]
    return record(
        number, tokens, scores, eligible=[False, *[True] * 8, False], positive=[2, 7, 4],
        negative=[6, 3], **{"image": image(view(2, 3, [2, 3, 4, 5, 6, None])), **more},
    )  # fmt: skip


def tiled(number=0):
    """A prompt with two views, of which the second has row separators, and an odd token."""
    tokens = ["<s>", *["<image>"] * 8, "▁so", "<image>"]
    scores = [0.0, 0.1, 0.2, 0.3, -0.4, 0.05, 0.6, -0.7, 0.05, 0.8, 0.25]
    views = (
        view(1, 2, [1, 2]),
        view(2, 2, [3, 4, 6, 7], "tiles", [0.25, 0, 0.75, 0.5]),
    )
    return record(
        number, tokens, scores, eligible=[False, *[True] * 9, False], positive=[9, 6, 5, 2],
        negative=[7], image=image(*views, spans=[(1, 9), (10, 11)]),
    )  # fmt: skip


def shaded(found):
    """Per drawn grid, the class of every cell (row, column) from the paths that shade them."""
    grids, cells = [], None
    for tag, attributes in found.elements:
        if tag == "svg" and "data-cells" in attributes:
            cells = {}
            grids.append(cells)
        elif tag == "path" and re.fullmatch("[lm][1-8]", attributes.get("class", "")):
            for x, y, length in re.findall(r"M(\d+) (\d+)h(\d+)", attributes["d"]):
                for column in range(int(x), int(x) + int(length)):
                    assert (int(y), column) not in cells
                    cells[int(y), column] = attributes["class"]
    return grids


def sides(found, css):
    return [set(re.findall(r"M\d+ \d+[hv]1", a["d"])) for a, _ in found.find("path", css=css)]


def test_every_cell_has_its_shade_and_the_chosen_ones_a_border(tmp_path):
    found = page(write(tmp_path, [pictured()]))
    assert shaded(found) == [
        # The scale is the text's too: 0.8 is the largest score of an eligible token.
        {(0, 0): "m8", (0, 1): "l2", (0, 2): "m2", (1, 0): "m2", (1, 1): "l8"}
    ]
    assert any("full colour ±0.800" in text for _, text in found.find("div", css="key"))
    _, plus = sides(found, "plus")  # the first stands in the key
    assert plus == {f"M{x} 0h1" for x in (0, 2)} | {f"M{x} 1h1" for x in (0, 2)} | {
        f"M{x} 0v1" for x in (0, 1, 2, 3)
    }
    _, minus = sides(found, "minus")
    assert minus == {"M1 0h1", "M1 2h1", "M1 0v1", "M2 0v1", "M1 1v1", "M2 1v1"}  # two cells, one
    ((grid, _),) = [(a, t) for a, t in found.find("svg") if "data-cells" in a]
    assert grid["data-cells"] == "0.8+ -0.2- 0.2+ 0.2 -0.8- -" and grid["viewbox"] == "0 0 3 2"
    ((drawing, _),) = [(a, t) for a, t in found.find("svg", role="img", css="cells")]
    summary = f"whole image, 2 rows of 3: 5 tokens, sum +0.200, 2 in T+, 2 in T{MINUS}"
    assert drawing["aria-label"] == summary


def test_image_tokens_are_one_chip_and_cells_have_names(tmp_path):
    found = page(write(tmp_path, [pictured()]))
    (prompt,) = found.find("div", css="prompt")
    assert prompt[1] == "<s><image>image, 5 tokens, sum +0.200 what is</s>"
    assert prompt[0]["aria-label"] == "Prompt of e0, 10 tokens"
    ((chip, _),) = found.find("span", css="chip")
    assert chip["data-n"] == "5" and chip["data-s"] == "+0.2"
    assert found.find("span", css="begins")[0][1] == "<image> what is"
    plus, minus = [" ".join(text.split()) for _, text in found.find("p", css="set")]
    assert plus == "T+ image r1 c1 +0.8what +0.4 at 7image r1 c3 +0.2"
    assert minus == f"T{MINUS} image r2 c2 {MINUS}0.8image r1 c2 {MINUS}0.2"
    assert f"image: 5 tokens, sum +0.200, 2 in T+, 2 in T{MINUS}." in found.text()
    assert f"images/3.png, 640 {TIMES} 480 pixels, sha256 abababababababab." in found.text()


def test_two_views_share_a_picture_and_separators_are_counted(tmp_path):
    found = page(write(tmp_path, [tiled()]))
    assert [sorted(cells) for cells in shaded(found)] == [
        [(0, 0), (0, 1)], [(0, 0), (0, 1), (1, 0), (1, 1)],
    ]  # fmt: skip
    ((picture, _),) = found.find("image")
    assert len(found.find("use", href=f"#{picture['id']}")) == 1
    boxes = [
        [a[k] for k in ("x", "y", "width", "height")] for a, _ in found.find("svg") if "x" in a
    ]
    assert boxes == [["0", "0", "640", "480"], ["160", "0", "320", "240"]]
    assert len(found.find("path", css="beyond")) == 1
    plus = " ".join(found.find("p", css="set")[0][1].split())
    names = (
        "image r2 c1 of tiles +0.6",
        "image token +0.05 at 5",
        "image r1 c2 of whole image +0.2",
    )
    assert all(name in plus for name in names) and "so +0.8 at 9" in plus
    assert (
        f"image: 9 tokens, sum +0.450, 3 in T+, 1 in T{MINUS}; 3 of them in no cell" in found.text()
    )
    assert [t for _, t in found.find("span", css="chip")] == [
        "image, 8 tokens, sum +0.200", "image, 1 token, sum +0.250",
    ]  # fmt: skip
    assert f"tiles: 2 {TIMES} 2 cells over a part of the image" in found.text("figcaption")


def test_an_image_of_unknown_layout_is_shown_without_cells(tmp_path):
    found = page(write(tmp_path, [pictured(image=image())]))
    ((picture, _),) = found.find("image")
    assert picture["href"] == f"data:image/png;base64,{PNG}"
    assert not shaded(found) and not found.find("div", css="stage")
    assert "which part of it a token stands for is not known" in found.text()
    assert [t for _, t in found.find("span", css="chip")] == ["image, 5 tokens, sum +0.200"]
    assert "image token +0.8 at 2" in " ".join(found.find("p", css="set")[0][1].split())


def test_cells_that_cannot_be_chosen_keep_eight_shades(tmp_path):
    item = pictured()
    item |= {"eligible": [False, True, *[False] * 5, True, True, False], "positive": [7]}
    found = page(write(tmp_path, [item | {"negative": [8]}]))
    assert shaded(found)[0] == {
        (0, 0): "m8", (0, 1): "l2", (0, 2): "m2", (1, 0): "m2", (1, 1): "l8",
    }  # fmt: skip
    assert "image tokens cannot be chosen here" in found.text()
    assert 'data-cells="0.8! -0.2! 0.2! 0.2! -0.8! -"' in found.html


def test_shares_of_image_and_text(tmp_path):
    text = record(2, ["x"], [5.0])
    found = page(write(tmp_path, [pictured(0), tiled(1), text]))
    rows = [" ".join(t.split()) for _, t in found.find("tr")]
    # |scores| of the first: image 2.2, text 0.6, other 13; of the second: 2.65, 0.8, 0.
    wanted = [
        "per prompt image text other text",
        "tokens 7.0 2.0 1.5",
        f"share of |attribution| {100 * (2.2 / 15.8 + 2.65 / 3.45) / 2:.1f}% "
        f"{100 * (0.6 / 15.8 + 0.8 / 3.45) / 2:.1f}% {100 * (13 / 15.8) / 2:.1f}%",
        "sum of scores, nats +0.325 +0.600 +6.500",
        "chosen, in T+ 2.5 1.0 0.0",
        f"chosen, in T{MINUS} 1.5 0.0 0.0",
    ]
    assert [row for row in rows if row in wanted] == wanted
    assert "Means over 2 prompts with an image" in found.text()


def test_pages_with_images_load_nothing_and_are_reproducible(tmp_path):
    jpeg = image(view(1, 1, [0]), spans=[(0, 1)], thumbnail=f"data:image/jpeg;base64,{JPEG}")
    path = write(tmp_path, [pictured(0), tiled(1), record(2, ["<i>"], [1.0], image=jpeg)])
    found = page(path)
    for tag, attributes in found.elements:
        assert not {"src", "style", "xmlns", "xlink:href"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes)
        assert re.match("#|data:,|data:image/(png|jpeg);base64,", attributes.get("href") or "#")
    assert not re.search(r"https?:|@import|@font-face", found.html)
    assert [a["href"] for a, _ in found.find("image")][2] == f"data:image/jpeg;base64,{JPEG}"
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    (policy,) = [a["content"] for a, _ in found.find("meta") if "http-equiv" in a]
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        ((_, text),) = found.find(tag)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy
    assert "img-src data:;" in policy
    assert page(path, "--force").html == found.html


def test_pages_without_images_know_nothing_of_them(tmp_path):
    html = page(write(tmp_path, [*records(), record(3, ["Ġx"], [1.0], image=None)])).html
    assert not re.search("data-cells|pictured|chip|stage|Image and text", html)


def test_hostile_names_stay_texts(tmp_path):
    names = [f"{text}{number}" for number, text in enumerate(HOSTILE)]
    items = [
        pictured(n, image=image(view(2, 3, [2, 3, 4, 5, 6, None], name), name=name))
        for n, name in enumerate(names)
    ]
    found = page(write(tmp_path, items))
    assert len(found.find("script")) == 1 and len(found.find("style")) == 1
    assert not found.find("img") and not found.find("b", css=None, onerror="alert(1)")
    for name, (stage, _) in zip(names, found.find("div", css="stage"), strict=True):
        assert name not in HOSTILE[:4] or name in stage["aria-label"]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", found.html)


URL = "expected a PNG or JPEG as data:image/png;base64,... or data:image/jpeg;base64,..."
WRONG = [
    ([], "x", "'image' is \"x\", expected an object"),
    (["views"], None, "'image.views' is null, expected a list"),
    (["width"], 0, "'image.width' is 0, expected 1 to 100000 pixels"),
    (["height"], 10**6, "'image.height' is 1000000"),
    (["sha256"], "AB" * 32, "'image.sha256' is 'ABAB"),
    (["thumbnail"], "https://example.org/a.png", f"'https://example.org/a.png', {URL}"),
    (["thumbnail"], f"data:image/svg+xml;base64,{SVG}", URL),
    (["thumbnail"], f"data:image/png;base64,{SVG}", URL),
    (["thumbnail"], f"data:image/jpeg;base64,{PNG}", URL),
    (["thumbnail"], f"data:image/png;base64,{PNG[:-1]}", URL),
    (["thumbnail"], f"data:image/png;base64,{PNG}\n", URL),
    (["thumbnail"], f'data:image/png;base64,{PNG}"', URL),
    (["thumbnail"], f" data:image/png;base64,{PNG}", URL),
    (["thumbnail"], "data:image/png;base64,", URL),
    (["thumbnail"], "javascript:alert(1)", URL),
    (["views", 0, "rows"], 0, "'image.views[0].rows' is 0, expected 1 or more"),
    (["views", 0, "columns"], True, "'image.views[0].columns' is true, expected a whole number"),
    (["views", 0, "rows"], 3, "'image.views[0].positions' has 6 entries for 3 rows of 3"),
    (["views", 0, "positions", 1], 10, "'image.views[0].positions' holds the position 10, which"),
    (["views", 0, "positions", 1], -1, "'image.views[0].positions' holds the position -1, which"),
    (["views", 0, "positions", 1], 1, "holds the position 1, which is in none of 'image.spans'"),
    (["spans"], [[2, 11]], "'image.spans[0]' is [2, 11], expected [start, end], 0 to 10, start <"),
    (["spans"], [[2, 4], [3, 7]], "'image.spans[1]' is [3, 7], expected [start, end], 4 to 10"),
    (["spans"], [], "'image.spans' is empty, expected one [start, end] or more"),
    (["spans"], [[2]], "'image.spans[0]' is [2], expected [start, end]"),
    (["spans"], [[2, 2]], "'image.spans[0]' is [2, 2], expected"),
    (["spans"], [[True, 7]], "'image.spans[0][0]' is true, expected a whole number"),
    (["views", 0, "positions", 1], 2, "'image.views[0].positions' holds the position 2 again"),
    (["views", 0, "positions", 1], 2.0, "'image.views[0].positions[1]' is 2.0, expected a whole"),
    (["views", 0, "box"], [0, 0, 1], "'image.views[0].box' is [0, 0, 1], expected [left, top,"),
    (["views", 0, "box"], [0, 0, 0, 1], "'image.views[0].box' is [0, 0, 0, 1], expected"),
    (["views", 0, "box"], [0, -0.1, 1, 1], "'image.views[0].box' is [0, -0.1, 1, 1], expected"),
    (["views", 0, "box"], [0, 0, 1, "1"], "'image.views[0].box[3]' is \"1\", expected a number"),
]


@pytest.mark.parametrize(("way", "value", "message"), WRONG, ids=[m for *_, m in WRONG])
def test_bad_images(tmp_path, way, value, message):
    item = {"image": copy.deepcopy(pictured()["image"])}
    inner, steps = item, ["image", *way]
    for step in steps[:-1]:
        inner = inner[step]
    inner[steps[-1]] = value
    result = report(write(tmp_path, [records()[0], pictured(1, **item)]))
    assert result.exit_code == 2 and "v.attributions.jsonl, line 2: 'image" in result.stderr
    assert message in result.stderr
    assert not (tmp_path / "v.html").exists()


@pytest.mark.parametrize("name", ["name", "sha256", "width", "thumbnail", "spans", "views"])
def test_missing_fields(tmp_path, name):
    given = {key: value for key, value in pictured()["image"].items() if key != name}
    result = report(write(tmp_path, [pictured(image=given)]))
    assert f"v.attributions.jsonl, line 1: 'image.{name}' is missing" in result.stderr
