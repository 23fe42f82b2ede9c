"""timm's classes in the papers' geometry."""
import copy

import pytest
import torch
from timm.models.convit import GPSA

from patchmix_repro.core import InputError
from patchmix_repro.data import create_dataset
from patchmix_repro.models import IMAGE_SIZE, MODELS, PRETRAINED, create_model, plain_attention, predict


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scale", ["mini", "small"])
def test_forward_and_gradient(name, scale):
    model = create_model(name, scale, num_classes=5)
    logits = model(torch.rand(2, 3, IMAGE_SIZE[scale], IMAGE_SIZE[scale]))
    assert logits.shape == (2, 5)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", sorted(PRETRAINED))
def test_the_paper_scale_is_the_published_network(name):
    import timm
    with torch.device("meta"):
        ours, theirs = create_model(name, "paper", 1000), timm.create_model(PRETRAINED[name])
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_mixer_and_convmixer_at_paper_scale():
    import timm
    with torch.device("meta"):
        mixer, theirs = create_model("mixer", "paper", 1000), timm.create_model("mixer_s16_224")
        full, shared = create_model("convmixer_full", "paper", 1000), create_model("convmixer", "paper", 1000)
    assert {k: v.shape for k, v in mixer.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    kernels = [sum(p.numel() for b in m.blocks for p in b[0].fn[0].parameters()) for m in (full, shared)]
    assert kernels == [8 * 512 * 82, 8 * 82]  # one 9 x 9 kernel and bias a channel, or one for all


def test_convit_has_deit_width():
    with torch.device("meta"):
        convit = create_model("convit", "paper", 1000)
    assert convit.embed_dim == 384 and [b.use_gpsa for b in convit.blocks] == [True] * 10 + [False] * 2


def test_convit_is_timms_convit():
    torch.manual_seed(0)
    ours = create_model("convit", "mini", attn_drop_rate=0.3).double().eval()
    theirs = copy.deepcopy(ours)
    for block in theirs.blocks[:5]:
        block.attn.__class__ = GPSA
        block.attn.gating_param.data.uniform_(-1, 1)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(3, 3, 56, 56, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-12)
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(1)  # the same attention is dropped
        model(x).square().sum().backward()
    assert all(torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-12) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_network_that_was_looked_at_in_inference_mode_can_be_trained(name):
    model = create_model(name)
    with torch.inference_mode():
        model(torch.rand(2, 3, 56, 56))
    model(torch.rand(2, 3, 56, 56)).sum().backward()


def test_relative_positions_are_all_that_tells_patches_apart():
    "No [CLS] and no position embedding; without its bias tables the network does not see how patches are arranged."
    torch.manual_seed(0)
    model, x = create_model("relpos").double().eval(), torch.rand(1, 3, 56, 56, dtype=torch.float64)
    assert not hasattr(model, "pos_embed") and model.cls_token is None and model.global_pool == "avg"
    assert len({id(b.attn.rel_pos.relative_position_bias_table) for b in model.blocks}) == 6, "each block has its own"
    moved = x.roll(8, 3)  # two whole patches
    with torch.no_grad():
        assert (model(x) - model(moved)).abs().max() > 1e-9
        for block in model.blocks:
            block.attn.rel_pos.relative_position_bias_table.zero_()
        assert (model(x) - model(moved)).abs().max() < 1e-12


@pytest.mark.parametrize("scale, stem", [("mini", 1), ("small", 2), ("paper", 4)])
def test_the_stem_keeps_the_stages(scale, stem):
    with torch.device("meta"):
        convnext, swin = create_model("convnext", scale), create_model("swin", scale)
    assert convnext.stem[0].stride == swin.patch_embed.proj.stride == (stem, stem)
    assert all(b.attn.window_size == (7, 7) for b in swin.layers[0].blocks)


def test_weights_follow_the_generator():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(torch.cat([p.flatten() for p in create_model("convmixer").parameters()]))
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])


@pytest.mark.parametrize("kw, words", [
    (dict(name="resnet50"), "unknown model"), (dict(name="swin", scale="large"), "unknown scale"),
    (dict(name="swin", num_classes=1), "integers from 2"), (dict(name="swin", num_classes=True), "integers from 2"),
    (dict(name="swin", drop_path=1.0), "0 <= rate < 1"), (dict(name="convmixer", drop_path=0.1), "no drop path"),
    (dict(name="swin", pretrained=True), "no published weights"), (dict(name="mixer", scale="paper", pretrained=True), "no published weights"),
])
def test_errors(kw, words):
    with pytest.raises(InputError, match=words):
        create_model(**kw)


@pytest.mark.parametrize("name", ["deit", "swin"])
def test_plain_attention_computes_the_same(name):
    model, x = create_model(name).eval().double(), torch.rand(2, 3, 56, 56, dtype=torch.float64)
    with torch.no_grad():
        assert (model(x) - plain_attention(model)(x)).abs().max() < 1e-10


def test_predictions_leave_every_mode_as_it_was():
    class Fails(torch.nn.Sequential):
        def forward(self, x):
            raise KeyError

    dataset = create_dataset("shapes9", "val", 56)
    frozen = torch.nn.Sequential(torch.nn.BatchNorm2d(3).eval(), torch.nn.Flatten(), torch.nn.Linear(3 * 56 * 56, 9)).train()
    frozen[0].eval()
    predict(frozen, dataset, torch.arange(2))
    assert frozen.training and not frozen[0].training
    with pytest.raises(KeyError):
        predict(broken := Fails(torch.nn.Dropout()), dataset, torch.arange(2))
    assert broken.training and broken[0].training


def test_predictions_do_not_depend_on_batches():
    torch.manual_seed(0)
    model, dataset = create_model("convmixer").double(), create_dataset("shapes9", "val", 56)
    model.stem[0].register_forward_pre_hook(lambda _, x: (x[0].double(),))
    ids = torch.tensor([5, 0, 999, 5, 17])
    apart = torch.cat([predict(model, dataset, i[None]) for i in ids])
    for batch_size in (1, 2, 3, 256):
        assert torch.allclose(predict(model, dataset, ids, batch_size), apart, atol=1e-6)
