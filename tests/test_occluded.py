"""SMD, ROD, NVD and imagenet_ccby: small copies of the published form, every way they can be broken, and scores by hand."""
import hashlib
import io
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import ImageNetInfo

from patchmix_repro import occluded, photographs, shards
from patchmix_repro.core import DataError, InputError, NonFiniteError, project_root
from patchmix_repro.data import DATASETS, create_dataset
from patchmix_repro.files import manifest_hash

SYNSETS = ImageNetInfo().label_names()


def encoded(height=40, width=60, form="PNG", seed=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return buffer.getvalue()


def write_tar(path, members, kind=tarfile.REGTYPE):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size = (kind, len(content)) if kind == tarfile.REGTYPE else (kind, 0)
            entry.linkname = "/etc/passwd" if kind != tarfile.REGTYPE else ""
            archive.addfile(entry, io.BytesIO(content))


def block(height=40, width=60):
    mask = np.zeros((height, width), bool)
    mask[:, width // 2:] = True
    return mask


def make_smd(root, numbers=range(1, 41), prefix="./", info=True):
    "One picture a shard, with its mask and its row of the CSV."
    rows = []
    for i in numbers:
        stem = f"{prefix}{SYNSETS[10 * i]}/ILSVRC2012_val_{i:08}"
        write_tar(root / "smd" / f"smd_{i}.tar.gz", [(f"{stem}_occluded.png", encoded(seed=i)), (f"{stem}_mask.npy", npy(block()))])
        rows.append((f"ILSVRC2012_val_{i:08}.JPEG", i / 100, "grogu"))
    if info:
        pd.DataFrame(rows[::-1], columns=["file_name", "share", "occluder"]).to_csv(root / "smd" / "occlusion_info.csv", index=False)
    return root


def make_rod(root, labels=None, names=tuple(occluded.ROD_IDS), **columns):
    labels = [[0, 3], [15], [1], [2], [4], [5], [6]] if labels is None else labels
    (root / "rod").mkdir(parents=True, exist_ok=True)
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}}}
    for i, shard in enumerate(labels):
        pictures = [{"bytes": encoded(seed=k, form="JPEG"), "path": f"bluebl-{k}.jpg"} for k in range(len(shard))]
        table = pa.table({"image": columns.get("image", pictures), "label": pa.array(shard, pa.int64())})
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)} if names else {}), root / "rod" / f"{i:04}.parquet")
    return root


def make_nvd(root, positions=("clean", "-0.25", "0.0"), classes=(SYNSETS[954], SYNSETS[429])):
    for k, name in enumerate(classes):
        for x in positions:
            path = root / "nvd" / name / "model_1" / "kitchen" / f"{x}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(seed=k))
    return root


# ---- the contract of a data set ----

@pytest.fixture
def copies(tmp_path):
    make_smd(tmp_path)
    make_rod(tmp_path)
    make_nvd(tmp_path)
    make_ccby(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "n", "k", "labels"), [
    ("smd", 40, 1000, [10 * i for i in range(1, 41)]), ("rod", 8, 16, [0, 3, 15, 1, 2, 4, 5, 6]),
    ("nvd", 6, 1000, [429] * 3 + [954] * 3), ("imagenet_ccby", 3, 1000, [0, 954, 1])])
def test_every_set_keeps_the_contract(copies, name, n, k, labels):
    data = create_dataset(name, "test", 224, root=copies)
    assert (len(data), data.num_classes, len(data.classes), data.name, data.split, data.size) == (n, k, k, name, "test", 224)
    assert data.labels.tolist() == labels and data.labels.dtype == torch.int64
    image, label, index = data[1]
    assert image.shape == (3, 224, 224) and image.dtype == torch.uint8 and (label, index) == (labels[1], 1)
    assert {"file", "class", "label", "sha256"} <= set(data.manifest) and data.manifest.sha256.str.fullmatch("[0-9a-f]{64}").all()
    assert [data.classes[i] for i in labels] == data.manifest["class"].tolist() and data.manifest.index.tolist() == list(range(n))
    assert data.manifest_hash == manifest_hash(data.manifest, data.classes) == create_dataset(name, "test", 56, root=copies).manifest_hash
    if not data.in_memory:
        data.verify()
        for row in data.manifest.itertuples():
            assert hashlib.sha256((data.folder / row.file).read_bytes()).hexdigest() == row.sha256
        transform = lambda picture: torch.tensor(picture.size)
        assert create_dataset(name, "test", 56, root=copies, transform=transform)[0][0].tolist() == [60, 40]


@pytest.mark.parametrize("name", ["smd", "rod", "nvd", "imagenet_ccby"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_no_other_split(copies, name, split):
    with pytest.raises(InputError, match=f"{name} is for evaluation only.*split='test'"):
        create_dataset(name, split, 56, root=copies)


@pytest.mark.parametrize(("name", "words"), [
    ("smd", "smd_|occlusion_info.csv.*download=True.*huggingface.co/datasets/arielnlee/Superimposed"),
    ("rod", "0000.parquet.*4 more|0000.parquet.*download=True.*Realistic-Occlusion-Dataset, revision refs/convert/parquet"),
    ("nvd", "counterfactualsimulation.github.io.*CLASS/SCENE/X.png"), ("imagenet_ccby", "Put imagenet_ccby.zip there.*PATCHMIX_DATA")])
def test_missing_files_say_what_to_get_and_where_to_put_it(tmp_path, name, words):
    with pytest.raises(DataError, match=words) as caught:
        create_dataset(name, "test", 56, root=tmp_path)
    assert str(tmp_path) in str(caught.value) and not list(tmp_path.rglob("*"))


def test_the_openers_are_registered():
    assert [DATASETS[name] for name in ("smd", "rod", "nvd", "imagenet_ccby")] == [
        occluded.open_smd, occluded.open_rod, occluded.open_nvd, photographs.load_imagenet_ccby]


# ---- shards ----

@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_torn_shard_is_named_and_leaves_nothing(tmp_path, keep):
    shard = make_smd(tmp_path) / "smd" / "smd_3.tar.gz"
    shard.write_bytes(shard.read_bytes()[:int(keep * shard.stat().st_size)])
    with pytest.raises(DataError, match="smd_3.tar.gz: .*Fetch it again"):
        create_dataset("smd", "test", 56, root=tmp_path)
    assert sorted(p.name for p in (tmp_path / "smd" / "unpacked").iterdir()) == ["smd_1", "smd_2"]
    make_smd(tmp_path)
    assert len(create_dataset("smd", "test", 56, root=tmp_path)) == 40


def test_a_changed_byte_inside_a_shard_is_seen(tmp_path):
    shard = make_smd(tmp_path) / "smd" / "smd_5.tar.gz"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(DataError, match="smd_5.tar.gz"):
        create_dataset("smd", "test", 56, root=tmp_path)


@pytest.mark.parametrize("name", [
    "../evil_occluded.png", "/n01440764/evil_occluded.png", "n01440764/../../evil_occluded.png", "n01440764/..\\evil_occluded.png",
    "n01440764/evil.sh", "tench/evil_occluded.png", "evil_occluded.png"])
def test_a_member_that_escapes_or_is_foreign_is_refused(tmp_path, name):
    make_smd(tmp_path, [1])
    write_tar(tmp_path / "smd" / "smd_1.tar.gz", [("n01440764/a_occluded.png", encoded()), (name, encoded())])
    with pytest.raises(DataError, match="smd_1.tar.gz: member .*(outside|is no)"):
        create_dataset("smd", "test", 56, root=tmp_path, shards=(1,), info=False)
    assert not [p for p in tmp_path.rglob("*") if "evil" in p.name] and not (tmp_path / "smd" / "unpacked" / "smd_1").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    write_tar(tmp_path / "smd" / "smd_1.tar.gz", [("n01440764/a_occluded.png", b"")], kind)
    with pytest.raises(DataError, match="link"):
        create_dataset("smd", "test", 56, root=tmp_path, shards=(1,), info=False)


def test_hidden_files_of_a_mac_are_left_aside_and_twins_are_not(tmp_path):
    one = (f"{SYNSETS[7]}/a_occluded.png", encoded())
    write_tar(tmp_path / "smd" / "smd_1.tar.gz", [(f"{SYNSETS[7]}/._a_occluded.png", b"mac"), one])
    assert len(create_dataset("smd", "test", 56, root=tmp_path, shards=(1,), info=False)) == 1
    write_tar(tmp_path / "smd" / "smd_2.tar.gz", [one, one])
    with pytest.raises(DataError, match="holds .* twice"):
        create_dataset("smd", "test", 56, root=tmp_path, shards=(2,), info=False)


def test_unpacked_once_and_read_without_the_shards(tmp_path):
    make_smd(tmp_path)
    first = create_dataset("smd", "test", 56, root=tmp_path)
    for shard in (tmp_path / "smd").glob("*.tar.gz"):
        shard.unlink()
    again = create_dataset("smd", "test", 56, root=tmp_path)
    assert again.manifest.equals(first.manifest) and torch.equal(again[7][0], first[7][0])
    changed = again.folder / again.manifest.file[7]
    changed.write_bytes(encoded(seed=99))
    with pytest.raises(DataError, match="changed"):
        again[7]
    with pytest.raises(DataError, match="1 bad file"):
        again.verify()


@pytest.mark.parametrize("numbers", [(), (0,), (1, 1), (41,)])
def test_impossible_shards(tmp_path, numbers):
    with pytest.raises(InputError, match="1 to 40"):
        create_dataset("smd", "test", 56, root=make_smd(tmp_path, [1]), shards=numbers)


# ---- SMD ----

def test_the_csv_is_joined_by_name_in_any_order(tmp_path):
    data = create_dataset("smd", "test", 56, root=make_smd(tmp_path))
    assert data.manifest.info_share.tolist() == [i / 100 for i in range(1, 41)] and set(data.manifest.info_occluder) == {"grogu"}


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.iloc[1:], "none of its columns"), (lambda t: t.drop(columns="file_name"), "none of its columns.*info=False"),
    (lambda t: pd.concat([t, t.head(1)]), "several rows")])
def test_a_csv_that_does_not_fit(tmp_path, change, words):
    path = make_smd(tmp_path) / "smd" / "occlusion_info.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)
    with pytest.raises(DataError, match=words):
        create_dataset("smd", "test", 56, root=tmp_path)
    assert len(create_dataset("smd", "test", 56, root=tmp_path, info=False)) == 40


def test_an_empty_column_of_the_csv_is_no_key(tmp_path):
    path = make_smd(tmp_path) / "smd" / "occlusion_info.csv"
    pd.read_csv(path).assign(note=None).to_csv(path, index=False)
    assert create_dataset("smd", "test", 56, root=tmp_path).manifest.info_note.isna().all()


def test_a_missing_csv_is_seen_before_anything_is_unpacked(tmp_path):
    make_smd(tmp_path, info=False)
    with pytest.raises(DataError, match="occlusion_info.csv missing"):
        create_dataset("smd", "test", 56, root=tmp_path)
    assert not (tmp_path / "smd" / "unpacked").exists()


def test_a_wrong_synset_and_a_lonely_mask(tmp_path):
    write_tar(tmp_path / "smd" / "smd_1.tar.gz", [("n00000007/a_occluded.png", encoded()), (f"{SYNSETS[3]}/b_mask.npy", npy(block()))])
    with pytest.raises(DataError, match="2 bad.*n00000007 is no synset.*mask without its one picture"):
        create_dataset("smd", "test", 56, root=tmp_path, shards=(1,), info=False)


def test_masks_follow_the_crop_and_pickle_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))
    name = f"{SYNSETS[3]}/"
    masks = {"good": npy(block()), "third": npy(block()[..., None].astype(np.uint8) * 7), "wrong": npy(block(3, 4)), "evil": npy(np.array([Bomb()], dtype=object)), "torn": npy(block())[:60]}
    members = [(f"{name}{k}_occluded.png", encoded()) for k in (*masks, "none")] + [(f"{name}{k}_mask.npy", v) for k, v in masks.items()]
    write_tar(tmp_path / "smd" / "smd_1.tar.gz", members)
    data = create_dataset("smd", "test", 20, root=tmp_path, shards=(1,), info=False, crop=1.0)
    want = torch.zeros(1, 20, 20, dtype=torch.uint8)
    want[..., 10:] = 1
    assert torch.equal(occluded.smd_mask(data, 0), want) and torch.equal(occluded.smd_mask(data, 1), want)
    for index, error, words in ((2, DataError, "shape"), (3, DataError, "no readable mask"), (4, DataError, "no readable mask"), (5, InputError, "no mask")):
        with pytest.raises(error, match=words):
            occluded.smd_mask(data, index)
    assert not (tmp_path / "exploded").exists()


# ---- ROD ----

def test_the_shards_own_class_names_decide(tmp_path):
    names = sorted((name.replace(" ", "_") for name in occluded.ROD_IDS), reverse=True)
    data = create_dataset("rod", "test", 56, root=make_rod(tmp_path, names=names))
    assert data.labels.tolist() == [15 - k for k in (0, 3, 15, 1, 2, 4, 5, 6)] and data.manifest.source[1] == "bluebl-1.jpg"
    plain = create_dataset("rod", "test", 56, root=make_rod(tmp_path / "plain", names=()))
    assert plain.labels.tolist() == [0, 3, 15, 1, 2, 4, 5, 6]


@pytest.mark.parametrize(("labels", "words"), [([[0, 16]], "row 1 has label 16"), ([[-1]], "row 0 has label -1"), ([[None]], "row 0 has label None")])
def test_a_wrong_label_names_its_row(tmp_path, labels, words):
    with pytest.raises(DataError, match=f"0000.parquet: {words}"):
        create_dataset("rod", "test", 56, root=make_rod(tmp_path, labels), shards=(0,))


def test_broken_parquet(tmp_path):
    shard = make_rod(tmp_path) / "rod" / "0002.parquet"
    whole = shard.read_bytes()
    for content in (whole[:-30], whole[:40], b""):
        shard.write_bytes(content)
        with pytest.raises(DataError, match="0002.parquet: .*Fetch it again"):
            create_dataset("rod", "test", 56, root=tmp_path)
    with pytest.raises(DataError, match="teapot"):
        create_dataset("rod", "test", 56, root=make_rod(tmp_path / "names", names=("teapot",)), shards=(0,))
    with pytest.raises(DataError, match="no picture"):
        create_dataset("rod", "test", 56, root=make_rod(tmp_path / "empty", [[3]], image=[{"bytes": None, "path": "a"}]), shards=(0,))
    pq.write_table(pa.table({"picture": ["a"]}), shard)
    with pytest.raises(DataError, match="needed are image and label"):
        create_dataset("rod", "test", 56, root=tmp_path)


def test_rod_classes_are_imagenet_classes():
    names = photographs.imagenet_classes(full=True)
    for name, ids in occluded.ROD_IDS.items():
        assert name in names[ids[0]].split(", ")
    assert [names[i].split(",")[0] for i in (504, 681)] == ["coffee mug", "notebook"]
    assert occluded.rod_map()[[954, 504, 968, 0]].tolist() == [0, 3, 3, -1]


def slow_scores(logits, labels):
    "The three rules one image at a time, in float64."
    right, groups = {"strict": 0, "synonyms": 0, "restricted": 0}, list(occluded.ROD_IDS.values())
    for row, label in zip(logits.double().numpy(), labels.tolist()):
        top = int(np.argmax(row))
        best = [max(row[i] for i in group) for group in groups]
        right["strict"] += top == groups[label][0]
        right["synonyms"] += top in groups[label]
        right["restricted"] += int(np.argmax(best)) == label
    return right


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(0, 999))
def test_score_rod_is_the_slow_form_and_its_rules_are_nested(n, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(16, (n,), generator=generator)
    logits = torch.randn(n, 1000, generator=generator)
    ids = [i for group in occluded.ROD_IDS.values() for i in group]
    logits[:, ids] += 3 * torch.rand(n, 1, generator=generator)
    scores, slow = occluded.score_rod(logits, labels), slow_scores(logits, labels)
    assert {rule: round(scores.estimate[rule] * n) for rule in scores.index} == slow
    assert slow["strict"] <= slow["synonyms"] <= slow["restricted"] and (scores.n == n).all()
    assert ((scores.low <= scores.estimate) & (scores.estimate <= scores.high)).all()


def test_score_rod_by_hand_and_bad_input():
    logits = torch.zeros(4, 1000)
    logits[0, 968] = logits[1, 504] = logits[2, 967] = logits[3, 954] = 2.0
    logits[2, 504] = 1.0
    scores = occluded.score_rod(logits, torch.full((4,), 3))
    assert scores.estimate.tolist() == [0.25, 0.5, 0.75] and list(scores) == ["estimate", "low", "high", "n"]
    z, p, n = 1.959963984540054, 0.25, 4
    centre, half = (p + z * z / 2 / n) / (1 + z * z / n), z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5 / (1 + z * z / n)
    assert scores.loc["strict", ["low", "high"]].tolist() == pytest.approx([centre - half, centre + half], abs=1e-9)
    for bad, labels in ((logits[:, :16], torch.zeros(4, dtype=torch.int64)), (logits, torch.full((4,), 16)), (logits, torch.zeros(3, dtype=torch.int64))):
        with pytest.raises(InputError, match="0 to 15"):
            occluded.score_rod(bad, labels)
    with pytest.raises(NonFiniteError, match="NaN"):
        occluded.score_rod(logits * float("nan"), torch.zeros(4, dtype=torch.int64))


# ---- NVD ----

def test_nvd_reads_scene_and_position(tmp_path):
    manifest = create_dataset("nvd", "test", 56, root=make_nvd(tmp_path)).manifest
    assert manifest.scene.nunique() == 2 and manifest.x.tolist()[:2] == [-0.25, 0.0] and np.isnan(manifest.x[2])


def test_nvd_with_other_names(tmp_path):
    for file in ("banana_m1_hdri3_x-0.05.jpg", "ball_m2_hdri1_x0.20.jpg"):
        (tmp_path / "nvd").mkdir(exist_ok=True)
        (tmp_path / "nvd" / file).write_bytes(encoded(form="JPEG"))
    pattern = r"(?P<class>[a-z]+)_(?P<scene>\w+)_x(?P<x>-?[\d.]+)\.jpg"
    data = create_dataset("nvd", "test", 56, root=tmp_path, pattern=pattern, ids={"banana": 954, "ball": 429})
    assert data.labels.tolist() == [429, 954] and data.manifest.x.tolist() == [0.2, -0.05] and data.manifest.scene[0] == "ball/m2_hdri1"
    with pytest.raises(DataError, match="class 'ball' has no ImageNet id"):
        create_dataset("nvd", "test", 56, root=tmp_path, pattern=pattern, ids={"banana": 954})
    with pytest.raises(DataError, match="pattern= does not read it"):
        create_dataset("nvd", "test", 56, root=tmp_path)
    with pytest.raises(InputError, match="class, scene and x"):
        create_dataset("nvd", "test", 56, root=tmp_path, pattern=r"(?P<class>.*)")
    with pytest.raises(InputError, match="regular expression"):
        create_dataset("nvd", "test", 56, root=tmp_path, pattern="(")
    with pytest.raises(DataError, match="'x0.20' is no position"):
        create_dataset("nvd", "test", 56, root=tmp_path, pattern=r"(?P<class>[a-z]+)_(?P<scene>\w+)_(?P<x>.+)\.jpg", ids={"banana": 954, "ball": 429})


def test_nvd_manifest_remembers(tmp_path):
    make_nvd(tmp_path)
    first = create_dataset("nvd", "test", 56, root=tmp_path, manifest=tmp_path / "nvd.csv")
    (tmp_path / "nvd" / first.manifest.file[0]).write_bytes(encoded(seed=5))
    with pytest.raises(DataError, match="changed"):
        create_dataset("nvd", "test", 56, root=tmp_path, manifest=tmp_path / "nvd.csv")[0]


def slow_pccp(rows):
    right = {row.scene for row in rows.itertuples() if np.isnan(row.x) and row.correct}
    found = {}
    for row in rows.itertuples():
        if not np.isnan(row.x) and row.scene in right:
            found.setdefault(row.x, []).append(bool(row.correct))
    return {x: (sum(kept) / len(kept), len(kept)) for x, kept in sorted(found.items())}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 9999))
def test_pccp_is_the_slow_form(scenes, seed):
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame([(f"s{s}", x, bool(rng.integers(2))) for s in range(scenes) for x in (np.nan, *np.linspace(-0.25, 0.25, 11).round(2))], columns=["scene", "x", "correct"])
    rows.loc[0, "correct"] = True
    curve = occluded.pccp(rows.sample(frac=1, random_state=seed))
    slow = slow_pccp(rows)
    assert curve.x.tolist() == list(slow) and curve.n.tolist() == [n for _, n in slow.values()]
    assert curve.estimate.tolist() == pytest.approx([share for share, _ in slow.values()], abs=1e-12)
    everything = occluded.pccp(rows.assign(correct=True))
    assert (everything.estimate == 1).all() and (everything.n == scenes).all()


def test_pccp_by_hand_and_bad_input():
    rows = pd.DataFrame({"scene": ["a", "a", "b", "b", "c", "c"], "x": [np.nan, 0.1] * 3, "correct": [1, 1, 1, 0, 0, 1]})
    assert occluded.pccp(rows)[["x", "estimate", "n"]].values.tolist() == [[0.1, 0.5, 2]]
    swapped = rows.assign(x=[0.2, 0.1] * 3)
    assert occluded.pccp(swapped, initial=0.2).estimate.tolist() == [0.5]
    files = [f"{i}.png" for i in range(6)]
    again = occluded.pccp(pd.DataFrame({"file": files[::-1], "correct": rows.correct[::-1]}), rows.drop(columns="correct").assign(file=files))
    assert again.equals(occluded.pccp(rows))
    for bad, words in ((swapped, "initial="), (pd.concat([rows, rows]), "one a scene"), (rows[1:], "one a scene"), (rows.assign(correct=0), "none of 3")):
        with pytest.raises(InputError, match=words):
            occluded.pccp(bad)
    with pytest.raises(InputError, match="each of the manifest"):
        occluded.pccp(rows.assign(file=files)[:4], rows.assign(file=files))


# ---- the Hub ----

class Hub:
    "A stand-in for huggingface_hub that serves a local folder."
    def __init__(self, folder, wrong=(), error=None):
        self.folder, self.wrong, self.error, self.asked = folder, wrong, error, []

    def HfApi(self):
        return self

    def dataset_info(self, repository, revision, files_metadata):
        if self.error:
            raise self.error
        self.revision = revision
        return SimpleNamespace(sha="c0ffee", siblings=[self.entry(p) for p in self.folder.rglob("*") if p.is_file()])

    def entry(self, path):
        content, name = path.read_bytes(), path.relative_to(self.folder).as_posix()
        sha256 = "00" if name in self.wrong else hashlib.sha256(content).hexdigest()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return SimpleNamespace(rfilename=name, blob_id=git, lfs=None if name.endswith(".csv") else SimpleNamespace(sha256=sha256))

    def hf_hub_download(self, repository, file, repo_type, revision, local_dir):
        assert repo_type == "dataset" and revision == "c0ffee"
        self.asked.append(file)
        target = Path(local_dir) / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((self.folder / file).read_bytes())
        return str(target)


def test_download_smd_from_the_hub(tmp_path, monkeypatch):
    hub = Hub(make_smd(tmp_path / "hub") / "smd")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    data = create_dataset("smd", "test", 56, root=tmp_path / "data", shards=(2, 40), download=True, info=False)
    assert data.labels.tolist() == [20, 400] and hub.asked == ["smd_2.tar.gz", "smd_40.tar.gz"] and hub.revision == "main"
    create_dataset("smd", "test", 56, root=tmp_path / "data", shards=(2, 40), download=True, info=False)
    assert len(hub.asked) == 2, "nothing is fetched twice"
    whole = create_dataset("smd", "test", 56, root=tmp_path / "data", download=True)
    assert len(whole) == 40 and "occlusion_info.csv" in hub.asked and len(hub.asked) == 41


def test_download_rod_from_the_hub_and_a_wrong_hash(tmp_path, monkeypatch):
    source = make_rod(tmp_path / "hub") / "rod"
    (tmp_path / "repository" / "default").mkdir(parents=True)
    source.rename(tmp_path / "repository" / "default" / "ROD")
    hub = Hub(tmp_path / "repository", wrong=("default/ROD/0003.parquet",))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(DataError, match="0003.parquet is not the file that the Hub lists"):
        create_dataset("rod", "test", 56, root=tmp_path / "data", download=True)
    kept = sorted(p.name for p in (tmp_path / "data" / "rod").rglob("*.parquet"))
    assert kept == ["0000.parquet", "0001.parquet", "0002.parquet"]
    hub.wrong = ()
    assert len(create_dataset("rod", "test", 56, root=tmp_path / "data", download=True)) == 8 and hub.revision == "refs/convert/parquet"


def test_without_a_network_or_the_client(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path, error=ConnectionError("no route to host\nand more")))
    with pytest.raises(DataError, match=r"rod: the download failed \(ConnectionError: no route to host\).*put the files into"):
        create_dataset("rod", "test", 56, root=tmp_path, download=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"pip install 'patchmix_repro\[data\]'"):
        create_dataset("smd", "test", 56, root=tmp_path, download=True)
    assert "huggingface_hub" not in Path(shards.__file__).read_text().split("def fetch_hub")[0]


def test_the_real_client_has_what_is_used():
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed; the extra `data` brings it")
    entry = hub.hf_api.RepoSibling(rfilename="a", blob_id="ce013625030ba8dba906f756967f9e9ca394464a", lfs=None)
    assert callable(hub.hf_hub_download) and callable(hub.HfApi.dataset_info) and entry.lfs is None and entry.blob_id


# ---- imagenet_ccby ----

def make_ccby(root, labels=(0, 954, 1), packed=False, **changes):
    home = root / "imagenet_ccby"
    (home / "images").mkdir(parents=True, exist_ok=True)
    for i in range(len(labels)):
        (home / "images" / f"{i}.jpg").write_bytes(encoded(256, 256, "JPEG", seed=i))
    rows = [(f"{i}.jpg", k, "name", 8 if k in (0, 1) else -1, "fish" if k in (0, 1) else "", "CC BY", "someone, else", "page") for i, k in enumerate(labels)]
    columns = ["file", "imagenet_idx", "imagenet_name", "in9_idx", "in9_name", "license", "author", "landing_url"]
    pd.DataFrame(rows, columns=columns).rename(columns=changes).to_csv(home / "labels.csv", index=False)
    (home / "in_to_in9.json").write_text(json.dumps({str(i): 8 if i < 7 else -1 for i in range(1000)}))
    if packed:
        with zipfile.ZipFile(root / "imagenet_ccby.zip", "w") as archive:
            for path in sorted(home.rglob("*")):
                archive.write(path, path.relative_to(root).as_posix())
                path.is_file() and path.unlink()
        (home / "images").rmdir()
        home.rmdir()
    return root


def test_centre_cuts_whole_pixels(tmp_path):
    picture = Image.open(io.BytesIO(encoded(256, 256)))
    whole = np.asarray(picture)
    assert (np.asarray(photographs.centre(picture, 227)) == whole[14:241, 14:241]).all()
    assert (np.asarray(photographs.centre(picture, 224)) == whole[16:240, 16:240]).all()
    small = picture.crop((16, 16, 240, 240)).resize((112, 112), Image.Resampling.BICUBIC)
    assert (np.asarray(photographs.centre(picture, 112)) == np.asarray(small)).all()
    with pytest.raises(InputError, match="at most 256"):
        create_dataset("imagenet_ccby", "test", 288, root=make_ccby(tmp_path))


def test_ccby_from_folder_and_zip_is_the_same(tmp_path):
    folder = create_dataset("imagenet_ccby", "test", 227, root=make_ccby(tmp_path / "a"))
    archive = create_dataset("imagenet_ccby", "test", 227, root=make_ccby(tmp_path / "b", packed=True))
    assert torch.equal(folder.images, archive.images) and folder.manifest_hash == archive.manifest_hash
    assert set(folder.manifest.author) == {"someone, else"} and set(folder.manifest.licence) == {"CC BY"}
    nine = create_dataset("imagenet_ccby", "test", 224, root=tmp_path / "b", labels="in9")
    assert nine.labels.tolist() == [8, 8] and nine.classes == photographs.IN9_CLASSES and nine.manifest["class"].tolist() == ["fish"] * 2
    assert photographs.in9_map(tmp_path / "b").tolist() == [8] * 7 + [-1] * 993


def test_broken_ccby(tmp_path):
    with pytest.raises(DataError, match="label 1000 is not"):
        create_dataset("imagenet_ccby", "test", 224, root=make_ccby(tmp_path / "a", (3, 1000)))
    with pytest.raises(DataError, match="lacks the columns.*author"):
        create_dataset("imagenet_ccby", "test", 224, root=make_ccby(tmp_path / "b", author="writer"))
    home = make_ccby(tmp_path / "c") / "imagenet_ccby"
    (home / "images" / "0.jpg").write_bytes(b"\xff\xd8\xff")
    (home / "images" / "2.jpg").unlink()
    with pytest.raises(DataError, match="images/2.jpg: missing"):
        create_dataset("imagenet_ccby", "test", 224, root=tmp_path / "c")
    make_ccby(tmp_path / "c")
    (home / "images" / "0.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match="images/0.jpg: no readable picture"):
        create_dataset("imagenet_ccby", "test", 224, root=tmp_path / "c")
    (home / "labels.csv").unlink()
    with pytest.raises(DataError, match="labels.csv"):
        create_dataset("imagenet_ccby", "test", 224, root=tmp_path / "c")
    with pytest.raises(InputError, match="did you mean 'in9'"):
        create_dataset("imagenet_ccby", "test", 224, root=tmp_path, labels="in-9")


# ---- class maps ----

@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=40, unique=True))
def test_a_class_map_inverts_the_list_of_synsets(ids):
    table = photographs.class_map([SYNSETS[i] for i in ids])
    assert table.shape == (1000,) and table.dtype == torch.int64 and table[ids].tolist() == list(range(len(ids)))
    assert (table >= 0).sum() == len(ids) and torch.equal(table, photographs.class_map({str(i): k for k, i in enumerate(ids)}))


def test_class_map_from_a_file_and_bad_tables(tmp_path):
    (tmp_path / "table.json").write_text('{"0": 8, "3": -1}')
    assert photographs.class_map(tmp_path / "table.json")[:4].tolist() == [8, -1, -1, -1]
    for bad in ({"1000": 0}, {"-1": 0}, {"0": -2}, ["banana"]):
        with pytest.raises(InputError):
            photographs.class_map(bad)
    with pytest.raises(InputError, match="twice"):
        photographs.class_map([SYNSETS[0], SYNSETS[0]])
    with pytest.raises(DataError, match="table.txt"):
        photographs.class_map(tmp_path / "table.txt")


def test_the_synsets_are_torchvisions():
    from torchvision.models import SqueezeNet1_0_Weights
    assert list(shards.synset_ids()) == sorted(SYNSETS) == SYNSETS
    theirs, ours = SqueezeNet1_0_Weights.DEFAULT.meta["categories"], photographs.imagenet_classes()
    assert sum(a.split(",")[0] == b for a, b in zip(theirs, ours)) >= 990


# ---- the real photographs ----

def shared():
    "A folder with the real archive, or a skip that says so."
    for base in (os.environ.get("PATCHMIX_DATA"), project_root() / "data", project_root().parent / "shared" / "data"):
        if base and (Path(base) / "imagenet_ccby.zip").is_file():
            return Path(base)
    pytest.skip("imagenet_ccby is not here: set PATCHMIX_DATA to the folder that holds imagenet_ccby.zip")


def test_the_real_photographs():
    data = create_dataset("imagenet_ccby", "test", 224, root=shared())
    assert len(data) == 300 and data.manifest.author.str.len().gt(0).all() and set(data.manifest.licence) == {"https://creativecommons.org/licenses/by/2.0/"}
    assert [photographs.imagenet_classes(full=True)[k].split(",")[0] for k in data.labels] == data.manifest.name.tolist()
    nine = create_dataset("imagenet_ccby", "test", 224, root=shared(), labels="in9")
    assert nine.labels.bincount().tolist() == [6, 20, 49, 6, 4, 29, 10, 2, 4] and len(nine) == 130
    inside = data.manifest.in9_label >= 0
    assert photographs.in9_map(shared())[data.labels[torch.tensor(inside.to_numpy())]].tolist() == nine.labels.tolist()
