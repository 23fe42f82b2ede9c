"The published numbers: complete, as the sources print them, and unable to be misread."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmix_repro import ledger
from patchmix_repro.backgrounds import VARIANTS
from patchmix_repro.core import InputError
from patchmix_repro.data import DATASETS
from patchmix_repro.ledger import CURVES, curve, network, published
from patchmix_repro.models import MODELS
from patchmix_repro.remixer_claims import paper_value
from patchmix_repro.smd import battery

PM = "Patch Mixing"
NETWORKS = [f"{family}-{size} {training}" for family in ("ConvNeXt", "Swin") for size in "TS" for training in ("Original", PM)]
PLACES = {"replacement-14": (0, 10, 20, 30, 40, 50), "replacement-7": (0, 10, 20, 30, 40, 50), "permutation": (0, 4, 16, 64, 196), "drop-14": (0, 20, 40, 60, 80)}


def value(table, row, column, paper=PM):
    rows = published(paper, table)
    return rows[rows["row"].eq(row) & rows["column"].eq(str(column))]["value"].item()


# totals
def test_every_curve_has_every_network_at_every_place_once():
    for name in CURVES:
        rows = published(PM, name)
        wanted = {(row, str(x)) for row in NETWORKS for x in PLACES[name]}
        assert len(rows) == len(wanted) and set(zip(rows["row"], rows["column"], strict=True)) == wanted
        assert rows["known"].eq("digitised").all() and rows["value"].between(10, 84).all()


def test_the_ledger_holds_these_tables_and_nothing_twice():
    rows = published()
    assert not rows.duplicated(["paper", "table", "row", "column"]).any()
    assert rows.groupby(["paper", "table"]).size().to_dict() == {
        (PM, "replacement-14"): 48, (PM, "replacement-7"): 48, (PM, "permutation"): 40, (PM, "drop-14"): 40, (PM, "drop-14-fine"): 8,
        (PM, "clean"): 8, (PM, "accuracies"): 24, (PM, "selectivity"): 8, (PM, "teaser"): 4,
        ("ReMixer", "1"): 90, ("ReMixer", "2"): 42, ("ReMixer", "3"): 12, ("ReMixer", "5"): 54, ("ReMixer", "6"): 6, ("ReMixer", "7"): 30,
        ("ConvNeXt", "clean"): 2, ("Swin", "clean"): 2, ("timm", "clean"): 4, ("NVD", "drop"): 8, ("NVD", "occlusion"): 22,
    }


# the means that the source prints beside its readings: T Original, T Patch Mixing, S Original, S Patch Mixing, for both families
MEANS = {
    "replacement-14": {"ConvNeXt": (60.7, 70.0, 60.4, 69.3), "Swin": (67.0, 70.7, 73.0, 77.3)},
    "replacement-7": {"ConvNeXt": (65.9, 70.9, 66.9, 70.6), "Swin": (56.8, 48.1, 67.3, 72.7)},
    "drop-14": {"ConvNeXt": (66.9, 75.1, 69.0, 75.1), "Swin": (72.6, 72.2, 74.8, 76.8)},
}


@pytest.mark.parametrize("table, family", [(table, family) for table in MEANS for family in MEANS[table]])
def test_the_readings_have_the_printed_means(table, family):
    rows = published(PM, table)
    for mean, row in zip(MEANS[table][family], [name for name in NETWORKS if name.startswith(family)], strict=True):
        mine = rows[rows["row"].eq(row) & rows["column"].ne("0")]["value"]
        assert abs(mine.mean() - mean) <= 0.075, row  # rounding of readings (0.025) and of the mean (0.05)


@pytest.mark.parametrize("table, row, column, expected", [
    ("replacement-14", "ConvNeXt-T Original", 50, 34.5), ("replacement-14", "ConvNeXt-T Patch Mixing", 50, 52.3),
    ("replacement-14", "Swin-S Original", 30, 76.85), ("replacement-14", "Swin-S Patch Mixing", 50, 66.6),
    ("replacement-7", "Swin-T Patch Mixing", 30, 43.6), ("replacement-7", "Swin-T Original", 30, 60.65), ("replacement-7", "ConvNeXt-S Original", 50, 46.8),
    ("permutation", "ConvNeXt-T Original", 196, 12.9), ("permutation", "ConvNeXt-S Patch Mixing", 196, 34.8), ("permutation", "Swin-T Original", 64, 62.15),
    ("drop-14", "ConvNeXt-S Original", 80, 51.2), ("drop-14", "Swin-T Patch Mixing", 80, 58.6), ("drop-14", "ConvNeXt-S Patch Mixing", 0, 83.05),
    ("drop-14-fine", "ConvNeXt-T Patch Mixing", 40, 79.21), ("drop-14-fine", "ConvNeXt-S Patch Mixing", 40, 79.2),
    ("clean", "Swin-S Patch Mixing", "plot at 0", 82.95), ("teaser", "training example", "cells of the donor", 18),
])
def test_spot_values(table, row, column, expected):
    assert value(table, row, column) == expected


def test_neighbours():
    assert value("clean", "Swin-T Original", "results-imagenet.csv", "timm") == 81.388
    assert value("clean", "Swin-S Original", "README", "Swin") == 83.2
    assert [value("drop", "ConvNeXt-S Original", x, "NVD") for x in (0, 25, 50, 75)] == [83.1, 80.2, 72.5, 55.8]
    assert value("occlusion", "Swin-S Original", "0.00", "NVD") == 0.185 and value("occlusion", "ConvNeXt-S Original", "-0.25", "NVD") == 0.945


# how sure
def test_a_reading_has_an_error_and_what_is_unknown_has_no_value():
    rows = published()
    assert set(rows["known"]) == set(ledger.KNOWN)
    unknown = rows["known"].eq("unknown")
    assert rows.loc[unknown, ["value", "error"]].isna().all(axis=None) and rows.loc[~unknown, ["value", "error"]].notna().all(axis=None)
    assert rows["known"].eq("digitised").eq(rows["error"].gt(0)).all() and rows["source"].ne("").all() and rows["unit"].ne("").all()


def test_the_rough_readings_say_so():
    rows = published(PM, "permutation")
    assert rows.groupby("column")["error"].max().to_dict() == {"0": 0.2, "4": 0.4, "16": 0.4, "64": 0.15, "196": 0.15}
    assert published(PM, "drop-14").query("row == 'ConvNeXt-S Patch Mixing' and column == '40'")["error"].item() == 0.2


def test_the_curve_that_was_plotted_twice_is_marked():
    rows = published(PM, "drop-14")
    marked = rows[rows["note"].ne("")]
    assert set(marked["row"]) == {"ConvNeXt-T Patch Mixing", "ConvNeXt-S Patch Mixing"} and set(marked["column"]) == {"20", "40", "60", "80"}
    tiny, small = (marked[marked["row"].str.startswith(f"ConvNeXt-{size}")]["value"].to_numpy() for size in "TS")
    assert np.abs(tiny - small).max() < 0.051
    others = rows[~rows["row"].isin(marked["row"]) & rows["column"].eq("80")]
    assert others["value"].is_unique


def test_an_original_network_has_the_accuracy_of_its_authors_at_zero():
    for paper in ("ConvNeXt", "Swin"):
        for row in published(paper, "clean").itertuples():
            assert abs(value("clean", row.row, "plot at 0") - row.value) <= 0.1


# curves
def slow_curve(table):
    "The kept share by loops over the rows."
    rows, found = published(PM, table), {}
    for row in rows.itertuples():
        clean = next(r.value for r in rows.itertuples() if r.row == row.row and r.column == "0")
        found[row.row, float(row.column)] = (row.value / 100 - 0.001) / (clean / 100 - 0.001)
    return found


@pytest.mark.parametrize("table", CURVES)
def test_kept_is_one_minus_the_drop_over_what_lies_above_chance(table):
    rows, slow = curve(table), slow_curve(table)
    names = rows["family"] + "-" + rows["size"] + " " + rows["training"]
    np.testing.assert_allclose(rows["kept"], [slow[key] for key in zip(names, rows["x"], strict=True)], rtol=1e-12)
    assert rows["model"].isin(["convnext", "convnext_s", "swin", "swin_s"]).all() and rows["mixing"].isin(["timm", "switch"]).all()


@settings(max_examples=25)
@given(st.sampled_from(list(CURVES)), st.integers(2, 5000))
def test_kept_is_one_at_zero_and_falls_with_more_classes_left_out(table, classes):
    rows = curve(table, classes)
    assert (rows.loc[rows["x"].eq(0), "kept"] == 1).all()
    assert (rows["kept"] <= rows["accuracy"] / rows.groupby(["model", "mixing"])["accuracy"].transform("first") + 1e-12).all()


# names
def test_names_of_networks():
    assert network("ConvNeXt-S Patch Mixing") == {"family": "ConvNeXt", "size": "S", "training": PM, "model": "convnext_s", "mixing": "switch"}
    for wrong in ("ConvNeXt-T", "ResNet-50 Original", "", "ConvNeXt-T original"):
        with pytest.raises(InputError, match="names no network"):
            network(wrong)


@pytest.mark.parametrize("given, word", [({"paper": "patch mixing"}, "did you mean 'Patch Mixing'"), ({"table": "dropp-14"}, "did you mean 'drop-14'"), ({"paper": "NVD", "table": "clean"}, "unknown table"), ({"paper": ""}, "unknown paper")])
def test_a_wrong_name_is_answered_with_the_right_ones(given, word):
    with pytest.raises(InputError, match=word):
        published(**given)


def test_the_frame_belongs_to_the_caller():
    rows = published(PM)
    rows["value"] = 0
    pd.testing.assert_frame_equal(published(PM).query("table == 'clean'").reset_index(drop=True), published(PM, "clean"))
    assert published(PM, "clean")["value"].min() == 81.2


# the measurement that answers a number
@pytest.mark.parametrize("paper, table, row, column, expected", [
    (PM, "replacement-14", "Swin-S Patch Mixing", "30", ("swin_s", "switch", "imagenet", "replace-14-30", "accuracy")),
    (PM, "replacement-7", "ConvNeXt-T Original", "0", ("convnext", "timm", "imagenet", "clean", "accuracy")),
    (PM, "permutation", "Swin-T Original", "196", ("swin", "timm", "imagenet", "permute-196", "accuracy")),
    (PM, "drop-14", "ConvNeXt-S Patch Mixing", "80", ("convnext_s", "switch", "imagenet", "drop-14-80-black-random", "accuracy")),
    (PM, "accuracies", "Swin-T Patch Mixing", "SMD", ("swin", "switch", "smd", "clean", "accuracy")),
    ("ReMixer", "1", "MLP-Mixer-S/16 + ReMixer (ReLabel)", "Only-BG-B gain", ("mixer", "remixer dense", "imagenet9", "only_bg_b", "gain")),
    ("ReMixer", "1", "ConvMixer-512/8", "BG-Gap", ("convmixer", "plain", "imagenet9", "bg_gap", "accuracy")),
    ("ReMixer", "2", "DeiT-S + ConViT + ReMixer (ReLabel)", "Mixed-Rand", ("convit", "remixer dense", "imagenet9", "mixed_rand", "accuracy")),
    ("ReMixer", "3", "ConvMixer-512/8", "Layer 2/4", ("convmixer", "remixer mask", "imagenet9", "quarter 2", "kappa")),
    ("ReMixer", "5", "DeiT-S + ReMixer (BigBiGAN)", "Sketch-9", ("deit", "remixer mask", "imagenet9", "sketch_9", "accuracy")),
    ("ReMixer", "6", "DeiT-B", "TL + ReMixer gain", ("deit_b", "remixer dense tokens", "imagenet", "test", "gain")),
    ("ReMixer", "7", "ConvMixer-512/8-Full", "Original", ("convmixer_full", "plain", "imagenet9", "original", "accuracy")),
])
def test_a_number_names_what_answers_it(paper, table, row, column, expected):
    rows = ledger.read()
    found = rows[rows["paper"].eq(paper) & rows["table"].eq(table) & rows["row"].eq(row) & rows["column"].eq(column)]
    assert tuple(found[["model", "training", "data", "condition", "metric"]].iloc[0]) == expected and len(found) == 1


def test_every_number_has_an_answer_that_the_library_knows():
    rows = ledger.read()
    asked = rows[rows["table"].ne("teaser")]
    assert asked[["model", "training", "data", "condition", "metric"]].ne("").all().all()
    assert set(asked["model"]) <= set(MODELS) and set(asked["data"]) <= set(DATASETS)
    named = {condition.name for condition in battery("paper")}
    mine = asked[asked["paper"].isin([PM, "ConvNeXt", "Swin", "timm"])]
    assert set(mine["condition"]) <= named
    assert set(asked.loc[asked["table"].isin(["1", "2", "7"]), "condition"]) <= {*VARIANTS, "bg_gap"}


def test_the_answers_are_those_of_the_claims():
    "Two independent ways from a recipe to its printed number agree."
    rows = ledger.read().query("paper == 'ReMixer' and table in ('1', '2', '3', '7') and metric != 'gain'")
    for row in rows.itertuples():
        scale = 1 if row.metric == "kappa" else 100
        assert np.isclose(scale * paper_value(row.model, row.training, row.condition), row.value), row
