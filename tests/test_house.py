"""The house stands: notebooks, library, README, params.yaml and dvc.yaml agree with one another.
Whatever writes works on a copy, so that a failing test never touches the tree."""
import ast, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml

from sdmae.params import compose
from sdmae.pipeline import __main__ as command_line
from sdmae.pipeline.__main__ import main
from sdmae.pipeline.code import imported, imports_of, read_notebook, source, write_notebook
from sdmae.pipeline.pages import html, readme, rebase
from sdmae.pipeline.plan import STAGES
from sdmae.pipeline.run import NotebookFailed, check_parameters, defaults, run, strip

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PIPELINE = sorted((ROOT/"nbs"/"pipeline").glob("[0-9]*.ipynb"))
ORDER = ["files", "processes", "params", "made", "data", "sources", "sample", "views", "models", "methods", "train", "evaluate", "report", "pipeline"]

name = lambda p: str(p.relative_to(ROOT/"nbs"))


def files(folder, *patterns):
    return {str(p.relative_to(folder)): p.read_bytes() for o in patterns for p in sorted(folder.glob(o)) if p.is_file()}


def changed(before, after):
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


@pytest.fixture
def copy(tmp_path):
    "The notebooks and the library, to write on."
    for o in ("nbs", "sdmae"): shutil.copytree(ROOT/o, tmp_path/o, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for o in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT/o, tmp_path)
    return tmp_path


def tool(command, cwd):
    r = subprocess.run([Path(sys.executable).with_name(command)], cwd=cwd, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr


# What nbdev and the README are made from

def test_export_changes_nothing(copy):
    before = files(copy, "sdmae/**/*.py")
    tool("nbdev_export", copy)
    assert changed(before, files(copy, "sdmae/**/*.py")) == [], "run nbdev_export: these modules are not what their notebooks say"


def test_every_module_has_a_notebook():
    "A module whose notebook is gone would stay behind unnoticed."
    for p in (ROOT/"sdmae").rglob("*.py"):
        if p.name in ("__init__.py", "_modidx.py"): continue
        m = re.search(r"File to edit: (\S+?)\.?$", p.read_text(), re.M)
        assert m and (p.parent/m[1]).is_file(), f"{p.relative_to(ROOT)} is exported by no notebook: delete it"


def test_notebooks_are_clean(copy):
    before = files(copy, "nbs/**/*.ipynb")
    tool("nbdev_clean", copy)
    assert changed(before, files(copy, "nbs/**/*.ipynb")) == [], "run nbdev_clean: these notebooks carry metadata"


def test_cleaning_keeps_the_tag_of_parameters(copy):
    tool("nbdev_clean", copy)
    for p in (copy/"nbs"/"pipeline").glob("[0-9]*.ipynb"): assert defaults(read_notebook(p), p.name)


def test_readme_is_the_index():
    assert (ROOT/"README.md").read_text(encoding="utf8") == readme(root=ROOT), "run `make readme`: README.md is not what nbs/index.ipynb says"


def test_readme_links_lead_somewhere():
    links = re.findall(r"(?:\]\(|src=\"|href=\")([^)\"\s]+)", (ROOT/"README.md").read_text(encoding="utf8"))
    missing = [o for o in links if not re.match(r"[a-z]+:|#", o) and not (ROOT/o.split("#")[0]).exists()]
    assert missing == []


def test_params_are_the_composition_of_conf():
    assert yaml.safe_load((ROOT/"params.yaml").read_text()) == compose(), "params.yaml is not what conf/ composes: `make params` writes it anew, `dvc exp run -S …` and hand edits change it"


# How a notebook is written

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_form(path):
    cells = [(c["cell_type"], source(c)) for c in read_notebook(path)["cells"]]
    kind, head = cells[0]
    assert kind == "markdown" and re.match(r"# .+\n\n> .+", head), "starts with a title and a one-line subtitle"
    prose, code = (sum(k == o for k, _ in cells) for o in ("markdown", "code"))
    assert 3 * prose >= code, f"{prose} cells of prose for {code} of code"
    assert [o for k, t in cells if k == "code" for o in t.splitlines() if len(o) > 140] == [], "lines of more than 140 characters"


def test_exported_cells_are_short():
    "Ten lines or fewer in the median, 25 nearly always."
    texts = [source(c) for p in NOTEBOOKS for c in read_notebook(p)["cells"] if c["cell_type"] == "code"]
    lines = sorted(sum(bool(o.strip()) for o in t.splitlines()[1:]) for t in texts if re.match(r"#\|\s*export", t))
    assert lines[len(lines)//2] <= 10 and lines[int(.97*len(lines))] <= 25 and lines[-1] <= 30, lines[-20:]


def test_imports_run_one_way():
    place = {o: i for i, o in enumerate(ORDER)}
    wrong = []
    for p in sorted((ROOT/"sdmae").rglob("*.py")):
        parts = p.relative_to(ROOT).with_suffix("").parts
        if len(parts) < 2 or parts[1] not in place: continue
        for o in imported(p.read_text(), ".".join(parts)):
            top = o.split(".")[1] if o.startswith("sdmae.") else None
            if top in place and place[top] > place[parts[1]]: wrong.append(f"{'/'.join(parts)} imports {o}")
    assert wrong == []


# dvc.yaml and the notebooks of its stages

def test_dvc_yaml_can_be_read():
    "It shows the pipeline, not lists of modules."
    text = (ROOT/"dvc.yaml").read_text()
    assert len(text.splitlines()) <= 130 and ".py" not in text and "sdmae/" not in text


def test_every_pipeline_notebook_is_a_stage():
    assert {*STAGES.values()} == {p.stem for p in PIPELINE}


@pytest.mark.parametrize("command", [["prepare", "tissue"], ["pretrain", "tissue", "mae", "0"], *(["evaluate", "tissue", p, "tissue", "mae", "0"] for p in ("probe", "finetune", "linear_sgd", "segment", "nuclei")), ["report", "tissue"]])
def test_a_stage_gives_every_parameter(command, monkeypatch):
    "So that no default of a notebook decides what the pipeline computes."
    ran = []
    monkeypatch.setattr(command_line, "run", lambda notebook, out, given: ran.append((Path(notebook).stem, given)))
    monkeypatch.setattr(command_line, "need", lambda *a: None)
    monkeypatch.setattr(command_line, "applies", lambda *a: True); monkeypatch.setattr(command_line, "config_of", lambda *a: {}); monkeypatch.setattr("sdmae.pipeline.pages.html", lambda *a, **k: None); monkeypatch.setattr("sdmae.pipeline.schedule.conclusion", lambda *a: "")
    assert main(command) == 0
    [(stage, given)] = ran
    assert set(given) == set(defaults(read_notebook(ROOT/"nbs"/"pipeline"/f"{STAGES[stage]}.ipynb")))


LOAD = """
import json, os, sys
import dvclive, matplotlib.pyplot, pandas, sklearn.linear_model, sklearn.model_selection, timm, torchvision
for name, lines in json.load(sys.stdin).items():
    if not os.fork():
        exec(lines)
        print(json.dumps([name, [m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'sdmae']]), flush=True)
        sys.exit()
    if os.wait()[1]: sys.exit(1)
"""

@pytest.fixture(scope="module")
def really_loaded():
    "Python itself is the oracle: the files that each pipeline notebook's imports load, each in a fork of one interpreter, so that torch is imported once."
    def lines(path):
        code = "\n".join(source(c) for c in read_notebook(path)["cells"] if c["cell_type"] == "code")
        return "\n".join(ast.unparse(o) for o in ast.walk(ast.parse(code)) if isinstance(o, (ast.Import, ast.ImportFrom)) and "sdmae" in ast.unparse(o))
    r = subprocess.run([sys.executable, "-c", LOAD], input=json.dumps({name(p): lines(p) for p in PIPELINE}), cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return dict(map(json.loads, r.stdout.splitlines()))


@pytest.mark.parametrize("path", PIPELINE, ids=name)
def test_the_listed_modules_are_those_really_loaded(path, really_loaded):
    "The listing follows the source."
    loaded_files = {str(Path(o).relative_to(ROOT)) for o in really_loaded[name(path)]}
    assert loaded_files and {o for o in loaded_files if not o.endswith("__init__.py")} <= set(imports_of(path, ROOT))


# The tool: bad input

@pytest.fixture(autouse=True)
def tidy(tmp_path):
    "What this test's failing notebooks leave behind is taken away; other tests run notebooks at the same time, in the same folder."
    yield
    for o in (ROOT/"build"/"failed").glob(f"*{tmp_path.name}-*.ipynb"): o.unlink()


def nb(*cells):
    out = [dict(cell_type="code", source=s, metadata=dict(tags=t), outputs=[], execution_count=None) for s, t in cells]
    return dict(cells=out, nbformat=4, nbformat_minor=4, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))


def test_not_a_notebook(tmp_path):
    (tmp_path/"a.ipynb").write_text('{"cells": [')
    (tmp_path/"b.ipynb").write_text('{"a": 1}')
    with pytest.raises(FileNotFoundError, match="none.ipynb"): read_notebook(tmp_path/"none.ipynb")
    with pytest.raises(ValueError, match="a.ipynb"): read_notebook(tmp_path/"a.ipynb")
    with pytest.raises(ValueError, match="no cells"): read_notebook(tmp_path/"b.ipynb")


@pytest.mark.parametrize("cells, message", [
    ([("a = 1", [])], "0 cells have the tag"),
    ([("a = 1", ["parameters"]), ("b = 1", ["parameters"])], "2 cells have the tag"),
    ([("a = b = 1", ["parameters"])], "more than `name = value`"),
    ([("print(1)", ["parameters"])], "more than `name = value`"),
    ([("a = open('x')", ["parameters"])], "plain value")])
def test_faulty_cell_of_parameters(cells, message):
    with pytest.raises(ValueError, match=message): defaults(nb(*cells), "x.ipynb")


@pytest.mark.parametrize("given, message", [
    (dict(sed=1, method="mae"), "no parameter 'sed', but 'seed'"), ({}, "method must be given"),
    (dict(method="mae", seed="one"), "seed must be int"), (dict(method="mae", seed=True), "seed must be int")])
def test_faulty_parameters(given, message):
    with pytest.raises(ValueError, match=message): check_parameters(nb(("method: str = None\nseed = 0", ["parameters"])), given, "x.ipynb")


def test_a_float_may_be_given_as_int():
    assert check_parameters(nb(("rate = 0.5", ["parameters"])), dict(rate=1)) == dict(rate=1)


def test_a_failing_notebook(tmp_path, capsys):
    "One plain message, exit code 1, no `out`, and the notebook as far as it came."
    write_notebook(nb(("n = None", ["parameters"]), ("print('started')\nraise ValueError(f'row {n} of labels.csv: no such class')", [])), tmp_path/"fails.ipynb")
    out = tmp_path/"run"/"fails.ipynb"
    assert main(["run", str(tmp_path/"fails.ipynb"), str(out), "-p", "n", "7"]) == 1
    said = capsys.readouterr()
    assert "started" in said.out and "ValueError: row 7 of labels.csv: no such class" in said.err
    kept = ROOT/re.search(r"build/failed/\S+?\.ipynb", said.err)[0]
    assert "started" in kept.read_text() and not out.exists()


def test_a_failing_run_keeps_the_earlier_notebook(tmp_path):
    write_notebook(nb(("n = None", ["parameters"]), ("assert n < 2", [])), tmp_path/"a.ipynb")
    out = run(tmp_path/"a.ipynb", tmp_path/"run"/"a.ipynb", dict(n=1))
    before = out.read_bytes()
    with pytest.raises(NotebookFailed, match="AssertionError"): run(tmp_path/"a.ipynb", out, dict(n=2))
    assert out.read_bytes() == before


@pytest.mark.parametrize("code, message", [
    ("os.kill(os.getpid(), 9)", "killed by SIGKILL .mostly the system does this when memory runs out.*without a last word"),
    ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV .a fault in a library.*ctypes"),
    ("os.write(2, b'the last words'); os._exit(3)", "exit code 3. It said:\nthe last words")])
def test_a_kernel_that_dies_is_told_by_how_it_died(code, message, tmp_path):
    write_notebook(nb(("n = 0", ["parameters"]), (f"import os\n{code}", [])), tmp_path/"a.ipynb")
    with pytest.raises(NotebookFailed, match=f"(?s){message}"): run(tmp_path/"a.ipynb", tmp_path/"out.ipynb")


def test_the_kernel_is_the_interpreter_of_the_stage(tmp_path, monkeypatch):
    "Whatever a module system calls python3."
    kernel = tmp_path/"jupyter"/"kernels"/"python3"; kernel.mkdir(parents=True)
    (kernel/"kernel.json").write_text(json.dumps(dict(argv=["/bin/false", "-f", "{connection_file}"], display_name="module", language="python")))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path/"jupyter"))
    write_notebook(nb(("n = 0", ["parameters"]), ("import sys\nsys.executable", [])), tmp_path/"a.ipynb")
    assert sys.executable in json.dumps(read_notebook(run(tmp_path/"a.ipynb", tmp_path/"out.ipynb")))


def test_progress_is_streamed_and_kept_short(tmp_path, capsys):
    loop = "from tqdm import tqdm\nfor i in tqdm(range(200), mininterval=0): pass\nprint('done')"
    write_notebook(nb(("n = 0", ["parameters"]), (loop, [])), tmp_path/"a.ipynb")
    text = json.dumps(read_notebook(run(tmp_path/"a.ipynb", tmp_path/"out.ipynb"))["cells"][-1]["outputs"])
    said = capsys.readouterr()
    assert "200/200" in said.err and said.err.count("it/s") > 20 and said.out == "done\n"
    assert "200/200" in text and text.count("it/s") < 5


def test_figures_are_shown_whatever_the_backend(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    write_notebook(nb(("n = 0", ["parameters"]), ("import matplotlib.pyplot as plt\nplt.plot([0, 1])", [])), tmp_path/"a.ipynb")
    page = html(run(tmp_path/"a.ipynb", tmp_path/"out.ipynb"), tmp_path/"out.html").read_text()
    assert "<img" in page and not re.findall(r'(?:src|href)="https?:', page), "pictures are inside, and nothing is loaded from elsewhere"


def test_stripping_is_deterministic(tmp_path):
    for p in PIPELINE:
        strip(p, tmp_path/"a.ipynb"); strip(tmp_path/"a.ipynb", tmp_path/"b.ipynb")
        a, b = (read_notebook(tmp_path/o) for o in ("a.ipynb", "b.ipynb"))
        assert a["cells"] == b["cells"] and all(c["cell_type"] == "code" and not c["outputs"] for c in a["cells"])


def test_links_are_rebased():
    text = '<img src="images/a.png"> [b](../data/c.md#d) [e](mailto:f@g.h) [i](/j)'
    assert rebase(text, Path("nbs"), Path(".")) == '<img src="nbs/images/a.png"> [b](data/c.md#d) [e](mailto:f@g.h) [i](/j)'


# Set-up

def test_requirements_are_pinned():
    "What settings.ini asks for stands in constraints.txt, in a version that it allows."
    from configparser import ConfigParser
    from packaging.requirements import Requirement
    ini = ConfigParser(delimiters=["="]); ini.read(ROOT/"settings.ini")
    pins = dict(o.lower().split("==") for o in (ROOT/"constraints.txt").read_text().split("\n") if "==" in o and not o.startswith("#"))
    for o in map(Requirement, " ".join(ini["DEFAULT"][k] for k in ("requirements", *(f"{o}_requirements" for o in ("pipeline", "notebooks", "dev", "slides", "parquet", "bench")))).split()):
        assert o.name.lower() in pins, f"constraints.txt lacks {o.name}"
        assert o.specifier.contains(pins[o.name.lower()]), f"constraints.txt pins {o.name} outside {o.specifier}"


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_an_old_python_is_refused(tmp_path):
    for o in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt"): shutil.copy(ROOT/o, tmp_path)
    old = tmp_path/"python2"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Python 2.7.18' && exit 0\nexit 1\n"); old.chmod(0o755)
    r = subprocess.run(["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode and "needs Python 3.11 or newer" in r.stderr and "Python 2.7.18" in r.stderr and not (tmp_path/".venv").exists()
