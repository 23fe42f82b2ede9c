"""ImageNet-9, the published Background Challenge and the shifted sets: small copies of the published folders, and every way they can be broken."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchmix_repro import imagenet9, shifted
from patchmix_repro.core import DataError, InputError
from patchmix_repro.data import DATASETS, create_dataset
from patchmix_repro.photographs import IN9_CLASSES
from patchmix_repro.shards import synset_ids

SYNSETS = list(synset_ids())
FOLDERS = ("00_dog", "01_bird", "02_wheeled vehicle", "03_reptile", "04_carnivore", "05_insect", "06_musical instrument", "07_primate", "08_fish")
TABLE = {str(i): (i % 12 if i % 12 < 9 else -1) for i in range(1000)}


def put(path, seed=0, height=30, width=30):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def put_table(root):
    (root / "in_to_in9.json").write_text(json.dumps(TABLE))
    return root


@pytest.fixture
def challenge(tmp_path):
    "Two objects a class in every variant; masks of the originals."
    base = tmp_path / "bg_challenge"
    for k, folder in enumerate(FOLDERS):
        for i in range(2):
            own, name = f"n{k:08}_{i}", f"fg_n{k:08}_{i}_bg_n{(k + 1) % 9:08}_{i}"
            for variant in imagenet9.PUBLISHED:
                put(base / variant / "val" / folder / f"{name if variant.startswith('mixed') else own}.JPEG", seed=9 * i + k)
            mask = np.zeros((30, 30), bool)
            mask[:15, 3 * k:] = True
            (base / "fg_mask" / "val" / folder).mkdir(parents=True, exist_ok=True)
            np.save(base / "fg_mask" / "val" / folder / f"{own}.npy", mask)
    return tmp_path


# ---- the Background Challenge ----

def test_every_published_variant_opens_with_its_labels_and_names(challenge):
    for variant in imagenet9.PUBLISHED:
        data = create_dataset("backgrounds", "test", 30, root=challenge, variant=variant)
        assert data.labels.tolist() == [k for k in range(9) for _ in range(2)] and data.classes == IN9_CLASSES and data.name == f"backgrounds-{variant}"
        assert data.manifest.fg_file.tolist() == [f"n{k:08}_{i}" for k in range(9) for i in range(2)] and data.manifest.variant.eq(variant).all()
        lent = {"mixed_same": data.labels.tolist(), "mixed_next": ((data.labels + 1) % 9).tolist(), "mixed_rand": [-1] * 18, "only_fg": [-1] * 18}
        assert data.manifest.bg_label.tolist() == lent.get(variant, data.labels.tolist())
        assert (data.masks is not None) == (variant == "original")
    assert (create_dataset("backgrounds", "test", 30, root=challenge, variant="mixed_rand").manifest.bg_file == "").all()
    named = create_dataset("backgrounds", "test", 30, root=challenge, variant="mixed_next").manifest.bg_file
    assert named.iloc[0] == "n00000001_0" and named.iloc[-1] == "n00000000_1"


def test_masks_lie_on_their_pictures_at_any_size(challenge):
    data = create_dataset("backgrounds", "test", 30, root=challenge)
    for i, k in enumerate(data.labels.tolist()):
        expected = torch.zeros(30, 30, dtype=torch.uint8)
        expected[:15, 3 * k:] = 1
        assert torch.equal(data.masks[i, 0], expected)
    half = create_dataset("backgrounds", "test", 10, root=challenge).masks
    assert half[0, 0].tolist() == [[1] * 10] * 5 + [[0] * 10] * 5 and set(half.unique().tolist()) == {0, 1}
    picture = np.asarray(Image.open(data.folder / data.manifest.file[4])) if hasattr(data, "folder") else np.asarray(Image.open(challenge / "bg_challenge" / data.manifest.file[4]))
    assert np.array_equal(data.images[4].permute(1, 2, 0).numpy(), picture)  # nothing is cut away or resized


@pytest.mark.parametrize(("damage", "words"), [
    (lambda base: shutil.rmtree(base / "original/val/03_reptile"), "nine class folders 00_dog to 08_fish; 8 of them"),
    (lambda base: (base / "original/val/03_reptile").rename(base / "original/val/03_snake"), "03_snake is none of them"),
    (lambda base: (base / "fg_mask/val/00_dog/n00000000_1.npy").unlink(), r"original/val/00_dog/n00000000_1.JPEG: missing"),
    (lambda base: (base / "fg_mask/val/00_dog/n00000000_1.npy").write_bytes(b"no"), "no readable mask"),
    (lambda base: np.save(base / "fg_mask/val/00_dog/n00000000_1.npy", np.full((30, 30), 7)), "values up to 7"),
    (lambda base: np.save(base / "fg_mask/val/00_dog/n00000000_1.npy", np.zeros((3, 30, 30))), r"shape \(3, 30, 30\)"),
    (lambda base: (base / "original/val/08_fish/n00000008_0.JPEG").write_bytes(b"no"), "no readable picture"),
    (lambda base: shutil.rmtree(base / "original"), "no bg_challenge/original/val.*releases of https://github.com/MadryLab/backgrounds_challenge")])
def test_a_damaged_copy_is_named(challenge, damage, words):
    damage(challenge / "bg_challenge")
    with pytest.raises(DataError, match=words):
        create_dataset("backgrounds", "test", 30, root=challenge)


def test_a_mask_file_never_runs_code(challenge):
    np.save(challenge / "bg_challenge/fg_mask/val/00_dog/n00000000_1.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="no readable mask"):
        create_dataset("backgrounds", "test", 30, root=challenge)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", ["backgrounds", "imagenet_v2", "imagenet_real", "imagenet_r", "imagenet_stylized", "imagenet_sketch", "shape_texture"])
def test_test_sets_do_not_train(tmp_path, name, split):
    with pytest.raises(InputError, match=f"{name} is for evaluation only"):
        create_dataset(name, split, 30, root=tmp_path)


def test_imagenet9_trains_on_its_own_folder_and_is_tested_on_the_challenge(challenge):
    for k, folder in enumerate(FOLDERS):
        for i in range(8):
            put(challenge / "in9l" / "train" / folder / f"n{k:08}_{i}.JPEG", seed=k)
            put(challenge / "mixed_rand" / "train" / folder / f"n{k:08}_{i}.JPEG", seed=k)
    train, val = (create_dataset("imagenet9", split, 30, root=challenge) for split in ("train", "val"))
    assert len(train) + len(val) == 72 and len(val) and not set(train.manifest.file) & set(val.manifest.file) and train.classes == val.classes == IN9_CLASSES
    assert all(row.file.split("/")[1][:2] == f"{row.label:02}" for row in train.manifest.itertuples())
    assert create_dataset("imagenet9", "test", 30, root=challenge).manifest_hash == create_dataset("backgrounds", "test", 30, root=challenge).manifest_hash
    assert create_dataset("imagenet9", "train", 30, root=challenge, variant="mixed_rand").name == "imagenet9-mixed_rand"
    with pytest.raises(DataError, match="no only_fg/train.*only_fg.tar.gz"):
        create_dataset("imagenet9", "train", 30, root=challenge, variant="only_fg")


def test_the_table_is_found_where_it_lies_and_has_all_classes(tmp_path):
    with pytest.raises(DataError, match="no in_to_in9.json"):
        imagenet9.in9_table(tmp_path)
    (tmp_path / "bg_challenge").mkdir()
    put_table(tmp_path / "bg_challenge")
    assert imagenet9.in9_table(tmp_path).tolist() == list(TABLE.values())
    (tmp_path / "in_to_in9.json").write_text(json.dumps({"0": 0, "1": 3}))
    with pytest.raises(DataError, match=r"leads to the classes \[-1, 0, 3\]"):
        imagenet9.in9_table(tmp_path)


def test_the_published_table_has_370_classes(shared_data):
    counts = imagenet9.in9_table(shared_data)
    assert counts[counts >= 0].bincount().tolist() == [116, 52, 42, 36, 35, 27, 26, 20, 16] and (counts < 0).sum() == 630


# ---- folders by class ----

FOLDER_SETS = {"imagenet_r": ("imagenet-r", SYNSETS), "imagenet_sketch": ("sketch", SYNSETS), "imagenet_stylized": ("stylized-imagenet/val", SYNSETS),
               "imagenet_v2": ("imagenetv2-matched-frequency-format-val", [str(i) for i in range(1000)])}


@pytest.mark.parametrize("name", FOLDER_SETS)
def test_a_set_is_read_in_both_kinds_of_labels(tmp_path, name):
    folder, names = FOLDER_SETS[name]
    for i in (0, 9, 14, 113, 999):  # 9 leads outside of the nine
        put(put_table(tmp_path) / folder / names[i] / f"{i}.png", seed=i)
    nine, thousand = (create_dataset(name, "test", 30, root=tmp_path, labels=labels) for labels in ("in9", "imagenet"))
    assert thousand.labels.tolist() == thousand.manifest.imagenet_label.tolist() == [0, 9, 14, 113, 999] and thousand.num_classes == 1000
    assert nine.labels.tolist() == [0, 2, 5, 3] and nine.manifest.imagenet_label.tolist() == [0, 14, 113, 999] and nine.classes == IN9_CLASSES
    assert [nine.classes[k] for k in nine.labels] == nine.manifest["class"].tolist() and nine.manifest.sha256.str.len().eq(64).all()
    assert create_dataset(name, "test", 30, root=tmp_path).manifest_hash == nine.manifest_hash
    assert not create_dataset(name, "test", 30, root=tmp_path, memory=False).in_memory
    put(tmp_path / folder / "n99999999" / "a.png")
    with pytest.raises(DataError, match="n99999999 .* name no class of ImageNet-1k"):
        create_dataset(name, "test", 30, root=tmp_path)
    with pytest.raises(InputError, match="unknown labels 'in10'. Allowed: imagenet, in9"):
        create_dataset(name, "test", 30, root=tmp_path, labels="in10")


@pytest.mark.parametrize(("name", "words"), [(name, "github.com") for name in FOLDER_SETS] + [("imagenet_real", "image-net.org"), ("shape_texture", "shape_texture.zip")])
def test_a_missing_set_says_where_to_get_it(tmp_path, name, words):
    with pytest.raises(DataError, match=words) as caught:
        create_dataset(name, "test", 30, root=put_table(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_an_edition_of_imagenet_v2_has_its_own_name(tmp_path):
    for i in (1, 2):
        put(put_table(tmp_path) / "imagenetv2-top-images-format-val" / str(i) / "a.jpeg", seed=i)
    assert create_dataset("imagenet_v2", "test", 30, root=tmp_path, edition="top-images").name == "imagenet_v2-top-images"
    with pytest.raises(InputError, match="did you mean 'top-images'"):
        create_dataset("imagenet_v2", "test", 30, root=tmp_path, edition="top-image")


# ---- ReaL ----

def make_real(root, real, published):
    for i, k in enumerate(published, 1):
        put(root / "imagenet" / "val" / SYNSETS[k] / f"ILSVRC2012_val_{i:08}.png", seed=i)
    (root / "real.json").write_text(json.dumps(real))
    return put_table(root)


def test_real_accepts_each_of_its_labels_and_leaves_out_the_rest(tmp_path):
    real = [[3, 27], [5, 1], [9], [], [9, 16], [12]]  # 27 -> 3 as 3 is; 9 is outside; nothing; 16 -> 4; 12 -> 0
    make_real(tmp_path, real, [3, 2, 9, 4, 9, 13])
    nine = create_dataset("imagenet_real", "test", 30, root=tmp_path)
    found = {int(row.file[-8:-4]): (row.label, row.accepted) for row in nine.manifest.itertuples()}
    assert found == {1: (3, "3"), 2: (1, "1 5"), 5: (4, "4"), 6: (0, "0")}
    all_of = create_dataset("imagenet_real", "test", 30, root=tmp_path, labels="imagenet").manifest
    assert {int(row.file[-8:-4]): (row.label, row.accepted) for row in all_of.itertuples()} == {1: (3, "3 27"), 2: (1, "1 5"), 3: (9, "9"), 5: (9, "9 16"), 6: (12, "12")}
    rows = pd.DataFrame({"file": nine.manifest.file, "label": nine.labels, "prediction": 5}).assign(correct=False)
    right = shifted.score_real(rows, nine.manifest)
    assert right.file[right.correct].str.contains("0002").tolist() == [True]
    with pytest.raises(InputError, match="1 of the rows' files"):
        shifted.score_real(rows.assign(file=["x", *rows.file[1:]]), nine.manifest)


@given(st.lists(st.lists(st.integers(0, 999), max_size=4), min_size=1, max_size=12), st.data())
@settings(max_examples=50)
def test_real_agrees_with_sets(real, data):
    translate = torch.tensor([TABLE[str(i)] for i in range(1000)])
    own = data.draw(st.lists(st.integers(0, 999), min_size=len(real), max_size=len(real)))
    table = pd.DataFrame({"file": [f"val/x/ILSVRC2012_val_{i + 1:08}.JPEG" for i in range(len(real))], "imagenet_label": own})
    found = shifted.real_table(table, real, translate).set_index("file")
    for i, file in enumerate(table.file):
        fit = {TABLE[str(k)] for k in real[i]} - {-1}
        assert (file in found.index) == bool(fit)
        if fit:
            row = found.loc[file]
            assert set(map(int, row.accepted.split())) == fit and row.label == (TABLE[str(own[i])] if TABLE[str(own[i])] in fit else min(fit))


def test_real_needs_its_file_and_imagenets_names(tmp_path):
    make_real(tmp_path, [[3], [4]], [3, 4])
    put(tmp_path / "imagenet" / "val" / SYNSETS[0] / "holiday.png")
    with pytest.raises(DataError, match="holiday.png .* number from 1 to 2"):
        create_dataset("imagenet_real", "test", 30, root=tmp_path)
    (tmp_path / "real.json").write_text("[[")
    with pytest.raises(DataError, match="no readable real.json.*reassessed-imagenet"):
        create_dataset("imagenet_real", "test", 30, root=tmp_path)


# ---- shapes and textures ----

def make_shapes(root):
    rows = [("cue_conflict/cat/cat1-clock2.png", "cue_conflict", "cat", "clock"), ("cue_conflict/clock/clock1-cat2.png", "cue_conflict", "clock", "cat"),
            ("silhouettes/clock/clock3.png", "silhouettes", "clock", "")]
    for i, row in enumerate(rows):
        put(root / "shape_texture" / row[0], seed=i)
    pd.DataFrame(rows, columns=["file", "kind", "shape_class", "texture_class"]).to_csv(root / "shape_texture" / "meta.csv", index=False)
    (root / "shape_texture" / "class_map.csv").write_text("class16,caltech9,coco8\ncat,carnivore,animal\nclock,,handheld\n")
    return root


@pytest.mark.parametrize(("options", "labels", "textures", "k"), [
    ({}, [0, 1], [1, 0], 2), ({"classes": "coco_objects"}, [0, 4], [4, 0], 8), ({"classes": "caltech9"}, [1], [-1], 9),
    ({"part": "silhouettes"}, [1], [-1], 2)])
def test_shapes_in_the_classes_asked_for(tmp_path, options, labels, textures, k):
    data = create_dataset("shape_texture", "test", 30, root=make_shapes(tmp_path), **options)
    assert data.labels.tolist() == labels and data.manifest.texture_label.tolist() == textures and data.num_classes == k and data.in_memory
    assert [data.classes[i] for i in labels] == data.manifest["class"].tolist()
    assert np.array_equal(data.images[0].permute(1, 2, 0).numpy(), np.asarray(Image.open(tmp_path / "shape_texture" / data.manifest.file[0])))


@pytest.mark.parametrize(("damage", "words"), [
    (lambda home: (home / "cue_conflict/cat/cat1-clock2.png").unlink(), "cat1-clock2.png: missing"),
    (lambda home: (home / "meta.csv").unlink(), "meta.csv: missing"),
    (lambda home: (home / "class_map.csv").write_text("class16,caltech9\n"), "lacks the columns|unknown classes"),
    (lambda home: (home / "class_map.csv").write_text("class16,caltech9,coco8\ncat,carnivore,animal\n"), r"unknown classes \['clock'\]")])
def test_a_damaged_archive_of_shapes_is_named(tmp_path, damage, words):
    damage(make_shapes(tmp_path) / "shape_texture")
    with pytest.raises(DataError, match=words):
        create_dataset("shape_texture", "test", 30, root=tmp_path)


def test_the_archive_at_hand(shared_data):
    counts = {part: create_dataset("shape_texture", "test", 56, root=shared_data, part=part) for part in shifted.PARTS}
    assert [len(data) for data in counts.values()] == [384, 160, 160] and all(data.num_classes == 16 and data.images.shape[1:] == (3, 56, 56) for data in counts.values())
    assert (counts["cue_conflict"].manifest.texture_label >= 0).all() and counts["edges"].labels.bincount().tolist() == [10] * 16
    caltech, nine = create_dataset("caltech9", "test", 56, root=shared_data), create_dataset("shape_texture", "test", 56, root=shared_data, part="edges", classes="caltech9")
    assert nine.classes == caltech.classes and len(nine) == 110 and len(nine.manifest.shape_class.unique()) == 11
    assert len(create_dataset("shape_texture", "test", 56, root=shared_data, part="edges", classes="coco_objects")) == 160


def test_every_opener_is_registered():
    assert {"backgrounds", "imagenet9", *FOLDER_SETS, "imagenet_real", "shape_texture"} <= set(DATASETS)
