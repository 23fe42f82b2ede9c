"""A run is what its configuration says: exact after kill -9, stopped by NaN, and never half written."""
import dataclasses
import json
import os
import random
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from children import kill_when, start, train
from PIL import Image
from safetensors.torch import load_file

from patchmix_repro import batches, state, training
from patchmix_repro.config import train_config
from patchmix_repro.core import CheckpointError, DataError, InputError, NonFiniteError, StoreError
from patchmix_repro.data import create_dataset

CPU = dict(device="cpu", workers=0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "A small image folder: three classes, told apart by colour, with train and val."
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for c, name in enumerate(("red", "green", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (64, 72, 3), dtype=np.uint8)
                pixels[..., c] += 130
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def small(root, out, **kw):
    "A streamed run with everything random in it: RandAugment, erasing, mixing, drop path, an average."
    given = dict(model="convnext", data="folder", root=str(root), augmentation="rand-m9-mstd0.5-inc1", erase=0.25, drop_path=0.2,
                 batch_size=8, epochs=4, warmup_epochs=1, checkpoint_every=2, out=str(out)) | CPU
    return train_config(**(given | kw))


def ends(out):
    "What must be equal: the last checkpoint's tensors, the metric rows without timings, the exported model."
    last = state.checkpoints(out)[-1]
    meta = json.loads((last / "state.json").read_text())
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in meta["history"]]
    return load_file(last / "state.safetensors"), (meta["step"], rows), (Path(out) / "model.safetensors").read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="kill -9 needs a POSIX system")
def test_kill_and_resume_is_exact(photos, tmp_path):
    whole, config = small(photos, tmp_path / "whole"), small(photos, tmp_path / "killed")
    training.train(whole, progress=False)
    kill_when(start(train, config), lambda: (Path(config.out) / "checkpoints" / "step-000000004").exists())  # mid-epoch
    reached = [p.name for p in state.checkpoints(config.out)]
    assert reached and reached[-1] < "step-000000020"  # of 20 steps in all
    sign = tmp_path / "saving"
    kill_when(start(train, config, 14, sign), sign.exists)  # during a save
    assert list(Path(config.out).glob("checkpoints/.step-*.tmp")), "the kill was meant to leave a torn save"
    assert state.checkpoints(config.out)[-1].name == "step-000000012"
    again = start(train, config)
    again.join()
    assert again.exitcode == 0
    tensors, meta, model = ends(whole.out)
    tensors_again, meta_again, model_again = ends(config.out)
    assert tensors.keys() == tensors_again.keys() and all(torch.equal(v, tensors_again[k]) for k, v in tensors.items())
    assert meta == meta_again and model == model_again
    assert not list(Path(config.out).glob("checkpoints/.step-*.tmp"))


def test_in_memory_resume_is_exact(tmp_path):
    given = dict(model="convnext", batch_size=16, max_steps=4, test_images=100, checkpoint_every=1, drop_path=0.3) | CPU
    config = train_config(**given, out=str(tmp_path / "a"))
    training.train(config, progress=False)
    whole = ends(config.out)
    (Path(config.out) / "model.safetensors").unlink()
    shutil.rmtree(state.checkpoints(config.out)[-1])
    training.train(config, progress=False)
    again = ends(config.out)
    assert all(torch.equal(v, again[0][k]) for k, v in whole[0].items()) and whole[1:] == again[1:]


def test_a_checkpoint_never_falls_between_the_last_step_and_its_row(photos, tmp_path):
    "checkpoint_every divides the epoch: a kill right after the last step must not lose the metric row."
    config = small(photos, tmp_path / "r", epochs=2, augmentation="crop", checkpoint_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_checkpoint", lambda run, *a: seen.append((run.step, len(run.history))))
        seen = []
        training.train(config, progress=False)
    steps = max(step for step, _ in seen) // 2
    assert [rows for step, rows in seen if step == steps] == [1] and seen[-1] == (2 * steps, 2)


def test_the_global_generator_is_left_alone(photos, tmp_path):
    draw = lambda: (torch.rand(3).tolist(), random.random(), np.random.rand())  # noqa: E731
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    expected = draw()
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    training.train(small(photos, tmp_path / "r", max_steps=1), progress=False)
    assert draw() == expected


def test_workers_do_not_change_a_batch(photos):
    configs = [small(photos, "unused", workers=w) for w in (0, 2)]
    dataset = create_dataset("folder", "train", 56, photos, **batches.options(configs[0], "train"))
    assert not dataset.in_memory
    with torch.random.fork_rng():
        first, second = (list(batches.train_batches(dataset, c, 1, start=2)) for c in configs)
    assert len(first) == len(second) == len(dataset) // 8 - 2 > 0
    assert all(torch.equal(a, b) for x, y in zip(first, second) for a, b in zip(x, y))


def test_an_epoch_sees_each_sample_at_most_once():
    order = batches.epoch_order(101, 10, seed=3, epoch=2)
    seen = torch.cat(order)
    assert len(order) == 10 and len(seen) == len(set(seen.tolist())) == 100
    assert not torch.equal(seen, torch.cat(batches.epoch_order(101, 10, seed=3, epoch=3)))


def test_nan_stops_before_the_step(photos, tmp_path):
    config = small(photos, tmp_path / "r", lr=1e30, warmup_epochs=0, clip_grad=0.0, checkpoint_every=1)
    with pytest.raises(NonFiniteError, match=r"at step \d+, learning rate .*samples \[\d+"):
        training.train(config, progress=False)
    last = load_file(state.checkpoints(config.out)[-1] / "state.safetensors")
    assert len(last) > 10  # what was reached before is kept


def test_a_gradient_of_nan_never_reaches_the_weights(monkeypatch):
    config = train_config(model="mixer", **CPU)
    accelerator = Accelerator(cpu=True)
    with torch.random.fork_rng():
        run = state.build(config, 9, 10, accelerator)
        before = {k: v.clone() for k, v in state.tensors_of(run).items()}
        run.model.head.weight.register_hook(lambda g: g * float("inf"))
        batch = torch.arange(4), torch.rand(4, 3, 56, 56), torch.tensor([0, 1, 2, 3])
        with pytest.raises(NonFiniteError, match="gradient norm"):
            training.train_step(run, batch, batches.mixer_for(config, 9), config, accelerator)
    assert all(torch.equal(v, before[k]) for k, v in state.tensors_of(run).items())


def test_a_weight_of_infinity_stops_the_run_and_is_never_saved(tmp_path):
    config, accelerator = train_config(model="mixer", **CPU), Accelerator(cpu=True)
    with torch.random.fork_rng():
        run = state.build(config, 9, 10, accelerator)
        run.model.norm.bias.data[0] = float("inf")
        with pytest.raises(NonFiniteError, match="not finite after step 0"):
            state.save_checkpoint(run, config, tmp_path)
        run.model.norm.bias.data[0] = 0
        run.model.unused = torch.nn.Parameter(torch.tensor(float("inf")))  # no part in the loss
        batch = torch.arange(4), torch.rand(4, 3, 56, 56), torch.tensor([0, 1, 2, 3])
        with pytest.raises(NonFiniteError, match="weight norm inf at step 0"):
            training.train_step(run, batch, batches.mixer_for(config, 9), config, accelerator)
    assert not state.checkpoints(tmp_path)


def test_another_precision_is_refused(photos, tmp_path):
    config = small(photos, tmp_path / "r", max_steps=1, augmentation="crop")
    training.train(config, progress=False)
    path = state.checkpoints(config.out)[-1] / "state.json"
    path.write_text(path.read_text().replace('"float32"', '"bfloat16"'))
    with pytest.raises(CheckpointError, match="bfloat16.*float32.*Set precision"):
        training.train(config, progress=False)


def test_one_training_at_a_time(photos, tmp_path):
    config = small(photos, tmp_path / "r", max_steps=1, augmentation="crop")
    with training.alone(Path(config.out), Accelerator(cpu=True)), pytest.raises(CheckpointError, match="another process trains"):
        training.train(config, progress=False)


def test_foreign_json_is_named(photos, tmp_path):
    config = small(photos, tmp_path / "r", max_steps=1, augmentation="crop")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text('{"architectures": []}')
    with pytest.raises(CheckpointError, match="not of a run of this library. Choose another `out`"):
        training.train(config, progress=False)
    (tmp_path / "r" / "config.json").unlink()
    run = training.train(config, progress=False)
    card = json.loads((run.folder / "model.json").read_text())
    (run.folder / "model.json").write_text(json.dumps(card | {"classes": ["a", "b", "c", "d"]}))
    with pytest.raises(CheckpointError, match="not those of its model.json"):
        training.load_model(run.folder)
    (run.folder / "model.json").write_text("{}")
    with pytest.raises(CheckpointError, match="lacks classes, config"):
        training.load_model(run.folder)


@pytest.mark.skipif(os.name != "posix", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_keeps_the_last_checkpoint(photos, tmp_path):
    config = small(photos, tmp_path / "r", max_steps=2, augmentation="crop", checkpoint_every=0)
    run = training.train(config, progress=False)
    before = ends(config.out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the operating system refuses larger files
    try:
        with torch.random.fork_rng():
            later = state.build(config, 3, 6, Accelerator(cpu=True))
        later.step = 3
        with pytest.raises(StoreError, match="Free some space"):
            state.save_checkpoint(later, config, run.folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = ends(config.out)
    assert before[1:] == after[1:] and not list(run.folder.glob("checkpoints/.*"))


def test_an_unwritable_out_is_named(photos, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="writable folder"):
        training.train(small(photos, tmp_path / "file" / "run"), progress=False)


def test_a_torn_checkpoint_is_named(photos, tmp_path):
    config = small(photos, tmp_path / "r", max_steps=1, augmentation="crop")
    training.train(config, progress=False)
    (state.checkpoints(config.out)[-1] / "state.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="not whole.*Remove it"):
        training.train(config, progress=False)


def test_another_configuration_is_refused(photos, tmp_path):
    config = small(photos, tmp_path / "r", max_steps=1, augmentation="crop")
    training.train(config, progress=False)
    with pytest.raises(CheckpointError, match="seed: 0 there, 1 here.*another `out`"):
        training.train(dataclasses.replace(config, seed=1), progress=False)
    with pytest.raises(CheckpointError, match="resume is off"):
        training.train(dataclasses.replace(config, resume=False), progress=False)


def test_changed_data_is_refused(photos, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    config = small(copy, tmp_path / "r", max_steps=1, augmentation="crop")
    training.train(config, progress=False)
    (copy / "train" / "red" / "0.png").unlink()
    with pytest.raises(CheckpointError, match="data has changed"):
        training.train(config, progress=False)


def test_a_broken_photograph_needs_the_quarantine(photos, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    (copy / "train" / "red" / "3.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="red/3.png"):
        training.train(small(copy, tmp_path / "a"), progress=False)
    run = training.train(small(copy, tmp_path / "b", max_steps=1, quarantine=("train/red/3.png",)), progress=False)
    assert len(run.history) == 1


def test_a_finished_run_is_returned_untouched(photos, tmp_path):
    config = small(photos, tmp_path / "r", max_steps=1, augmentation="crop")
    first = training.train(config, progress=False)
    stamp = (state.checkpoints(config.out)[-1] / "state.safetensors").stat().st_mtime_ns
    second = training.train(config, progress=False)
    assert first.history.equals(second.history)
    assert stamp == (state.checkpoints(config.out)[-1] / "state.safetensors").stat().st_mtime_ns


def test_the_exported_model_is_the_average(photos, tmp_path):
    run = training.train(small(photos, tmp_path / "r", max_steps=2, augmentation="crop"), progress=False)
    tensors = load_file(state.checkpoints(run.folder)[-1] / "state.safetensors")
    model, card = training.load_model(run.folder)
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[f"ema.{name}"])
    assert card["classes"] == ["blue", "green", "red"] and card["run_id"] == training.run_id(run.config)


def test_a_batch_that_processes_cannot_share():
    accelerator = type("Two", (), {"num_processes": 2, "is_main_process": True})()
    with pytest.raises(InputError, match="5 images over 2 processes"):
        training.enter(train_config(), {}, Path("unused"), accelerator, 5)
    if torch.cuda.device_count() < 2:
        with pytest.raises(InputError, match="processes 2 with . GPUs"):
            training.launch(train_config(processes=2))


@pytest.mark.parametrize(("able", "precision", "warned"), [(False, "bfloat16", True), (True, "bfloat16", False), (False, "float32", False), (False, "auto", False)])
def test_bfloat16_that_a_cpu_imitates_is_announced(monkeypatch, recwarn, able, precision, warned):
    monkeypatch.setattr("patchmix_repro.state.bfloat16_on_cpu", lambda: able)
    state.build(train_config(model="mixer", device="cpu", precision=precision), 9, 10, Accelerator(cpu=True))
    assert any("ten times as long" in str(note.message) for note in recwarn) == warned
