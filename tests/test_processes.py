"""Two processes are one run: torchrun starts them, and order, mixing over the global batch, weights and losses are those of one process."""
import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from test_remixer_training import POLICY, photos, teacher  # noqa: F401 (fixtures)
from test_training import CPU

from patchmix_repro import state, training
from patchmix_repro.config import train_config

TRAIN = """
import json, sys
from patchmix_repro.config import train_config
from patchmix_repro.training import train
for given in json.loads(sys.argv[1]):
    train(train_config(**given), progress=False)
"""
PLAIN = dict(model="deit", batch_size=16, max_steps=3, drop_path=0.0) | CPU
REMIXED = dict(model="deit", remixer=True, batch_size=8, max_steps=2, warmup_epochs=0, lr=1e-4, kappa_lr=100.0, drop_path=0.0, ema_decay=0.0) | CPU
RUNS = {  # in memory, validated on a sample; streamed from a folder
    "memory": PLAIN | dict(test_images=101),
    "stream": PLAIN | dict(data="folder", augmentation=POLICY),
    "memory, masks": REMIXED | dict(test_images=101),
    "stream, dense labels": REMIXED | dict(data="folder", augmentation=POLICY, token_labels=True),
}


@pytest.fixture(scope="module")
def runs(photos, teacher, tmp_path_factory):  # noqa: F811
    "Where each run went, in one process and in two."
    place = tmp_path_factory.mktemp("processes")
    given = {name: how | ({"root": str(photos)} if "stream" in name else {}) | ({"labels": f"dense:{teacher}"} if "dense" in name else {}) for name, how in RUNS.items()}
    two = [how | {"out": str(place / "2" / name)} for name, how in given.items()]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = place / "train.py"
    script.write_text(TRAIN)
    subprocess.run([*command, str(script), json.dumps(two)], check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for name, how in given.items():
        training.train(train_config(**how, out=str(place / "1" / name)), progress=False)
    return place


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one_run(runs, name):
    "The weights agree up to the order of a sum."
    one, two = (load_file(runs / n / name / "model.safetensors") for n in "12")
    assert one.keys() == two.keys() and max(float((one[k] - two[k]).abs().max()) for k in one) < 2e-5
    made, again = (json.loads((state.checkpoints(runs / n / name)[-1] / "state.json").read_text()) for n in "12")
    assert [note["made"]["processes"] for note in (made, again)] == [1, 2]
    first, second = (note["history"][0] for note in (made, again))
    assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-5) and first["val_loss"] == pytest.approx(second["val_loss"], rel=1e-4)
