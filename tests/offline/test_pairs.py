"""Reading preference pairs, and refusing what cannot be one."""

import json
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline.errors import InputError
from offline.pairs import load_pairs, write_pairs
from tests.offline.worlds import rows, write_jsonl

NAMES = st.sampled_from(
    ["prompt", "chosen", "rejected", "role", "content", "user", "assistant", "type", "index",
     "text", "image", "images", "id", "tools", "documents", "chat_template_kwargs", "tool_calls"]
)  # fmt: skip
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


def pair_of(tmp_path, row, **options):
    [pair] = load_pairs(str(write_jsonl(tmp_path / "x.jsonl", [row])), **options).pairs
    return pair


def texts(start, chosen, rejected):
    return {"chosen": start + chosen, "rejected": start + rejected}


IMPLICIT = [  # a row, its prompt, chosen, rejected
    # UltraFeedback: a text, and whole conversations.
    ({"prompt": "hi", "prompt_id": "a1", "chosen": [user("hi"), assistant("yes")],
      "rejected": [user("hi"), assistant("no")], "score_chosen": 8.0,
      "messages": [user("hi"), assistant("yes")]}, [user("hi")], "yes", "no"),
    ({"prompt": "b", "chosen": [user("a"), assistant("x"), user("b"), assistant("yes")],
      "rejected": [user("a"), assistant("x"), user("b"), assistant("no")]},
     [user("a"), assistant("x"), user("b")], "yes", "no"),
    # hh-rlhf: texts alone. A space goes to the answer, a line break stays.
    (texts("\n\nHuman: hi?\n\nAssistant:", " Yes.", " No."),
     "\n\nHuman: hi?\n\nAssistant:", " Yes.", " No."),
    (texts("Q: hi?\nA:\n", "Yes.", "No."), "Q: hi?\nA:\n", "Yes.", "No."),
    (texts("A: I think", " so.", " not."), "A: I think", " so.", " not."),
    # Where words begin alike, they are the answer's.
    (texts("A:", " actually.", " already."), "A:", " actually.", " already."),
    (texts("A: one", "", " two"), "A:", " one", " one two"),
    (texts("A: Yes", ".", ". Or no."), "A: Yes", ".", ". Or no."),
    # The column has the same text as the prompt.
    (GOOD | {"question": "w3", "system": "", "history": []}, "w3 w4", "w1", "w2"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "chosen", "rejected"), IMPLICIT)
def test_prompts_of_other_forms(tmp_path, row, prompt, chosen, rejected):
    pair = pair_of(tmp_path, row)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)


def test_a_text_prompt_and_an_answer_in_a_message_need_a_chat(tmp_path):
    row = {"prompt": "hi", "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    assert pair_of(tmp_path, row, chat=True).prompt == [user("hi")]
    with pytest.raises(InputError, match="'prompt' is text, expected alike"):
        pair_of(tmp_path, row)


def test_what_templates_take_is_kept_told_apart_and_written(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    prompt = [user("hi"), {"role": "assistant", "content": None, "tool_calls": [call]},
              {"role": "tool", "content": "w1", "tool_call_id": "c"}]  # fmt: skip
    row = GOOD | {"prompt": [*prompt, {**user("w2"), "name": None}]}
    given = {"tools": [{"type": "function"}], "documents": [{"text": "x"}],
             "chat_template_kwargs": {"enable_thinking": False}}  # fmt: skip
    pairs = [pair_of(tmp_path, row | more) for more in ({}, given, {"tools": "", "documents": []})]
    assert pairs[0].prompt == [*prompt, user("w2")]  # a null beside a role says nothing
    assert pairs[1].given == given and pairs[2] == pairs[0]
    # The columns of a CSV file are text.
    as_text = {name: json.dumps(value) for name, value in given.items()}
    assert pair_of(tmp_path, row | as_text) == pairs[1]
    others = [pair_of(tmp_path, row | {name: given[name]}) for name in given]
    others.append(pair_of(tmp_path, row | {"prompt": [*prompt, {**user("w2"), "name": "n"}]}))
    for kind in ("fingerprint", "prompt_fingerprint"):
        assert len({getattr(pair, kind) for pair in (*pairs, *others)}) == 2 + len(others)
    write_pairs(tmp_path / "written.jsonl", [*pairs[:2], *others])
    back = load_pairs(str(tmp_path / "written.jsonl")).pairs
    assert [(p.prompt, p.given, p.fingerprint) for p in back] == [
        (p.prompt, p.given, p.fingerprint) for p in (*pairs[:2], *others)
    ]


def test_a_row_that_is_not_drawn_stops_nothing(tmp_path):
    good = [row | {"prompt": f"w3 w{n}"} for n, row in enumerate([GOOD] * 20)]
    clean = load_pairs(str(write_jsonl(tmp_path / "x.jsonl", good)), limit=4)
    tie, empty = GOOD | {"rejected": "w1"}, GOOD | {"rejected": ""}
    path = str(write_jsonl(tmp_path / "x.jsonl", [tie, *good, empty]))
    drawn = load_pairs(path, limit=4)
    assert [p.prompt for p in drawn.pairs] == [p.prompt for p in clean.pairs]
    assert drawn.total == clean.total == 20 and drawn.drawn == {"left_out": 2}
    assert clean.drawn == {} and clean.notes == ()
    assert drawn.notes[0].startswith("2 of 22 rows are left out, such as x.jsonl, line 1: 'chosen'")
    assert len(load_pairs(path, strict=False).pairs) == 20
    for limit in (None, 21):  # all rows are asked for
        with pytest.raises(InputError, match=r"x.jsonl, line 1: .*are identical"):
            load_pairs(path, limit=limit)


def test_what_else_is_wrong_with_a_row_counts_once_it_is_drawn(tmp_path):
    path = str(write_jsonl(tmp_path / "x.jsonl", [GOOD] * 20 + [["odd"]]))
    lucky = next(seed for seed in range(99) if 20 not in random.Random(seed).sample(range(21), 4))
    unlucky = next(seed for seed in range(99) if 20 in random.Random(seed).sample(range(21), 4))
    assert len(load_pairs(path, limit=4, seed=lucky).pairs) == 4
    for more in ({"limit": 4, "seed": unlucky}, {"limit": 21}, {"strict": False}):
        with pytest.raises(InputError, match=r"x.jsonl, line 21: found list"):
            load_pairs(path, **more)


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
    ([texts("a", " b", " c") | {"question": "who?"}], "'question' is str .*no part of the prompt"),
    ([GOOD | {"system": "be good"}], "'system' is str .*would be dropped"),
    ([GOOD | {"history": [["a", "b"]]}], "'history' is list"),
    ([GOOD | {"chosen": [user("w5"), assistant("a")], "rejected": [user("w5"), assistant("b")]}],
     "'prompt' is str .*no part of the prompt"),
    ([GOOD | {"tools": [{"type": "function"}]}], "'tools', which only a chat template can show"),
    ([GOOD | {"tools": "[oops"}], "'tools' is no valid JSON"),
    ([GOOD | {"tools": ["f"]}], "'tools' is list .*expected a list of objects"),
    ([GOOD | {"chat_template_kwargs": [1]}], "'chat_template_kwargs' is list .*expected an object"),
    ([GOOD | {"prompt": [user("a")], "chosen": [{**assistant("b"), "tool_calls": [{}]}]}],
     "'chosen' has an answer with 'tool_calls'"),
    ([{"chosen": [assistant("a")], "rejected": "b"}], "'prompt' is missing"),
]  # fmt: skip


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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(row=st.dictionaries(NAMES, JSON, max_size=7), chat=st.booleans())
def test_any_json_makes_a_pair_or_an_input_error(row, chat):
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder) / "x.jsonl", [{"chosen": "a", "rejected": "b"} | row])
        try:
            load_pairs(str(path), chat=chat)
        except InputError as error:
            assert "\n" not in str(error)
