"""`grains evaluate` against a real server: what it reports equals a transformers computation."""

import csv
import json
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from offline.cli import app
from offline.endpoint_scorer import EndpointScorer
from offline.evaluation.serving import serving
from offline.model import load_decoder
from offline.scoring import Item, Point
from offline.transformers_scorer import TransformersScorer
from tests.evaluation_world import (
    LAYERS,
    REFERENCE_NORM,
    STRENGTH,
    build_model,
    build_tokenizer,
    random_vector,
    save_model,
)
from tests.offline.worlds import write_jsonl

pytestmark = pytest.mark.engine

WINDOW = "prompt:1+generation"
VECTORS = {
    "truthful": (0, "all"),
    "later": (1, "generation"),
    "earlier": (1, "prompt"),
    "window": (1, WINDOW),
}
STEERED = [part for name in VECTORS for part in ("--steered", f"tiny:{name}")]
FLAGS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "1024", "--block-size", "32"]
# One request's log-likelihood is a sum of up to 30 tokens' of float32.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    model = save_model(folder / "tiny")
    entries = {}
    for name, (seed, positions) in VECTORS.items():
        path = str(folder / f"{name}.safetensors")
        entries[name] = {"path": path, "strength": STRENGTH, "positions": positions}
        if positions == WINDOW:  # served as the artifact recommends it
            del entries[name]["positions"]
        random_vector(seed, recommended={"positions": positions}).save(path)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        with serving(str(model), "tiny", entries, FLAGS) as url:
            yield SimpleNamespace(url=url, folder=folder, model=model)


@pytest.fixture(scope="module")
def questions(world):
    """TruthfulQA's form, with answers that hold commas, periods and several sentences."""
    path = world.folder / "questions.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"]
        )
        for n, place in enumerate(["France", "the moon", "Zürich", "water"]):
            right = [f"It is {place} {n}", f"I have no comment on {place}.", "Nothing happens"]
            wrong = [f"Nobody knows {place}, and mirrors are blue", "Paris; You appear closer"]
            writer.writerow(
                ["", "", f"What is {place}?", right[0], "; ".join(right), "; ".join(wrong)]
            )
    return path


def grains(world, out, *arguments):
    result = CliRunner().invoke(
        app,
        ["evaluate", "--url", world.url, "--model", "tiny", "--tokenizer", str(world.model),
         "--out", str(out), *map(str, arguments)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return json.loads(out.read_text())


def rows(document):
    return {(row["task"], row["metric"]): row for row in document["tasks"]}


@cache
def _model():
    return build_model()


def reference(setting, prompt, answer):
    """Sum of the answer's log-likelihoods; the shift is spelt out again in float64 hooks."""
    model = _model()
    ids = torch.tensor([[*prompt, *answer]])
    with ExitStack() as stack, torch.no_grad():
        if setting != "base":
            seed, positions = VECTORS[setting]
            columns = torch.arange(ids.shape[1])
            chosen = {
                "all": columns >= 0,
                "prompt": columns < len(prompt),
                "generation": columns >= len(prompt),
                WINDOW: columns >= len(prompt) - 1,
            }[positions]
            for layer in range(LAYERS):
                added = STRENGTH * REFERENCE_NORM * random_vector(seed).directions[layer].double()
                hook = _hook(added, chosen)
                stack.callback(model.model.layers[layer].register_forward_hook(hook).remove)
        logps = model(ids).logits[0].log_softmax(-1)
    start = len(prompt)
    return sum(float(logps[start - 1 + n, token]) for n, token in enumerate(answer))


def _hook(added, chosen):
    def shift(_module, _inputs, output):
        stream = output[0] if isinstance(output, tuple) else output
        h = stream.double()
        u = h + added
        moved = torch.where(chosen[:, None], u * (h.norm(dim=-1) / u.norm(dim=-1))[..., None], h)
        moved = moved.to(stream.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    return shift


@pytest.fixture
def lm_eval():
    for name in ("lm_eval", "tenacity"):
        pytest.importorskip(name)


@pytest.mark.usefixtures("lm_eval")
def test_lm_eval_through_the_endpoint_equals_transformers(world, questions, tmp_path):
    document = grains(
        world, tmp_path / "x.evaluation.json", *STEERED, "--task", "truthfulqa-mc1",
        "--task", "truthfulqa-mc2", "--task-data", f"truthfulqa={questions}",
        "--harness-results", tmp_path / "raw",
    )  # fmt: skip
    tokenizer = build_tokenizer()
    worst = 0.0
    for setting in ("base", *VECTORS):
        raw = json.loads((tmp_path / "raw" / f"truthfulqa-mc2.{setting}.json").read_text())
        masses, hits = [], []
        for sample in raw["samples"]["truthfulqa_mc2"]:
            found = []
            for (context, choice), response in zip(
                sample["arguments"], sample["resps"], strict=True
            ):
                prompt = tokenizer(context)["input_ids"]
                assert prompt[0] == tokenizer.bos_token_id
                answer = tokenizer(context + choice)["input_ids"][len(prompt) :]
                found.append(reference(setting, prompt, answer))
                worst = max(worst, abs(found[-1] - float(response[0][0])))
            # The choices of MC1 are the best answer, which comes first, and the wrong ones.
            labels = sample["doc"]["mc2_targets"]["labels"]
            probabilities = torch.tensor(found).exp()
            true = torch.tensor(labels) == 1
            masses.append(float(probabilities[true].sum() / probabilities.sum()))
            hits.append(found[0] > max(found[labels.index(0) :]))
        values = {key: row["values"][setting]["value"] for key, row in rows(document).items()}
        assert values["truthfulqa-mc2", "acc"] == pytest.approx(sum(masses) / 4, abs=1e-4)
        assert values["truthfulqa-mc1", "acc"] == sum(hits) / 4
    print(f"largest difference of a log-likelihood: {worst:.2g}")
    assert worst < TOLERANCE
    steered = {rows(document)["truthfulqa-mc2", "acc"]["values"][name]["value"] for name in VECTORS}
    assert len(steered) == len(VECTORS)
    assert "Where were the 1992 Olympics held?" in sample["arguments"][0][0]
    assert str(world.folder) not in json.dumps(document)


def test_endpoint_scorer_agrees_with_transformers(world):
    tokenizer = build_tokenizer()
    texts = [
        ("Q: What is the moon?\nA:", " Nobody knows."),
        ("The capital of", " France is Paris."),
    ]
    items = [
        Item(
            tuple(tokenizer(prompt)["input_ids"]),
            tuple(tokenizer(answer, add_special_tokens=False)["input_ids"]),
        )
        for prompt, answer in texts
    ]
    layers = tuple(range(LAYERS))
    # The answer that greedy decoding gives, so that `greedy` is not False everywhere.
    best = _model()(torch.tensor([items[0].prompt_ids])).logits[0, -1].argmax()
    items.append(Item(items[0].prompt_ids, (int(best),)))
    points = [
        None,
        Point("truthful", layers, 0.3),
        Point("truthful", layers, 0.3, "prompt"),
        Point("later", layers, -0.7, "generation"),
        Point("later", layers, -0.7, "all"),
        Point("later", layers, -0.7, WINDOW),
        Point("later", layers, -0.7, "prompt:2+generation:1"),
    ]
    aliases = {(name, layers): f"tiny:{name}" for name in ("truthful", "later")}
    served = dict(EndpointScorer(world.url, aliases, "tiny").score(items, points))
    vectors = {name: random_vector(VECTORS[name][0]) for name in ("truthful", "later")}
    decoder = load_decoder(str(world.model), device="cpu")
    expected = dict(TransformersScorer(decoder, vectors).score(items, points))
    assert served[0][2].greedy
    for number in range(len(points)):
        for ours, theirs in zip(served[number], expected[number], strict=True):
            assert ours.logp == pytest.approx(theirs.logp, abs=TOLERANCE)
            assert ours.greedy == theirs.greedy
    assert len({round(served[number][0].logp, 3) for number in range(len(points))}) == len(points)


@pytest.mark.usefixtures("lm_eval")
def test_our_own_tasks_are_scored_by_what_the_server_says(world, tmp_path):
    toxic = {"text": "cruel words", "toxicity_ai": 4.0, "toxicity_human": 5.0}
    choices = {"label": ["A", "B"], "text": ["blue", "magnetic"]}
    faith = {
        "context": "Water is magnetic.", "question": "What is water?", "answerKey": "B",
        "choices": choices,
    }  # fmt: skip
    document = grains(
        world, tmp_path / "x.json", *STEERED[:2], "--task", "toxigen", "--task", "faitheval",
        "--task-data", f"toxigen={write_jsonl(tmp_path / 't.jsonl', [toxic] * 2)}",
        "--task-data", f"faitheval={write_jsonl(tmp_path / 'f.jsonl', [faith] * 2)}",
        "--harness-results", tmp_path,
    )  # fmt: skip
    tokenizer = build_tokenizer()
    for name, right in (("toxigen", 0), ("faitheval", 1)):
        assert rows(document)[name, "acc"]["n"] == 2
        for setting in ("base", "truthful"):
            raw = json.loads((tmp_path / f"{name}.{setting}.json").read_text())
            sample = raw["samples"][f"grains_{name}"][0]
            scores = []
            for context, choice in sample["arguments"]:
                prompt = tokenizer(context)["input_ids"]
                answer = tokenizer(context + choice)["input_ids"][len(prompt) :]
                scores.append(reference(setting, prompt, answer))
            value = rows(document)[name, "acc"]["values"][setting]["value"]
            assert value == float(max(scores) == scores[right])


GROUP = """group: both
task: [small, large]
aggregate_metric_list: [{{metric: acc, weight_by_size: {by_size}}}]
"""
TASK = """task: {name}
custom_dataset: !function made.{name}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
MADE = """import datasets


def _make(answers):
    rows = [{"question": f"Is it {n}?", "answer": answer} for n, answer in enumerate(answers)]
    return {"test": datasets.Dataset.from_list(rows)}


def small(**_):
    return _make([0])


def large(**_):
    return _make([1, 1, 0])
"""


@pytest.mark.usefixtures("lm_eval")
@pytest.mark.parametrize("by_size", [True, False])
def test_a_groups_items_are_pooled(world, tmp_path, monkeypatch, by_size):
    from lm_eval.tasks import TaskManager

    (tmp_path / "made.py").write_text(MADE)
    (tmp_path / "group.yaml").write_text(GROUP.format(by_size=by_size))
    for name in ("small", "large"):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    # Reading lm-eval's own 14 000 tasks takes longer than this test.
    monkeypatch.setattr("offline.evaluation.harness_tasks._everything", lambda: manager)
    document = grains(world, tmp_path / "x.json", *STEERED[:2], "--task", "both")
    row = rows(document)["both", "acc"]
    # The model says the same to all of them, so it is right for half of the items, and lm-eval's
    # mean over tasks is another one.
    assert row["n"] == 4 and row["values"]["base"]["value"] == 0.5 and row["side_effect"]
    said = [note for note in document["provenance"]["notes"] if "own mean over its tasks" in note]
    assert bool(said) == (not by_size)


@contextmanager
def judge_saying(answer):
    """A stand-in for a judge; keeps what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            content = answer(body["messages"][0]["content"], len(asked))
            reply = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def test_pairs_side_effects_and_a_judge_in_one_report(world, questions, tmp_path, monkeypatch):
    pairs = write_jsonl(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": f"What is {n}?", "chosen": f" It is {n}.", "rejected": " Nobody knows it."}
            for n in range(5)
        ],
    )
    controls = write_jsonl(
        tmp_path / "controls.jsonl", [{"prompt": "The moon is", "completion": " blue"}] * 2
    )
    texts = tmp_path / "texts.txt"
    texts.write_text("The capital of France is Paris.\nNothing happens if you do this.\n")
    monkeypatch.setenv("GRAINS_JUDGE_API_KEY", "secret-of-the-judge")

    def verdict(prompt, number):
        if "<first>" in prompt:  # always the first one: a judge with nothing but a habit
            return "Both are bad.\n**FIRST**"
        return "TRUE" if "Zürich" not in prompt else "I cannot say"

    with judge_saying(verdict) as (judge_url, asked):
        out = tmp_path / "x.evaluation.json"
        document = grains(
            world, out, "--steered", "tiny:truthful", "--max-tokens", 8,
            "--data", pairs, "--controls", controls, "--text", texts,
            "--judge-url", judge_url, "--judge-model", "wise",
            "--task-data", f"truthfulqa={questions}",
            *(part for task in ("pairs", "perplexity", "controls", "distinct", "judged:pairs",
                                "judged:truthfulqa") for part in ("--task", task)),
        )  # fmt: skip
    found = rows(document)
    tokenizer = build_tokenizer()
    for setting in ("base", "truthful"):
        margins = []
        for n in range(5):
            prompt = tokenizer(f"What is {n}?")["input_ids"]
            scores = []
            for text in (f" It is {n}.", " Nobody knows it."):
                answer = tokenizer(f"What is {n}?{text}")["input_ids"][len(prompt) :]
                scores.append(reference(setting, prompt, answer) / len(answer))
            margins.append(scores[0] - scores[1])
        row = found["pairs", "margin"]["values"][setting]
        assert row["value"] == pytest.approx(sum(margins) / 5, abs=TOLERANCE)
        assert row["low"] < row["value"] < row["high"]
        total, tokens = 0.0, 0
        for line in texts.read_text().splitlines():
            ids = tokenizer(line)["input_ids"]
            total += reference(setting, ids[:1], ids[1:])
            tokens += len(ids) - 1
        perplexity = found["perplexity", "perplexity"]["values"][setting]["value"]
        assert perplexity == pytest.approx(torch.tensor(-total / tokens).exp().item(), rel=1e-4)
    assert found["distinct", "answer tokens"]["values"]["base"]["value"] <= 8
    assert not found["pairs", "margin"]["side_effect"]
    assert all(found[key]["side_effect"] for key in found if key[0] in ("perplexity", "controls"))
    # Whoever always prefers the first one prefers nobody: that is what both orders are for.
    assert found["judged:pairs", "win rate"]["differences"]["truthful"]["value"] == 0
    assert found["judged:pairs", "win rate"]["n"] == 5
    truthful = found["judged:truthfulqa", "truthful"]
    assert truthful["n"] == 3 and truthful["values"]["base"]["value"] == 1
    provenance = document["provenance"]
    assert provenance["counts"]["judged:truthfulqa"]["base"] == {"unparsed": 1}
    about = provenance["tasks"]["judged:pairs"]
    assert about["judge"] == "wise" and len(about["prompt_sha256"]) == 64
    assert len(asked) == 5 * 2 + 4 * 2
    path, key, body = asked[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret-of-the-judge"
    assert body["model"] == "wise" and body["temperature"] == 0
    assert "secret" not in out.read_text()


def test_what_is_not_served_is_named(world, tmp_path):
    def refused(*arguments):
        result = CliRunner().invoke(
            app,
            ["evaluate", "--url", world.url, "--out", str(tmp_path / "x.json"),
             "--task", "perplexity", "--text", str(text), *arguments],
        )  # fmt: skip
        assert result.exit_code == 2 and not (tmp_path / "x.json").exists()
        return " ".join(result.stderr.split())

    text = tmp_path / "text.txt"
    text.write_text("The moon is blue.\n")
    assert "serves tiny, tiny:earlier, tiny:later, tiny:truthful, tiny:window" in refused(
        "--model", "tiny", "--steered", "tiny:nobody"
    )
    from tests.offline.worlds import build_tokenizer as word_tokenizer

    word_tokenizer().save_pretrained(tmp_path / "other")
    assert "is not the one of the server's 'tiny'" in refused(
        "--model", "tiny", "--steered", "tiny:later", "--tokenizer", str(tmp_path / "other")
    )


def test_a_server_that_dies_shows_its_log(tmp_path):
    config = build_model().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")  # no weights, no tokenizer
    (tmp_path / "t.txt").write_text("The moon is blue.\n")

    def evaluate(vector):
        vector.save(tmp_path / "v.safetensors")
        result = CliRunner().invoke(
            app,
            ["evaluate", "--model", str(tmp_path / "model"),
             "--vector", str(tmp_path / "v.safetensors"), "--out", str(tmp_path / "x.json"),
             "--task", "perplexity", "--text", str(tmp_path / "t.txt")],
        )  # fmt: skip
        assert result.exit_code == 2, result.output
        return " ".join(result.stderr.split())

    vector = random_vector(0)
    # A vector of another model is refused before there is a server.
    other = replace(vector, model=replace(vector.model, architecture="GPT2LMHeadModel"))
    message = evaluate(other)
    assert "made for a model with architecture 'GPT2LMHeadModel'" in message
    assert "vllm serve" not in message
    message = evaluate(vector)
    assert "vllm serve ended early, with exit code 1" in message
    assert "Error: " in message  # the log's own words
