"""What tests need to run side by side, as `make test` runs them: `pytest -n 2 --dist loadfile --no-loadscope-reorder`.
A file stays in one process, so that what its tests share is made once; `pytest` alone is as it was."""
import os

# A worker has one core: more threads would wait for each other. Read when torch is imported, so before any test is.
if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config, items):
    "The pipeline takes longest: workers begin with it, or one of them would end with it, alone."
    if "PYTEST_XDIST_WORKER" in os.environ: items.sort(key=lambda o: o.path.name != "test_pipeline.py")
