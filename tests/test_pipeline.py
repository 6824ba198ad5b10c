"""The whole pipeline on a tiny configuration, in a clone of the project: what it leaves, and what it does not repeat."""
import json, os, re, resource, shutil, subprocess, sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from sdmae.notebooks import read_notebook, source, write_notebook

ROOT = Path(__file__).parents[1]
if not (shutil.which("git") and (ROOT/".git").exists()):
    pytest.skip("git and a clone are needed to run DVC", allow_module_level=True)

ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg",
       "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b.c", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b.c"}
TINY = """data.limit=90 data.image_size=32 model.embed_dim=24 model.depth=2 model.num_heads=2
pretrain.epochs=1 pretrain.batch_size=32 pretrain.watch_every=1 probe.labels=[30,all] probe.neighbours=[1,5] probe.C=[0.01,1.0]
methods=[random,mae,sdmae,sdmae_detach] +method.sdmae_detach={of:sdmae,detach_teacher:true} probe.subsets=2
finetune.labels=[30,all] finetune.epochs=1 finetune.min_steps=2 finetune.batch_size=32
lesions.data.limit=150 lesions.model.embed_dim=24 lesions.model.depth=2 lesions.model.num_heads=2 lesions.methods=[random,mae,miram] lesions.tasks=[margins]
lesions.pretrain.epochs=1 lesions.pretrain.batch_size=32 lesions.pretrain.watch_every=1 lesions.probe.neighbours=[1,5] lesions.probe.C=[0.01,1.0]
lesions.finetune.epochs=2 lesions.finetune.min_steps=2 lesions.finetune.batch_size=32
references=[histogram,natural] natural.image_size=32 report.bootstrap=20 report.tsne_tiles=60 device=cpu precision=float32""".split()


def sh(folder, *command, fails=False):
    r = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True)
    assert bool(r.returncode) == fails, f"{' '.join(command)} ended with {r.returncode}\n{r.stdout[-6000:]}\n{r.stderr[-6000:]}"
    return r.stdout + r.stderr


def repro(folder, *args):
    "The stages that `dvc repro` ran, or with --dry would run, from the present state on."
    return re.findall(r"Running stage '([^']+)'", sh(folder, "dvc", "repro", *args))


def edit_params(folder, **changes):
    "Edit params.yaml by hand; a section and its key are joined by two underscores."
    values = yaml.safe_load((folder/"params.yaml").read_text())
    for key, value in changes.items():
        *sections, last = key.split("__")
        at = values
        for o in sections: at = at[o]
        at[last] = value
    (folder/"params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def saved(path, prose=True, code=None):
    "Save a notebook as JupyterLab does after a run: outputs, counts, another kernel; and with another text or more code."
    nb = read_notebook(path)
    for i, c in enumerate(nb["cells"]):
        if c["cell_type"] == "code": c.update(execution_count=i + 1, outputs=[dict(output_type="stream", name="stdout", text=["seen\n"])])
        elif prose and i: c["source"] = source(c) + "\n\nA remark."
    if prose: nb["cells"].append(dict(cell_type="markdown", metadata={}, source="An afterthought.", id="zz1"))
    if code: nb["cells"].append(dict(cell_type="code", metadata={}, source=code, id="zz2", outputs=[], execution_count=1))
    nb["metadata"]["language_info"] = dict(name="python", version="3.99")
    write_notebook(nb, path)


RESULTS = ("data/prepared", "runs", "evals", "lesions", "metrics", "reports")

def contents(folder, within=RESULTS):
    "Every result and when it was written."
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for o in within for p in sorted((folder/o).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "A clone of the project as it stands, with the sample pulled and everything run once, by `dvc exp run`."
    folder = tmp_path_factory.mktemp("clone")/"sdmae"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for o in filter(None, listed.split("\0")):
        if not (ROOT/o).is_file() or o == "dvc.lock" or o.startswith("metrics/"): continue
        (folder/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/o, folder/o)
    for o in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "as it stands"]): sh(folder, "git", *o)
    sh(folder, "dvc", "pull", "data.dvc")
    sh(folder, "dvc", "exp", "run", *(o for s in TINY for o in ("-S", s)))
    return folder


@pytest.fixture
def work(clone):
    "The finished clone; what a test edits is undone."
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=clone, capture_output=True, text=True, check=True).stdout
    before = {o: (clone/o).read_bytes() for o in ["dvc.lock", *listed.split("\0")] if o and (clone/o).is_file() and not o.startswith("metrics/")}
    results = contents(clone, (*RESULTS, "build"))
    yield clone
    for o, data in before.items():
        if (clone/o).read_bytes() != data: (clone/o).write_bytes(data)
    if contents(clone, (*RESULTS, "build")) != results: sh(clone, "dvc", "checkout", "--force") # two seconds, and most tests touch no result


def params(folder): return yaml.safe_load((folder/"params.yaml").read_text())


# What it leaves

def test_parameters_are_those_composed(work):
    assert params(work)["model"]["embed_dim"] == 24 and params(work)["probe"]["labels"] == [30, "all"]


def test_results(work):
    p = params(work)
    for seed in p["seeds"]:
        for o in p["methods"]:
            for f in ("encoder.safetensors", "config.json", "notebook.ipynb"): assert (work/"runs"/f"{o}-{seed}"/f).is_file(), (o, f)
        for protocol, encoders in dict(finetune=p["methods"], probe=[*p["methods"], "supervised", "histogram", "natural"]).items():
            for o in encoders:
                assert (work/"evals"/protocol/f"{o}-{seed}"/"predictions.npz").is_file(), (protocol, o)
                assert json.loads((work/"metrics"/f"{protocol}-{o}-{seed}.json").read_text()), (protocol, o)


def test_scratch_has_two_budgets_and_stands_beside_every_method(work):
    found = json.loads((work/"metrics"/"finetune-random-0.json").read_text())
    assert set(found) == {"finetune", "finetune_long"} and all(set(f) == {"30", "all"} for f in found.values())
    assert set(json.loads((work/"metrics"/"finetune-mae-0.json").read_text())) == {"finetune"}
    paired = pd.read_csv(work/"reports"/"comparison"/"paired.csv")
    assert {(a, b) for a, b in zip(paired.a, paired.b)} >= {(m, b) for m in ("mae", "sdmae") for b in ("random", "histogram", "natural", "supervised", "supervised_long")}
    page = (work/"reports"/"comparison"/"index.html").read_text()
    assert "95 % over seeds" in page and "Supervised from scratch, longer" in page and "Natural-image weights" in page


def test_results_of_the_second_comparison(work):
    p, folder = params(work)["lesions"], work/"lesions"
    for o in p["methods"]: assert (folder/"runs"/f"{o}-0"/"encoder.safetensors").is_file(), o
    for task in p["tasks"]:
        for name in [f"finetune-{o}" for o in p["methods"]] + [f"probe-{o}" for o in (*p["methods"], "histogram")]:
            for by_labels in json.loads((folder/task/"metrics"/f"{name}-0.json").read_text()).values():
                entry = by_labels["all"]
                assert 0 <= entry["macro_ap"] <= 1 and {"ap_0", "released_macro_ap"} <= set(entry) and entry["intervals"]["macro_auc"][0] <= entry["macro_auc"], (task, name)
    page = (work/"reports"/"lesions"/"index.html").read_text()
    assert "synthetic" in page and "MIRAM" in page and (work/"reports"/"lesions"/"reconstructions_miram.png").is_file()


def test_the_report_says_what_it_is_made_on(work):
    folder = work/"reports"/"comparison"
    page = (folder/"index.html").read_text()
    assert "synthetic sample" in page and "<img" in page and list(folder.glob("*.md")) and list(folder.glob("*.csv")) and list(folder.glob("*.png"))
    assert "What each switch does" in page and (folder/"ablation_sdmae.png").is_file()
    assert (work/"reports"/"data"/"contact_sheet.png").is_file() and json.loads((work/"metrics"/"data.json").read_text())["counts"]


def test_metrics_and_plots_are_found(work, tmp_path):
    shown = json.loads(subprocess.run(["dvc", "metrics", "show", "--json"], cwd=work, env=ENV, capture_output=True, text=True, check=True).stdout)
    listed = shown[""]["data"]
    assert listed and not [k for k, v in listed.items() if "error" in v]
    said = sh(work, "dvc", "plots", "show", "--out", str(tmp_path))
    assert "failed" not in said and "loss" in (tmp_path/"index.html").read_text()


def test_executed_notebooks_have_their_prose(work):
    for path in sorted((work/"runs").glob("*/notebook.ipynb")):
        cells = read_notebook(path)["cells"]
        assert cells[0]["cell_type"] == "markdown" and any(c.get("execution_count") for c in cells), path


# What it does not repeat

def cpu_seconds():
    "What finished child processes took of the processor: a busy machine lengthens the wait, not this."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_again_does_nothing(work):
    before, start = contents(work), cpu_seconds()
    assert repro(work) == []
    assert cpu_seconds() - start < 15 and contents(work) == before


def test_a_parameter_of_sdmae_reruns_no_mae(work):
    edit_params(work, method__sdmae__loss_weight=0.35)
    assert repro(work, "--dry") == ["check"] + [f"pretrain@sdmae-{s}" for s in params(work)["seeds"]]
    sh(work, "dvc", "repro", "check") # it resolves variants
    assert repro(work, "--dry") == [f"pretrain@{m}-{s}" for m in ("sdmae", "sdmae_detach") for s in params(work)["seeds"]]


def test_a_parameter_of_a_variant_reruns_the_variant(work):
    edit_params(work, method__sdmae_detach__center_on="logits")
    assert repro(work, "--dry") == ["check"] + [f"pretrain@sdmae_detach-{s}" for s in params(work)["seeds"]]


def test_an_edit_of_a_method_reruns_what_loads_it(work):
    saved(work/"nbs"/"methods"/"sdmae.ipynb", code="#| export\nEDITED = True")
    sh(work, "nbdev_export")
    sh(work, "dvc", "repro", "check")
    assert repro(work, "--dry") == [f"pretrain@{m}-{s}" for m in ("sdmae", "sdmae_detach") for s in params(work)["seeds"]]


def test_a_parameter_of_miram_reruns_miram(work):
    edit_params(work, lesions__method__miram__target="native")
    assert repro(work, "--dry") == ["check", "lesions_pretrain@miram-0"]


def test_the_budget_reruns_every_pretraining_and_no_preparation(work):
    edit_params(work, pretrain__epochs=2)
    assert {o.split("@")[0] for o in repro(work, "--dry")} == {"check", "pretrain"}


def test_parameters_of_fine_tuning_rerun_no_pretraining(work):
    edit_params(work, finetune__label_smoothing=0.2)
    assert {o.split("@")[0] for o in repro(work, "--dry")} == {"check", "finetune"}


def test_parameters_of_the_report_rerun_the_report(work):
    edit_params(work, report__bootstrap=30)
    assert sorted(repro(work, "--dry")) == ["check", "lesions_report", "report"]


def test_editing_a_figure_reruns_no_training(work):
    saved(work/"nbs"/"report"/"figures.ipynb", code="#| export\nACCENT = 'tab:red'")
    sh(work, "nbdev_export")
    assert "ACCENT" in (work/"sdmae"/"report"/"figures.py").read_text()
    assert sorted(repro(work, "--dry")) == ["lesions_report", "report"]


def test_saving_pipeline_notebooks_reruns_no_training(work):
    before = contents(work)
    for path in (work/"nbs"/"pipeline").glob("[0-9]*.ipynb"): saved(path, prose=path.stem not in ("60_report", "70_lesions"))
    assert repro(work) == ["check"] and contents(work) == before


def test_the_report_follows_its_prose(work):
    saved(work/"nbs"/"pipeline"/"60_report.ipynb")
    assert repro(work) == ["check", "report"]
    assert "An afterthought." in (work/"reports"/"comparison"/"index.html").read_text()


def test_saving_library_notebooks_reruns_nothing(work):
    for path in (work/"nbs").glob("*/*.ipynb"):
        if path.parent.name != "pipeline": saved(path)
    sh(work, "nbdev_export")
    assert repro(work, "--dry") == []


def test_code_of_a_pipeline_notebook_reruns_its_stages(work):
    saved(work/"nbs"/"pipeline"/"30_probe.ipynb", code="1 + 1")
    sh(work, "dvc", "repro", "check")
    assert {o.split("@")[0] for o in repro(work, "--dry")} == {"probe", "probe_supervised", "probe_references", "lesions_probe", "lesions_probe_references"}


# Faults stop it before anything earlier is gone

@pytest.mark.parametrize("changes, message", [
    (dict(pretrain__epchs=3), "pretrain.epchs: unknown parameter"),
    (dict(pretrain__epochs="many"), "pretrain.epochs"),
    (dict(model__patch_size=7), "not divisible by model.patch_size 7"),
    (dict(methods=["random", "sdmea"]), "sdmea"),
    (dict(data__path="data/nowhere"), "data/nowhere")])
def test_a_faulty_parameter_stops_everything(work, changes, message):
    before = contents(work)
    edit_params(work, **changes)
    assert message in sh(work, "dvc", "repro", fails=True)
    assert contents(work) == before


def test_a_truncated_archive_keeps_what_was_prepared(work):
    before = {k: v for k, v in contents(work).items() if k.startswith("data/prepared")}
    shutil.copytree(work/"data"/"sample"/"nct", work/"data"/"broken")
    archive = work/"data"/"broken"/"NCT-CRC-HE-100K.zip"
    archive.write_bytes(archive.read_bytes()[:-5000])
    edit_params(work, data__path="data/broken")
    assert "NCT-CRC-HE-100K.zip" in sh(work, "dvc", "repro", fails=True)
    shutil.rmtree(work/"data"/"broken")
    assert {k: v for k, v in contents(work).items() if k.startswith("data/prepared")} == before
