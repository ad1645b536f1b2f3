"""`grains evaluate` on prompts with an image, against a stand-in for the server."""

import json
from dataclasses import replace

import datasets
import pytest
from typer.testing import CliRunner

from grains_vllm.vectors import SteeringVector
from offline.cli import app
from offline.errors import InputError
from offline.evaluation.chats import messages_of
from offline.pairs import Pair
from offline.pictures import picture_of
from tests.evaluation_world import build_tokenizer, random_vector
from tests.offline.image_server import image_ids, image_server, logp
from tests.offline.pictures import png
from tests.offline.worlds import write_jsonl

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def spa_vl(tmp_path):
    """SPA-VL's form."""
    rows = [
        {"image": {"bytes": png(colour), "path": None}, "question": f"What is it, {n}?",
         "chosen": f"It is {colour}.", "rejected": "Go away!"}
        for n, colour in enumerate(COLOURS)
    ]  # fmt: skip
    path = tmp_path / "validation.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.fixture
def mmhal(tmp_path):
    """MMHal-Bench's form, images beside it."""
    rows = []
    for n, colour in enumerate(COLOURS):
        (tmp_path / f"{n}.png").write_bytes(png(colour))
        kind = "attribute" if n < 2 else "counting"
        rows.append(
            {"question_type": kind, "question_topic": "animal", "image_id": str(n),
             "image_src": f"https://farm.example/{n}.png", "image_content": ["Cat", "Tree"],
             "question": f"Colour of cat {n}?", "gt_answer": f"{colour}, really.",
             "model_answer": ""}
        )  # fmt: skip
    path = tmp_path / "response_template.json"
    path.write_text(json.dumps(rows))
    return path


def invoke(url, tokenizer, out, *arguments):
    return CliRunner().invoke(
        app,
        ["evaluate", "--url", url, "--model", "tiny", "--tokenizer", str(tokenizer),
         "--out", str(out), *map(str, arguments)],
    )  # fmt: skip


def grains(url, tokenizer, out, *arguments):
    result = invoke(url, tokenizer, out, *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(out.read_text())


def rows(document):
    return {(row["task"], row["metric"]): row for row in document["tasks"]}


def per_token(prompt, answer, model):
    ids = [*prompt, *answer.encode()]
    found = [logp(ids, place, model) for place in range(len(prompt), len(ids))]
    return sum(found) / len(found)


def test_answers_are_scored_behind_the_tokens_of_prompt_and_image(tokenizer, spa_vl, tmp_path):
    with image_server(("v", "w"), border=True) as (url, asked):
        document = grains(
            url, tokenizer, tmp_path / "x.json", "--steered", "tiny:v", "--steered", "tiny:w",
            "--task", "spa-vl", "--task-data", f"spa-vl={spa_vl}",
        )  # fmt: skip
    margin, accuracy = (rows(document)["spa-vl", name] for name in ("margin", "accuracy"))
    assert margin["n"] == 3 and not margin["side_effect"]
    lengths = set()
    for setting, model in (("base", "tiny"), ("v", "tiny:v"), ("w", "tiny:w")):
        margins = []
        for n, colour in enumerate(COLOURS):
            prompt = [*b"u:", *image_ids(png(colour)), *f"What is it, {n}?\na:".encode()]
            lengths.add(len(prompt))
            chosen, rejected = (
                per_token(prompt, text, model) for text in (f"It is {colour}.", "Go away!")
            )
            margins.append(chosen - rejected)
        assert margin["values"][setting]["value"] == pytest.approx(sum(margins) / 3)
        assert accuracy["values"][setting]["value"] == sum(m > 0 for m in margins) / 3
    # The prompt alone is asked once, unsteered, whatever the settings.
    alone = [body for body in asked if "prompt_logprobs" not in body]
    assert [body["model"] for body in alone] == ["tiny"] * 3
    assert {body["vllm_xargs"]["steering"] for body in alone} == {"none"}
    scored = [body for body in asked if body["model"] == "tiny:v"]
    assert len(scored) == 6 and len(asked) == 3 + 3 * 6
    assert {body["vllm_xargs"]["steering_prompt_tokens"] for body in scored} == lengths
    assert all(body["max_tokens"] == 1 for body in asked)


def test_a_template_that_writes_the_prompt_otherwise_is_refused(tokenizer, spa_vl, tmp_path):
    with image_server(("v",), trims=True) as (url, _):
        result = invoke(
            url, tokenizer, tmp_path / "x.json", "--steered", "tiny:v",
            "--task", "spa-vl", "--task-data", f"spa-vl={spa_vl}",
        )  # fmt: skip
    assert result.exit_code == 2
    assert "validation.parquet, row 1: the server's chat template writes this prompt" in " ".join(
        result.stderr.split()
    )
    assert not (tmp_path / "x.json").exists()


def test_mmhal_reports_rating_and_hallucinations_with_unread_verdicts_apart(
    tokenizer, mmhal, tmp_path
):
    shown = []

    def judge(text, has_image, number):
        shown.append(text)
        assert not has_image  # a judge that reads need not see
        if "cat 2" in text:
            return "Who knows.\nRating: 2 or 3"
        return "Fine.\nRating: 5" if "tiny:v" in text or "cat 1" in text else "No.\nRating: 1"

    with image_server(("v",), judge) as (url, asked):
        document = grains(
            url, tokenizer, tmp_path / "x.json", "--steered", "tiny:v", "--task", "mmhal",
            "--task-data", f"mmhal={mmhal}", "--judge-url", url, "--judge-model", "judge",
        )  # fmt: skip
    found = rows(document)
    rating, hallucination = (found["mmhal", name] for name in ("rating", "hallucination rate"))
    assert (rating["n"], rating["higher_is_better"], rating["side_effect"]) == (2, True, False)
    assert hallucination["higher_is_better"] is False
    assert [rating["values"][name]["value"] for name in ("base", "v")] == [3, 5]
    assert [hallucination["values"][name]["value"] for name in ("base", "v")] == [0.5, 0]
    assert hallucination["differences"]["v"]["value"] == -0.5
    counts = document["provenance"]["counts"]["mmhal"]
    assert counts["base"] == {
        "unparsed": 1,
        "by question_type": {
            "attribute": {"n": 2, "rating": 3, "hallucination rate": 0.5}, "counting": {"n": 0},
        },
    }  # fmt: skip
    about = document["provenance"]["tasks"]["mmhal"]
    assert (about["rubric"], about["judge"], about["below"]) == (
        "mmhal", "judge", {"hallucination rate": 3},
    )  # fmt: skip
    assert len(about["prompt_sha256"]) == 64 and about["data"]["name"] == "response_template.json"
    text = next(text for text in shown if "cat 0" in text and "tiny sees" in text)
    for part in ("Cat, Tree", "Colour of cat 0?", "red, really."):
        assert part in text
    # The image comes before the text, and the answer is greedy.
    first = next(body for body in asked if body["model"] == "tiny")
    assert [part["type"] for part in first["messages"][0]["content"]] == ["image_url", "text"]
    assert (first["temperature"], first["max_tokens"]) == (0, 256)


def test_spa_vl_is_judged_by_one_who_sees_the_image_in_both_orders(tokenizer, tmp_path):
    for n, colour in enumerate(COLOURS):
        (tmp_path / f"{n}.png").write_bytes(png(colour))
    harm = write_jsonl(
        tmp_path / "harm.jsonl",
        [{"image": f"{n}.png", "question": f"How, {n}?"} for n in range(3)],
    )

    def judge(text, has_image, number):
        assert has_image and "<question>" in text
        first, second = text.index("tiny sees"), text.index("tiny:v sees")
        return "FIRST" if second < first else "SECOND"  # the steered one, wherever it stands

    with image_server(("v",), judge) as (url, asked):
        document = grains(
            url, tokenizer, tmp_path / "x.json", "--steered", "tiny:v", "--task", "judged:spa-vl",
            "--task-data", f"judged:spa-vl={harm}", "--judge-url", url, "--judge-model", "judge",
        )  # fmt: skip
    row = rows(document)["judged:spa-vl", "win rate"]
    assert [row["values"][name]["value"] for name in ("base", "v")] == [0.5, 1]
    assert document["provenance"]["tasks"]["judged:spa-vl"]["judge_sees_image"]
    assert sum(body["model"] == "judge" for body in asked) == 6


def test_pairs_distinct_and_judged_pairs_take_images_too(tokenizer, tmp_path):
    lines = []
    for n, colour in enumerate(COLOURS):
        (tmp_path / f"{n}.png").write_bytes(png(colour))
        lines.append(
            {"prompt": f"What is it, {n}?", "image": f"{n}.png", "chosen": f"It is {colour}.",
             "rejected": "Go away!"}
        )  # fmt: skip
    pairs = write_jsonl(tmp_path / "pairs.jsonl", lines)
    with image_server(("v",), lambda text, *_: "TIE" if "It is" in text else "?") as (url, _):
        arguments = (
            "--steered", "tiny:v", "--data", pairs, "--judge-url", url, "--judge-model", "judge",
            *(part for task in ("pairs", "distinct", "judged:pairs") for part in ("--task", task)),
        )  # fmt: skip
        raw = invoke(url, tokenizer, tmp_path / "y.json", *arguments)
        assert raw.exit_code == 2
        assert "pairs.jsonl, line 1: its prompt is text with an image" in raw.stderr
        document = grains(url, tokenizer, tmp_path / "x.json", *arguments, "--chat")
    found = rows(document)
    prompt = [*b"u:", *image_ids(png("red")), *b"What is it, 0?\na:"]
    assert per_token(prompt, "Go away!", "tiny") != per_token(prompt, "Go away!", "tiny:v")
    assert found["pairs", "margin"]["n"] == 3
    assert found["distinct", "answer tokens"]["values"]["v"]["value"] == 2
    assert found["judged:pairs", "win rate"]["values"]["v"]["value"] == 0.5


def test_the_same_words_about_another_image_are_another_question(tokenizer, spa_vl, tmp_path):
    def made_from(colour):
        picture = picture_of({"bytes": png(colour)}, "x", tmp_path)
        pair = Pair("", "", [{"role": "user", "content": "What is it, 0?"}], "", "")
        return replace(pair, picture=picture).prompt_fingerprint

    vector = random_vector(0)
    for colour, excluded in (("red", 1), ("green", 0)):
        passport = {"examples": [{"prompt_fingerprint": made_from(colour)}]}
        path = tmp_path / f"{colour}.safetensors"
        SteeringVector(vector.directions, vector.reference_norms, vector.model, passport).save(path)
        with image_server(("v",)) as (url, _):
            document = grains(
                url, tokenizer, tmp_path / f"{colour}.json", "--steered", "tiny:v",
                "--task", "spa-vl", "--task-data", f"spa-vl={spa_vl}", "--vector", path,
                "--exclude-overlap",
            )  # fmt: skip
        assert document["provenance"]["tasks"]["spa-vl"]["excluded"] == excluded
        note = "spa-vl: 1 questions that made or chose the vector are left out"
        assert (note in document["provenance"]["notes"]) == bool(excluded)


def test_the_image_stands_in_the_first_message_of_a_user(tmp_path):
    picture = picture_of({"bytes": png("red")}, "x", tmp_path)
    prompt = [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Two?"},
    ]  # fmt: skip
    found = messages_of(Pair("1", "x", prompt, "a", "b", picture=picture))
    assert found[0] == prompt[0] and found[2:] == prompt[2:]
    image, text = found[1]["content"]
    assert image["image_url"]["url"] == picture.data_url and text["text"] == "One?"
    assert prompt[1]["content"] == "One?"
    with pytest.raises(InputError, match="x: no message of a user"):
        messages_of(Pair("1", "x", prompt[:1], "a", "b", picture=picture))
