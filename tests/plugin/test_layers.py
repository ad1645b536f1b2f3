"""How decoder layers are found, known, and changed."""

import pytest
import torch
from torch import nn

from grains_vllm.errors import GrainsConfigError
from grains_vllm.layers import attach, find_layers, layer_output
from grains_vllm.shift import shift


class Sum(nn.Module):
    def forward(self, hidden, residual):
        return hidden * 2, residual


class Single(nn.Module):
    def forward(self, hidden, residual):
        return hidden * 2


class First(nn.Module):
    def forward(self, hidden, residual):
        return hidden * 2, None


def buffers():
    """Three tokens: steered, unsteered, and steered by a vector that leaves this layer alone."""
    direction = torch.zeros(3, 4)
    direction[1, 0] = 1
    return {
        "grains_slot": torch.tensor([1, 0, 2, 0], dtype=torch.int32)[:, None],
        "grains_strength": torch.tensor([0.5, 0.0, 0.5, 0.0])[:, None],
        "grains_gain": torch.tensor([0.0, 6.0, 0.0]),
        "grains_direction": direction,
    }


def test_vectors_are_added_up_before_the_norm_is_restored():
    directions = torch.zeros(3, 4)
    directions[1, 0] = directions[2, 1] = 1
    layer, hidden = Single(), torch.randn(2, 4)
    before = layer(hidden, None)
    attach(
        layer,
        "single",
        {
            "grains_slot": torch.tensor([[1, 2], [0, 2]], dtype=torch.int32),
            "grains_strength": torch.tensor([[0.5, -1.0], [0.0, 2.0]]),
            "grains_gain": torch.tensor([0.0, 6.0, 3.0]),
            "grains_direction": directions,
        },
    )
    expected = shift(before, torch.tensor([[3.0, -3, 0, 0], [0, 6, 0, 0]]))
    torch.testing.assert_close(layer(hidden, None), expected)


@pytest.mark.parametrize(("cls", "output"), [(Sum, "sum"), (Single, "single"), (First, "first")])
def test_only_the_steered_token_changes_and_only_as_the_formula_says(cls, output):
    torch.manual_seed(0)
    hidden, residual = torch.randn(3, 4), torch.randn(3, 4)
    layer = cls()
    before = layer(hidden, residual)
    attach(layer, output, buffers())
    after = layer(hidden, residual)
    if output == "single":
        before, after = (before,), (after,)
    else:
        assert after[1] is before[1]
    base = residual if output == "sum" else torch.zeros(3, 4)
    expected = shift((before[0] + base)[0], torch.tensor([3.0, 0, 0, 0])) - base[0]
    torch.testing.assert_close(after[0][0], expected)
    assert torch.equal(after[0][1:], before[0][1:])
    assert not torch.allclose(after[0][0], before[0][0])


def test_steering_adds_nothing_to_checkpoints_and_keeps_the_class():
    layer = Sum()
    attach(layer, "sum", buffers())
    assert not layer.state_dict()
    assert isinstance(layer, Sum)


def test_an_unknown_class_is_refused_until_the_operator_says_what_it_does():
    with pytest.raises(GrainsConfigError, match=r"test_layers\.Sum returns its residual stream is"):
        layer_output(Sum(), None)
    assert layer_output(Sum(), "sum") == "sum"


def test_an_override_cannot_contradict_the_table():
    from vllm.model_executor.models.llama import LlamaDecoderLayer

    llama = LlamaDecoderLayer.__new__(LlamaDecoderLayer)
    assert layer_output(llama, "sum") == "sum"
    with pytest.raises(GrainsConfigError, match=r"'first', but .*LlamaDecoderLayer is known to be"):
        layer_output(llama, "first")


def test_a_replaced_forward_is_refused_since_it_would_win_over_the_class():
    layer = Sum()
    layer.forward = lambda *args: args
    with pytest.raises(GrainsConfigError, match="--cpu-offload-gb"):
        attach(layer, "sum", buffers())


def test_a_batch_axis_is_refused_since_routing_counts_tokens():
    layer = Single()
    attach(layer, "single", buffers())
    with pytest.raises(GrainsConfigError, match="computes a stream of 3 axes"):
        layer(torch.randn(1, 3, 4), None)


def test_the_table_knows_vllms_classes_by_the_author_of_their_forward():
    from vllm.model_executor.models.gpt2 import GPT2Block
    from vllm.model_executor.models.llama import LlamaDecoderLayer
    from vllm.model_executor.models.phi3 import Phi3ForCausalLM  # Llama's layers under a new name
    from vllm.model_executor.models.stablelm import StablelmDecoderLayer

    assert Phi3ForCausalLM.__mro__[1].__name__ == "LlamaForCausalLM"

    class Inherits(LlamaDecoderLayer):
        pass

    class Overrides(LlamaDecoderLayer):
        def forward(self, *args):
            return args

    def known(cls):
        return layer_output(cls.__new__(cls), None)

    assert known(LlamaDecoderLayer) == known(Inherits) == "sum"
    assert known(GPT2Block) == "single"
    assert known(StablelmDecoderLayer) == "first"
    with pytest.raises(GrainsConfigError, match="Overrides"):
        known(Overrides)


def test_every_class_of_the_table_exists_in_this_vllm():
    from importlib import import_module

    from grains_vllm.layers import _OUTPUT_OF

    for name in _OUTPUT_OF:
        module, cls = name.rsplit(".", 1)
        assert "forward" in vars(getattr(import_module(module), cls)), name


def test_a_model_without_a_layer_list_is_refused():
    with pytest.raises(GrainsConfigError, match="no list of decoder layers"):
        find_layers(nn.Linear(2, 2))
