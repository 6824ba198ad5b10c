"The command line `sdmae`, and the names that `import sdmae` promises: as a user calls them, errors included."
import ast, json, subprocess, sys
from importlib import import_module
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image

import sdmae
from sdmae.cli import DO, ELSEWHERE, grammar, main
from sdmae.models.encoders import build_encoder, save_encoder
from sdmae.params import DataParams, EncoderForm, ModelParams
from sdmae.pipeline.code import loaded
from toys import noise_tiles

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "An encoder of random weights, a prepared store, and a folder with a space in its name."
    d, small = tmp_path_factory.mktemp("own images"), ModelParams(patch_size=8, embed_dim=48, depth=1, num_heads=2)
    save_encoder(d/"run"/"encoder", build_encoder(32, small, EncoderForm()),
                 dict(image_size=32, model=small.model_dump(), form=EncoderForm().model_dump(), mean=[.5]*3, std=[.2]*3))
    noise_tiles(d/"store", DataParams(name="noise", adapter="folder", path="-", image_size=32))
    rng = np.random.default_rng(0)
    (d/"Bilder für heute").mkdir()
    for i in range(5): Image.fromarray(rng.integers(0, 256, (40 + i, 48, 3), dtype=np.uint8)).save(d/"Bilder für heute"/f"{i}.png")
    return d


def test_embed_and_predict(place, capsys):
    images, run, out = str(place/"Bilder für heute"), str(place/"run"), place/"out"
    assert main(["embed", images, "--weights", run, "--out", str(out/"f.csv"), "--device", "cpu"]) == 0
    assert "5 images, 48 numbers each" in capsys.readouterr().out
    df = pd.read_csv(out/"f.csv")
    assert df.shape == (5, 49) and df.path.tolist() == [f"{i}.png" for i in range(5)] and df.f0.std() > 0
    assert main(["embed", str(place/"store"), "--weights", run, "--out", str(out/"s.csv")]) == 0
    assert {"path", "split", "label", "f47"} <= set(pd.read_csv(out/"s.csv")) and len(pd.read_csv(out/"s.csv")) == 40
    assert main(["predict", images, "--weights", run, "--store", str(place/"store"), "--out", str(out/"a.csv")]) == 0
    assert "macro AUC" in capsys.readouterr().out
    answers = pd.read_csv(out/"a.csv")
    assert set(answers.predicted) <= {"a", "b"} and np.allclose(answers.p_a + answers.p_b, 1)


@pytest.mark.parametrize("change, said", [
    (dict(place="nothing"), "nothing does not exist"), (dict(weights="no_run"), "no_run"), (dict(out="f.xlsx"), "end in .csv or .parquet"),
    (dict(readout="eyes"), "eyes"), (dict(crop="500"), "smaller than"), (dict(device="cuda:7"), "torch sees")])
def test_errors_are_one_line(place, change, said, capsys, tmp_path):
    a = dict(place=place/"Bilder für heute", weights=place/"run", out=tmp_path/"f.csv", readout="mean", crop="32", device="cpu") | change
    argv = ["embed", str(a["place"]), *(o for k in ("weights", "out", "readout", "crop", "device") for o in (f"--{k}", str(a[k])))]
    assert main(argv) == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("sdmae embed: ") and said in err[-1] and "Traceback" not in "".join(err)
    assert not (tmp_path/"f.csv").exists()


def test_nothing_earlier_is_overwritten(place, capsys, tmp_path):
    out = tmp_path/"f.csv"
    out.write_text("mine")
    argv = ["embed", str(place/"Bilder für heute"), "--weights", str(place/"run"), "--out", str(out)]
    assert main(argv) == 1 and "--replace" in capsys.readouterr().err and out.read_text() == "mine"
    assert main([*argv, "--replace"]) == 0 and out.read_text().startswith("path,f0")


@pytest.mark.parametrize("argv", [[], ["embed"], ["embed", "x"], ["nonsense"], ["embed", "x", "--weights", "y", "--batch-size", "many"]])
def test_a_wrong_command_line_ends_with_2(argv):
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code == 2


@pytest.mark.parametrize("command", [*DO, *ELSEWHERE])
def test_help_of_each_command(command, capsys):
    with pytest.raises(SystemExit) as e: main([command, "--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and f"sdmae {command}" in out and max(map(len, out.splitlines())) <= 100


def test_help_needs_no_large_library():
    r = subprocess.run([sys.executable, "-X", "importtime", "-m", "sdmae.cli", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0 and all(f"sdmae {c}" in r.stdout for c in ("embed", "predict", "compare"))
    assert not [o for o in ("torch", "numpy", "pandas", "dvc") if f" {o}\n" in r.stderr]


def test_promised_names():
    typed = {a.asname for node in ast.parse((ROOT/"sdmae"/"__init__.pyi").read_text()).body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert typed == set(sdmae.__all__), "__init__.pyi and __init__.py promise different names"
    for name in sdmae.__all__: assert getattr(sdmae, name).__doc__, name
    with pytest.raises(AttributeError, match="load_encoder"): sdmae.load_encoders


def test_promised_names_cost_no_stage_a_rerun():
    assert loaded({"sdmae.params"}, ROOT) == loaded({"sdmae.params", "sdmae"}, ROOT) and "sdmae/__init__.py" not in loaded({"sdmae.params"}, ROOT)


def test_the_library_needs_no_extra(place, tmp_path):
    "`pip install .` without extras: the promised names and `sdmae embed` with all packages of the extras out of reach."
    from configparser import ConfigParser
    from packaging.requirements import Requirement
    ini = ConfigParser(delimiters=["="]); ini.read(ROOT/"settings.ini")
    names = {Requirement(o).name for k in ("pipeline", "notebooks") for o in ini["DEFAULT"][f"{k}_requirements"].split()}
    names = sorted({o.replace("hydra-core", "hydra") for o in names} | {"IPython", "omegaconf", "jupyter_client"})
    code = (f"import sys; sys.modules.update(dict.fromkeys({names}))\nimport sdmae; [getattr(sdmae, o) for o in sdmae.__all__]\n"
            f"from sdmae.cli import main; sys.exit(main({['embed', str(place/'Bilder für heute'), '--weights', str(place/'run'), '--out', str(tmp_path/'f.csv')]}))")
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stderr
    assert len(pd.read_csv(tmp_path/"f.csv")) == 5
