"Figures of issue B: the right numbers in the right panel; and every results page, on a full, a thin and an empty store."
import itertools
import json
from pathlib import Path
from xml.etree import ElementTree

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import simulated
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmix_repro import curves, store
from patchmix_repro.battery import published_sets
from patchmix_repro.claims import load_battery, on_curve
from patchmix_repro.core import InputError
from patchmix_repro.ledger import CURVES, curve
from patchmix_repro.plots import MIXING_LINE, MODEL_COLOUR
from patchmix_repro.ranks import load_selectivity, robustness
from patchmix_repro.stats import mean_interval

PAGES = Path(__file__).resolve().parents[1] / "nbs" / "results"
NAMES = ["accuracies", "drop", "examples", "heatmaps", "originals", "permutation", "replacement", "selectivity_robustness", "selectivity_table", "teaser"]
FIXED = ["pretrained", "fewer_masks"]  # pages with records of their own kinds
SHEETS = ["teaser_train", "teaser_test", "patch_mixing", "replacement", "permutation", "drop", "smd", "rod"]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = simulated.fill(tmp_path_factory.mktemp("store"))
    store.append(simulated.sheets(SHEETS), folder)
    return folder


@pytest.fixture(scope="module")
def battery(folder):
    return load_battery(folder, "shapes9", "mini")


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


# curves
def test_the_left_panel_is_the_ledger_and_the_right_one_the_records(battery):
    figure, table = curves.condition_curves(curve("drop-14"), on_curve(battery, "drop-14"), CURVES["drop-14"], "here")
    left, right = figure.axes
    swin = [line for line in left.lines if line.get_color() == MODEL_COLOUR["swin"] and line.get_linestyle() == MIXING_LINE["switch"]]
    assert len(swin) == 1
    np.testing.assert_allclose(swin[0].get_ydata(), [81.3, 80.2, 77.6, 72.4, 58.6])
    assert len(left.lines) == 8 and len(right.lines) == 6
    deit = next(line for line in right.lines if line.get_color() == MODEL_COLOUR["deit"] and line.get_linestyle() == MIXING_LINE["timm"])
    values = battery.query("model == 'deit' and mixing == 'timm' and condition == 'drop-14-80-black-random'")["accuracy"]
    assert deit.get_ydata()[-1] == pytest.approx(100 * values.mean())
    row = table.query("source == 'measured' and model == 'deit' and mixing == 'timm' and x == 80").iloc[0]
    assert row[["estimate", "low", "high", "seeds"]].tolist() == pytest.approx(list(mean_interval(values)))
    assert [label.get_text() for label in right.get_xticklabels()] == ["0", "20", "40", "60", "80"]


def test_labels_are_direct_and_the_small_networks_are_thin(battery):
    figure, _ = curves.condition_curves(curve("replacement-14"), on_curve(battery, "replacement-14"))
    assert {"ConvNeXt-T Patch Mixing 52.3", "Swin-T Original 47.2"} <= set(texts(figure)) and not [text for text in texts(figure) if "-S " in text]
    widths = {line.get_color(): line.get_linewidth() for line in figure.axes[0].lines}
    assert widths[MODEL_COLOUR["swin_s"]] < widths[MODEL_COLOUR["swin"]]
    assert "ConvNeXt-S Original: 33.5 %" in figure.get_label()


def test_kept_starts_at_one_hundred(battery):
    figure, table = curves.condition_curves(curve("permutation"), on_curve(battery, "permutation"), value="kept")
    assert np.allclose(table.query("x == 0")["estimate"], 1) and table["x"].unique().tolist() == [0, 4, 16, 64, 196]
    assert all(line.get_xdata().max() < 4.2 for line in figure.axes[0].lines)  # equal steps


def test_one_seed_has_no_interval(battery):
    table = curves.side_by_side(curve("drop-14"), on_curve(battery, "drop-14").query("train_seed == 0"))
    assert table.query("source == 'measured'")["low"].isna().all()
    assert curves.curve_table(table)["80"].str.contains("one seed").sum() == 6


def test_the_error_of_a_reading_is_its_interval():
    table = curves.side_by_side(curve("permutation"), pd.DataFrame(columns=["model", "mixing", "training", "x", "accuracy"]))
    row = table.query("network == 'Swin-T Original' and x == 16").iloc[0]
    assert (row["low"], row["high"]) == pytest.approx((0.737, 0.745)) and len(table) == 40


@settings(max_examples=20)
@given(st.permutations(range(24)))
def test_the_order_of_the_rows_does_not_matter(order):
    rows = pd.DataFrame([{"model": m, "mixing": "timm", "training": "Original", "train_seed": s, "x": float(x), "accuracy": 0.01 * x + 0.1 * s}
                         for m, s, x in itertools.product(("swin", "deit"), (0, 1, 2), (0, 20, 40, 80))])
    key = ["source", "network", "x"]
    one, other = (curves.side_by_side(curve("drop-14"), r).sort_values(key, ignore_index=True) for r in (rows, rows.iloc[list(order)]))
    pd.testing.assert_frame_equal(one, other)


# scatter
def test_every_network_is_a_dot(folder, battery):
    pairs = robustness(battery, load_selectivity(folder, "shapes9", "mini"))
    figure, table = curves.scatter_selectivity(pairs, "here")
    dots = [(x, y) for line in figure.axes[0].lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
    assert sorted(dots) == sorted(zip(pairs["selectivity"], 100 * pairs["robustness"], strict=True))
    open_ones = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"]
    assert len(open_ones) == 3 and f"Spearman {table['estimate'][0]:.2f}" in figure.get_label()


# pictures
@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 1000))
def test_a_strip_gives_its_images_back(n, side, seed):
    images = torch.randint(256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(curves.unstrip(curves.strip(images)), images)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, 4, 4), torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_a_strip_needs_square_pictures(wrong):
    with pytest.raises(InputError, match="n 3 s s"):
        curves.strip(wrong)


def test_a_sheet_needs_its_record(folder):
    images, captions = curves.read_sheet(folder, "smd", "shapes9")
    assert images.shape == (8, 3, 16, 16) and captions[3] == "smd 3"
    assert curves.read_sheet(folder, "rod_published", "shapes9") is None and curves.read_sheet(folder, "smd", "rod") is None
    assert "not measured yet" in curves.draw_sheet(folder, "rod_published", "rod")[0].get_label()


def test_nothing_is_written_without_a_folder(tmp_path, battery):
    drawn = curves.kind_lines(battery, "here")
    assert curves.keep(drawn, "a", None) is drawn[1] and not list(tmp_path.iterdir())
    curves.keep(drawn, "a", tmp_path)
    tree = ElementTree.parse(tmp_path / "a.svg")
    assert "pasted occluders" in next(tree.iter("{http://purl.org/dc/elements/1.1/}description")).text
    assert len(pd.read_csv(tmp_path / "a.csv")) == 6 * 3


# pages
def run(name, capsys, **parameters):
    "A page's code in one namespace, with these parameters; what it prints, and what it leaves."
    cells = [cell for cell in nbformat.read(PAGES / f"{name}.ipynb", as_version=4).cells if cell.cell_type == "code"]
    tagged, space = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])], {}
    assert tagged == cells[:1]
    exec(tagged[0].source, space)
    assert set(parameters) <= set(space) >= {"results", "figures"}
    space |= {} if name in FIXED else {other: "shapes9" for other in ("data", "beside") if other in space}
    space |= parameters
    for cell in cells[1:]:
        exec(cell.source, space)
    return capsys.readouterr().out, space


@pytest.mark.parametrize("name", NAMES)
def test_a_page_on_a_full_store(name, folder, tmp_path, capsys):
    printed, space = run(name, capsys, results=str(folder), figures=str(tmp_path))
    assert "not measured yet" not in printed
    assert all(path.with_suffix(".csv").is_file() for path in tmp_path.glob("*.svg")) and (list(tmp_path.glob("*.svg")) or name == "accuracies")
    if "claims" in space:
        assert all(claim.text in printed for claim in space["claims"])
        assert len(space["table"]) == len(space["claims"]) and set(space["table"]["verdict"]) <= {"seen", "contradicted", "not decided", "not testable here"}


@pytest.mark.parametrize("name", NAMES)
def test_a_page_on_a_store_with_nothing_to_show(name, tmp_path, capsys):
    store.append(simulated.battery("swin", "timm", 0, data="another"), tmp_path)
    printed, space = run(name, capsys, results=str(tmp_path))
    if "claims" in space:
        assert printed.count("not measured yet") >= len(space["claims"])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("teaser", "examples")])
def test_a_page_on_a_store_with_a_few_records(name, tmp_path, capsys):
    simulated.fill(tmp_path, [("convnext", mixing, seed) for mixing in ("timm", "switch") for seed in range(2)] + [("deit", "timm", 0)])
    printed, space = run(name, capsys, results=str(tmp_path))
    if name == "replacement":
        assert {"not measured yet", "seen"} <= set(space["table"]["verdict"])


@pytest.mark.parametrize("name", FIXED)
def test_a_page_of_its_own_kind_shows_the_published_records_or_says_what_lacks(name, tmp_path, capsys):
    run(name, capsys, figures=str(tmp_path / "figures"))
    shown = [json.dumps(pd.read_csv(path).to_dict()) for path in (tmp_path / "figures").glob("*.csv")]
    assert len(shown) == {"pretrained": 2, "fewer_masks": 1}[name] and "squeezenet" in "".join(shown)
    store.append(simulated.battery("swin", "timm", 0, data="another"), tmp_path / "store")
    _, space = run(name, capsys, results=str(tmp_path / "store"), figures=str(tmp_path / "empty"))
    assert not space["tables"] and all("not measured yet" in path.read_text() for path in (tmp_path / "empty").glob("*.svg"))


def test_the_published_sets_come_out_of_the_store(tmp_path, capsys):
    for name, data, correct, n in (("net", "smd", 30, 50), ("net", "smd", 400, 500), ("net", "rod", 9, 16), ("other", "imagenet", 41, 50), ("other", "caltech9", 50, 50)):
        store.append(simulated.published_set(name, data, correct, n), tmp_path)
    table = published_sets(tmp_path)
    assert list(table) == ["ImageNet val", "SMD", "ROD", "NVD"] and table.index.tolist() == ["net", "other"]
    assert table.loc["net"].tolist() == ["not measured yet", "80.0 [77.0, 83.0], n 500", "56.2 [53.2, 59.2], n 16", "not measured yet"]
    assert table.loc["other"].tolist() == ["82.0 [79.0, 85.0], n 50", *["not measured yet"] * 3]
    _, space = run("accuracies", capsys, results=str(tmp_path))
    assert space["published_sets"](space["folder"]).equals(table)
    store.append(simulated.battery("swin", "timm", 0), tmp_path / "other")
    assert published_sets(tmp_path / "other").eq("not measured yet").all(axis=None)


def test_how_the_maps_were_made_comes_out_of_the_record(tmp_path, capsys):
    found = simulated.explained(np.random.default_rng(0))
    images = pd.DataFrame({"id": [0, 1], "file": ["a", "b"], "correct": True, "name": "a, b", "author": "c", "licence": "d", "page": "e"})
    images = images.assign(**{reading + end: [0.1, 0.2] for reading in ("deletion", "insertion") for end in ("", "_chance", "_gauss")})
    config = {"name": "squeezenet", "data": "imagenet_ccby", "images": 2, "masks": 64, "grid": 5, "keep": 0.4, "method": "centred", "score": "logit", "steps": 9}
    store.append(store.new_record("rise", config, seed=0, data=simulated.MANIFEST, metrics={}, tables={"images": images}, attachments={"explained.npz": found}), tmp_path)
    printed, _ = run("pretrained", capsys, results=str(tmp_path))
    assert "2 photographs, 64 masks of 5 x 5 cells, each kept with 0.4; method centred, score logit; curves of 9 steps." in printed


def test_pages_read_records_and_the_ledger_only():
    for name in (*NAMES, *FIXED):
        text = json.dumps([cell.source for cell in nbformat.read(PAGES / f"{name}.ipynb", as_version=4).cells])
        assert not [word for word in ("load_model", "create_dataset", "create_model", "evaluate(", "rise(") if word in text], name
