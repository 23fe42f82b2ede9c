"The report card: one row a claim, the page's own verdict, and what would decide."
import importlib.util
import re
from dataclasses import replace

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import simulated
import simulated_remixer as sim

from patchmix_repro import report_card as rc
from patchmix_repro import store
from patchmix_repro.claims import load_battery, verdicts
from patchmix_repro.config import run_id, train_config
from patchmix_repro.core import InputError, project_root
from patchmix_repro.home import FOUND, card_figure, evidence_lines, found
from patchmix_repro.page_claims import PAGE_CLAIMS, drop_claims, replacement_claims, selectivity_claims
from patchmix_repro.remarks import as_measured, left_open, needed, remarks
from patchmix_repro.remixer_tables import as_published
from patchmix_repro.stats import compare_seeds, equivalence, seeds_needed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Both papers' records with numbers from formulas: Patch Mixing and ReMixer help by far."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "provenance", dict)
        return sim.fill(simulated.fill(tmp_path_factory.mktemp("store")), range(4))


@pytest.fixture(scope="module")
def card(folder):
    return rc.report_card(folder)


def test_every_claim_once_and_every_page_in_its_order(card):
    claims = [(page, asked.paper, claim) for page, asked in rc.PAGES.items() for claim in asked.claims()]
    expected = [(page, claim.text) for paper in rc.PAPERS for page, whose, claim in claims if paper == ("ours" if claim.ours else whose)]
    pages = [*rc.PAGES, "selectivity_robustness"]
    assert not card.duplicated(["page", "claim"]).any() and set(card.page) == set(pages) and len(expected) == 195
    mine = card[card.page.ne("selectivity_robustness") & ~card.claim.isin(rc.not_at_hand(project_root() / "results").claim)]
    assert [*zip(mine.page, mine.claim)] == expected
    ours = card[card.paper.eq("ours")]
    assert len(ours) == 22 and set(ours.page) == {"remixer_controls", "remixer_kappa", "remixer_appendix_c"} and card.page.eq("remixer_controls").sum() == 18


def test_a_row_is_what_its_page_says(folder, card):
    table = verdicts(load_battery(folder, "shapes9", "mini"), replacement_claims()).set_index("claim")
    mine = card[card.page.eq("replacement")].set_index("claim")
    assert mine.verdict.tolist() == [rc.VERDICTS[word][0] for word in table.verdict]
    for name in ("difference", "low", "high"):
        np.testing.assert_array_equal(mine[name].astype(float), table[name])
    assert mine.published["Patch Mixing: ConvNeXt keeps more at 50 % (14 x 14)"] == pytest.approx(table["published T"].iloc[0]) and mine.images.eq(900).all()


def verdicts_of_page(page):
    "Claim -> the verdict in the last table of verdicts for the first data set that the page's notebook holds, as its reader sees it."
    cells = nbformat.read(project_root() / "nbs" / "results" / f"{page}.ipynb", as_version=4).cells
    text = next("".join(output.get("text", "") for output in cell.outputs) for cell in cells if cell.cell_type == "code" and "sentences(table)" in cell.source)
    found = [re.match(r"(seen|contradicted|not decided|not testable here|not measured yet|one seed|two seeds|no spread)\s+(.+?)(?:: [+-]\d\.\d{3} \[.*|, \d[^,]*seeds\.)$", line) for line in text.splitlines()]
    assert all(found), [line for line, match in zip(text.splitlines(), found) if not match]
    return {match[2]: match[1] for match in found}


@pytest.mark.parametrize("page", list(rc.PAGES))
def test_the_card_says_what_the_page_says_or_why_not(page):
    said = verdicts_of_page(page)
    for row in rc.judge_page(page, project_root() / "results", "shapes9", "mini").itertuples():
        word = rc.VERDICTS[said[row.claim]][0]
        assert row.verdict == word or row.verdict == "not testable here" and row.reason, (row.claim, row.verdict, word)
        taken_back = word in ("seen", "contradicted") and row.verdict == "not testable here"
        assert taken_back == (word in ("seen", "contradicted") and any(words in row.reason for words in ("would pass", "it says little", "no gap to close", "ReMixer is off there"))), row.claim


def test_known_effects_are_seen_and_known_opposites_contradicted(card):
    words = card.set_index(["page", "claim"]).verdict
    assert words["replacement", "Patch Mixing: ConvNeXt keeps more at 50 % (14 x 14)"] == "seen"  # losses 0.8 and 0.5
    assert words["remixer_backgrounds", "DeiT remixer mask: Mixed-Rand higher than DeiT plain"] == "seen"  # 0.10 higher
    assert words["permutation", "Patch Mixing leaves DeiT within 0.05 at 196 cells"] == "contradicted"  # 0.2 apart


def test_what_no_run_here_can_answer_says_why_and_what_could(card):
    shifted = card.set_index(["page", "claim"]).loc[("remixer_shifted", "DeiT remixer mask: real_9 higher than DeiT plain")]
    assert shifted.verdict == "not testable here" and "ImageNet-9's" in shifted.reason and "-p data imagenet9" in shifted.command and "-p labels saliency" in shifted.command
    kappa = rc.judge_page("remixer_kappa", project_root() / "results", "shapes9", "mini").set_index("claim").loc["DeiT remixer mask: kappa of quarter 4 without the last layer within 0.05 of zero"]
    assert kappa.verdict == "not testable here" and "the last quarter alone" in kappa.reason and "-p scale small" in kappa.command


def test_the_card_of_imagenet9_is_about_the_labels_it_has():
    card = rc.report_card(project_root() / "results", "imagenet9", "small")
    mine = card[card["page"].isin([page for page, asked in rc.PAGES.items() if asked.paper == "ReMixer"])]
    assert not mine["claim"].str.contains("remixer mask").any() and mine["claim"].str.contains("remixer saliency").sum() > 60
    assert not mine["command"].str.contains("labels mask|shuffled:mask").any() and mine["command"].str.contains("-p labels saliency").any()
    maps = mine[mine["page"].eq("remixer_maps") & mine["claim"].str.contains("saliency")]
    assert len(maps) and set(maps["verdict"]) == {"not testable here"} and maps["reason"].str.contains("masks of the objects").all()
    boxes = mine[mine["claim"].str.contains("grabcut")]
    assert len(boxes) and set(boxes["verdict"]) == {"not testable here"} and boxes["reason"].str.contains("boxes around masks").all()


def test_more_questions_ask_for_more_seeds():
    claim = replacement_claims()[0]
    alone, among = (needed(claim, 0.05, 0.05, questions) for questions in (1, 12))
    assert alone == seeds_needed(0.05, 0.05) < among == seeds_needed(0.05, 0.05, alpha=0.05 / 12)


def test_an_empty_store_decides_nothing_and_says_what_to_run(tmp_path):
    card = rc.report_card(tmp_path)
    assert set(card.verdict) == {"not run", "not testable here"} and card.difference.isna().all()
    lines = {line for command in card.command for line in command.splitlines()}
    trainings = [line for line in lines if "nbs/train.ipynb" in line]
    assert len(trainings) > 20
    for line in trainings:  # the configuration accepts every one
        given = dict(pair.split(" ", 1) for pair in re.findall(r"-p (\S+ \S+)", line))
        train_config(**{key: int(value) if value.isdigit() else True if value == "True" else value for key, value in given.items()})


def test_data_that_came_to_hand_are_no_longer_missing(tmp_path):
    before = rc.not_at_hand(tmp_path)
    store.append(simulated.published_set("convnext", "smd", 60, 100), tmp_path)
    after = rc.not_at_hand(tmp_path)
    assert before.paper.value_counts().to_dict() == {"Patch Mixing": 4, "ReMixer": len(rc.BESIDE)} and set(before.claim) - set(after.claim) == {"accuracies on the published SMD"}


def test_one_seed_is_not_decided(tmp_path):
    simulated.fill(tmp_path, [("convnext", "switch", 0), ("convnext", "timm", 0)])
    row = rc.judge_page("replacement", tmp_path, "shapes9", "mini").iloc[0]
    assert row.verdict == "not decided" and "two" in row.reason and np.isnan(row.low) and row.difference > 0 and row.command == ""


@pytest.mark.parametrize("page, seeds", [("replacement", 3), *((page, 5) for page in PAGE_CLAIMS)])
def test_noise_alone_is_rarely_called_seen(page, seeds, cards=60):
    "Recipes of one law, many cards of a whole page, the seeds really used: a false word of a family, older or later claims, in at most 5 % of them. That equals are equal is no false word."
    claims, rng, wrong = PAGE_CLAIMS[page](), np.random.default_rng(5), np.zeros(2)
    later = np.array([claim.later for claim in claims])
    places = dict.fromkeys(("clean" if x == 0 else claim.curve, x) for claim in claims for x in ((claim.x, claim.beyond) if claim.x is not None else (20.0, 80.0)) if x is not None)
    recipes = dict.fromkeys(side for claim in claims for side in (claim.first, claim.second))
    rows = pd.DataFrame([(*recipe, seed, curve, x) for recipe in recipes for seed in range(seeds) for curve, x in places], columns=["model", "mixing", "train_seed", "curve", "x"])
    way = np.array([claim.expect in ("more", "less") for claim in claims])
    for _ in range(cards):
        table = verdicts(rows.assign(**{value: rng.normal(0.5, 0.02, len(rows)) for value in ("kept", "accuracy", "mass", "mean")}), claims)
        assert table["p_value"].notna().all()
        false = table.verdict.eq("contradicted") | table.verdict.eq("seen") & way
        wrong += false[~later].any(), false[later].any()
    assert (wrong <= 0.05 * cards).all(), wrong


@pytest.mark.parametrize("low, high, published, words", [
    (-0.03, 0.04, 0.2, ["excludes the published difference", "smaller than 0.05 either way"]),
    (-0.2, 0.04, 0.02, []), (-0.03, 0.3, (0.4, 0.2), []), (-0.03, 0.1, (0.4, 0.2), ["excludes the published difference"]), (-0.2, 0.04, float("nan"), []), (0.01, 0.3, 0.2, ["5 % by itself, not after Holm's correction"]),
])
def test_what_an_interval_leaves(low, high, published, words):
    assert left_open(replacement_claims()[0], {"low": low, "high": high, "p_value": 0.04 if low > 0 else 0.5}, *np.atleast_1d(published)) == words


def test_a_later_claim_moves_no_older_verdict(folder):
    rows, claims = load_battery(folder, "shapes9", "mini"), replacement_claims()
    older = [claim for claim in claims if not claim.later]
    assert [claim.text.split(" within")[0] for claim in claims if claim.later] == ["ConvNeXt with Patch Mixing matches original Swin"] * 2 + ["Patch Mixing leaves Swin"] * 2
    pd.testing.assert_frame_equal(verdicts(rows, claims).iloc[: len(older)], verdicts(rows, older))
    row = rc.judge_page("replacement", folder, "shapes9", "mini").iloc[-1]
    assert row.reason.startswith("formulated after the numbers were seen")


def test_equals_at_the_floor_and_margins_that_bridge_nothing_are_named(tmp_path):
    claim, row = drop_claims()[2], {"verdict": "seen", "low": -0.01, "high": 0.01, "first": 0.01, "second": 0.02}
    assert remarks("drop", claim, row, None) == ["both keep next to nothing there: it says little"]
    assert remarks("drop", claim, row | {"first": 0.2}, None) == []
    maps = pd.DataFrame([("convnext", 0.50), ("swin", 0.51)], columns=["model", "mass"]).assign(curve="patch", mixing="timm")
    reaches = next(claim for claim in selectivity_claims() if claim.expect == "no less")
    assert "an untouched ConvNeXt would pass" in remarks("selectivity_table", reaches, row | {"first": 0.5, "second": 0.51}, maps)[-1]
    assert remarks("selectivity_table", reaches, row, maps.assign(mass=[0.5, 0.6])) == []


def test_a_command_lists_every_training_that_lacks_and_the_published_settings():
    card = rc.report_card(project_root() / "results", "caltech9")
    lines = card.set_index(["page", "claim"]).command
    shared = lines["remixer_kernels", "ConvMixer: shared kernels cost accuracy (Original)"]
    assert "-p model convmixer " in shared and "-p model convmixer_full " in shared and shared.count("train.ipynb") == 2
    maps = lines["selectivity_table", "Patch Mixing makes ConvNeXt more selective (occluders, mass)"]
    assert "-p set smd" in maps and "caltech9-convnext-mini-switch-s0-979185d0" in maps and "-p epochs 40" in maps


def test_a_further_training_is_a_sibling_of_the_published_ones():
    records = store.read(project_root() / "results", "train")
    records = records[records["config.varied"].isna()] if "config.varied" in records else records
    plain = records[records["config.model"].isin(["convnext", "swin", "deit"]) & records["config.remixer"].ne(True) & records["config.token_labels"].ne(True) & records["config.mixing"].isin(["timm", "switch"])]
    told = [{"model": row["config.model"], "data": row["config.data"], "scale": row["config.scale"], "mixing": row["config.mixing"], "seed": int(row["seed"])} | ({"precision": "auto"} if row["config.precision"] == "auto" else {}) for row in plain.to_dict("records")]
    assert len(told) > 30 and [run_id(train_config(**as_published(given))) for given in told] == plain.run_id.tolist()


def test_the_figure_has_a_square_a_claim(card):
    figure, counts = card_figure({"shapes9, mini": card, "again": card[card.paper.eq("ReMixer")]})
    assert counts.claims.sum() == len(card) + card.paper.eq("ReMixer").sum() == sum(len(axis.patches) for axis in figure.axes)
    plt.close(figure)


def test_the_table_has_words_for_everything(card):
    table = rc.card_table(card)
    assert len(table) == len(card) and not table.isin(["nan", "None", "+nan"]).any(axis=None) and table.notna().all(axis=None)


def test_a_page_that_is_none_is_named():
    with pytest.raises(InputError, match="did you mean 'replacement'"):
        rc.judge_page("replacements", project_root() / "results", "shapes9", "mini")


def test_the_home_page_says_what_the_records_say():
    spec = importlib.util.spec_from_file_location("report", project_root() / ".ci" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    page, blocks = (project_root() / "README.md").read_text(encoding="utf-8"), report.blocks()
    for name, block in blocks.items():
        (_, text, _), = report.MARKS[name].findall(page)
        assert text == block, "run python .ci/report.py"
    assert blocks["findings"].count("\n") >= len(FOUND), "a finding is no longer what the records say"


def test_a_claim_names_the_records_behind_it(folder, card):
    mine = card.set_index(["page", "claim"])
    runs = mine.runs["replacement", "Patch Mixing: ConvNeXt keeps more at 50 % (14 x 14)"].split(", ")
    records = store.read(folder, "battery").set_index("run_id")
    assert set(records.loc[runs, "config.model"]) == {"convnext"} and set(records.loc[runs, "config.mixing"]) == {"timm", "switch"}
    selective = next(row for row in card[card.page.eq("selectivity_table")].itertuples() if row.runs and "(patches" in row.claim)
    assert set(store.read(folder, "selectivity").set_index("run_id").loc[selective.runs.split(", "), "config.set"]) == {"patch"}
    assert not card[card.verdict.isin(["seen", "contradicted"]) & card.page.ne("selectivity_robustness")].runs.eq("").any()
    lines = evidence_lines(card).splitlines()
    assert len(lines) == card.verdict.isin(["seen", "contradicted"]).sum() and any(f"(records.ipynb#{runs[0]})" in line for line in lines)


def test_a_network_at_chance_leaves_the_others_their_verdicts(folder):
    rows, claims = load_battery(folder, "shapes9", "mini"), replacement_claims()
    at_chance = rows["model"].eq("deit") & rows["mixing"].eq("timm") & rows["train_seed"].eq(0)
    before, after = verdicts(rows, claims), verdicts(rows.assign(kept=rows["kept"].mask(at_chance)), claims)
    deit = before.claim.str.contains("DeiT")
    assert deit.sum() == 2 and after.seeds[deit].eq("3 + 2").all() and before.seeds.eq("3 + 3").all()
    pd.testing.assert_series_equal(after.difference[~deit], before.difference[~deit])


@pytest.mark.parametrize("originals, taken_back", [(((0.50, 0.46, 0.545), (0.499, 0.55, 0.45)), False), (((0.60, 0.61, 0.62), (0.50, 0.51, 0.52)), True)])
def test_a_verdict_is_taken_back_only_where_the_originals_have_it(originals, taken_back):
    claim, values = next(claim for claim in drop_claims() if "mean of 20 to 80 %" in claim.text), {("convnext", "timm"): originals[0], ("swin", "timm"): originals[1], ("convnext", "switch"): (0.80, 0.81, 0.82), ("swin", "switch"): (0.50, 0.51, 0.52)}
    rows = pd.DataFrame([(*recipe, seed, claim.curve, 20.0, kept, 0.9) for recipe, kepts in values.items() for seed, kept in enumerate(kepts)], columns=["model", "mixing", "train_seed", "curve", "x", "kept", "accuracy"])
    row = verdicts(rows, [claim]).iloc[0].to_dict()
    assert row["verdict"] == "seen" and any(words.endswith("an untouched one would pass") for words in remarks("drop", claim, row, rows)) == taken_back


@pytest.mark.parametrize("expect, difference, margin", [("same", -0.0066, 0.01), ("no less", -0.004, 0.01), ("same", 0.02, 0.01)])
def test_the_seeds_for_the_measured_difference_decide_in_four_cases_of_five(expect, difference, margin):
    claim = replace(replacement_claims()[0], expect=expect, margin=margin, curve="clean", x=0, value="accuracy")
    seeds, rng = as_measured(claim, {"difference": difference, "spread": 0.0064, "questions": 1}), np.random.default_rng(3)
    decided = [equivalence(*draw, margin).p_value < 0.05 if expect == "same" and abs(difference) < margin else compare_seeds(draw[0] + (margin if expect == "no less" else -np.copysign(margin, difference)), draw[1]).p_value < 0.05
               for draw in ((rng.normal(difference, 0.0064, seeds), rng.normal(0, 0.0064, seeds)) for _ in range(600))]
    assert 0.76 < np.mean(decided) < 0.86, (seeds, np.mean(decided))


def test_sentences_need_their_verdicts_their_intervals_and_their_scale():
    results = project_root() / "results"
    cards = {f"{data}, mini": rc.report_card(results, data) for data in ("shapes9", "caltech9")}
    said = found(cards)
    assert len(said) >= len(FOUND)
    assert found(cards | {"shapes9, small": rc.report_card(results, "shapes9", "small")}) == said
    begins = {sentence.partition(":")[0] for sentence, _ in FOUND}
    assert begins <= {sentence.partition(":")[0] for sentence in said}
    assert not begins & {sentence.partition(":")[0] for sentence in found({title.replace("mini", "small"): card for title, card in cards.items()})}
    assert found({title.replace("mini", "small"): card for title, card in cards.items()}) == []
    alone = {title: card.assign(low=np.nan, high=np.nan) for title, card in cards.items()}
    assert found(alone) == []
