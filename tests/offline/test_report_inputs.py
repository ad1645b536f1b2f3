"""Which files a report takes, and what it says of those that it does not."""

import copy
import json

import pytest

from grains_vllm.vectors import SteeringVector
from offline import candidates, summary
from offline.errors import InputError
from offline.evaluation.overlap import seen_by
from offline.pairs import Pair, PairSet
from offline.report.inputs import read_inputs
from offline.report.text import shortened, visible
from offline.report.tokens import Spelling, readable, spelling
from offline.suite import require_disjoint
from tests.evaluation_world import random_vector
from tests.offline.results import baselines, evaluation, sweep
from tests.offline.test_report import put, record, records, report, write


def change(document, path, value):
    """A copy with one field replaced; `path` is such as "points.0.layers"."""
    document = copy.deepcopy(document)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner = document
    for part in way:
        inner = inner[part]
    if value is None and isinstance(last, str) and last.endswith("!"):
        del inner[last[:-1]]
    else:
        inner[last] = value
    return document


def test_neighbours_are_found_and_given_files_go_first(tmp_path):
    path = write(tmp_path, records())
    digest = SteeringVector.load(path).digest
    put(tmp_path / "v.sweep.json", sweep(digest))
    found = read_inputs([path])
    assert len(found.subjects[0].records) == 3 and len(found.subjects[0].sweeps) == 1
    mine = put(tmp_path / "mine.json", sweep(digest))
    found = read_inputs([mine, path, path, put(tmp_path / "b.json", baselines())])
    assert [result.name for result in found.subjects[0].sweeps] == ["mine.json"]
    assert [result.name for result in found.baselines] == ["b.json"] and len(found.subjects) == 1


OTHERS = [
    (lambda r: [{**i, "vector_digest": "ab" * 32} for i in r], "they are of the vector abababab"),
    (lambda r: r[:2], "they hold 2 examples, the artifact 3"),
    (lambda r: [r[1], r[0], r[2]], "the id of example 1 is 'e1', in the artifact 'e0'"),
    (lambda r: [r[0], {**r[1], "fingerprint": "x"}, r[2]], "the fingerprint of example 2 is 'x'"),
    (lambda r: [r[0], {**r[1], "used": False}, r[2]], "the used of example 2 is False"),
]


@pytest.mark.parametrize(("other", "reason"), OTHERS, ids=[reason for _, reason in OTHERS])
def test_attributions_of_another_artifact_are_refused(tmp_path, other, reason):
    path = write(tmp_path, records(), beside=False)
    write(tmp_path, other(records()), name="w")
    (tmp_path / "w.attributions.jsonl").rename(tmp_path / "v.attributions.jsonl")
    result = report(path)
    assert result.exit_code == 2 and reason in result.stderr
    assert "v.attributions.jsonl: does not belong to the artifact" in result.stderr
    assert not (tmp_path / "v.html").exists()


def test_a_digest_says_that_attributions_belong(tmp_path):
    path = write(tmp_path, records(), beside=False, examples="?")
    write(tmp_path, records(), name="w")
    given = tmp_path / "w.attributions.jsonl"
    with pytest.raises(InputError, match="passport lists no examples"):
        read_inputs([path, given])
    digest = SteeringVector.load(path).digest
    write(tmp_path, [{**item, "vector_digest": digest} for item in records()], name="w")
    assert len(read_inputs([path, given]).subjects[0].records) == 3


@pytest.mark.parametrize("make", [sweep, evaluation])
def test_results_of_another_vector_are_refused(tmp_path, make):
    path = write(tmp_path, records())
    with pytest.raises(InputError, match=r"r\.json: does not belong.*ffff.*'v' is the vector"):
        read_inputs([path, put(tmp_path / "r.json", make("ffff"))])


RECORDS = [
    ({"tokens": None}, "line 1: 'tokens' is null, expected a list"),
    ({"scores": [0.1]}, "line 1: 'scores' has 1 entries for 2 tokens"),
    ({"scores": [0.1, "x"]}, "line 1: 'scores[1]' is \"x\", expected a number"),
    ({"positive": [2]}, "line 1: 'positive' holds the position 2, there are 2 tokens"),
    ({"negative": [-1]}, "line 1: 'negative' holds the position -1"),
    ({"gap": float("nan")}, "line 1: not valid JSON (NaN is not JSON)"),
    ({"gap": 10**400}, "line 1: 'gap' is 1000"),
    ({"used": 1}, "line 1: 'used' is 1, expected true or false"),
]


@pytest.mark.parametrize(("more", "message"), RECORDS, ids=[m for _, m in RECORDS])
def test_bad_attributions(tmp_path, more, message):
    path = write(tmp_path, [{**record(0, ["a", "b"], [1, 2]), **more}])
    result = report(path)
    assert result.exit_code == 2 and f"v.attributions.jsonl, {message}" in result.stderr


RESULTS = [
    (sweep("d"), "kind", "x", "its 'kind' is 'x', expected one of grains-sweep"),
    (sweep("d"), "kind", ["x"], "its 'kind' is ['x'], expected one of grains-sweep"),
    (sweep("d"), "chosen", 10**400, "'chosen' is 1000"),
    (evaluation("d"), "tasks.0.n", 10**400, "'tasks[0].n' is 1000"),
    (evaluation("d"), "settings", [], "'settings' is empty, expected the base at least"),
    (sweep("d"), "version", 2, "its 'version' is 2, this release reads 1"),
    (sweep("d"), "metric", "f1", "'metric' is 'f1', expected one of accuracy"),
    (sweep("d"), "points", [], "'points' is empty"),
    (sweep("d"), "chosen", 99, "'chosen' is 99, but there are 9 points"),
    (sweep("d"), "points.1.accuracy", None, "'points[1].accuracy' is null, but it is the metric"),
    (sweep("d"), "points.1.layers", [], "'points[1].layers' is empty"),
    (sweep("d"), "points.1.layers", ["x"], "'points[1].layers[0]' is \"x\", expected a whole"),
    (sweep("d"), "points.2.vector", "w", "'points[2].vector' is not one of 'vectors'"),
    (sweep("d"), "base!", None, "'base' is missing"),
    (evaluation("d"), "tasks.0.values.v.low", "x", "'tasks[0].values.v.low' is \"x\""),
    (evaluation("d"), "settings", "base", "'settings' is \"base\", expected a list"),
    (baselines(), "rows.0.values.exact.mean!", None, "'rows[0].values.exact.mean' is missing"),
]


@pytest.mark.parametrize(("document", "path", "value", "message"), RESULTS, ids=str)
def test_bad_results(tmp_path, document, path, value, message):
    file = put(tmp_path / "r.json", change(document, path, value))
    result = report(file)
    assert result.exit_code == 2 and f"r.json: {message}" in result.stderr
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("digest", [None, 7, [], {"7": 7}])
def test_what_an_evaluation_says_of_its_vectors_may_be_anything(tmp_path, digest):
    document = change(evaluation("d"), "target.steered.v.digest", digest)
    result = report(put(tmp_path / "r.json", document))
    assert result.exit_code == 0, result.output


KEYS = (
    "examples", "layers", "options", "data", "completeness", "sweep", "method", "versions",
    "strength_unit", "examples_used",
)  # fmt: skip
ODD = [
    None,
    True,
    7,
    "x",
    [],
    [[]],
    [None],
    [{"layer": []}],
    [{"prompt_fingerprint": []}],
    {"x": 7},
]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_what_others_write_into_a_passport_may_be_anything(tmp_path, odd):
    """To all that read one: inspect, report, and the checks of sweeps and evaluations."""
    vector = random_vector(0, **dict.fromkeys(KEYS, odd))
    pairs = PairSet("d", "", 1, [Pair("1", "1", "a", "b", "c")])
    assert require_disjoint(pairs, {"v": vector}) == ["v"]
    assert seen_by({"v": vector}).silent == ["v"] and candidates.facts(vector)["digest"]
    summary.show(vector)
    assert json.loads(summary.as_json(vector))["examples"] == odd
    vector.save(tmp_path / "v.safetensors")
    result = report(tmp_path / "v.safetensors")
    assert result.exit_code == 0, result.output


def test_bad_files(tmp_path):
    path = write(tmp_path, records())
    for name, text, message in (
        ("x.txt", "", "unknown kind of file, expected an artifact"),
        ("x.json", "{", "not valid JSON"),
        ("x.json", "[]", "its 'kind' is None"),
        ("x.safetensors", "x", "cannot be read as a safetensors file"),
        ("x.jsonl", "", "holds no attributions"),
    ):
        (tmp_path / name).write_text(text)
        result = report(path, tmp_path / name)
        assert result.exit_code == 2 and message in result.stderr
    (tmp_path / "x.json").write_bytes(b"\xff")
    assert "not UTF-8" in report(tmp_path / "x.json").stderr
    assert "no such file" in report(tmp_path / "absent.json").stderr
    assert "one of the files" in report(path, "--out", path, "--force").stderr
    folder = tmp_path / "more"
    folder.mkdir()
    assert "two artifacts are called 'v'" in report(path, write(folder, records())).stderr


def test_spelling_and_spaces():
    assert spelling([["a"], ["b"]]) is Spelling.plain
    assert spelling([["a"], ["Ġb"]]) is Spelling.bytes
    assert spelling([["▁a", "Ġ"]]) is Spelling.pieces
    tokens = ["▁", "▁a▁b", "<0x0A>", "<0xE2>", "<0x80>", "<0x94>", "<0xFF>", "c", "", "Ġ"]
    assert readable(tokens, Spelling.pieces) == [
        "·", " a b", "↵\n", "⟨E2⟩", "⟨80⟩", "—", "⟨FF⟩", "c", "∅", "Ġ",
    ]  # fmt: skip
    assert readable(["Ġcaf", "Ã©", "ĉ", "<|x|>", "ÃĠ", "ðŁĺĢ!"], Spelling.bytes) == [
        " caf", "é", "⇥", "<|x|>", "⟨C3 20⟩", "😀!",
    ]  # fmt: skip


def test_visible():
    assert visible("a\u200db é\u3000שלם") == "a\u200db é\u3000שלם"
    assert visible("\u202e\ufeff\ue000\n") == "⟨U+202E⟩⟨U+FEFF⟩⟨U+E000⟩⟨U+000A⟩"
    assert shortened(" a\n b  c", 4) == "a b…"
