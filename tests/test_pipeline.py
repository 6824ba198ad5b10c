"""The whole pipeline on a tiny configuration, in a clone of the project: what it leaves, and what it does not repeat."""
import json, os, re, resource, shutil, subprocess, sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from sdmae.params import eval_of, run_of
from sdmae.pipeline.code import read_notebook, source, write_notebook

ROOT = Path(__file__).parents[1]
if not (shutil.which("git") and (ROOT/".git").exists()):
    pytest.skip("git and a clone are needed to run DVC", allow_module_level=True)

ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg",
       "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b.c", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b.c"}
TINY = """data.tissue.limit=90 data.tissue.image_size=32 data.lesions.limit=150 model.embed_dim=24 model.depth=2 model.num_heads=2
compare.tissue.encoders=[random,histogram,natural,supervised,mae,sdmae,sdmae_detach] +encoder.sdmae_detach={of:sdmae,detach_teacher:true} encoder.natural.image_size=32
compare.lesions.encoders=[lesion_random,lesion_histogram,lesion_mae,lesion_miram] compare.lesions.tasks=[margins]
pretrain.tissue.epochs=1 pretrain.tissue.batch_size=32 pretrain.tissue.watch_every=1 pretrain.supervised.epochs=1 pretrain.lesions.epochs=1
probe.few.labels=[30,all] probe.few.neighbours=[1,5] probe.few.C=[0.01,1.0] probe.few.subsets=2
finetune.few.labels=[30,all] finetune.few.epochs=1 finetune.few.min_steps=2 finetune.few.batch_size=32 ++finetune.lesions.epochs=2
report.bootstrap=20 report.tsne_tiles=60 device=cpu precision=float32""".split()


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


RESULTS = ("stores", "runs", "evals", "metrics", "reports")

def contents(folder, within=RESULTS):
    "Every result and when it was written."
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for o in within for p in sorted((folder/o).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "A clone of the project as it stands, with the sample pulled and everything run once, side by side as `make repro` does."
    folder = tmp_path_factory.mktemp("clone")/"sdmae"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for o in filter(None, listed.split("\0")):
        if not (ROOT/o).is_file() or o == "dvc.lock" or o.startswith("metrics/"): continue
        (folder/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/o, folder/o)
    for o in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "as it stands"]): sh(folder, "git", *o)
    sh(folder, "dvc", "pull", "data.dvc")
    compose = "import sys, yaml; from sdmae.params import compose; yaml.safe_dump(compose(sys.argv[1:]), open('params.yaml', 'w'), sort_keys=False)"
    sh(folder, sys.executable, "-c", compose, *TINY)
    sh(folder, sys.executable, "-m", "sdmae.pipeline", "repro", "--jobs", "2")
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


def will_run(folder):
    "The stages that would run once the plan is made anew."
    sh(folder, "dvc", "repro", "plan")
    return repro(folder, "--dry")


def kinds(stages): return {o.split("@")[0] for o in stages}


# What it leaves

def test_results(work):
    "Every encoder is there, and every score that applies; baselines are encoders like the rest."
    for study, c in params(work)["compare"].items():
        for e in c["encoders"]:
            for f in ("encoder/encoder.safetensors", "encoder/config.json", "made.json", "notebook.ipynb"): assert (work/run_of(study, e, 0)/f).is_file(), (e, f)
            for t in c["tasks"]:
                for protocol in ("probe", "finetune"):
                    found = json.loads((work/eval_of(study, protocol, t, e, 0)/"scores.json").read_text())
                    applies = protocol == "probe" or e not in ("histogram", "lesion_histogram", "supervised")
                    assert bool(found["results"]) == applies and (found["encoder"], found["task"], found["seed"]) == (e, t, 0), (protocol, t, e)
                    assert (work/eval_of(study, protocol, t, e, 0)/"predictions.npz").is_file() == applies


def test_scratch_has_two_budgets_and_stands_beside_every_method(work):
    scores = lambda e: json.loads((work/eval_of("tissue", "finetune", "tissue", e, 0)/"scores.json").read_text())["results"]
    assert set(scores("random")) == {"finetune", "finetune_long"} and all(set(f) == {"30", "all"} for f in scores("random").values())
    assert set(scores("mae")) == {"finetune"}
    paired = pd.read_csv(next((work/"reports"/"tissue").rglob("paired.csv")))
    assert {(a, b) for a, b in zip(paired.a, paired.b)} >= {(m, b) for m in ("mae", "sdmae") for b in ("random", "histogram", "natural", "supervised", "random_long")}
    page = (work/"reports"/"tissue"/"index.html").read_text()
    assert "95 % over seeds" in page and "longer" in page and "Natural-image weights" in page


def test_results_of_the_second_comparison(work):
    for e in params(work)["compare"]["lesions"]["encoders"]:
        for by_labels in json.loads((work/eval_of("lesions", "probe", "margins", e, 0)/"scores.json").read_text())["results"].values():
            entry = by_labels["all"][0] if isinstance(by_labels["all"], list) else by_labels["all"]
            assert 0 <= entry["macro_ap"] <= 1 and {"ap_0", "released_macro_ap"} <= set(entry) and entry["intervals"]["macro_auc"][0] <= entry["macro_auc"], e
    page = (work/"reports"/"lesions"/"index.html").read_text()
    assert "synthetic" in page and "MIRAM" in page and (work/"reports"/"lesions"/"reconstructions_lesion_miram.png").is_file()


def test_the_report_says_what_it_is_made_on(work):
    folder = work/"reports"/"tissue"
    page = (folder/"index.html").read_text()
    assert "synthetic sample" in page and "<img" in page and list(folder.rglob("*.md")) and list(folder.rglob("*.csv")) and list(folder.rglob("*.png"))
    assert "What each switch does" in page and list(folder.rglob("ablation_sdmae.png"))
    assert (work/"reports"/"data"/"tissue"/"contact_sheet.png").is_file() and json.loads((work/"metrics"/"data"/"tissue.json").read_text())["counts"]


def test_metrics_and_plots_are_found(work, tmp_path):
    shown = json.loads(subprocess.run(["dvc", "metrics", "show", "--json"], cwd=work, env=ENV, capture_output=True, text=True, check=True).stdout)
    listed = shown[""]["data"]
    assert listed and not [k for k, v in listed.items() if "error" in v]
    said = sh(work, "dvc", "plots", "show", "--out", str(tmp_path))
    assert "failed" not in said and "loss" in (tmp_path/"index.html").read_text()


def test_executed_notebooks_have_their_prose(work):
    for path in sorted((work/"runs").glob("*/*/notebook.ipynb")):
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
    edit_params(work, encoder__sdmae__loss_weight=0.35)
    said = sh(work, "dvc", "repro", "plan")
    assert "encoders sdmae: section.loss_weight: 0.2 → 0.35" in said and "encoders mae" not in said
    assert repro(work, "--dry") == ["pretrain@tissue-sdmae-0", "pretrain@tissue-sdmae_detach-0"]


def test_a_parameter_of_a_variant_reruns_the_variant(work):
    edit_params(work, encoder__sdmae_detach__center_on="logits")
    assert will_run(work) == ["pretrain@tissue-sdmae_detach-0", "report@tissue"]


def test_an_edit_of_a_method_reruns_what_loads_it(work):
    saved(work/"nbs"/"methods"/"sdmae.ipynb", code="#| export\nEDITED = True")
    sh(work, "nbdev_export")
    assert "code of sdmae/methods/sdmae.py" in sh(work, "dvc", "repro", "plan")
    assert repro(work, "--dry") == ["pretrain@tissue-sdmae-0", "pretrain@tissue-sdmae_detach-0"]


def test_a_comment_or_a_docstring_reruns_nothing(work):
    path = work/"nbs"/"methods"/"masked.ipynb"
    nb = read_notebook(path)
    cell = next(c for c in nb["cells"] if "class MaskedAutoencoder" in source(c))
    cell["source"] = re.sub(r'"([A-Z][^"]+)"', r'"\1 And more."', source(cell), count=1) + "\n# a remark"
    write_notebook(nb, path)
    sh(work, "nbdev_export")
    assert "And more." in (work/"sdmae"/"methods"/"masked.py").read_text() and will_run(work) == []


def test_a_parameter_of_miram_reruns_miram(work):
    edit_params(work, encoder__lesion_miram__target="native")
    assert will_run(work) == ["lesions_pretrain@lesions-lesion_miram-0"]


def test_one_parameter_by_S_reruns_its_encoder(work):
    sh(work, "dvc", "exp", "run", *(o for x in [*TINY, "encoder.mae.mask_ratio=0.6"] for o in ("-S", x)), "plan")
    assert params(work)["model"]["embed_dim"] == 24 and params(work)["encoder"]["mae"]["mask_ratio"] == 0.6
    assert repro(work, "--dry") == ["pretrain@tissue-mae-0", "lesions_pretrain@lesions-lesion_mae-0", "lesions_pretrain@lesions-lesion_miram-0"]


def test_the_budget_reruns_every_pretraining_and_no_preparation(work):
    edit_params(work, pretrain__tissue__epochs=2)
    assert {*will_run(work)} == {f"pretrain@tissue-{e}-0" for e in ("mae", "sdmae", "sdmae_detach")} | {"report@tissue"}


def test_parameters_of_fine_tuning_rerun_no_pretraining(work):
    edit_params(work, finetune__few__label_smoothing=0.2)
    again = will_run(work)
    assert kinds(again) == {"evaluate"} and all("-finetune-" in o for o in again)


def test_parameters_of_the_report_rerun_the_report(work):
    edit_params(work, report__bootstrap=30)
    assert sorted(will_run(work)) == ["report@lesions", "report@tissue"]


def test_editing_a_figure_reruns_no_training(work):
    saved(work/"nbs"/"report"/"figures.ipynb", code="#| export\nACCENT = 'tab:red'")
    sh(work, "nbdev_export")
    assert sorted(will_run(work)) == ["report@lesions", "report@tissue"]


def test_editing_a_probe_reruns_probes(work):
    saved(work/"nbs"/"evaluate"/"linear.ipynb", code="#| export\nEDITED = True")
    sh(work, "nbdev_export")
    again = will_run(work)
    assert kinds(again) == {"evaluate", "lesions_evaluate"} and all("-probe-" in o for o in again)


def test_saving_pipeline_notebooks_reruns_no_training(work):
    before = contents(work)
    for path in (work/"nbs"/"pipeline").glob("[0-9]*.ipynb"): saved(path, prose=not path.stem.endswith("_report"))
    assert will_run(work) == [] and contents(work) == before


def test_the_report_follows_its_prose(work):
    saved(work/"nbs"/"pipeline"/"60_report.ipynb")
    assert sorted(will_run(work)) == ["report@lesions", "report@tissue"]
    sh(work, "dvc", "repro", "report@lesions")
    assert "An afterthought." in (work/"reports"/"lesions"/"index.html").read_text()


def test_saving_library_notebooks_reruns_nothing(work):
    for path in (work/"nbs").glob("*/*.ipynb"):
        if path.parent.name != "pipeline": saved(path)
    sh(work, "nbdev_export")
    assert will_run(work) == []


def test_code_of_a_pipeline_notebook_reruns_its_stages(work):
    saved(work/"nbs"/"pipeline"/"30_probe.ipynb", code="1 + 1")
    assert all("-probe-" in o for o in will_run(work)) and will_run(work)


def test_another_archive_reruns_what_is_made_of_it(work):
    "Other lesions: their preparation, their encoders, their evaluations; nothing on tissue."
    edit_params(work, data__lesions__limit=140)
    assert repro(work, "--dry")[:2] == ["check", "prepare@lesions"]
    again = will_run(work)
    assert kinds(again) == {"lesions_pretrain", "lesions_evaluate"}


def test_a_new_task_trains_no_encoder(work):
    edit_params(work, task__more=dict(of="tissue", finetune=None), compare__tissue__tasks=["tissue", "more"])
    again = will_run(work)
    assert kinds(again) == {"evaluate", "report"} and all("-more-" in o for o in again if o.startswith("evaluate"))


def test_a_new_encoder_runs_its_own_stages(work):
    "What is not there yet, a dry run cannot see; the status can."
    edit_params(work, encoder__mae75=dict(of="mae", mask_ratio=0.75), compare__tissue__encoders=[*params(work)["compare"]["tissue"]["encoders"], "mae75"])
    sh(work, "dvc", "repro", "plan")
    changed = json.loads(subprocess.run(["dvc", "status", "--json"], cwd=work, env=ENV, capture_output=True, text=True, check=True).stdout)
    assert {o for o in changed if "mae75" not in o} <= {"report@tissue"} and "pretrain@tissue-mae75-0" in changed


def test_pull_fetches_what_a_stage_needs(work, tmp_path):
    "With an emptied workspace and a full cache a stage that has to run finds its data and its encoder."
    edit_params(work, probe__all__crop=0.9)
    for o in ("stores", "runs", "evals"): shutil.rmtree(work/o)
    sh(work, "dvc", "repro", "--pull", "lesions_evaluate@lesions-probe-margins-lesion_mae-0")
    assert (work/eval_of("lesions", "probe", "margins", "lesion_mae", 0)/"scores.json").is_file()


# A method, a data set, a task of one's own

TOY = """#| export
import torch
from torch import nn
from sdmae.params import EncoderForm, OptimParams, ViewParams
from sdmae.views.augment import Views, normalize
from sdmae.models.encoders import build_encoder

class ToyParams(EncoderForm):
    optim:OptimParams
    views:ViewParams

class Toy(nn.Module):
    Params = ToyParams
    def __init__(self, params, model, image_size):
        super().__init__()
        self.views, self.encoder = Views(params.views, image_size), build_encoder(image_size, model, params)
    def forward(self, images): return dict(loss=self.encoder.pooled(normalize(self.views(images))).square().mean())"""


def test_a_method_of_ones_own(work):
    "One notebook, one line in the registry, one section in conf: from check to the report, beside the others."
    nb = read_notebook(work/"nbs"/"methods"/"random.ipynb")
    cell = lambda text: dict(cell_type="code", metadata={}, source=text, outputs=[], execution_count=None, id=f"t{abs(hash(text)) % 999}")
    write_notebook(dict(nb, cells=[dict(cell_type="markdown", metadata={}, source="# Toy\n\n> A method", id="t0"), cell("#| default_exp methods.toy"), cell(TOY)]), work/"nbs"/"methods"/"toy.ipynb")
    registry = read_notebook(work/"nbs"/"methods"/"registry.ipynb")
    lines = next(c for c in registry["cells"] if "METHODS = " in source(c))
    lines["source"] = source(lines).replace('mae="mae:MAE"', 'toy="toy:Toy", mae="mae:MAE"')
    assert "toy:Toy" in lines["source"]
    write_notebook(registry, work/"nbs"/"methods"/"registry.ipynb")
    (work/"conf"/"encoder"/"toy.yaml").write_text("method: toy\ndata: tissue\npretrain: tissue\noptim: {base_lr: 1.0e-3}\nviews: tissue\nname: My toy\ncolor: tomato\nmarker: P\n")
    sh(work, "nbdev_export")
    own = ["only=tissue", "+encoder@encoder.toy=toy", "compare.tissue.encoders=[random,mae,toy]"]
    tiny = [o for o in TINY if not o.startswith(("compare.", "+encoder."))]
    sh(work, "dvc", "exp", "run", *(o for x in tiny + own for o in ("-S", x)))
    page = (work/"reports"/"tissue"/"index.html").read_text()
    assert "My toy" in page and json.loads((work/run_of("tissue", "toy", 0)/"made.json").read_text())["last"]["loss"] >= 0


def test_a_data_set_and_a_task_of_ones_own(work):
    "One section each: another set is prepared, and an encoder pre-trained on the first is asked about it."
    edit_params(work, data__mine=params(work)["data"]["tissue"] | dict(name="mine", seed=1), task__mine=dict(of="tissue", data="mine"), compare__tissue__tasks=["tissue", "mine"])
    again = repro(work, "evaluate@tissue-probe-mine-mae-0")
    assert again == ["check", "prepare@mine", "plan", "evaluate@tissue-probe-mine-mae-0"]


# Side by side

def test_side_by_side_leaves_what_one_after_the_other_leaves(work):
    "With everything done it does nothing; what is taken away it makes again, as it was."
    before = {k: v for k, v in contents(work).items() if k.startswith("runs")}
    assert "didn't change" in sh(work, sys.executable, "-m", "sdmae.pipeline", "repro", "--jobs", "2")
    assert {k: v for k, v in contents(work).items() if k.startswith("runs")} == before
    weights = work/run_of("tissue", "mae", 0)/"encoder"/"encoder.safetensors"
    was = weights.read_bytes()
    shutil.rmtree(work/run_of("tissue", "mae", 0)); (work/"dvc.lock").write_text(re.sub(r"  pretrain@tissue-mae-0:.*?(?=\n  \S)", "", (work/"dvc.lock").read_text(), flags=re.S))
    sh(work, sys.executable, "-m", "sdmae.pipeline", "repro", "--jobs", "2")
    assert weights.read_bytes() == was


def test_a_job_that_fails_stops_no_other(work):
    "It is told at the end, with its log; the others are done."
    edit_params(work, encoder__lost=dict(of="mae", start="weights/nowhere.pth"), compare__tissue__encoders=["lost", "random", "mae"])
    said = sh(work, sys.executable, "-m", "sdmae.pipeline", "repro", "--jobs", "2", fails=True)
    assert "tissue-lost-0 stopped" in said and "weights/nowhere.pth" in said and "1 of" in said and "build/logs/tissue-lost-0.log" in said


# Faults stop it before anything earlier is gone

@pytest.mark.parametrize("changes, message", [
    (dict(pretrain__tissue__epchs=3), "pretrain.tissue.epchs: unknown parameter"),
    (dict(pretrain__tissue__epochs="many"), "pretrain.tissue.epochs"),
    (dict(encoder__mae__mask_ration=0.5), "encoder.mae.mask_ration: unknown parameter"),
    (dict(model__patch_size=7), "not divisible by patch_size 7"),
    (dict(compare__tissue__encoders=["random", "sdmea"]), "sdmea"),
    (dict(data__tissue__path="data/nowhere"), "data/nowhere"),
    (dict(probe__few__labels=[30, 5000]), "task.tissue: probe.few.labels lists 5000")])
def test_a_faulty_parameter_stops_everything(work, changes, message):
    before = contents(work)
    edit_params(work, **changes)
    assert message in sh(work, "dvc", "repro", fails=True)
    assert contents(work) == before


def test_a_truncated_archive_keeps_what_was_prepared(work):
    before = {k: v for k, v in contents(work).items() if k.startswith("stores/tissue")}
    shutil.copytree(work/"data"/"sample"/"nct", work/"data"/"broken")
    archive = work/"data"/"broken"/"NCT-CRC-HE-100K.zip"
    archive.write_bytes(archive.read_bytes()[:-5000])
    edit_params(work, data__tissue__path="data/broken")
    assert "NCT-CRC-HE-100K.zip" in sh(work, "dvc", "repro", fails=True)
    shutil.rmtree(work/"data"/"broken")
    assert {k: v for k, v in contents(work).items() if k.startswith("stores/tissue")} == before
