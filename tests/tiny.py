"""The tiny pipeline of the tests: its parameters, and the commands that they give. It is run in `conftest.py`, once for all."""
import os, re, shutil, subprocess, sys
from pathlib import Path

import yaml

from sdmae.pipeline.code import read_notebook, source, write_notebook

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg",
       "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b.c", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b.c"}
TINY = """data.tissue.limit=90 data.tissue.image_size=32 data.lesions.limit=150 model.embed_dim=24 model.depth=2 model.num_heads=2
compare.tissue.encoders=[random,histogram,natural,supervised,mae,sdmae,sdmae_detach,barlow] +encoder.sdmae_detach={of:sdmae,detach_teacher:true} encoder.natural.image_size=32
compare.lesions.encoders=[lesion_random,lesion_histogram,lesion_mae,lesion_miram] compare.lesions.tasks=[margins]
pretrain.tissue.epochs=1 pretrain.tissue.batch_size=32 pretrain.tissue.watch_every=1 pretrain.supervised.epochs=1 pretrain.lesions.epochs=1
probe.few.few_shot.shots=[1,2] probe.few.few_shot.episodes=20 probe.few.shift.hed=[0.0,0.05] probe.few.shift.draws=1 encoder.barlow.head.out_dim=32 encoder.barlow.head.hidden_dim=32
probe.few.labels=[30,all] probe.few.neighbours=[1,5] probe.few.C=[0.01,1.0] probe.few.subsets=2
finetune.few.labels=[30,all] finetune.few.epochs=1 finetune.few.min_steps=2 finetune.few.batch_size=32 ++finetune.lesions.epochs=2
report.bootstrap=20 report.tsne_tiles=60 device=cpu precision=float32""".split()


def sh(folder, *command, fails=False):
    r = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True)
    assert bool(r.returncode) == fails, f"{' '.join(command)} ended with {r.returncode}\n{r.stdout[-6000:]}\n{r.stderr[-6000:]}"
    return r.stdout + r.stderr


def copy_of_project(folder):
    "The project as it stands, committed, with the sample."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for o in filter(None, listed.split("\0")):
        if not (ROOT/o).is_file() or o == "dvc.lock" or o.startswith("metrics/"): continue
        (folder/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/o, folder/o)
    for o in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "as it stands"]): sh(folder, "git", *o)
    sh(folder, "dvc", "pull", "data.dvc")


def repro(folder, *args):
    "The stages that `dvc repro` ran, or with --dry would run, from the present state on; but for `plan`, which always runs."
    return [o for o in re.findall(r"Running stage '([^']+)'", sh(folder, "dvc", "repro", *args)) if o != "plan"]


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

def params(folder): return yaml.safe_load((folder/"params.yaml").read_text())


def will_run(folder):
    "The stages that would run once notebooks are stripped and the plan is made anew: both in one process, which is half of DVC's time."
    sh(folder, sys.executable, "-c", "from sdmae.pipeline.plan import check, plan; check(); plan()")
    return [o for o in repro(folder, "--dry") if o != "check"]


def kinds(stages): return {o.split("@")[0] for o in stages}
