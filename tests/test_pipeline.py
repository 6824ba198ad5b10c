"""The whole pipeline on a tiny configuration, in a clone of the project: what it leaves, what one adds, what stops it."""
import json, re, shutil, subprocess, sys, time

import pandas as pd
import psutil
import pytest

from sdmae.params import eval_of, run_of
from sdmae.pipeline.code import read_notebook, source, write_notebook
from sdmae.train.checkpoint import read_checkpoint
from tiny import ENV, TINY, contents, edit_params, params, repro, saved, sh

# What it leaves

def test_results(work):
    "Every encoder is there, and every score that applies; baselines are encoders like the rest."
    for study, c in params(work)["compare"].items():
        for e in c["encoders"]:
            for f in ("encoder/encoder.safetensors", "encoder/config.json", "made.json", "notebook.ipynb"): assert (work/run_of(study, e, 0)/f).is_file(), (e, f)
            for t in c["tasks"]:
                for protocol in ("probe", "finetune"):
                    found = json.loads((work/eval_of(study, protocol, t, e, 0)/"scores.json").read_text())
                    applies = protocol == "probe" or e not in ("histogram", "lesion_histogram", "supervised", "sdmae_detach") # a variant is probed only
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


def test_results_say_what_made_them(work):
    "Parameters, data, code, commit, device, threads, precision, versions; and the report says it of them, not of itself."
    made, scored = (json.loads((work/o).read_text()) for o in (f"{run_of('tissue', 'mae', 0)}/made.json", f"{eval_of('tissue', 'probe', 'tissue', 'mae', 0)}/scores.json"))
    for o in (made, scored["made"]):
        assert o["precision"] == "float32" and o["threads"] == 1 and o["versions"]["torch"] and o["commit"] and "CPU" in o["device"] and o["of"]["store"] and o["of"]["code"]
    assert made["of"]["pretrain"]["epochs"] == 1 and scored["made"]["of"]["recipe"]["subsets"] == 2 and len(scored["made"]["encoder"]) == 64
    page = (work/"reports"/"tissue"/"index.html").read_text()
    assert "was made of something else" not in page and "results differ" not in page and "float32" in page and "1 thread" in page


# What goes wrong on the way

def newest(folder): return max(folder.glob("*.pt"), key=lambda p: p.stat().st_mtime_ns)


def test_killing_dvc_ends_its_training_and_loses_nothing(work):
    "DVC alone is killed: what it started ends, and the same command goes on where the training was."
    edit_params(work, pretrain__tissue__epochs=150, pretrain__tissue__checkpoint_minutes=0, pretrain__tissue__watch_every=150)
    sh(work, "dvc", "repro", "plan")
    command, folder = ["dvc", "repro", "--single-item", "pretrain@tissue-mae-0"], work/"checkpoints"/run_of("tissue", "mae", 0)
    p = subprocess.Popen(command, cwd=work, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(folder.glob("*.before")): assert p.poll() is None; time.sleep(0.05)
    started = psutil.Process(p.pid).children(recursive=True)
    p.kill(); p.wait()
    assert len(started) >= 2 and psutil.wait_procs(started, timeout=15)[1] == []
    reached = read_checkpoint(newest(folder))["step"]
    sh(work, *command)
    assert 0 < reached < 300 and read_checkpoint(newest(folder))["step"] == 300
    assert len(pd.read_csv(work/run_of("tissue", "mae", 0)/"live"/"plots"/"metrics"/"loss.tsv", sep="\t")) == 150


def test_what_fails_after_the_training_costs_no_step(work):
    "A cell at the end fails; then it does not. The checkpoint goes with the report, when DVC has the result."
    saved(work/"nbs"/"pipeline"/"20_pretrain.ipynb", code="assert not Path('build/broken').exists(), 'a plot fails'")
    edit_params(work, encoder__mae__mask_ratio=0.6)
    (work/"build"/"broken").write_text("")
    assert "a plot fails" in sh(work, "dvc", "repro", "pretrain@tissue-mae-0", fails=True)
    complete = newest(work/"checkpoints"/run_of("tissue", "mae", 0))
    written = complete.stat().st_mtime_ns
    (work/"build"/"broken").unlink()
    sh(work, "dvc", "repro", "pretrain@tissue-mae-0")
    assert complete.stat().st_mtime_ns == written and (work/run_of("tissue", "mae", 0)/"encoder"/"encoder.safetensors").is_file()
    sh(work, "dvc", "repro", "--single-item", "--force", "report@tissue")
    assert not complete.exists()


def test_the_doctor_finds_what_is_damaged(work):
    "A finished pipeline is well; a byte of the store, of a score and of a parameter is named with what to do."
    clean = subprocess.run([sys.executable, "-m", "sdmae.doctor"], cwd=work, env=ENV, capture_output=True, text=True)
    assert "encoders can be read" in clean.stdout and not re.search("!!  (?!memory|disk)", clean.stdout), clean.stdout + clean.stderr
    for name in ("stores/tissue/tiles.npy", "evals/tissue/tissue/probe/mae-0/scores.json"):
        data = bytearray((work/name).read_bytes()); data[-1] ^= 1
        (work/name).unlink(); (work/name).write_bytes(data)
    sick = subprocess.run([sys.executable, "-m", "sdmae.doctor"], cwd=work, env=ENV, capture_output=True, text=True)
    assert sick.returncode == 1 and re.search(r"!!  stores/tissue: .*tiles.npy.*\n +→ dvc repro", sick.stdout) and re.search("!!  evals/tissue/tissue/probe/mae-0: .*scores.json", sick.stdout), sick.stdout
    (work/"stores"/"tissue"/"tiles.npy").unlink(); (work/"evals"/"tissue"/"tissue"/"probe"/"mae-0"/"scores.json").unlink()


def test_nothing_of_params_reaches_a_shell(work):
    "Neither through `check`, which names the fault, nor past it."
    edit_params(work, seeds=["0; touch hacked"])
    assert "seeds" in sh(work, "dvc", "repro", fails=True)
    sh(work, "dvc", "repro", "--single-item", "pretrain", fails=True)
    assert not (work/"hacked").exists()


# What it fetches

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
    tiny = [o for o in TINY if not o.startswith(("compare.", "+encoder.")) and "lesions" not in o]
    sh(work, "dvc", "exp", "run", *(o for x in tiny + own for o in ("-S", x)))
    page = (work/"reports"/"tissue"/"index.html").read_text()
    assert "My toy" in page and json.loads((work/run_of("tissue", "toy", 0)/"made.json").read_text())["last"]["loss"] >= 0


def test_a_data_set_and_a_task_of_ones_own(work):
    "One section each: another set is prepared, and an encoder pre-trained on the first is asked about it."
    edit_params(work, data__mine=params(work)["data"]["tissue"] | dict(name="mine", seed=1), task__mine=dict(of="tissue", data="mine"), compare__tissue__tasks=["tissue", "mine"])
    again = repro(work, "evaluate@tissue-probe-mine-mae-0")
    assert again == ["check", "prepare@mine", "evaluate@tissue-probe-mine-mae-0"]


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
