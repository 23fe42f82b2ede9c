"""Speed of ReMixer beside the plain layers and networks, forward + backward: by hand, never timed in a test.

All forms take turns in one run, so a busy machine slows all of them alike. `extra_info` holds the ratios.
"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from test_saliency_speed import totals
from timm.models.convit import GPSA

from patchmix_repro import reweighting
from patchmix_repro.models import create_model
from patchmix_repro.remixer import label_distance, remix, remix_attention


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def literal(q, k, v, distance, kappa):
    "eq. 5 as it is printed."
    a = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    m = F.pad(torch.exp(-kappa * distance), (1, 0, 1, 0), value=1.0).unsqueeze(1)
    a = a * m
    return a / a.sum(-1, keepdim=True) @ v


def test_attention(benchmark, device, b=16, heads=6, n=196, d=64, rounds=21):
    "At DeiT-S's shapes. In a network kappa learns, and can be frozen. On a GPU also with flex_attention."
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, n + 1, heads, d, device=device).transpose(1, 2).requires_grad_() for _ in range(3))
    distance, upstream = label_distance(torch.rand(b, n, 1, device=device)), torch.randn(b, n + 1, heads, d, device=device).transpose(1, 2)
    learns, frozen = torch.tensor(0.5, device=device, requires_grad=True), torch.tensor(0.5, device=device)
    calls = {
        "plain": lambda: F.scaled_dot_product_attention(q, k, v).backward(upstream),
        "learnt": lambda: remix_attention(q, k, v, distance, learns).backward(upstream),
        "frozen": lambda: remix_attention(q, k, v, distance, frozen).backward(upstream),
        "literal": lambda: literal(q, k, v, distance, learns).backward(upstream),
    }
    if device.type == "cuda":  # no gradient elsewhere
        calls |= {f"flex_{name}": lambda kappa=kappa: remix_attention(q, k, v, distance, kappa, kernel="flex").backward(upstream) for name, kappa in (("learnt", learns), ("frozen", frozen))}
        totals(calls, 2)  # compiles
    taken = totals(calls, rounds)
    benchmark.extra_info.update(threads=torch.get_num_threads(), device=device.type, **{f"{name}_over_plain": taken[name] / taken["plain"] for name in calls if name != "plain"},
                                seconds=taken)
    print(json.dumps(benchmark.extra_info, indent=1))
    benchmark.pedantic(calls["learnt"], rounds=3)


def step_of(model, x, *labels):
    "One training step, with the optimizer's part."
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def step():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            logits = model(x, *labels)
        F.cross_entropy(logits.float(), torch.zeros(len(x), dtype=torch.long, device=x.device)).backward()
        optimizer.step(), optimizer.zero_grad()

    return step


@pytest.mark.parametrize("name", ["deit", "mixer", "convmixer"])
def test_training_step(benchmark, device, name):
    "Paper scale; the distance is part of the step. ConvMixer beside the shared convolution it replaces and beside one kernel per channel."
    torch.manual_seed(0)
    b, rounds = (64, 15) if device.type == "cuda" else (8, 7)
    x = torch.randn(b, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    labels = torch.rand(b, 196, 1, device=device)
    forms = {"plain": create_model(name, "paper")} | ({"depthwise": create_model("convmixer_full", "paper")} if name == "convmixer" else {})
    forms = {form: step_of(model.to(device, memory_format=torch.channels_last), x) for form, model in forms.items()}
    for form in ("learnt", "frozen"):
        net = remix(create_model(name, "paper")).to(device, memory_format=torch.channels_last)
        torch.nn.init.constant_(net.kappa.requires_grad_(form == "learnt"), 0.5)
        forms[form] = step_of(net, x, labels)
    totals(forms, 1)
    taken = totals(forms, rounds)
    benchmark.extra_info.update(threads=torch.get_num_threads(), device=device.type, batch_size=b,
                                **{f"{form}_over_{other}": taken[form] / taken[other] for form in ("learnt", "frozen") for other in ("plain", "depthwise") if other in taken},
                                seconds=taken)
    print(name, json.dumps(benchmark.extra_info, indent=1))
    benchmark.pedantic(forms["learnt"], rounds=1)


def direct(model):
    "The same network as a step computes it without our form: ConvMixer by convolutions, ConViT by timm's attention."
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, GPSA):
            layer.__class__ = GPSA
        elif isinstance(layer, reweighting.SharedConv2d):
            layer.forward = lambda x, layer=layer: reweighting.shared_conv(x, layer.weight, layer.bias)
    return model


@pytest.mark.parametrize("name", ["convmixer", "convit"])
def test_step_over_direct_form(benchmark, device, name):
    "The plain networks at mini, as they train here: shared kernels as a matrix, attention by position once a batch."
    torch.manual_seed(0)
    x = torch.randn(64, 3, 56, 56, device=device)
    model = create_model(name).to(device)
    calls = {form: step_of(net, x) for form, net in (("ours", model), ("direct", direct(model)))}
    totals(calls, 1)
    taken = totals(calls, 7)
    benchmark.extra_info.update(threads=torch.get_num_threads(), device=device.type, ours_over_direct=taken["ours"] / taken["direct"], seconds=taken)
    print(name, json.dumps(benchmark.extra_info, indent=1))
    benchmark.pedantic(calls["ours"], rounds=1)
