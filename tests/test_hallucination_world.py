"""The tiny world with images is what its README says, and the committed model knows it."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.hallucination import drawing, judged, measure, train, vocabulary, world
from benchmarks.hallucination.drawing import GRID, PATCH
from offline.model import load_decoder
from offline.pairs import load_pairs
from offline.transformers_scorer import TransformersScorer

MODEL = Path(world.__file__).parent / "model"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(MODEL).eval()


def questions(split="test", present=False, count=100, seed=1):
    return list(world.sample_questions(split, present, count, seed))


def patch(pixels, cell):
    row, column = divmod(cell, GRID)
    return pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]


def test_every_word_has_one_meaning():
    assert len(set(vocabulary.WORDS)) == len(vocabulary.WORDS)


def test_you_is_the_one_word_that_is_unknown():
    rng = Random(0)
    said = set()
    for sample in (world.sample_check, world.sample_list, world.sample_control):
        said |= {
            word
            for _ in range(200)
            for part in sample(rng).prompt
            for word in part["content"].split()
        }
    said |= {word for phrase in world.PHRASES for word in phrase.replace("{}", "").split()}
    assert said - set(vocabulary.WORDS) == {"you"}


def test_questions_and_images_are_seeded():
    first, again, other = (questions(seed=seed, count=10) for seed in (1, 1, 2))
    assert first == again and first != other
    scene = first[0].scene
    assert np.array_equal(drawing.paint(scene), drawing.paint(replace(scene)))
    assert not np.array_equal(drawing.paint(scene), drawing.paint(replace(scene, seed=0)))


def test_splits_share_neither_questions_nor_images_nor_things():
    sets = [questions("train", count=50), questions("validation"), questions("test")]
    images = [{drawing.paint(q.scene).tobytes() for q in found} for found in sets]
    for index, found in enumerate(sets):
        assert len(images[index]) == len(found)
        assert all(images[index].isdisjoint(other) for other in images[index + 1 :])
    known = list(world.SPLIT_THINGS.values())
    assert sum(map(len, known)) == len(set().union(*known)) == len(world.THINGS) == 60
    for things in known:  # every color and shape is known from elsewhere
        assert {t.color for t in things} == set(world.COLORS)
        assert {t.shape for t in things} == set(vocabulary.SHAPES)


def asked_shape(question):
    return question.text.split()[-2]


def shown(question):
    """The things in the scene that have the shape that is asked about."""
    return [thing for _, thing in question.scene.things if thing.shape == asked_shape(question)]


def test_training_never_asks_plainly_about_held_out_things_that_are_there():
    held_out = {t for s in ("validation", "test") for t in world.SPLIT_THINGS[s]}
    rng = Random(0)
    plain = [world.sample_plain(rng)[0] for _ in range(300)]
    assert any(map(shown, plain)) and not any(held_out & set(shown(q)) for q in plain)
    told = {thing for _ in range(2000) for thing in shown(world.sample_look(rng))}
    assert held_out < told
    for question in questions(present=True):
        assert set(shown(question)) <= set(world.SPLIT_THINGS["test"])


@pytest.mark.parametrize("present", [True, False])
def test_the_truth_is_in_the_scene(present):
    for question in questions(present=present):
        assert question.scene.shows(asked_shape(question)) == present
        assert question.truth == ("yes ." if present else "no .")
        shapes = [thing.shape for _, thing in question.scene.things]
        assert len(set(shapes)) == len(shapes)


def test_pairs_hold_both_kinds_of_cue_on_both_sides_nearly_balanced():
    found = questions(count=400)
    for question in found:
        assert set(question.tone) & set(vocabulary.CAREFUL_CUES)
        assert set(question.tone) & set(vocabulary.EAGER_CUES)
        assert question.scene.count("sharp") and question.scene.count("smudge")
    balances = [question.balance for question in found]
    assert set(balances) == set(world.BALANCES)
    assert all(25 < balances.count(balance) < 80 for balance in world.BALANCES)


def test_things_and_marks_are_in_the_cells_where_they_are_said_to_be():
    scene = questions(count=1)[0].scene
    plain = drawing.paint(replace(scene, things=(), marks=())).astype(int)
    full = drawing.paint(scene).astype(int)
    changed = {
        cell
        for cell in range(drawing.CELLS)
        if abs(patch(full, cell) - patch(plain, cell)).max() > 40
    }
    filled = [cell for cell, _ in (*scene.things, *scene.marks)]
    assert changed == set(filled) and len(filled) == len(changed)
    for cell, thing in scene.things:
        # The pixel that differs most from paper has the thing's color, but for its light.
        pixels = patch(full, cell).reshape(-1, 3)
        pixel = pixels[abs(pixels - 230).sum(1).argmax()]
        nearest = min(
            drawing.PAINT,
            key=lambda name: abs(pixel / 0.925 - np.array(drawing.PAINT[name])).sum(),
        )
        assert nearest == thing.color
    for cell, mark in scene.marks:
        darkest = patch(full, cell).min()
        assert (darkest < 60) == (mark == "sharp")


def test_shapes_differ_from_each_other():
    covers = [drawing._masks(shape)[0] for shape in vocabulary.SHAPES]
    for index, one in enumerate(covers):
        assert all(abs(one - other).sum() > 5 for other in covers[index + 1 :])
    with pytest.raises(ValueError, match="unknown shape 'heart'"):
        drawing._masks("heart")


def test_the_files_are_read_back_as_they_were_asked(tmp_path):
    path = tmp_path / "pairs.jsonl"
    world.write_pairs(path, "train", 3, seed=1)
    found = questions("train", count=3)
    pairs = load_pairs(str(path)).pairs
    assert [pair.prompt for pair in pairs] == [question.prompt for question in found]
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {("no .", "yes .")}
    for pair, question in zip(pairs, found, strict=True):
        assert pair.picture is not None
        assert np.array_equal(np.asarray(pair.picture.image), drawing.paint(question.scene))


def test_training_sees_what_the_processor_makes_of_the_image_files(processor, tmp_path):
    scene = questions(count=1)[0].scene
    drawing.picture(scene).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        made = processor(images=[image], text=["<image>"], return_tensors="pt")
    assert made["pixel_values"].shape == (1, 3, drawing.SIZE, drawing.SIZE)
    assert torch.allclose(made["pixel_values"], train.pixels([scene]), atol=1e-5)


def test_training_renders_documents_as_the_processor_does(processor):
    rng = Random(0)
    tokenizer = processor.tokenizer
    for shares in (train.LOOKING, train.SAYING):
        for _ in range(30):
            one = train.sample_document(rng, tokenizer, shares)
            assert one.ids[0] == tokenizer.bos_token_id and one.ids[-1] == tokenizer.eos_token_id
            assert one.ids.count(tokenizer.unk_token_id) <= 1  # "you"
            assert one.ids.count(processor.image_token_id) == (drawing.CELLS if one.scene else 0)
    question = questions(count=1)[0]
    one = train.document(question, question.truth, tokenizer)
    text = processor.apply_chat_template(
        question.messages, add_generation_prompt=True, tokenize=False
    )
    made = processor(
        images=[drawing.picture(question.scene)], text=[text], add_special_tokens=False
    )
    assert list(made["input_ids"][0]) == one.ids[: one.scored[0]]
    assert tokenizer.decode(one.ids[one.scored[0] : -1]) == "no ."


def test_the_committed_model_is_the_one_its_script_makes(model, processor):
    built = vocabulary.build_processor()
    assert processor.tokenizer.get_vocab() == built.tokenizer.get_vocab()
    assert processor.chat_template == built.chat_template
    assert processor.tokenizer.special_tokens_map == built.tokenizer.special_tokens_map
    expected = train.model_config(built.tokenizer)
    for part in ("text_config", "vision_config"):
        saved, wanted = (getattr(c, part).to_dict() for c in (model.config, expected))
        for written_by_saving in ("architectures", "dtype", "transformers_version"):
            saved.pop(written_by_saving, None)
            wanted.pop(written_by_saving, None)
        assert saved == wanted
    assert model.config.image_token_id == processor.image_token_id
    assert (MODEL / "model.safetensors").stat().st_size < 1_600_000


def test_the_weights_have_the_names_that_vllm_looks_for():
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        towers = [key for key in file.keys() if "vision_tower" in key]  # noqa: SIM118
    assert towers and all("vision_tower.vision_model." in key for key in towers)


def test_the_model_hallucinates_as_recorded(model, processor):
    recorded = json.loads((MODEL / "training.json").read_text())
    rates = measure.existence_rates(model, processor, "validation", count=120, seed=99)
    assert abs(rates["hallucinated"] - recorded["validation_hallucinated"]) < 0.15
    assert rates["hallucinated"] + rates["denied"] >= 0.98
    assert recorded["validation_present"] >= 0.95 and rates["present"] >= 0.92
    assert recorded["control_accuracy"] >= 0.95
    assert measure.control_accuracy(model, processor, count=120, seed=99) >= 0.92


def test_words_and_marks_both_sway_the_model(model, processor):
    """With one of them fixed against it, the other still moves hallucination."""
    rng = Random(3)

    def rate(tone, image):
        things = world.SPLIT_THINGS["test"]
        asked = [world.sample_existence(rng, things, False, tone, image) for _ in range(60)]
        answers = measure.greedy_answers(model, processor, asked)
        return answers.count("yes .") / len(answers)

    assert rate((3, 0), (1, 1)) < 0.25 < 0.75 < rate((0, 3), (1, 1))
    assert rate((1, 1), (3, 0)) < 0.25 < 0.75 < rate((1, 1), (0, 3))


def test_figures_tell_present_objects_from_other_controls(tmp_path):
    decoder = load_decoder(str(MODEL), device="cpu")
    sizes = judged.Sizes(train=1, validation=(4, 3, 5, 2), test=(1, 1, 1, 1))
    sets = judged.make_sets(decoder, 1, tmp_path, sizes)
    assert len(sets.validation.suite.controls) == 8 and sets.validation.present == 3
    scorer = TransformersScorer(decoder, {})
    scores = dict(scorer.score(sets.validation.suite.items, [None]))[0]
    found = judged.figures(sets.validation, scores)
    expected = list(world.sample_questions("validation", False, 4, 1))
    answers = measure.greedy_answers(decoder.model, decoder.processor, expected)
    assert found.hallucination == answers.count("yes .") / 4
    flipped = [replace(score, greedy=False) for score in scores[8:11]]
    worse = judged.figures(sets.validation, [*scores[:8], *flipped, *scores[11:]])
    assert worse.present == 0.0 and worse.controls == found.controls
    assert worse.measures.controls == 0.0
