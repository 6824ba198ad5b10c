"""What tests need to run side by side, as `make test` runs them: `pytest -n 2 --dist loadfile --no-loadscope-reorder`.
A file stays in one process, so that what its tests share is made once; `pytest` alone is as it was."""
import json, os, shutil
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

# A worker has one core: more threads would wait for each other. Read when torch is imported, so before any test is.
if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    "The pipeline takes longest: workers begin with it, or one of them would end with it, alone."
    if "PYTEST_XDIST_WORKER" in os.environ: items.sort(key=lambda o: o.path.name != "test_pipeline.py")


@pytest.fixture(scope="session")
def bundled_sample(tmp_path_factory):
    "The bundled sample, before `dvc pull` copied from the repository's own store: made anew it would take a minute, and be compared with itself."
    if (pulled := ROOT/"data"/"sample").is_dir(): return pulled
    stored, out = (lambda md5: ROOT/".dvc"/"bundled"/"files"/"md5"/md5[:2]/md5[2:]), tmp_path_factory.mktemp("bundled")
    for o in json.loads(stored(yaml.safe_load((ROOT/"data.dvc").read_text())["outs"][0]["md5"]).read_text()):
        (out/o["relpath"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stored(o["md5"]), out/o["relpath"])
    return out
