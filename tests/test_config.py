"""A configuration is complete, checked and named by what decides the result."""
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchmix_repro.batches import mixer_for
from patchmix_repro.config import CHOICES, PLACE, RECIPES, TrainConfig, config_from, identity, recipe_for, run_folder, run_id, train_config, varied
from patchmix_repro.core import InputError


def test_the_official_recipes():
    "Learning rate, epochs, drop path and average as in the three repositories (facts sheet, section 2)."
    tiny, small = recipe_for("convnext", "paper"), recipe_for("convnext_s", "paper")
    assert (tiny["lr"], tiny["batch_size"], tiny["epochs"], tiny["warmup_epochs"]) == (4e-3, 4096, 300, 20)
    assert (tiny["drop_path"], small["drop_path"], tiny["layer_scale"], tiny["ema_decay"]) == (0.1, 0.4, 1e-6, 0.9999)
    swin = recipe_for("swin_s", "paper")
    assert (swin["lr"], swin["batch_size"], swin["clip_grad"], swin["drop_path"], swin["min_lr"]) == (1e-3, 1024, 5.0, 0.3, 1e-5)
    deit = recipe_for("deit", "paper")
    assert (deit["lr"], deit["batch_size"], deit["warmup_epochs"], deit["drop_path"]) == (1e-3, 1024, 5, 0.1)
    for recipe in (tiny, swin, deit):
        assert (recipe["weight_decay"], recipe["mixup_alpha"], recipe["cutmix_alpha"], recipe["label_smoothing"]) == (0.05, 0.8, 1.0, 0.1)
        assert (recipe["augmentation"], recipe["erase"]) == ("rand-m9-mstd0.5-inc1", 0.25)


@pytest.mark.parametrize("model", CHOICES["model"])
@pytest.mark.parametrize("scale", CHOICES["scale"])
def test_every_model_and_scale_is_complete(model, scale):
    config = train_config(model=model, scale=scale)
    assert all(getattr(config, name) is not None for name in RECIPES["mini"])


def test_the_learning_rate_follows_the_batch():
    assert train_config(model="convnext", scale="paper", batch_size=1024).lr == pytest.approx(1e-3)
    assert train_config(model="convnext", scale="paper", batch_size=1024, lr=0.5).lr == 0.5


@pytest.mark.parametrize("given, words", [
    (dict(modle="swin"), "did you mean 'model'"),
    (dict(model="convnex"), "did you mean 'convnext'"),
    (dict(data="shape9"), "did you mean 'shapes9'"),
    (dict(scale="tiny"), "mini, small, paper"),
    (dict(mixing=None), "str"),
    (dict(mixing="cutmix"), "none, timm, patch, switch"),
    (dict(ratio=-0.1), "0 to 1"), (dict(ratio=1.01), "0 to 1"), (dict(ratio=float("nan")), "float"),
    (dict(epochs=0), "from 1"), (dict(epochs=2.0), "int"), (dict(seed=True), "int"), (dict(batch_size="64"), "int"),
    (dict(lr=0.0), "above 0"), (dict(drop_path=1.0), "below 1"), (dict(crop=0.0), "above 0"),
    (dict(grid=9), "grid 9 does not divide the 56 px"), (dict(grid=[7, 9]), "grid 9"), (dict(grid=0), "does not divide"), (dict(grid=()), "at least one"),
    (dict(resume="yes"), "bool"), (dict(precision="half"), "float32, bfloat16"), (dict(recipe="swim"), "did you mean 'swin'"),
    (dict(augmentation="flip"), "timm policy"), (dict(patch_share=1.5), "0 to 1"), (dict(per_image=1), "bool"),
    (dict(mixing="timm", patch_share=0.5), "changes nothing"), (dict(mixing="none", per_image=False), "changes nothing"),
    (dict(epochs=3, warmup_epochs=3), "never reaches the peak"), (dict(lr=1e-3, min_lr=1e-2), "lies above lr"),
])
def test_impossible_values_name_the_remedy(given, words):
    with pytest.raises(InputError) as error:
        train_config(**given)
    assert words in str(error.value)


def test_equal_numbers_give_equal_names():
    assert run_id(train_config(ratio=1, clip_grad=5)) == run_id(train_config(ratio=1.0, clip_grad=5.0))


def test_a_short_training_keeps_a_short_warmup():
    assert train_config(scale="paper", epochs=10).warmup_epochs == 5 and train_config(epochs=1).warmup_epochs == 0


def test_a_later_field_leaves_old_names_alone():
    assert "warmup_prefix" not in identity(train_config()) and identity(train_config(scale="paper"))["warmup_prefix"] is True


def test_an_open_choice_is_another_run_and_says_so():
    usual = run_id(train_config())
    for changed, words in (({"grid": (7, 14)}, "grid=(7, 14)"), ({"per_image": False}, "per_image=False"), ({"patch_share": 0.5}, "patch_share=0.5"), ({"label_smoothing": 0.0}, "label_smoothing=0.0")):
        config = train_config(**changed)
        assert run_id(config) != usual and varied(identity(config)) == words
    assert not {"per_image", "patch_share"} & set(identity(train_config())) and varied(identity(train_config(seed=3, epochs=2))) == ""


def test_papermill_gives_several_grids_as_words():
    assert config_from({"grid": "7, 14"}).grid == (7, 14) and config_from({"grid": "14"}).grid == train_config(grid=[14]).grid == 14
    with pytest.raises(InputError, match="several, such as 7,14"):
        config_from({"grid": "7;14"})


def test_one_mask_for_the_whole_batch():
    plans = [mixer_for(train_config(mixing="patch", per_image=each), 9).draw((8, 3, 56, 56), torch.Generator().manual_seed(0)) for each in (True, False)]
    distinct = [len(plan.mask.expand(8, -1).unique(dim=0)) for plan in plans]
    assert distinct[0] > 1 and distinct[1] == 1


@pytest.mark.parametrize("share", [0.0, 1 / 3, 0.5, 1.0])
def test_the_share_of_the_switch(share):
    "Patch Mixing gets its share of the batches, within four standard errors; the other two share the rest alike."
    mixer, n = mixer_for(train_config(patch_share=share), 9), 900
    assert sum(mixer.weights) == pytest.approx(1) and mixer.weights[0] == mixer.weights[1]
    drawn = [type(mixer.draw((2, 3, 56, 56), torch.Generator().manual_seed(k))).__name__ for k in range(n)]
    assert abs(drawn.count("PatchPlan") / n - share) <= 4 * (share * (1 - share) / n) ** 0.5
    assert share < 1 or set(drawn) == {"PatchPlan"}


def test_the_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        train_config().seed = 1


@given(seed=st.integers(0, 10**6), ratio=st.floats(0, 1), out=st.text(max_size=5), resume=st.booleans(), workers=st.integers(0, 64))
def test_the_name_ignores_places_and_nothing_else(seed, ratio, out, resume, workers):
    here = train_config(seed=seed, ratio=ratio)
    there = train_config(seed=seed, ratio=ratio, out=out, resume=resume, workers=workers)
    assert run_id(here) == run_id(there) and identity(here) == identity(there)
    assert run_id(here) != run_id(train_config(seed=seed + 1, ratio=ratio))


def test_every_field_is_in_the_hash_or_declared_a_place():
    fields = {f.name for f in dataclasses.fields(TrainConfig)}
    unlike_old_runs = dict(model="deit", test_images=9, warmup_prefix=True, remixer=True, labels="dense:run", kappa_lr=2.0, token_labels=True, token_weight=1.0, per_image=False, patch_share=0.5)
    assert set(identity(train_config(**unlike_old_runs))) == fields - set(PLACE)
    assert not {"remixer", "labels", "distance", "kappa_lr", "token_labels", "token_weight"} & set(identity(train_config()))


def test_out_decides_the_folder(tmp_path):
    assert run_folder(train_config(out=str(tmp_path))) == tmp_path
    assert run_folder(train_config()).parts[-2:] == ("runs", run_id(train_config()))


def test_a_notebook_namespace():
    namespace = {"model": "swin", "seed": 3, "In": ["x"], "Out": {}, "_": 1, "_oh": {}, "exit": print, "pd": pytest, "__name__": "__main__"}
    assert config_from(namespace) == train_config(model="swin", seed=3)
    for wrong in ("convnext", {"a": 1}, ("a",), 3):
        with pytest.raises(InputError, match="unknown parameter 'modle'; did you mean 'model'"):
            config_from(namespace | {"modle": wrong})
    with pytest.raises(InputError, match="model is {'a': 1}, a dict"):
        config_from(namespace | {"model": {"a": 1}})
