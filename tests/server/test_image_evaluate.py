"""`grains evaluate` on prompts with an image against a real server: the same as transformers."""

import io
import json
from contextlib import ExitStack

import datasets
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from offline.cli import app
from tests.offline.image_server import image_server
from tests.vision import picture

pytestmark = pytest.mark.engine

TOKENS = 6
TOLERANCE = 1e-4  # nats per token
VECTORS = ("all", "generation", "faithful", "image")  # faithful steers the text
QUESTIONS = ["what colour is the shape ?", "which shape is on the left ?", "describe the picture ."]
CHOSEN, REJECTED = "the shape is red .", "there is no shape in the picture"


def png(seed):
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def data(tmp_path):
    """The questions in the forms of SPA-VL and of MMHal-Bench."""
    rows = [
        {"image": {"bytes": png(n), "path": None}, "question": question, "chosen": CHOSEN,
         "rejected": REJECTED}
        for n, question in enumerate(QUESTIONS)
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "validation.parquet")
    items = []
    for n, question in enumerate(QUESTIONS):
        (tmp_path / f"{n}.png").write_bytes(png(n))
        items.append(
            {"question_type": "attribute", "image_id": f"{n}", "image_content": ["Shape"],
             "image_src": f"https://farm.example/{n}.png", "question": question, "gt_answer": "red"}
        )  # fmt: skip
    (tmp_path / "response_template.json").write_text(json.dumps(items))
    return tmp_path


class Reference:
    """The same model in transformers, steered by hooks that spell the shift out in float64."""

    def __init__(self, server):
        self.model = AutoModelForImageTextToText.from_pretrained(
            server.model, dtype=torch.float32
        ).eval()
        self.processor = AutoProcessor.from_pretrained(server.model)
        self.added = server.strength * server.norm * server.directions.double()

    def inputs(self, number, answer=""):
        parts = [{"type": "image"}, {"type": "text", "text": QUESTIONS[number]}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )
        return self.processor(
            text=[text + answer],
            images=[picture(number)],
            add_special_tokens=False,
            return_tensors="pt",
        )

    def mean(self, setting, number, answer):
        border = self.inputs(number)["input_ids"].shape[1]
        inputs = self.inputs(number, answer)
        ids = inputs["input_ids"][0]
        with torch.no_grad(), self.steered(setting, ids[:border]):
            logps = self.model(**inputs).logits[0].log_softmax(-1)
        return sum(float(logps[i - 1, ids[i]]) for i in range(border, len(ids))) / (
            len(ids) - border
        )

    def answer(self, setting, number):
        inputs = self.inputs(number)
        prompt = inputs["input_ids"][0]
        with self.steered(setting, prompt):
            ids = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=TOKENS, use_cache=False
            )
        return self.processor.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)

    def steered(self, setting, prompt):
        image = prompt == self.model.config.image_token_id
        stack = ExitStack()
        for layer, added in enumerate(self.added if setting != "base" else []):

            def shift(_module, _inputs, output, added=added):
                h = (output[0] if isinstance(output, tuple) else output).double()
                new = torch.ones(h.shape[1] - len(prompt), dtype=torch.bool)
                chosen = {
                    "all": torch.cat([image | ~image, new]),
                    "generation": torch.cat([image & ~image, new]),
                    "faithful": torch.cat([~image, new]),
                    "image": torch.cat([image, ~new]),
                }[setting]
                u = h + added
                u = u * (h.norm(dim=-1) / u.norm(dim=-1))[..., None]
                moved = torch.where(chosen[:, None], u, h).float()
                return (moved, *output[1:]) if isinstance(output, tuple) else moved

            block = self.model.model.language_model.layers[layer]
            stack.callback(block.register_forward_hook(shift).remove)
        return stack


def test_pairs_and_answers_about_images_equal_transformers(vision, data):
    reference = Reference(vision)

    def rating(said):
        return sum(map(ord, said)) % 7

    def judge(text, *_):
        return f"Rating: {rating(text.split('<answer>')[1].split('</answer>')[0].strip())}"

    with image_server(judge=judge) as (judge_url, _):
        result = CliRunner().invoke(
            app,
            ["evaluate", "--url", vision.url, "--model", "tiny",
             *(part for name in VECTORS for part in ("--steered", f"tiny:{name}")),
             "--max-tokens", str(TOKENS),
             "--task", "spa-vl", "--task-data", f"spa-vl={data / 'validation.parquet'}",
             "--task", "mmhal", "--task-data", f"mmhal={data / 'response_template.json'}",
             "--judge-url", judge_url, "--judge-model", "judge", "--out", str(data / "x.json")],
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads((data / "x.json").read_text())
    found = {(row["task"], row["metric"]): row["values"] for row in document["tasks"]}
    margins = {}
    for setting in ("base", *VECTORS):
        expected = [
            reference.mean(setting, n, CHOSEN) - reference.mean(setting, n, REJECTED)
            for n in range(len(QUESTIONS))
        ]
        margins[setting] = found["spa-vl", "margin"][setting]["value"]
        assert margins[setting] == pytest.approx(sum(expected) / 3, abs=TOLERANCE)
        assert found["spa-vl", "accuracy"][setting]["value"] == sum(m > 0 for m in expected) / 3
        ratings = [rating(reference.answer(setting, n).strip()) for n in range(len(QUESTIONS))]
        assert found["mmhal", "rating"][setting]["value"] == pytest.approx(sum(ratings) / 3)
        rate = found["mmhal", "hallucination rate"][setting]["value"]
        assert rate == pytest.approx(sum(one < 3 for one in ratings) / 3)
    assert len({round(margin, 3) for margin in margins.values()}) == 1 + len(VECTORS)
