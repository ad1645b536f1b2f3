"""Hooks against the formula written out in float64, and the model left as it was."""

import numpy as np
import pytest
import torch

from grains_vllm.vectors import ArtifactError, ModelFingerprint, SteeringVector
from offline.steer import steered
from tests import vision
from tests.offline.worlds import HIDDEN, LAYERS, build_decoder

STRENGTH = 0.7


def vector_for(decoder, empty_layer=None, **passport):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(LAYERS, HIDDEN, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    if empty_layer is not None:
        rows[empty_layer] = 0
    return SteeringVector(rows, torch.tensor([4.0, 5.0, 6.0]), decoder.fingerprint, passport)


def run(decoder, ids, **kwargs):
    """Every block's output: [layers] of [batch, tokens, hidden], and the logits."""
    outputs = []
    handles = [
        block.register_forward_hook(
            lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in decoder.blocks
    ]
    with torch.no_grad():
        logits = decoder.model(input_ids=ids, **kwargs).logits
    for handle in handles:
        handle.remove()
    return outputs, logits


def formula(h, vector, layer, strength=STRENGTH, length=None):
    h = h.numpy().astype(np.float64)
    r = float(vector.reference_norms[layer]) if length is None else length
    u = h + strength * r * vector.directions[layer].numpy().astype(np.float64)
    norms = np.linalg.norm(h, axis=-1, keepdims=True) / np.linalg.norm(u, axis=-1, keepdims=True)
    return torch.from_numpy(u * norms).float()


IDS = torch.tensor([[1, 10, 11, 12, 13], [1, 14, 15, 16, 17]])


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def decoder(request):
    return build_decoder(request.param)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_layer_follows_the_formula_and_is_undone(decoder, layer):
    vector = vector_for(decoder)
    plain, logits = run(decoder, IDS)
    with steered(decoder.model, vector, STRENGTH, layers=[layer]):
        # Registered after the steering hooks: it sees what the next block gets.
        moved, steered_logits = run(decoder, IDS)
    torch.testing.assert_close(
        moved[layer], formula(plain[layer], vector, layer), rtol=1e-5, atol=1e-5
    )
    for earlier in range(layer):
        assert torch.equal(moved[earlier], plain[earlier])
    assert not torch.allclose(logits, steered_logits)
    assert torch.equal(run(decoder, IDS)[1], logits)
    assert not decoder.model._forward_pre_hooks
    assert not any(block._forward_hooks for block in decoder.blocks)


def test_undone_after_an_error(decoder):
    logits = run(decoder, IDS)[1]
    with pytest.raises(RuntimeError), steered(decoder.model, vector_for(decoder), 1.0):
        raise RuntimeError
    assert torch.equal(run(decoder, IDS)[1], logits)


def test_all_layers_by_default_or_the_recommended_ones(decoder):
    plain, _ = run(decoder, IDS)
    with steered(decoder.model, vector_for(decoder, empty_layer=1), STRENGTH):
        assert not torch.equal(run(decoder, IDS)[0][0], plain[0])
    with steered(decoder.model, vector_for(decoder, recommended={"layers": [2]}), STRENGTH):
        moved, _ = run(decoder, IDS)
    assert torch.equal(moved[1], plain[1]) and not torch.equal(moved[2], plain[2])


def test_absolute_scale(decoder):
    vector = vector_for(decoder)
    plain, _ = run(decoder, IDS)
    with steered(decoder.model, vector, 2.0, layers=[1], scale="absolute"):
        moved, _ = run(decoder, IDS)
    expected = formula(plain[1], vector, 1, 2.0, length=1.0)
    torch.testing.assert_close(moved[1], expected, rtol=1e-5, atol=1e-5)


def test_strength_zero_changes_no_bit(decoder):
    logits = run(decoder, IDS)[1]
    with steered(decoder.model, vector_for(decoder), 0.0):
        assert not decoder.model._forward_pre_hooks  # nothing is even installed
        assert torch.equal(run(decoder, IDS)[1], logits)


def window(lengths, first, end):
    """[2, 5]: the columns from `first` up to `end`, counted from where a row's prompt ends."""
    return torch.tensor(
        [
            [length + first <= column < length + end for column in range(5)]
            for length in torch.as_tensor(lengths).reshape(-1).expand(2).tolist()
        ]
    )


@pytest.mark.parametrize("lengths", [3, torch.tensor([3, 2])])
def test_positions_in_one_forward(decoder, lengths):
    plain, _ = run(decoder, IDS)
    vector = vector_for(decoder)
    prompt = torch.arange(5)[None] < torch.as_tensor(lengths).reshape(-1, 1).expand(2, 1)
    windows = {
        "prompt": prompt,
        "generation": ~prompt,
        "prompt:2": window(lengths, -2, 0),
        "prompt:9": prompt,
        "generation:1": window(lengths, 0, 1),
        "prompt:1+generation": window(lengths, -1, 9),
        "prompt:1+generation:1": window(lengths, -1, 1),
    }
    for positions, flags in windows.items():
        with steered(decoder.model, vector, STRENGTH, [0], positions, prompt_length=lengths):
            moved = run(decoder, IDS)[0][0]
        assert torch.equal(moved[~flags], plain[0][~flags])
        expected = formula(plain[0], vector, 0)[flags]
        torch.testing.assert_close(moved[flags], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["generation", "prompt:2+generation:1"])
def test_positions_with_a_cache_equal_one_forward(decoder, positions):
    arguments = (decoder.model, vector_for(decoder), STRENGTH, None, positions)
    with torch.no_grad(), steered(*arguments, prompt_length=3):
        whole = decoder.model(input_ids=IDS).logits
        first = decoder.model(input_ids=IDS[:, :2], use_cache=True)
        cache, parts = first.past_key_values, [first.logits]
        for column in range(2, 5):
            step = decoder.model(input_ids=IDS[:, column : column + 1], past_key_values=cache)
            parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


IMAGE = torch.tensor([[False, True, True], [False, False, False]])  # generated columns left out


@pytest.mark.parametrize("image_tokens", [IMAGE, None])
def test_kinds_of_tokens(decoder, image_tokens):
    plain, _ = run(decoder, IDS)
    vector = vector_for(decoder)
    image = torch.zeros(2, 5, dtype=torch.bool)
    if image_tokens is not None:
        image[:, :3] = image_tokens
    for positions, flags in {"image": image, "text": ~image}.items():
        arguments = (decoder.model, vector, STRENGTH, [0], positions)
        with steered(*arguments, image_tokens=image_tokens):
            moved = run(decoder, IDS)[0][0]
        assert torch.equal(moved[~flags], plain[0][~flags])
        expected = formula(plain[0], vector, 0)[flags]
        torch.testing.assert_close(moved[flags], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "positions"), [*((name, "text") for name in vision.NAMES), ("qwen2_5_vl", "image")]
)
def test_image_models_generate_as_one_forward_says(name, positions):
    """What a cache, positions of their own and a vision tower leave of the columns' count."""
    model, processor = vision.build_vision(name)
    text = f"<user> see {vision.PLACEHOLDER[name]} and describe <assistant>"
    images = [vision.picture(0)]
    inputs = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
    ids = inputs["input_ids"]
    image = ids == vision.image_token_id(name)
    assert image.sum() > 10
    arguments = (model, vision.random_vector(name, 0), STRENGTH, None, positions)
    with torch.no_grad(), steered(*arguments, prompt_length=ids.shape[1], image_tokens=image):
        made = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True,
            return_dict_in_generate=True, eos_token_id=None,
        )  # fmt: skip
        for kind in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            if kind in inputs:  # as `generate` goes on with them
                more = torch.full((1, 3), int(kind == "attention_mask"))
                inputs[kind] = torch.cat([inputs[kind], more], 1)
        inputs["input_ids"] = made.sequences[:, :-1]
        whole = model(**inputs).logits[:, -4:]
    torch.testing.assert_close(torch.stack(made.logits, 1), whole, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_applied_is_refused(decoder):
    vector = vector_for(decoder, empty_layer=1)
    with pytest.raises(ValueError, match=r"layers \[1\] hold no direction"):
        steered(decoder.model, vector, 1.0, layers=[1]).__enter__()
    with pytest.raises(ValueError, match="needs prompt_length"):
        steered(decoder.model, vector, 1.0, positions="prompt").__enter__()
    with pytest.raises(
        ValueError, match="positions: 'last' is not one of all, text, image, prompt, prompt:N"
    ):
        steered(decoder.model, vector, 1.0, positions="last").__enter__()
    with pytest.raises(ValueError, match=r"image_tokens is torch.int64 of shape \[2, 3\]"):
        steered(decoder.model, vector, 1.0, image_tokens=IMAGE.long()).__enter__()
    other = ModelFingerprint("OtherForCausalLM", HIDDEN, LAYERS)
    stranger = SteeringVector(vector.directions, vector.reference_norms, other)
    with pytest.raises(ArtifactError, match="OtherForCausalLM"):
        steered(decoder.model, stranger, 1.0).__enter__()
