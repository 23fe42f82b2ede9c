"""Images/s of the paper's battery over the bare forward pass: by hand, never timed in a test.

Both take turns, batch by batch, so a busy machine slows both alike. `extra_info` holds the ratios.
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


class Beside(torch.nn.Module):
    "A network that makes a bare pass over ready images of the same number after each of its own, and keeps that time."

    def __init__(self, model, ready):
        super().__init__()
        self.model, self.ready, self.place, self.seconds, self.images = model, ready, 0, 0.0, 0

    def forward(self, x):
        found = self.model(x)
        if self.place + len(x) > len(self.ready):
            self.place = 0
        part = self.ready[self.place:self.place + len(x)]
        self.place, self.images = self.place + len(x), self.images + len(part)
        self.seconds += seconds(lambda: self.model(part).cpu())
        return found


@pytest.mark.parametrize("name", CASES)
def test_battery(benchmark, device, tmp_path, name):
    "Every round evaluates other images, with its parts on disk, as a run does: cut-outs are planned anew each time. A bare pass follows each batch, so that a slower minute slows both sides."
    if device.type == "cpu":
        keep_memory()
    make, side, n, rounds = CASES[name]
    model, dataset, conditions, batch_size = make().to(device), create_dataset("shapes9", "test", side), battery("paper"), BATCH[device.type]
    ready = normalize(dataset.images[:n].to(device)).contiguous(memory_format=torch.channels_last)
    outputs = model(ready[:1]).shape[1]
    how = {"limit": n, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "class_map": torch.arange(outputs) % dataset.num_classes}
    evaluate(model, dataset, conditions[:1], **how)
    ratios, speeds = [], []
    for k in range(rounds):
        beside = Beside(model, ready)
        total = seconds(lambda: evaluate(beside, dataset, conditions, seed=k, out=tmp_path / str(k), **how))  # noqa: B023 called at once
        assert beside.images == n * len(conditions)
        ratios.append(beside.seconds / (total - beside.seconds))
        speeds.append(beside.images / (total - beside.seconds))
    benchmark.extra_info.update(
        threads=torch.get_num_threads(), device=device.type, batch_size=batch_size, conditions=len(conditions), images=n, side=side,
        images_per_s=statistics.median(speeds),
        over_a_bare_forward_pass=statistics.median(ratios), lowest=min(ratios), highest=max(ratios),
    )
    print(json.dumps(benchmark.extra_info, indent=1))
    benchmark.pedantic(evaluate, (model, dataset, conditions[:1]), how, rounds=1)
