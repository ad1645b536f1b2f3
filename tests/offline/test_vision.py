"""Prompts with an image: every architecture against its own forward from pixels, and captum."""

import hashlib
import io
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from captum.attr import IntegratedGradients
from PIL import Image, ImageDraw
from torch import Tensor

from grains_vllm.vectors import SteeringVector
from offline import objective
from offline.attribution import Attributor
from offline.baselines import baseline_embedding, prompt_baseline
from offline.batching import Room
from offline.blocks import record_blocks, stream_of
from offline.deltas import deltas, masked
from offline.errors import InputError
from offline.extract import extract
from offline.groups import group_maker
from offline.image_views import image_record
from offline.model import Decoder, as_decoder, check_leaf, load_decoder
from offline.objective import contrast, may_pack, place_of, response_logps, rows_of
from offline.options import Baseline, ExtractOptions, Mask, Objective, Read, Tokens
from offline.pairs import Pair, PairSet
from offline.pictures import Picture
from offline.prompt_inputs import prompt_inputs
from offline.prompts import TokenPair, tokenise
from offline.scoring import Item, Point
from offline.suite import load_suite
from offline.transformers_scorer import TransformersScorer
from offline.vision import placeholder, process, sources
from tests.vision import NAMES, build_processor, build_vision, picture, save_vision

QUESTION = "is there a red circle in the picture ?"
YES, NO = "yes , there is .", "no ."


@cache
def decoder_of(name: str) -> Decoder:
    model, processor = build_vision(name)
    return as_decoder(model, processor.tokenizer, name, processor=processor)


@pytest.fixture(params=NAMES)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return decoder_of(request.param)


def encoded(image: Image.Image, name: str = "p.png") -> Picture:
    payload = io.BytesIO()
    image.save(payload, "PNG")
    return Picture(name, hashlib.sha256(payload.getvalue()).hexdigest(), payload.getvalue())


def make_pair(
    seed: int, size: tuple[int, int] = (40, 24), question: str = QUESTION, yes: str = YES
) -> Pair:
    prompt = [{"role": "user", "content": question}]
    shown = encoded(picture(seed, size), f"{seed}.png")
    return Pair(str(seed), f"row {seed}", prompt, NO, yes, picture=shown)


def tokenised(decoder: Decoder, pair: Pair) -> TokenPair:
    return tokenise(pair, decoder.tokenizer, decoder.processor)


def record_of(decoder: Decoder, pair: Pair, options: ExtractOptions) -> dict[str, Any]:
    """What one example's record says."""
    make = group_maker(decoder, options, Room(), lambda note: None)
    (record,) = make([tokenised(decoder, pair)])[1]
    return record


def ordinary_logps(decoder: Decoder, pair: TokenPair, response: list[int]) -> Tensor:
    """Log-likelihoods of a response's tokens by the model's own forward from ids and pixels."""
    assert pair.image is not None
    inputs = process(decoder.processor, pair.image.text, pair.image.picture, False)
    more = torch.tensor([response])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(more)], 1)
    with torch.no_grad():
        logits = decoder.model(**inputs, use_cache=False).logits[0].float()
    start = len(pair.prompt_ids)
    logps = logits[start - 1 : -1].log_softmax(-1)
    return logps.gather(1, more[0, :, None])[:, 0]


def test_forward_from_merged_embeddings_is_the_ordinary_one(decoder: Decoder) -> None:
    pairs = [tokenised(decoder, make_pair(0)), tokenised(decoder, make_pair(1, (24, 56)))]
    check_leaf(decoder, pairs[0].prompt_ids, pairs[0].image)
    for packed in (True, False):
        if packed and decoder.name == "gemma3":
            continue  # a mask of our own would lose its bidirectional attention; never packed
        rows = []
        for pair in pairs:
            place = place_of(decoder, pair)
            assert place is not None
            rows += rows_of(pair, place.embeds, packed, place)
        with torch.no_grad():
            found = response_logps(decoder, rows)
        for index, pair in enumerate(pairs):
            chosen, rejected = (
                ordinary_logps(decoder, pair, ids) for ids in (pair.chosen_ids, pair.rejected_ids)
            )
            if packed:
                both = torch.cat([chosen, rejected])
                torch.testing.assert_close(found[index, : len(both)], both, atol=2e-4, rtol=1e-4)
            else:
                for row, logps in zip(found[2 * index :], (chosen, rejected), strict=False):
                    torch.testing.assert_close(row[: len(logps)], logps, atol=2e-4, rtol=1e-4)


def test_block_outputs_are_those_of_the_ordinary_forward(decoder: Decoder) -> None:
    pair = tokenised(decoder, make_pair(2))
    assert pair.image is not None
    inputs = process(decoder.processor, pair.image.text, pair.image.picture, False)
    end = len(pair.prompt_ids)
    with torch.no_grad(), record_blocks(decoder.blocks, [(end - 1, end)]) as outputs:
        decoder.model(**inputs, use_cache=False)
    whole = torch.stack([stream[0] for stream, _ in outputs])
    # Nothing masked in T-, one image token and one word in T+: D- is zero, D+ is not.
    flags = pair.image_tokens
    chosen = [flags.index(True), end - 4]
    found = deltas(decoder, pair, chosen, [], torch.zeros(64), Read.prompt_end)
    torch.testing.assert_close(found.norms[0], whole.norm(dim=1), rtol=1e-4, atol=1e-4)
    assert found.negative.abs().max() < 1e-4
    assert found.positive.norm(dim=1).min() > 1e-2


def test_attributions_add_up(decoder: Decoder) -> None:
    pairs = [make_pair(seed) for seed in range(3)]
    vector, records = extract(decoder, PairSet("made", "0", 3, pairs), ExtractOptions())
    assert vector.passport["completeness"]["above_tolerance"] == 0
    assert vector.passport["examples_with_image"] == 3
    assert vector.passport["options"]["k"] == 50
    for record, pair in zip(records, pairs, strict=True):
        tokens = tokenised(decoder, pair)
        f_input = ordinary_logps(decoder, tokens, tokens.chosen_ids).mean()
        f_input -= ordinary_logps(decoder, tokens, tokens.rejected_ids).mean()
        assert record["f_input"] == pytest.approx(float(f_input), abs=2e-4)
        # The baseline, without our own merging: every image feature is the image's mean.
        place = prompt_inputs(decoder, tokens.prompt_ids, tokens.image)
        flags = torch.tensor(tokens.image_tokens)
        b = baseline_embedding(decoder, Baseline.mean).repeat(len(flags), 1)
        b[flags] = place.embeds[flags].mean(0)
        torch.testing.assert_close(
            prompt_baseline(place, b[-1], Baseline.mean), b, rtol=1e-5, atol=1e-6
        )
        with torch.no_grad():
            at_b = contrast(decoder, [tokens], [b], False, Objective.mean)
        total = sum(record["scores"])
        change = record["f_input"] - float(at_b)
        assert abs(total - change) <= 0.05 * abs(change) + 1e-4
        both = record["positive"] + record["negative"]
        assert any(flags[both]) and not all(flags[both]), "one ranking over image and text"


def test_masking_an_image_token_changes_exactly_that_position(decoder: Decoder) -> None:
    pair = tokenised(decoder, make_pair(3))
    place = prompt_inputs(decoder, pair.prompt_ids, pair.image)
    position = [index for index, flag in enumerate(pair.image_tokens) if flag][5]
    instead = prompt_baseline(place, torch.zeros(64), Baseline.mean)
    changed = (masked(place.embeds, [position], instead) != place.embeds).any(1)
    assert changed.nonzero().flatten().tolist() == [position]


def test_other_pixels_give_other_attributions(decoder: Decoder) -> None:
    seen = []
    for pair in (make_pair(0), make_pair(4)):
        ids = tokenised(decoder, pair)
        record = record_of(decoder, pair, ExtractOptions(ig_points=8))
        seen.append((ids.prompt_ids, torch.tensor(record["scores"])))
    assert seen[0][0] == seen[1][0], "same text, same layout"
    flags = torch.tensor(tokenised(decoder, make_pair(0)).image_tokens)
    difference = (seen[0][1] - seen[1][1]).abs()
    assert difference[flags].max() > 0.1 * seen[0][1].abs().max()
    assert difference[~flags].max() > 1e-3, "words are attributed beside the pixels too"


def test_captum_agrees() -> None:
    decoder = decoder_of("llava")
    pair = tokenised(decoder, make_pair(5))
    place = prompt_inputs(decoder, pair.prompt_ids, pair.image)
    vocabulary = baseline_embedding(decoder, Baseline.mean)
    points = 16
    options = ExtractOptions(ig_points=points)
    (ours,) = Attributor(decoder, options, vocabulary, Room()).attribute([pair])
    flags = torch.tensor(pair.image_tokens)

    def difference(embeds: Tensor) -> Tensor:
        """F from the language model alone, one row per response."""
        found = []
        for ids in (pair.chosen_ids, pair.rejected_ids):
            answer = decoder.embed(ids).expand(len(embeds), -1, -1)
            hidden = decoder.model.model.language_model(
                inputs_embeds=torch.cat([embeds, answer], 1), use_cache=False
            ).last_hidden_state
            logits = decoder.model.lm_head(hidden)[:, len(pair.prompt_ids) - 1 : -1]
            logps = logits.log_softmax(-1)[:, torch.arange(len(ids)), ids]
            found.append(logps.mean(1))
        return found[0] - found[1]

    b = vocabulary.repeat(len(flags), 1)
    b[flags] = place.embeds[flags].mean(0)
    theirs = IntegratedGradients(difference, multiply_by_inputs=True).attribute(
        place.embeds[None], baselines=b[None], n_steps=points, method="gausslegendre",
        internal_batch_size=points,
    )  # fmt: skip
    scores = theirs[0].double().sum(1)
    assert (ours.scores - scores).norm() <= 1e-3 * scores.norm()


def test_qwen_keeps_three_axes_and_refuses_one() -> None:
    for name in ("qwen2_vl", "qwen2_5_vl"):
        decoder = decoder_of(name)
        pair = tokenised(decoder, make_pair(0))
        place = prompt_inputs(decoder, pair.prompt_ids, pair.image)
        assert place.positions.shape[0] == 3
        time, row, column = place.positions[:, place.image_tokens]
        assert len(time.unique()) == 1
        assert (row - row.min()).tolist() == [r for r in range(3) for _ in range(5)]
        assert (column - column.min()).tolist() == list(range(5)) * 3
        forgetful = _Dropping(decoder.processor, "mm_token_type_ids")
        other = replace(decoder, processor=forgetful, prompts=type(decoder.prompts)())
        with pytest.raises(
            InputError, match=r"one-dimensional positions|mm_token_type_ids. is missing"
        ):
            prompt_inputs(other, pair.prompt_ids, pair.image)


class _Dropping:
    """A processor that forgets one of its outputs."""

    def __init__(self, processor: Any, name: str) -> None:
        self._processor, self._name = processor, name

    def __call__(self, **kwargs: Any) -> dict[str, Any]:
        return {k: v for k, v in self._processor(**kwargs).items() if k != self._name}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)


def test_gemma_keeps_bidirectional_image_attention() -> None:
    decoder = decoder_of("gemma3")
    pair = tokenised(decoder, make_pair(0))
    place = prompt_inputs(decoder, pair.prompt_ids, pair.image)
    first, *_, last = place.image_tokens.nonzero().flatten().tolist()
    changed = place.embeds.clone()
    changed[last] += 1.0
    streams = []
    for embeds in (place.embeds, changed):
        rows = rows_of(pair, embeds, False, place)[:1]
        with record_blocks(decoder.blocks, [(first, first + 1)]) as outputs, torch.no_grad():
            response_logps(decoder, rows)
        streams.append(torch.stack([stream for stream, _ in outputs]))
    assert (streams[0] - streams[1]).abs().max() > 1e-3, "an earlier image token sees a later one"
    other = replace(
        decoder,
        processor=_Dropping(decoder.processor, "token_type_ids"),
        prompts=type(decoder.prompts)(),
    )
    with pytest.raises(InputError, match="token_type_ids"):
        prompt_inputs(other, pair.prompt_ids, pair.image)


def test_gemma_is_never_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the numbers look alike: one row would lose its attention both ways."""
    decoder = decoder_of("gemma3")
    monkeypatch.setitem(objective._PACKED_TOLERANCE, torch.float32, float("inf"))
    assert not may_pack(decoder, tokenised(decoder, make_pair(0)))
    llava = decoder_of("llava")
    assert may_pack(llava, tokenised(llava, make_pair(0)))


def test_deepstack_is_refused() -> None:
    config = tf.Qwen3VLConfig(
        text_config={
            "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
            "patch_size": 4, "spatial_merge_size": 2, "out_hidden_size": 64,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=11, video_token_id=12, vision_start_token_id=9, vision_end_token_id=10,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.Qwen3VLForConditionalGeneration(config).eval()
    processor = build_processor("qwen2_5_vl")
    decoder = as_decoder(model, processor.tokenizer, "deep", processor=processor)
    pair = tokenised(decoder, make_pair(0))
    with pytest.raises(InputError, match=r"deepstack_visual_embeds.*not supported"):
        prompt_inputs(decoder, pair.prompt_ids, pair.image)


def test_eligible_are_words_of_the_message_and_image_features(decoder: Decoder) -> None:
    pair = tokenised(decoder, make_pair(0))
    words = [
        token
        for token, fits, image in zip(pair.tokens, pair.eligible, pair.image_tokens, strict=True)
        if fits and not image
    ]
    assert words == QUESTION.split()
    for image, fits in zip(pair.image_tokens, pair.eligible, strict=True):
        assert fits or not image
    assert sources([1, 2, 9, 4], [1, 2, 7, 7, 7, 4]) == [0, 1, None, None, None, 3]
    assert sources([5, 5], [5, 5, 5]) == [0, 1, None]


def test_tokens_of_one_kind_alone() -> None:
    decoder = decoder_of("llava")
    data = PairSet("made", "0", 2, [make_pair(0), make_pair(1)])
    flags = tokenised(decoder, data.pairs[0]).image_tokens
    for tokens in (Tokens.text, Tokens.image):
        options = ExtractOptions(tokens=tokens, ig_points=4)
        vector, (record, _) = extract(decoder, data, options)
        chosen = record["positive"] + record["negative"]
        assert chosen and all(flags[position] is (tokens is Tokens.image) for position in chosen)
        assert vector.passport["options"]["tokens"] == tokens.value
    text_alone = replace(data.pairs[0], picture=None)
    with pytest.raises(InputError, match="--tokens is image, but no prompt has an image"):
        extract(decoder, PairSet("made", "0", 1, [text_alone]), ExtractOptions(tokens=Tokens.image))


def test_text_and_images_share_a_run() -> None:
    decoder = decoder_of("qwen2_5_vl")
    text = Pair("t", "row t", [{"role": "user", "content": QUESTION}], NO, YES)
    mixed = PairSet("made", "0", 2, [make_pair(0), text])
    vector, records = extract(decoder, mixed, ExtractOptions(ig_points=8))
    assert vector.passport["options"]["k"] == {"image": 50, "text": 10}
    assert "image" in records[0] and "image" not in records[1]
    alone = [record_of(decoder, pair, ExtractOptions(ig_points=8)) for pair in mixed.pairs]
    for record, other in zip(records, alone, strict=True):
        assert record["scores"] == pytest.approx(other["scores"], abs=1e-4)


def test_every_way_of_masking_takes_image_tokens() -> None:
    decoder = decoder_of("gemma3")
    pair = tokenised(decoder, make_pair(0))
    for mask in (Mask.baseline, Mask.pad, Mask.attention):
        options = ExtractOptions(ig_points=2, mask=mask, tokens=Tokens.image)
        tensors, _ = group_maker(decoder, options, Room(), lambda note: None)([pair])
        assert tensors["positive"].norm() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_cells_lie_where_the_image_is(name: str) -> None:
    """Painting one corner changes the feature of that corner's cell most."""
    decoder = decoder_of(name)
    size = (24, 24) if name == "llava" else (40, 24)
    plain = Image.new("RGB", size, (200, 200, 200))
    for corner in ((0, 0), (1, 0), (1, 1)):  # right, bottom
        painted = plain.copy()
        left, top = (0 if not corner[0] else size[0] - 4), (0 if not corner[1] else size[1] - 4)
        ImageDraw.Draw(painted).rectangle((left, top, left + 3, top + 3), fill=(0, 0, 0))
        found = []
        for image in (plain, painted):
            pair = tokenised(decoder, replace(make_pair(0), picture=encoded(image)))
            found.append(prompt_inputs(decoder, pair.prompt_ids, pair.image).embeds)
        change = (found[0] - found[1]).norm(dim=1)
        record = image_record(decoder, pair)
        assert (record["width"], record["height"]) == size
        assert record["views"]
        spans = record["spans"]
        inside = [index for start, end in spans for index in range(start, end)]
        assert inside == [index for index, flag in enumerate(pair.image_tokens) if flag]
        for view in record["views"]:
            cells = change[view["positions"]]
            assert len(cells) == view["rows"] * view["columns"]
            row, column = divmod(int(cells.argmax()), view["columns"])
            if name in ("qwen2_5_vl", "gemma3"):  # their towers mix the features of neighbours
                row, column = row * 2 // view["rows"], column * 2 // view["columns"]
                assert (row, column) == corner[::-1], view["name"]
            else:
                last = view["rows"] - 1, view["columns"] - 1
                assert (row, column) == (corner[1] * last[0], corner[0] * last[1]), view["name"]


def test_the_middle_of_a_long_image_is_what_clip_sees() -> None:
    decoder = decoder_of("llava")
    record = image_record(decoder, tokenised(decoder, make_pair(0, (80, 40))))
    (view,) = record["views"]
    assert view["name"] == "middle"
    assert view["box"] == pytest.approx([0.25, 0.0, 0.75, 1.0])


def test_scorer_scores_images_as_the_ordinary_forward() -> None:
    decoder = decoder_of("qwen2_5_vl")
    pairs = [tokenised(decoder, make_pair(seed)) for seed in range(3)]
    items = [
        Item(tuple(pair.prompt_ids), tuple(ids), pair.image)
        for pair in pairs
        for ids in (pair.chosen_ids, pair.rejected_ids)
    ]
    items.append(Item((1, 17, 18), (19, 20)))  # text beside images
    ((_, scores),) = TransformersScorer(decoder, {}, batch_rows=4).score(items, [None])
    for index, pair in enumerate(pairs):
        for side, ids in enumerate((pair.chosen_ids, pair.rejected_ids)):
            expected = float(ordinary_logps(decoder, pair, ids).sum())
            assert scores[2 * index + side].logp == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("positions", ["all", "text", "image", "prompt", "generation"])
def test_scorer_steers_the_tokens_that_positions_name(positions: str) -> None:
    decoder = decoder_of("gemma3")
    directions = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=1, keepdim=True)
    vector = SteeringVector(directions, torch.full((4,), 10.0), decoder.fingerprint)
    point = Point("v", (1, 2), 0.7, positions)
    pairs = [tokenised(decoder, make_pair(0)), tokenised(decoder, make_pair(1))]
    items = [Item(tuple(pair.prompt_ids), tuple(pair.chosen_ids), pair.image) for pair in pairs]
    items.append(Item((1, 17, 18, 19), (19, 20)))
    scorer = TransformersScorer(decoder, {"v": vector}, batch_rows=3)
    ((_, plain),) = scorer.score(items, [None])
    ((_, scores),) = scorer.score(items, [point])
    for pair, score in zip(pairs, scores, strict=False):
        length = len(pair.prompt_ids) + len(pair.chosen_ids)
        image = torch.zeros(length, dtype=torch.bool)
        image[: len(pair.prompt_ids)] = torch.tensor(pair.image_tokens)
        prompt = torch.arange(length) < len(pair.prompt_ids)
        hit = {"all": prompt | ~prompt, "text": ~image, "image": image,
               "prompt": prompt, "generation": ~prompt}[positions]  # fmt: skip

        def shift(layer: int, hit: Tensor = hit) -> Any:
            def hook(_module: Any, _args: Any, output: Any) -> Any:
                h = stream_of(output).double()
                u = h + 0.7 * 10.0 * directions[layer].double()
                moved = u * h.norm(dim=-1, keepdim=True) / u.norm(dim=-1, keepdim=True)
                moved = torch.where(hit[:, None], moved, h).to(stream_of(output).dtype)
                return (moved, *output[1:]) if isinstance(output, tuple) else moved

            return hook

        handles = [decoder.blocks[layer].register_forward_hook(shift(layer)) for layer in (1, 2)]
        try:
            expected = float(ordinary_logps(decoder, pair, pair.chosen_ids).sum())
        finally:
            for handle in handles:
                handle.remove()
        assert score.logp == pytest.approx(expected, abs=1e-3)
    moved = abs(scores[2].logp - plain[2].logp)
    assert moved == 0 if positions == "image" else moved > 1e-3, "a text has no image tokens"


def test_controls_have_images_as_pairs_do(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    chat = [{"role": "user", "content": "what colour ?"}]
    shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]
    decoder = decoder_of("llava")

    def controls(row: dict[str, Any], processor: Any = decoder.processor) -> list[Item]:
        path = tmp_path / "controls.jsonl"
        path.write_text(json.dumps({"prompt": chat, "completion": "red"} | row))
        return list(
            load_suite(
                PairSet("", "", 0, []), decoder.tokenizer, decoder.text_config, path,
                processor=processor,
            ).suite.controls
        )  # fmt: skip

    for row in ({"image": "a.png"}, {"images": ["a.png"]}, {"image": "a.png", "prompt": shown}):
        (item,) = controls(row)
        assert item.image is not None and sum(item.image.image_tokens) == 36
    for row in ({"images": ["a.png", "a.png"]}, {"prompt": shown}):
        with pytest.raises(InputError, match=r"controls.jsonl, line 1: .*image"):
            controls(row)
    with pytest.raises(InputError, match="line 1: it has an image, but the model takes text alone"):
        controls({"image": "a.png"}, processor=None)


def test_a_placeholder_in_the_text_is_refused(decoder: Decoder) -> None:
    word = placeholder(decoder.processor)
    pair = make_pair(0, question=f"what is {word} ?")
    with pytest.raises(InputError, match=rf"row 0: the prompt has 2 times '{re.escape(word)}'"):
        tokenised(decoder, pair)


def test_a_model_of_text_refuses_images(tmp_path: Path) -> None:
    pair = make_pair(0)
    tokenizer = build_processor("llava").tokenizer
    with pytest.raises(InputError, match="row 0: it has an image, but the model takes text alone"):
        tokenise(pair, tokenizer)
    raw = replace(pair, prompt=QUESTION)
    with pytest.raises(InputError, match=r"row 0:.*'<image>'"):
        tokenise(raw, tokenizer, build_processor("llava"))
    placed = tokenise(replace(pair, prompt=f"<image> {QUESTION}"), tokenizer,
                      build_processor("llava"))  # fmt: skip
    assert sum(placed.image_tokens) == 36


def test_loads_from_a_folder_and_extracts_from_files(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from offline.cli import app

    model = save_vision(tmp_path, "llava")
    decoder = load_decoder(str(model), device="cpu")
    assert decoder.processor is not None
    assert decoder.fingerprint.architecture == "LlavaForConditionalGeneration"
    (tmp_path / "images").mkdir()
    lines = []
    for seed in range(3):
        picture(seed).save(tmp_path / "images" / f"{seed}.png")
        row = {"image": f"images/{seed}.png", "prompt": QUESTION, "chosen": NO, "rejected": YES}
        lines.append(json.dumps(row))
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(lines))
    out = tmp_path / "v.safetensors"
    command = ["extract", "--model", str(model), "--data", str(data), "--out", str(out), "--chat"]
    done = CliRunner().invoke(app, [*command, "--ig-points", "8", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    records = [
        json.loads(line) for line in (tmp_path / "v.attributions.jsonl").read_text().splitlines()
    ]
    assert [record["image"]["name"] for record in records] == [f"images/{n}.png" for n in range(3)]
    data.write_text(lines[0].replace("images/0.png", "https://example.org/0.png"))
    done = CliRunner().invoke(app, [*command, "--force"])
    assert done.exit_code == 2
    assert "--allow-image-urls" in done.output
