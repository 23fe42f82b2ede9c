"Relevance of patches by attention and gradient: by hand, against a slow form by finite differences, and for any input."
import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from patchmix_repro import remixer
from patchmix_repro.core import InputError, NonFiniteError
from patchmix_repro.models import create_model
from patchmix_repro.relevance import attention_gradients, attention_maps, block_relevance, explicit_attention, object_share, relevance, relevance_product


def tiny(seed=0, **kw):
    "A transformer of 2 blocks, 2 heads and 4 patches in float64."
    torch.manual_seed(seed)
    net = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3, **kw).double().eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    return net


def images(b=2, side=8, seed=0):
    return torch.randn(b, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# by hand
class OneLayer(nn.Module):
    "CLS and one patch: logit k = w_k (A_00 c + A_01 v), with the patch's value v from the image."

    def __init__(self, scores, value_cls, weights):
        super().__init__()
        self.num_prefix_tokens, self.global_pool, self.attn_drop = 1, "token", nn.Dropout(0.5)
        self.patch_embed = nn.Identity()
        self.patch_embed.grid_size = (1, 1)
        self.scores, self.c, self.weights = torch.tensor([[scores, [0.0, 0.0]]]), value_cls, torch.tensor(weights)

    def forward(self, x):
        v = x.mean((1, 2, 3))
        attention = self.attn_drop(self.scores[:, None].expand(len(x), 1, 2, 2).softmax(-1) + 0 * v[:, None, None, None])
        values = torch.stack([torch.full_like(v, self.c), v], -1)[:, None, :, None]
        return (attention @ values)[:, 0, 0] * self.weights


def test_one_layer_and_two_tokens_by_hand():
    net = OneLayer([0.0, float(np.log(3))], 1.0, [2.0, -2.0])  # A_00 = 1/4, A_01 = 3/4
    x = torch.full((1, 3, 2, 2), 4.0)
    assert torch.allclose(relevance(net, x, 0), torch.tensor(2 * 4 * 0.75))  # w v A_01 = 6
    assert torch.equal(relevance(net, x, 1), torch.zeros(1, 2, 2))  # the patch lowers this logit
    assert torch.allclose(relevance(net, x), torch.tensor(6.0))  # class 0 is predicted
    assert torch.allclose(relevance(net, -x, 1), torch.tensor(6.0)) and net.training


def test_heads_are_averaged_after_the_positive_part():
    attention, gradient = torch.full((1, 2, 1, 1), 0.5), torch.tensor([3.0, -1.0]).view(1, 2, 1, 1)
    assert block_relevance(attention, gradient).item() == 1 + (1.5 + 0) / 2


# a slow form
def slow_logits(net, x, layer, add):
    "Logits with `add` on the probabilities of one layer."
    handle = net.blocks[layer].attn.attn_drop.register_forward_pre_hook(lambda module, inputs: (inputs[0] + add,))
    with torch.no_grad(), explicit_attention(net):
        logits = net(x)
    handle.remove()
    return logits


def slow_relevance(net, x, target, step=1e-5):
    "Gradients by central differences, one probability at a time; the product by loops."
    with torch.no_grad(), attention_maps(net) as maps:
        net(x)
    product = np.eye(maps[0].shape[-1])
    for layer, attention in enumerate(maps):
        _, heads, n, _ = attention.shape
        matrix = np.eye(n)
        for h, i, j in np.ndindex(heads, n, n):
            add = torch.zeros_like(attention)
            add[0, h, i, j] = step
            change = (slow_logits(net, x, layer, add) - slow_logits(net, x, layer, -add))[0, target].item() / (2 * step)
            matrix[i, j] += max(change * attention[0, h, i, j].item(), 0) / heads
        product = matrix @ product
    return product


@pytest.mark.parametrize("target", [0, 2])
def test_the_map_is_that_of_finite_differences(target):
    net, x = tiny(), images(1)
    found = relevance_product(*attention_gradients(net, x, target, None))[0]
    np.testing.assert_allclose(found, slow_relevance(net, x, target), rtol=1e-6, atol=1e-9)
    shown = relevance(net, x, target)
    small = torch.nn.functional.interpolate(found[0, 1:].view(1, 1, 2, 2).float(), (8, 8), mode="bilinear")[0]
    torch.testing.assert_close(shown, small)


# properties
@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.integers(2, 5))
def test_rows_for_any_attention(seed, layers, heads, n):
    g = torch.Generator().manual_seed(seed)
    attentions = [torch.rand(2, heads, n, n, generator=g, dtype=torch.float64).softmax(-1) for _ in range(layers)]
    gradients = [torch.randn(2, heads, n, n, generator=g, dtype=torch.float64) for _ in range(layers)]
    product = relevance_product(attentions, gradients)
    assert (product >= 0).all() and (product.diagonal(dim1=1, dim2=2) >= 1).all()  # the skip connections never lose a token
    eye = torch.eye(n, dtype=torch.float64).expand(2, n, n)
    assert torch.equal(relevance_product(attentions, [-a.abs() for a in gradients]), eye)
    order, swapped = torch.randperm(n, generator=g), torch.randperm(heads, generator=g)
    moved = relevance_product([a[:, swapped][..., order, :][..., order] for a in attentions], [a[:, swapped][..., order, :][..., order] for a in gradients])
    torch.testing.assert_close(moved, product[:, order][:, :, order])


@settings(max_examples=10)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_an_image_has_the_same_map_in_any_batch(seed, b):
    net, x = tiny(seed % 7), images(b, seed=seed)
    together = relevance(net, x)
    for k in range(b):
        torch.testing.assert_close(relevance(net, x[k : k + 1])[0], together[k])


def test_a_later_block_may_have_a_token_more():
    net = create_model("convit", "mini", 9).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    x = images(2, 56).float()
    attentions, gradients = attention_gradients(net, x, None, None)
    assert [a.shape[-1] for a in attentions] == [196] * 5 + [197]
    maps = relevance(net, x)
    assert maps.shape == (2, 56, 56) and maps.max() > 0
    product = torch.eye(197).expand(2, 197, 197)
    for attention, gradient in zip(attentions, gradients, strict=True):
        matrix, new = torch.eye(197).repeat(2, 1, 1), 197 - attention.shape[-1]
        matrix[:, new:, new:] += (attention * gradient).clamp(min=0).mean(1)
        product = matrix @ product
    torch.testing.assert_close(relevance_product(attentions, gradients), product)


# what stays as it was
def test_nothing_of_the_network_or_the_images_changes():
    net, x = tiny(), images()
    net.train()
    net.blocks[0].eval()
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        relevance(net, x)
    assert net.training and not net.blocks[0].training and net.blocks[1].attn.fused_attn and not x.requires_grad
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and not any(m._forward_pre_hooks for m in net.modules())


def test_a_frozen_network_has_the_same_map():
    net, x = tiny(), images()
    assert torch.equal(relevance(copy.deepcopy(net).requires_grad_(False), x), relevance(net, x))


# remixed networks
class Masked(nn.Module):
    "A stand-in for a remixed network: eq. 5 as a bias on the logits, through timm's own mask argument."

    def __init__(self, net, kappa):
        super().__init__()
        self.net, self.kappa = net, kappa

    def forward(self, x, labels=None):
        if labels is None:
            return self.net(x)
        distance = (labels[:, :, None] - labels[:, None]).abs().sum(-1)
        bias = nn.functional.pad(-self.kappa * distance, (1, 0, 1, 0))
        return self.net(x, attn_mask=bias[:, None])


def test_labels_reach_the_attention_that_is_read():
    net, x = Masked(tiny(), 3.0), images()
    labels = torch.tensor([[0.0, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)[..., None]
    with torch.no_grad(), attention_maps(net) as plain:
        net(x)
    with torch.no_grad(), attention_maps(net) as masked:
        net(x, labels)
    weights = nn.functional.pad(torch.exp(-3 * (labels - labels.mT).abs()), (1, 0, 1, 0), value=1.0)[:, None]
    literal = weights * plain[0] / (weights * plain[0]).sum(-1, keepdim=True)  # eq. 5, first block
    torch.testing.assert_close(masked[0], literal)
    assert not torch.allclose(relevance(net, x, 0, labels), relevance(net, x, 0))
    assert torch.equal(relevance(net, x, 0), relevance(net.net, x, 0))


@pytest.mark.skipif(not hasattr(remixer, "remix"), reason="the library has no remix yet")
def test_a_remixed_network_keeps_the_contract():
    base = create_model("deit", "mini", 9).eval()
    net = remixer.remix(base)
    x, labels = images(2, 56).float(), torch.rand(2, 196, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(relevance(net, x, 0, labels), relevance(base, x, 0), rtol=1e-4, atol=1e-6)  # kappa is 0
    with torch.no_grad():
        for p in net.kappa if isinstance(net.kappa, (list, tuple, nn.ParameterList)) else [net.kappa]:
            p.add_(2.0)
    assert not torch.allclose(relevance(net, x, 0, labels), relevance(base, x, 0), rtol=1e-5)


def test_a_remixed_convit_is_read_in_all_its_blocks():
    base = create_model("convit", "mini", 9).eval()
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    net, x = remixer.remix(base), images(2, 56).float()
    labels = torch.rand(2, 196, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(relevance(net, x, 0, labels), relevance(base, x, 0), rtol=1e-3, atol=1e-6)  # kappa is 0
    with torch.no_grad():
        net.kappa.fill_(2.0)
        fused = net(x, labels)
        with attention_maps(net) as maps:
            torch.testing.assert_close(net(x, labels), fused, rtol=1e-4, atol=1e-5)  # the explicit form is eq. 5 too
    assert [a.shape[-1] for a in maps] == [196] * 5 + [197]
    q, k, _ = (part.unflatten(-1, (base.blocks[5].attn.num_heads, -1)).movedim(2, 1) for part in last_input(net, x, labels).chunk(3, -1))
    weights = nn.functional.pad(torch.exp(-2 * (labels - labels.mT).abs()), (1, 0, 1, 0), value=1.0)[:, None]
    literal = weights * (base.blocks[5].attn.scale * q @ k.mT).softmax(-1)
    torch.testing.assert_close(maps[-1], literal / literal.sum(-1, keepdim=True), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(relevance(net, x, 0, labels), relevance(base, x, 0), rtol=1e-5)
    assert not any("fused_attn" in vars(block.attn) for block in net.base.blocks)


def last_input(net, x, labels):
    "Queries, keys and values of the last block."
    found = []
    handle = net.base.blocks[5].attn.qkv.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        net(x, labels)
    handle.remove()
    return found[0]


# errors
@pytest.mark.parametrize("name", ["mixer", "convmixer", "convnext", "swin"])
def test_a_network_without_cls_is_told_what_explains_it(name):
    with pytest.raises(InputError, match="CLS.*RISE"):
        relevance(create_model(name, "mini", 9), images(1, 56).float())


def test_mean_pooling_has_no_row_to_read():
    for net in (tiny(global_pool="avg"), tiny(global_pool="avg", class_token=False)):
        with pytest.raises(InputError, match="'avg'"):
            relevance(net, images())


def test_bad_input_never_becomes_a_map():
    net, x = tiny(), images()
    for wrong, word in (({"target": 3}, "classes 0 to 2"), ({"target": torch.tensor([0.0, 1.0])}, "int64"), ({"target": torch.tensor([0, 1, 2])}, "2 images")):
        with pytest.raises(InputError, match=word):
            relevance(net, x, **wrong)
    with pytest.raises(InputError, match="b 3 h w"):
        relevance(net, x[:, :2])
    with pytest.raises(NonFiniteError, match="NaN"):
        relevance(net, x * torch.nan)


class Hidden(nn.Module):
    "Passes no probabilities through attn_drop."

    def __init__(self):
        super().__init__()
        self.num_prefix_tokens, self.global_pool, self.patch_embed, self.head = 1, "token", nn.Identity(), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x.mean((2, 3)))


def test_attention_that_is_not_shown_is_an_error():
    with pytest.raises(InputError, match="0 of 0 .*attn_drop"):
        relevance(Hidden(), images().float())
    net = tiny()
    net.blocks[0].attn.forward = lambda x, **more: x  # one block that hides its attention spoils the product
    with pytest.raises(InputError, match="1 of 2 .*attn_drop"):
        relevance(net, images())


def test_a_class_attention_is_refused():
    cait = timm.create_model("cait_xxs24_224", img_size=32, depth=2, num_classes=3)
    with pytest.raises(InputError, match="1 rows for 5 tokens"):
        relevance(cait, torch.zeros(1, 3, 32, 32))


def test_another_size_is_named():
    net = VisionTransformer(img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=3, dynamic_img_size=True)
    with pytest.raises(InputError, match="32 x 48 px gives 24 patches, the network's grid is 4 x 4"):
        relevance(net, torch.zeros(1, 3, 32, 48))


# the object
@given(st.integers(0, 10**6))
def test_a_map_that_knows_nothing_has_no_object_share(seed):
    g = torch.Generator().manual_seed(seed)
    masks, maps = torch.rand(3, 6, 5, generator=g) > 0.5, torch.rand(3, 6, 5, generator=g) + 0.01
    assert object_share(torch.ones(3, 6, 5), masks).abs().max() < 1e-6
    slow = [sum(m[i, j].item() for i, j in np.argwhere(k.numpy())) / m.sum().item() - k.float().mean().item() for m, k in zip(maps, masks, strict=True)]
    np.testing.assert_allclose(object_share(maps, masks[:, None]), slow, atol=1e-5)


def test_a_map_of_zeros_has_no_share():
    assert object_share(torch.zeros(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)).isnan().all()
    with pytest.raises(InputError, match="bool masks"):
        object_share(-torch.ones(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool))
