"""The package's recipes on small files in the public formats; splits; broken recipes."""

import json

import datasets
import pytest
import yaml

from offline.errors import InputError
from offline.options import ExtractOptions
from offline.pairs import Pair, load_pairs, write_pairs
from offline.recipe import FOLDER, known_recipes, load_recipe, load_splits, split_pairs
from tests.offline.pictures import png
from tests.offline.worlds import write_jsonl


def small(name, folder, **splits):
    """The package's recipe with splits that small files can fill."""
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    content["splits"] = {"calibration": 2, "validation": 2, "test": "rest", "seed": 0} | splits
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_recipe(str(path))


def test_every_recipe_is_valid_and_says_where_its_data_comes_from():
    assert known_recipes() == ["faitheval", "mmhal", "spa-vl", "toxigen", "truthfulqa"]
    for name in known_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name and len(recipe.sha256) == 64
        assert "arXiv" in recipe.paper and recipe.licence and recipe.notes
        ExtractOptions(**recipe.options)


def test_the_documented_form_is_a_valid_one_and_every_recipe_is_listed(tmp_path):
    text = (FOLDER.parents[1] / "docs" / "recipes.md").read_text()
    (tmp_path / "mine.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    assert load_recipe(str(tmp_path / "mine.yaml")).splits.calibration == 50
    assert all(f"| `{name}` |" in text for name in known_recipes())


def by_id(splits):
    pairs = [pair for split in splits.values() for pair in split.pairs]
    return {pair.id: pair for pair in pairs}


TRUTHFULQA = [
    {
        "type": "Adversarial", "category": "x", "question": f"Do w{n} fly?",
        "best_answer": f"No, w{n} walk", "correct_answers": ["No"],
        "incorrect_answers": [f"Yes, w{n} do", "Often"], "source": "none",
    }
    for n in range(6)
]  # fmt: skip


def test_truthfulqa_from_the_hubs_columns_and_from_the_csv(tmp_path):
    recipe = small("truthfulqa", tmp_path)
    rows = write_jsonl(tmp_path / "hub.jsonl", TRUTHFULQA)
    lines = ["Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source"]
    for row in TRUTHFULQA:
        wrong = "; ".join(row["incorrect_answers"])
        lines.append(f'a,b,{row["question"]},"{row["best_answer"]}",No,"{wrong}",none')
    table = tmp_path / "TruthfulQA.csv"
    table.write_text("\n".join(lines))
    for chat in (True, False):
        one, two = (by_id(load_splits(recipe, str(path), chat=chat)) for path in (rows, table))
        assert {pair.fingerprint for pair in one.values()} == {
            pair.fingerprint for pair in two.values()
        }
    chat = by_id(load_splits(recipe, str(rows)))["1"]
    assert chat.prompt == [{"role": "user", "content": "Do w0 fly?"}]
    assert (chat.chosen, chat.rejected) == ("No, w0 walk", "Yes, w0 do")
    raw = by_id(load_splits(recipe, str(rows), chat=False))["1"]
    assert (raw.prompt, raw.chosen) == ("Q: Do w0 fly?\nA:", " No, w0 walk")
    assert raw.prompt[slice(*raw.question)] == "Do w0 fly?"
    # What `grains extract --data` makes of the same CSV without the recipe.
    assert {pair.fingerprint for pair in two.values()} == {
        pair.fingerprint for pair in load_pairs(str(table)).pairs
    }


def test_toxigen_keeps_statements_rated_as_toxic(tmp_path):
    ratings = [(5.0, 5.0), (1.0, 4.5), (3.0, 2.6), (5.0, 0.4), (4.0, 4.0), (3.0, 3.0), (2.0, 4.0)]
    rows = [
        {"text": f"w{n} are bad", "target_group": "w", "toxicity_ai": ai, "toxicity_human": human}
        for n, (ai, human) in enumerate(ratings)
    ]
    recipe = small("toxigen", tmp_path, calibration=2, validation=1)
    splits = load_splits(recipe, str(write_jsonl(tmp_path / "train.jsonl", rows)))
    found = by_id(splits)
    assert sorted(found) == ["1", "3", "5", "6", "7"]
    assert found["3"].prompt == "Somebody writes: w2 are bad\nI reply:"
    assert found["3"].chosen.startswith(" I disagree.") and "agree" in found["3"].rejected
    assert splits["test"].drawn["recipe"]["skipped_rows"] == 2


def test_faitheval_prefers_the_context_and_keeps_letters_balanced(tmp_path):
    rows = [
        {
            "id": f"Mercury_{n}", "question": "What is it?", "answer": "x", "answerKey": key,
            "choices": {"label": list("ABCD"), "text": ["wood", "iron", "glass", "wool"]},
            "context": f"It is number {n}.",
        }
        for n, key in enumerate("ABCDA")
    ]  # fmt: skip
    splits = load_splits(
        small("faitheval", tmp_path), str(write_jsonl(tmp_path / "test.jsonl", rows))
    )
    found = by_id(splits)
    assert found["Mercury_1"].prompt == (
        "Context: It is number 1.\n\nAnswer from the context.\nQuestion: What is it?\n"
        "A. wood\nB. iron\nC. glass\nD. wool\nAnswer:"
    )
    responses = [(found[f"Mercury_{n}"].chosen, found[f"Mercury_{n}"].rejected) for n in range(4)]
    assert responses == [
        (" A. wood", " B. iron"), (" B. iron", " C. glass"), (" C. glass", " D. wool"),
        (" D. wool", " A. wood"),
    ]  # fmt: skip


def test_spa_vl_makes_chats_with_pictures_that_are_written_and_read_back(tmp_path):
    rows = [
        {"image": {"bytes": png(f"#0000{n:02x}"), "path": None}, "question": "What is it?",
         "chosen": f"I see {n}.", "rejected": "Go away.", "image_name": "x"}
        for n in range(6)
    ]  # fmt: skip
    source = tmp_path / "train.parquet"
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(source)
    recipe = small("spa-vl", tmp_path)
    assert recipe.options["k"] == 50
    splits = load_splits(recipe, str(source))
    found = by_id(splits)
    assert sorted(found) == ["1", "2", "3", "4", "5", "6"]  # `every` is for the hub's rows
    for n in range(6):
        pair = found[str(n + 1)]
        assert pair.prompt == [{"role": "user", "content": "What is it?"}]
        assert (pair.picture.payload, pair.chosen) == (png(f"#0000{n:02x}"), f"I see {n}.")
    # The same words about other images are other prompts.
    assert [len(split.pairs) for split in splits.values()] == [2, 2, 2]
    write_pairs(tmp_path / "x.test.jsonl", splits["test"].pairs)
    assert len(list((tmp_path / "x.test.images").iterdir())) == 2
    again = load_pairs(str(tmp_path / "x.test.jsonl")).pairs
    assert [p.fingerprint for p in again] == [p.fingerprint for p in splits["test"].pairs]
    with pytest.raises(InputError, match="prompts hold images, which only chat prompts can"):
        load_splits(recipe, str(source), chat=False)


def test_of_a_large_hub_data_set_one_row_in_so_many_is_read(tmp_path, monkeypatch):
    content = yaml.safe_load((FOLDER / "truthfulqa.yaml").read_text())
    content["data"] |= {"hub": str(write_jsonl(tmp_path / "hub.jsonl", TRUTHFULQA)), "every": 2}
    content["splits"] = {"calibration": 2, "validation": 1, "test": "rest", "seed": 0}
    content["pairs"] = content["pairs"][:1]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    with pytest.raises(InputError, match="3 pairs with 3 different prompts are too few"):
        load_splits(recipe)
    assert sorted(by_id(load_splits(recipe, content["data"]["hub"]))) == list("123456")


def test_a_recipe_without_pairs_says_what_it_is_for():
    with pytest.raises(InputError, match=r"'mmhal': its data has no pref.*evaluate --task mmhal"):
        load_splits(load_recipe("mmhal"))


def plain(count, repeat=1):
    return [Pair(f"{n}", "x", f"w{n // repeat}", "w1", "w2") for n in range(count)]


def prompts(pairs):
    return {pair.prompt for pair in pairs}


def test_splits_share_no_prompt_and_do_not_depend_on_the_order():
    pairs = plain(90, repeat=3)
    sizes = {"calibration": 10, "validation": 20, "test": "rest"}
    splits = split_pairs(pairs, sizes, seed=1)
    assert [len(splits[name]) for name in sizes] == [10, 20, 57]
    one, two, three = (prompts(splits[name]) for name in sizes)
    assert not one & two and not one & three and not two & three
    turned = split_pairs(pairs[::-1], sizes, seed=1)
    assert [prompts(turned[name]) for name in sizes] == [one, two, three]
    assert prompts(split_pairs(pairs, sizes, seed=2)["calibration"]) != one


@pytest.mark.parametrize("sizes", [{"a": 4, "b": 3}, {"a": 6, "b": "rest"}])
def test_too_few_pairs_are_refused(sizes):
    with pytest.raises(InputError, match=r"6 pairs with 6 different prompts are too few .* 'b'"):
        split_pairs(plain(6), sizes, seed=0)


def test_fewer_calibration_pairs_leave_validation_and_test_alone(tmp_path):
    recipe = small("truthfulqa", tmp_path, calibration=3, validation=1)
    source = str(write_jsonl(tmp_path / "x.jsonl", TRUTHFULQA))
    whole, fewer, more = (load_splits(recipe, source, calibration=n) for n in (None, 2, 4))
    assert fewer["calibration"].pairs == whole["calibration"].pairs[:2]
    for name in ("validation", "test"):
        assert fewer[name].pairs == whole[name].pairs
    assert len(more["calibration"].pairs) == 4
    assert more["calibration"].pairs[:3] == whole["calibration"].pairs
    assert fewer["calibration"].drawn["recipe"]["sizes"] == {
        "calibration": 2, "validation": 1, "test": 2,
    }  # fmt: skip


@pytest.mark.parametrize("chat", [True, False])
def test_written_splits_are_read_back_as_the_same_pairs(tmp_path, chat):
    source = str(write_jsonl(tmp_path / "x.jsonl", TRUTHFULQA))
    pairs = load_splits(small("truthfulqa", tmp_path), source, chat=chat)["test"].pairs
    write_pairs(tmp_path / "test.jsonl", pairs)
    assert sorted(json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0])) == [
        "chosen", "id", "prompt", "rejected",
    ]  # fmt: skip
    again = load_pairs(str(tmp_path / "test.jsonl")).pairs
    assert [(p.id, p.fingerprint) for p in again] == [(p.id, p.fingerprint) for p in pairs]


ROWS = [
    ({"question": "a"}, r"line 1: its columns are \['question'\], .* expects \['question', 'best"),
    (TRUTHFULQA[0] | {"question": None}, "line 1: 'question' is empty"),
    (TRUTHFULQA[0] | {"incorrect_answers": []}, r"cannot read it \(.*no element 0"),
    (TRUTHFULQA[0] | {"question": " "}, "makes an empty prompt"),
    (TRUTHFULQA[0] | {"best_answer": "Yes, w0 do"}, "'chosen' and 'rejected' are identical"),
    ([], "its columns are list"),
]


@pytest.mark.parametrize(("row", "message"), ROWS)
def test_rows_of_another_form_are_named(tmp_path, row, message):
    source = write_jsonl(tmp_path / "x.jsonl", [row])
    with pytest.raises(InputError, match=message):
        load_splits(load_recipe("truthfulqa"), str(source))


def test_files_of_another_form_are_named(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"x.csv: its columns are \['a', 'b'\], expected \['ques"):
        load_splits(load_recipe("truthfulqa"), str(tmp_path / "x.csv"))
    source = write_jsonl(tmp_path / "x.jsonl", TRUTHFULQA)
    with pytest.raises(InputError, match=r"x.jsonl, recipe 'truthfulqa': 6 pairs .*'calibration'"):
        load_splits(load_recipe("truthfulqa"), str(source))


def at(content, path, value):
    *parents, last = path
    for key in parents:
        content = content[key]
    if value is None:
        del content[last]
    else:
        content[last] = value


BROKEN = [
    (("title",), None, "'title' is missing"),
    (("titel",), "x", "'titel' is no key here, expected one of title, paper, licence"),
    (
        ("data", "file"),
        "x",
        "'data.file' is no key here, expected one of hub, config, split, every",
    ),
    (("splits", "train"), 3, "expected one of calibration, validation, test, seed"),
    (("splits", "calibration"), 1, "'splits.calibration' is 1: greater than or equal to 2"),
    (("splits", "calibration"), True, "'splits.calibration' is true: a valid integer"),
    (
        ("splits", "test"),
        "all",
        "'splits.test' is \"all\": expected a whole number from 1, or rest",
    ),
    (("splits",), None, "'pairs' and 'splits' belong together"),
    (("format",), "xml", "'format' is \"xml\": 'chat' or 'raw'"),
    (("images",), "picture", "'images' is 'picture', which is no column of every form"),
    (("data", "every"), 0, "'data.every' is 0: greater than or equal to 1"),
    (("raw", "prompt"), "Q:", r"'raw.prompt' is \"Q:\": expected {text} in it exactly once"),
    (("pairs", 0, "prompt"), "{{ question", r"'pairs.0.prompt' is .* not valid Jinja"),
    (("pairs", 0, "keep"), "1 +", r"'pairs.0.keep' is .* not valid Jinja"),
    (("pairs", 0, "columns"), [], "'pairs.0.columns' is .* at least 1 item"),
    (("pairs", 0, "colums"), [], "'pairs.0.colums' is no key here, expected one of columns, keep"),
    (("options", "kk"), 3, "'options.kk' is no key here, expected one of method, objective"),
    (("options", "limit"), 3, "'options.limit' is no key here"),
    (("options", "k"), "3", "'options.k' is \"3\": a valid integer"),
    (("options", "k"), 0, "options: --k is 0, expected 1 or more"),
    (("options", "method"), "caa", "options: --k, --objective: has no meaning with --method caa"),
    (("options", "objective"), "max", "'options.objective' is \"max\": 'mean', 'sum' or 'first"),
]


@pytest.mark.parametrize(("path", "value", "message"), BROKEN)
def test_broken_recipes_name_file_key_found_and_allowed(tmp_path, path, value, message):
    content = yaml.safe_load((FOLDER / "truthfulqa.yaml").read_text())
    at(content, path, value)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(
        InputError, match=r"^mine\.yaml: .*" + message.replace("{text}", r"\{text\}")
    ):
        load_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not readable as YAML"), ("- a", "expected a mapping"), ("a: 1\na: 2", "twice")],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    (tmp_path / "mine.yml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(str(tmp_path / "mine.yml"))


@pytest.mark.parametrize("name", ["nosuch", "absent.yaml", "../recipes/mmhal", ""])
def test_unknown_recipes_list_the_known_ones(name):
    with pytest.raises(
        InputError, match="no such recipe, expected faitheval, mmhal, spa-vl, toxig"
    ):
        load_recipe(name)


def test_templates_run_in_a_sandbox(tmp_path):
    content = yaml.safe_load((FOLDER / "truthfulqa.yaml").read_text())
    content["pairs"][0]["prompt"] = "{{ question.__class__.__mro__ }}"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    source = str(write_jsonl(tmp_path / "x.jsonl", TRUTHFULQA))
    with pytest.raises(InputError, match=r"cannot read it .*unsafe"):
        load_splits(load_recipe(str(tmp_path / "mine.yaml")), source)
