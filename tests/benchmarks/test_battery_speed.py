"""Images/s of the paper's battery over the bare forward pass: by hand, never timed in a test.

Both take turns over the same images in one run, so a busy machine slows both alike. `extra_info` holds the ratios.
"""

import json
import statistics

import pytest
import torch
from test_saliency_speed import NETWORKS, seconds

from patchmix_repro.core import keep_memory, project_root
from patchmix_repro.data import IMAGENET_MEAN, IMAGENET_STD, create_dataset, normalize
from patchmix_repro.evaluation import BATCH, evaluate
from patchmix_repro.smd import battery
from patchmix_repro.training import load_model

CASES = {  # name -> network, side in px, images, rounds; at 56 px everything beside the network weighs most
    "convnext_mini": (lambda: load_model(project_root() / "results" / "checkpoints" / "convnext_mini_patchmix")[0], 56, 512, 3),
    "squeezenet1_0": (NETWORKS["squeezenet1_0"], 224, 96, 3),
    "convnext_tiny": (NETWORKS["convnext_tiny"], 224, 32, 2),
}


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bare(model, images, batch_size, rounds):
    "What no evaluation can do without: forward passes over normalised images."
    with torch.no_grad():
        for _ in range(rounds):
            torch.cat([model(x) for x in images.split(batch_size)]).cpu()


@pytest.mark.parametrize("name", CASES)
def test_battery(benchmark, device, tmp_path, name):
    "Every round evaluates other images, with its parts on disk, as a run does: cut-outs are planned anew each time; both sides keep the memory they free."
    if device.type == "cpu":
        keep_memory()
    make, side, n, rounds = CASES[name]
    model, dataset, conditions, batch_size = make().to(device), create_dataset("shapes9", "test", side), battery("paper"), BATCH[device.type]
    ready = normalize(dataset.images[:n].to(device)).contiguous(memory_format=torch.channels_last)
    outputs = model(ready[:1]).shape[1]
    how = {"limit": n, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "class_map": torch.arange(outputs) % dataset.num_classes}
    evaluate(model, dataset, conditions[:1], **how), bare(model, ready, batch_size, 1)
    times = [(seconds(lambda k=k: evaluate(model, dataset, conditions, seed=k, out=tmp_path / str(k), **how)), seconds(lambda: bare(model, ready, batch_size, len(conditions))))
             for k in range(rounds)]
    ratios = [forward / ours for ours, forward in times]
    benchmark.extra_info.update(
        threads=torch.get_num_threads(), device=device.type, batch_size=batch_size, conditions=len(conditions), images=n, side=side,
        images_per_s=n * len(conditions) / statistics.median(ours for ours, _ in times),
        over_a_bare_forward_pass=statistics.median(ratios), lowest=min(ratios), highest=max(ratios),
    )
    print(json.dumps(benchmark.extra_info, indent=1))
    benchmark.pedantic(bare, (model, ready, batch_size, 1), rounds=1)
