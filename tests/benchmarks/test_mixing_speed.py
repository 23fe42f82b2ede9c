"""Speed of mixing beside timm and torchvision: `pytest tests/benchmarks --benchmark-only`, by hand; no time is asserted.

Rounds of all mixers take turns in one run, so a busy machine slows all of them alike. `extra_info` holds the ratios.
"""

import json
import statistics
import subprocess
import sys
import time

import pytest
import torch
from timm.data import Mixup
from torchvision.transforms import v2

from patchmix_repro.mixing import PatchMixing
from patchmix_repro.patches import choose_patches, replace_patches


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 3, 224, 224, generator=generator), torch.randint(9, (64,), generator=generator)


def medians(calls, rounds=41):
    "Median seconds of each call, taken in turns."
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def test_patch_mixing(benchmark, batch):
    x, y = batch
    ours, timm, torchvision = PatchMixing(9, seed=0), Mixup(mixup_alpha=0, cutmix_alpha=1.0, num_classes=9), v2.CutMix(num_classes=9)
    mask = choose_patches(64, 49, 12, torch.Generator().manual_seed(0))
    seconds = medians(
        {
            "clone": lambda: x.clone(),
            "timm": lambda: timm(x.clone(), y),
            "torchvision": lambda: torchvision(x, y),
            "ours": lambda: ours(x, y),
            "replace": lambda: replace_patches(x, x, mask),
        }
    )
    benchmark.extra_info.update(
        threads=torch.get_num_threads(),
        shape=list(x.shape),
        over_timm_cutmix_and_clone=seconds["ours"] / seconds["timm"],
        over_torchvision_cutmix=seconds["ours"] / seconds["torchvision"],
        over_a_bare_clone=seconds["ours"] / seconds["clone"],
        replace_patches_over_a_bare_clone=seconds["replace"] / seconds["clone"],
        milliseconds={name: 1000 * s for name, s in seconds.items()},
    )
    print(json.dumps(benchmark.extra_info, indent=1))
    benchmark.pedantic(ours, (x, y), rounds=20, warmup_rounds=2)


IMPORTS = """
import time
import torch, timm
start = time.perf_counter()
import patchmix_repro.mixing
print(time.perf_counter() - start)
"""


def seconds_to_import():
    return float(subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True).stdout)


def test_import_of_mixing(benchmark):
    "Seconds that patchmix_repro.mixing adds to a process that has imported torch and timm."
    added = [seconds_to_import() for _ in range(5)]
    benchmark.extra_info.update(seconds_added=statistics.median(added))
    print(json.dumps(benchmark.extra_info))
    benchmark.pedantic(seconds_to_import, rounds=1)
