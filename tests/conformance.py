"""A conformance kit for mixing augmentations: what a training loop may rely on, as checks any mixer can be put through.

A mixer is anything called as `mix(x, y) -> (mixed x, soft y)`. `Mixer` says how to build one without label
smoothing and how to call it so that a seed decides the draw.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch


class Mixer(NamedTuple):
    name: str
    make: Callable  # (num_classes) -> mixer, without label smoothing
    keyed: bool = False  # takes generator=; otherwise the global generators are seeded

    def __call__(self, x, y, seed=0, num_classes=8):
        mix = self.make(num_classes)
        if self.keyed:
            return mix(x, y, generator=torch.Generator().manual_seed(seed))
        with seeded(seed):
            return mix(x, y)


@contextmanager
def seeded(seed):
    "Seed numpy's and torch's global generators for a while."
    before = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        yield
    np.random.set_state(before)


def coded(b, k=8, h=28, w=28):
    "Image i is 1 in channel y[i] and 0 elsewhere: the channel means of a mixed image are its shares."
    y = torch.arange(b) % k
    x = torch.nn.functional.one_hot(y, k).float()[:, :, None, None].expand(b, k, h, w).contiguous()
    return x, y


def shares_agree(mixer, seeds=12):
    for seed in range(seeds):
        x, soft = mixer(*coded(8), seed)
        torch.testing.assert_close(x.float().mean((2, 3)), soft.float(), atol=1e-5, rtol=0)


def rows_sum_to_one(mixer, seeds=12):
    for seed in range(seeds):
        _, soft = mixer(*coded(8), seed)
        assert (soft >= 0).all()
        torch.testing.assert_close(soft.sum(1), torch.ones(8))


def really_mixes(mixer, seeds=12):
    assert any(not torch.equal(mixer(*coded(8), seed)[0], coded(8)[0]) for seed in range(seeds))


def leaves_input(mixer, seeds=12):
    for seed in range(seeds):
        x, y = coded(8)
        mixer(x, y, seed)
        assert torch.equal(x, coded(8)[0]) and torch.equal(y, coded(8)[1])


def odd_batch(mixer, seeds=12, b=7):
    for seed in range(seeds):
        x, soft = mixer(*coded(b), seed)
        assert x.shape == (b, 8, 28, 28) and soft.shape == (b, 8)
        torch.testing.assert_close(x.mean((2, 3)), soft.float(), atol=1e-5, rtol=0)


def single_image(mixer, seeds=12):
    odd_batch(mixer, seeds, b=1)


def replays(mixer, seeds=12):
    runs = [[mixer(*coded(8), seed) for seed in range(seeds)] for _ in range(2)]
    assert all(torch.equal(a, b) and torch.equal(s, t) for (a, s), (b, t) in zip(*runs, strict=True))
    assert any(not torch.equal(runs[0][0][0], x) for x, _ in runs[0])


def leaves_global_random(mixer, seeds=12):
    with seeded(1):
        torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[2]
        mix = mixer.make(8)
        for seed in range(seeds):
            mix(*coded(8), **({"generator": torch.Generator().manual_seed(seed)} if mixer.keyed else {}))
        mix(*coded(8))
        assert torch.equal(torch_before, torch.get_rng_state()) and numpy_before == np.random.get_state()[2]


def soft_labels(mixer, seeds=12):
    for seed in range(seeds):
        x, y = coded(8)
        soft = torch.nn.functional.one_hot(y, 8).float()
        torch.testing.assert_close(mixer(x.clone(), soft, seed)[1], mixer(x, y, seed)[1].float())


def half_precision(mixer, seeds=12):
    for dtype in (torch.float16, torch.bfloat16):
        for seed in range(seeds):
            x, y = coded(8)
            assert mixer(x.to(dtype), y, seed)[0].dtype == dtype


def channels_last(mixer, seeds=12):
    for seed in range(seeds):
        x, y = coded(8)
        plain = mixer(x.clone(), y, seed)[0]
        mixed, _ = mixer(x.contiguous(memory_format=torch.channels_last), y, seed)
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(mixed, plain, atol=1e-6, rtol=0)


PROPERTIES = {
    "label share = pixel share": shares_agree,
    "label rows sum to 1": rows_sum_to_one,
    "images are really mixed": really_mixes,
    "input not edited": leaves_input,
    "odd batches": odd_batch,
    "single images": single_image,
    "same seed, same result": replays,
    "global random state untouched": leaves_global_random,
    "soft labels accepted": soft_labels,
    "half precision kept": half_precision,
    "channels-last kept": channels_last,
}


def has(mixer, check):
    "Whether a mixer passes a check; an error of the mixer is a no."
    try:
        check(mixer)
    except Exception:  # noqa: BLE001 - any failure of a foreign mixer means that it lacks the property
        return False
    return True


def conformance(mixers):
    "Property -> mixer -> bool."
    return {name: {mixer.name: has(mixer, check) for mixer in mixers} for name, check in PROPERTIES.items()}
