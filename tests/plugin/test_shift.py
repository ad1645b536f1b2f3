import numpy as np
import pytest
import torch

from grains_vllm.shift import shift


def by_hand(h, delta):
    u = np.asarray(h, np.float64) + np.asarray(delta, np.float64)
    return u * (np.linalg.norm(h, axis=-1) / np.linalg.norm(u, axis=-1))[..., None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_formula_in_float64(dtype):
    torch.manual_seed(0)
    h = torch.randn(3, 5, 64).to(dtype)
    delta = 2 * torch.randn(3, 5, 64)
    expected = by_hand(h.double().numpy(), delta.double().numpy())
    np.testing.assert_allclose(shift(h, delta).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_keeps_each_tokens_norm_not_the_batchs():
    h = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    torch.testing.assert_close(
        shift(h, torch.tensor([10.0, 0.0])).norm(dim=-1), torch.tensor([5.0, 50.0])
    )


def test_survives_the_zero_vector_and_the_exact_opposite():
    h = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    out = shift(h, torch.tensor([[1.0, 0.0], [-1.0, -2.0]]))
    assert torch.equal(out, torch.zeros(2, 2))
