"""What tests need to run side by side, as `make test` runs them: `pytest -n 2 --dist loadfile --no-loadscope-reorder`.
A file stays in one process, so that what its tests share is made once; `pytest` alone is as it was."""
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

ROOT = Path(__file__).parents[1]

# A worker has one core: more threads would wait for each other. Read when torch is imported, so before any test is.
if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    "The pipeline takes longest: workers begin with it, or one of them would end with it, alone."
    if "PYTEST_XDIST_WORKER" in os.environ: items.sort(key=lambda o: o.path.name not in ("test_pipeline.py", "test_reruns.py"))


@pytest.fixture(scope="session")
def bundled_sample(tmp_path_factory):
    "The bundled sample, before `dvc pull` copied from the repository's own store: made anew it would take a minute, and be compared with itself."
    if (pulled := ROOT/"data"/"sample").is_dir(): return pulled
    stored, out = (lambda md5: ROOT/".dvc"/"bundled"/"files"/"md5"/md5[:2]/md5[2:]), tmp_path_factory.mktemp("bundled")
    for o in json.loads(stored(yaml.safe_load((ROOT/"data.dvc").read_text())["outs"][0]["md5"]).read_text()):
        (out/o["relpath"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stored(o["md5"]), out/o["relpath"])
    return out


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id):
    "A clone of the project as it stands, the tiny pipeline run once side by side as `make repro` does. The first worker that asks makes it for all."
    if not (shutil.which("git") and (ROOT/".git").exists()): pytest.skip("git and a clone are needed to run DVC")
    base = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    with FileLock(base/"finished.lock"):
        if not (base/"finished").exists(): run_tiny(base/"unfinished").rename(base/"finished")
    return base/"finished"


def run_tiny(folder):
    from tiny import TINY, copy_of_project, sh
    copy_of_project(folder)
    compose = "import sys, yaml; from sdmae.params import compose; yaml.safe_dump(compose(sys.argv[1:]), open('params.yaml', 'w'), sort_keys=False)"
    sh(folder, sys.executable, "-c", compose, *TINY)
    sh(folder, sys.executable, "-m", "sdmae.pipeline", "repro", "--jobs", "2")
    return folder


@pytest.fixture(scope="module")
def clone(finished, tmp_path_factory):
    "A copy for each file of tests, so that none sees what another edits."
    return shutil.copytree(finished, tmp_path_factory.mktemp("clone")/"sdmae", symlinks=True)


@pytest.fixture
def work(clone):
    "The finished clone; what a test edits is undone."
    from tiny import RESULTS, contents, sh
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=clone, capture_output=True, text=True, check=True).stdout
    before = {o: (clone/o).read_bytes() for o in ["dvc.lock", *listed.split("\0")] if o and (clone/o).is_file() and not o.startswith("metrics/")}
    results = contents(clone, (*RESULTS, "build"))
    yield clone
    for o, data in before.items():
        if (clone/o).read_bytes() != data: (clone/o).write_bytes(data)
    if contents(clone, (*RESULTS, "build")) != results: sh(clone, "dvc", "checkout", "--force") # two seconds, and most tests touch no result
