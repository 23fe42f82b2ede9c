"""Data sets: hand-computed cases, slow independent forms, properties, and bad input that names its remedy."""
import hashlib
import json
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from patchmix_repro import caltech, data, files, objects, places, shapes
from patchmix_repro.core import DataError, InputError, project_root, unpack_zip

SIZE = 28


def shared(name):
    "A real archive under PATCHMIX_DATA or ../shared/data, or a skip that says so."
    for base in (os.environ.get("PATCHMIX_DATA"), project_root() / "data", project_root().parent / "shared" / "data"):
        if base and ((Path(base) / f"{name}.zip").is_file() or (Path(base) / name).is_dir()):
            return Path(base)
    pytest.skip(f"{name} is not here: set PATCHMIX_DATA to the folder that holds {name}.zip")


def unpacked(name, target):
    base = shared(name)
    if (base / name).is_dir():
        return base / name
    with zipfile.ZipFile(base / f"{name}.zip") as archive:
        archive.extractall(target)
    return target / name


@pytest.fixture
def pets(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for k, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(12):
                Image.fromarray(rng.integers(60 * k, 200, (40, 60, 3), dtype=np.uint8)).save(tmp_path / part / name / f"{i:03}.jpg")
    return tmp_path


# ---- shapes9: drawing ----

def test_shake_and_sine_by_hand():
    stream = hashlib.shake_256(b"a/1").digest(4)
    assert places.dice("a", 1, count=2).tolist() == [stream[0] + 256 * stream[1], stream[2] + 256 * stream[3]]
    assert places.sine(np.array([0, 64, 128, 192, -64, 320])).tolist() == [0, 4096, 0, -4096, -4096, 4096]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-1000, 1000), st.integers(-1000, 1000)), min_size=3, max_size=6), st.integers(0, 99))
def test_polygon_is_the_slow_crossing_count(points, seed):
    u, v = np.random.default_rng(seed).integers(-1000, 1000, (2, 5, 5)).astype(np.int64)
    got = objects.polygon(u, v, *[n for point in points for n in point])
    for a, b, inside in zip(u.flat, v.flat, got.flat):
        crossings = 0
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
            if (y0 <= b) != (y1 <= b):
                # exact: float64 products of integers below 2**53
                crossings += (float(a) - x0) * abs(y1 - y0) < (float(b) - y0) * (x1 - x0) * (1 if y1 > y0 else -1)
        assert inside == bool(crossings % 2)


def test_ellipse_and_resize_by_hand():
    v, u = np.mgrid[-2:3, -2:3].astype(np.int64)
    assert objects.ellipse(u, v, 0, 0, 2, 1).sum() == 5 + 2
    block = np.zeros((1, 112, 112), np.uint8)
    block[0, :2, :2] = [[1, 2], [3, 5]]
    assert shapes.resize(block, 56)[0, 0, 0] == (1 + 2 + 3 + 5 + 2) // 4
    assert shapes.resize(block, 224)[0, :4, :4].tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 5, 5]] * 2


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1007), st.sampled_from(shapes.BACKGROUNDS), st.sampled_from(tuple(objects.TEXTURES)))
def test_a_variant_changes_only_what_was_asked(index, background, texture):
    picture, mask = shapes.draw(index, "val")
    other, same = shapes.draw(index, "val", background=background)
    assert (mask == same).all() and 0.02 < mask.mean() < 0.6
    core = np.min([np.roll(mask[0], (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)], axis=0) == 1  # edges blend
    assert (picture == other)[:, core].mean() > 0.99
    changed, same = shapes.draw(index, "val", texture=texture)
    assert (mask == same).all() and (picture == changed)[:, mask[0] == 0].mean() > 0.95


def test_val_comes_out_with_the_packaged_hash():
    drawn = shapes.draw_split("val", 56)
    assert hashlib.sha256(drawn.tobytes()).hexdigest() == shapes.fingerprints()["val-56"]
    drawn[0, 0, 0, 0] ^= 1
    with pytest.raises(DataError, match="other bytes"):
        shapes.check(drawn, "val")


def test_splits_share_no_drawing_and_classes_are_balanced():
    sets = {split: shapes.plans(split) for split in files.SPLITS}
    assert len(sets["test"]) >= 5000 and all(table.label.value_counts().nunique() == 1 for table in sets.values())
    looks = pd.concat(sets.values())[["class", "background", "texture", "x", "y", "radius", "angle", "mirror"]]
    assert looks.duplicated().mean() < 0.01
    assert not {places.dice("look", "train", i).tobytes() for i in range(500)} & {places.dice("look", "test", i).tobytes() for i in range(500)}


def test_a_torn_cache_is_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", {"val": 4})
    small = shapes.draw_split("val", 56)
    monkeypatch.setattr(shapes, "fingerprints", lambda: {"val-56": hashlib.sha256(small.tobytes()).hexdigest()})
    assert (shapes.load_drawings("val", 56, tmp_path) == small).all()
    path, = tmp_path.glob("*.npy")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="drawn again"):
        assert (shapes.load_drawings("val", 56, tmp_path) == small).all()
    assert (np.load(path) == small).all()
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not kept"):
        shapes.load_drawings("val", 56, tmp_path / "file")


@pytest.mark.parametrize("call, word", [
    (lambda: shapes.draw(5040, "test"), "0 to 5039"), (lambda: shapes.draw(0, "valid"), "did you mean 'val'"),
    (lambda: shapes.draw(0, "val", background="seaa"), "did you mean 'sea'"), (lambda: shapes.draw(0, "val", texture="dot"), "did you mean 'dots'"),
    (lambda: data.create_dataset("shapes9", "val", 50), "56, 112"), (lambda: data.create_dataset("shapes9", "val", 0), "whole number"),
])
def test_wrong_drawings_are_refused(call, word):
    with pytest.raises(InputError, match=word):
        call()


# ---- files and folders ----

@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=30))
def test_val_share_is_a_hash_of_the_name(name):
    text = f'[0, "val", {json.dumps(name)}]'
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    assert files.is_val(name) == (number / 2**63 < files.VAL_SHARE)


def test_folder_splits_ignore_the_order_and_other_files(pets):
    before = set(data.create_dataset("folder", "val", SIZE, pets).manifest.file)
    Image.new("RGB", (40, 40)).save(pets / "train" / "cat" / "zzz.jpg")
    after = set(data.create_dataset("folder", "val", SIZE, pets).manifest.file)
    assert after - {"train/cat/zzz.jpg"} == before
    train = set(data.create_dataset("folder", "train", SIZE, pets).manifest.file)
    assert not train & after and len(train | after) == 25
    assert set(data.create_dataset("folder", "test", SIZE, pets).manifest.file.str[:4]) == {"val/"}


@pytest.mark.parametrize("crop", [None, 0.5])
@pytest.mark.parametrize("split", files.SPLITS)
def test_memory_and_stream_agree(pets, split, crop):
    kept, stream = (data.create_dataset("folder", split, SIZE, pets, memory=memory, crop=crop) for memory in (True, False))
    assert kept.in_memory and not stream.in_memory and kept.manifest_hash == stream.manifest_hash
    loader = torch.utils.data.DataLoader(stream, batch_size=5, num_workers=0)
    images, labels, index = (torch.cat(part) for part in zip(*loader))
    assert torch.equal(images, kept.images) and torch.equal(labels, kept.labels) and index.tolist() == list(range(len(kept)))


@pytest.mark.parametrize("memory", [True, False])
def test_only_evaluation_loses_the_margin(tmp_path, memory):
    "A red frame of 1/16 of the side is what 224/256 cuts away."
    for part in files.SPLITS:
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            picture = Image.new("RGB", (256, 256), (255, 0, 0))
            picture.paste((0, 255, 0), (16, 16, 240, 240))
            picture.save(tmp_path / part / name / "0.png")
    for split, crop, framed in (("train", None, True), ("val", None, False), ("test", None, False), ("test", 1.0, True), ("train", 224 / 256, False)):
        kept = data.create_dataset("folder", split, 112, tmp_path, memory=memory, crop=crop)
        assert [bool((kept[i][0][0] > 127).any()) for i in range(2)] == [framed] * 2


def test_impossible_crops_are_refused(pets):
    for crop in (0, -0.5, 1.01, float("nan")):
        with pytest.raises(InputError, match="crop .* above 0, at most 1"):
            data.create_dataset("folder", "test", SIZE, pets, crop=crop)
    with pytest.raises(InputError, match="transform is for a streamed set"):
        data.create_dataset("folder", "test", SIZE, pets, memory=True, transform=files.to_tensor)


def test_square_is_the_middle():
    image = Image.fromarray(np.repeat(np.repeat(np.array([[10, 20, 30, 40]], np.uint8), 80, 0), 40, 1))
    got = np.asarray(files.square(image, 40, resample=Image.Resampling.BOX))
    assert (got[:, :20] == 20).all() and (got[:, 20:] == 30).all()


@pytest.mark.parametrize("damage, word", [
    (lambda path: path.write_bytes(path.read_bytes()[:400]), "no readable picture"),
    (lambda path: path.write_bytes(b"<html>404</html>"), "no readable picture"),
    (lambda path: path.write_bytes(b""), "no readable picture"),
])
def test_a_bad_picture_is_named_and_may_be_quarantined_in_training_only(pets, damage, word):
    name = data.create_dataset("folder", "train", SIZE, pets).manifest.file[0]
    damage(pets / name)
    with pytest.raises(DataError, match=f"(?s){name}.*{word}.*quarantine"):
        data.create_dataset("folder", "train", SIZE, pets)
    assert name not in set(data.create_dataset("folder", "train", SIZE, pets, quarantine=(name,)).manifest.file)
    damage(pets / "val" / "cat" / "000.jpg")
    with pytest.raises(DataError, match=word) as caught:
        data.create_dataset("folder", "test", SIZE, pets)
    assert "quarantine" not in str(caught.value)
    with pytest.raises(InputError, match="only training"):
        data.create_dataset("folder", "test", SIZE, pets, quarantine=("val/cat/000.jpg",))


def test_a_streamed_set_names_torn_changed_and_missing_files(pets):
    stream = data.create_dataset("folder", "train", SIZE, pets, memory=False)
    one, two = stream.manifest.file[:2]
    (pets / one).write_bytes(b"other")
    (pets / two).unlink()
    for index, word in ((0, "changed"), (1, "missing")):
        with pytest.raises(DataError, match=word):
            stream[index]
    with pytest.raises(DataError, match=f"{one}: changed.*{two}: missing"):
        stream.verify()


def test_pillows_grey_filling_is_not_accepted(pets, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(InputError, match="Set it to False"):
        data.create_dataset("folder", "test", SIZE, pets)


def test_a_manifest_pins_the_files(pets):
    data.create_dataset("folder", "test", SIZE, pets, manifest=pets / "test.csv")
    Image.new("RGB", (40, 40)).save(pets / "val" / "cat" / "000.jpg")
    with pytest.raises(DataError, match="val/cat/000.jpg: changed"):
        data.create_dataset("folder", "test", SIZE, pets, manifest=pets / "test.csv")
    Image.new("RGB", (40, 40)).save(pets / "val" / "cat" / "new.jpg")
    with pytest.raises(DataError, match="new.jpg: not in the manifest"):
        data.create_dataset("folder", "test", SIZE, pets, manifest=pets / "test.csv")


def test_a_manifest_and_a_quarantine_go_together(pets):
    data.create_dataset("folder", "train", SIZE, pets, manifest=pets / "train.csv")
    name, other = data.create_dataset("folder", "train", SIZE, pets).manifest.file[:2]
    (pets / name).write_bytes(b"torn")
    kept = data.create_dataset("folder", "train", SIZE, pets, manifest=pets / "train.csv", quarantine=(name,))
    assert set(pd.read_csv(pets / "train.csv").file) - set(kept.manifest.file) == {name}
    (pets / other).unlink()
    with pytest.raises(DataError, match=f"1 bad.*{other}: missing"):
        data.create_dataset("folder", "train", SIZE, pets, manifest=pets / "train.csv", quarantine=(name,))


@pytest.mark.parametrize("memory", [True, False])
def test_an_empty_split_says_why_and_what_to_do(tmp_path, memory):
    few = {"train/cat/000.jpg", "train/dog/000.jpg"}  # neither name falls into val
    for file in (*few, *(name.replace("train", "test") for name in few)):
        (tmp_path / file).parent.mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / file)
    assert len(data.create_dataset("folder", "train", SIZE, tmp_path, memory=memory)) == 2
    with pytest.raises(DataError, match="folder/val is empty: the keyed hash.*Add pictures.*train/, val/ and test/"):
        data.create_dataset("folder", "val", SIZE, tmp_path, memory=memory)
    with pytest.raises(DataError, match="folder/train is empty: quarantine leaves out all 2"):
        data.create_dataset("folder", "train", SIZE, tmp_path, memory=memory, quarantine=tuple(few))
    for file in few:  # the remedy
        (tmp_path / file.replace("train", "val")).parent.mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / file.replace("train", "val"))
    assert len(data.create_dataset("folder", "val", SIZE, tmp_path, memory=memory)) == 2
    for file in few:  # both names fall into val
        (tmp_path / file).rename((tmp_path / file).with_name("005.jpg"))
        (tmp_path / file.replace("train", "val")).unlink()
        (tmp_path / file.replace("train", "val")).parent.rmdir()
    (tmp_path / "val").rmdir()
    with pytest.raises(DataError, match="folder/train is empty: the keyed hash"):
        data.create_dataset("folder", "train", SIZE, tmp_path, memory=memory)


@pytest.mark.parametrize("error", [zlib.error("bad block"), EOFError("short"), zipfile.BadZipFile("crc")])
def test_damage_inside_a_zip_is_a_bad_file(error):
    def read(file):
        raise error

    with pytest.raises(DataError, match="unreadable"):
        files.checked(read, ("a.jpg",))


def test_a_damaged_zip_member_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("set/a.txt", "abc" * 100)
    content = bytearray((tmp_path / "set.zip").read_bytes())
    start = 30 + len("set/a.txt")  # a local header has 30 bytes and the name
    content[start:start + 4] = b"\xff" * 4
    (tmp_path / "set.zip").write_bytes(content)
    with pytest.raises(zlib.error), zipfile.ZipFile(tmp_path / "set.zip") as archive:
        archive.read("set/a.txt")
    read = files.reader("set", tmp_path)
    with pytest.raises(DataError, match="a.txt: unreadable"):
        files.collect(lambda file: files.checked(read, (file,)), {"a.txt": "a.txt"}, "set/train")
    with pytest.raises(DataError, match="not a whole zip file.*Fetch it again"):
        unpack_zip(tmp_path / "set.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_impossible_folders(tmp_path, pets):
    with pytest.raises(DataError, match="needed are train/CLASS"):
        data.create_dataset("folder", "train", SIZE, tmp_path / "nowhere")
    (pets / "train" / "bird").mkdir()
    with pytest.raises(DataError, match="bird.*empty"):
        data.create_dataset("folder", "train", SIZE, pets)
    (pets / "train" / "bird").rmdir()
    (pets / "train" / "cat" / "notes.txt").write_text("no")
    with pytest.raises(DataError, match="notes.txt: no picture"):
        data.create_dataset("folder", "train", SIZE, pets)
    for path in (pets / "train" / "cat").iterdir():
        path.unlink()
    (pets / "train" / "cat").rmdir()
    with pytest.raises(DataError, match="at least 2"):
        data.create_dataset("folder", "train", SIZE, pets)
    with pytest.raises(DataError, match="at least 2|lacks"):
        data.create_dataset("folder", "test", SIZE, pets)


@pytest.mark.parametrize("name", ["imagenet", "imagenette", "oxford_pets", "cifar10", "caltech9"])
def test_missing_data_says_what_to_put_where(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHMIX_DATA", str(tmp_path))
    with pytest.raises(DataError, match="(?i)put|sort|download=True"):
        data.create_dataset(name, "train", SIZE)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.fixture
def breeds(tmp_path):
    "Oxford Pets as torchvision lays it out."
    home = tmp_path / "oxford-iiit-pet"
    (home / "annotations" / "trimaps").mkdir(parents=True)
    (home / "images").mkdir()
    for part in ("trainval", "test"):
        lines = []
        for k, breed in enumerate(("Abyssinian", "basset_hound")):
            for i in range(12):
                stem = f"{breed}_{i + 100 * (part == 'test')}"
                Image.new("RGB", (50, 40), (9 * i, 0, 99 * k)).save(home / "images" / f"{stem}.jpg")
                Image.new("L", (50, 40), 1 + (i % 2)).save(home / "annotations" / "trimaps" / f"{stem}.png")
                lines.append(f"{stem} {k + 1} 1 1")
        (home / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_pets_in_torchvisions_layout(breeds):
    train, val, test = (data.create_dataset("oxford_pets", split, SIZE, breeds) for split in files.SPLITS)
    assert (len(train) + len(val), len(test)) == (24, 24) and test.classes == ("Abyssinian", "Basset Hound")
    assert test.masks[:, 0, 0, 0].tolist() == [1, 0] * 12


@pytest.mark.parametrize("memory", [True, False])
def test_listed_pictures_that_are_not_there_are_named_together(breeds, memory):
    for stem in ("Abyssinian_100", "basset_hound_103"):
        (breeds / "oxford-iiit-pet" / "images" / f"{stem}.jpg").unlink()
    with pytest.raises(DataError, match="oxford_pets/test: 2 bad.*Abyssinian_100.jpg: missing; .*basset_hound_103.jpg: missing.*Restore them"):
        data.create_dataset("oxford_pets", "test", SIZE, breeds, memory=memory)
    gone = data.create_dataset("oxford_pets", "train", SIZE, breeds).manifest.file[0]
    (breeds / "oxford-iiit-pet" / gone).unlink()
    with pytest.raises(DataError, match=f"{gone}: missing.*quarantine"):
        data.create_dataset("oxford_pets", "train", SIZE, breeds, memory=memory)
    assert gone not in set(data.create_dataset("oxford_pets", "train", SIZE, breeds, memory=memory, quarantine=(gone,)).manifest.file)


def test_masks_are_cropped_as_their_pictures(breeds):
    home = breeds / "oxford-iiit-pet"
    animal = np.zeros((256, 300), np.uint8)
    animal[10:120, 30:170] = 255
    for part, stem in (("train", None), ("test", "Abyssinian_100")):
        stem = stem or Path(data.create_dataset("oxford_pets", part, SIZE, breeds).manifest.file[0]).stem
        Image.fromarray(animal).convert("RGB").save(home / "images" / f"{stem}.jpg", quality=100)
        Image.fromarray(np.where(animal, 1, 2).astype(np.uint8)).save(home / "annotations" / "trimaps" / f"{stem}.png")
        kept = data.create_dataset("oxford_pets", part, SIZE, breeds)
        row = kept.manifest.index[kept.manifest.file == f"images/{stem}.jpg"][0]
        assert ((kept.images[row, :1] >= 128) == kept.masks[row].bool()).all() and 0.2 < kept.masks[row].float().mean() < 0.4


# ---- real archives ----

def test_caltech9_zip_and_manifest():
    val = data.create_dataset("caltech9", "val", 56, shared("caltech9"))
    assert val.images.shape == (235, 3, 56, 56) == (len(val), *val.images.shape[1:]) and val.masks.unique().tolist() == [0, 1]
    assert val.saliency.float().mean() > 20 and val.labels.bincount().tolist() == [29, 34, 27, 30, 22, 31, 23, 11, 28]
    good = torch.tensor(val.manifest.mask_ok.to_numpy() == 1)
    off = (val.masks.float().mean((1, 2, 3)) - torch.tensor(val.manifest.fg_fraction.to_numpy()))[good].abs()
    assert off.max() < 0.04 and off.mean() < 0.015  # half-covered pixels count as object


def test_caltech9_changed_and_missing_files_are_named(tmp_path):
    base = shared("caltech9")
    read = files.reader("caltech9", base)
    rows = caltech.caltech9_manifest("val")
    for file in rows.file:
        stem = file.removesuffix(".jpg") + ".png"
        for name in (file, f"masks/{stem}", f"saliency/{stem}"):
            path = tmp_path / "caltech9" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read(name))
    first, second = rows.file[:2]
    (tmp_path / "caltech9" / first).unlink()
    (tmp_path / "caltech9" / second).write_bytes(read(rows.file[2]))
    with pytest.raises(DataError, match=f"2 bad.*{first}: missing; {second}: changed"):
        data.create_dataset("caltech9", "val", 56, tmp_path)


def test_real_pictures_as_a_folder(tmp_path):
    home = unpacked("cifar10_subset", tmp_path)
    test = data.create_dataset("folder", "test", 32, home, crop=1.0)
    assert len(test) == 2000 and test.num_classes == 10 and test.labels.bincount().tolist() == [200] * 10
    one = np.asarray(Image.open(home / test.manifest.file[7]).convert("RGB"))
    assert (test.images[7].permute(1, 2, 0).numpy() == one).all()


# ---- caltech9 from Caltech-101 ----

def test_built_caltech9(tmp_path):
    rows = caltech.caltech9_manifest().groupby(["split", "class"]).head(1)
    rng = np.random.default_rng(0)
    for row in rows.itertuples():
        path = tmp_path / "caltech101" / row.source_path
        path.parent.mkdir(parents=True, exist_ok=True)
        edge = 8 * (row.caltech_category == "Leopards")
        tiny = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        tiny.resize((row.source_width + edge, row.source_height + edge), Image.Resampling.BICUBIC).save(path, quality=95)
    built = caltech.build_caltech9(tmp_path, tmp_path / "data", manifest=rows)
    assert len(pd.read_csv(built / "built.csv")) == len(rows)
    for row in rows.itertuples():
        photo = Image.open(tmp_path / "caltech101" / row.source_path).convert("RGB")
        edge = 4 * (row.caltech_category == "Leopards")
        box = [n + edge for n in (row.crop_left, row.crop_top, row.crop_right, row.crop_bottom)]
        want = np.asarray(photo.crop(box).resize((128, 128), Image.Resampling.LANCZOS), float)
        assert np.abs(want - np.asarray(Image.open(built / row.file), float)).mean() < caltech.TOLERANCE
    with pytest.raises(DataError, match="Restore"):  # the rows that were not built are missing
        caltech.load_caltech9("test", 56, tmp_path / "data")


def test_a_built_set_loads_without_masks(tmp_path, monkeypatch):
    rows = caltech.caltech9_manifest("val").groupby("class").head(1).reset_index(drop=True)
    monkeypatch.setattr(caltech, "_table", lambda: rows)
    for row in rows.itertuples():
        path = tmp_path / row.source_path
        path.parent.mkdir(parents=True, exist_ok=True)
        edge = 8 * (row.caltech_category == "Leopards")
        Image.new("RGB", (row.source_width + edge, row.source_height + edge), (9, 99, 199)).save(path)
    caltech.build_caltech9(tmp_path, tmp_path)
    loaded = caltech.load_caltech9("val", 56, tmp_path)
    assert loaded.masks is None and len(loaded) == 9 and loaded.manifest_hash != files.manifest_hash(rows, loaded.classes)


# ---- augmentation ----

def slow_crop(image, theta, size):
    "Bilinear sampling of one channel in float64 with reflection, from the definition."
    n, out = image.shape[0], np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            x, y = (2 * j + 1) / size - 1, (2 * i + 1) / size - 1
            a = ((theta[0, 0] * x + theta[0, 2] + 1) * n - 1) / 2
            b = ((theta[1, 1] * y + theta[1, 2] + 1) * n - 1) / 2
            a, b = (min(max(p, -0.5), n - 0.5) for p in (a, b))
            fa, fb = np.floor(a), np.floor(b)
            for da in (0, 1):
                for db in (0, 1):
                    weight = (1 - abs(a - fa - da)) * (1 - abs(b - fb - db))
                    p, q = fa + da, fb + db
                    p, q = (min(max(int(v), 0), n - 1) for v in (p, q))
                    out[i, j] += weight * image[q, p]
    return out


def test_augment_is_the_slow_form():
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    ids = torch.tensor([5, 1023, 1024])
    theta = data.crop_affine(data.crop_draws(ids, 3, 1)).double().numpy()
    got = data.augment(images, ids, 3, 1, size=6).numpy()
    for k in range(3):
        assert np.abs(got[k, 0] - slow_crop(images[k, 0].numpy(), theta[k], 6)).max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=9), st.integers(0, 3), st.integers(0, 3))
def test_a_crop_depends_on_seed_epoch_and_id_alone(ids, seed, epoch):
    ids = torch.tensor(ids)
    images = (ids[:, None, None, None] * torch.arange(192).view(1, 3, 8, 8) % 256).to(torch.uint8)
    whole = data.augment(images, ids, seed, epoch)
    data._crop_block.cache_clear()
    torch.rand(7)
    assert whole.shape == images.shape and 0 <= whole.min() and whole.max() <= 1 + 1e-6
    for k in range(len(ids)):
        assert torch.allclose(data.augment(images[k:k + 1], ids[k:k + 1], seed, epoch)[0], whole[k], atol=1e-6)


def test_masks_follow_and_inputs_stay():
    labels = torch.arange(64).view(1, 1, 8, 8).expand(4, 1, 8, 8).to(torch.int64)
    images = labels.float().expand(4, 3, 8, 8) / 63
    copy = images.clone()
    moved, followed = data.augment(images, torch.arange(4), 0, 0, masks=labels)
    assert torch.equal(images, copy) and followed.dtype == torch.int64
    assert ((moved[:, :1] * 63 - followed).abs() <= 4.6).all()  # nearest: half a pixel in x and y
    mirrored, other = data.augment(images, torch.arange(4), 0, 0, scale=(1, 1), ratio=(1, 1), flip=1.0, masks=labels)
    assert torch.equal(other, labels.flip(-1)) and torch.allclose(mirrored, images.flip(-1), atol=1e-5)


def test_normalize_by_hand():
    x = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    want = torch.tensor([(1 - m) / s for m, s in zip(data.IMAGENET_MEAN, data.IMAGENET_STD)])
    assert torch.allclose(data.normalize(x).flatten(), want) and torch.allclose(data.normalize(x / 255.0).flatten(), want)


def test_unknown_names():
    for arguments, word in ((("shape9", "train", 56), "shapes9"), (("shapes9", "tran", 56), "train"), (("folder", "train", 56, None), "needed")):
        with pytest.raises((InputError, DataError), match=word):
            data.create_dataset(*arguments)
    with pytest.raises(InputError, match="did you mean 'quarantine'"):
        data.create_dataset("folder", "train", 56, quarantin=())
