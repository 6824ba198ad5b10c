"""One question, one command: tiles without labels, what a report can say of them, the best encoder, and labels that come later."""
import json, os, re, shutil, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch, yaml
from PIL import Image

from sdmae.data.records import Record, Source
from sdmae.data.store import TileStore, prepare
from sdmae.evaluate.knn import knn_probabilities
from sdmae.params import DataParams, compose, parse_params
from sdmae.pipeline import ingredients, plan
from sdmae.report.best import BY_PROBE, BY_RANK, best_of, best_table, best_text, choose, export_best, gap_error, validation_scores
from sdmae.report.embedding import neighbours, spread, to_label
from sdmae.report.names import Names
from sdmae.sources.publishers import open_source

NAMES = Names({"random": dict(name="Random", baseline=True), "mae": dict(name="MAE"), "sdmae": dict(name="SD-MAE")})


def images(folder, names):
    "A noisy tile of its own for each name."
    for i, n in enumerate(names):
        (folder/n).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder/n)
    return folder


def params(path, adapter="folder", **more): return DataParams(name="own", adapter=adapter, path=str(path), image_size=16, **more)


def by_split(source): return {s: sum(r.split == s for r in source.records) for s in ("train", "valid", "test")}


# Tiles without labels

def test_a_flat_folder_has_no_labels(tmp_path):
    source = open_source(params(images(tmp_path/"own", [f"{i}.png" for i in range(40)])))
    assert source.classes == [] and {r.label for r in source.records} == {""} and min(by_split(source).values()) >= 4
    assert source.notes[0].startswith("read 40 tiles without labels") and "if own is a class, name the folder above" in source.notes[1]


@pytest.mark.parametrize("zipped", [False, True])
def test_folders_may_be_slides(tmp_path, zipped):
    path = images(tmp_path/"own", [f"top/s{i%8}/deep/{i}.png" for i in range(48)])
    if zipped: path = Path(shutil.make_archive(tmp_path/"own", "zip", path))
    source = open_source(params(path, folders="group"))
    where = {g: {r.split for r in source.records if r.group == g} for g in {r.group for r in source.records}}
    assert set(where) == {f"s{i}" for i in range(8)} and all(len(s) == 1 for s in where.values()) and min(by_split(source).values()) > 0
    assert "in 8 groups by their first folder" in source.notes[0]


def test_splits_of_folders_without_labels(tmp_path):
    source = open_source(params(images(tmp_path/"own", [f"{s}/s{i%3}{s}/{i}.png" for i, s in enumerate(["train", "val", "test"]*8)]), folders="group"))
    assert by_split(source) == dict(train=8, valid=8, test=8) and len({r.group for r in source.records}) == 3


@pytest.mark.parametrize("names, more, message", [
    (["a.png", "tum/b.png"], {}, "Tiles without labels, in folders of patients, slides or none, are read by data.folders: group"),
    ([f"tum/{i}.png" for i in range(9)], {}, "1 class left .tum.*data.folders: group"),
    (["s1/x/1.png", "s2/y/2.png"], {}, "laid out differently.*data.folders: group"),
    (["1.png", "2.png"], {}, "2 tiles are too few to be shared out over three splits"),
    ([f"s{i%2}/{i}.png" for i in range(9)], dict(folders="group"), "2 groups .patients or slides. in all"),
    ([f"{i}.png" for i in range(30)], dict(drop_classes=["x"]), "no class 'x'; there are none")])
def test_what_is_ambiguous_or_too_little_is_told(tmp_path, names, more, message):
    with pytest.raises(ValueError, match=message): open_source(params(images(tmp_path/"own", names), **more))


def test_classes_that_are_called_as_slides_are_warned_of(tmp_path):
    source = open_source(params(images(tmp_path/"own", [f"slide{i%3}/{i}.png" for i in range(60)])))
    assert any("seem to be patients or slides" in n for n in source.notes)


def test_group_is_for_folders():
    with pytest.raises(ValueError, match="folders: group is for adapter: folder"): params("x", "csv", folders="group")


@pytest.mark.parametrize("column", [None, ""])
def test_a_csv_without_labels(tmp_path, column):
    images(tmp_path, names := [f"{i}.png" for i in range(40)])
    table = pd.DataFrame(dict(path=names, group=[f"p{i%10}" for i in range(40)]))
    (table if column is None else table.assign(label=column)).to_csv(tmp_path/"t.csv", index=False)
    source = open_source(params(tmp_path/"t.csv", "csv"))
    assert source.classes == [] and "without labels" in source.notes[0] and "no tile has a label" in source.notes


def test_some_labels_need_splits(tmp_path):
    images(tmp_path, names := [f"{i}.png" for i in range(12)])
    table = pd.DataFrame(dict(path=names, label=["a", "b", "", ""]*3, split=["train"]*4 + ["valid"]*4 + ["test"]*4))
    table.to_csv(tmp_path/"t.csv", index=False)
    store = prepare(open_source(params(tmp_path/"t.csv", "csv")), tmp_path/"store", params(tmp_path/"t.csv", "csv"))
    assert [len(store.indices(s)) for s in ("train", "valid", "test")] == [4]*3 and [len(store.indices(s, "label")) for s in ("train", "valid", "test")] == [2]*3
    assert "warning: 6 of 12 tiles have no label" in store.manifest["notes"] and store.manifest["tiles"]["train"] == 4 and store.manifest["counts"]["train"] == dict(a=1, b=1)
    table.drop(columns="split").to_csv(tmp_path/"t.csv", index=False)
    with pytest.raises(ValueError, match="row 4 has no label. Fill it in, or give every row its split"): open_source(params(tmp_path/"t.csv", "csv"))
    table.assign(label=["a", "b", "", ""]*2 + [""]*4).to_csv(tmp_path/"t.csv", index=False)
    with pytest.raises(ValueError, match="no tile of the split 'test' has a label"): open_source(params(tmp_path/"t.csv", "csv"))


# Labels that come later

@pytest.fixture
def project(tmp_path, monkeypatch):
    "Parameters of `which` on a store without labels, as the pipeline's functions see them."
    data = params(images(tmp_path/"own", [f"s{i%8}/{i}.png" for i in range(64)]), folders="group")
    prepare(open_source(data), tmp_path/"stores"/"tissue", data)
    for module in (ingredients, plan): monkeypatch.setattr(module, "project_root", lambda: tmp_path)
    monkeypatch.setattr(ingredients, "code_of_encoder", lambda method: {})
    monkeypatch.setattr(ingredients, "code_of_protocol", lambda protocol: {})
    return tmp_path


def test_labels_that_come_later_train_no_encoder_again(project):
    P = parse_params(compose(["experiment=which", "data=folder"]))
    search = parse_params(compose(["experiment=which", "data=folder", "pretrain.tissue.search={factors:[0.3,1],share:0.2}"]))
    made = lambda: ([ingredients.made_of_encoder(P, e) for e in ("random", "mae", "sdmae")], ingredients.made_of_encoder(search, "mae"), ingredients.made_of_task(P, "tissue", "probe"))
    before, tiles = made(), TileStore(project/"stores"/"tissue").manifest["sha256"]["tiles.npy"]
    where = to_label(TileStore(project/"stores"/"tissue"), project/"t.csv", str(project/"own"), False)
    table = pd.read_csv(project/"t.csv", dtype=str, keep_default_na=False)
    assert set(table.label) == {""} and set(table.split) == {"train", "valid", "test"}
    table["label"] = ["a", "b", "", ""]*16
    table.to_csv(where, index=False)
    data = params(where, "csv")
    store = prepare(open_source(data), project/"stores"/"tissue", data)
    after = made()
    assert store.classes == ["a", "b"] and store.manifest["sha256"]["tiles.npy"] == tiles
    assert after[0] == before[0] and after[1]["store"] != before[1]["store"] and before[2]["recipe"] is None and after[2]["recipe"]
    table["split"] = table.split.replace(dict(valid="test", test="valid"))
    table.to_csv(where, index=False)
    prepare(open_source(data), project/"stores"/"tissue", data)
    assert made()[0] != before[0] # another split is another training


def test_a_plan_without_labels(project, capsys):
    P = parse_params(compose(["experiment=which", "data=folder"]))
    assert plan.label_faults(P) == []
    with_supervised = parse_params(compose(["experiment=which", "data=folder", "compare.tissue.encoders=[random,supervised,mae]", "compare.tissue.pairs=[]"]))
    assert "lists supervised, which learns from labels, and no tile of tissue has one" in plan.label_faults(with_supervised)[0]


def test_a_zip_is_to_be_unpacked_before_labels(tmp_path):
    images(tmp_path/"own", [f"s{i%8}/{i}.png" for i in range(48)])
    data = params(shutil.make_archive(tmp_path/"own", "zip", tmp_path/"own"), folders="group")
    where = to_label(prepare(open_source(data), tmp_path/"store", data), tmp_path/"t.csv", data.path, False)
    shutil.copy(tmp_path/"t.csv", where)
    assert Path(where).name == "own_labels.csv" and len(open_source(params(where, "csv")).records) == 48


# The best encoder

def write(folder, encoder, seed, task, **results):
    path = folder/task/"probe"/f"{encoder}-{seed}"
    path.mkdir(parents=True)
    (path/"scores.json").write_text(json.dumps(dict(protocol="probe", encoder=encoder, seed=seed, results=results)))


def test_validation_chooses_and_test_does_not(tmp_path):
    for e, s, valid, test in (("random", 0, .6, .99), ("mae", 0, .8, .1), ("mae", 1, .9, .1), ("sdmae", 0, .95, .9), ("sdmae", 1, .7, .9)):
        write(tmp_path, e, s, "t", linear={"all": dict(valid=valid, macro_auc=test)}, knn={"all": dict(valid=1., macro_auc=1.)})
    found = validation_scores(tmp_path, ["t"], list(NAMES), [0, 1])
    best = best_of(found, BY_PROBE, NAMES, "runs/x", lambda a, b: .1)
    assert (best["encoder"], best["seed"], best["folder"], best["worth_it"]) == ("mae", 1, "runs/x/mae-1", True) and best["score"] == pytest.approx(.85)
    write(tmp_path, "mae", 0, "second", linear={"all": dict(valid=.5, macro_auc=1)})
    assert validation_scores(tmp_path, ["t", "second"], list(NAMES), [0, 1]) == {("mae", 0): pytest.approx(.65)} # what lacks a task is out


def test_fewer_labels_do_not_choose(tmp_path):
    write(tmp_path, "mae", 0, "t", linear={"100": dict(valid=.9, macro_auc=1)})
    assert validation_scores(tmp_path, ["t"], list(NAMES), [0]) == {} and best_of({}, BY_PROBE, NAMES, "runs/x") is None


def test_a_baseline_that_wins_is_said():
    best = best_of({("random", 0): .9, ("mae", 0): .9, ("sdmae", 0): .5}, BY_RANK, NAMES, "runs/x") # a tie needs no training
    best["pretrained"]["warnings"] = ["it has collapsed"]
    said = best_text(best, NAMES, 16)
    assert not best["worth_it"] and "no pre-trained encoder is shown to be worth it" in said and "weak guide" in said and "16 tiles only" in said and "it has collapsed" in said and best["pretrained"]["encoder"] == "mae"


@pytest.mark.parametrize("random, error, worth_it, said", [(.90001, .02, None, "MAE − Random is -0.000, less than two standard errors (0.040): **not distinguishable on 16 validation tiles**"),
    (.95, .02, False, "MAE − Random is -0.050, more than two standard errors (0.040): **none of the pre-trained encoders is worth it here**"),
    (.8, .02, True, "MAE − Random is +0.100, more than two standard errors (0.040)."), (.8, np.nan, None, "+0.100: **how much of it is chance is not known**"),
    (.8, None, None, "")])
def test_a_hair_decides_nothing(random, error, worth_it, said):
    best = best_of({("random", 0): random, ("mae", 0): .9, ("sdmae", 0): .5}, BY_PROBE, NAMES, "runs/x", error and (lambda a, b: {("mae", "random"): error}[a, b]))
    text = best_text(best, NAMES, 16)
    assert best["worth_it"] is worth_it and said in text and ("worth it here" in text) == (worth_it is False) and "MAE, seed 0" in text
    json.dumps(best, allow_nan=False)


def test_the_error_of_a_validation_difference(tmp_path):
    "Against the deviation of the difference over new validation tiles; shared luck of tiles cancels, and patients say less than their tiles."
    from types import SimpleNamespace
    from sklearn.metrics import roc_auc_score
    from sdmae.evaluate.statistics import WeightedScores
    rng = np.random.default_rng(0)
    def draw(n):
        y, ease = np.arange(n) % 2, rng.normal(size=n)
        return y, *(1/(1 + np.exp(-(y + ease + .3*rng.normal(size=n)))) for _ in range(2))
    truth = np.std([roc_auc_score(y, p) - roc_auc_score(y, q) for y, p, q in (draw(200) for _ in range(400))])
    y, p, q = draw(200)
    for e, s, a in (("mae", 0, p), ("random", 0, q)):
        write(tmp_path, e, s, "t", linear={"all": dict(valid=.5, macro_auc=.5)})
        np.savez(tmp_path/"t"/"probe"/f"{e}-{s}"/"predictions.npz", valid_probabilities_linear_all=np.stack([1 - a, a], 1))
    def asked(groups, y=y): return {"t": SimpleNamespace(y=dict(valid=y), rows=dict(valid=np.arange(len(y))), scorer=WeightedScores, store=SimpleNamespace(groups=lambda i: groups))}
    error = gap_error(tmp_path, asked(None), "mae", "random", [0])
    assert .6*truth < error < 1.6*truth and error == gap_error(tmp_path, asked(None), "mae", "random", [0])
    alone = np.std([roc_auc_score(y, p) for y, p, _ in (draw(200) for _ in range(200))])
    assert error < .7*np.sqrt(2)*alone, "the same tiles for both"
    assert gap_error(tmp_path, asked(np.array(["a"]*200)), "mae", "random", [0]) == error, "one patient: tiles"
    assert gap_error(tmp_path, asked(np.arange(200)//20), "mae", "random", [0]) != error


def test_variants_are_listed_and_not_chosen():
    names = Names({"random": dict(name="Random", baseline=True), "mae": dict(name="MAE"), "mae_dark": dict(name="dark", of="mae")})
    scores = {("random", 0): .6, ("mae", 0): .7, ("mae_dark", 0): .9}
    best = best_of(scores, BY_PROBE, names, "runs/x", lambda a, b: .01)
    assert best["encoder"] == best["pretrained"]["encoder"] == "mae" and list(best_table(scores, BY_PROBE, names)["encoder"])[0] == names["mae_dark"]


@pytest.mark.parametrize("arch", [dict(patch_size=8, embed_dim=24, depth=2, num_heads=2), dict(arch="resnet18")])
def test_the_shown_lines_load_the_best(tmp_path, arch):
    from sdmae.models.encoders import build_encoder, save_encoder
    from sdmae.params import EncoderForm, ModelParams
    torch.manual_seed(0)
    model = ModelParams(**arch)
    encoder = build_encoder(32, model, EncoderForm()).eval()
    mean, std = [.5, .6, .7], [.2, .25, .3]
    form = dict(class_token=False, pos_embed="sincos2d")
    (tmp_path/"run"/"encoder").mkdir(parents=True)
    save_encoder(tmp_path/"run"/"encoder", encoder, dict(method="mae", image_size=32, model=model.model_dump(), mean=mean, std=std, form=form))
    best = dict(pretrained=dict(encoder="mae", seed=0, folder=str(tmp_path/"run"), score=1.))
    lines, tiles = export_best(best, tmp_path), torch.rand(3, 3, 32, 32)
    assert len(lines.splitlines()) == 3 and json.loads(json.dumps(best))["pretrained"]["image_size"] == 32
    space = dict(tiles=tiles)
    exec(lines, space)
    with torch.no_grad(): own = encoder.pooled((tiles - torch.tensor(mean)[:, None, None])/torch.tensor(std)[:, None, None])
    torch.testing.assert_close(space["features"], own, atol=1e-5, rtol=1e-4)
    export_best(best, tmp_path) # a report that is made again replaces it


# What features say

def test_spread_and_neighbours_against_scikit_learn():
    from sklearn.metrics import pairwise_distances
    from sklearn.neighbors import NearestNeighbors
    x = np.random.default_rng(0).normal(size=(60, 7)).astype(np.float32) + .5
    d = pairwise_distances(x, metric="cosine")
    assert spread(x) == pytest.approx(d.sum()/(60*59), abs=1e-6) and spread(np.ones((9, 3))) == pytest.approx(0, abs=1e-12)
    oracle = NearestNeighbors(n_neighbors=5, metric="cosine").fit(x).kneighbors(return_distance=False)
    np.testing.assert_array_equal(neighbours(x, 5), oracle)


# The experiment

def test_which_is_a_list_of_methods_and_a_time():
    P = parse_params(compose(["experiment=which", "data=folder", "data.tissue.path=x", "pretrain.tissue.minutes_together=30"]))
    methods = [e for e in P.compare["tissue"].encoders if P.encoders[e].pretrain]
    assert P.reports == ["tissue"] and P.protocols == ["probe"] and len(methods) >= 2
    assert sum(P.encoders[e].pretrain.minutes for e in methods)*len(P.seeds) == pytest.approx(30)
    assert P.data["tissue"].path == "x" and not any(P.encoders[e].method == "supervised" for e in P.compare["tissue"].encoders)


def test_a_path_that_is_missing_is_named(monkeypatch):
    P = parse_params(compose(["experiment=which", "data=folder", "data.tissue.path=no/such/tiles"]))
    assert any(f.startswith("data.tissue.path no/such/tiles does not exist") for f in plan.data_faults(P))


def tiny(tmp_path, *more):
    "A file of parameters of `which` for tiny tiles, and the arguments of one pre-training on some without labels."
    given = ["experiment=which", "data=folder", "data.tissue.image_size=16", "model.embed_dim=24", "model.depth=2", "model.num_heads=2", "model.patch_size=8", "device=cpu",
             "precision=float32", *more]
    (tmp_path/"params.yaml").write_text(yaml.safe_dump(compose(given)))
    data = params(images(tmp_path/"own", [f"{i}.png" for i in range(24)]))
    prepare(open_source(data), tmp_path/"tiles", data)
    return [f"--{k}={v}" for k, v in dict(encoder="mae", params=tmp_path/"params.yaml", tiles=tmp_path/"tiles", out=tmp_path/"run").items()]


def test_a_time_that_is_too_short_ends_in_one_line(tmp_path, capsys):
    from sdmae.pipeline.pretrain import main
    assert main(tiny(tmp_path, "pretrain.tissue.minutes_together=1e-6")) == 2 and not (tmp_path/"run"/"made.json").exists()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"pretrain.minutes [\d.e-]+ is less than one step, which takes [\d.e-]+: give more .minutes_together are shared out., or lower batch_size$", said)


def test_more_in_a_batch_than_there_are_tiles(tmp_path, capsys):
    "All tiles are one batch then; RankMe is what is watched."
    from sdmae.pipeline.pretrain import main
    assert main(tiny(tmp_path, "pretrain.tissue.minutes_together=null", "pretrain.tissue.epochs=2", "pretrain.tissue.batch_size=512")) == 0
    made = json.loads((tmp_path/"run"/"made.json").read_text())
    assert made["steps"] == 2 and "rankme" in made["last"] and not any("knn" in k for k in made["last"])


@pytest.mark.slow
@pytest.mark.parametrize("bare", [False, True])
def test_the_whole_command(tmp_path, bare):
    "Sixty tiles, as a user has them, in a copy of the repository; without labels, labels are added then, and nothing is trained again."
    from tiny import ENV, copy_of_project, sh
    work = tmp_path/"sdmae"
    copy_of_project(work)
    images(work/"data"/"mine", [f"{'s' if bare else 'c'}{i%(10 if bare else 2)}/{i}.png" for i in range(60)])
    given = """experiment=which data=folder data.tissue.path=data/mine data.tissue.image_size=32 data.lesions.limit=60 model.embed_dim=24 model.depth=2
        model.num_heads=2 pretrain.tissue.minutes_together=0.2 device=cpu precision=float32 report.bootstrap=20""".split()
    run = lambda *more: sh(work, "dvc", "exp", "run", *(x for o in (*given, *more) for x in ("-S", o)))
    run(*["data.tissue.folders=group"]*bare)
    report = work/"reports"/"tissue"
    page, best = (report/"index.html").read_text(), json.loads((report/"best.json").read_text())
    assert (report/"best.safetensors").is_file() and best["by"] == (BY_RANK if bare else BY_PROBE) and "create_model" in page and list(report.glob("neighbours*.png"))
    if not bare: return
    assert "What cannot be known without labels" in page and "weak guide" in page
    table = pd.read_csv(report/"to_label.csv", dtype=str, keep_default_na=False).assign(label=["a", "b"]*30)
    table.to_csv(work/"data"/"mine_labels.csv", index=False)
    given[1:3] = ["data=csv", "data.tissue.path=data/mine_labels.csv"]
    said = run()
    assert "pretrain" not in " ".join(re.findall(r"Running stage '([^']+)'", said)) and json.loads((report/"best.json").read_text())["by"] == BY_PROBE
