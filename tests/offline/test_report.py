"""The page: its facts, its escaping, and that it loads nothing."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import torch
from typer.testing import CliRunner

from grains_vllm.vectors import ModelFingerprint, SteeringVector
from offline.cli import app
from tests.offline.results import baselines, evaluation, sweep

NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
HOSTILE = [
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"'><b>", "&amp;",
    "\u202eevil\u2066", "\x00\x07\x1b[31m", "\ud83d", "{{ 7*7 }}{% raw %}", "--><!--", "\u2028",
]  # fmt: skip


class Page(HTMLParser):
    """A page taken apart: elements as (tag, attributes), and the text of each open element."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.within = [], [], []
        self.html = html
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.texts.append("")
        if tag not in ("meta", "link", "input", "br"):
            self.within.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.texts.append("")

    def handle_endtag(self, tag):
        assert self.within and self.within[-1][0] == tag, f"</{tag}> closes {self.within[-1:]}"
        self.within.pop()
        if tag in ("th", "td"):
            self.handle_data(" ")

    def handle_data(self, data):
        for _, index in self.within:
            self.texts[index] += data

    def find(self, tag, **wanted):
        """(attributes, text) of the elements with a tag, a class and other attributes."""
        css = wanted.pop("css", None)
        return [
            (attributes, text)
            for (name, attributes), text in zip(self.elements, self.texts, strict=True)
            if name == tag
            and (css is None or css in (attributes.get("class") or "").split())
            and all(attributes.get(key) == value for key, value in wanted.items())
        ]

    def text(self, tag="main", **wanted):
        return " ".join(" ".join(text for _, text in self.find(tag, **wanted)).split())


def record(number, tokens, scores, **more):
    return {
        "id": f"e{number}", "where": "x", "fingerprint": f"f{number}", "used": True,
        "prompt_fingerprint": f"p{number}", "f_input": 0.5, "f_baseline": 0.1, "points": 32,
        "gap": 0.01, "packed": True, "tokens": tokens, "scores": scores,
        "eligible": [True] * len(tokens), "positive": [], "negative": [], **more,
    }  # fmt: skip


def records():
    return [
        record(
            0, ["<bos>", "ĠNot", "Ċ", "Ġso", "Ġ", "âĢ", "Ķ"], [3, 0.8, 0, -0.4, 0.1, 0.01, -0.02],
            eligible=[False, *[True] * 6], positive=[1], negative=[3],
        ),
        record(1, ["Ġgap"], [0.1], gap=0.2, positive=[0]),
        record(2, ["Ġno"], [-0.5], used=False, negative=[0], f_input=-1.25),
    ]  # fmt: skip


def vector(items, **passport):
    facts = {
        "model_id": "tiny", "method": "grains", "data": {"name": "pairs.jsonl", "total": 9},
        "options": {"direction": "mean", "mode": "contrast", "k": 3, "objective": "mean"},
        "examples": [{k: i[k] for k in ("id", "fingerprint", "used")} for i in items],
        "examples_used": 2, "examples_dropped": 1,
        "completeness": {"median": 0.01, "tolerance": 0.05, "above_tolerance": 1},
        "layers": [
            {"layer": n, "explained_variance": 0.41 + n, "stability": None, "cosine": -0.5,
             "raw_norm": 1.5, "mean_norm": 1.25, "median_norm": 7} for n in range(3)
        ],
        "versions": {"torch": "2.13.0"}, **passport,
    }  # fmt: skip
    model = ModelFingerprint("LlamaForCausalLM", 4, 3)
    return SteeringVector(torch.eye(3, 4), torch.full((3,), 7.0), model, facts)


def write(folder, items, *, name="v", beside=True, **passport):
    """An artifact and, if `beside`, its attributions; the artifact's path."""
    made = vector(items, **passport)
    made.save(folder / f"{name}.safetensors")
    if beside:
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (folder / f"{name}.attributions.jsonl").write_text(lines)
    return folder / f"{name}.safetensors"


def put(path, document):
    path.write_text(json.dumps(document))
    return path


def report(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def page(path, *more):
    result = report(path, *more)
    assert result.exit_code == 0, result.output
    html = path.with_suffix(".html").read_bytes().decode()
    assert result.stdout.startswith("wrote ") and "MB)" in result.stdout
    found = Page(html)
    assert [tag for tag, _ in found.within] == []
    return found


def full(tmp_path):
    path = write(tmp_path, records())
    digest = SteeringVector.load(path).digest
    put(tmp_path / "v.sweep.json", sweep(digest))
    put(tmp_path / "v.evaluation.json", evaluation(digest))
    return page(path, put(tmp_path / "b.json", baselines()))


def test_the_passport_and_what_is_missing(tmp_path):
    found = page(write(tmp_path, records(), beside=False))
    facts = dict(
        zip([t for _, t in found.find("dt")], [t for _, t in found.find("dd")], strict=True)
    )
    assert facts["Model"] == "tiny" and facts["Examples"] == "2 used, 1 dropped, drawn from 9"
    assert facts["Architecture"] == "LlamaForCausalLM, 3 layers of width 4"
    assert facts["Recommended"] == "nothing" and facts["Chosen by"] == "nobody yet"
    assert facts["Digest"] == SteeringVector.load(tmp_path / "v.safetensors").digest
    assert facts["torch"] == "2.13.0" and facts["k"] == "3"
    missing = found.text("ul", css="notes")
    for words in (
        "nobody has chosen layers and strength", "No attributions here", "No evaluation here",
        "1 example has a completeness gap above 0.05",
    ):  # fmt: skip
        assert words in missing
    assert not found.find("details", css="example")


def test_given_is_not_called_measured(tmp_path):
    recommended = {"layers": [1, 2], "strength": 0.2, "source": "given to grains extract"}
    found = page(write(tmp_path, records(), recommended=recommended))
    assert "were given, not measured" in found.text("ul", css="notes")
    assert "Recommended: layers 1-2, strength 0.2 (given to grains extract)" in found.text()


def test_every_token_has_its_shade_mark_and_score(tmp_path):
    found = full(tmp_path)
    assert len(found.find("details", css="example")) == 3
    tokens = [
        (text, attributes["data-s"], (attributes.get("class") or "").split())
        for attributes, text in found.find("span")
        if "data-s" in attributes
    ]
    assert tokens[:7] == [
        ("<bos>", "+3", ["m4", "dim"]),
        ("Not", "+0.8", ["m8", "plus"]),  # the darkest shade is an eligible token's
        ("↵\n", "+0", []),
        ("so", "-0.4", ["l4", "minus"]),
        ("·", "+0.1", ["m1"]),
        ("⟨E2 80⟩", "+0.01", []),
        ("—", "-0.02", []),  # the character is complete
    ]
    prompts = [text for _, text in found.find("div", css="prompt")]
    assert prompts[0] == "<bos> Not↵\n so·⟨E2 80⟩—"
    first, second, third = found.find("p", css="set")[::2]
    assert "Not +0.8 at 1" in " ".join(first[1].split())
    assert "none" in third[1] and "gap" in second[1]


def test_examples_say_what_was_computed(tmp_path):
    found = full(tmp_path)
    values = [text for _, text in found.find("dl", css="figures")]
    assert "F(x)+0.500" in values[0].replace("\n", "") and "+3.490" in values[0]
    assert "0.200 (above tolerance)" in values[1]
    attributes = [attributes for attributes, _ in found.find("details", css="example")]
    assert ["data-above" in a for a in attributes] == [False, True, False]
    assert ["data-dropped" in a for a in attributes] == [False, False, True]
    assert [a["data-gap"] for a in attributes] == ["0.01", "0.2", "0.01"]
    assert "no eligible token speaks for the chosen answer" in found.text()
    assert "1 of 3 examples are above the tolerance of 0.05" in found.text()


def test_layers_sweep_evaluation_and_baselines(tmp_path):
    found = full(tmp_path)
    text = found.text()
    assert f"0 0.410 {NONE} {MINUS}0.500 7.000 1.500 1.250" in text
    assert "9 points were measured on tiny with transformers" in text
    assert "controls at least 0.85, perplexity at most 3% up; 6 points keep them" in text
    assert "chosen v 1-2 0.2 all positions 0.600 0.400 0.700 0.890 9.200" in text
    assert "not what this artifact recommends" in text
    assert "0.500 [0.400, 0.600] +0.060 [+0.020, +0.080] better" in text
    effects, side_effects = found.find("table", css="evaluation")
    assert "goal-task" in effects[1] and "dear-task" not in effects[1]
    assert re.search(r"dear-task.*worse.*calm-task.*no clear difference", side_effects[1], re.S)
    assert "90% intervals" in text and "overlap is not checked" in text
    assert "A small world" in text and "0.300 ± 0.040" in text and f"not run {NONE}" in text
    assert "exact (share)" in text
    charts = [a for a, _ in found.find("svg")]
    assert len(charts) == 4 + 1 + 2 and all(a["role"] == "img" for a in charts)
    assert any("chosen: v, layers 1-2, strength 0.2, 0.6" in a["aria-label"] for a in charts)


def test_the_page_loads_nothing_and_its_policy_fits(tmp_path):
    found = full(tmp_path)
    for tag, attributes in found.elements:
        assert "src" not in attributes and "style" not in attributes and "xmlns" not in attributes
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))
    assert not re.search(r"https?:|@import|@font-face", found.html)
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", found.html))
    (policy,) = [a["content"] for a, _ in found.find("meta") if "http-equiv" in a]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        ((_, text),) = found.find(tag)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert "unsafe" not in policy


def test_ids_are_unique_and_references_have_them(tmp_path):
    found = full(tmp_path)
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#(.*?)\)", found.html)
    used += [a["href"][1:] for _, a in found.elements if (a.get("href") or "").startswith("#")]
    assert used and set(used) <= set(ids)


def test_every_colour_of_a_chart_follows_the_theme(tmp_path):
    found = full(tmp_path)
    outside = found.html[: found.html.index("<style>")] + found.html[found.html.index("</style>") :]
    assert not re.findall(r'(?:fill|stroke)="(?!none|url)[^"]*"', outside)


def test_hostile_texts_stay_texts(tmp_path):
    scores = [float(n) for n in range(len(HOSTILE))]
    # Half a character comes in tokens; in an artifact, which holds the ids, it is refused.
    names = [text.replace("\ud83d", "") for text in HOSTILE]
    items = [record(n, HOSTILE, scores, id=f"{name}{n}") for n, name in enumerate(names)]
    path = write(
        tmp_path, items, model_id=HOSTILE[0], method=HOSTILE[4], data={"name": HOSTILE[1]},
        versions={HOSTILE[2]: HOSTILE[5]}, odd=["</style>", {"a": "</script>"}], layers=[{}],
    )  # fmt: skip
    digest = SteeringVector.load(path).digest
    put(tmp_path / "v.sweep.json", sweep(digest, HOSTILE[0]))
    bad = baselines()
    bad["rows"][0]["method"] = bad["title"] = HOSTILE[1]
    found = page(path, put(tmp_path / "b.json", bad))
    assert len(found.find("script")) == 1 and not found.find("img") and not found.find("style")[1:]
    prompt = found.find("div", css="prompt")[0][1]
    for text in HOSTILE[:4]:
        assert text in prompt
    for text in ("⟨U+202E⟩evil⟨U+2066⟩", "⟨U+0000⟩⟨U+0007⟩⟨U+001B⟩[31m", "⟨U+D83D⟩", "⟨U+2028⟩"):
        assert text in prompt
    assert "{{ 7*7 }}{% raw %}" in prompt
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", found.html)


def test_several_artifacts_are_compared(tmp_path):
    write(tmp_path, records(), name="other", beside=False, model_id="large")
    path = write(tmp_path, records())
    found = page(path, tmp_path / "other.safetensors")
    (table,) = [text for a, text in found.find("section", id="compared")]
    assert "large" in table and "tiny" in table
    assert [t for _, t in found.find("h2")][:3] == ["Compared", "v", "Layers of v"]
    assert "Examples of v" in found.text() and "Examples of other" not in found.text()


def test_results_alone_make_a_page(tmp_path):
    found = page(put(tmp_path / "s.json", sweep("d")), put(tmp_path / "e.json", evaluation("d")))
    assert "s.json" in found.text("h1") and "9 points" in found.text()


def test_the_page_is_reproducible_and_not_overwritten(tmp_path):
    path = write(tmp_path, records())
    first = page(path).html
    again = report(path)
    assert again.exit_code == 2 and "--force overwrites it" in again.stderr
    assert page(path, "--force").html == first
    assert str(tmp_path) not in first


def test_a_strangers_artifact_has_a_page(tmp_path):
    model = ModelFingerprint("LlamaForCausalLM", 4, 2)
    passport = {"options": "x", "data": 3, "layers": [7, {"layer": 0, "stability": "hi"}],
                "completeness": {"tolerance": "x"}, "versions": None, "sweep": []}  # fmt: skip
    SteeringVector(torch.eye(2, 4), torch.ones(2), model, passport).save(tmp_path / "v.safetensors")
    assert "not said" in page(tmp_path / "v.safetensors").text()
