"""The graph behind one command: its plan, a dry run of every scale, and the whole of it with two steps of training, killed and taken up again."""
import dataclasses
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from patchmix_repro import store
from patchmix_repro.choices import CHOICES
from patchmix_repro.core import InputError
from patchmix_repro.plan import PAGE_LABELS, SUBSETS, Sweep, command, paper_steps, place_of, steps_of, sweep_of
from patchmix_repro.report_card import PAGES

ROOT = Path(__file__).resolve().parents[1]
SNAKEMAKE = [sys.executable, "-m", "snakemake"]
needs_snakemake = pytest.mark.skipif(importlib.util.find_spec("snakemake") is None, reason="snakemake is not installed; the extra 'sweep' brings it")


def snakemake(*arguments, cwd=ROOT, **environment):
    return subprocess.run([*SNAKEMAKE, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=800)


@given(st.sampled_from(list(SUBSETS)), st.integers(0, 3), st.integers(1, 2), st.sampled_from(["mini", "small"]))
def test_every_step_stands_behind_those_it_reads(subset, first, seeds, scale):
    steps, seen = steps_of(Sweep(subset=subset, first=first, seeds=seeds, scale=scale)), set()
    for name, step in steps.items():
        assert name == step.name and set(step.after) <= seen
        seen.add(name)
    outs = [step.given["out"] for step in steps.values() if step.kind != "page"]
    assert len(outs) == len(set(outs)), "two steps write to one folder"


@pytest.mark.parametrize("field, value", [("precision", "float32"), ("scale", "small"), ("data", "caltech9"), ("subset", "full"), ("first", 7)])
def test_another_parameter_is_another_step(field, value):
    sweep = Sweep()
    changed = steps_of(dataclasses.replace(sweep, **{field: value}))
    same = {name for name, step in steps_of(sweep).items() if name in changed and step.kind != "train"}
    assert not any(name.startswith(("page", "evaluate", "backgrounds")) for name in same)
    assert all(changed[name] == step for name, step in steps_of(sweep).items() if name in changed), "one name, two steps"


def test_one_folder_never_serves_two_sweeps():
    sweeps = [Sweep(subset=subset, first=first, seeds=seeds, scale=scale) for subset in SUBSETS for first in (0, 1) for seeds in (1, 2) for scale in ("mini", "small")]
    assert len({place_of(sweep) for sweep in sweeps}) == len(sweeps)


def test_more_seeds_keep_what_is_there():
    one, three = steps_of(Sweep(seeds=1)), steps_of(Sweep(seeds=3))
    assert {name for name, step in one.items() if step.kind not in ("page",)} <= set(three)


@pytest.mark.parametrize(("able", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_a_sweep_at_mini_trains_as_its_cpu_can(monkeypatch, able, chosen):
    monkeypatch.setattr("patchmix_repro.plan.bfloat16_on_cpu", lambda: able)
    assert sweep_of({"scale": "mini"}).precision == sweep_of({}).precision == chosen
    assert sweep_of({"scale": "small"}).precision == sweep_of({"precision": "bfloat16"}).precision == "bfloat16"
    assert sweep_of({"precision": "float32"}).precision == "float32"


@needs_snakemake
def test_a_job_keeps_the_precision_of_the_machine_that_started_the_sweep():
    unlike = {"bfloat16": "float32", "float32": "bfloat16"}[sweep_of({}).precision]
    found = snakemake("-n", "--config", "subset=smoke", PATCHMIX_PRECISION=unlike)
    assert found.returncode == 0 and f"{place_of(sweep_of({'subset': 'smoke', 'precision': unlike}))}/" in found.stdout + found.stderr


@pytest.mark.parametrize("config, message", [({"seed": 1}, "did you mean 'seeds'"), ({"scale": "tiny"}, "unknown scale"), ({"seeds": "two"}, "allowed is int"), ({"seeds": 0}, "at least one seed"), ({"subset": "ful"}, "did you mean 'full'"), ({"scale": "paper", "seeds": 3}, "paper with seeds. It plans"), ({"scale": "paper", "data": "shapes9", "subset": "full"}, "paper with data, subset.* leave them out")])
def test_a_wrong_configuration_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        sweep_of(config)


def test_the_papers_scale_has_every_training_of_both_papers():
    trained = [step.given for step in paper_steps(sweep_of({"scale": "paper"})).values() if step.kind == "train"]
    assert sorted(given["model"] for given in trained if given["mixing"] == "switch") == ["convnext", "convnext_s", "swin", "swin_s"]
    assert [given["model"] for given in trained if given.get("token_labels") and given["data"] == "imagenet"] == ["deit", "deit", "deit_b", "deit_b"]
    nine = [given for given in trained if given["data"] == "imagenet9"]
    assert len(nine) == 12 and not any(given.get("token_labels") for given in nine)


def test_imagenet9_is_planned_without_masks():
    steps = steps_of(Sweep(data="imagenet9", scale="small", subset="full"))
    given = [step.given for step in steps.values()]
    assert {word for at in given if (word := at.get("labels"))} >= {"saliency", "shuffled:saliency"} and not any(word in str(at.get("labels")) for at in given for word in ("mask", "grabcut"))
    challenges = {(at["measure"], at["data"]) for at in given if "measure" in at}
    assert challenges == {("backgrounds", "backgrounds"), ("shifted", "imagenet9")}  # no masks of objects: no relevance


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_told_of_the_labels_it_would_take(page):
    cells = nbformat.read(ROOT / "nbs" / "results" / f"{page}.ipynb", as_version=4).cells
    default = re.search(r'^labels: str = "(.*?)"', next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])), re.MULTILINE)
    assert PAGE_LABELS.get(page) == (tuple(default[1].split(",")) if default and "mask" in default[1] else None)


def test_a_command_passes_every_parameter():
    step = next(step for step in steps_of(Sweep(subset="full")).values() if step.kind == "evaluate")
    words = command(step, "x.ipynb")
    assert words.startswith("papermill --no-progress-bar nbs/evaluate.ipynb x.ipynb ") and "-p limit None" in words and "-p root" not in words


def test_open_choices_are_varied_one_at_a_time():
    steps = steps_of(Sweep(subset="choices", seeds=2))
    trained = [step.given for step in steps.values() if step.kind == "train"]
    assert len(trained) == 2 * (1 + len(CHOICES)) and {step.kind for step in steps.values()} == {"train", "evaluate", "page"}
    assert {name for name, step in steps.items() if step.kind == "evaluate"} < set(steps_of(Sweep(subset="choices", seeds=3)))
    assert "-p grid 7,14 " in " ".join(command(step) for step in steps.values())
    usual = trained[0]
    assert all(sum(given.get(name) != usual.get(name) for name in {*given, *usual} - {"out", "seed"}) <= 1 for given in trained)


@needs_snakemake
@pytest.mark.parametrize("config, trainings", [(["scale=mini", "seeds=1"], 15), (["scale=paper"], 20), (["subset=choices"], 8)])
def test_a_dry_run_lists_the_steps(config, trainings):
    done = snakemake("-np" if trainings == 8 else "-n", "--config", *config, "folder=runs/never")
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(rf"^train\s+{trainings}$", done.stdout + done.stderr, re.MULTILINE)
    assert f"{trainings} trainings see" in done.stderr and ("No speed of convnext:" in done.stderr) == ("not known: no speed" in done.stderr) == ("scale=paper" in config)
    assert ("measured on cpu" in done.stderr and "not priced" in done.stderr) == ("scale=paper" not in config)
    assert not (ROOT / "runs" / "never").exists()


@needs_snakemake
def test_a_misspelt_configuration_stops_before_anything_runs():
    done = snakemake("-n", "--config", "sead=1")
    assert done.returncode and "did you mean 'seeds'" in done.stdout + done.stderr


@needs_snakemake
@pytest.mark.parametrize("profile", ["slurm", "kubernetes"])
def test_a_cluster_profile_names_only_rules_of_the_graph(profile):
    config = yaml.safe_load((ROOT / "workflow" / "profiles" / profile / "config.yaml").read_text(encoding="utf-8"))
    rules = set(re.findall(r'\("(\w+)", \d+, \d+\)', (ROOT / "workflow" / "Snakefile").read_text(encoding="utf-8"))) | {"records", "site"}
    named = {entry.split(":")[0] for entry in config.get("set-resources", [])} if isinstance(config.get("set-resources"), list) else set(config.get("set-resources", {}))
    assert config["executor"] == profile and named <= rules


@needs_snakemake
@pytest.mark.parametrize("profile, needs", [("slurm", "snakemake_executor_plugin_slurm"), ("kubernetes", "snakemake_executor_plugin_kubernetes")])
def test_a_dry_run_on_a_cluster(profile, needs):
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed; the extra 'cluster' brings it")
    done = snakemake("-n", "--workflow-profile", f"workflow/profiles/{profile}", "--config", "subset=smoke", "folder=runs/never")
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^train\s+2$", done.stdout + done.stderr, re.MULTILINE)


def stopped(arguments, folder, how, cwd):
    "Run the graph until one more step is finished, then stop it with a signal; the finished steps and their times."
    before = len(list(folder.glob("notebooks/*.ipynb")))
    running = subprocess.Popen([*SNAKEMAKE, *arguments], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # a background job of a shell ignores Ctrl-C, and so would its children
    try:
        deadline = time.monotonic() + 400
        while len(list(folder.glob("notebooks/*.ipynb"))) == before and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, how)
        running.wait(120)
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("notebooks/*.ipynb")}
    assert running.returncode and len(finished) > before, "no step finished in time, or all did"
    return finished


@needs_snakemake
def test_the_whole_graph_is_taken_up_again_and_never_repeated(graph, tmp_path, monkeypatch):
    "Stopped by Ctrl-C, then as by a power cut: what is finished stays, nothing is half written."
    monkeypatch.setenv("PATCHMIX_PRECISION", sweep_of({}).precision)  # what each start of snakemake would find by importing torch
    folder = tmp_path / "sweep"
    arguments = ["-c2", "--config", "subset=smoke", f"folder={folder}"]
    finished = stopped(arguments, folder, signal.SIGINT, graph)
    finished |= stopped(arguments, folder, signal.SIGKILL, graph)
    assert snakemake("--unlock", *arguments, cwd=graph).returncode == 0
    second = snakemake(*arguments, cwd=graph)
    assert second.returncode == 0, second.stderr[-3000:]
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items()), "a finished step was repeated"
    place = next(folder.glob("shapes9-mini-smoke-*"))
    steps = steps_of(sweep_of({"subset": "smoke", "folder": str(folder)}))
    assert {path.stem for path in folder.glob("notebooks/*.ipynb")} == set(steps)
    assert {path.stem for path in (place / "site").glob("*.html")} == {"index", *(step.notebook.partition("/")[2] for step in steps.values() if step.kind == "page")}
    times = store.read_table(place / "times", "steps", kind="sweep")
    assert set(times.step) == set(steps) and (times.minutes > 0).all() and (times.start >= 0).all() and times.memory.between(0.1, 20).all()
    text = "".join(path.read_text(encoding="utf-8") for path in (place / "site").glob("*.html"))
    assert "numbers mean nothing" in text and not re.findall(r'(?:src|href)="https?://', text), "a page reaches for a foreign host"
    for link, page in ((link, path) for path in (place / "site").glob("*.html") for link in re.findall(r'href="([^"#]+)', path.read_text(encoding="utf-8"))):
        assert (page.parent / link).exists(), f"{page.name}: {link}"
    third = snakemake(*arguments, cwd=graph)
    assert third.returncode == 0 and "Nothing to be done" in third.stdout + third.stderr
    unlike = {"bfloat16": "float32", "float32": "bfloat16"}[sweep_of({}).precision]
    other = snakemake("-n", *arguments, f"precision={unlike}", cwd=graph)
    assert re.search(r"^train\s+2$", other.stdout + other.stderr, re.MULTILINE), "another parameter runs again what depends on it"
