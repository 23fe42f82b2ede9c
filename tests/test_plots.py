"Figures: the right numbers behind them, the same bytes again, labels apart, wrong tables refused."
import colorsys
import itertools
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from patchmix_repro import plots
from patchmix_repro.core import InputError
from patchmix_repro.stats import mean_interval


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def history():
    "Two models, two seeds, three epochs: accuracy = 0.1 epoch + 0.02 seed + 0.3 for swin."
    rows = itertools.product(("convnext", "swin"), (0, 1), (3, 1, 2))
    return pd.DataFrame([
        {"run_id": f"{m}-{s}", "model": m, "mixing": "switch", "seed": s, "epoch": e, "val_accuracy": 0.1 * e + 0.02 * s + 0.3 * (m == "swin")}
        for m, s, e in rows
    ])


def accuracies():
    values = {("convnext", "none"): [0.5, 0.6, 0.7], ("convnext", "patch"): [0.65, 0.7], ("mixer", "none"): [0.4]}
    return pd.DataFrame([{"model": m, "mixing": x, "seed": i, "accuracy": v} for (m, x), vs in values.items() for i, v in enumerate(vs)])


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


# learning curves
def test_the_curve_is_the_mean_and_the_band_the_range():
    figure, table = plots.learning_curves(history())
    row = table[table["model"].eq("swin") & table["epoch"].eq(2)].iloc[0]
    assert row[["mean", "low", "high", "seeds"]].tolist() == pytest.approx([0.51, 0.5, 0.52, 2])
    line = next(line for line in figure.axes[0].lines if line.get_color() == plots.MODEL_COLOUR["swin"])
    np.testing.assert_allclose(line.get_xydata(), [[1, 0.41], [2, 0.51], [3, 0.61]])
    assert line.get_linestyle() == "-"
    assert {"swin, switch  61.0", "convnext, switch  31.0"} <= set(texts(figure))


def test_the_order_of_the_rows_does_not_matter():
    shuffled = history().sample(frac=1, random_state=3)
    key = ["model", "epoch"]
    a, b = (plots.learning_curves(h)[1].sort_values(key, ignore_index=True) for h in (history(), shuffled))
    pd.testing.assert_frame_equal(a, b)


def test_the_table_given_is_not_changed():
    given_table, kept = history(), history()
    plots.learning_curves(given_table)
    pd.testing.assert_frame_equal(given_table, kept)


# accuracy
def test_dots_show_the_interval_of_the_stats_module():
    figure, table = plots.accuracy_dots(accuracies())
    assert table.iloc[0][["estimate", "low", "high", "seeds"]].tolist() == pytest.approx(list(mean_interval([0.5, 0.6, 0.7])))
    assert np.isnan(table.iloc[2]["low"]) and "40.0 (one seed)" in texts(figure)
    shown = sorted(x for line in figure.axes[0].lines for x in line.get_xdata() if line.get_markersize() == 3.5)
    assert shown == sorted(accuracies()["accuracy"])
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["convnext, none", "convnext, patch", "mixer, none"]


# what is refused
@pytest.mark.parametrize("spoil, word", [
    (lambda t: t.drop(columns="model"), "lacks"),
    (lambda t: t.assign(model="convnex"), "did you mean 'convnext'"),
    (lambda t: t.assign(mixing="swich"), "did you mean 'switch'"),
    (lambda t: t[:0], "0 rows"),
    (lambda t: t.assign(val_accuracy=np.nan, accuracy=np.nan), "missing"),
    (lambda t: t.assign(val_accuracy=np.inf, accuracy=np.inf), "infinite"),
])
def test_a_wrong_table_is_refused(spoil, word):
    with pytest.raises(InputError, match=word):
        plots.learning_curves(spoil(history()))
    with pytest.raises(InputError, match=word):
        plots.accuracy_dots(spoil(accuracies()))
    assert not plt.get_fignums()


# labels
def slow_spread(heights, gap):
    "The same least squares problem, solved by projections in turn (Dykstra)."
    order = np.argsort(heights, kind="stable")
    x = np.array(heights, dtype=np.float64)[order]
    moves = np.zeros((len(x), 2))
    for _ in range(800):
        for i in range(len(x) - 1):
            y = x[i : i + 2] + moves[i]
            short = max(gap - (y[1] - y[0]), 0)
            x[i : i + 2] = y + np.array([-short, short]) / 2
            moves[i] = y - x[i : i + 2]
    back = np.empty(len(x))
    back[order] = x
    return back


def test_spread_by_hand():
    np.testing.assert_allclose(plots.spread(np.array([1.0, 1.0]), 1), [0.5, 1.5])
    np.testing.assert_allclose(plots.spread(np.array([5.0, 1.0]), 1), [5, 1])
    np.testing.assert_allclose(plots.spread(np.array([0.0, 0.0, 0.0]), 2), [-2, 0, 2])
    assert plots.spread(np.array([]), 1).shape == (0,)


def test_spread_is_the_nearest_arrangement():
    rng = np.random.default_rng(0)
    for n in (2, 4, 6):
        heights = rng.random(n)
        np.testing.assert_allclose(plots.spread(heights, 0.2), slow_spread(heights, 0.2), atol=1e-6)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0, 0.3))
def test_spread_keeps_order_gap_and_centre(heights, gap):
    placed = plots.spread(np.array(heights), gap)
    order = np.argsort(heights, kind="stable")
    assert (np.diff(placed[order]) >= gap - 1e-9).all()
    assert not heights or abs(placed.mean() - np.mean(heights)) < 1e-9


# images
@pytest.mark.parametrize("count, columns, shape", [(1, 8, (1, 1)), (8, 8, (1, 8)), (9, 4, (3, 4))])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_image_gets_its_caption(count, columns, shape, dtype):
    images = (torch.arange(count).view(-1, 1, 1, 1).expand(-1, 3, 4, 4) * (9 if dtype == torch.uint8 else 0.1)).to(dtype)
    figure, table = plots.image_sheet(images, [f"image {i}" for i in range(count)], columns)
    spec = figure.axes[0].get_gridspec()
    assert (spec.nrows, spec.ncols) == shape
    shown = [(axis.get_title("center"), axis.images[0].get_array()) for axis in figure.axes if axis.images]
    assert [title for title, _ in shown] == table["title"].tolist() == [f"image {i}" for i in range(count)]
    assert all((np.asarray(array) == image.movedim(0, -1).numpy()).all() for (_, array), image in zip(shown, images, strict=True))


@pytest.mark.parametrize("images, titles", [(torch.zeros(2, 3, 4, 4), ["a"]), (torch.zeros(3, 4, 4), ["a"]), (torch.zeros(0, 3, 4, 4), [])])
def test_a_sheet_needs_a_caption_each(images, titles):
    with pytest.raises(InputError, match="b titles"):
        plots.image_sheet(images, titles)


# keeping
SAVE = """
import io, sys
import pandas as pd
from patchmix_repro import plots
plots.save_figure(*plots.accuracy_dots(pd.read_csv(io.StringIO(sys.argv[2]))), "dots", sys.argv[1])
"""


def test_the_same_table_gives_the_same_bytes_in_any_process(tmp_path):
    here = plots.save_figure(*plots.accuracy_dots(accuracies()), "dots", tmp_path / "a")
    subprocess.run([sys.executable, "-c", SAVE, str(tmp_path / "b"), accuracies().to_csv(index=False)], check=True)
    for name in ("dots.svg", "dots.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert here == tmp_path / "a" / "dots.svg"


def test_an_svg_carries_its_description_and_no_date(tmp_path):
    path = plots.save_figure(*plots.learning_curves(history()), "curves", tmp_path)
    tree = ElementTree.parse(path)
    described = [node.text for node in tree.iter("{http://purl.org/dc/elements/1.1/}description")]
    assert len(described) == 1 and "swin, switch: 61.0 %" in described[0]
    assert not list(tree.iter("{http://purl.org/dc/elements/1.1/}date"))
    assert not list(tree.iter("{http://www.w3.org/2000/svg}text"))  # outlines: no font is needed


def test_the_csv_holds_the_numbers_of_the_figure(tmp_path):
    figure, table = plots.learning_curves(history())
    plots.save_figure(figure, table, "curves", tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "curves.csv"), table, rtol=1e-5)


def test_figures_go_to_the_project_and_need_a_description(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "project_root", lambda: tmp_path)
    assert plots.save_figure(plt.figure(), accuracies(), "x", alt="an empty page").parent == tmp_path / "figures"
    with pytest.raises(InputError, match="alt="):
        plots.save_figure(plt.figure(), accuracies(), "y")
    assert not (tmp_path / "figures" / "y.csv").exists()


# the language
def luminance(colour):
    return sum(w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), to_rgb(colour), strict=True))


def test_models_have_colours_of_their_own_that_show_on_white():
    colours = list(plots.MODEL_COLOUR.values())
    assert len(set(colours)) == len(colours)
    assert all(1.05 / (luminance(colour) + 0.05) > 2 for colour in colours)
    for small, large in (("convnext", "convnext_s"), ("swin", "swin_s"), ("deit", "deit_b"), ("convmixer", "convmixer_full")):
        hues = [colorsys.rgb_to_hsv(*to_rgb(plots.MODEL_COLOUR[name]))[0] for name in (small, large)]
        assert abs(hues[0] - hues[1]) < 0.03


def test_style_ends_with_its_block():
    before = matplotlib.rcParams["svg.fonttype"], matplotlib.rcParams["font.size"]
    with plots.style():
        assert matplotlib.rcParams["svg.fonttype"] == "path"
    assert before == (matplotlib.rcParams["svg.fonttype"], matplotlib.rcParams["font.size"])
