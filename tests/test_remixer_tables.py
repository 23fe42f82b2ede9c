"ReMixer's tables: the paper's number beside ours, and every page on a full and on an empty store."
import gc
import json
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import simulated
import simulated_remixer as sim
from scipy.stats import t, ttest_ind

from patchmix_repro import remixer_tables as rt
from patchmix_repro import store
from patchmix_repro.challenge_runs import ChallengeConfig
from patchmix_repro.config import config_from, run_id
from patchmix_repro.label_sources import read_source
from patchmix_repro.ledger import published
from patchmix_repro.parameters import checked
from patchmix_repro.remixer_claims import WAY
from patchmix_repro.remixer_records import kappa_runs, remixer_runs, select, with_differences

PAGES = Path(__file__).resolve().parents[1] / "nbs" / "results"
NAMES = ["backgrounds", "kappa", "maps", "shifted", "tokens", "kernels", "appendix_c", "controls"]
PAIRS = rt.pairs_of(["deit", "mixer", "convmixer"], ["remixer mask", "remixer dense"])


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    "Figures are closed; statsmodels, which collects garbage at every correction, does not."
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "provenance", dict)
        folder = sim.fill(tmp_path_factory.mktemp("store"), range(3))
        store.append(simulated.sheets(["relevance", "backgrounds"]), folder)
        store.append(store.new_record("labeller", {"labels": "mask", "data": "shapes9"}, seed=0, data=sim.MANIFEST, metrics={"accuracy": 0.345, "images": 5040}), folder)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return with_differences(select(remixer_runs(folder), "shapes9", "mini"))


def test_cells_and_gains_by_hand(rows):
    table = rt.gains(rows, PAIRS, list(WAY)).set_index(["model", "recipe", "variant"])
    row = table.loc[("mixer", "remixer dense", "only_bg_b")]
    mine, base = (rows.query(f"model == 'mixer' and recipe == '{recipe}' and variant == 'only_bg_b'")["accuracy"].to_numpy() for recipe in ("remixer dense", "plain"))
    half = t.ppf(0.975, 2) * mine.std(ddof=1) / 3**0.5
    assert row[["estimate", "low", "high"]].tolist() == pytest.approx([mine.mean(), mine.mean() - half, mine.mean() + half])
    limits = ttest_ind(mine, base, equal_var=False).confidence_interval()
    assert row[["gain", "gain_low", "gain_high"]].tolist() == pytest.approx([mine.mean() - base.mean(), *limits])
    assert row[["paper", "paper_gain"]].tolist() == pytest.approx([0.2728, -0.1368]) and row["seeds"] == 3 and row["n"] == 5040


def test_the_papers_column_is_the_ledgers(rows):
    table = rt.gains(rows[:0], PAIRS, list(WAY))
    ledger = published("ReMixer", "1")
    assert 100 * table["paper"].sum() == pytest.approx(ledger.loc[~ledger["column"].str.endswith("gain"), "value"].sum())
    printed = ledger.loc[ledger["column"].str.endswith("gain"), "value"].sum()
    assert 100 * table["paper_gain"].sum() == pytest.approx(printed, abs=0.02)  # the one gap that is off by 0.01
    assert table[["estimate", "gain"]].isna().all(axis=None) and table["seeds"].eq(0).all()


def test_the_shown_table_says_what_has_not_run(rows):
    shown = rt.gain_table(rt.gains(rows, rt.pairs_of(["deit", "convit"], ["remixer mask"]), ["original", "sketch_9"]))
    assert shown.loc[("DeiT remixer mask", "gain"), "Original"].startswith("+") and shown.loc[("DeiT remixer mask", "paper's gain"), "sketch_9"] == "+0.67"
    assert shown.loc[("ConViT remixer mask", "measured"), "Original"] == "not run" and shown.loc[("ConViT remixer mask", "measured"), "seeds"] == 0


def test_one_seed_has_no_interval(rows):
    table = rt.gains(rows[rows["seed"].eq(0)], PAIRS[:2], ["original"])
    assert table["low"].isna().all() and table["estimate"].notna().all()
    assert "[" not in rt.gain_table(table).loc[("DeiT remixer mask", "gain"), "Original"]


def test_a_figure_has_a_dot_for_what_was_measured_and_a_cross_for_what_was_printed(rows):
    figure, table = rt.gain_figure(rt.gains(rows, PAIRS[:3], ["original"]), "here")
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    dots = [line.get_xdata()[0] for line in lines if line.get_marker() == "o"]
    crosses = [line.get_xdata()[0] for line in lines if line.get_marker() == "x"]
    assert dots == pytest.approx(100 * table["gain"]) and crosses == pytest.approx([1.19, 3.63])
    figure, table = rt.gain_figure(rt.gains(rows[:0], PAIRS[:1], ["original"]))
    assert table.empty and "not measured yet" in figure.get_label()


def test_kappa_is_drawn_by_layer(folder):
    kappa = kappa_runs(folder)
    figure, table = rt.kappa_figure(kappa[kappa["labels"].eq("mask")], "here")
    first = table.query("model == 'deit' and layer == 0").iloc[0]
    assert first["mean"] == pytest.approx(np.mean([sim.train("deit", "mask", seed)["tables"]["kappa"]["kappa"][0] for seed in range(3)])) and first["seeds"] == 3
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["DeiT", "MLP-Mixer", "ConvMixer"] and len(figure.axes[0].lines) == 3 + 1


def test_the_labellers_accuracy_comes_out_of_its_record(folder, tmp_path):
    assert rt.labeller_table(folder, "shapes9").loc["mask"].tolist() == ["34.5 %", 5040]
    for place, data in ((folder, "caltech9"), (tmp_path, "shapes9")):
        said, = rt.labeller_table(place, data)["accuracy"]
        assert said == f"not run: papermill nbs/challenge.ipynb out.ipynb -p measure labels -p labels SOURCE -p data {data} -p limit None"


def test_commands_name_what_lacks(rows):
    assert rt.missing_runs(rows, [side for side, _ in PAIRS], "shapes9", "mini") == ""
    said = rt.missing_runs(rows, [("deit", "remixer mask"), ("deit_b", "plain tokens")], "shapes9", "small", seeds=5).splitlines()
    assert said[0] == "not run: DeiT remixer mask on shapes9, small, seeds 3, 4:" and len(said) == 6
    assert said[1].endswith("-p model deit -p data shapes9 -p remixer True -p labels mask -p scale small -p mixing timm -p seed 3")
    assert "-p token_labels True -p labels dense:convnext_mini_original -p scale small" in said[4] and said[4].endswith("-p seed 0")
    assert len(rt.missing_runs(rows, [("deit_b", "plain tokens")], "shapes9", "small", measure="").splitlines()) == 2
    assert len(rt.missing_runs(rows, [("deit", "plain")], "shapes9", "small", seeds=5, measure="shifted").splitlines()) == 2  # no shifted set has its classes
    assert "-p measure shifted" in rt.missing_runs(rows[:0], [("deit", "plain")], "caltech9", "small", measure="shifted")


def arguments(command):
    words = command.split(" -p ")
    return words[0].split()[1], dict(word.split(" ") for word in words[1:])


@pytest.mark.parametrize("recipe, labels, tested", [
    ("plain", None, None), ("remixer mask", "mask", None), ("remixer dense", "dense:convnext_mini_original", None), ("remixer shuffled", "shuffled:mask", None),
    ("remixer dense tokens", "dense:convnext_mini_original", None), ("plain tokens", "dense:convnext_mini_original", None), ("remixer constant trained on mask", "mask", "constant"),
])
def test_commands_run_as_they_stand(rows, recipe, labels, tested):
    "papermill's parameters over the notebooks' own cells: a configuration of each, and the name of the run."
    train, challenge = rt.missing_runs(rows[:0], [("deit", recipe)], "shapes9", "mini").splitlines()[1:]
    configs = []
    for (notebook, given), check in ((arguments(train), config_from), (arguments(challenge), partial(checked, ChallengeConfig))):
        cell = next(c for c in nbformat.read(PAGES.parents[1] / notebook, as_version=4).cells if "parameters" in c.metadata.get("tags", []))
        exec(cell.source, space := {})  # our own file
        configs.append(check({**{k: v for k, v in space.items() if k not in ("__builtins__", "__annotations__")}, **{k: {"True": True, "None": None}.get(v, int(v) if v.isdigit() else v) for k, v in given.items()}}))
    trained, measured = configs
    assert trained.labels == (labels or "none") and trained.remixer == recipe.startswith("remixer") and trained.token_labels == recipe.endswith("tokens")
    assert measured.model == run_id(trained) and measured.limit is None and measured.labels == (tested or "auto")
    if labels:
        read_source(trained.labels)


# pages
def run(name, capsys, **parameters):
    cells = [cell for cell in nbformat.read(PAGES / f"remixer_{name}.ipynb", as_version=4).cells if cell.cell_type == "code"]
    space = {}
    exec(cells[0].source, space)
    assert "parameters" in cells[0].metadata["tags"] and {"data", "scale", "results", "figures", "labels"} <= set(space)
    space |= {"data": "shapes9", "scale": "mini"} | parameters
    for cell in cells[1:]:
        exec(cell.source, space)
    return capsys.readouterr().out, space


@pytest.mark.parametrize("name", NAMES)
def test_a_page_on_a_full_store(name, folder, tmp_path, capsys):
    printed, space = run(name, capsys, results=str(folder), figures=str(tmp_path) if name in ("kappa", "kernels", "maps") else None)
    assert all(claim.text in printed for claim in space["claims"]) and len(space["table"]) == len(space["claims"])
    assert set(space["table"]["verdict"]) & {"seen", "not decided"} and len(list(tmp_path.glob("*.svg"))) == len(list(tmp_path.glob("*.csv"))) == (name in ("kappa", "kernels", "maps"))
    if name not in ("maps", "shifted", "tokens"):
        assert "not measured yet" not in printed and not [line for line in printed.splitlines() if "not run" in line and " on caltech9, small" not in line]


@pytest.mark.parametrize("name", NAMES)
def test_a_page_on_a_store_with_nothing_to_show(name, tmp_path, capsys):
    store.append(simulated.battery("swin", "timm", 0, data="another"), tmp_path)
    printed, space = run(name, capsys, results=str(tmp_path))
    assert printed.count("not measured yet") >= len(space["claims"]) and "papermill nbs/train.ipynb" in printed


def test_pages_read_records_and_the_ledger_only():
    for name in NAMES:
        text = json.dumps([cell.source for cell in nbformat.read(PAGES / f"remixer_{name}.ipynb", as_version=4).cells])
        assert not [word for word in ("load_model", "create_dataset", "create_model", "evaluate(", "relevance(") if word in text], name


def test_a_verdict_belongs_to_one_data_set_and_scale(folder, capsys):
    printed, space = run("backgrounds", capsys, results=str(folder), scale="small")
    assert set(space["table"]["verdict"]) == {"not measured yet"} and "shapes9, scale small: not measured yet" in printed
    assert isinstance(space["table"], pd.DataFrame)
