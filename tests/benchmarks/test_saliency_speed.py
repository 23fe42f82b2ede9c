"""Speed and memory of RISE: `pytest tests/benchmarks --benchmark-only`, by hand; no time is asserted.

Rounds take turns in one run, so a busy machine slows all of them alike. `extra_info` holds the ratios.
"""

import json
import statistics
import subprocess
import sys
import time

import pytest
import timm
import torch
import torch.nn.functional as F

from patchmix_repro.masks import METHODS
from patchmix_repro.saliency import rise
from patchmix_repro.squeezenet import squeezenet

NETWORKS = {"convnext_tiny": lambda: timm.create_model("convnext_tiny", num_classes=1000).eval(), "squeezenet1_0": squeezenet}


def bare(model, x, n, size):
    "n forward passes of the same image in the same batches: no masks, no map."
    batch = x.permute(0, 2, 3, 1).expand(size, -1, -1, -1).contiguous().permute(0, 3, 1, 2)
    with torch.no_grad():
        for start in range(0, n, size):
            model(batch[: n - start])


def straightforward(model, x, n, size, grid=7, keep=0.5):
    "RISE as the formula reads: all masks first, then all scores, then one weighted mean. No part of it is the library's."
    h, w = x.shape[-2:]
    cell = (-(-h // grid), -(-w // grid))
    cells = (torch.rand(n, 1, grid, grid) < keep).float()
    large = F.interpolate(cells, size=[(grid + 1) * side for side in cell], mode="bilinear")
    corners = torch.stack([torch.randint(side, (n,)) for side in cell], 1).tolist()
    masks = torch.cat([one[:, top : top + h, left : left + w] for one, (top, left) in zip(large, corners, strict=True)]).to(x.device)
    with torch.no_grad():
        target = model(x).argmax(1)
        scores = torch.cat([model(x * part[:, None]).softmax(1)[:, target] for part in masks.split(size)])
    return torch.einsum("mb,mhw->bhw", scores, masks) / n / keep


def seconds(call):
    "Of one call, until a GPU has done all of it."
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def totals(calls, rounds):
    "Median seconds of each call, taken in turns."
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(t) for name, t in times.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_masks_per_second(benchmark, name, n=128, size=32, rounds=3):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x = NETWORKS[name]().to(device), torch.randn(1, 3, 224, 224).to(device)
    options = {"num_masks": n, "batch_size": size, "dtype": None}
    calls = {method: lambda method=method: rise(model, x, method=method, **options) for method in METHODS}
    calls |= {"bare": lambda: bare(model, x, n, size)}
    taken = totals(calls, rounds)
    benchmark.extra_info.update(
        threads=torch.get_num_threads(),
        batch_size=size,
        **{f"{method}_masks_per_s_over_bare_forward_passes": taken["bare"] / taken[method] for method in METHODS},
        seconds=taken,
    )
    print(json.dumps(benchmark.extra_info, indent=1))
    benchmark.pedantic(calls["rise"], rounds=1)


def test_beside_a_straightforward_rise(benchmark, n=1000, size=32, rounds=1):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x = squeezenet().to(device), torch.randn(1, 3, 224, 224).to(device)
    straightforward(model, x, size, size), rise(model, x, num_masks=size, batch_size=size, dtype=None)
    taken = totals({"straightforward": lambda: straightforward(model, x, n, size), "rise": lambda: rise(model, x, num_masks=n, batch_size=size, dtype=None)}, rounds)
    benchmark.extra_info.update(threads=torch.get_num_threads(), masks=n, batch_size=size, speed_over_straightforward=taken["straightforward"] / taken["rise"], seconds=taken)
    print(json.dumps(benchmark.extra_info, indent=1))
    benchmark.pedantic(straightforward, (model, x, size, size), rounds=1)


PEAK = """
import re, sys
from pathlib import Path
import torch
from patchmix_repro.saliency import rise
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 16, 16), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
rise(model, torch.randn(1, 3, 224, 224), num_masks=int(sys.argv[1]), method=sys.argv[2])
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""  # not ru_maxrss, which starts from the parent's peak


def peak(n, method):
    "Peak memory of a fresh process, in kB (Linux)."
    return int(subprocess.run([sys.executable, "-c", PEAK, str(n), method], check=True, capture_output=True, text=True).stdout)


def test_peak_memory(benchmark):
    found = {method: (peak(500, method), peak(8000, method)) for method in METHODS}
    benchmark.extra_info.update(**{f"{method}_peak_memory_8000_over_500_masks": many / few for method, (few, many) in found.items()}, kilobytes=found)
    print(json.dumps(benchmark.extra_info, indent=1))
    benchmark.pedantic(peak, (500, "rise"), rounds=1)
