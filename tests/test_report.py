"Tables against hand-made numbers, figures by what is drawn in them."
import json
import re
import subprocess
from itertools import combinations

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sklearn.isotonic import IsotonicRegression

matplotlib.use("agg")
from sdmae.evaluate.statistics import METRICS, paired_bootstrap, scores
from sdmae.report import figures as fg
from sdmae.report import tables as tb

VALUES = dict(accuracy=.9, balanced_accuracy=.8, macro_auc=.95, macro_f1=.7, ece=.05)


def write_metrics(root, name, **change):
    (root/"metrics").mkdir(exist_ok=True, parents=True)
    entry = VALUES | {"intervals": {k: [v-.01, v+.02] for k, v in VALUES.items()}} | change
    protocols = ("finetune",) if name.startswith("finetune") else ("knn","linear")
    (root/"metrics"/f"{name}.json").write_text(json.dumps({p: {"all": entry, "100": entry} for p in protocols}))


def write_predictions(root, encoder, p, t, index=None, stage="probe", key="linear_all"):
    folder = root/"evals"/stage/encoder; folder.mkdir(parents=True)
    np.savez(folder/"predictions.npz", index=np.arange(len(t)) if index is None else index, targets=t, **{f"probabilities_{key}": p})


def toy(skill, n=200, c=3, seed=0):
    rng = np.random.default_rng(seed)
    t = rng.integers(0, c, n)
    p = np.exp(rng.normal(size=(n, c)) + skill*np.eye(c)[t])
    return t, p/p.sum(1, keepdims=True)


# tables

def test_collect_reads_our_files_only_and_in_order(tmp_path):
    for name in ("probe-sdmae-0","probe-mae-10","probe-mae-9","finetune-mae-9","probe-random-0"): write_metrics(tmp_path, name, k=20)
    (tmp_path/"metrics"/"prepare.json").write_text("{}")
    (tmp_path/"metrics"/"pretrain-mae-0.json").write_text('{"loss": 1}')
    df = tb.collect(tmp_path)
    assert len(df) == (4*2 + 1)*2*5
    assert list(dict.fromkeys(df.labels)) == ["100","all"]
    assert list(dict.fromkeys(df.encoder)) == ["random","mae","sdmae"]
    assert list(df[(df.encoder == "mae") & (df.protocol == "knn") & (df.labels == "all") & (df.metric == "ece")].seed) == [9, 10]
    row = df[df.metric == "macro_auc"].iloc[0]
    assert (row.value, row.low, row.high) == pytest.approx((.95, .94, .97))


def test_leftovers_of_other_runs_are_left_out(tmp_path):
    for name in ("probe-histogram-0","probe-histogram-1","probe-supervised-1","probe-supervised-2","probe-mae-1","probe-mae-2","probe-moco-1","finetune-random-1"): write_metrics(tmp_path, name)
    df = tb.collect(tmp_path, methods=["random","mae"], seeds=[1])
    assert set(zip(df.encoder, df.seed)) == {("histogram",1),("supervised",1),("mae",1)}
    assert set(df[df.encoder == "supervised"].protocol) == {"linear","knn","finetune"} # from scratch: random, fine-tuned
    with pytest.raises(FileNotFoundError, match="no scores"): tb.collect(tmp_path/"x", ["mae"], [1])
    t, p = toy(1.)
    write_predictions(tmp_path, "random-1", p, t, stage="finetune", key="finetune_all")
    write_predictions(tmp_path, "mae-7", p, t, index=np.arange(200)+1) # other tiles, but of another run
    assert set(tb.read_predictions(tmp_path, ["random","mae"], [1]).probabilities) == {("finetune","all","supervised",1)}


def test_two_files_for_the_same_are_refused(tmp_path):
    for name in ("finetune-random-0","finetune-supervised-0"): write_metrics(tmp_path, name)
    with pytest.raises(ValueError, match="two files score \\('supervised', 0, 'finetune'\\)"): tb.collect(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"knn": {"all": {"accuracy": 0.5}}}', '{"knn": 3}'])
def test_collect_names_a_broken_file(tmp_path, text):
    (tmp_path/"metrics").mkdir()
    (tmp_path/"metrics"/"probe-mae-0.json").write_text(text)
    with pytest.raises(ValueError, match="probe-mae-0.json"): tb.collect(tmp_path)


def test_nothing_there_says_what_to_run(tmp_path):
    for f in (tb.collect, tb.read_predictions, fg.read_curves):
        with pytest.raises(FileNotFoundError, match="dvc repro"): f(tmp_path)


def test_results_table_shows_interval_or_spread(tmp_path):
    write_metrics(tmp_path, "probe-mae-0", macro_auc=.912, intervals={"macro_auc": [.894,.929]})
    write_metrics(tmp_path, "probe-sdmae-0", macro_auc=.90)
    write_metrics(tmp_path, "probe-sdmae-1", macro_auc=.94)
    table = tb.results_table(tb.collect(tmp_path))
    assert table.loc[("all","MAE"), "kNN, macro AUC"] == "0.912 [0.894, 0.929]"
    assert table.loc[("all","MAE"), "kNN, balanced accuracy"] == "0.800"
    assert table.loc[("100","SD-MAE"), "linear probe, macro AUC"] == "0.920 ± 0.028"
    assert list(table.columns)[:2] == ["linear probe, balanced accuracy", "linear probe, macro AUC"]


@pytest.mark.parametrize("metric, best", [("accuracy","SD-MAE"), ("ece","MAE")])
def test_best_is_bold_and_small_errors_are_best(tmp_path, metric, best):
    write_metrics(tmp_path, "probe-mae-0", **{metric: .3})
    write_metrics(tmp_path, "probe-sdmae-0", **{metric: .6})
    table = tb.results_table(tb.collect(tmp_path), [metric], ["knn"], bold=True)
    bold = table[table.iloc[:,0].str.startswith("**")]
    assert set(bold.index.get_level_values("encoder")) == {best} and len(bold) == 2
    assert "**" not in tb.results_table(tb.collect(tmp_path), [metric]).to_string()


def test_markdown_is_a_table_whatever_the_cells_hold():
    text = tb.to_markdown(pd.DataFrame({"a|b": ["x|y", 1.5]}))
    assert text.splitlines() == ["| a\\|b |", "| --- |", "| x\\|y |", "| 1.5 |"]


def test_paired_table_is_the_paired_bootstrap(tmp_path):
    t, a = toy(2.); b, c = toy(1.)[1], toy(1.)[1]
    for name, p in (("sdmae-0",a),("mae-0",b),("mae-1",c)): write_predictions(tmp_path, name, p, t)
    found = tb.read_predictions(tmp_path)
    table = tb.paired_table(found, n=50, seed=4).set_index("metric")
    want = paired_bootstrap(t, [a], [b, c], n=50, seed=4)
    for m in METRICS:
        assert tuple(table.loc[m, ["difference","low","high"]]) == pytest.approx(want[m])
        assert table.loc[m, "excludes 0"] == ("yes" if want[m][1] > 0 or want[m][2] < 0 else "no")
    assert table.loc["accuracy","excludes 0"] == "yes"
    same = tb.paired_table(found, "mae", "mae", n=20)
    assert set(same["excludes 0"]) == {"no"} and same.attrs["title"] == "MAE − MAE"
    grouped = tb.paired_table(found, groups=np.arange(200)//40, n=50, seed=4).set_index("metric")
    assert tuple(grouped.loc["accuracy", ["low","high"]]) != tuple(table.loc["accuracy", ["low","high"]])
    with pytest.raises(ValueError, match="supervised and mae share no protocol.*sdmae"): tb.paired_table(found, "supervised")


def test_predictions_of_other_tiles_are_refused(tmp_path):
    t, p = toy(1.)
    write_predictions(tmp_path, "mae-0", p, t)
    write_predictions(tmp_path, "sdmae-0", p, t, index=np.arange(200)+1)
    with pytest.raises(ValueError, match="sdmae-0.*other tiles than.*mae-0"): tb.read_predictions(tmp_path)


def test_fewer_labels_and_protocols_are_kept_apart(tmp_path):
    t, p = toy(1.)
    write_predictions(tmp_path, "my-net-3", p, t, key="knn_100")
    write_predictions(tmp_path, "mae-0", p, t, stage="finetune", key="finetune_all")
    found = tb.read_predictions(tmp_path)
    assert set(found.probabilities) == {("knn","100","my-net",3), ("finetune","all","mae",0)}
    assert found.seeds("knn", 100, "my-net")[0] == pytest.approx(p) and found.seeds("linear", "all", "mae") == []


MANIFEST = dict(name="two stains", synthetic=True, classes=["a","b"], image_size=64, counts={"train": {"a": 1200, "b": 34}, "test": {"a": 5, "b": 0}})


def test_provenance_knows_a_changed_commit(tmp_path):
    def git(*a): subprocess.run(["git","-C",str(tmp_path),"-c","user.name=n","-c","user.email=e@x",*a], check=True, capture_output=True)
    assert tb.git_state(tmp_path) == "no git commit"
    git("init"); (tmp_path/"params.yaml").write_text("a: 1"); (tmp_path/"dvc.lock").write_text("1"); (tmp_path/"README.md").write_text("x")
    git("add","."); git("commit","-m","m")
    assert re.fullmatch("[0-9a-f]{12}", tb.git_state(tmp_path))
    for name in ("dvc.lock","README.md"): (tmp_path/name).write_text("2")
    assert re.fullmatch("[0-9a-f]{12}", tb.git_state(tmp_path))
    (tmp_path/"params.yaml").write_text("a: 2"); (tmp_path/"sdmae").mkdir(); (tmp_path/"sdmae"/"new.py").write_text("")
    assert re.fullmatch("[0-9a-f]{12}, with 2 changed or new: params.yaml, sdmae/", tb.git_state(tmp_path))


def test_provenance_says_what_made_the_numbers(tmp_path):
    facts = tb.provenance(MANIFEST, {"pre-training": "40 epochs"}, [0, 1], tmp_path, "cpu", groups=np.array(["s1","s1","s2"]))
    assert facts["data"] == "two stains (synthetic sample)" and facts["synthetic"].startswith("yes")
    assert facts["train"] == "1,234 tiles in 2 classes" and facts["test"] == "5 tiles in 1 classes"
    assert facts["seeds"] == "2 (0, 1)" and "2 patients or slides" in facts["intervals"] and facts["pre-training"] == "40 epochs"
    assert f"torch {torch.__version__.split('+')[0]}" in facts["versions"] and "CPU" in facts["device"]
    real = tb.provenance(MANIFEST | {"synthetic": False}, {}, [0], tmp_path, "cpu")
    assert real["data"] == "two stains" and real["synthetic"] == "no"


def test_written_tables_all_name_the_data(tmp_path):
    write_metrics(tmp_path, "probe-mae-0"); write_metrics(tmp_path, "probe-sdmae-0")
    t, p = toy(1.)
    for e in ("mae-0","sdmae-0"): write_predictions(tmp_path, e, p, t)
    facts = tb.provenance(MANIFEST, {}, [0], tmp_path, "cpu")
    paths = tb.write_tables(tb.collect(tmp_path), tmp_path/"out", facts["data"], tb.paired_table(tb.read_predictions(tmp_path), n=20), facts)
    assert sorted(p.name for p in paths) == sorted(p.name for p in (tmp_path/"out").iterdir()) and len(paths) == 5
    for path in paths: assert "synthetic sample" in path.read_text()
    page = (tmp_path/"out"/"results.md").read_text()
    assert all("synthetic sample" in l for l in page.splitlines() if l.startswith("#") and "What made" not in l)
    assert "SD-MAE − MAE" in page
    for line in pd.read_csv(paths[1]).data: assert line == facts["data"]


# figures

def rows(labels=("100","all"), seeds=(0,), metric="balanced_accuracy", encoders=None):
    rng, out = np.random.default_rng(0), []
    skill = encoders or {"random": .5, "histogram": .57, "supervised": .7, "mae": .76, "sdmae": .79}
    for l in labels:
        for p in tb.PROTOCOLS:
            for e, v in skill.items():
                if (e, p) == ("histogram","finetune"): continue
                for s in seeds:
                    x = v + .1*(l == "all") + .01*rng.normal()
                    out.append(dict(encoder=e, seed=s, protocol=p, labels=l, metric=metric, value=x, low=x-.02, high=x+.02))
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
    "overview": lambda: fg.overview(rows(), NAME, 9),
    "overview, one panel, seeds": lambda: fg.overview(rows(("all",), (0,1,2)), NAME, 9),
    "overview, histogram near chance": lambda: fg.overview(rows(("100","1000","all"), metric="macro_auc", encoders={"histogram": .51, "mae": .9, "moco": .8}), NAME, 2, "macro_auc"),
    "label_curve": lambda: fg.label_curve(rows(("100","1000","all")), NAME, 8000),
    "label_curve, crowded": lambda: fg.label_curve(rows(("100","1000","all")), NAME, 1088),
    "label_curve, one number": lambda: fg.label_curve(rows(("all",)), NAME, 8000),
    "learning_curves": lambda: fg.learning_curves(curves(), NAME),
    "learning_curves, all ends alike": lambda: fg.learning_curves(curves(("mae","sdmae","supervised","moco"), ("loss",)).assign(value=lambda d: 1 + .001*d.value), NAME),
    "learning_curves, four panels": lambda: fg.learning_curves(curves(metrics=("train/loss","train/mse","lr","images_per_s")), NAME),
    "confusion, 9": lambda: fg.confusion_matrices({e: 30*np.eye(9) + 2 for e in fg.STYLES}, ["ADI","BACK","DEB","LYM","MUC","MUS","NORM","STR","TUM"], NAME),
    "confusion, 2": lambda: fg.confusion_matrices({e: np.array([[8,2],[1,0]]) for e in ("mae","sdmae")}, ["normal","tumor"], NAME),
    "tsne": lambda: fg.tsne(np.random.default_rng(0).normal(size=(40,5)), list("abcdefghij")*4, ["NCT-CRC-HE-100K","CRC-VAL-HE-7K"]*20, NAME, "sdmae"),
    "reconstruction": lambda: fg.reconstruction_grid(*[np.random.default_rng(0).random((5,3,16,16))]*3, NAME),
    "attention": lambda: fg.attention_grid(torch.rand(5,3,16,16), {"mae": torch.rand(5,4,4), "sdmae": torch.rand(5,4,4)}, NAME)}


@pytest.mark.parametrize("name", DRAWN)
def test_figures_are_readable_and_name_the_data(name):
    fig = DRAWN[name]()
    assert NAME in fig.get_suptitle().replace("\n", " ")
    assert_readable(fig)


def test_an_encoder_has_one_colour_everywhere():
    wanted = {matplotlib.colors.to_hex(c) for c, _ in fg.STYLES.values()}
    assert len(wanted) == len(fg.STYLES)
    story, curve = fg.overview(rows(("all",)), "x", 9), fg.label_curve(rows(), "x", 800)
    for fig in (story, curve):
        lines = [l for ax in fig.axes for l in ax.lines if l.get_marker() not in ("", "None", "|")]
        assert {matplotlib.colors.to_hex(l.get_color()) for l in lines} == wanted
    learn = fg.learning_curves(curves(("mae",)), "x")
    assert matplotlib.colors.to_hex(learn.axes[0].lines[0].get_color()) == fg.STYLES["mae"][0].lower()


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
    df = fg.read_curves(tmp_path)
    assert set(df.metric) == {"train/loss","rankme"} and set(df.encoder) == {"my-net"} and set(df.seed) == {2}
    assert list(df[df.metric == "train/loss"].value) == pytest.approx([1, 1/2, 1/3])
    (tmp_path/"mae-0"/"live"/"plots"/"metrics").mkdir(parents=True)
    (tmp_path/"mae-0"/"live"/"plots"/"metrics"/"loss.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(ValueError, match="mae-0.*loss.tsv.*expected step and loss"): fg.read_curves(tmp_path)


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
    with pytest.raises(ValueError, match="6 features, 5 labels"): fg.tsne(np.ones((6,2)), ["a"]*5, [""]*6, "x")


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
    (lambda: fg.reconstruction_grid(np.zeros((2,3,4,4)), np.zeros((1,3,4,4)), np.zeros((2,3,4,4)), "x"), "differ in length"),
    (lambda: tb.results_table(rows(), ["ece"]), "no rows for metrics")])
def test_figures_say_what_is_missing(draw, message):
    with pytest.raises(ValueError, match=message): draw()
