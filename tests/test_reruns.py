"""What the pipeline repeats after an edit, and what it does not: a tiny configuration, in a clone of the project."""
import json, re, shutil, subprocess
from pathlib import Path

import pytest

from sdmae.methods.registry import METHODS
from sdmae.pipeline import ingredients
from sdmae.pipeline.code import read_notebook, source, write_notebook
from sdmae.views.stain import digest
from tiny import ENV, TINY, contents, edit_params, kinds, params, repro, saved, sh, will_run

# What it does not repeat

def test_again_does_nothing(work):
    "But for the plan, which looks at files that DVC does not know."
    before = contents(work)
    assert repro(work) == [] and contents(work) == before


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
    assert {*will_run(work)} == {f"pretrain@tissue-{e}-0" for e in ("mae", "sdmae", "sdmae_detach", "barlow")} | {"report@tissue"}


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


def test_a_file_replaced_where_it_lies_reruns_what_reads_it(work):
    "Stains fitted anew under the same path; no parameter changed. What the encoder was made of is told by content."
    file = work/"stain.json"
    shutil.copy(work/"stores"/"tissue"/"stain.json", file)
    edit_params(work, encoder__barlow__views=dict(of="tissue", stain=dict(kind="gaussian", file="stain.json")))
    assert will_run(work) == ["pretrain@tissue-barlow-0"]
    made = json.loads(file.read_text())
    made["spaces"]["lab"]["gaussian"]["mean"][0] += 1
    made.pop("content"); file.write_text(json.dumps(made | dict(content=digest(made))))
    said = sh(work, "dvc", "repro", "plan")
    assert "encoders barlow: another stain.views.stain.file" in said and "encoders mae" not in said


def test_another_archive_reruns_what_is_made_of_it(work):
    "Other lesions: their preparation, their encoders, their evaluations; nothing on tissue."
    before = params(work)["data"]["lesions"]["limit"]
    edit_params(work, data__lesions__limit=140)
    assert repro(work, "--dry")[:2] == ["check", "prepare@lesions"]
    sh(work, "dvc", "repro", "plan")
    again = will_run(work)
    assert kinds(again) == {"lesions_pretrain", "lesions_evaluate"}
    edit_params(work, data__lesions__limit=before)
    sh(work, "dvc", "repro", "plan") # the store of before, for the tests that follow


def test_a_new_task_trains_no_encoder(work):
    edit_params(work, task__more=dict(of="tissue", finetune=None), compare__tissue__tasks=["tissue", "more"])
    again = will_run(work)
    assert kinds(again) == {"evaluate", "report"} and all("-more-" in o for o in again if o.startswith("evaluate"))


def test_a_new_encoder_runs_its_own_stages(work):
    "What is not there yet, a dry run cannot see; the status can."
    edit_params(work, encoder__mae75=dict(of="mae", mask_ratio=0.75), compare__tissue__encoders=[*params(work)["compare"]["tissue"]["encoders"], "mae75"])
    sh(work, "dvc", "repro", "plan")
    changed = json.loads(subprocess.run(["dvc", "status", "--json"], cwd=work, env=ENV, capture_output=True, text=True, check=True).stdout)
    assert {o for o in changed if "mae75" not in o} <= {"plan", "report@tissue"} and "pretrain@tissue-mae75-0" in changed


# What it says of results that are older than the parameters

def test_a_report_of_results_that_other_parameters_made(work):
    "It shows the numbers of then, their budget, and what would be otherwise today."
    edit_params(work, pretrain__tissue__epochs=2, task__tissue__target="label", probe__few__subsets=3)
    sh(work, "dvc", "repro", "--single-item", "--force", "report@tissue")
    page = (work/"reports"/"tissue"/"index.html").read_text()
    assert page.count("was made of something else than parameters, data and code say now") >= 2
    assert "pretrain.epochs: 1 → 2" in page and "recipe.subsets: 2 → 3" in page and re.search(r"1 epochs of \d+ images", page) and "2 epochs of" not in page


# What an edit of a metric costs, by the hashes alone

@pytest.fixture
def copied(tmp_path, monkeypatch):
    "The library and the stages' notebooks, to edit: hashes are of this copy."
    root = Path(__file__).parents[1]
    for o in ("sdmae", "nbs/pipeline"): shutil.copytree(root/o, tmp_path/o, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root/"settings.ini", tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    ingredients.notebook_code.cache_clear()


def hashes(root, *names):
    "Whose hashes an edit of some modules of `evaluate` changes."
    def now():
        ingredients.notebook_code.cache_clear()
        return {**{m: ingredients.code_of_encoder(m) for m in METHODS}, "checkpoint": ingredients.code_of_finetuning("finetune"),
                **{f"stage {p}": ingredients.code_of_protocol(p) for p in ingredients.NOTEBOOKS}}
    before = now()
    for name in names:
        with (root/"sdmae"/"evaluate"/f"{name}.py").open("a") as f: f.write("\nEDITED = True\n")
    after = now()
    return {k for k in before if before[k] != after[k]}


def test_an_edit_retrains_what_it_concerns(copied):
    "A metric retrains no encoder, and a finished checkpoint of a fine-tuning stays what it was. What a training looks at is another thing."
    stages = {f"stage {p}" for p in ingredients.NOTEBOOKS}
    assert hashes(copied, "finetune") == {"checkpoint", "stage finetune", "stage linear_sgd"}
    assert hashes(copied, "statistics", "results", "calibration", "linear", "knn", "card", "fewshot") == stages
    assert {*METHODS, "checkpoint"} <= hashes(copied, "watched")
