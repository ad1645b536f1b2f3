"""Reading preference pairs, and refusing what cannot be one."""

import json

import pytest

from offline.errors import InputError
from offline.pairs import load_pairs
from tests.offline.worlds import rows, write_jsonl

GOOD = {"prompt": "w3 w4", "chosen": "w1", "rejected": "w2"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_jsonl_keeps_ids_and_counts_from_one(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [GOOD | {"id": "a"}, GOOD | {"prompt": "w9"}])
    data = load_pairs(str(path))
    assert [pair.id for pair in data.pairs] == ["a", "2"]
    assert data.pairs[1].where == "pairs.jsonl, line 2"
    assert data.name == "pairs.jsonl" and data.total == 2 and len(data.sha256) == 64


def test_fingerprints_follow_the_content_only(tmp_path):
    items = [GOOD | {"id": "a"}, GOOD | {"id": "b"}, GOOD | {"chosen": "w5"}]
    one, two, three = load_pairs(str(write_jsonl(tmp_path / "x.jsonl", items))).pairs
    assert one.fingerprint == two.fingerprint != three.fingerprint
    assert one.prompt_fingerprint == three.prompt_fingerprint


def test_limit_draws_with_the_seed_and_keeps_order(tmp_path):
    path = str(write_jsonl(tmp_path / "pairs.jsonl", rows(40)))
    drawn = [int(pair.id[1:]) for pair in load_pairs(path, limit=10, seed=1).pairs]
    assert drawn == sorted(drawn) and len(set(drawn)) == 10 and drawn != list(range(10))
    assert drawn == [int(p.id[1:]) for p in load_pairs(path, limit=10, seed=1).pairs]
    assert drawn != [int(p.id[1:]) for p in load_pairs(path, limit=10, seed=2).pairs]
    assert len(load_pairs(path, limit=99).pairs) == 40


def test_trl_explicit_conversation(tmp_path):
    item = {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    (pair,) = load_pairs(str(write_jsonl(tmp_path / "x.jsonl", [item]))).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ([user("hi")], "yes", "no")


def test_trl_implicit_prompt_is_the_common_start(tmp_path):
    start = [user("hi"), assistant("hello"), user("well?")]
    item = {"chosen": [*start, assistant("yes")], "rejected": [*start, assistant("no")]}
    (pair,) = load_pairs(str(write_jsonl(tmp_path / "x.jsonl", [item]))).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == (start, "yes", "no")


def test_chat_wraps_text(tmp_path):
    (pair,) = load_pairs(str(write_jsonl(tmp_path / "x.jsonl", [GOOD])), chat=True).pairs
    assert pair.prompt == [user("w3 w4")] and pair.chosen == "w1"


TRUTHFULQA = (
    "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    'Adversarial,Made up,Do cats fly?,"No, they walk",No; Never,Yes; Often,https://example.org\n'
    'Adversarial,Made up,"Is ""blue"" a number?",It is a colour,It is not,It is 7,none\n'
)


def test_truthfulqa_csv(tmp_path):
    path = tmp_path / "small.csv"
    path.write_text("\ufeff" + TRUTHFULQA, encoding="utf-8")
    one, two = load_pairs(str(path)).pairs
    assert one.prompt == "Q: Do cats fly?\nA:"
    assert (one.chosen, one.rejected) == (" No, they walk", " Yes")
    assert one.prompt[slice(*one.question)] == "Do cats fly?"
    assert two.prompt[slice(*two.question)] == 'Is "blue" a number?'
    chat = load_pairs(str(path), chat=True).pairs[0]
    assert (chat.prompt, chat.chosen) == ([user("Do cats fly?")], "No, they walk")


def test_byte_order_mark_is_no_part_of_a_column(tmp_path):
    path = tmp_path / "sheet.csv"
    path.write_text("\ufeffprompt,chosen,rejected\nw3,w1,w2\n", encoding="utf-8")
    assert load_pairs(str(path)).pairs[0].prompt == "w3"


def test_csv_and_parquet_and_dataset_folder_agree(tmp_path):
    import datasets

    items = rows(5)
    expected = [
        p.fingerprint for p in load_pairs(str(write_jsonl(tmp_path / "x.jsonl", items))).pairs
    ]
    table = datasets.Dataset.from_list(items)
    table.to_csv(tmp_path / "x.csv", index=False)
    table.to_parquet(tmp_path / "x.parquet")
    table.save_to_disk(tmp_path / "folder")
    for name in ("x.csv", "x.parquet", "folder"):
        data = load_pairs(str(tmp_path / name))
        assert [pair.fingerprint for pair in data.pairs] == expected, name
        assert data.name == name


BAD = [
    ([], "holds no preference pairs"),
    (["x"], "line 1: found str"),
    ([GOOD, {"prompt": "a", "chosen": "b"}], "line 2: 'rejected' is missing"),
    ([{"chosen": "a", "rejected": "b"}], "line 1: 'prompt' is missing"),
    ([GOOD | {"chosen": "\ud83d"}], "line 1: holds half a character"),
    ([GOOD | {"chosen": 3}], "'chosen' is int 3"),
    ([GOOD | {"prompt": {"a": 1}}], "'prompt' is dict"),
    ([GOOD | {"prompt": [{"role": "user"}]}], r"'prompt\[0\].content' is missing"),
    ([GOOD | {"prompt": [{"role": "user", "content": ["x"]}]}], r"content\[0\]' is str"),
    ([GOOD | {"prompt": "  "}], "'prompt' is empty"),
    ([GOOD | {"rejected": "w1 "}], "'chosen' and 'rejected' are identical"),
    ([GOOD | {"chosen": ""}], "'chosen' is empty"),
    ([GOOD | {"id": 1.5}], "'id' is float"),
    ([GOOD | {"prompt": [user("a")], "chosen": [user("b")]}], "expected exactly one 'assistant'"),
    ([{"chosen": [assistant("a")], "rejected": [assistant("b")]}], "'prompt' is empty"),
]


@pytest.mark.parametrize(("items", "message"), BAD)
def test_bad_pairs_name_line_and_field(tmp_path, items, message):
    path = write_jsonl(tmp_path / "pairs.jsonl", items)
    with pytest.raises(InputError, match=message):
        load_pairs(str(path))


def test_bad_files(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(GOOD) + "\n{oops\n")
    with pytest.raises(InputError, match=r"broken.jsonl, line 2: not valid JSON"):
        load_pairs(str(broken))
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load_pairs(str(binary))
    columns = tmp_path / "columns.csv"
    columns.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"its columns are \['a', 'b'\]"):
        load_pairs(str(columns))
    fake = tmp_path / "fake.parquet"
    fake.write_text("no")
    with pytest.raises(InputError, match="not a readable parquet"):
        load_pairs(str(fake))
    with pytest.raises(InputError, match="unknown kind of file"):
        load_pairs(str(write_jsonl(tmp_path / "pairs.txt", [GOOD])))
    with pytest.raises(InputError, match="no such file"):
        load_pairs(str(tmp_path / "absent.jsonl"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "prompt,chosen,rejected\nq,No, it is not,yes\n",
            "x.csv, line 2: 1 more fields than columns",
        ),
        ("prompt,prompt,chosen,rejected\na,b,c,d\n", "expected each name once"),
    ],
)
def test_a_csv_that_would_be_read_shifted_is_refused(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        load_pairs(str(tmp_path / "x.csv"))


def test_csv_fields_may_be_long(tmp_path):
    prompt = "word " * 40_000
    (tmp_path / "x.CSV").write_text(f"prompt,chosen,rejected\n{prompt},yes,no\n")
    assert load_pairs(str(tmp_path / "x.CSV")).pairs[0].prompt == prompt


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": ' + "9" * 5000 + "}"])
def test_monstrous_json_is_refused(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(InputError, match=r"x\.jsonl, line 1: not valid JSON"):
        load_pairs(str(tmp_path / "x.jsonl"))


def test_truthfulqa_columns_of_another_type_are_named(tmp_path):
    row = {"Question": 3, "Best Answer": "a", "Incorrect Answers": "b"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match="line 1: 'Question' is int 3, expected text"):
        load_pairs(str(tmp_path / "x.jsonl"))
