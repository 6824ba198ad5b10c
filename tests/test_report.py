"Tables against hand-made numbers, figures by what is drawn in them."
import json
import re
import subprocess
from itertools import combinations
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sklearn.isotonic import IsotonicRegression

matplotlib.use("agg")
from scipy import stats
from sdmae import made
from sdmae.evaluate.results import Task, scored
from sdmae.evaluate.statistics import METRICS, LabelScores, paired_bootstrap, scores
from sdmae.models.encoders import build_encoder, save_encoder
from sdmae.models.histogram import HistogramEncoder
from sdmae.params import EncoderForm, ModelParams
from sdmae.report import comparison as cp
from sdmae.report import figures as fg
from sdmae.report import provenance as pv
from sdmae.report import reading as rd
from sdmae.report import tables as tb
from sdmae.report.names import PROTOCOLS, Named, Names, value_text

BASELINES = {"random": dict(name="Random init", color="#7f7f7f", marker="X", baseline=True), "histogram": dict(name="Colour histogram", color="#b8b8b8", marker="D", baseline=True),
             "natural": dict(name="Natural-image weights", color="#000000", marker="*", baseline=True), "supervised": dict(name="Supervised", color="#009E73", marker="^", baseline=True)}
METHODS = {"mae": dict(name="MAE", color="#0072B2", marker="s"), "sdmae": dict(name="SD-MAE", color="#D55E00", marker="o"), "miram": dict(name="MIRAM", color="#882255", marker="v")}
PLAIN = Names(BASELINES | METHODS)
TINY_VIT = ModelParams(patch_size=8, embed_dim=16, depth=1, num_heads=2)
VALUES = dict(accuracy=.9, balanced_accuracy=.8, macro_auc=.95, macro_f1=.7, ece=.05)


def write_scores(root, name, task="label", results=None, **change):
    "`name` is protocol, encoder and seed."
    protocol, encoder, seed = re.fullmatch(r"([a-z_]+)-(.+)-(\d+)", name).groups()
    entry = VALUES | {"intervals": {k: [v-.01, v+.02] for k, v in VALUES.items()}} | change
    kinds = ("knn","linear") if protocol == "probe" else (protocol,)
    folder = root/task/protocol/f"{encoder}-{seed}"; folder.mkdir(parents=True, exist_ok=True)
    if results is None: results = {p: {"all": entry, "100": entry} for p in kinds}
    (folder/"scores.json").write_text(json.dumps(dict(study="s", task=task, protocol=protocol, encoder=encoder, seed=int(seed), results=results)))
    return folder


def write_predictions(root, name, p, t, index=None, keys=("linear_all",)):
    results = {}
    for k in keys: results.setdefault(k.rpartition("_")[0], {})[k.rpartition("_")[2]] = {}
    folder = write_scores(root, name, results=results)
    np.savez(folder/"predictions.npz", index=np.arange(len(t)) if index is None else index, targets=t, **{f"probabilities_{k}": p for k in keys})


def toy(skill, n=200, c=3, seed=0):
    rng = np.random.default_rng(seed)
    t = rng.integers(0, c, n)
    p = np.exp(rng.normal(size=(n, c)) + skill*np.eye(c)[t])
    return t, p/p.sum(1, keepdims=True)


# tables

def test_rows_come_in_the_order_of_tables(tmp_path):
    for name in ("probe-sdmae-0","probe-mae-10","probe-mae-9","finetune-mae-9","probe-random-0"): write_scores(tmp_path, name, k=20)
    write_scores(tmp_path, "probe-mae-0", task="another")
    df = rd.collect(tmp_path, "label", names=PLAIN)
    assert len(df) == (4*2 + 1)*2*5
    assert list(dict.fromkeys(df.labels)) == ["100","all"]
    assert list(dict.fromkeys(df.encoder)) == ["random","mae","sdmae"]
    assert set(df.subset) == {0}
    assert list(df[(df.encoder == "mae") & (df.protocol == "knn") & (df.labels == "all") & (df.metric == "ece")].seed) == [9, 10]
    row = df[df.metric == "macro_auc"].iloc[0]
    assert (row.value, row.low, row.high) == pytest.approx((.95, .94, .97))


def test_leftovers_of_other_runs_are_left_out(tmp_path):
    for name in ("probe-histogram-0","probe-histogram-1","probe-supervised-1","probe-mae-1","probe-mae-2","probe-moco-1","finetune-random-1"): write_scores(tmp_path, name)
    write_scores(tmp_path, "finetune-histogram-1", results={}) # cannot be fine-tuned
    df = rd.collect(tmp_path, "label", ["random","histogram","mae"], [1])
    assert set(zip(df.encoder, df.protocol)) == {("histogram","knn"),("histogram","linear"),("mae","knn"),("mae","linear"),("random","finetune")}
    with pytest.raises(FileNotFoundError, match="no scores"): rd.collect(tmp_path/"x", "label", ["mae"], [1])
    t, p = toy(1.)
    root = tmp_path/"y"
    write_predictions(root, "finetune-random-1", p, t, keys=["finetune_all", "finetune_long_all"])
    write_predictions(root, "probe-mae-7", p, t, index=np.arange(200)+1) # other tiles, but of another run
    assert set(rd.read_predictions(root, "label", ["random","mae"], [1]).files) == {("finetune","all","random",1), ("finetune","all","random_long",1)}


def test_protocols_that_are_no_longer_asked_for_are_left_out(tmp_path):
    for name in ("probe-mae-0","finetune-mae-0","linear_sgd-mae-0","linear_sgd-random-0"): write_scores(tmp_path, name)
    write_scores(tmp_path, "segment-mae-0", results={"segment": {"all": dict(miou=.5, iou_nucleus=.4, dice=.6)}})
    assert set(rd.collect(tmp_path, "label").protocol) == {"linear","linear_sgd","knn","finetune"}
    assert set(rd.collect(tmp_path, "label", protocols=["probe","finetune","segment"]).protocol) == {"linear","knn","finetune"}
    t, p = toy(1.)
    root = tmp_path/"y"
    write_predictions(root, "linear_sgd-random-0", p, t, keys=["linear_sgd_100"])
    write_scores(root, "segment-random-0")
    assert set(rd.read_predictions(root, "label").files) == {("linear_sgd","100","random",0)}
    with pytest.raises(FileNotFoundError): rd.read_predictions(root, "label", protocols=["finetune"])


def test_two_files_for_the_same_are_refused(tmp_path):
    write_scores(tmp_path, "finetune-random-0")
    (tmp_path/"label"/"finetune"/"copy").mkdir()
    (tmp_path/"label"/"finetune"/"copy"/"scores.json").write_bytes((tmp_path/"label"/"finetune"/"random-0"/"scores.json").read_bytes())
    with pytest.raises(ValueError, match="two files score \\('random', 0, 'finetune'\\)"): rd.collect(tmp_path, "label")


@pytest.mark.parametrize("text", ["{", "[]", '{"results": {}}', '{"protocol": "probe", "encoder": "mae", "seed": 0, "results": {"knn": {"all": {"accuracy": 0.5}}}}',
                                  '{"protocol": "probe", "encoder": "mae", "seed": 0, "results": {"knn": 3}}', '{"protocol": "probe", "encoder": "mae", "seed": 0, "results": 3}'])
def test_collect_names_a_broken_file(tmp_path, text):
    (tmp_path/"label"/"probe"/"mae-0").mkdir(parents=True)
    (tmp_path/"label"/"probe"/"mae-0"/"scores.json").write_text(text)
    with pytest.raises(ValueError, match="probe/mae-0/scores.json"): rd.collect(tmp_path, "label")


def test_nothing_there_says_what_to_run(tmp_path):
    for f in (lambda: rd.collect(tmp_path, "label"), lambda: rd.read_predictions(tmp_path, "label"), lambda: rd.read_curves(tmp_path/"runs")):
        with pytest.raises(FileNotFoundError, match="dvc repro"): f()


def test_predictions_that_lack_what_was_scored_are_named(tmp_path):
    t, p = toy(1.)
    write_predictions(tmp_path, "probe-mae-0", p, t)
    write_scores(tmp_path, "probe-mae-0")
    with pytest.raises(ValueError, match="mae-0/predictions.npz: lacks probabilities_knn_100"): rd.read_predictions(tmp_path, "label")


def test_results_table_shows_interval_or_spread(tmp_path):
    write_scores(tmp_path, "probe-mae-0", macro_auc=.912, intervals={"macro_auc": [.894,.929]})
    write_scores(tmp_path, "probe-sdmae-0", macro_auc=.90)
    write_scores(tmp_path, "probe-sdmae-1", macro_auc=.94)
    table = tb.results_table(rd.collect(tmp_path, "label"), names=PLAIN)
    assert table.loc[("all","MAE"), "kNN, macro AUC"] == "0.912 [0.894, 0.929]"
    assert table.loc[("all","MAE"), "kNN, balanced accuracy"] == "0.800"
    assert table.loc[("100","SD-MAE"), "linear probe, macro AUC"] == "0.920 ± 0.028"
    assert list(table.columns)[:2] == ["linear probe, balanced accuracy", "linear probe, macro AUC"]


@pytest.mark.parametrize("metric, best", [("accuracy","SD-MAE"), ("ece","MAE")])
def test_best_is_bold_and_small_errors_are_best(tmp_path, metric, best):
    write_scores(tmp_path, "probe-mae-0", **{metric: .3})
    write_scores(tmp_path, "probe-sdmae-0", **{metric: .6})
    table = tb.results_table(rd.collect(tmp_path, "label"), [metric], ["knn"], bold=True, names=PLAIN)
    bold = table[table.iloc[:,0].str.startswith("**")]
    assert set(bold.index.get_level_values("encoder")) == {best} and len(bold) == 2
    assert "**" not in tb.results_table(rd.collect(tmp_path, "label"), [metric]).to_string()


def test_markdown_is_a_table_whatever_the_cells_hold():
    text = tb.to_markdown(pd.DataFrame({"a|b": ["x|y", 1.5]}))
    assert text.splitlines() == ["| a\\|b |", "| --- |", "| x\\|y |", "| 1.5 |"]


def test_paired_table_is_the_paired_bootstrap(tmp_path):
    t, a = toy(2.); b, c = toy(1.)[1], toy(1.)[1]
    for name, p in (("sdmae-0",a),("mae-0",b),("mae-1",c)): write_predictions(tmp_path, f"probe-{name}", p, t)
    found = rd.read_predictions(tmp_path, "label")
    table = tb.paired_table(found, "sdmae", "mae", n=50, seed=4).set_index("metric")
    want = paired_bootstrap(t, a, b, n=50, seed=4) # SD-MAE has no seed 1: MAE's has no partner
    for m in METRICS:
        assert tuple(table.loc[m, ["difference","low","high"]]) == pytest.approx(want[m])
        assert (table.loc[m, "runs"], table.loc[m, "draws"]) == (1, 50) and np.isnan(table.loc[m, "sd"])
    assert table.loc["accuracy","p_tiles"] < .01 and table.p_seeds.isna().all() and set(tb.paired_text(table.reset_index()).verdict) == {"one seed"}
    same = tb.paired_table(found, "mae", "mae", n=20, names=PLAIN)
    assert set(same.p_tiles) == {1.} == set(same.p_seeds) and set(same.pair) == {"MAE − MAE"} and set(tb.paired_text(same).verdict) == {"not distinguishable (p 1.000)"}
    grouped = tb.paired_table(found, "sdmae", "mae", groups=np.arange(200)//40, n=50, seed=4).set_index("metric")
    assert tuple(grouped.loc["accuracy", ["low","high"]]) != tuple(table.loc["accuracy", ["low","high"]])
    with pytest.raises(ValueError, match="supervised and mae share no protocol.*sdmae"): tb.paired_table(found, "supervised", "mae")


def test_predictions_of_other_tiles_are_refused(tmp_path):
    t, p = toy(1.)
    write_predictions(tmp_path, "probe-mae-0", p, t)
    write_predictions(tmp_path, "probe-sdmae-0", p, t, index=np.arange(200)+1)
    with pytest.raises(ValueError, match="sdmae-0.*other tiles than.*mae-0"): rd.read_predictions(tmp_path, "label")


def test_fewer_labels_and_protocols_are_kept_apart(tmp_path):
    t, p = toy(1.)
    write_predictions(tmp_path, "probe-my-net-3", p, t, keys=["knn_100"])
    write_predictions(tmp_path, "finetune-mae-0", p, t, keys=["finetune_all"])
    found = rd.read_predictions(tmp_path, "label")
    assert set(found.files) == {("knn","100","my-net",3), ("finetune","all","mae",0)}
    assert found.runs("knn", 100, "my-net")[3, 0] == pytest.approx(p) and found.runs("linear", "all", "mae") == {}


UNDER = pv.circumstances_of({"MAE": made.circumstances("cpu")})
MANIFEST = dict(name="two stains", synthetic=True, classes=["a","b"], image_size=64, counts={"train": {"a": 1200, "b": 34}, "test": {"a": 5, "b": 0}})


def test_provenance_knows_a_changed_commit(tmp_path):
    def git(*a): subprocess.run(["git","-C",str(tmp_path),"-c","user.name=n","-c","user.email=e@x",*a], check=True, capture_output=True)
    assert made.git_state(tmp_path) == "no git commit"
    git("init"); (tmp_path/"params.yaml").write_text("a: 1"); (tmp_path/"dvc.lock").write_text("1"); (tmp_path/"README.md").write_text("x")
    git("add","."); git("commit","-m","m")
    assert re.fullmatch("[0-9a-f]{12}", made.git_state(tmp_path))
    for name in ("dvc.lock","README.md"): (tmp_path/name).write_text("2")
    assert re.fullmatch("[0-9a-f]{12}", made.git_state(tmp_path))
    (tmp_path/"params.yaml").write_text("a: 2"); (tmp_path/"sdmae").mkdir(); (tmp_path/"sdmae"/"new.py").write_text("")
    assert re.fullmatch("[0-9a-f]{12}, with 2 changed or new: params.yaml, sdmae/", made.git_state(tmp_path))


def test_provenance_says_what_made_the_numbers(tmp_path):
    facts = pv.provenance(MANIFEST, {"pre-training": "40 epochs"}, [0, 1], UNDER, groups=np.array(["s1","s1","s2"]))
    assert facts["data"] == "two stains (synthetic sample)" and facts["synthetic"].startswith("yes")
    assert facts["train"] == "1,234 tiles in 2 classes" and facts["test"] == "5 tiles in 1 classes"
    assert facts["seeds"] == "2 (0, 1)" and "2 patients or slides" in facts["intervals"] and facts["pre-training"] == "40 epochs"
    assert f"torch {torch.__version__.split('+')[0]}" in facts["versions"] and "CPU" in facts["device"]
    real = pv.provenance(MANIFEST | {"synthetic": False}, {}, [0], UNDER)
    assert real["data"] == "two stains" and real["synthetic"] == "no"


def test_written_tables_all_name_the_data(tmp_path):
    write_scores(tmp_path, "probe-mae-0"); write_scores(tmp_path, "probe-sdmae-0")
    t, p = toy(1.)
    for e in ("mae-0","sdmae-0"): write_predictions(tmp_path/"x", f"probe-{e}", p, t)
    facts = pv.provenance(MANIFEST, {}, [0], UNDER)
    paths = tb.write_tables(rd.collect(tmp_path, "label"), tmp_path/"out", facts["data"], tb.paired_table(rd.read_predictions(tmp_path/"x", "label"), "sdmae", "mae", n=20, names=PLAIN), facts, names=PLAIN)
    assert sorted(p.name for p in paths) == sorted(p.name for p in (tmp_path/"out").iterdir()) and len(paths) == 5
    for path in paths: assert "synthetic sample" in path.read_text()
    page = (tmp_path/"out"/"results.md").read_text()
    assert all("synthetic sample" in l for l in page.splitlines() if l.startswith("#") and "What made" not in l)
    assert "SD-MAE − MAE" in page
    for line in pd.read_csv(paths[1]).data: assert line == facts["data"]


# several seeds, subsets of the labels, and variants

VARIANTS = {"sdmae_p0": dict(loss_weight=0.), "sdmae_p08": dict(loss_weight=.8), "sdmae_mask75": dict(mask_ratio=.75), "sdmae_decoder1": {"decoder.depth": 1},
            "sdmae_detach": dict(detach_teacher=True), "sdmae_dino": dict(detach_teacher=True, center_on="logits")}
DEFAULTS = {"loss_weight": .2, "mask_ratio": .5, "decoder.depth": 2, "detach_teacher": False, "center_on": "probs"}


def variant(of, changes): return dict(of=of, changes=changes, defaults={k: DEFAULTS[k] for k in changes})


CAMPAIGN_NAMES = Names(BASELINES | METHODS | {k: variant("sdmae", v) for k, v in VARIANTS.items()})
LABELS = ("0.01","0.3","100","all")
SEEDS, SUBSETS = (0,1,2), 2


def skill(encoder, protocol, labels, seed, subset):
    "A made-up score, so that every table can be computed by hand."
    base = {"random": .30, "random_long": .32, "histogram": .40, "supervised": .45, "mae": .55, "sdmae": .60}
    v = base.get(encoder) or .58 + .01*list(VARIANTS).index(encoder)
    return v + .04*LABELS.index(labels) + .05*(protocol == "finetune") + .011*seed - .0074*subset + .003*seed*(encoder == "sdmae_p0")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    "What the stages leave of 3 encoders, 6 variants, the histogram and the supervised one: 3 seeds × 2 subsets; scores by hand, predictions of 60 tiles."
    root = tmp_path_factory.mktemp("campaign")
    t = np.random.default_rng(0).integers(0, 3, 60)
    for stage, protocols in (("probe",("knn","linear")), ("finetune",("finetune",)), ("linear_sgd",("linear_sgd",))):
        for e, seed in [(e, s) for e in ("random","histogram","supervised","mae","sdmae",*VARIANTS) for s in SEEDS]:
            if stage != "probe" and e in ("histogram","supervised"): continue
            scored, arrays = {p: {} for p in protocols}, dict(index=np.arange(60), targets=t)
            for p, l in [(p, l) for p in protocols for l in (("all",) if e == "supervised" else LABELS)]:
                subsets = range(1 if l == "all" else SUBSETS)
                entries = [{m: skill(e, p, l, seed, k) for m in METRICS} | {"n_train": 10} for k in subsets]
                logits = [np.random.default_rng(10*seed + k).normal(size=(60,3)) + 2*entries[k]["accuracy"]*np.eye(3)[t] for k in subsets] # luck is shared
                drawn = [np.exp(z)/np.exp(z).sum(1, keepdims=True) for z in logits]
                scored[p][l] = entries[0] if l == "all" else entries
                arrays[f"probabilities_{p}_{l}"] = drawn[0] if l == "all" else np.stack(drawn)
            np.savez(write_scores(root, f"{stage}-{e}-{seed}", results=scored)/"predictions.npz", **arrays)
    return root


def test_runs_are_seeds_times_subsets(campaign):
    df = rd.collect(campaign, "label", names=CAMPAIGN_NAMES)
    runs = df[(df.encoder == "mae") & (df.protocol == "linear") & (df.labels == "0.01") & (df.metric == "accuracy")]
    assert list(zip(runs.seed, runs.subset)) == [(s, k) for s in SEEDS for k in range(SUBSETS)]
    by_hand = [skill("mae", "linear", "0.01", s, k) for s in SEEDS for k in range(SUBSETS)]
    row = tb.summarise(df).query("encoder == 'mae' and protocol == 'linear' and labels == '0.01' and metric == 'accuracy'").iloc[0]
    assert (row.value, row.sd, row.runs, row.seeds) == pytest.approx((np.mean(by_hand), np.std(by_hand, ddof=1), 6, 3)) and np.isnan(row.low)
    alone = tb.summarise(df[df.seed == 0]).query("labels == 'all'")
    assert set(alone.runs) == {1} and alone.sd.isna().all()


def test_several_runs_have_no_interval_even_where_files_have_one(tmp_path):
    entry = VALUES | {"intervals": {k: [0., 1.] for k in VALUES}}
    write_scores(tmp_path, "finetune-mae-0", results={"finetune": {"100": [entry, entry | {"accuracy": .7}], "all": entry}})
    s = tb.summarise(rd.collect(tmp_path, "label", names=PLAIN)).query("metric == 'accuracy'").set_index("labels")
    assert np.isnan(s.low["100"]) and s.value["100"] == pytest.approx(.8) and (s.low["all"], s.high["all"]) == (0, 1)


@pytest.mark.parametrize("seeds, labels, text", [
    ((0,), ("all",), "value and 95 % bootstrap interval"),
    ((0,1,2), ("all",), "mean ± standard deviation over 3 seeds"),
    ((0,), ("100",), "mean ± standard deviation over 2 random subsets of the labels"),
    ((0,), ("100","all"), "mean ± standard deviation over 2 random subsets of the labels; where labels were drawn once, value and 95 % bootstrap interval"),
    ((0,1,2), ("100","all"), "mean ± standard deviation over 3 seeds × 2 random subsets of the labels; where labels were drawn once, over seeds alone")])
def test_the_caption_says_what_the_spread_is_over(campaign, seeds, labels, text):
    df = rd.collect(campaign, "label", names=CAMPAIGN_NAMES, seeds=seeds)
    assert tb.spread_text(df[df.labels.isin(labels)]) == text


def test_tables_of_several_runs(campaign):
    table = tb.results_table(rd.collect(campaign, "label"), names=CAMPAIGN_NAMES)
    assert list(table.index.levels[0][table.index.codes[0]].unique()) == ["1 %","30 %","100","all"]
    assert table.loc[("1 %","SD-MAE"), "linear probe (SGD), balanced accuracy"] == "{:.3f} ± {:.3f}".format(*(f([skill("sdmae", "linear_sgd", "0.01", s, k) for s in SEEDS for k in (0,1)]) for f in (np.mean, lambda x: np.std(x, ddof=1))))
    assert table.loc[("all","Supervised"), "linear probe (SGD), macro AUC"] == "" != table.loc[("all","Random init"), "fine-tuned, macro AUC"]
    assert list(table.loc["100"].index)[-8:] == ["MAE", "SD-MAE", *(CAMPAIGN_NAMES[v] for v in VARIANTS)]
    assert "SD-MAE, detach_teacher true, center_on logits" in table.index.get_level_values("encoder")
    assert len(table.columns) == 8


def test_pairs_are_of_the_same_seed_and_subset(campaign):
    found = rd.read_predictions(campaign, "label")
    assert list(found.runs("linear", "0.01", "mae")) == [(s, k) for s in SEEDS for k in (0, 1)]
    table = tb.paired_table(found, "sdmae", "mae", n=20).set_index(["labels","protocol","metric"])
    row = table.loc["0.01","linear_sgd","accuracy"]
    a, b = found.runs("linear_sgd", "0.01", "sdmae"), found.runs("linear_sgd", "0.01", "mae")
    each = np.array([scores(found.targets, a[k])["accuracy"] - scores(found.targets, b[k])["accuracy"] for k in a])
    by_seed = each.reshape(3, 2).mean(1) # subsets of one seed are no seeds
    t = stats.ttest_1samp(by_seed, 0)
    assert (row.difference, row.sd, row.runs, row.seeds) == pytest.approx((each.mean(), by_seed.std(ddof=1), 6, 3))
    assert (row.low_seeds, row.high_seeds, row.p_seeds) == pytest.approx((*t.confidence_interval(.95), t.pvalue))
    assert row["same sign"] == (np.sign(each) == np.sign(each.mean())).sum()
    assert set(table.loc["all"].runs) == {3}
    text = tb.paired_text(table.reset_index(), ["ece"])
    assert len(text) == len(LABELS)*4 and set(text["runs of the same sign"].str.split(" of ").str[1]) == {"3","6"}


def test_a_verdict_needs_both_tiles_and_seeds_and_pays_for_every_row():
    rows = pd.DataFrame(dict(labels="all", protocol="knn", metric="macro_auc", difference=[.05, .05, .05, -.05], low=[.04, .04, -.04, -.06], high=[.06, .06, .14, -.04],
                             low_seeds=[.03, -.2, .03, np.nan], high_seeds=[.07, .3, .07, np.nan], p_tiles=[1e-9, 1e-9, .3, 1e-9], p_seeds=[.001, .4, .001, np.nan],
                             p_total=[.001, .001, .001, np.nan], sd=.01, seeds=3, runs=[3, 3, 3, 1], **{"same sign": [3, 2, 3, 1]}))
    assert list(tb.paired_text(rows).verdict) == ["ahead (p 0.003)", "not distinguishable (p 0.600)", "not distinguishable (p 0.600)", "one seed"]
    many = pd.concat([rows.iloc[:1].assign(p_seeds=.001)] + [rows.iloc[:1].assign(p_seeds=.5)]*99)
    assert tb.paired_text(many).verdict.iloc[0] == "not distinguishable (p 0.100)", "one of a hundred is found by chance"
    assert list(tb.paired_text(rows.assign(p_total=.2)).verdict)[0] == "not distinguishable (p 0.600)", "the sum of both sources counts, too"
    assert tb.paired_text(many)["smallest visible over seeds"].iloc[0] > tb.paired_text(rows)["smallest visible over seeds"].iloc[0], "more rows see less"
    other = tb.paired_text(pd.concat([rows.iloc[:1], many.iloc[1:].assign(metric="ece")]))
    assert other.verdict.iloc[0] == "ahead (p 0.001)", "scores are families of their own"


def test_each_method_stands_against_every_baseline(tmp_path):
    t, a = toy(2.)
    for e in ("mae-0", "mae-1", "random-0", "random-1", "histogram-0", "natural-0", "supervised-0"): write_predictions(tmp_path, f"probe-{e}", a, t, keys=["knn_all"])
    write_predictions(tmp_path, "finetune-random-0", a, t, keys=["finetune_all", "finetune_long_all"])
    write_predictions(tmp_path, "finetune-mae-0", a, t, keys=["finetune_all"])
    found = rd.read_predictions(tmp_path, "label")
    table = tb.paired_tables(found, tb.against_baselines(PLAIN), n=20, names=PLAIN)
    assert set(zip(table.b, table.protocol)) == {("random", "knn"), ("histogram", "knn"), ("natural", "knn"), ("supervised", "knn"), ("random", "finetune"), ("random_long", "finetune")}
    assert set(table.a) == {"mae"} and "MAE − Random init, longer" in set(table.pair)
    assert tb.paired_tables(found, [("sdmae", "mae")]).empty
    assert len(tb.paired_tables(found, [("mae", "random"), ["mae", "random"]], n=20)) == len(tb.paired_tables(found, [("mae", "random")], n=20)), "a pair listed twice counts once"


def test_ablations_differ_run_by_run(campaign):
    df = rd.collect(campaign, "label", names=CAMPAIGN_NAMES)
    rows = tb.ablation(df, CAMPAIGN_NAMES)
    assert list(rows.encoder.unique()) == ["sdmae", *VARIANTS] and set(rows.protocol) == {"linear","linear_sgd","knn","finetune"}
    p0 = rows[(rows.encoder == "sdmae_p0") & (rows.protocol == "knn")].iloc[0]
    by_hand = np.array([skill("sdmae_p0", "knn", "all", s, 0) - skill("sdmae", "knn", "all", s, 0) for s in SEEDS])
    assert (p0.difference, p0.difference_sd) == pytest.approx((by_hand.mean(), by_hand.std(ddof=1)))
    assert rows[rows.encoder == "sdmae"].difference.isna().all()
    few = tb.ablation(df, CAMPAIGN_NAMES, labels="0.01")
    assert set(few.runs) == {6}
    table = tb.ablation_table(df, CAMPAIGN_NAMES)
    assert list(table.changed) == ["as it stands", "loss_weight: 0.2 → 0", "loss_weight: 0.2 → 0.8", "mask_ratio: 0.5 → 0.75", "decoder.depth: 2 → 1",
                                   "detach_teacher: false → true", "detach_teacher: false → true, center_on: probs → logits"]
    assert table["kNN, difference"][1] == f"{by_hand.mean():+.3f} ± {by_hand.std(ddof=1):.3f}" and table["kNN, difference"][0] == ""
    assert tb.ablation_table(df[df.encoder != "sdmae"], CAMPAIGN_NAMES)["kNN, difference"].eq("").all(), "without its method a variant has no difference"
    with pytest.raises(ValueError, match="no variant among"): tb.ablation_table(df[df.encoder == "mae"], CAMPAIGN_NAMES)


def test_variants_are_named_by_what_they_change():
    assert list(CAMPAIGN_NAMES)[-8:] == ["sdmae", *VARIANTS, "miram"] and CAMPAIGN_NAMES["sdmae_decoder1"] == "SD-MAE, decoder.depth 1"
    same = variant("mae", dict(mask_ratio=.75))
    twins = Names(METHODS | {"a": same, "b": same, "c": dict(of="mae"), "d": dict(of="a", changes={"decoder.depth": 1}), "e": dict(of="mae", name="Mine")})
    assert [twins[k] for k in "abcde"] == ["MAE, mask_ratio 0.75", "MAE, mask_ratio 0.75 (b)", "MAE (c)", "MAE, mask_ratio 0.75, decoder.depth 1", "Mine"]
    assert list(twins)[:6] == ["mae", "a", "d", "b", "c", "e"] and twins.root("d") == "mae" and twins.top_down("d mae sdmae".split()) == ["sdmae", "mae", "d"]
    assert [value_text(v) for v in (True, None, 1e-4, (.2, 1.), "logits")] == ["true", "null", "0.0001", "(0.2, 1.0)", "logits"]


def test_names_cannot_be_written_into():
    told = {"mae": dict(name="MAE")}
    names = Names(told)
    told["mae"]["name"] = "another"; told["sdmae"] = {}
    assert dict(names) == {"mae": "MAE"}
    with pytest.raises(TypeError): names["mae"] = "another"
    with pytest.raises(TypeError): names.told["mae"] = Named("another")
    with pytest.raises(AttributeError): names.told["mae"].name = "another"
    with pytest.raises(ValueError, match="names: a is a variant of b"): Names({"a": dict(of="b"), "b": dict(of="a")})
    with pytest.raises(TypeError, match="colour"): Names({"a": dict(colour="red")})


def test_a_key_never_heard_of_is_its_own_name():
    assert (PLAIN["moco"], PLAIN.get("moco"), "moco" in PLAIN, PLAIN["random_long"], PLAIN["moco_long"]) == ("moco", "moco", False, "Random init, longer", "moco_long")
    assert PLAIN.ordered(["moco", "random_long", "mae", "random"]) == ["random", "random_long", "mae", "moco"]
    assert pd.DataFrame(index=["mae", "moco"]).rename(index=PLAIN).index.tolist() == ["MAE", "moco"]
    kept = Names({"x": {}, "x_long": dict(name="An encoder of its own")})
    assert kept["x_long"] == "An encoder of its own" and kept.plain == ["x", "x_long"]
    assert (PLAIN.methods, PLAIN.baselines[:3]) == (["mae", "sdmae", "miram"], ["random", "random_long", "histogram"])


def test_looks_of_variants_are_their_own():
    drawn = [tuple(CAMPAIGN_NAMES.style(e).values()) for e in (*CAMPAIGN_NAMES, "random_long", "moco", "my-net")]
    assert len(set(drawn)) == len(drawn) and all(c != "black" for c, _ in drawn)
    many = Names(METHODS | {f"v{i}": dict(of="sdmae", changes={"loss_weight": i/50}) for i in range(50)})
    assert len({tuple(many.style(e).values()) for e in many}) == len(many)
    inherited = Names({"mae": METHODS["mae"], "fine": METHODS["mae"] | dict(name="MAE, fine side")}) # the same pair twice
    assert inherited.style("mae") == dict(color="#0072B2", marker="s") != inherited.style("fine")


def test_segmentation_stands_apart(tmp_path):
    write_scores(tmp_path, "probe-mae-0")
    assert rd.collect_segments(tmp_path, "label") is None
    for e, seed, x in (("random",0,.5), ("mae",0,.6), ("mae",1,.7), ("sdmae",0,.9)):
        entry = dict(miou=x, iou_nucleus=x-.1, dice=x+.05, intervals=dict(miou=[x-.1, x+.1]) if e == "random" else None)
        write_scores(tmp_path, f"segment-{e}-{seed}", results={"segment": {"all": entry}})
    table = tb.segment_table(rd.collect_segments(tmp_path, "label", ["random","mae"], [0,1]), names=PLAIN)
    assert list(table.columns) == ["mIoU","IoU of nuclei","Dice of nuclei"] and list(table.index) == ["Random init","MAE"]
    assert table.loc["Random init","mIoU"] == "0.500 [0.400, 0.600]" and table.loc["MAE","Dice of nuclei"] == "0.700 ± 0.071"
    assert set(rd.collect(tmp_path, "label", names=PLAIN).protocol) == {"knn","linear"}
    write_scores(tmp_path, "segment-mae-0", results={"segment": {"all": {"miou": 1}}})
    with pytest.raises(ValueError, match="segment/mae-0/scores.json"): rd.collect_segments(tmp_path, "label")


def test_watched_shows_what_there_is():
    made = {("sdmae_p0", 0): dict(last=dict(rankme=3., kl=None), notes=["collapsed: all of it", "flat: too"]), ("mae", 1): dict(last=dict(rankme=31.4159), notes=[]), ("random", 0): dict(last=None, notes=[])}
    table = tb.watched_table(made, CAMPAIGN_NAMES)
    assert table.to_dict("list") == {"method": ["MAE","SD-MAE, loss_weight 0"], "seed": [1,0], "RankMe": ["31.4","3"], "warnings": ["","collapsed; flat"]}


def test_written_tables_hold_the_further_ones(campaign, tmp_path):
    df = rd.collect(campaign, "label", names=CAMPAIGN_NAMES)
    more = dict(ablation=("what each switch does", tb.ablation_table(df, CAMPAIGN_NAMES)))
    paths = tb.write_tables(df, tmp_path, "x (synthetic sample)", tb.paired_table(rd.read_predictions(campaign, "label"), "sdmae", "mae", n=5), None, more, CAMPAIGN_NAMES)
    assert [p.name for p in paths] == ["results.md","results.csv","table.csv","paired.csv","ablation.csv"] and all(p.is_file() for p in paths)
    page = paths[0].read_text()
    assert "## x (synthetic sample): what each switch does" in page and "3 seeds × 2 random subsets" in page and "linear probe (SGD), all scores" in page
    assert "nan" not in page and set(pd.read_csv(paths[1]).subset) == {0, 1}


def test_one_slide_is_said(tmp_path):
    facts = pv.provenance(MANIFEST, {}, [0], UNDER, groups=np.array(["s1"]*5))
    assert "all of one patient or slide" in facts["intervals"]


# tasks of a comparison

class MadeStore:
    "120 lesions that bear none, one or two of four labels; the last label is on no test lesion."
    split = np.repeat(["train", "valid", "test"], 40)
    y = np.random.default_rng(0).random((120, 4)) < [.5, .3, .4, .6]
    y[80:, 3] = False
    def task(self, target): return SimpleNamespace(classes=["a", "b", "c", "d"], multi=True)
    def indices(self, split, target): return np.flatnonzero(self.split == split)
    def targets(self, rows, target): return torch.from_numpy(self.y[rows].astype(np.int64))
    def groups(self, rows): return np.asarray(rows)//4
    def batch(self, rows): return torch.full((len(rows), 1, 16, 16), 128, dtype=torch.uint8)


@pytest.fixture
def margins(tmp_path):
    asked, rng, drawn = Task(MadeStore(), "margins"), np.random.default_rng(1), {}
    for e, gain in (("random", .1), ("mae", .4)):
        drawn[e] = np.clip(.3 + gain*asked.y["test"] + .2*rng.normal(size=(40, 4)), .01, .99)
        entry, kept = scored(asked, [drawn[e]], [{}])
        folder = write_scores(tmp_path, f"probe-{e}-0", "margins", {"linear": {"all": entry}})
        np.savez(folder/"predictions.npz", index=asked.rows["test"], targets=asked.y["test"], probabilities_linear_all=kept)
    return cp.Compared(tmp_path, "margins", asked, PLAIN, "x", [0], ["probe", "finetune"]), drawn


def test_a_task_of_several_labels_is_compared_label_by_label(margins):
    c, drawn = margins
    assert c.by_label and c.columns[0] == "macro_ap" and (c.bears == c.asked.y["test"]).all()
    assert {"ap_0", "ap_1", "ap_2", "micro_auc", *cp.RELEASED} <= set(c.scores.metric) and "ap_3" not in set(c.scores.metric), "a label that no test lesion bears has no score"
    table = cp.differences(c, [("mae", "random")], 30).set_index("metric")
    want = paired_bootstrap(c.asked.y["test"], drawn["mae"], drawn["random"], c.asked.groups, 30, scorer=LabelScores)
    assert tuple(table.loc["macro_ap", ["difference","low","high"]]) == pytest.approx(want["macro_ap"]) and set(table.task) == {"margins"} and set(table.pair) == {"MAE − Random init"}
    assert cp.differences(c, [("sdmae", "mae")], 30).empty


def test_encoders_without_attention_are_left_out(margins, tmp_path):
    c = margins[0]
    c.names = Names({"histogram": {}, "mae": {}})
    for e, encoder, config in (("histogram", HistogramEncoder(16, 1), dict(kind="histogram", image_size=16, channels=1, bins=16)),
                               ("mae", build_encoder(16, TINY_VIT, EncoderForm()), dict(kind="vit", image_size=16, model=TINY_VIT.model_dump(), form=EncoderForm().model_dump()))):
        save_encoder(tmp_path/"runs"/f"{e}-0"/"encoder", encoder, dict(mean=[0.]*3, std=[1.]*3) | config)
    shown = cp.attention_figure(c, tmp_path/"runs", 0, n=3)
    assert [ax.get_ylabel() for ax in shown.axes if ax.get_ylabel()] == ["tile", "mae"]
    c.names = Names({"histogram": {}})
    assert cp.attention_figure(c, tmp_path/"runs", 0) is None and cp.tsne_figures(c, 0) == {}


# figures

def rows(labels=("100","all"), seeds=(0,), metric="balanced_accuracy", encoders=None):
    rng, out = np.random.default_rng(0), []
    skill = encoders or {"random": .5, "random_long": .6, "histogram": .57, "supervised": .7, "mae": .76, "sdmae": .79}
    for l in labels:
        for p in ("linear","knn","finetune"):
            for e, v in skill.items():
                if (e, p) == ("histogram","finetune"): continue
                for s in seeds:
                    x = v + .1*(l == "all") + .01*rng.normal()
                    out.append(dict(encoder=e, seed=s, subset=0, protocol=p, labels=l, metric=metric, value=x, low=x-.02, high=x+.02))
    return pd.DataFrame(out)


def curves(encoders=("mae","sdmae","supervised"), metrics=("train/loss","valid/knn","rankme"), n=60):
    return pd.concat([pd.DataFrame(dict(encoder=e, seed=0, metric=m, step=np.arange(n), value=np.exp(-np.arange(n)/20) + .01*i))
                      for i, e in enumerate(encoders) for m in metrics])


def visible_texts(fig):
    "All texts that are drawn, with their boxes in px; ticks beyond the limits are not."
    canvas = FigureCanvasAgg(fig); canvas.draw()
    ticks = [(axis, tick) for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for tick in axis.get_major_ticks() + axis.get_minor_ticks()]
    beyond = {id(t.label1) for axis, t in ticks if not min(axis.get_view_interval()) <= t.get_loc() <= max(axis.get_view_interval())}
    texts = [t for t in fig.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text().strip() and id(t) not in beyond]
    boxes = [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in texts]
    return [(name, box) for name, box in boxes if box.width and box.height]


def assert_readable(fig):
    "No text on another, none outside the figure."
    texts, frame = visible_texts(fig), fig.bbox
    for name, b in texts: assert b.x0 >= -1 and b.y0 >= -1 and b.x1 <= frame.x1 + 1 and b.y1 <= frame.y1 + 1, f"{name!r} leaves the figure"
    for (m, a), (n, b) in combinations(texts, 2):
        overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(overlap) <= 1.5, f"{m!r} lies on {n!r}"


NAME = "pcam_12k_96px_jpg (synthetic sample)"
DRAWN = {
    "overview": lambda: fg.overview(rows(), NAME, 9, names=PLAIN),
    "overview, one panel, seeds": lambda: fg.overview(rows(("all",), (0,1,2)), NAME, 9, names=PLAIN),
    "overview, histogram near chance": lambda: fg.overview(rows(("100","1000","all"), metric="macro_auc", encoders={"histogram": .51, "mae": .9, "moco": .8}), NAME, 2, "macro_auc", PLAIN),
    "label_curve": lambda: fg.label_curve(rows(("100","1000","all")), NAME, 8000, names=PLAIN),
    "label_curve, crowded": lambda: fg.label_curve(rows(("100","1000","all")), NAME, 1088, names=PLAIN),
    "label_curve, one number": lambda: fg.label_curve(rows(("all",)), NAME, 8000, names=PLAIN),
    "learning_curves": lambda: fg.learning_curves(curves(), NAME, names=PLAIN),
    "learning_curves, all ends alike": lambda: fg.learning_curves(curves(("mae","sdmae","supervised","moco"), ("loss",)).assign(value=lambda d: 1 + .001*d.value), NAME),
    "learning_curves, four panels": lambda: fg.learning_curves(curves(metrics=("train/loss","train/mse","lr","images_per_s")), NAME),
    "confusion, 9": lambda: fg.confusion_matrices({e: 30*np.eye(9) + 2 for e in PLAIN}, ["ADI","BACK","DEB","LYM","MUC","MUS","NORM","STR","TUM"], NAME, PLAIN),
    "confusion, 2": lambda: fg.confusion_matrices({e: np.array([[8,2],[1,0]]) for e in ("mae","sdmae")}, ["normal","tumor"], NAME),
    "tsne": lambda: fg.tsne({e: np.random.default_rng(0).normal(size=(40,2)) for e in PLAIN}, list("abcdefghij")*4, NAME, names=PLAIN),
    "tsne, one encoder, long names": lambda: fg.tsne({"mae": np.random.default_rng(0).normal(size=(40,2))}, ["NCT-CRC-HE-100K","CRC-VAL-HE-7K"]*20, NAME, "centre", PLAIN),
    "reconstruction": lambda: fg.reconstruction_grid({k: np.random.default_rng(0).random((5,3,16,16)) for k in ("original", "masked", "reconstruction")}, NAME, "SD-MAE, epoch 40"),
    "attention": lambda: fg.attention_grid(torch.rand(5,3,16,16), {"mae": torch.rand(5,4,4), "sdmae": torch.rand(5,4,4)}, NAME, PLAIN)}


CAMPAIGN = { # 3 seeds × 2 subsets, 3 encoders, 6 variants, 4 protocols
    "overview": lambda df, names: fg.overview(df, NAME, 3, names=names),
    "overview without variants": lambda df, names: fg.overview(df[~df.encoder.isin(names.variants)], NAME, 3, names=names),
    "label_curve": lambda df, names: fg.label_curve(df, NAME, 9000, names=names),
    "label_curve of shares": lambda df, names: fg.label_curve(df[df.labels != "100"], NAME, 9000, names=names),
    "ablation": lambda df, names: fg.ablation_figure(df, names, "sdmae", NAME),
    "ablation, one seed": lambda df, names: fg.ablation_figure(df[df.seed == 0], names, "sdmae", NAME, labels="100"),
    "learning_curves": lambda df, names: fg.learning_curves(pd.concat([curves(("mae","sdmae",*VARIANTS), ("loss","rankme","lr","kl"), 24).assign(seed=s) for s in SEEDS]), NAME, names=names),
    "confusion": lambda df, names: fg.confusion_matrices({e: 30*np.eye(2) + 2 for e in ("random","histogram","supervised","mae","sdmae",*VARIANTS)}, ["normal","tumor"], NAME, names),
    "attention": lambda df, names: fg.attention_grid(torch.rand(5,3,16,16), {e: torch.rand(5,4,4) for e in ("random","mae","sdmae",*VARIANTS)}, NAME, names)}


@pytest.mark.parametrize("name", CAMPAIGN)
def test_figures_of_a_campaign_are_readable(campaign, name):
    fig = CAMPAIGN[name](rd.collect(campaign, "label", names=CAMPAIGN_NAMES), CAMPAIGN_NAMES)
    assert NAME in fig.get_suptitle().replace("\n", " ")
    assert_readable(fig)


def test_bands_are_standard_deviations_or_intervals(campaign):
    df = rd.collect(campaign, "label", names=CAMPAIGN_NAMES)
    part = fg.with_bars(df[df.metric == "balanced_accuracy"]).query("encoder == 'mae' and protocol == 'knn' and labels == '100'").iloc[0]
    by_hand = [skill("mae", "knn", "100", s, k) for s in SEEDS for k in (0, 1)]
    assert (part.low, part.high) == pytest.approx((np.mean(by_hand) - np.std(by_hand, ddof=1), np.mean(by_hand) + np.std(by_hand, ddof=1)))
    single = fg.with_bars(rows())
    assert (single.high - single.value).to_numpy() == pytest.approx(.02)
    ax = fg.label_curve(df[df.encoder.isin(["mae"])], "x", 9000).axes[0]
    drawn = ax.collections[0].get_paths()[0].vertices
    want = fg.with_bars(df[(df.metric == "balanced_accuracy") & (df.encoder == "mae") & (df.protocol == "linear")])
    assert {round(v, 6) for v in drawn[:,1]} == {round(v, 6) for v in (*want.low, *want.high)}
    assert sorted(drawn[:,0])[0] == pytest.approx(90) and [t.get_text() for t in ax.texts][:3] == ["1 %","30 %","100 %"]


def test_the_ablation_figure_draws_the_numbers(campaign):
    df = rd.collect(campaign, "label", names=CAMPAIGN_NAMES)
    fig = fg.ablation_figure(df, CAMPAIGN_NAMES, "sdmae", "x")
    names = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert names == ["loss_weight", "0", "0.2 · as it stands", "0.8", "mask_ratio", "0.5 · as it stands", "0.75", "decoder.depth", "1", "2 · as it stands",
                     "detach_teacher", "false · as it stands", "true", "several at once", "detach_teacher true, center_on logits"]
    points = {int(l.get_ydata()[0]): l for l in fig.axes[0].lines if l.get_marker() not in ("", "None")}
    mean = lambda e: np.mean([skill(e, "linear", "all", s, 0) for s in SEEDS])
    assert {y: float(l.get_xdata()[0]) for y, l in points.items()} == pytest.approx({1: mean("sdmae_p0"), 2: mean("sdmae"), 3: mean("sdmae_p08"), 5: mean("sdmae"), 6: mean("sdmae_mask75"),
        8: mean("sdmae_decoder1"), 9: mean("sdmae"), 11: mean("sdmae"), 12: mean("sdmae_detach"), 14: mean("sdmae_dino")})
    assert points[12].get_color() == CAMPAIGN_NAMES.style("sdmae_detach")["color"] and [ax.get_title() for ax in fig.axes] == [PROTOCOLS[p] for p in ("linear", "linear_sgd", "knn", "finetune")]
    with pytest.raises(ValueError, match="no variant"): fg.ablation_figure(df, CAMPAIGN_NAMES, "mae", "x")


def test_the_story_lists_variants_below_their_method(campaign):
    fig = fg.overview(rd.collect(campaign, "label", names=CAMPAIGN_NAMES, seeds=[0]), "x", 3, names=CAMPAIGN_NAMES)
    names = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert names[:9] == ["SD-MAE", "SD-MAE, loss_weight 0", "SD-MAE, loss_weight 0.8", "SD-MAE, mask_ratio 0.75", "SD-MAE, decoder.depth 1", "SD-MAE, detach_teacher true", "sdmae_dino", "MAE", "Supervised"]


@pytest.mark.parametrize("name", DRAWN)
def test_figures_are_readable_and_name_the_data(name):
    fig = DRAWN[name]()
    assert NAME in fig.get_suptitle().replace("\n", " ")
    assert_readable(fig)


def test_an_encoder_has_one_colour_everywhere():
    colours = {e: matplotlib.colors.to_hex(PLAIN.style(e)["color"]) for e in (*PLAIN, "random_long")}
    assert len(set(colours.values())) == len(colours)
    wanted = {colours[e] for e in set(rows().encoder)}
    story, curve = fg.overview(rows(("all",)), "x", 9, names=PLAIN), fg.label_curve(rows(), "x", 800, names=PLAIN)
    for fig in (story, curve):
        lines = [l for ax in fig.axes for l in ax.lines if l.get_marker() not in ("", "None", "|")]
        assert {matplotlib.colors.to_hex(l.get_color()) for l in lines} == wanted
    learn = fg.learning_curves(curves(("mae",)), "x", names=PLAIN)
    assert matplotlib.colors.to_hex(learn.axes[0].lines[0].get_color()) == colours["mae"]


def test_names_are_dark_enough_to_read():
    assert (fg.ink("histogram", PLAIN), fg.ink("mae", PLAIN)) == ("#8a8a8a", "#0072B2")
    by_name = Names({"toy": dict(color="tomato", marker="P"), "pale": dict(color="white", marker="P")})
    assert (fg.ink("toy", by_name), fg.ink("pale", by_name)) == ("tomato", "#bfbfbf")


def test_metrics_for_dvc_are_the_means(campaign, tmp_path):
    df = rd.collect(campaign, "label", names=CAMPAIGN_NAMES)
    paths = tb.write_metrics(df, tmp_path/"metrics")
    assert sorted(p.name for p in paths) == sorted(f"{e}.json" for e in df.encoder.unique())
    found = json.loads((tmp_path/"metrics"/"mae.json").read_text())
    assert found["knn_0.01_accuracy"] == round(np.mean([skill("mae", "knn", "0.01", s, k) for s in SEEDS for k in (0, 1)]), 4)
    assert {k.split("_", 2)[2] for k in found if k.startswith("knn_")} == {"accuracy", "balanced_accuracy", "macro_auc"}
    assert (tmp_path/"metrics").stat() and tb.write_metrics(df, tmp_path/"metrics", "margins")[0].name.startswith("margins_")


def test_overview_draws_the_numbers():
    df = rows(("all",))
    ax = fg.overview(df, "x", 9).axes[0]
    points = sorted(float(l.get_xdata()[0]) for l in ax.lines if l.get_marker() not in ("", "None"))
    assert points == pytest.approx(sorted(df.value))
    verticals = [float(l.get_xdata()[0]) for l in ax.lines if l.get_linestyle() in (":","--")]
    floor = df[(df.encoder == "histogram") & (df.protocol == "linear")].value.iloc[0]
    assert sorted(verticals) == pytest.approx(sorted([1/9, floor]))
    spans = [tuple(l.get_xdata()) for l in ax.lines if len(l.get_xdata()) == 2 and l.get_linestyle() == "-" and l.get_ydata()[0] == l.get_ydata()[1]]
    assert np.array(sorted(spans)) == pytest.approx(np.array(sorted(zip(df.low, df.high))))


@pytest.mark.parametrize("seed", range(5))
def test_spread_is_isotonic_regression(seed):
    rng = np.random.default_rng(seed)
    y, gap = rng.random(8), .1
    order = np.argsort(y)
    oracle = IsotonicRegression().fit_transform(np.arange(8), y[order] - gap*np.arange(8)) + gap*np.arange(8)
    assert fg.spread(y, gap)[order] == pytest.approx(oracle)


def test_learning_curves_come_from_dvclives_own_files(tmp_path):
    dvclive = pytest.importorskip("dvclive")
    with dvclive.Live(str(tmp_path/"my-net-2"/"live"), dvcyaml=None, save_dvc_exp=False) as live:
        for i in range(3):
            live.log_metric("train/loss", 1/(i+1)); live.log_metric("rankme", float(i)); live.next_step()
    df = rd.read_curves(tmp_path)
    assert rd.read_curves(tmp_path, ["mae"]).empty and rd.read_curves(tmp_path, seeds=[0]).empty
    assert set(df.metric) == {"train/loss","rankme"} and set(df.encoder) == {"my-net"} and set(df.seed) == {2}
    assert list(df[df.metric == "train/loss"].value) == pytest.approx([1, 1/2, 1/3])
    (tmp_path/"mae-0"/"live"/"plots"/"metrics").mkdir(parents=True)
    (tmp_path/"mae-0"/"live"/"plots"/"metrics"/"loss.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(ValueError, match="mae-0.*loss.tsv.*expected step and loss"): rd.read_curves(tmp_path)


def test_confusions_are_shares_of_the_true_class():
    fig = fg.confusion_matrices({"mae": [[30,10],[0,0]]}, ["a","b"], "x")
    assert fig.axes[0].images[0].get_array().tolist() == [[75,25],[0,0]]
    assert sorted(t.get_text() for t in fig.axes[0].texts) == ["25","75"]
    with pytest.raises(ValueError, match="mae is \\(2, 2\\), 3 classes"): fg.confusion_matrices({"mae": np.eye(2)}, list("abc"), "x")


def test_tsne_shows_clusters_and_minds_its_input():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 20)
    xy = fg.tsne_points(20*np.eye(3)[y] + rng.normal(size=(60,3)))
    centres = np.stack([xy[y == i].mean(0) for i in range(3)])
    assert (np.linalg.norm(xy[:,None] - centres, axis=2).argmin(1) == y).all()
    assert np.array_equal(xy, fg.tsne_points(20*np.eye(3)[y] + np.random.default_rng(0).normal(size=(60,3))))
    with pytest.raises(ValueError, match="4 points"): fg.tsne_points(np.ones((4,2)))
    with pytest.raises(ValueError, match="5 names, points {'mae': 6}"): fg.tsne({"mae": np.ones((6,2))}, ["a"]*5, "x")


def test_images_in_any_usual_form_are_the_same_picture():
    bytes_ = np.random.default_rng(0).integers(0, 256, (2,8,9,3), dtype=np.uint8)
    want = bytes_/255
    for form in (bytes_, torch.from_numpy(bytes_), torch.from_numpy(bytes_).permute(0,3,1,2), want, torch.from_numpy(want).permute(0,3,1,2).bfloat16()):
        assert fg.to_images(form) == pytest.approx(want, abs=.005)
    assert fg.to_images(np.full((1,3,4,4), 1.3)).max() == 1
    with pytest.raises(ValueError, match="got \\(8, 9, 3\\)"): fg.to_images(bytes_[0])


def test_attention_minds_its_input():
    x = np.zeros((3,3,16,16))
    with pytest.raises(ValueError, match="average over heads"): fg.attention_grid(x, {"mae": np.ones((3,2,4,4))}, "x")
    with pytest.raises(ValueError, match="3 images, maps of {'mae': 2}"): fg.attention_grid(x, {"mae": np.ones((2,4,4))}, "x")
    drawn = fg.attention_grid(x, {"mae": np.arange(48.).reshape(3,4,4)}, "x").axes[4].images[1].get_array()
    assert drawn.min() == 0 and drawn.max() == 1


@pytest.mark.parametrize("draw, message", [
    (lambda: fg.overview(rows(), "x", 9, "ece"), "metric ece"),
    (lambda: fg.label_curve(rows(), "x", 9, "ece"), "metric ece"),
    (lambda: fg.learning_curves(curves(), "x", ["nothing"]), "no curve \\['nothing'\\]; there are \\['train/loss'"),
    (lambda: fg.reconstruction_grid({"original": np.zeros((2,3,4,4)), "masked": np.zeros((1,3,4,4))}, "x"), "differ in length"),
    (lambda: tb.results_table(rows(), ["ece"]), "no rows for metrics")])
def test_figures_say_what_is_missing(draw, message):
    with pytest.raises(ValueError, match=message): draw()
