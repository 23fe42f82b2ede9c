"""Pasted occluders as a condition and as a data set, and occlude.ipynb through papermill."""
import dataclasses
import json
import multiprocessing
import re
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nbclient import NotebookClient
from PIL import Image

from patchmix_repro import superimposed
from patchmix_repro.core import DataError, InputError, StoreError
from patchmix_repro.data import create_dataset
from patchmix_repro.occluders import load_occluders
from patchmix_repro.occlusion import condition_from
from patchmix_repro.parameters import checked, run_folder_for
from patchmix_repro.placing import occlude
from patchmix_repro.smd import Paste, battery
from patchmix_repro.superimposed import INFO, OccludeConfig, examples, originals, reached, read_info, rebuild, source_images, write_smd

OCCLUDE = Path(__file__).resolve().parents[1] / "nbs" / "occlude.ipynb"


@pytest.fixture(scope="module")
def drawings():
    return create_dataset("shapes9", "test", 56)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Two classes of small noise pictures of several sizes and forms."
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i, (name, size) in enumerate({"cat/a b.jpg": (40, 60), "cat/z.png": (33, 20), "dog/007.png": (50, 50), "dog/x.JPEG": (64, 30)}.items()):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).convert("L" if i == 2 else "RGB").save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- the condition ----

def test_paste_is_occlude_in_floats(drawings):
    paste, ids = Paste(area=0.3, number=2, seed=4), torch.tensor([3, 1000, 5])
    images = drawings.images[ids].float() / 255
    found, masks, source = paste(images, ids), paste.masks(ids, 56), load_occluders()
    for i, sample in enumerate(ids.tolist()):
        one = occlude(drawings.images[sample].permute(1, 2, 0).numpy(), paste.plan(sample, (56, 56)), source)
        assert torch.equal(found[i], torch.from_numpy(one.image).permute(2, 0, 1) / 255) and (masks[i, 0].numpy() == one.mask).all()


@given(ids=st.lists(st.integers(0, 5000), min_size=1, max_size=5, unique=True), area=st.sampled_from([0.1, 0.25]), mixed=st.booleans())
@settings(max_examples=15)
def test_a_sample_does_not_depend_on_its_batch(ids, area, mixed):
    images, ids = torch.rand(len(ids), 3, 28, 35, generator=torch.Generator().manual_seed(1)), torch.tensor(ids)
    before, paste = images.clone(), Paste(area=area, number=2, mixed=mixed)
    whole = paste(images, ids)
    alone = torch.cat([paste(images[i:i + 1], ids[i:i + 1]) for i in reversed(range(len(ids)))]).flip(0)
    masks = paste.masks(ids, (28, 35))
    assert torch.equal(whole, alone) and torch.equal(images, before) and masks.shape == (len(ids), 1, 28, 35)
    assert torch.equal(whole.where(~masks, 0), images.where(~masks, 0))


def test_an_empty_batch_and_other_types():
    paste = Paste()
    assert paste(torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64)).shape == (0, 3, 8, 8)
    half = torch.rand(2, 3, 16, 16).to(torch.bfloat16)
    assert paste(half, torch.arange(2)).dtype == torch.bfloat16
    with pytest.raises(InputError):
        paste(torch.full((1, 3, 8, 8), 2.0), torch.arange(1))


def test_names_and_settings_tell_conditions_apart(tmp_path):
    several = [Paste(), Paste(area=0.25), Paste(number=2), Paste(mixed=True), Paste(rule="published"), Paste(seed=1), Paste(str(tmp_path / "photos"))]
    assert len({c.name for c in several}) == len(several) and several[0].name == "paste-embedded-20" and several[-1].name == "paste-photos-20"
    for condition in several[:-1]:
        held = json.loads(json.dumps(condition.settings()))
        assert condition_from(held) == condition and held["x"] == 100 * condition.area and len(held["occluders_sha256"]) == 64


@pytest.mark.parametrize("wrong, words", [
    (dict(area=0), "above 0, below 1"), (dict(area=1), "above 0, below 1"), (dict(area=-0.1), "above 0, below 1"), (dict(number=0), "1 to 64"),
    (dict(rule="publised"), "did you mean 'published'"), (dict(mixed=1), "allowed is bool"), (dict(seed=0.5), "allowed is int"), (dict(occluders=3), "allowed is str"),
])
def test_an_impossible_condition(wrong, words):
    with pytest.raises(InputError) as error:
        Paste(**wrong)
    assert words in str(error.value)


def test_the_batteries():
    paper, quick = battery(), battery("quick")
    names = [c.name for c in paper]
    assert len(set(names)) == len(names) and len(quick) == 6 and [c.name for c in quick][0] == names[0] == "clean"
    assert [c.area for c in paper if c.kind == "paste"] == [0.1, 0.2, 0.3, 0.4] and [c.x for c in paper if c.kind == "slide"] == [-0.5, -0.25, 0, 0.25, 0.5]
    assert {c.seed for c in battery("paper", seed=3)[1:]} == {3}
    assert all(condition_from(json.loads(json.dumps(c.settings()))) == c for c in (*paper, *quick))


def test_photographed_cut_outs(shared_data, drawings, monkeypatch):
    if not (shared_data / "coco_objects.zip").is_file():
        pytest.skip("no coco_objects.zip in the folder that PATCHMIX_DATA names")
    monkeypatch.setenv("PATCHMIX_DATA", str(shared_data))
    paste, ids = Paste("coco_objects", area=0.3), torch.arange(20)
    assert paste.name == "paste-coco_objects-30"
    assert abs(paste.masks(ids, 56).float().mean() / 0.3 - 1) < 0.03


# ---- originals ----

def test_a_folder_of_photographs(photos, tmp_path):
    found = originals(photos)
    assert [o.name for o in found] == ["cat/a b", "cat/z", "dog/007", "dog/x"] and [o.id for o in found] == [0, 1, 2, 3]
    assert found[0].read()[0].shape == (40, 60, 3) and found[2].read()[1] is None
    with pytest.raises(DataError, match="no pictures in the folder .*CLASS/NAME.jpg"):
        originals(tmp_path)
    with pytest.raises(InputError, match="limit 0"):
        originals(photos, limit=0)
    (tmp_path / "a.jpg").write_bytes(b"torn")
    with pytest.raises(DataError, match="a.jpg in .*no readable picture.*Restore it"):
        originals(tmp_path)[0].read()
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="such as a. Rename"):
        originals(tmp_path)


def test_a_larger_limit_contains_the_smaller(drawings):
    chosen = [{o.id for o in originals(drawings, n, seed=2)} for n in (5, 50, 500)]
    assert chosen[0] < chosen[1] < chosen[2] and chosen[1] != {o.id for o in originals(drawings, 50, seed=3)}
    assert len(originals(drawings, 10**6)) == len(drawings)


def test_streamed_sets_keep_the_size_of_a_photograph(photos, tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).symlink_to(photos)
    data = source_images(OccludeConfig(images="folder", root=str(tmp_path)))
    assert not data.in_memory and sorted(o.read()[0].shape for o in originals(data)) == sorted(o.read()[0].shape for o in originals(photos))


# ---- the data set ----

@pytest.mark.parametrize("paste, masks", [(Paste(area=0.3), "png"), (Paste(area=0.2, number=3, mixed=True, rule="published", seed=7), "npy"), (Paste(area=0.1, angle=30.0, position=(0.5, 0.25)), "png")])
def test_every_file_is_rebuilt_byte_for_byte(photos, drawings, tmp_path, paste, masks):
    for images, limit in ((photos, None), (drawings, 5)):
        folder = tmp_path / f"set {limit}"
        info = write_smd(images, folder, paste, limit, masks)
        sources = {o.id: o for o in originals(images)}
        for row in info.to_dict("records"):
            image, mask = rebuild(row, sources[row["id"]].read()[0])
            assert image == (folder / row["image"]).read_bytes() and mask == (folder / row["mask"]).read_bytes()
        assert len(tree(folder)) == 2 * len(info) + 1 and not list(folder.rglob("*.tmp"))
    assert info.object_fraction.between(0, 1).all() and (info.height == 56).all()


def test_the_table_agrees_with_the_files(photos, tmp_path):
    info = write_smd(photos, tmp_path / "set", Paste(area=0.25))
    assert list(info["class"]) == ["cat", "cat", "dog", "dog"] and info.object_fraction.isna().all() and list(info.image)[2] == "dog/007_occluded.png"
    for row, original in zip(info.itertuples(), originals(photos), strict=True):
        image, mask = (np.array(Image.open(tmp_path / "set" / getattr(row, part))) for part in ("image", "mask"))
        pixels = original.read()[0]
        assert image.shape == pixels.shape == (row.height, row.width, 3) and mask.dtype == bool
        assert mask.mean() == row.image_fraction and (image[~mask] == pixels[~mask]).all() and abs(row.image_fraction - 0.25) < 0.01


def test_the_set_is_what_the_condition_pastes(drawings, tmp_path):
    paste = Paste(area=0.2, seed=2)
    info = write_smd(drawings, tmp_path, paste, limit=4)
    ids = torch.tensor(info.id.to_numpy())
    pasted = (paste(drawings.images[ids] / 255, ids) * 255).round().to(torch.uint8)
    for image, file in zip(pasted, info.image, strict=True):
        assert (image.permute(1, 2, 0).numpy() == np.array(Image.open(tmp_path / file))).all()


def test_rebuilding_needs_the_right_original_and_occluders(drawings, tmp_path):
    row = write_smd(drawings, tmp_path, limit=1).iloc[0]
    pixels = originals(drawings)[row.id].read()[0]
    with pytest.raises(DataError, match="the original has other pixels"):
        rebuild(row, pixels.transpose(1, 0, 2))
    source = load_occluders()
    other = dataclasses.replace(source, images=tuple(255 - image for image in source.images))
    with pytest.raises(DataError, match=r"occluder \w+/\d.png has other pixels"):
        rebuild(row, pixels, other)
    with pytest.raises(DataError, match="the result has other pixels"):
        rebuild({**row, "image_sha256": "0" * 64}, pixels)


class Stop(BaseException):
    "As Ctrl-C, between or within files."


@pytest.mark.parametrize("after", [0, 1, 7, 8, 12])
def test_an_interrupted_run_goes_on(drawings, tmp_path, monkeypatch, after):
    monkeypatch.setattr(superimposed, "BLOCK", 3)
    whole = write_smd(drawings, tmp_path / "whole", limit=7)
    calls, write = [], superimposed.atomic_write

    def failing(path, content):
        calls.append(path)
        if len(calls) > after:
            raise Stop
        return write(path, content)
    monkeypatch.setattr(superimposed, "atomic_write", failing)
    with pytest.raises(Stop):
        write_smd(drawings, tmp_path / "parts", limit=7)
    done = after // 7 * 3  # 3 images, 3 masks and a table are a block
    assert len(read_info(tmp_path / "parts")) == done if done else not (tmp_path / "parts" / INFO).exists()
    calls.clear()
    monkeypatch.setattr(superimposed, "atomic_write", lambda path, content: calls.append(path) or write(path, content))
    assert write_smd(drawings, tmp_path / "parts", limit=7).equals(whole)
    assert len([p for p in calls if p.name != INFO]) == 2 * (7 - done) and tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_a_killed_run_leaves_whole_files_and_goes_on(drawings, tmp_path, monkeypatch):
    monkeypatch.setattr(superimposed, "BLOCK", 5)
    child = multiprocessing.get_context("fork").Process(target=write_smd, args=(drawings, tmp_path / "set"), kwargs={"limit": 4000})
    child.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "set" / INFO).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.join()
    files = [p for p in (tmp_path / "set").rglob("*_*.png") if not p.name.startswith(".")]
    assert files and all(Image.open(p).load() for p in files)
    done, info = read_info(tmp_path / "set"), write_smd(drawings, tmp_path / "set", limit=30)
    again = read_info(tmp_path / "set").set_index("id")
    assert {o.id for o in originals(drawings, 30)} == set(info.id) and set(done.id) <= set(again.index) and len(again) < 4000
    assert (again.loc[done.id].image_sha256.to_numpy() == done.image_sha256.to_numpy()).all()


def test_a_folder_with_another_set_is_refused(drawings, photos, tmp_path):
    write_smd(drawings, tmp_path / "set", Paste(), limit=3)
    before = tree(tmp_path / "set")
    for paste, word in ((Paste(area=0.3), "area"), (Paste(number=2), "number"), (Paste(rule="published"), "rule"), (Paste(mixed=True), "mixed"), (Paste(angle=45), "angle"), (Paste(position=(0.5, 0.5)), "position")):
        with pytest.raises(StoreError, match=f"other .*{word}.*Choose another folder"):
            write_smd(drawings, tmp_path / "set", paste, limit=3)
    with pytest.raises(StoreError, match="other masks"):
        write_smd(drawings, tmp_path / "set", limit=3, masks="npy")
    changed = create_dataset("shapes9", "test", 56)
    changed.images = 255 - changed.images
    with pytest.raises(StoreError, match="other images"):
        write_smd(changed, tmp_path / "set", limit=3)
    assert tree(tmp_path / "set") == before
    with pytest.raises(InputError, match="among the originals"):
        write_smd(photos, photos / "out")
    with pytest.raises(DataError, match="no occlusion_info.csv"):
        read_info(tmp_path)


def test_a_turned_and_placed_set_goes_on_and_takes_no_others(drawings, tmp_path):
    there = Paste(angle=45, position=(0.5, 0.25))
    few, more = write_smd(drawings, tmp_path / "set", there, limit=3), write_smd(drawings, tmp_path / "set", there, limit=5)
    assert set(few.id) < set(more.id) and (read_info(tmp_path / "set").position == "0.5,0.25").all()
    with pytest.raises(StoreError, match="other angle, position"):
        write_smd(drawings, tmp_path / "set", Paste(), limit=6)


def test_a_set_from_before_angle_and_position_goes_on(drawings, tmp_path):
    whole = write_smd(drawings, tmp_path / "a", limit=4)
    write_smd(drawings, tmp_path / "b", limit=2)
    table = tmp_path / "b" / "occlusion_info.csv"
    pd.read_csv(table, keep_default_na=False).drop(columns=["angle", "position"]).to_csv(table, index=False)
    assert write_smd(drawings, tmp_path / "b", limit=4).image_sha256.tolist() == whole.image_sha256.tolist()


def test_more_pictures_join_a_set(drawings, tmp_path):
    few, more = write_smd(drawings, tmp_path / "a", limit=3), write_smd(drawings, tmp_path / "a", limit=6)
    assert set(few.id) < set(more.id) and more.equals(write_smd(drawings, tmp_path / "b", limit=6)) and tree(tmp_path / "a") == tree(tmp_path / "b")
    assert write_smd(drawings, tmp_path / "a", limit=3).equals(few)


def test_the_set_has_the_published_form(drawings, photos, tmp_path):
    "A folder of synsets with npy masks, packed as a shard, is read by the reader of the published SMD."
    occluded = pytest.importorskip("patchmix_repro.occluded")
    import tarfile
    source = tmp_path / "val"
    for i, synset in enumerate(("n01440764", "n01443537")):
        (source / synset).mkdir(parents=True)
        Image.open(next((photos / "cat").iterdir())).save(source / synset / f"ILSVRC2012_val_{i:08}.png")
    write_smd(source, tmp_path / "set", Paste(area=0.3), masks="npy")
    (tmp_path / "smd").mkdir()
    with tarfile.open(tmp_path / "smd" / "smd_1.tar.gz", "w:gz") as archive:
        for synset in source.iterdir():
            archive.add(tmp_path / "set" / synset.name, f"smd_1/{synset.name}")
    read_info(tmp_path / "set").dropna(axis=1).to_csv(tmp_path / "smd" / INFO, index=False)  # the object's share is not known
    smd = occluded.open_smd("test", 32, tmp_path, shards=(1,))
    assert smd.labels.tolist() == [0, 1] and np.allclose(smd.manifest.info_image_fraction.astype(float), 0.3, atol=0.01)


def test_the_table_of_areas_by_hand():
    info = pd.DataFrame({"id": [1, 2, 3], "kind": ["key", "gem", "gem"], "mixed": [False] * 3, "area": [0.2] * 3,
                         "image_fraction": [0.19, 0.2, 0.21], "object_fraction": [0.5, 0.3, 0.1]})
    table = reached(info)
    assert list(table.index) == ["all", "gem", "key"] and table.pictures.tolist() == [3, 2, 1]
    assert table.loc["gem"].drop("pictures").round(6).tolist() == [0.2, 0.205, 0.2, 0.21, 0.2]
    assert list(reached(info.assign(mixed=True)).index) == ["all", "mixed"]


@pytest.mark.parametrize("masks", ["png", "npy"])
def test_examples_show_pictures_beside_masks(photos, tmp_path, masks):
    info = write_smd(photos, tmp_path, masks=masks)
    shown, titles = examples(tmp_path, info, count=3, size=40)
    assert shown.shape == (6, 3, 40, 40) and shown.dtype == torch.uint8 and len(titles) == 6
    assert shown[1].unique().tolist()[::len(shown[1].unique()) - 1] == [0, 255] and re.fullmatch(r"\d+\.\d %", titles[1])


# ---- the notebook ----

def run(out, **parameters):
    papermill.execute_notebook(OCCLUDE, out / "out.ipynb", parameters | {"out": str(out / "run")}, progress_bar=False, cwd=str(out))
    return nbformat.read(out / "out.ipynb", as_version=4)


def test_the_notebook_is_short_and_all_its_parameters_are_fields():
    cells = nbformat.read(OCCLUDE, as_version=4).cells
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) <= 12 and len(tagged) == 1 and tagged[0] is next(c for c in cells if c.cell_type == "code")
    space = {}
    exec(tagged[0].source, space)  # our own file
    names = {f.name for f in dataclasses.fields(OccludeConfig)}
    assert names == {line.split(":")[0] for line in tagged[0].source.splitlines()}
    assert checked(OccludeConfig, {n: space[n] for n in names}) == OccludeConfig()


def test_the_notebook_occludes_a_folder(photos, tmp_path):
    notebook = run(tmp_path, images=str(photos), area=0.3, number=2, limit=3, angle=45, position="0.5,0.5")
    info = read_info(tmp_path / "run")
    assert len(info) == 3 and (info.area == 0.3).all() and (info.angle == "45.0").all() and (info.position == "0.5,0.5").all() and len(tree(tmp_path / "run")) == 7
    shown = [o.data for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    assert sum("image/png" in data for data in shown) == 1 and any("asked" in data.get("text/html", "") for data in shown)


def test_the_notebook_can_be_run_again_in_the_same_kernel(photos, tmp_path):
    notebook = nbformat.read(OCCLUDE, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    values = nbformat.v4.new_code_cell(f"images, limit, out = {str(photos)!r}, 2, {str(tmp_path / 'run')!r}")
    again = [nbformat.v4.new_code_cell(c.source) for c in code[1:]]
    notebook.cells = [code[0], values, *code[1:], values.copy(), *again]
    NotebookClient(notebook, kernel_name="python3", timeout=600).execute()


@pytest.mark.parametrize("given, words", [
    (dict(limit="many"), "limit is 'many', a str; allowed is int | None"), (dict(area="0.3"), "allowed is float"), (dict(area=30), "above 0, below 1"),
    (dict(rule="squared"), "Allowed: keep, published"), (dict(occluder="embedded"), "did you mean 'occluders'"), (dict(mixed="yes"), "allowed is bool"),
    (dict(position="left"), "'left' is no place"), (dict(position="0.5,2"), "outside of the image"), (dict(angle="flat"), "allowed is float | None"),
])
def test_wrong_values_name_the_remedy(given, words):
    with pytest.raises(InputError) as error:
        checked(OccludeConfig, given)
    assert words in str(error.value)


def test_the_sources_of_a_run(photos):
    assert source_images(OccludeConfig(images=str(photos))) == str(photos)
    for wrong, words in ((dict(images="shape9"), "did you mean 'shapes9'"), (dict(images=str(photos), root="x"), "Leave root out"), (dict(images=str(photos / "no")), "unknown data set, and no folder")):
        with pytest.raises(InputError) as error:
            source_images(OccludeConfig(**wrong))
        assert words in str(error.value)
    assert run_folder_for("occlude", OccludeConfig()) != run_folder_for("occlude", OccludeConfig(area=0.3))
