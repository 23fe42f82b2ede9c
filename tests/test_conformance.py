"""Ours pass the whole kit; timm and torchvision lack what they are known to lack; broken mixers are caught."""

import pytest
import torch
from conformance import PROPERTIES, Mixer, has
from timm.data import Mixup
from torchvision.transforms import v2

from patchmix_repro.mixing import MixingSwitch, PatchMixing


def patch(**kw):
    return lambda k: PatchMixing(k, label_smoothing=0, **kw)


OURS = [
    Mixer("default", patch(), keyed=True),
    Mixer("one mask", patch(per_image=False), keyed=True),
    Mixer("flip", patch(donor="flip"), keyed=True),
    Mixer("grids", patch(grid=(7, 14)), keyed=True),
    Mixer("fixed ratio", patch(ratio=0.35), keyed=True),
    Mixer("beta", patch(ratio=("beta", 1.0)), keyed=True),
    Mixer("sometimes", patch(prob=0.5), keyed=True),
    Mixer("switch", lambda k: MixingSwitch(k, label_smoothing=0), keyed=True),
    Mixer("only mixup", lambda k: MixingSwitch(k, label_smoothing=0, weights=(1, 0, 0)), keyed=True),
    Mixer("only cutmix", lambda k: MixingSwitch(k, label_smoothing=0, weights=(0, 1, 0)), keyed=True),
]


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("mixer", OURS, ids=lambda m: m.name)
def test_ours_has_every_property(mixer, name):
    PROPERTIES[name](mixer)


TIMM = Mixer("timm", lambda k: Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0, num_classes=k))
THEIRS = [
    (TIMM, {"input not edited", "odd batches", "single images", "global random state untouched", "soft labels accepted"}),
    (Mixer("cutmix", lambda k: v2.CutMix(num_classes=k)), {"global random state untouched"}),
    (Mixer("mixup", lambda k: v2.MixUp(num_classes=k)), {"global random state untouched"}),
]


@pytest.mark.parametrize(("mixer", "lacks"), THEIRS, ids=lambda v: getattr(v, "name", ""))
def test_what_others_lack(mixer, lacks):
    assert {name for name, check in PROPERTIES.items() if not has(mixer, check)} == lacks


class Broken:
    "PatchMixing with one fault."

    def __init__(self, k, fault):
        self.mix, self.fault = PatchMixing(k, label_smoothing=0), fault

    def __call__(self, x, y, generator=None):
        out, soft = self.mix(x, y, generator=generator)
        return self.fault(x, y, out, soft)


FAULTS = {
    "label share = pixel share": lambda x, y, out, soft: (out, soft.roll(1, 0)),
    "label rows sum to 1": lambda x, y, out, soft: (out, soft * 1.01),
    "images are really mixed": lambda x, y, out, soft: (x, soft),
    "input not edited": lambda x, y, out, soft: (x.copy_(out), soft),
    "odd batches": lambda x, y, out, soft: (out[: len(x) // 2 * 2], soft),
    "single images": lambda x, y, out, soft: (out.squeeze(0), soft),
    "same seed, same result": lambda x, y, out, soft: (out, soft + torch.empty_like(soft).uniform_()),
    "global random state untouched": lambda x, y, out, soft: (out + 0 * torch.rand(1), soft),
    "soft labels accepted": lambda x, y, out, soft: (out, soft / y.ndim),
    "half precision kept": lambda x, y, out, soft: (out.float(), soft),
    "channels-last kept": lambda x, y, out, soft: (out.contiguous(), soft),
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_kit_can_fail(name):
    assert not has(Mixer("broken", lambda k: Broken(k, FAULTS[name]), keyed=True), PROPERTIES[name])
