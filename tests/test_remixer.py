"""The shared convolution against hand, slow form and a property."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchmix_repro.core import InputError
from patchmix_repro.remixer import SharedConv2d, shared_conv


def slow(x, weight, bias):
    "eq. 9 read literally: every output patch sums its neighbours' features, zero outside."
    b, c, h, w = x.shape
    s, half = weight.shape[-1], weight.shape[-1] // 2
    y = torch.zeros_like(x)
    for i in range(h):
        for j in range(w):
            for u in range(s):
                for v in range(s):
                    k, l = i + u - half, j + v - half
                    if 0 <= k < h and 0 <= l < w:
                        y[:, :, i, j] += weight[0, 0, u, v] * x[:, :, k, l]
    return y + bias


def test_two_by_two_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    weight = torch.arange(9.0).view(1, 1, 3, 3)
    # top left: 1*4 + 2*5 + 3*7 + 4*8; and so on round the square
    assert shared_conv(x, weight, torch.tensor([0.5])).flatten().tolist() == [67.5, 57.5, 37.5, 27.5]


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 3, 5, 9]))
def test_against_the_slow_form(seed, b, c, h, s):
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(shape, dtype=torch.float64, generator=g) for shape in [(b, c, h, h + 1), (1, 1, s, s), (1,)])
    assert (shared_conv(x, weight, bias) - slow(x, weight, bias)).abs().max() < 1e-12


def test_the_gradient_adds_up_over_channels():
    x = torch.rand(2, 5, 4, 4, dtype=torch.float64)
    weight = torch.rand(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.rand(1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, b: shared_conv(x, w, b), (weight, bias))


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (3, 1, 3, 3), (1, 3, 3, 3), (9, 9)])
def test_other_kernels_are_refused(shape):
    with pytest.raises(InputError, match="1 1 s s"):
        shared_conv(torch.zeros(1, 2, 5, 5), torch.zeros(shape))


def test_memory_format_is_kept():
    x = torch.rand(2, 8, 14, 14).to(memory_format=torch.channels_last)
    assert SharedConv2d(9)(x).is_contiguous(memory_format=torch.channels_last)
