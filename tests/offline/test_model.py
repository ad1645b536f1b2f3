"""Loading, finding blocks, recording their raw outputs, refusing what would go wrong silently."""

import pytest
import safetensors.torch
import torch
from torch import nn

from offline.blocks import find_blocks, record_blocks
from offline.errors import InputError
from offline.model import as_decoder, check_leaf, load_decoder
from tests.offline.worlds import (
    ARCHITECTURES,
    HIDDEN,
    LAYERS,
    build_decoder,
    build_model,
    build_tokenizer,
    save_model,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_are_found(architecture):
    decoder = build_decoder(architecture)
    expected = "transformer.h" if architecture == "gpt2" else "model.layers"
    assert decoder.blocks_path == expected
    assert len(decoder.blocks) == LAYERS
    assert not any(parameter.requires_grad for parameter in decoder.model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_recorded_streams_are_before_the_final_norm(architecture):
    decoder = build_decoder(architecture)
    ids = torch.tensor([[1, 9, 10, 11], [1, 12, 13, 14]])
    positions = torch.tensor([3, 1])
    with torch.no_grad():
        # transformers collects hidden states with hooks of its own, which stay.
        decoder.model(input_ids=ids, output_hidden_states=True)
    hooks = [len(block._forward_hooks) for block in decoder.blocks]
    with torch.no_grad(), record_blocks(decoder.blocks, [(3, 4), (1, 2)]) as recorded:
        hidden = decoder.model(input_ids=ids, output_hidden_states=True).hidden_states
    outputs = [means for means, _ in recorded]
    assert [tuple(output.shape) for output in outputs] == [(2, HIDDEN)] * LAYERS
    rows = torch.arange(2)
    for layer in range(LAYERS - 1):
        torch.testing.assert_close(outputs[layer], hidden[layer + 1][rows, positions])
    assert not torch.allclose(outputs[-1], hidden[-1][rows, positions])
    norm = decoder.model.get_submodule(decoder.blocks_path.rsplit(".", 1)[0])
    norm = norm.ln_f if architecture == "gpt2" else norm.norm
    torch.testing.assert_close(norm(outputs[-1]), hidden[-1][rows, positions])
    assert [len(block._forward_hooks) for block in decoder.blocks] == hooks


def test_another_list_of_the_same_length_is_not_taken_for_blocks():
    model = build_model("llama")
    model.model.adapters = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS))
    assert find_blocks(model, "m") == "model.layers"
    with pytest.raises(InputError, match=r"--blocks is 'model.h'.*model.layers"):
        find_blocks(model, "m", "model.h")
    with pytest.raises(InputError, match="behave like 3 decoder blocks"):
        find_blocks(model, "m", "model.adapters")


def test_two_lists_that_behave_alike_need_the_users_word():
    model = build_model("llama")
    model.model.again = nn.ModuleList(model.model.layers)
    with pytest.raises(InputError, match="2 of its module lists behave like 3 decoder blocks"):
        find_blocks(model, "m")
    assert find_blocks(model, "m", "model.layers") == "model.layers"


def test_model_without_blocks_is_refused():
    model = build_model("llama")
    model.config.num_hidden_layers = LAYERS + 1
    with pytest.raises(InputError, match=r"behave like 4 decoder blocks.*--blocks.*model.layers"):
        find_blocks(model, "m")


def test_nan_weights_are_refused():
    model = build_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"weight 'model.layers.1.mlp.up_proj.weight' holds a NaN"):
        as_decoder(model, build_tokenizer(), "m")


def test_nan_logits_are_refused():
    decoder = build_decoder("llama")
    decoder.model.lm_head.register_forward_hook(lambda _m, _a, logits: logits * float("nan"))
    with pytest.raises(InputError, match="logits hold a NaN"):
        check_leaf(decoder, [1, 9, 10])


def test_embeddings_scaled_outside_the_leaf_are_refused():
    decoder = build_decoder("llama")
    inner = decoder.model.model.forward

    def forward(input_ids=None, inputs_embeds=None, **kwargs):
        if input_ids is not None:
            inputs_embeds = 2 * decoder.embed(input_ids)
        return inner(inputs_embeds=inputs_embeds, **kwargs)

    # One layer's scale would be normalised away; the residual stream keeps it.
    decoder.model.model.forward = forward
    with pytest.raises(InputError, match="differ from logits from input_ids"):
        check_leaf(decoder, [1, 9, 10])


def test_a_model_that_looks_tokens_up_by_embedding_is_refused_in_one_line():
    decoder = build_decoder("gemma4")
    with pytest.raises(InputError, match=r"^model 'gemma4': .*cannot be attributed") as error:
        check_leaf(decoder, [1, 9, 10])
    assert "\n" not in str(error.value)


def test_loading_names_folder_and_digests_weights(tmp_path):
    folder = save_model(tmp_path / "tiny")
    one = load_decoder(str(folder), device="cpu")
    assert one.name == "tiny" and one.dtype == torch.float32
    assert one.weights_sha256 == load_decoder(str(folder), device="cpu").weights_sha256
    half = load_decoder(str(folder), dtype="bfloat16", device="cpu")
    assert half.dtype == torch.bfloat16
    placed = load_decoder(str(folder), device_map="auto")
    assert len(placed.embed([1, 2])) == 2 and placed.weights_sha256 == one.weights_sha256
    build_model("llama", seed=1).save_pretrained(folder)
    assert load_decoder(str(folder), device="cpu").weights_sha256 != one.weights_sha256


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "llama"])
def test_missing_weights_are_refused_and_tied_ones_are_not_missing(architecture, tmp_path):
    folder = save_model(tmp_path / "tiny", architecture)
    load_decoder(str(folder), device="cpu")
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    removed = min(weights)
    del weights[removed]
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"\d weights are missing from its files, such as"):
        load_decoder(str(folder), device="cpu")


def test_missing_model_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="model 'empty' cannot be loaded"):
        (tmp_path / "empty").mkdir()
        load_decoder(str(tmp_path / "empty"))
