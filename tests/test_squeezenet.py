"""The pretrained SqueezeNet: an independent forward pass, refusals, and its published accuracy on real photographs."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from patchmix_repro import squeezenet
from patchmix_repro.core import CheckpointError, project_root
from patchmix_repro.data import IMAGENET_MEAN, IMAGENET_STD, create_dataset, normalize
from patchmix_repro.photographs import in9_map


def shared(*names):
    "A folder with the real files, or a skip that says so."
    for base in (os.environ.get("PATCHMIX_DATA"), project_root() / "data", project_root().parent / "shared" / "data"):
        if base and all((Path(base) / name).is_file() for name in names):
            return Path(base)
    pytest.skip(f"{', '.join(names)} not here: set PATCHMIX_DATA to the folder that holds them")


@pytest.fixture
def weights(tmp_path):
    arrays = {name: 0.05 * np.random.default_rng(i).standard_normal(v.shape).astype(np.float32)
              for i, (name, v) in enumerate(squeezenet.squeezenet().state_dict().items())}
    np.savez(tmp_path / "weights.npz", **arrays)
    return tmp_path / "weights.npz", arrays


def slow_forward(x, weights):
    "The README's description of the network, layer by layer in float64."
    w = {name: torch.from_numpy(array).double() for name, array in weights.items()}
    conv = lambda x, name, **kw: F.relu(F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **kw))
    pool = lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True)

    def fire(x, i):
        s = conv(x, f"features.{i}.squeeze")
        return torch.cat([conv(s, f"features.{i}.expand1x1"), conv(s, f"features.{i}.expand3x3", padding=1)], 1)

    x = pool(conv(x.double(), "features.0", stride=2))
    for i in (3, 4, 5):
        x = fire(x, i)
    x = pool(x)
    for i in (7, 8, 9, 10):
        x = fire(x, i)
    return conv(fire(pool(x), 12), "classifier.1", padding=1).mean((2, 3))


@pytest.mark.parametrize("size", [224, 227])
def test_the_network_is_the_described_one(weights, size):
    path, arrays = weights
    model, x = squeezenet.load_squeezenet(path, sha256=None), torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = model(x)
    assert not model.training and torch.allclose(got.double(), slow_forward(x, arrays), atol=1e-5)
    assert got.std() > 0


def test_padding_by_hand():
    "With bias one in the last layer and all else zero, every one of the 15 x 15 cells says one."
    model = squeezenet.squeezenet()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.classifier[1].bias.fill_(1)
        model.classifier[1].weight[0] = 1  # of inputs that are zero, the padded border too
        assert torch.equal(model(torch.ones(1, 3, 227, 227)), torch.ones(1, 1000))
        model.features[12].expand1x1.bias.fill_(1)  # 256 inputs are one inside, zero in the border
        assert model(torch.ones(1, 3, 227, 227))[0, 0].item() == pytest.approx(1 + 256 * 169 / 225, rel=1e-6)


def test_what_evaluate_reads(weights):
    cfg = squeezenet.load_squeezenet(weights[0], sha256=None).pretrained_cfg
    assert cfg["mean"] == IMAGENET_MEAN and cfg["std"] == IMAGENET_STD and cfg["input_size"] == (3, 227, 227) and cfg["num_classes"] == 1000
    cfg["mean"] = None
    assert squeezenet.squeezenet().pretrained_cfg["mean"] == IMAGENET_MEAN, "no network changes another's"


def test_refusals(tmp_path, weights):
    path, arrays = weights
    with pytest.raises(CheckpointError, match="squeezenet1_0_imagenet.npz.*PATCHMIX_DATA"):
        squeezenet.load_squeezenet(root=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="another file.*8013f9f0e8ca"):
        squeezenet.load_squeezenet(path)
    broken = {
        "lacking": {k: v for k, v in arrays.items() if k != "features.0.bias"}, "foreign": arrays | {"extra": np.zeros(1)},
        "shaped": arrays | {"features.0.bias": np.zeros(95, np.float32)}, "texts": arrays | {"features.0.bias": np.array(["a"] * 96)},
        "objects": arrays | {"features.0.bias": np.array([print] * 96)},
    }
    for name, content in broken.items():
        np.savez(tmp_path / f"{name}.npz", **content)
        with pytest.raises(CheckpointError, match=f"{name}.npz"):
            squeezenet.load_squeezenet(tmp_path / f"{name}.npz", sha256=None)
    for size in (0, 100, path.stat().st_size // 2):
        (tmp_path / "torn.npz").write_bytes(path.read_bytes()[:size])
        with pytest.raises(CheckpointError, match="torn.npz is no readable npz"):
            squeezenet.load_squeezenet(tmp_path / "torn.npz", sha256=None)
    np.savez(tmp_path / "nan.npz", **arrays | {"features.0.bias": np.full(96, np.nan, np.float32)})
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        squeezenet.load_squeezenet(tmp_path / "nan.npz", sha256=None)


def test_the_published_accuracy_comes_out_again():
    "52.7 % top-1 and 78.3 % top-5 at 227 px, and 76.2 % mapped to ImageNet-9, as the data's README says."
    root = shared("squeezenet1_0_imagenet.npz", "imagenet_ccby.zip")
    model, data = squeezenet.load_squeezenet(root=root), create_dataset("imagenet_ccby", "test", 227, root=root)
    with torch.no_grad():
        logits = torch.cat([model(normalize(images)) for images in data.images.split(50)])
    right = logits.topk(5).indices == data.labels[:, None]
    assert int(right[:, 0].sum()) == 158 and int(right.any(1).sum()) == 235
    assert round(100 * 158 / 300, 1) == 52.7 and round(100 * 235 / 300, 1) == 78.3
    nine = torch.tensor(data.manifest.in9_label.to_numpy())
    mapped = in9_map(root)[logits.argmax(1)]
    assert int((mapped == nine)[nine >= 0].sum()) == 99 and int((nine >= 0).sum()) == 130 and round(100 * 99 / 130, 1) == 76.2
