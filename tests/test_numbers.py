"""Published numbers beside measured ones: joined right, computed right, and never made up."""
import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from patchmix_repro import store
from patchmix_repro.core import project_root
from patchmix_repro.ledger import read
from patchmix_repro.numbers import beside, number_table

RESULTS = project_root() / "results"


@pytest.fixture(scope="module")
def numbers():
    return beside(RESULTS, "shapes9", "mini")


def pick(numbers, paper, table, row, column):
    found = numbers[numbers["paper"].eq(paper) & numbers["table"].eq(table) & numbers["row"].eq(row) & numbers["column"].eq(column)]
    assert len(found) == 1
    return found.iloc[0]


def student(values):
    "Mean and t interval, from the formula."
    values = np.asarray(values, float)
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), values.mean() - half, values.mean() + half


@pytest.mark.parametrize("row, model, mixing", [("ConvNeXt-T Original", "convnext", "timm"), ("Swin-T Patch Mixing", "swin", "switch")])
@pytest.mark.parametrize("column, condition", [("0", "clean"), ("50", "replace-14-50")])
def test_a_number_is_the_mean_of_its_images_rows(numbers, row, model, mixing, column, condition):
    records = store.read(RESULTS, kind="battery")
    mine = records[records["config.data"].eq("shapes9") & records["config.model"].eq(model) & records["config.mixing"].eq(mixing)]
    images = store.read_table(RESULTS, "images", kind="battery")
    shares = images[images["run_id"].isin(mine["run_id"])].groupby("run_id")[condition].mean()
    found = pick(numbers, "Patch Mixing", "replacement-14", row, column)
    assert found.seeds == len(mine) and set(found.runs.split(", ")) == set(mine["run_id"])
    assert np.allclose([found.measured, found.low, found.high], 100 * np.array(student(shares)))


def test_a_gain_is_the_difference_of_two_cells(numbers):
    for name, column in (("DeiT-S + ReMixer (BigBiGAN)", "Original"), ("ConvMixer-512/8 + ReMixer (BigBiGAN)", "Mixed-Rand")):
        gain, cell, plain = (pick(numbers, "ReMixer", "1", row, which) for row, which in ((name, f"{column} gain"), (name, column), (name.partition(" +")[0], column)))
        assert np.isclose(gain.measured, cell.measured - plain.measured) and gain.low < gain.measured < gain.high


def test_every_published_number_is_there_once_and_unchanged(numbers):
    pd.testing.assert_frame_equal(numbers[read().columns.tolist()], read())


def test_what_was_not_measured_is_no_number(tmp_path):
    (tmp_path / "store").mkdir()
    empty = beside(tmp_path / "store", "shapes9", "mini")
    assert empty[["measured", "low", "high"]].isna().all().all() and empty["seeds"].eq(0).all()
    words = number_table(empty)["measured"]
    assert words.str.fullmatch("not run(: the last layer gets no gradient)?|data not at hand|on its own page").all() and words.eq("not run").sum() > 200
    assert empty.loc[empty["condition"].eq("sketch_9"), "lacks"].eq("data not at hand").all()
    assert beside(tmp_path / "store", "imagenet9", "small").query("condition == 'sketch_9'")["lacks"].eq("not run").all()


def test_networks_without_a_sibling_stay_open(numbers):
    assert numbers.loc[numbers["model"].isin(["convnext_s", "swin_s"]), "measured"].isna().all()
    assert numbers.loc[numbers["data"].isin(["smd", "rod", "nvd"]), "measured"].isna().all(), "another data set answers for SMD, ROD or NVD"
