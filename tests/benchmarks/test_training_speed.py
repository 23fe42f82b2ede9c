"""The training loop beside a bare loop, and the share of data preparation: by hand, never timed in a test.

Steps of both loops take turns in one run, so a busy machine slows both alike. `extra_info` holds the ratios.
"""

import json
import statistics
import time

import pytest
import torch
from accelerate import Accelerator

from patchmix_repro.batches import mixer_for, train_batches
from patchmix_repro.config import train_config
from patchmix_repro.core import keep_memory
from patchmix_repro.data import create_dataset
from patchmix_repro.models import MODELS
from patchmix_repro.state import build, dtype_of
from patchmix_repro.training import train_step


@pytest.fixture(scope="module")
def dataset():
    return create_dataset("shapes9", "train", 56)


def bare_step(model, optimizer, x, target, dtype):
    "What any loop has to do: forward, backward, step."
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        loss = torch.nn.functional.cross_entropy(model(x).float(), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


@pytest.mark.parametrize("name", MODELS)
def test_training_loop(benchmark, dataset, name):
    config, accelerator = train_config(model=name), Accelerator()
    keep_memory()  # as train does on a CPU
    ours, bare = (build(config, 9, 100, accelerator) for _ in range(2))
    mix, seconds = mixer_for(config, 9), {"preparation": [], "ours": [], "bare": []}
    ready = (torch.randn(64, 3, 56, 56).to(accelerator.device, memory_format=torch.channels_last), torch.eye(9)[torch.arange(64) % 9].to(accelerator.device))
    batches = train_batches(dataset, config, epoch=0, device=accelerator.device)

    def timed(what, call, *arguments):
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = call(*arguments)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[what].append(time.perf_counter() - start)
        return result

    for _ in range(36):
        batch = timed("preparation", next, batches)
        timed("ours", train_step, ours, batch, mix, config, accelerator)
        timed("bare", bare_step, bare.model, bare.optimizer, *ready, dtype_of(config, accelerator.device))
    median = {what: statistics.median(values[6:]) for what, values in seconds.items()}
    step = median["preparation"] + median["ours"]
    benchmark.extra_info.update(
        threads=torch.get_num_threads(),
        device=accelerator.device.type,
        images_per_s=64 / step,
        speed_over_a_bare_loop=median["bare"] / step,
        preparation_share=median["preparation"] / step,
    )
    print(name, json.dumps(benchmark.extra_info, indent=1))
    benchmark.pedantic(train_step, (ours, batch, mix, config, accelerator), rounds=3)
