"Labels saved, colour, ranks and verdicts: against answers that were made, worked by hand, or given by other libraries."
import json
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LinearRegression
from sklearn.metrics import roc_auc_score

matplotlib.use("agg")
from sdmae.evaluate import card as cd
from sdmae.evaluate import comparison as cm
from sdmae.evaluate import exchange as ex
from sdmae.evaluate.results import Task
from sdmae.evaluate.statistics import LabelScores, draw_weights, scores
from sdmae.models.histogram import HistogramEncoder
from sdmae.report import comparison as cp
from sdmae.report import tables as tb
from sdmae.report import verdict as vd
from sdmae.report import worth as wt
from sdmae.report.names import Names
from test_report import assert_readable

NAMES = Names({"random": dict(name="Random init", baseline=True), "histogram": dict(name="Colour histogram", baseline=True),
               "supervised": dict(name="Supervised", baseline=True), "mae": dict(name="MAE"), "sdmae": dict(name="SD-MAE")})
VIT, CNN = dict(arch="vit", depth=4), dict(arch="resnet18")


# labels saved

@pytest.mark.parametrize("seed", range(20))
def test_the_monotone_curve_is_isotonic_regression(seed):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(rng.integers(2, 8), 5)).round(1) # rounded: ties
    assert ex.monotone(y) == pytest.approx(np.stack([IsotonicRegression().fit_transform(np.arange(len(c)), c) for c in y.T], axis=1))


def test_a_reference_is_worth_nothing_against_itself():
    rng, n = np.random.default_rng(0), [10, 40, 100, 1000]
    curve = {k: np.sort(rng.random(4))[i] + .01*rng.normal(size=30) for i, k in enumerate(n)}
    rising = {k: v for k, v in zip(n, np.sort(np.stack(list(curve.values())), axis=0))}
    for k in n:
        found = ex.exchange(rising[k], k, rising)
        assert found["needed"] == pytest.approx(k) and found["low"] == pytest.approx(k) == pytest.approx(found["high"]), "the same draws on both sides"


@pytest.mark.parametrize("score, needed", [(.5, 10), (.55, 10**1.5), (.6, 100), (.7, 1000), (.7001, np.inf), (.4999, -np.inf), (np.nan, np.nan)])
def test_labels_are_read_between_points_and_never_beyond(score, needed):
    found = ex.labels_needed([10, 100, 1000], [[.5], [.6], [.7]], [score])[0]
    assert found == pytest.approx(needed, nan_ok=True)


@pytest.mark.parametrize("n", [[10], [10, 10], [100, 10]])
def test_a_curve_needs_rising_numbers_of_labels(n):
    with pytest.raises(ValueError, match="two rising numbers of labels"): ex.labels_needed(n, np.zeros((len(n), 1)), [0.])


def test_an_open_interval_is_not_closed_by_a_made_up_number():
    assert ex.bounds(np.r_[np.full(50, 5.), np.full(50, np.inf)]) == (5., np.inf) and ex.bounds(np.r_[np.full(5, -np.inf), np.full(95, 5.)]) == (-np.inf, 5.)
    assert np.isnan(ex.bounds(np.full(3, np.nan))).all()


def test_the_interval_covers_the_truth():
    "Test tiles alone: 300 made studies, a curve from 10 to 10,000 labels, an encoder as good as 200 labels; nominal 95 %."
    rng, n, inside = np.random.default_rng(0), 400, 0
    law = lambda k: .4 + .1*np.log10(k)
    for trial in range(300):
        w = rng.multinomial(n, np.full(n, 1/n), 300).T
        ease = rng.random(n) # a tile that is easy for one is easy for all
        def drawn(p): right = ease < p + rng.normal(0, .05, n); return np.r_[right.mean(), right @ w / n]
        found = ex.exchange(drawn(law(200)), 50, {k: drawn(law(k)) for k in (10, 100, 1000, 10_000)})
        inside += found["low"] <= 200 <= found["high"]
    assert .90 <= inside/300 <= .99


def test_seeds_widen_the_interval_and_are_shared():
    rng = np.random.default_rng(0)
    tiles = rng.normal(0, .001, 401)
    runs = lambda level, effect: {(s, k): level + effect[s] + tiles for s in range(5) for k in range(2)}
    effect = rng.normal(0, .05, 5)
    luck = ex.Luck(list(range(5)))
    a, b = luck.mean(runs(.6, effect)), luck.mean(runs(.6, effect))
    assert np.array_equal(a, b), "what both share cancels"
    other = luck.mean(runs(.6, rng.normal(0, .05, 5)))
    assert a[1:].std() > .015 and (a - other)[1:].std() > .015 and np.std(ex.Luck([0]).mean(runs(.6, effect))[1:]) < .002
    assert a[0] == pytest.approx(np.mean([r[0] for r in runs(.6, effect).values()]))


def test_subsets_of_the_labels_are_drawn_too():
    runs = {(0, k): np.full(2001, float(k)) for k in range(4)}
    drawn = ex.Luck([0]).mean(runs)
    assert drawn[0] == 1.5 and drawn[1:].std() == pytest.approx(np.sqrt(5/4)/2, rel=.1), "the mean of four, drawn with replacement"
    many = ex.Luck([0]).mean({(0, k): np.full(5, float(k)) for k in range(100)})
    assert len(many) == 5


@pytest.mark.parametrize("row, text", [(dict(n=50, needed=200., low=110., high=np.inf), "+150 [+60, more than +950]"),
    (dict(n=10, needed=-np.inf, low=-np.inf, high=90.), "nothing [nothing, +80]"), (dict(n=50, needed=20., low=-np.inf, high=40.), "-30 [less than -40, -10]"),
    (dict(n=1000, needed=np.inf, low=1000., high=np.inf), "more than all labels [+0, more than all labels]"), (dict(n=50, needed=np.nan, low=np.nan, high=np.nan), "unknown [unknown, unknown]")])
def test_open_ends_are_said(row, text): assert ex.worth_text(row | dict(n_min=10, n_max=1000)) == text


# colour

def made_tiles(n, seed=0, classes=2, grey=False):
    "Tiles with three stains, and answers that know nothing of them."
    rng = np.random.default_rng(seed)
    y, stain = rng.integers(0, classes, n), rng.integers(0, 3, n)
    x = np.array([[200, 120, 160], [170, 90, 170], [220, 150, 190]])[stain][:, :, None, None] + rng.normal(0, 12, (n, 3, 6, 6)) + rng.normal(0, 10, (n, 1, 1, 1))
    return SimpleNamespace(batch=lambda i: torch.from_numpy(x[i, :1 if grey else 3].clip(1, 255).astype(np.uint8))), y, stain


@pytest.fixture(scope="module")
def tissue():
    store, y, stain = made_tiles(1500)
    colour = cd.colour_numbers(store, np.arange(1500))
    return SimpleNamespace(store=store, y=y, stain=stain, colour=colour, train=slice(0, 1000), test=slice(1000, 1500))


def card(o, x, y, draws=99, groups=None, colour=None, n_classes=None):
    by = lambda v: dict(train=v[o.train], test=v[o.test])
    return cd.features_card(by(x), by(y), by(o.colour if colour is None else colour), n_classes or int(y.max()) + 1, groups or dict(train=None, test=None), draws)


def test_features_that_are_colour_fall_to_chance(tissue):
    o, rng = tissue, np.random.default_rng(1)
    own = HistogramEncoder(6).pooled(o.store.batch(np.arange(1500)).float()/255).numpy()
    for x in (cd.statistics_of(o.colour) @ rng.normal(size=(6, 20)), own):
        found = card(o, x, o.stain)
        assert found["word"] == "mostly colour" and found["score"] > .9 and found["colour_r2"] > .75 and found["p"] == .01
        assert abs(found["without_colour"] - 1/3) < .08 and abs(found["kept"]) < .12


def test_features_that_know_no_colour_lose_nothing(tissue):
    o, rng = tissue, np.random.default_rng(2)
    x = np.c_[(o.y - .5)[:, None] + rng.normal(0, .3, (1500, 1)), rng.normal(size=(1500, 15))]
    found = card(o, x, o.y)
    assert found["word"] == "more than colour" and found["kept"] > .95 and found["colour_r2"] < .02 and abs(found["colour_alone"] - .5) < .08
    mixed = card(o, np.c_[x, 50*cd.statistics_of(o.colour)], o.y)
    assert mixed["colour_r2"] > .9 and mixed["kept"] > .9, "readable colour beside structure is no fault"


def test_permuted_labels_are_chance(tissue):
    o, rng = tissue, np.random.default_rng(3)
    p = [card(o, rng.normal(size=(1500, 5)), rng.permutation(o.y), draws=39)["p"] for _ in range(30)]
    assert stats.kstest(p, "uniform").pvalue > .01 and .35 < np.mean(p) < .65
    ruled = np.c_[20*(o.y - .5) + rng.normal(size=1500), rng.normal(size=1500)]
    assert card(o, ruled, o.y)["p"] == .01, "one direction rules the features: senseless probes would find it by luck"
    assert card(o, np.ones((1500, 4)), o.y)["word"] == "chance", "features that do not vary"


def test_patients_exchange_labels_as_a_whole():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(24), 20)
    y, x = (patient % 2), rng.normal(size=(24, 6))[patient] + .1*rng.normal(size=(480, 6)) # features know the patient, not the class
    spread = lambda groups: cd.probe_scores(cd.Ridge(x), x, cd.permuted(y, groups, 300, 0), cd.permuted(y, groups, 300, 1), 2).std()
    assert all(len({(p, c) for p, c in zip(patient, t)}) == 24 for t in cd.permuted(y, patient, 5, 0)), "one class a patient"
    assert spread(patient) > 2*spread(None), "24 patients say less than 480 tiles"
    several = cd.permuted(np.eye(2)[y], patient, 3, 0)
    assert all((t[patient == 3] == t[patient == 3][0]).all() and t.sum() == 480 for t in several)


def slide_trial(rng, sizes):
    "Features know the slide, labels its share of the classes: nothing of one tells of the other."
    def split(k):
        slide = np.repeat(np.arange(k), rng.choice(sizes, k))
        y = (rng.random(len(slide)) < rng.beta(.5, .5, k)[slide]).astype(int)
        return rng.normal(size=(k, 6))[slide] + .1*rng.normal(size=(len(slide), 6)), y, slide
    (x, *train), (new, *test) = split(16), split(8)
    asked = [[y, *cd.permuted(y, g, 39, int(rng.integers(1e9)))] for y, g in (train, test)]
    score, *chance = cd.probe_scores(cd.Ridge(x), new, *asked, 2)
    return cd.beside_chance(score, chance)["p"]


@pytest.mark.parametrize("sizes", [[20], [5, 20, 60]])
def test_slides_of_several_classes_pass_for_better_than_chance_in_one_trial_of_twenty(sizes):
    "Tiles permuted one by one gave p <= .05 in every fourth trial of this kind."
    rng = np.random.default_rng(0)
    p = [slide_trial(rng, sizes) for _ in range(200)]
    assert np.mean(np.array(p) <= .05) <= stats.binom.ppf(.99, 200, .05)/200 and stats.kstest(p, "uniform").pvalue > .01


def test_slides_give_all_their_labels_to_another():
    slide, y = np.repeat(list("abcd"), [2, 4, 4, 8]), np.array([0, 1] + [2]*4 + [3, 3, 4, 4] + [5]*8)
    kinds = [{0, 1}, {2}, {3, 4}, {5}]
    for drawn in cd.permuted(y, slide, 30, 0):
        given = [next(k for k in kinds if set(drawn[slide == s]) <= k) for s in "abcd"]
        assert sorted(map(sorted, given)) == sorted(map(sorted, kinds)), "each slide's labels go to one slide"
        if given[3] == {3, 4}: assert np.bincount(drawn[slide == "d"])[3:].tolist() == [4, 4], "repeated in their shares"
    assert all((a == b).all() for a, b in zip(cd.permuted(y, slide, 3, 1), cd.permuted(y, slide, 3, 1)))


@pytest.mark.parametrize("per_split, known", [((1, 1), False), ((2, 2), False), ((3, 2), False), ((3, 4), True)])
def test_few_slides_give_no_p(per_split, known, tissue):
    o, rng = tissue, np.random.default_rng(0)
    slides = dict(train=np.arange(1000) % per_split[0], test=np.arange(500) % per_split[1])
    found = card(o, np.c_[o.y + .1*rng.normal(size=1500), rng.normal(size=1500)], o.y, groups=slides)
    assert (found["word"] == "unknown") == (found["p"] is None) == (found["chance"] is None) == (not found["permuted"]) == (not known)
    assert found["score"] > .95 and (known or found["kept"] is None)
    json.dumps(found, allow_nan=False)


def test_ways_to_deal_labels():
    whole = lambda y, g: round(np.exp(cd.ways(np.array(y), g)))
    assert whole([0, 1, 0, 1, 2, 2, 2], list("aabbccd")) == 6, "two and two alike"
    assert whole(np.eye(2)[[0, 0, 1, 1]], None) == 6 == whole([0, 0, 1, 1], None) and whole([0, 1], list("aa")) == 1
    y = np.random.default_rng(0).integers(0, 2, (50, 3))
    assert np.isfinite(cd.ways(y, np.arange(50)//5)) and np.isnan(cd.answer_score(np.ones((4, 2)), np.ones((4, 2))))


def test_the_ridge_probe_is_least_squares_at_a_small_penalty():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 6)), None
    y = x @ rng.normal(size=(6, 3)) + 1e-4*rng.normal(size=(400, 3)) + 2
    ridge, new = cd.Ridge(x), rng.normal(size=(9, 6))
    assert ridge.predict(new, ridge.fit(y)) == pytest.approx(LinearRegression().fit(x, y).predict(new), abs=1e-3)
    alone = np.concatenate([ridge.fit(y[:, [j]])[0] for j in range(3)], axis=1)
    assert ridge.fit(y)[0] == pytest.approx(alone), "each target has its own penalty, whoever is asked beside it"
    with pytest.raises(ValueError, match="2 training tiles"): cd.Ridge(x[:2])


def test_colour_is_not_learned_from_test_tiles(tissue):
    o, rng = tissue, np.random.default_rng(4)
    x = rng.normal(size=(1500, 4))
    a = cd.without_colour(x[:1000], o.colour[:1000], (x[1000:], o.colour[1000:]))[1]
    b = cd.without_colour(x[:1000], o.colour[:1000], (x[1000:1100], o.colour[1000:1100]))[1]
    assert a[:100] == pytest.approx(b)
    strange = o.colour[1000:].copy(); strange[:, :6] *= 40 # another scanner
    assert np.abs(cd.without_colour(x[:1000], o.colour[:1000], (x[1000:], strange))[1]).max() < 60, "no square explodes"


def test_one_odd_tile_does_not_rule_how_well_colour_is_read(tissue):
    o = tissue
    x = cd.statistics_of(o.colour)[:1000] @ np.random.default_rng(0).normal(size=(6, 6))
    x[7] *= 1e3
    assert cd.readable(x, o.colour[:1000]) > .5
    assert np.isnan(cd.readable(x, np.ones((1000, 51)))) and np.isnan(cd.readable(x, o.colour[:1000], ["a"]*1000)), "nothing varies; one patient"


def test_grey_images_and_several_labels():
    store, _, stain = made_tiles(600, grey=True)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (600, 3)); y[:, 2] = 0 # a label that none bears
    rows = dict(train=np.arange(400), valid=np.arange(400, 450), test=np.arange(450, 600))
    T = SimpleNamespace(store=SimpleNamespace(batch=store.batch, groups=lambda i: i//5), rows=rows, y={s: y[i] for s, i in rows.items()}, classes=list("abc"))
    x = y[:, :2] + rng.normal(0, .5, (600, 2))
    found = cd.colour_card({s: x[i].astype(np.float32) for s, i in rows.items()}, T, draws=19)
    assert (found["metric"], found["of"], found["columns"], found["tiles"], found["word"]) == ("macro_auc", "grey values", 21, 400, "more than colour")
    answers = rng.normal(size=(150, 3)).round(1)
    assert cd.answer_score(y[450:], answers) == pytest.approx(roc_auc_score(y[450:, :2], answers[:, :2]))
    p = (answers - answers.min())/np.ptp(answers)
    assert cd.answer_score(y[450:], answers) == pytest.approx(LabelScores(y[450:], p)(np.ones((150, 1)))["macro_auc"][0])
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("p, p_without, kept, tiles, word", [(.2, .5, 2., 730, "chance"), (.01, .2, .9, 730, "mostly colour"), (.01, .01, .49, 730, "mostly colour"),
    (np.nan, np.nan, np.nan, 730, "unknown"), (np.nan, np.nan, np.nan, 729, "too few tiles"), (.01, .01, .5, 730, "partly colour"), (.01, .01, .8, 730, "more than colour"), (.01, .01, .9, 729, "too few tiles")])
def test_words_follow_the_rule(p, p_without, kept, tiles, word): assert cd.colour_word(p, p_without, kept, tiles, 73) == word


def test_few_tiles_of_large_data_are_the_same_for_every_encoder():
    assert np.array_equal(cd.some_rows(100, 30), cd.some_rows(100, 30)) and len(set(cd.some_rows(100, 30))) == 30 and list(cd.some_rows(5, 30)) == [0, 1, 2, 3, 4]


# ranks

def test_ranks_are_those_of_scipy():
    rng = np.random.default_rng(0)
    s = rng.random((7, 5)).round(1)
    assert cm.mean_ranks(s) == pytest.approx(np.mean([stats.rankdata(-r) for r in s], axis=0))
    assert cm.friedman(s) == pytest.approx(stats.friedmanchisquare(*s.T).pvalue)
    q = stats.studentized_range.ppf(.95, 5, np.inf)/np.sqrt(2)
    assert cm.critical_difference(5, 7) == pytest.approx(q*np.sqrt(5*6/(6*7)))


def test_demsars_example():
    "Four classifiers on 14 data sets (Demšar 2006, section 3.2.4): 1.25 at 0.05, 1.12 at 0.10, where only the first and the second differ."
    assert round(cm.critical_difference(4, 14), 2) == 1.25 and round(cm.critical_difference(4, 14, .9), 2) == 1.12
    ranks = [3.143, 2.000, 2.893, 1.964] # C4.5, with m, with cf, with both
    apart = {(i, j) for i in range(4) for j in range(i) if not any({i, j} <= set(g) for g in cm.rank_groups(ranks, cm.critical_difference(4, 14, .9)))}
    assert apart == {(1, 0), (3, 0)}, "at 0.10 both with m differ from C4.5"
    assert cm.rank_groups(ranks, cm.critical_difference(4, 14)) == [(3, 1, 2, 0)]


@pytest.mark.parametrize("seed", range(10))
def test_groups_hold_all_pairs_that_are_near(seed):
    rng = np.random.default_rng(seed)
    ranks, cd_ = rng.uniform(1, 8, 7), 1.5
    groups = cm.rank_groups(ranks, cd_)
    near = {frozenset((i, j)) for i in range(7) for j in range(i) if abs(ranks[i] - ranks[j]) <= cd_}
    assert near == {frozenset((i, j)) for g in groups for i in g for j in g if i != j}
    assert not any(set(a) < set(b) for a in groups for b in groups)


def test_bad_ranks():
    with pytest.raises(ValueError, match="task 1: every encoder needs a score"): cm.mean_ranks([[1, 2], [np.nan, 2]])
    with pytest.raises(ValueError, match="two encoders at least"): cm.mean_ranks([[1], [2]])
    with pytest.raises(ValueError, match="1 encoders on 3 tasks"): cm.critical_difference(1, 3)
    assert np.isnan(cm.friedman([[1, 2, 3]])) and cm.friedman(np.ones((4, 3))) == 1


def by_task(*tasks, **linear):
    of = dict(seed=0, subset=0, labels="all", metric="macro_auc", low=np.nan, high=np.nan)
    return {t: pd.DataFrame([of | dict(encoder=e, protocol=p, value=v + .001*i) for e, v in linear.items() for p in ("linear", "knn")]) for i, t in enumerate(tasks)}


def test_few_tasks_cannot_decide_and_say_so():
    made = by_task(*"abcd", random=.5, histogram=.6, supervised=.65, mae=.7, sdmae=.8)
    ranks = wt.task_ranks(made, dict.fromkeys(made, "macro_auc"), NAMES.plain)
    assert (ranks.to_numpy() == [5, 4, 3, 2, 1]).all() and list(ranks.columns) == NAMES.plain
    for n in (1, 2): assert "cannot decide" in wt.ranks_text(ranks.iloc[:n], NAMES)
    said = wt.ranks_text(ranks, NAMES)
    assert "SD-MAE 1.0, MAE 2.0" in said and "they differ" in said and "cannot decide" not in said
    partly = made | {"b": made["b"][(made["b"].encoder != "supervised") & ~((made["b"].encoder == "histogram") & (made["b"].protocol == "knn"))]}
    found = wt.task_ranks(partly, dict.fromkeys(made, "macro_auc"), NAMES.plain)
    assert list(found.columns) == ["random", "histogram", "mae", "sdmae"] and found.loc["b"].tolist() == [4, 3, 2, 1], "what all have decides"
    assert "no two encoders" in wt.ranks_text(wt.task_ranks({}, {}, NAMES.plain), NAMES)


# the report

def made_runs(**more):
    of = {"random": ("random", VIT), "histogram": ("histogram", VIT), "supervised": ("supervised", VIT), "mae": ("mae", VIT), "sdmae": ("sdmae", VIT)} | more
    return {(e, 0): dict(of=dict(method=m, model=net), minutes=2.*(m not in ("random", "histogram")), notes=[], last={}) for e, (m, net) in of.items()}


def test_references_have_the_same_network():
    names = Names({e: {} for e in ("random", "random_cnn", "histogram", "mae", "moco", "natural", "supervised", "lone")})
    made = made_runs(random_cnn=("random", CNN), moco=("moco", CNN), natural=("imported", VIT), lone=("dino", dict(arch="resnet50")))
    refs = wt.same_network(made, names)
    assert refs["mae"] == dict(random="random", supervised="supervised") and refs["moco"] == dict(random="random_cnn")
    assert refs["natural"] == refs["histogram"] == refs["lone"] == {} and refs["random"] == dict(supervised="supervised")


def answers(rng, y, right):
    told = np.where(rng.random(len(y)) < right, y, (y + 1) % 3)
    return np.eye(3)[told]*.7 + .1


@pytest.fixture
def study(tmp_path):
    "Fine-tuned MAE is worth four times the labels of scratch; the longer scratch is as good as it. Linear probes are all alike."
    rng, y = np.random.default_rng(0), np.arange(300) % 3
    law = lambda n: .3 + .2*np.log10(n/10)
    for stage, e, factor in [("finetune", e, f) for e, f in (("random", 1), ("mae", 4), ("sdmae", 1))] + [("probe", e, .5) for e in ("random", "histogram", "supervised", "mae")]:
        kinds = {"probe": {"linear": factor}, "finetune": {"finetune": factor} | ({"finetune_long": 4} if e == "random" else {})}[stage]
        for seed in (0, 1):
            out = tmp_path/"tissue"/stage/f"{e}-{seed}"; out.mkdir(parents=True)
            drawn = {(k, l): answers(rng, y, law(n*f)) for k, f in kinds.items() for l, n in {"0.01": 30, "300": 300, "all": 3000}.items()}
            np.savez(out/"predictions.npz", index=np.arange(300), targets=y, **{f"probabilities_{k}_{l}": p for (k, l), p in drawn.items()})
            results = {k: {l: scores(y, p) for (kind, l), p in drawn.items() if kind == k} for k in kinds}
            (out/"scores.json").write_text(json.dumps(dict(protocol=stage, task="tissue", encoder=e, seed=seed, results=results)))
    store = SimpleNamespace(task=lambda t: SimpleNamespace(classes=list("abc"), multi=False), targets=lambda i, t: torch.from_numpy(np.resize(y, len(i))),
                            indices=lambda s, t: np.arange(3000) if s == "train" else np.arange(300), groups=lambda i: None)
    return cp.Compared(tmp_path, "tissue", Task(store, "label"), NAMES, "made up")


def test_the_exchange_rate_of_a_study(study):
    rows = wt.exchange_rows(study, made_runs(), "balanced_accuracy", 200)
    def row(e, protocol, labels, curve): return rows[(rows.encoder == e) & (rows.protocol == protocol) & (rows.labels == labels) & (rows.curve == curve)].iloc[0]
    four = row("mae", "finetune", "0.01", "from scratch")
    assert four.low < 120 < four.high and (four.n, four.n_min, four.n_max, four.seeds, four.minutes) == (30, 30, 3000, 2, 2.)
    same = row("mae", "finetune", "300", "from scratch, longer")
    assert same.low < 300 < same.high
    assert set(rows.encoder) == {"histogram", "mae", "sdmae"}, "references and what has seen every label are not worth labels"
    assert set(rows[rows.encoder == "sdmae"].protocol) == {"finetune"} and not ((rows.protocol == "finetune") & (rows.curve == "random, linear probe")).any()
    table = wt.exchange_table(rows, "balanced_accuracy", NAMES)
    assert len(table) == 3 + 6 + 3 and {"from scratch", "from scratch, longer", "random, linear probe"} <= set(table) and "a PFLOP" not in table
    flops = wt.exchange_table(rows.assign(flops=np.where(rows.encoder == "mae", 2e15, np.nan)), "balanced_accuracy", NAMES)
    assert (flops.loc[flops.encoder != "MAE", "a PFLOP"] == "–").all()
    sure = four.low > 30
    assert (flops[(flops.encoder == "MAE") & (flops["read by"] == "fine-tuned") & (flops.labels == "30")]["a PFLOP"].iloc[0] != "–") == sure
    assert_readable(wt.exchange_figure(rows, "made up", NAMES))
    again = wt.exchange_rows(study, made_runs(), "balanced_accuracy", 200)
    pd.testing.assert_frame_equal(rows, again)


def test_without_a_curve_there_is_no_exchange_rate(study):
    study.predictions.files = {k: v for k, v in study.predictions.files.items() if k[1] == "all"}
    assert wt.exchange_rows(study, made_runs(), "balanced_accuracy", 20).empty
    assert wt.exchange_rows(study, {k: v for k, v in made_runs().items() if k[0] != "random"}, "balanced_accuracy", 20).empty, "no network at random"


def test_cards_are_read_and_broken_ones_named(tmp_path):
    of = dict(metric="balanced_accuracy", of="grey values", score=.7, chance=.3, chance_high=.35, p=.005, colour_alone=.6, without_colour=.4, p_without=.005, kept=.25,
              colour_r2=None, rankme=12., tiles=400, columns=21, word="mostly colour", draws=20, permuted=list(np.linspace(.2, .4, 20)), permuted_without=[.3]*20)
    for e, s, change in (("mae", 0, {}), ("mae", 1, dict(score=.8)), ("random", 0, dict(score=.31))):
        (tmp_path/"tissue"/"probe"/f"{e}-{s}").mkdir(parents=True)
        (tmp_path/"tissue"/"probe"/f"{e}-{s}"/"card.json").write_text(json.dumps(of | change))
    cards = wt.read_cards(tmp_path, "tissue", {("mae", 0): dict(last=dict(structure_r2=.4))}, NAMES, [0, 1])
    means = wt.card_means(cards)
    assert means.word.to_dict() == {"random": "chance", "mae": "mostly grey values"} and means.score["mae"] == pytest.approx(.75) and np.isnan(means.kept["random"])
    other = cards.iloc[:1].assign(encoder="x", score=.7, seed=0)
    other = pd.concat([other, other.assign(seed=1, score=.1, permuted=[[.6]*20])])
    assert wt.card_means(other).p["x"] == pytest.approx((1 + sum(np.linspace(.2, .4, 20) + .6 >= .8))/21), "the mean score beside the mean of each permutation, no mean of p"
    none = wt.card_means(cards.assign(permuted=[[]]*3, permuted_without=[[]]*3))
    assert set(none.word) == {"unknown"} and none[["p", "chance", "kept"]].isna().all(axis=None) and list(wt.card_table(cards.assign(permuted=[[]]*3), NAMES)["in words"]) == ["unknown"]*2
    table = wt.card_table(cards, NAMES)
    assert list(table["gain kept"]) == ["–", "22 %"] and "grey values read, R²" not in table and list(table["structure R²"]) == ["–", "0.40"]
    assert_readable(wt.card_figure(cards.assign(colour_r2=.5), "made up", NAMES))
    assert wt.read_cards(tmp_path, "other", {}, NAMES, [0]).empty
    for text in ("{", "[]", "{}"):
        (tmp_path/"tissue"/"probe"/"mae-0"/"card.json").write_text(text)
        with pytest.raises(ValueError, match="mae-0/card.json: no card.*run `dvc repro` again"): wt.read_cards(tmp_path, "tissue", {}, NAMES, [0])


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_the_diagram_of_ranks_can_be_read(n):
    rng = np.random.default_rng(n)
    ranks = pd.DataFrame([rng.permutation(n) + 1 for _ in range(6)], columns=[f"encoder {i}" for i in range(n)])
    assert_readable(wt.ranks_figure(ranks, "made up"))
    assert_readable(wt.ranks_figure(ranks.iloc[:2], "made up"))


# the verdict in words

ROW = dict(labels="all", metric="macro_auc", task="tissue", difference=.05, low=.02, high=.08, low_seeds=.01, high_seeds=.09, seeds=3, smallest=.04, verdict="ahead")
LEVEL = dict(verdict="level", difference=.004, low=-.02, high=.03, low_seeds=-.02, high_seeds=.03)
BEHIND = dict(verdict="behind", difference=-.05, low=-.08, high=-.02, low_seeds=-.09, high_seeds=-.01)
ONE = dict(verdict="one seed", seeds=1, low_seeds=np.nan, high_seeds=np.nan, smallest=np.nan)
REFS = (("random", "linear"), ("histogram", "linear"), ("random", "finetune"), ("random_long", "finetune"))


def asked(*changes, pair=None, **more):
    "MAE against its four references, each changed as given."
    judged = [ROW | dict(a="mae", b=b, protocol=p) | change for (b, p), change in zip(REFS, changes)]
    judged += [ROW | dict(a="sdmae", b="mae", protocol="linear") | pair] if pair else []
    of = dict(seed=0, subset=0, protocol="linear", labels="all", metric="macro_auc", low=np.nan, high=np.nan)
    rows = pd.DataFrame([of | dict(encoder=e, value=v) for e, v in (("random", .6), ("histogram", .62), ("mae", .7), ("sdmae", .69))])
    return vd.TaskVerdict("tissue", "CRC", "macro_auc", rows, pd.DataFrame(judged), {"mae": dict(random="random")}, "histogram", pairs=(("sdmae", "mae"),), **more)


@pytest.mark.parametrize("changes, head", [
    ([{}]*4, "**MAE is ahead of the same network at random, Colour histogram, training from scratch and training from scratch, longer.**"),
    ([LEVEL, BEHIND, {}, LEVEL], "**No gain shown: MAE is behind Colour histogram, not distinguishable from the same network at random and training from scratch, longer and ahead of training from scratch.**"),
    ([BEHIND]*4, "**No gain shown: MAE is behind the same network at random, Colour histogram, training from scratch and training from scratch, longer.**"),
    ([{}, LEVEL], "**MAE is not distinguishable from Colour histogram and ahead of the same network at random.**"),
    ([ONE, ONE | LEVEL | ONE], "**MAE is not distinguishable from Colour histogram and higher than the same network at random, on these test tiles and with one seed, which decides nothing.**"),
    ([ONE | BEHIND | ONE]*2, "**No gain shown: MAE is lower than the same network at random and Colour histogram, on these test tiles and with one seed, which decides nothing.**")])
def test_headlines(changes, head): assert vd.task_lines(asked(*changes), NAMES)[0].startswith(head)


def test_weights_from_elsewhere_and_labels_have_to_be_beaten_too():
    names = Names({e: n if isinstance(n, dict) else {} for e, n in (("random", dict(baseline=True)), ("random_cnn", dict(baseline=True)), ("histogram", dict(baseline=True)),
                   ("supervised", dict(baseline=True)), ("supervised_cnn", dict(baseline=True)), ("natural", dict(name="Natural", baseline=True)), ("mae", {}))})
    v = asked({}, {})
    v.refs = {"mae": dict(random="random", supervised="supervised"), "moco": dict(random="random_cnn", supervised="supervised_cnn")}
    assert list(vd.references_of(v, "mae", names).values()) == [("random", "linear"), ("histogram", "linear"), ("random", "finetune"), ("random_long", "finetune"),
                                                                ("supervised", "linear"), ("natural", "linear")]
    v.judged = pd.concat([v.judged.assign(**LEVEL), pd.DataFrame([ROW | dict(a="mae", b="natural", protocol="linear")])])
    assert vd.task_lines(v, names)[0].startswith("**No gain shown: mae is not distinguishable from the same network at random and histogram and ahead of Natural.**"), "a gain over others is none over no training"


def test_a_level_pair_says_what_the_design_could_have_seen():
    lines = vd.task_lines(asked({}, LEVEL, pair=LEVEL), NAMES)
    assert lines[-1] == ("- SD-MAE is not distinguishable from MAE (linear probe, all labels): macro AUC +0.004, 95 % over test tiles [-0.020, +0.030], over 3 seeds "
                         "[-0.020, +0.030]; this design mostly misses differences below 0.040.")
    assert "so few seeds could see nothing" in vd.task_lines(asked({}, LEVEL | dict(smallest=8.)), NAMES)[2]
    assert "Linear probes: MAE 0.700, SD-MAE 0.690 (macro AUC); of this order nothing is known" in lines[0]


def test_a_pair_may_stand_the_other_way():
    v = asked({}, pair=BEHIND)
    turned, straight = vd.pair_row(v, "mae", "sdmae", "linear"), vd.pair_row(v, "sdmae", "mae", "linear")
    assert (turned["verdict"], straight["verdict"]) == ("ahead", "behind")
    assert [turned[k] for k in ("difference", "low", "high", "low_seeds", "high_seeds")] == [.05, .02, .08, .01, .09]
    assert vd.pair_row(v, "mae", "nothing", "linear") is None


def test_validation_names_the_method_of_the_headline():
    "MAE scores higher on test; a page has one winner."
    from sdmae.report.best import BY_PROBE, best_of
    v = asked({}, pair=BEHIND)
    said = vd.task_lines(v, NAMES)[0]
    assert vd.leader(v, NAMES) == "mae" and "MAE is the first of the comparison: no validation score is there to choose by." in said
    v.scores = v.scores.assign(value=[.6, .62, .6, .9])
    assert vd.leader(v, NAMES) == "mae", "the order of the comparison, not of test scores"
    v.scores, v.valid = asked().scores, {("random", 0): .99, ("mae", 0): .8, ("sdmae", 0): .7, ("sdmae", 1): .95}
    assert vd.leader(v, NAMES) == "sdmae" == best_of(v.valid, BY_PROBE, NAMES, "runs/x")["pretrained"]["encoder"], "the mean over seeds"
    assert vd.task_lines(v, NAMES)[0].startswith("**SD-MAE was compared with nothing.** Validation chose SD-MAE (0.825), test scores did not. Linear probes: MAE 0.700")
    v.scores = v.scores[v.scores.encoder == "mae"]
    assert vd.leader(v, NAMES) == "mae" and vd.chosen_sentence(v, NAMES) == "", "one method: nothing was chosen"


def test_most_labels_speak():
    v = asked({}); few = v.judged.assign(labels="100", verdict="behind")
    v.judged = pd.concat([few, v.judged])
    assert vd.pair_row(v, "mae", "random", "linear")["verdict"] == "ahead"


def test_what_is_absent_is_not_spoken_of():
    v = asked({})
    v.judged, v.refs, v.floor = v.judged.iloc[:0], {}, ""
    assert vd.task_lines(v, NAMES)[0].startswith("**MAE was compared with nothing.**")
    v.scores = v.scores[v.scores.encoder == "random"]
    assert vd.task_lines(v, NAMES) == ["**No method was probed on tissue: there is no verdict.**"] and vd.stands_of(v, NAMES) == []
    assert "there is no verdict" in vd.verdict_page("Why?", [], NAMES, [], "Next.")


def test_labels_and_colour_are_told_of_the_leader():
    worth = pd.DataFrame([dict(encoder=e, protocol="finetune", curve="from scratch", n=n, needed=4.*n, low=2.*n, high=np.inf, n_min=30, n_max=3000, seeds=1)
                          for e in ("mae", "sdmae") for n in (30, 300)])
    cards = pd.DataFrame(dict(word=["mostly colour"], kept=[.222]), index=["mae"])
    lines = vd.task_lines(asked({}, worth=worth, cards=cards), NAMES)
    assert "- MAE: with 30 labels, fine-tuned, it is worth +90 [+30, more than +2,970] labels of training from scratch (95 % over test tiles, one seed)." in lines
    assert "- MAE: its frozen features are mostly colour: 22 % of their gain over chance is left without it." in lines
    for word, text in (("unknown", "what chance would give"), ("chance", "no better than permuted labels"), ("too few tiles", "too few")): assert text in vd.card_sentence(asked({}, cards=cards.assign(word=word)), "mae")


def test_the_page_puts_doubt_beside_the_claim():
    notes = {"MAE, seed 0": ["structure was not learned: more steps"], "SD-MAE, seed 0": ["structure was not learned: more steps", "the teacher has collapsed: x"]}
    warnings = vd.warnings_about(True, 1, {"tissue": 99, "big": 100}, {"tissue": False, "big": True}, notes)
    assert warnings[-2:] == ["structure was not learned: MAE, seed 0; SD-MAE, seed 0", "the teacher has collapsed: SD-MAE, seed 0"]
    assert [w for w in warnings if "only 99 test tiles" in w] and not [w for w in warnings if "big" in w] and "synthetic" in warnings[0] and "one seed" in warnings[1]
    page = vd.verdict_page("Which?", [asked(ONE)], NAMES, warnings, "Next: `x`.")
    assert page.startswith("Asked: Which?\n\n**On CRC.** **MAE is higher") and page.count("**Warning**") == len(warnings) and page.endswith("Next: `x`.")
    assert page == vd.verdict_page("Which?", [asked(ONE)], NAMES, warnings, "Next: `x`."), "the same tables, the same words"
    assert vd.warnings_about(False, 3, {"tissue": 100}, {"tissue": True}, {"MAE, seed 0": []}) == []


def test_the_next_step_composes():
    "What it tells to run is a set of parameters that can be had."
    from sdmae.params import Params, compose
    import re, shlex
    facts = dict(study="tissue", synthetic=False, seeds=3, notes=False, stands=["ahead"], adapter="nct", recipe="tissue", held="epochs", amount=40)
    for change in (dict(notes=True), dict(synthetic=True), dict(synthetic=True, study="lesions", adapter="cbis"), dict(seeds=1), dict(stands=["level"]), dict(stands=[vd.NOT, "ahead"]), {}):
        command = re.search(r"`([^`]+)`", vd.next_step(**(facts | change)))[1]
        options = [o for o in shlex.split(command)[3:] if o not in ("-S", "…")]
        assert options and Params.model_validate(compose(options)), command


def test_tables_say_not_distinguishable():
    rows = pd.DataFrame([ROW | LEVEL | dict(pair="a − b", a="a", b="b", protocol="linear", p_tiles=.5, p_seeds=.5, p_total=.5, sd=.01, runs=3, **{"same sign": 2})])
    judged = tb.with_verdicts(rows)
    assert list(judged.verdict) == ["level"] and list(tb.paired_text(rows).verdict) == ["not distinguishable (p 0.500)"]
    refs = {"a": dict(random="b")}
    assert wt.delta_table(judged, refs, Names({"a": dict(name="A")})).iloc[0].to_dict() == {"task": "tissue", "encoder": "A", "labels": "all", "protocol": "linear probe",
        "to random": "+0.004 [-0.020, +0.030], not distinguishable", "to supervised": "–"}
    assert wt.delta_table(judged, {}, NAMES).empty


def test_draws_are_those_of_the_tables(study):
    "One score of a run on the draws of the bootstrap, by hand."
    found = wt.run_draws(study, {"mae"}, "accuracy", 50)
    p, y = study.predictions.runs("finetune", "300", "mae")[1, 0], study.predictions.targets
    w = np.concatenate(list(draw_weights(300, 50, None, 0)), axis=1)
    by_hand = (w * (p.argmax(1) == y)[:, None]).sum(0)/w.sum(0)
    assert found["finetune", "300", "mae"][1, 0] == pytest.approx(np.r_[(p.argmax(1) == y).mean(), by_hand])
