"The printed numbers of the ReMixer paper: read a second time from its text, recomputed, and in their printed form."
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchmix_repro.core import InputError
from patchmix_repro.ledger import published
from patchmix_repro.tables import baseline_of, published_table, recomputed, repeated

TABLES = {"1": (9, 6, 36), "2": (4, 6, 18), "3": (3, 4, 0), "5": (6, 6, 18), "6": (2, 2, 2), "7": (3, 6, 12)}  # rows, columns, gains
BACKGROUND = ["Original", "Only-BG-B", "Only-FG", "Mixed-Same", "Mixed-Rand", "BG-Gap"]


# a second reading: the tables in the paper's text, which the ledger was not made from by a program
@pytest.fixture(scope="module")
def paper(shared_data):
    path = shared_data.parent / "papers" / "remixer_paper.md"
    if not path.is_file():
        pytest.skip("the paper's text is not beside the data; nothing to compare the ledger with")
    return path.read_text(encoding="utf-8").splitlines()


def plain(text):
    return re.sub(r"</?b>|\(\s*\$\\(up|down)arrow\$\s*\)", "", text).strip()


def lines_of(paper, number):
    "The tab-separated lines that follow a table's caption."
    start = next(k for k, line in enumerate(paper) if line.startswith(f"Table {number}:"))
    first = next(k for k in range(start + 1, len(paper)) if "\t" in paper[k])
    last = next(k for k in range(first, len(paper)) if "\t" not in paper[k])
    return [[plain(cell) for cell in line.split("\t")] for line in paper[first:last]]


def full_name(first, label, base, number):
    "The ledger's name of a printed row."
    labeller = {"-": "", "BigBiGAN": " (BigBiGAN)", "ReLabel": " (ReLabel)"}[label or {"5": "BigBiGAN", "2": "ReLabel", "7": "ReLabel"}.get(number, "-")]
    if not first.startswith("+ "):
        return first
    return f"{base} {first.removesuffix(' (ours)')}" + (labeller if "ReMixer" in first else "")


def second_reading(paper, number):
    "(row, column) -> the number as the paper prints it."
    (_, *columns), *rows = lines_of(paper, number)
    labels, found, base = "Patch labeler" in columns, {}, None
    for first, *cells in rows:
        label = cells.pop(0) if labels else None
        base = base if first.startswith("+ ") else first
        for column, cell in zip(columns[labels:], cells, strict=True):
            value, gain = re.fullmatch(r"([\d.]+)(?: \(([+-][\d.]+)\))?", cell).groups()
            row = full_name(first, label, base, number)
            found[row, column] = value
            if gain:
                found[row, f"{column} gain"] = gain
    return found


@pytest.mark.parametrize("number", TABLES)
def test_the_ledger_agrees_with_the_papers_text_cell_by_cell(paper, number):
    text = second_reading(paper, number)
    rows, columns, gains = TABLES[number]
    assert len(text) == rows * columns + gains
    ledger = published("ReMixer", number)
    assert set(zip(ledger["row"], ledger["column"], strict=True)) == set(text)
    printed = published_table("ReMixer", number)
    for (row, column), value in text.items():
        name = column.removesuffix(" gain")
        cell = text[row, name] + (f" ({text[row, f'{name} gain']})" if (row, f"{name} gain") in text else "")
        assert printed.loc[row, name] == cell
        assert ledger.set_index(["row", "column"]).loc[(row, column), "value"] == float(value)


def test_the_second_reading_finds_a_slip(paper):
    text = second_reading(paper, "1")
    assert text["MLP-Mixer-S/16 + ReMixer (ReLabel)", "Only-BG-B gain"] == "-13.68" and text["DeiT-S", "BG-Gap"] == "23.39"
    wrong = [line.replace("31.78", "31.87") for line in paper]
    assert second_reading(wrong, "1") != text


# sizes and words
@pytest.mark.parametrize("number", TABLES)
def test_every_cell_is_there_once(number):
    rows, (height, width, gains) = published("ReMixer", number), TABLES[number]
    assert len(rows) == height * width + gains and not rows.duplicated(["row", "column"]).any()
    assert rows["known"].eq("printed").all() and rows["error"].eq(0).all() and rows["source"].eq(f"ReMixer paper, table {number}").all()
    assert published_table("ReMixer", number).shape == (height, width)


def test_gains_have_columns_of_their_own():
    rows = published("ReMixer")
    gains = rows["column"].str.endswith(" gain")
    assert gains.sum() == 86 and rows.loc[gains, "unit"].eq("points").all() and rows.loc[~gains & rows["table"].ne("3"), "value"].between(15, 90).all()
    assert rows.loc[rows["row"].eq(rows["row"].map(baseline_of)) & rows["table"].ne("6"), "column"].str.endswith("gain").sum() == 0


@pytest.mark.parametrize("table, row, column, cell", [
    ("1", "DeiT-S + ReMixer (BigBiGAN)", "Original", "83.88 (+1.19)"), ("1", "ConvMixer-512/8", "BG-Gap", "21.60"),
    ("2", "DeiT-S + ConViT", "Only-FG", "62.15 (+4.52)"), ("2", "DeiT-S + ConViT + ReMixer (ReLabel)", "Mixed-Rand", "60.52 (+10.03)"),
    ("3", "MLP-Mixer-S/16", "Layer 2/4", "0.000"), ("5", "MLP-Mixer-S/16 + ReMixer (BigBiGAN)", "ImageNetV2-9", "76.51 (-0.06)"),
    ("5", "DeiT-S", "Rendition-9", "28.60"), ("6", "DeiT-B", "TL + ReMixer", "82.18 (+1.01)"), ("7", "ConvMixer-512/8-Full", "Original", "88.67 (+2.35)"),
])
def test_cells_by_hand(table, row, column, cell):
    assert published_table("ReMixer", table).loc[row, column] == cell


def test_other_tables_of_the_ledger_have_a_printed_form_too():
    wide = published_table("Patch Mixing", "replacement-14")
    assert wide.loc["ConvNeXt-T Original", "50"] == "34.5" and published_table("Patch Mixing", "accuracies").eq("–").any(axis=None)
    for wrong in ("4", "", "Table 1"):
        with pytest.raises(InputError, match="unknown table"):
            published_table("ReMixer", wrong)
    with pytest.raises(InputError, match="did you mean 'ReMixer'"):
        published_table("Remixer", "1")


# arithmetic
def slow_gain(table, row, column):
    "A printed gain again, from the cells and a list of who is compared with whom."
    cells = published("ReMixer", table).set_index(["row", "column"])["value"]
    if table == "6":
        return cells[row, "TL + ReMixer"] - cells[row, "TL"]
    base = next(name for name in ("DeiT-S", "MLP-Mixer-S/16", "ConvMixer-512/8") if row.startswith(name))
    return cells[row, column] - cells[base, column]


@pytest.mark.parametrize("table", TABLES)
def test_every_gain_is_its_cell_minus_the_baseline(table):
    gains = published("ReMixer", table).query("column.str.endswith('gain')")
    for row in gains.itertuples():
        assert row.value == pytest.approx(slow_gain(table, row.row, row.column.removesuffix(" gain")), abs=0.0051), row


def test_every_gap_is_mixed_same_minus_mixed_rand_but_one():
    off = []
    for table in ("1", "2", "7"):
        cells = published("ReMixer", table).pivot(index="row", columns="column", values="value")
        wrong = (cells["BG-Gap"] - (cells["Mixed-Same"] - cells["Mixed-Rand"])).round(2)
        off += [(table, row, value) for row, value in wrong[wrong.ne(0)].items()]
    assert off == [("1", "ConvMixer-512/8 + ReMixer (BigBiGAN)", 0.01)]
    note = published("ReMixer", "1").query("note != ''")
    assert note[["row", "column"]].to_numpy().tolist() == [["ConvMixer-512/8 + ReMixer (BigBiGAN)", "BG-Gap"]]


def test_recomputed_names_that_slip_alone():
    found = {name: recomputed(name) for name in TABLES}
    assert {name: len(table) for name, table in found.items()} == {"1": 45, "2": 22, "3": 0, "5": 18, "6": 2, "7": 15}
    slips = [(name, *row) for name, table in found.items() for row in table.loc[table["slip"].ne(0), ["row", "column", "slip"]].to_numpy()]
    assert slips == [("1", "ConvMixer-512/8 + ReMixer (BigBiGAN)", "BG-Gap", 0.01)]


def test_what_is_printed_twice_is_printed_alike():
    cells = repeated()
    assert len(cells) == 43 and cells["values"].map(len).eq(1).all()
    assert set(cells.loc[cells["row"].eq("ConvMixer-512/8 + ReMixer (ReLabel)"), "tables"]) == {"1, 7"}


def test_what_the_facts_say_of_the_tables():
    kappa = published("ReMixer", "3").pivot(index="row", columns="column", values="value")
    assert kappa.loc["MLP-Mixer-S/16"].idxmin() == "Layer 2/4" and kappa.loc["ConvMixer-512/8"].idxmax() == "Layer 2/4"
    falls = kappa["Layer 1/4"] - kappa["Layer 4/4"]
    assert (falls > 0).all() and np.isclose(falls["DeiT-S"], 1.284)
    second = published("ReMixer", "2").set_index(["row", "column"])["value"]
    ahead = {column: second["DeiT-S + ConViT", column] > second["DeiT-S + ReMixer (ReLabel)", column] for column in BACKGROUND}
    assert [column for column, more in ahead.items() if more] == ["Only-BG-B", "Only-FG", "BG-Gap"]  # lower is better in the first and the last


@given(st.sampled_from(sorted(TABLES)), st.integers(0, 8))
def test_the_printed_form_holds_the_ledgers_numbers(table, place):
    wide, rows = published_table("ReMixer", table), published("ReMixer", table)
    row = wide.index[place % len(wide)]
    mine = rows[rows["row"].eq(row)].set_index("column")["value"]
    numbers = [float(number) for cell in wide.loc[row] for number in re.findall(r"[+-]?[\d.]+", cell)]
    assert sorted(numbers) == sorted(mine)
