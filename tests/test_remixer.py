"""ReMixer's equations and the adapter against hand, slow forms and properties, and what the ecosystem asks of a module."""
import copy
import math
import pickle
from datetime import timedelta
from functools import lru_cache

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Mlp
from timm.models.convit import GPSA, ConVit
from timm.models.convmixer import ConvMixer
from timm.models.deit import VisionTransformerDistilled
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

from patchmix_repro import remixer
from patchmix_repro.core import InputError
from patchmix_repro.models import create_model, plain_attention
from patchmix_repro.remixer import (SharedConv2d, label_distance, mlp_jacobian, parameter_groups, remix, remix_attention, remix_conv, remix_gpsa, remix_mlp,
                                    reweighting_mask, shared_conv)
from patchmix_repro.token_labeling import TokenLabeling, token_labeling_loss


# ---- the shared convolution ----


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


@given(st.integers(1, 18), st.integers(1, 18), st.sampled_from([1, 3, 5, 9]), st.booleans())
def test_the_layer_convolves_on_every_grid(h, w, size, last):
    generator = torch.Generator().manual_seed(h * 100 + w)
    layer = SharedConv2d(size).double()
    x = torch.rand(2, 3, h, w, dtype=torch.float64, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    assert torch.allclose(layer(x), shared_conv(x, layer.weight, layer.bias), atol=1e-12)


def test_memory_format_is_kept():
    x = torch.rand(2, 8, 14, 14).to(memory_format=torch.channels_last)
    assert SharedConv2d(9)(x).is_contiguous(memory_format=torch.channels_last)


# ---- the functions: by hand, literal and slow ----

def literal_distance(y, kind):
    b, n, _ = y.shape
    d = torch.zeros(b, n, n, dtype=y.dtype)
    for i in range(n):
        for j in range(n):
            if kind == "l1":
                d[:, i, j] = (y[:, i] - y[:, j]).abs().sum(-1)
            else:
                d[:, i, j] = 1 - (y[:, i] * y[:, j]).sum(-1) / (y[:, i].square().sum(-1).sqrt() * y[:, j].square().sum(-1).sqrt())
    return d


def literal_attention(q, k, v, distance, kappa, prefix):
    "eq. 5 as it is printed: softmax, multiply by M, divide by the row's sum."
    a = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
    m = torch.ones(len(q), 1, *a.shape[-2:], dtype=q.dtype)
    m[:, 0, prefix:, prefix:] = torch.exp(-kappa * distance)
    a = a * m
    return a / a.sum(-1, keepdim=True) @ v


def literal_mlp(mlp, x, mask):
    "eq. 7 and 8, an image and a channel at a time."
    linear, y = mlp.fc2.weight @ mlp.fc1.weight, torch.empty_like(x)
    for b in range(x.shape[0]):
        for d in range(x.shape[1]):
            y[b, d] = (mask[b] * linear) @ x[b, d] + (mlp(x[b, d]) - linear @ x[b, d])
    return y


def literal_conv(x, weight, bias, mask):
    "eq. 11: every output patch sums its neighbours, each times the kernel and the mask."
    b, c, h, w = x.shape
    s, half = weight.shape[-1], weight.shape[-1] // 2
    y = torch.zeros_like(x)
    for i in range(h):
        for j in range(w):
            for u in range(s):
                for v in range(s):
                    k, l = i + u - half, j + v - half
                    if 0 <= k < h and 0 <= l < w:
                        y[:, :, i, j] += weight[0, 0, u, v] * mask[:, i * w + j, k * w + l, None] * x[:, :, k, l]
    return y + bias


def literal_gpsa(gpsa, x, distance, kappa):
    b, n, c = x.shape
    heads, grid, y = gpsa.num_heads, int(n**0.5), torch.empty_like(x)
    q, k = gpsa.qk(x)[..., :c], gpsa.qk(x)[..., c:]
    v, gate, d = gpsa.v(x), gpsa.gating_param.sigmoid(), c // gpsa.num_heads
    offsets = torch.tensor([[[j % grid - i % grid, j // grid - i // grid, (j % grid - i % grid) ** 2 + (j // grid - i // grid) ** 2]
                             for j in range(n)] for i in range(n)], dtype=x.dtype)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        content = (q[..., part] @ k[..., part].transpose(1, 2) * d**-0.5).softmax(-1)
        position = (offsets @ gpsa.pos_proj.weight[h] + gpsa.pos_proj.bias[h]).softmax(-1)
        a = torch.exp(-kappa * distance) * ((1 - gate[h]) * content + gate[h] * position)
        y[..., part] = a / a.sum(-1, keepdim=True) @ v[..., part]
    return gpsa.proj(y)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def amounts(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.01


def test_a_two_by_two_grid_by_hand():
    "An object on the left column (1, 1/2), none on the right; kappa = ln 2, so M = 2^-d."
    y = torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.float64).view(1, 4, 1)
    d = torch.tensor([[0, 1, 0.5, 1], [1, 0, 0.5, 0], [0.5, 0.5, 0, 0.5], [1, 0, 0.5, 0]], dtype=torch.float64)
    r, kappa = 0.5**0.5, math.log(2)
    m = torch.tensor([[1, 0.5, r, 0.5], [0.5, 1, r, 1], [r, r, 1, r], [0.5, 1, r, 1]], dtype=torch.float64)
    distance = label_distance(y)
    assert torch.equal(distance[0], d)
    mask = reweighting_mask(distance, kappa)
    assert torch.allclose(mask[0], m, atol=1e-15)
    # uniform attention over [CLS] and four patches: rows of M over their sums
    zero, values = torch.zeros(1, 1, 5, 2, dtype=torch.float64), torch.arange(10.0, dtype=torch.float64).view(1, 1, 5, 2)
    rows = torch.ones(5, 5, dtype=torch.float64)
    rows[1:, 1:] = m
    assert torch.allclose(remix_attention(zero, zero, values, distance, kappa)[0, 0], rows / rows.sum(1, keepdim=True) @ values[0, 0], atol=1e-14)
    # a kernel of ones reaches all four patches: row sums of M times x
    x, ones = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), torch.ones(1, 1, 3, 3, dtype=torch.float64)
    expected = torch.tensor([1 + 1 + 3 * r + 2, 0.5 + 2 + 3 * r + 4, r + 2 * r + 3 + 4 * r, 0.5 + 2 + 3 * r + 4], dtype=torch.float64)
    assert torch.allclose(remix_conv(x.view(1, 1, 2, 2), ones, None, mask).flatten(), expected, atol=1e-14)
    # an MLP without activation whose product W2 W1 is all ones
    mlp = Mlp(4, 1, act_layer=torch.nn.Identity).double()
    with torch.no_grad():
        mlp.fc1.weight.fill_(1), mlp.fc2.weight.fill_(1), mlp.fc1.bias.fill_(3), mlp.fc2.bias.copy_(x)
    assert torch.allclose(remix_mlp(mlp, x.view(1, 1, 4), mask)[0, 0], expected + 3 + x, atol=1e-14)


sizes = st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 5), st.sampled_from(["l1", "cosine"]), st.floats(0, 5)


@given(*sizes)
def test_distance_and_mask(seed, b, n, kind, kappa):
    y = amounts(b, n, 3, seed=seed)
    d = label_distance(y, kind)
    m = reweighting_mask(d, kappa)
    assert (d - literal_distance(y, kind)).abs().max() < 1e-12
    assert torch.equal(d, d.mT) and d.min() >= 0 and d.diagonal(dim1=1, dim2=2).abs().max() < 1e-12
    assert m.min() > 0 and m.max() <= 1


@given(*sizes, st.integers(0, 3))
def test_attention_is_eq_5(seed, b, n, kind, kappa, prefix):
    q, k, v = (normal(b, 2, prefix + n, 4, seed=seed + i) for i in range(3))
    d = label_distance(amounts(b, n, 3, seed=seed), kind)
    assert (remix_attention(q, k, v, d, kappa, prefix) - literal_attention(q, k, v, d, kappa, prefix)).abs().max() < 1e-12
    rows = remix_attention(q, k, torch.ones_like(v), d, kappa, prefix)
    assert (rows - 1).abs().max() < 1e-12, "rows sum to 1"


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("b, n, prefix, kappa, scale", [(1, 4, 0, 0.0, None), (2, 9, 1, 0.7, None), (3, 6, 2, 5.0, 0.3)])
def test_flex_attention_is_eq_5(b, n, prefix, kappa, scale):
    q, k, v = (normal(b, 2, prefix + n, 4, seed=i) for i in range(3))
    d = label_distance(amounts(b, n, 3, seed=3))
    found = remix_attention(q, k, v, d, kappa, prefix, scale=scale, kernel="flex")
    assert (found - literal_attention(q * (scale * 2 if scale else 1), k, v, d, kappa, prefix)).abs().max() < 1e-12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention has gradients on a GPU alone")
def test_flex_attention_has_the_gradients_of_sdpa():
    q, k, v = (torch.randn(2, 2, 17, 16, device="cuda", requires_grad=True) for _ in range(3))
    d, kappa = label_distance(torch.rand(2, 16, 1, device="cuda")), torch.tensor(0.7, device="cuda", requires_grad=True)
    upstream = torch.randn(2, 2, 17, 16, device="cuda")
    flex, sdpa = (torch.autograd.grad((remix_attention(q, k, v, d, kappa, kernel=kernel) * upstream).sum(), (q, k, v, kappa)) for kernel in ("flex", "sdpa"))
    for one, other in zip(flex, sdpa):
        assert torch.allclose(one, other, rtol=2e-2, atol=2e-2)  # TF32 products


def test_what_flex_attention_cannot_do():
    q, d = torch.zeros(1, 1, 5, 2), torch.zeros(1, 4, 4)
    for word in ("flash", None):
        with pytest.raises(InputError, match="Allowed: sdpa, flex"):
            remix_attention(q, q, q, d, 0.5, kernel=word)
    with pytest.raises(InputError, match="dropout 0.1 with kernel flex"):
        remix_attention(q, q, q, d, 0.5, dropout=0.1, kernel="flex")
    with pytest.raises(InputError, match="no gradient on a CPU"):
        remix_attention(q, q, q, d, torch.tensor(0.5, requires_grad=True), kernel="flex")


@given(*sizes)
def test_mlp_is_eq_7(seed, b, n, kind, kappa):
    torch.manual_seed(seed)
    mlp, x = Mlp(n, 6).double(), normal(b, 3, n, seed=seed)
    mask = reweighting_mask(label_distance(amounts(b, n, 3, seed=seed), kind), kappa)
    assert (remix_mlp(mlp, x, mask) - literal_mlp(mlp, x, mask)).abs().max() < 1e-12


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3, 5, 9]), st.floats(0, 5))
def test_convolution_is_eq_11(seed, b, h, w, s, kappa):
    x, weight, bias = normal(b, 2, h, w, seed=seed), normal(1, 1, s, s, seed=seed + 1), normal(1, seed=seed + 2)
    mask = reweighting_mask(label_distance(amounts(b, h * w, 2, seed=seed)), kappa)
    for layout in (x, x.to(memory_format=torch.channels_last)):
        assert (remix_conv(layout, weight, bias, mask) - literal_conv(x, weight, bias, mask)).abs().max() < 1e-12


@given(st.integers(0, 10**6), st.integers(1, 2), st.sampled_from([1, 4, 9]), st.floats(0, 5))
def test_gpsa_is_the_masked_mixture(seed, b, n, kappa):
    torch.manual_seed(seed)
    gpsa, x = GPSA(8, 2, qkv_bias=True).double(), normal(b, n, 8, seed=seed)
    d = label_distance(amounts(b, n, 2, seed=seed))
    assert (remix_gpsa(gpsa, x, d, kappa) - literal_gpsa(gpsa, x, d, kappa)).abs().max() < 1e-12
    assert (remix_gpsa(gpsa, x, d, 0.0) - gpsa(x)).abs().max() < 1e-12


@given(st.integers(0, 10**6), st.permutations(range(6)))
def test_patches_may_be_renamed(seed, order):
    "Permuting patches and labels permutes the result: nothing but the labels tells patches apart."
    q, k, v = (normal(2, 2, 7, 4, seed=seed + i) for i in range(3))
    y, tokens = amounts(2, 6, 3, seed=seed), [0, *(1 + i for i in order)]
    once = remix_attention(q, k, v, label_distance(y), 0.7)
    again = remix_attention(*(t[:, :, tokens] for t in (q, k, v)), label_distance(y[:, order]), 0.7)
    assert (once[:, :, tokens] - again).abs().max() < 1e-12


def test_a_linear_mlp_has_no_rest():
    "Without activation and biases eq. 7 is (M * W2 W1) x, and the Jacobian is W2 W1."
    torch.manual_seed(0)
    mlp, x = Mlp(5, 7, act_layer=torch.nn.Identity, bias=False).double(), normal(2, 3, 5)
    mask, linear = reweighting_mask(label_distance(amounts(2, 5, 1)), 1.5), mlp.fc2.weight @ mlp.fc1.weight
    assert (remix_mlp(mlp, x, mask) - x @ (mask * linear).mT).abs().max() < 1e-12
    assert (mlp_jacobian(mlp, x) - linear).abs().max() < 1e-12


def test_the_jacobian_is_the_derivative():
    torch.manual_seed(0)
    mlp, x = Mlp(5, 7).double(), normal(1, 1, 5)
    slow, mask = torch.autograd.functional.jacobian(mlp, x[0, 0]), reweighting_mask(label_distance(amounts(1, 5, 1)), 1.5)
    assert (mlp_jacobian(mlp, x)[0, 0] - slow).abs().max() < 1e-12
    expected = (mask[0] * slow) @ x[0, 0] + mlp(x[0, 0]) - slow @ x[0, 0]
    assert (remix_mlp(mlp, x, mask, mlp_jacobian(mlp, x))[0, 0] - expected).abs().max() < 1e-12


def test_gradients_of_the_functions():
    torch.manual_seed(0)
    d, kappa = label_distance(amounts(2, 4, 2)), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    q = normal(2, 1, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, kappa: remix_attention(q, q, q, d, kappa), (q, kappa))
    mlp, x = Mlp(4, 3).double(), normal(2, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, kappa: remix_mlp(mlp, x, reweighting_mask(d, kappa)), (x, kappa))
    weight, bias, x = (normal(*s).requires_grad_() for s in [(1, 1, 3, 3), (1,), (2, 2, 2, 2)])
    assert torch.autograd.gradcheck(lambda x, w, b, kappa: remix_conv(x, w, b, reweighting_mask(d, kappa)), (x, weight, bias, kappa))
    gpsa, x = GPSA(4, 2).double(), normal(2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, kappa: remix_gpsa(gpsa, x, d, kappa), (x, kappa))


def test_labels_of_any_size_have_a_cosine():
    y = torch.tensor([[1e-36, 2e-36], [1e30, 2e30], [1, 0]])[None]
    d = label_distance(y, "cosine")[0]
    assert d[0, 1] < 1e-5 and abs(d[0, 2] - (1 - 5**-0.5)) < 1e-5


def test_distance_is_not_rounded_by_autocast():
    y = amounts(1, 9, 3).float()
    for kind in ("l1", "cosine"):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(label_distance(y, kind), label_distance(y, kind)) and label_distance(y, kind).dtype == torch.float32
        assert label_distance(y.bfloat16(), kind).dtype == torch.float32


@pytest.mark.parametrize("y, kind, words", [
    (torch.ones(4, 2), "l1", "b n k"), (torch.ones(1, 4, 2).long(), "l1", "float"), (torch.ones(1, 4, 0), "l1", "b n k"),
    (torch.full((1, 4, 2), -1.0), "l1", "negative"), (torch.full((1, 4, 2), float("nan")), "l1", "NaN"),
    (torch.full((1, 4, 2), float("inf")), "cosine", "infinite"), (torch.zeros(1, 4, 2), "cosine", "no direction"),
    (torch.ones(1, 4, 1), "cosine", "one class"), (torch.ones(1, 4, 2), "l2", "Allowed: l1, cosine"),
])
def test_labels_without_a_distance_are_refused(y, kind, words):
    with pytest.raises(InputError, match=words):
        label_distance(y, kind)


@pytest.mark.parametrize("kappa", [-0.1, float("nan"), float("inf"), torch.tensor(-1.0), torch.zeros(3)])
def test_impossible_scales_are_refused(kappa):
    with pytest.raises(InputError, match="kappa"):
        reweighting_mask(torch.zeros(1, 4, 4), kappa)
    with pytest.raises(InputError, match="kappa"):
        remix_attention(*torch.zeros(3, 1, 1, 5, 2), torch.zeros(1, 4, 4), kappa)


# ---- the adapter, at scale mini ----

NAMES = ("deit", "convit", "mixer", "convmixer")


@lru_cache
def base_of(name):
    "A mini network in double precision, with a head that is not zero (timm's Mixer has a zero head)."
    torch.manual_seed(0)
    model = create_model(name, "mini").double().eval()
    with torch.no_grad():
        model.head.weight.normal_(0, 0.1)
    return model


def batch(k=3, b=2, n=196):
    return normal(b, 3, 56, 56), amounts(b, n, k)


def set_kappa(net, value):
    with torch.no_grad():
        net.kappa.fill_(value)
    return net


def gradients(model, *inputs):
    model.zero_grad()
    model(*inputs).square().sum().backward()
    return {name.removeprefix("base."): p.grad.clone() for name, p in model.named_parameters() if not name.endswith("kappa")}


@pytest.mark.parametrize("name", NAMES)
def test_at_zero_it_is_the_base(name):
    base, (x, y) = copy.deepcopy(base_of(name)), batch()
    net = remix(base)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        base, net, x, y = base.to(dtype), net.to(dtype), x.to(dtype), y.to(dtype)
        wanted, expected = gradients(base, x), base(x).detach()
        scale = max(g.abs().max() for g in wanted.values())
        for inputs in ((x,), (x, y)):
            found = gradients(net, *inputs)
            assert (net(*inputs) - expected).abs().max() <= bound * max(1, expected.abs().max())
            assert found.keys() == wanted.keys() and max((found[k] - wanted[k]).abs().max() for k in wanted) <= bound * scale
            assert net.kappa.grad is not None, "DDP wants every parameter in the graph"


@pytest.mark.parametrize("name", NAMES)
def test_kappa_can_leave_zero(name):
    "Except in the last block of a network that reads [CLS] alone, where the gradient is zero for any kappa."
    net, (x, y) = remix(base_of(name)), batch()
    for value in (0.0, 0.7):
        set_kappa(net, value).zero_grad()
        net(x, y).square().sum().backward()
        moved = net.kappa.grad.abs() > 1e-12
        assert moved[:-1].all() and bool(moved[-1]) == (name in ("mixer", "convmixer"))


@pytest.mark.parametrize("name", NAMES)
def test_labels_matter_and_equal_labels_do_not(name):
    net, (x, y) = set_kappa(remix(base_of(name)), 1.0), batch()
    with torch.no_grad():
        plain = net(x)
        assert (net(x, y) - plain).abs().max() > 1e-6
        assert (net(x, torch.zeros_like(y)) - plain).abs().max() < 1e-12, "no object anywhere: mask one"
        assert (net(x, y[:, :1].expand_as(y)) - plain).abs().max() < 1e-12
        assert (net(x.flip(0), y.flip(0)) - net(x, y).flip(0)).abs().max() < 1e-12, "each image has its own labels"


@pytest.mark.parametrize("name", NAMES)
def test_one_distance_a_batch(name, monkeypatch):
    calls = []
    monkeypatch.setattr(remixer, "label_distance", lambda *a: calls.append(a) or label_distance(*a))
    remix(base_of(name))(*batch())
    assert len(calls) == 1


def slow_vit(model, x, y, kappas):
    "DeiT with eq. 5 written out, block by block."
    d, t = literal_distance(y, "l1"), model._pos_embed(model.patch_embed(x))
    for block, kappa in zip(model.blocks, kappas):
        a, z = block.attn, block.norm1(t)
        q, k, v = a.qkv(z).reshape(*z.shape[:2], 3, a.num_heads, a.head_dim).permute(2, 0, 3, 1, 4)
        t = t + a.proj(literal_attention(q, k, v, d, kappa, 1).transpose(1, 2).flatten(2))
        t = t + block.mlp(block.norm2(t))
    return model.head(model.norm(t)[:, 0])


def slow_mixer(model, x, y, kappas):
    d, t = literal_distance(y, "l1"), model.stem(x)
    for block, kappa in zip(model.blocks, kappas):
        t = t + literal_mlp(block.mlp_tokens, block.norm1(t).transpose(1, 2), torch.exp(-kappa * d)).transpose(1, 2)
        t = t + block.mlp_channels(block.norm2(t))
    return model.head(model.norm(t).mean(1))


def slow_convmixer(model, x, y, kappas):
    d, t = literal_distance(y, "l1"), model.stem(x)
    for block, kappa in zip(model.blocks, kappas):
        conv, act, norm = block[0].fn
        t = block[3](block[2](block[1](norm(act(literal_conv(t, conv.weight, conv.bias, torch.exp(-kappa * d)))) + t)))
    return model.head(t.mean((2, 3)))


def slow_convit(model, x, y, kappas):
    d, t = literal_distance(y, "l1"), model.patch_embed(x) + model.pos_embed
    for i, (block, kappa) in enumerate(zip(model.blocks, kappas)):
        z = block.norm1(t)
        if block.use_gpsa:
            t = t + literal_gpsa(block.attn, z, d, kappa)
        else:
            if i == model.local_up_to_layer:
                t = torch.cat([model.cls_token.expand(len(x), 1, -1), t], 1)
                z = block.norm1(t)
            q, k, v = block.attn.qkv(z).reshape(*z.shape[:2], 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            t = t + block.attn.proj(literal_attention(q, k, v, d, kappa, 1).transpose(1, 2).flatten(2))
        t = t + block.mlp(block.norm2(t))
    return model.head(model.norm(t)[:, 0])


SLOW = {"deit": (VisionTransformer, slow_vit, dict(num_heads=2, depth=3)), "convit": (ConVit, slow_convit, dict(num_heads=2, depth=3, local_up_to_layer=2)),
        "mixer": (MlpMixer, slow_mixer, dict(num_blocks=3))}


def small_of(name):
    "Three blocks on 4 x 4 patches, in double precision, and its slow form."
    torch.manual_seed(0)
    if name == "convmixer":
        model, slow = ConvMixer(8, 3, patch_size=8, num_classes=3), slow_convmixer
        for block in model.blocks:
            block[0].fn[0] = SharedConv2d(5)
    else:
        kind, slow, options = SLOW[name]
        model = kind(img_size=32, patch_size=8, embed_dim=8, num_classes=3, **options)
    with torch.no_grad():
        model.head.weight.normal_()
    return model.double().eval(), slow


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_network_against_its_slow_form(name):
    (model, slow), x, y, kappas = small_of(name), normal(2, 3, 32, 32), amounts(2, 16, 2), [0.3, 0.0, 1.7]
    net = remix(model)
    with torch.no_grad():
        net.kappa.copy_(torch.tensor(kappas, dtype=torch.float64))
        assert (net(x, y) - slow(model, x, y, kappas)).abs().max() < 1e-12


VITS = {
    "no [CLS], mean of patches": dict(class_token=False, global_pool="avg", fc_norm=True),
    "registers": dict(reg_tokens=2, no_embed_class=True),
    "norms of q and k, layer scale": dict(qk_norm=True, init_values=0.1),
    "any size": dict(dynamic_img_size=True),
    "explicit softmax": dict(),
}


@pytest.mark.parametrize("case", VITS)
def test_options_of_the_vit_stay_in_force(case):
    "Distances that are large between two halves cut the patches apart: each half sees itself and the prefix tokens."
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=3, **VITS[case]).double().eval()
    net, x, y = remix(model), normal(2, 3, 32, 32), amounts(2, 16, 2)
    if case == "explicit softmax":
        plain_attention(net)
        assert not any(block.attn.fused_attn for block in net.base.blocks)
    if case == "any size":
        x, y = normal(2, 3, 16, 32), amounts(2, 8, 2)
    assert (net(x, y) - model(x)).abs().max() < 1e-12
    set_kappa(net, 1e3)
    seen = torch.autograd.functional.jacobian(lambda v: net.family.block(net.base.blocks[0], v, label_distance(halves(y)), net.kappa[0]).sum((0, 2)), tokens_of(net, x))
    seen, prefix, n = seen.abs().sum((1, 3)), model.num_prefix_tokens, y.shape[1]
    across = seen[prefix:prefix + n // 2, prefix + n // 2:]
    assert across.max() < 1e-12 and seen[prefix:, :prefix].numel() == n * prefix and (seen[:prefix] > 0).all()
    if prefix:
        assert seen[prefix:, :prefix].min() > 0


def halves(y):
    y = torch.zeros_like(y[..., :1])
    y[:, y.shape[1] // 2:] = 1
    return y


def tokens_of(net, x):
    return net.family.tokens(net.base, x).detach()


def test_a_mean_of_patches_moves_the_last_kappa():
    torch.manual_seed(0)
    net = remix(VisionTransformer(img_size=32, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=3, class_token=False, global_pool="avg").double())
    net(normal(2, 3, 32, 32), amounts(2, 16, 1)).square().sum().backward()
    assert (net.kappa.grad != 0).all()


def test_distilled_deit():
    torch.manual_seed(0)
    model = VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=3).double().eval()
    net, x, y = remix(model), normal(2, 3, 32, 32), amounts(2, 16, 2)
    assert (net(x, y) - model(x)).abs().max() < 1e-12 and (net(x) - model(x)).abs().max() == 0
    assert (set_kappa(net, 1.0)(x, y) - model(x)).abs().max() > 1e-9


def test_dropout_of_the_attention_stays():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=3, attn_drop_rate=0.5).double()
    net, x, y = set_kappa(remix(model), 1.0), normal(2, 3, 32, 32), amounts(2, 16, 1)
    for fused in (True, False):
        net.base.blocks[0].attn.fused_attn = fused
        assert (net.train()(x, y) - net(x, y)).abs().max() > 1e-6
        assert torch.equal(net.eval()(x, y), net(x, y))


def test_chosen_layers():
    net, (x, y) = remix(base_of("deit"), layers=[0, 2]), batch()
    net(x, y).square().sum().backward()
    assert [bool(g) for g in net.kappa.grad] == [True, False, True, False, False, False]
    every, some = set_kappa(remix(base_of("deit")), 0.0), set_kappa(net, 0.5)
    with torch.no_grad():
        every.kappa[[0, 2]] = 0.5
        assert torch.equal(every(x, y), some(x, y))


def test_kappa_is_projected_in_place_and_an_earlier_graph_survives():
    net, (x, y) = remix(base_of("deit")), batch(b=1)
    with torch.no_grad():
        net.kappa.copy_(torch.tensor([-1.0, 0.5, -0.1, 0, 2, -3]))
    first, parameter = net(x, y), net.kappa
    assert net.kappa is parameter and net.kappa.tolist() == [0, 0.5, 0, 0, 2, 0]
    (first + net(x, y)).sum().backward()
    assert torch.isfinite(net.kappa.grad).all()


def test_frozen_kappa():
    net, (x, y) = set_kappa(remix(base_of("deit")), 0.5), batch(b=1)
    moving = net(x, y).detach()
    net.kappa.requires_grad_(False)
    found = net(x, y)
    found.sum().backward()
    assert (found - moving).abs().max() < 1e-12 and net.kappa.grad is None
    assert all(len(g["params"]) for g in parameter_groups(net, 0.05)) and len(parameter_groups(net, 0.05)) == 2


# ---- in the ecosystem ----

@pytest.mark.parametrize("name", NAMES)
def test_weights_move_between_plain_and_remixed(name):
    base, net = base_of(name), remix(create_model(name, "mini").double())
    assert set(net.state_dict()) == {*base.state_dict(), "kappa"}
    missing, unexpected = net.load_state_dict(base.state_dict(), strict=False)
    assert missing == ["kappa"] and not unexpected
    x, y = batch()
    assert (net.eval()(x, y) - base(x)).abs().max() < 1e-12
    with pytest.raises(RuntimeError, match="kappa"):
        net.load_state_dict(base.state_dict())
    other = remix(create_model(name, "mini").double()).eval()
    other.load_state_dict(set_kappa(net, 0.4).state_dict())
    assert torch.equal(other(x, y), net(x, y)) and torch.equal(other.kappa, net.kappa)
    nested, twin = torch.nn.ModuleDict({"a": net}), torch.nn.ModuleDict({"a": copy.deepcopy(base)})
    assert set(nested.state_dict()) == {*twin.state_dict(), "a.kappa"}
    assert nested.load_state_dict(twin.state_dict(), strict=False).missing_keys == ["a.kappa"]


def test_the_model_is_copied():
    base = copy.deepcopy(base_of("deit"))
    before, net = {k: v.clone() for k, v in base.state_dict().items()}, remix(base)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_and_weight_average(name):
    net, (x, y) = set_kappa(remix(base_of(name)), 0.5), batch(b=1)
    net(x, y).sum().backward()
    twin, ema = copy.deepcopy(net), ModelEmaV3(net, decay=0.5)
    assert torch.equal(twin(x, y), net(x, y)) and twin.kappa is not net.kappa
    set_kappa(net, 1.5), ema.update(net)
    assert torch.allclose(ema.module.kappa, torch.ones_like(net.kappa)) and twin.kappa.max() == 0.5
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x, y), net(x, y)), "the copy's hooks are its own"


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_network_can_be_pickled(name):
    net, (x, y) = set_kappa(remix(base_of(name)), 0.5), batch(b=1)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x, y), net(x, y))


def test_the_mode_is_the_models():
    base = copy.deepcopy(base_of("deit")).eval()
    assert not any(module.training for module in remix(base).modules()) and remix(base.train()).training


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name):
    net, x, y = set_kappa(remix(small_of(name)[0]), 0.5), normal(2, 3, 32, 32), amounts(2, 16, 2)
    with torch.no_grad():
        net.kappa[0] = -1
    backend = "aot_eager" if name == "deit" else "eager"  # the projection of kappa in place, which is the same code in all, is also traced to its gradient
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend=backend)
    found, expected = compiled(x, y), net(x, y)
    found.sum().backward(), expected.sum().backward()
    assert (found - expected).abs().max() < 1e-12 and compiled.kappa[0] == 0
    assert (compiled.kappa.grad - net.kappa.grad).abs().max() < 1e-9
    torch._dynamo.reset()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name, plain):
    net, (x, y) = set_kappa(remix(base_of(name)), 0.5).float(), (t.float() for t in batch())
    exact = net(x, y).detach()
    if plain:
        plain_attention(net)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x, y)
    found.float().square().sum().backward()
    assert (found.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02 and torch.isfinite(net.kappa.grad).all()
    whole = net.bfloat16()(x.bfloat16(), y)
    assert whole.dtype == torch.bfloat16 and torch.isfinite(whole).all()


def test_recomputed_activations_have_the_same_gradient():
    for name in ("deit", "mixer", "convmixer"):
        net, (x, y) = set_kappa(remix(base_of(name)), 0.5), batch(b=1)
        stored, kappa = gradients(net, x, y), net.kappa.grad.clone()
        net.base.set_grad_checkpointing()
        again = gradients(net, x, y)
        assert all((again[k] - stored[k]).abs().max() < 1e-12 * (1 + stored[k].abs().max()) for k in stored)
        assert (net.kappa.grad - kappa).abs().max() < 1e-12 * (1 + kappa.abs().max())


def test_what_training_and_evaluation_read():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
    net = remix(model)
    assert net.num_classes == 5 and net.pretrained_cfg["mean"] == model.pretrained_cfg["mean"]
    assert {"kappa", "base.pos_embed", "base.cls_token"} <= net.no_weight_decay() <= {name for name, _ in net.named_parameters()} | {"base.dist_token", "base.reg_token"}
    assert remix(base_of("mixer")).no_weight_decay() == {"kappa"}


def test_parameter_groups():
    net = remix(base_of("deit"))
    optimizer = create_optimizer_v2(net, "adamw", lr=0.1, weight_decay=0.05, param_group_fn=lambda m: parameter_groups(m, 0.05, 3.0))
    CosineLRScheduler(optimizer, 10)
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert len(groups) == len(list(net.parameters()))
    assert groups[id(net.kappa)]["weight_decay"] == 0 and abs(groups[id(net.kappa)]["lr"] - 0.3) < 1e-12
    for name, p in net.base.named_parameters():
        assert groups[id(p)]["lr"] == 0.1 and groups[id(p)]["weight_decay"] == (0 if p.ndim < 2 or name in ("pos_embed", "cls_token") else 0.05)
    plain = parameter_groups(base_of("mixer"), 0.05)
    assert [g["weight_decay"] for g in plain] == [0, 0.05]
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="kappa_lr"):
            parameter_groups(net, 0.05, wrong)


def one_of_two(rank, address, results):
    "Train on half a batch each, labels in every other step; what both end with has to agree."
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2, timeout=timedelta(seconds=240))
    try:
        torch.manual_seed(0)
        net = remix(VisionTransformer(img_size=32, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=3).double())
        net = torch.nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        x, y = normal(4, 3, 32, 32)[2 * rank:2 * rank + 2], amounts(4, 16, 1)[2 * rank:2 * rank + 2]
        for step in range(4):
            optimizer.zero_grad()
            net(x, *([] if step % 2 else [y])).square().mean().backward()
            optimizer.step()
        torch.save(dict(net.module.state_dict()), f"{results}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    other, threads = torch.multiprocessing.get_context("forkserver").Process(target=one_of_two, args=(1, str(tmp_path / "meet"), str(tmp_path))), torch.get_num_threads()
    other.start()
    one_of_two(0, str(tmp_path / "meet"), str(tmp_path))
    other.join(), torch.set_num_threads(threads)
    assert other.exitcode == 0
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    torch.manual_seed(0)
    net = remix(VisionTransformer(img_size=32, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=3).double())
    optimizer, x, y = torch.optim.SGD(net.parameters(), 0.1), normal(4, 3, 32, 32), amounts(4, 16, 1)
    for step in range(4):
        optimizer.zero_grad()
        net(x, *([] if step % 2 else [y])).square().mean().backward()
        optimizer.step()
    assert all((v - a[k]).abs().max() < 1e-12 for k, v in net.state_dict().items()), "as one process with the whole batch"


# ---- bad input ----

@pytest.mark.parametrize("name", NAMES)
def test_labels_that_do_not_belong_are_refused(name):
    net, (x, y) = remix(base_of(name), "cosine", num_label_classes=3), batch()
    wrong = {"14 x 14 patches": y[:, :49], "for 2 images": y[:1], "row by row": y[0], "remixed for 3": y[..., :2], "negative": -y, "NaN": y / 0 * 0,
             "no direction": y * 0, "labels are torch.uint8": (255 * y).byte(), "labels are ndarray": y.numpy()}
    for words, labels in wrong.items():
        with pytest.raises(InputError, match=words):
            net(x, labels)


@pytest.mark.parametrize("name", ["swin", "convnext", "convmixer_full"])
def test_networks_without_one_mixing_matrix_are_refused(name):
    with pytest.raises(InputError, match="cannot be remixed.*What can: .*ConvMixer with SharedConv2d"):
        remix(create_model(name, "mini"))


def test_other_modules_are_refused():
    net = remix(base_of("mixer"))
    for model, words in [(torch.nn.Linear(2, 2), "Linear"), (net, "remixed already"), (torch.compile(net), "compile after"),
                         (timm.create_model("resmlp_12_224"), "MixerBlock"), (timm.create_model("vit_relpos_small_patch16_224"), "by position"),
                         (VisionTransformer(embed_dim=8, depth=1, num_heads=2, patch_drop_rate=0.1), "drops patches")]:
        with pytest.raises(InputError, match=words):
            remix(model)


@pytest.mark.parametrize("options, words", [
    (dict(distance="l2"), "Allowed: l1, cosine"), (dict(layers=[]), "layers"), (dict(layers=[0, 0]), "different"), (dict(layers=[6]), "0 to 5"),
    (dict(layers=[-1]), "0 to 5"), (dict(layers=[1.0]), "whole"), (dict(layers=3), "layers 3 of a network"), (dict(layers=torch.arange(2)), "whole"), (dict(num_label_classes=0), "from 1"), (dict(distance="cosine", num_label_classes=1), "from 2"),
])
def test_impossible_options_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        remix(base_of("deit"), **options)


# ---- token labeling ----

def test_token_labeling_by_hand():
    "Two classes, one image of two patches, all logits zero: every cross entropy is ln 2."
    zero, even = torch.zeros(1, 2), torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    for weight, factor in ((0.5, 1.5), (1.0, 2.0), (0.0, 1.0)):
        assert abs(token_labeling_loss(zero, torch.zeros(1, 2, 2), torch.tensor([1]), even, weight) - factor * math.log(2)) < 1e-6
    soft = token_labeling_loss(torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2, 2), torch.tensor([[0.5, 0.5]]), even, 0.0)
    assert abs(soft - (math.log(4) - 0.5 * math.log(3))) < 1e-6


@pytest.mark.parametrize("name", ["deit", "convit", "mixer"])
def test_token_labeling_of_plain_and_remixed(name):
    base, (x, y) = base_of(name), batch()
    plain, net = TokenLabeling(base).train(), TokenLabeling(set_kappa(remix(base), 0.5)).train()
    (logits, tokens), (other, _) = net(x, y), plain(x)
    assert logits.shape == (2, 9) and tokens.shape == (2, 196, 9) and logits.dtype == tokens.dtype == torch.float64
    assert (logits - other).abs().max() > 1e-9 and torch.equal(plain.eval()(x), base.eval()(x))
    token_labeling_loss(logits, tokens, torch.tensor([0, 1]), torch.full((2, 196, 9), 1 / 9).double()).backward()
    assert all(p.grad is not None for p in net.parameters()) and net.model.kappa.grad[-1] != 0
    groups = parameter_groups(net, 0.05, 2.0)
    assert groups[-1]["params"] == [net.model.kappa] and groups[-1]["lr_scale"] == 2


def test_token_labels_that_do_not_belong_are_refused():
    logits, tokens, target = torch.zeros(1, 3), torch.zeros(1, 4, 3), torch.tensor([0])
    for wrong, words in [(torch.ones(1, 4, 2) / 2, "same classes"), (torch.ones(1, 4, 3), "sum to 1"), (torch.full((1, 4, 3), float("nan")), "sum to 1"),
                         (torch.tensor([2.0, -1, 0]).expand(1, 4, 3), "from 0")]:
        with pytest.raises(InputError, match=words):
            token_labeling_loss(logits, tokens, target, wrong)
    with pytest.raises(InputError, match="no patch tokens"):
        TokenLabeling(base_of("convmixer"))
    with pytest.raises(InputError, match="remix the network first"):
        TokenLabeling(base_of("deit"))(*batch())
