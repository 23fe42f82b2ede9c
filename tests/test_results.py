"""What is published can be read, recounted and used."""
import json
from pathlib import Path

import pytest

from patchmix_repro import store
from patchmix_repro.data import create_dataset
from patchmix_repro.evaluation import accuracy, evaluate
from patchmix_repro.training import load_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
CHECKPOINTS = sorted(p.parent for p in RESULTS.glob("checkpoints/*/model.json"))


def test_every_part_is_whole():
    assert store.verify(RESULTS).empty
    strangers = [p for p in RESULTS.rglob("*") if p.is_file() and p.suffix not in {".parquet", ".json", ".safetensors", ".md"}]
    assert not strangers


def test_metrics_are_those_of_the_rows():
    records = store.read(RESULTS, "train").set_index("run_id")
    images, history = store.read_table(RESULTS, "images"), store.read_table(RESULTS, "history")
    for run_id, record in records.iterrows():
        rows = images[images.run_id.eq(run_id)]
        assert len(rows) == record["metrics.test_images"] == rows.file.nunique()
        assert rows.correct.mean() == pytest.approx(record["metrics.test_top1"])
        assert rows.correct.eq(rows.label.eq(rows.prediction)).all()
        assert len(history[history.run_id.eq(run_id)]) == record["config.epochs"]


def test_runs_that_are_compared_share_their_data_and_recipe():
    records = store.read(RESULTS, "train")
    for (_, model), group in records[records["config.data"].eq("caltech9")].groupby(["config.data", "config.model"]):
        free = {"config.mixing", "config.seed"}
        same = [c for c in group if c.startswith(("config.", "data.")) and c not in free and group[c].map(str).nunique() > 1]
        assert not same, f"{model}: {same} differ"


def test_the_first_runs_have_three_seeds():
    records = store.read(RESULTS, "train")
    caltech = records[records["config.data"].eq("caltech9") & records["config.model"].isin(["convnext", "deit"])]
    seeds = caltech.groupby(["config.model", "config.mixing"]).seed.nunique()
    assert len(seeds) == 6 and seeds.min() >= 3


def test_two_networks_ship():
    mixings = {json.loads((p / "model.json").read_text())["config"]["mixing"] for p in CHECKPOINTS}
    assert len(CHECKPOINTS) == 2 and "switch" in mixings and len(mixings) == 2


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda p: p.name)
def test_a_shipped_network_scores_what_its_card_says(folder):
    model, card = load_model(folder)
    assert (folder / "model.safetensors").stat().st_size < 1_100_000
    found = accuracy(evaluate(model, create_dataset(card["config"]["data"], "test", card["size"]))).loc["top1"]
    assert found.n == card["test_images"] and found.estimate == pytest.approx(card["test_top1"], abs=0.003)
    assert f"{100 * card['test_top1']:.1f} [" in (folder / "README.md").read_text()


def records_of(kind):
    "The published records of a kind; the test is skipped while there are none."
    records = store.read(RESULTS)
    found = records[records["kind"].eq(kind)].set_index("run_id")
    if found.empty:
        pytest.skip(f"no record of kind {kind} is published")
    return found


def test_a_battery_can_be_recounted():
    records = records_of("battery")
    conditions, images = (store.read_table(RESULTS, name, "battery") for name in ("conditions", "images"))
    for run_id, table in conditions.groupby("run_id"):
        rows, table = images[images.run_id.eq(run_id)], table.set_index("condition")
        counted = rows[list(table.index)].astype(bool).mean()
        assert table.accuracy.to_dict() == pytest.approx(counted.to_dict()) and table.n.eq(len(rows)).all() and rows.id.is_unique
        assert table["drop"].to_dict() == pytest.approx((counted["clean"] - counted).to_dict())
        assert records["metrics.clean"][run_id] == pytest.approx(counted["clean"])


def test_selectivity_is_the_mean_of_its_images():
    records, images = records_of("selectivity"), store.read_table(RESULTS, "images", "selectivity")
    for run_id, rows in images.groupby("run_id"):
        assert rows["mass"].mean() == pytest.approx(records["metrics.mass"][run_id]) and rows["share"].between(0, 1, inclusive="neither").all()


def test_networks_that_are_compared_saw_the_same_images():
    records = records_of("battery")
    for _, group in records.groupby(["config.data", "config.scale", "config.size"]):
        assert group["config.seed"].nunique() == group["config.conditions"].map(str).nunique() == 1


def test_every_figure_has_the_table_behind_it():
    pictures = sorted((ROOT / "figures").glob("*.svg"))
    assert pictures and all(p.with_suffix(".csv").is_file() for p in pictures)
