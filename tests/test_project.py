"""The house rules that a machine can check: notebooks, library, site, README and package."""
import ast
import configparser
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from jupyter_client.connect import LocalPortCache
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
LIBRARY = ROOT / "patchmix_repro"
NUMBER = re.compile(r"^(\d\d[a-z]?)_(\w+)$")
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(part.startswith(".") for part in p.relative_to(NBS).parts))
NAMES = [p.relative_to(NBS).with_suffix("").as_posix() for p in NOTEBOOKS]
RUNS = [p for p in NOTEBOOKS if p.stem in {"train", "evaluate", "explain", "occlude", "label", "challenge", "sheets"}]
FLOOR = {m[2]: m[1] for m in map(NUMBER.match, NAMES) if m}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
each_module = pytest.mark.parametrize("module", sorted(p.stem for p in LIBRARY.glob("*.py") if p.stem not in {"__init__", "_modidx"}))


def read(path, kind=None):
    "The cells of a notebook, all or of one type."
    return [c for c in nbformat.read(path, as_version=4).cells if kind in (None, c.cell_type)]


def python(source):
    "The syntax tree of a cell; magics and shell lines are left out."
    return ast.parse("\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))))


def is_exported(cell):
    return re.search(r"^#\|\s*exports?\b", cell.source, re.MULTILINE) is not None


def exported(path):
    return [c for c in read(path, "code") if is_exported(c)]


def library_imports(tree):
    "Names of our modules that a tree imports; a relative import is an error of its own."
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import; write patchmix_repro.{node.module}"
            package, _, module = (node.module or "").partition(".")
            if package == "patchmix_repro":
                yield from [module.split(".")[0]] if module else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("patchmix_repro."))


def upward(number, sources):
    "Modules imported by the sources of floor `number` that do not lie below it."
    used = {name for source in sources for name in library_imports(python(source))}
    return {name for name in used & set(FLOOR) if FLOOR[name] >= number}


# ---- rooms ----

@each_notebook
def test_imports_point_downward(path):
    number = NUMBER.match(path.stem)
    sources = [c.source for c in read(path, "code")]
    assert not upward(number[1] if number else "~", sources)


def test_an_upward_import_is_seen():
    assert upward("00", ["from patchmix_repro.core import choose"]) == {"core"}
    assert upward("00", ["from patchmix_repro import core"]) == {"core"}
    assert upward("00a", ["import patchmix_repro.core"]) == set()


@each_module
def test_a_module_is_exported_by_its_own_notebook(module):
    source = "\n".join(c.source for c in read(NBS / f"{FLOOR[module]}_{module}.ipynb", "code"))
    assert re.findall(r"^#\|\s*default_exp\s+(\S+)", source, re.MULTILINE) == [module]
    assert not [p for p in LIBRARY.rglob("*.py") if p.parent != LIBRARY], "the library has no sub-packages"


def test_no_two_notebooks_share_a_page_name():
    pages = [re.sub(r"^\d+[a-z]?_", "", Path(name).name) for name in NAMES]
    assert sorted(pages) == sorted(set(pages))


# ---- form ----

@each_notebook
def test_a_notebook_opens_with_its_title(path):
    first = read(path, "markdown")[0].source
    assert re.match(r"# \S.*\n+> \S", first)


@each_notebook
def test_an_export_cell_holds_one_short_definition(path):
    for cell in exported(path):
        lines = [line for line in cell.source.strip().splitlines() if not line.startswith("#|")]
        kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
        found = [n.name for n in python(cell.source).body if isinstance(n, kinds)]
        assert len(found) <= 1, found
        assert len(lines) <= 40, f"{found}: {len(lines)} lines"


@each_notebook
def test_a_notebook_stays_readable_in_one_sitting(path):
    lines = sum(len(c.source.strip().splitlines()) for c in exported(path))
    assert lines - len(exported(path)) <= 250
    assert len(read(path)) <= (13 if path in RUNS else 80)  # a run: 12 cells and its front matter


@each_notebook
def test_stored_outputs_show_nothing_of_the_machine(path):
    telltale = re.compile(r"(?<![\w:/.])/(root|home|work|tmp|Users|opt|var|usr)/\w|\bat 0x[0-9a-f]{6,}|\d(\.\d+)?\s?(it/s|s/it)\b|\r")
    for cell in read(path, "code"):
        text = json.dumps([o.get("text", "") for o in cell.outputs])
        shown = [v for o in cell.outputs for k, v in o.get("data", {}).items() if k.startswith("text/")]
        assert not (hit := telltale.search(text + json.dumps(shown))), f"{hit[0]!r} in the output of:\n{cell.source}"
        assert not [o for o in cell.outputs if o.output_type == "error"], cell.source


@pytest.mark.parametrize("path", RUNS, ids=[p.stem for p in RUNS])
def test_the_first_code_cell_of_a_run_holds_its_parameters(path):
    code = read(path, "code")
    tagged = [c for c in code if "parameters" in c.metadata.get("tags", [])]
    assert tagged == code[:1]
    for statement in python(tagged[0].source).body:
        assert isinstance(statement, ast.AnnAssign), f"line {statement.lineno}: write name: type = value  # meaning"
        ast.literal_eval(statement.value)


@pytest.mark.parametrize("path", RUNS, ids=[p.stem for p in RUNS])
def test_a_run_checks_its_parameters_before_anything_else(path):
    "So that a misspelt name stops it, as `papermill -p modle convnext` is tested to do."
    sources = [c.source for c in read(path, "code")[1:]]
    first = next(source for source in sources if not all(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in python(source).body))
    assert re.match(r"config = (config_from\(globals\(\)\)|checked\(\w+Config, globals\(\)\))$", first.splitlines()[0])


# ---- export ----

@pytest.fixture(scope="module")
def exported_again(tmp_path_factory):
    "A copy of the project after nbdev_export and nbdev_clean."
    copy = tmp_path_factory.mktemp("project")
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    hidden = shutil.ignore_patterns(".*", "__pycache__", "assets")
    for folder in (NBS, LIBRARY):
        shutil.copytree(folder, copy / folder.name, ignore=hidden)
    for tool in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).parent / tool], cwd=copy, check=True, capture_output=True)
    return copy


def test_the_library_is_in_step_with_the_notebooks(exported_again):
    for path in [*LIBRARY.glob("*.py"), *NOTEBOOKS]:
        same = path.read_bytes() == (exported_again / path.relative_to(ROOT)).read_bytes()
        assert same, f"{path.name}: run nbdev_export && nbdev_clean"
    assert {p.name for p in (exported_again / LIBRARY.name).glob("*.py")} == {p.name for p in LIBRARY.glob("*.py")}


def test_cleaning_keeps_the_parameters_tag(exported_again):
    path = exported_again / "nbs" / "tagged.ipynb"
    cell = nbformat.v4.new_code_cell("seed: int = 0", metadata={"tags": ["parameters"], "collapsed": True})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", path], cwd=exported_again, check=True)
    cleaned = read(path)[0].metadata
    path.unlink()
    assert cleaned == {"tags": ["parameters"]}


# ---- library ----

def test_each_test_process_gives_its_kernels_ports_of_its_own():
    number, cache = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")), LocalPortCache()
    ports = [cache.find_available_port("127.0.0.1") for _ in range(5)]
    assert len(set(ports)) == 5 and {port // 1000 for port in ports} == {20 + number % 12}


def test_the_library_needs_no_notebook_tools():
    tools = ["IPython", "ipykernel", "ipywidgets", "jupyter_client", "jupyter_core", "jupyterlab", "nbclient", "nbformat"]
    tools += ["papermill", "nbdev", "fastcore", "execnb", "pytest", "hypothesis"]
    modules = sorted(FLOOR)
    code = f"import sys, importlib\nsys.modules.update(dict.fromkeys({tools}))\n"
    code += f"for name in {modules}: importlib.import_module('patchmix_repro.' + name)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_reading_results_and_planning_runs_load_no_network_library():
    "torch, torchvision and timm take most of the time that a page of results or a dry run needs to begin."
    modules = ("ledger", "claims", "curves", "remixer_tables", "report_card", "home", "numbers", "record_list", "choices", "plan", "costs")
    code = f"import sys\nfor name in {modules}: __import__('patchmix_repro.' + name)\nprint(sorted({{'torch', 'torchvision', 'timm'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@each_module
def test_the_library_never_runs_what_it_reads(module):
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    tree = ast.parse((LIBRARY / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {getattr(node, "module", None) or ""} | {a.name for a in node.names}
            assert not names & forbidden, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec"}, f"line {node.lineno}"
            assert called != "torch.load" or "weights_only=True" in ast.unparse(node), f"line {node.lineno}"


@each_module
def test_every_public_argument_is_documented(module):
    source = (LIBRARY / f"{module}.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    for function in public_functions(ast.parse(source)):
        for argument in [a for a in all_arguments(function) if a.arg not in {"self", "cls"}]:
            line = lines[argument.lineno - 1]
            assert "#" in line, f"{module}.{function.name}: {argument.arg} has no comment"
        assert ast.get_docstring(function), f"{module}.{function.name} has no docstring"


def public_functions(tree):
    return [n for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]


def all_arguments(function):
    a = function.args
    return [x for x in [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg] if x]


# ---- site ----

@pytest.mark.parametrize("name", NAMES)
def test_every_picture_is_described(name):
    for cell in read(ROOT / "nbs" / f"{name}.ipynb", "code"):
        if any(kind.startswith("image/") for output in cell.get("outputs", []) for kind in output.get("data", {})):
            assert re.search(r"^#\| fig-alt: \S.+\.$", "".join(cell["source"]), re.MULTILINE), f"cell {cell['id']} shows a picture without a fig-alt line that ends in a full stop"


def hrefs(entry):
    "Every page a sidebar names."
    if isinstance(entry, str):
        return [entry]
    if isinstance(entry, list):
        return [h for e in entry for h in hrefs(e)]
    return ([entry["href"]] if "href" in entry else []) + hrefs(entry.get("contents", []))


def test_the_sidebar_lists_every_notebook():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    listed = hrefs(config["website"]["sidebar"]["contents"])
    assert sorted(listed) == sorted({"README.md", "CHANGELOG.md", *(f"nbs/{name}.ipynb" for name in NAMES)})


def load_relink():
    spec = importlib.util.spec_from_file_location("relink", ROOT / ".ci" / "relink.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_api_links_of_the_site_reach_the_numbered_page(tmp_path):
    relink = load_relink()
    base = sys.modules["site_pages"].API
    for name in ("nbs/00_core.html", "nbs/results/first_runs.html"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    link = f'<a href="{base}core.html#choose">'
    page = tmp_path / "nbs/results/first_runs.html"
    assert relink.relink(link, page, tmp_path) == '<a href="../00_core.html#choose">'
    raw = f'<span class="co"># from [`choose`]({base}core.html#choose)</span>'
    assert relink.relink(raw, page, tmp_path) == '<span class="co"># from choose</span>'
    private = f'<a href="{base}core.html#_hidden"><code>_hidden</code></a>'
    assert relink.relink(private, page, tmp_path) == "<code>_hidden</code>"
    unknown = link.replace("core", "nowhere")
    assert relink.relink(unknown, page, tmp_path) == unknown


def slug(heading):
    "The anchor that GitHub and Quarto give a heading."
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def broken_links(text, folder):
    "Targets of relative Markdown links that do not exist; anchors within the text are checked too."
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    anchors = {slug(h) for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", prose):
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        if file and not (folder / file).exists() or not file and slug(anchor) not in anchors:
            yield target


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "figures/README.md", *(f"nbs/{n}.ipynb" for n in NAMES)])
def test_internal_links_resolve(name):
    path = ROOT / name
    text = "\n\n".join(c.source for c in read(path, "markdown")) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    assert list(broken_links(text, path.parent)) == []


def test_a_broken_link_is_seen(tmp_path):
    text = "# A head\n[a](#a-head) [b](#nope) [c](gone.md) [d](https://example.org) `[e](gone.md)`"
    assert list(broken_links(text, tmp_path)) == ["#nope", "gone.md"]


# ---- README and package ----

README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = configparser.ConfigParser(interpolation=None)
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_readme_lists_every_notebook():
    listed = re.findall(r"^\| \[([\w/]+)\]\(nbs/(.+)\.ipynb\)", README, re.MULTILINE)
    assert all(text == target for text, target in listed)
    assert sorted(target for _, target in listed) == sorted(NAMES)


@pytest.mark.parametrize(("name", "ending"), [("run", "papermill nbs/train.ipynb out.ipynb -p model convnext"), ("test", "nbdev_test --skip_folder_re '^([_.]|results$)' && pytest -n 3")])
def test_the_readme_prints_each_command_on_one_line(name, ending):
    line = re.search(rf"<!-- command: {name} -->\n```bash\n(.*)\n```", README)[1]
    assert line.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt -e '.[")
    assert line.endswith(ending)


def test_five_lines_on_your_own_model_run(tmp_path, monkeypatch):
    "Every block of Python in the README, one after the other, on one small picture of a class."
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    blocks, small, make = re.findall(r"```python\n(.*?)```", README, re.DOTALL), torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 10)), timm.create_model
    small.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert len(blocks) == 6 and all(len(block.splitlines()) <= 5 for block in blocks)
    monkeypatch.setattr(timm, "create_model", lambda name, **given: make(name, depth=2, **given) if name.startswith("vit") else small)
    monkeypatch.chdir(tmp_path)
    for number in range(10):
        for split in ("train", "test"):
            (folder := tmp_path / "my_images" / split / f"class{number}").mkdir(parents=True)
            Image.fromarray(np.full((224, 224, 3), 25 * number, np.uint8)).save(folder / "one.png")
    torch.manual_seed(0)
    images, labels = torch.rand(2, 3, 224, 224), torch.tensor([1, 2])
    space = {"loader": [(images, labels)], "images": images, "labels": labels, "y": labels, "saliency": torch.rand(2, 1, 224, 224), "x": images[:, :, ::4, ::4], "donor_y": labels.flip(0)}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
    assert space["found"].map.shape == space["found"].stderr.shape == (2, 56, 56) and all(part.grad is not None for part in space["model"].parameters())
    imports = {node.module for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)}
    assert imports == {f"patchmix_repro.{name}" for name in ("mixing", "data", "evaluation", "smd", "saliency", "labelers", "remixer")}


def test_constraints_pin_the_whole_environment_and_name_no_host():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {canonicalize_name(pin.split("==")[0]) for pin in pins}
    extras = PROJECT["optional-dependencies"]
    wanted = {canonicalize_name(Requirement(r).name) for r in [*PROJECT["dependencies"], *sum(extras.values(), [])]}
    assert wanted - pinned == {"patchmix-repro"}


def test_the_wheel_carries_the_whole_package(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(LIBRARY, source / LIBRARY.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    inside = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    package = {p.relative_to(source).as_posix() for p in (source / LIBRARY.name).rglob("*") if p.is_file()}
    assert "patchmix_repro/py.typed" in package and package <= inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_one_version_everywhere():
    version = SETTINGS["DEFAULT"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    assert f'__version__ = "{version}"' in (LIBRARY / "__init__.py").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1] == version
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"


def test_the_citation_names_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    titles = [reference["title"] for reference in citation["references"]]
    assert titles[0] == "Hardwiring ViT Patch Selectivity into CNNs using Patch Mixing" and titles[1].startswith("ReMixer")
    assert citation["authors"] == [{"name": "The patchmix_repro contributors"}]
