"Features, probes and statistics against independent oracles (numpy, scikit-learn) and on bad input."
import json
import time

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sdmae.evaluate.features import extract
from sdmae.evaluate.knn import fit_knn, folds, held_out_scores, knn_probabilities
from sdmae.evaluate.linear import fit_linear, path_of_fits
from sdmae.evaluate.statistics import (LABEL_METRICS, METRICS, LabelScores, WeightedScores, affordable_draws, as_released, bootstrap,
                                       bootstrap_units, confusion, draw_scores, draw_weights, paired_bootstrap, scores)


def predictions(n, c, skill=1.5, decimals=None, seed=0):
    "Targets and probabilities; few decimals make ties."
    rng = np.random.default_rng(seed)
    t = np.r_[np.arange(c), rng.integers(0, c, n-c)]
    p = np.exp(rng.normal(size=(n, c)) + skill*np.eye(c)[t])
    p /= p.sum(1, keepdims=True)
    if decimals is not None:
        p = np.floor(p*10**decimals)/10**decimals
        p[:, -1] += 1 - p.sum(1)
    return t, p


def ece_by_hand(t, p, bins=15):
    total, top = 0., p.max(1)
    for i in range(bins):
        inside = (top > i/bins) & (top <= (i+1)/bins)
        if inside.any(): total += inside.mean()*abs(top[inside].mean() - (p.argmax(1) == t)[inside].mean())
    return total


def by_sklearn(t, p):
    c, top = p.shape[1], p.argmax(1)
    auc = [sk.roc_auc_score(t == j, p[:,j]) for j in ([1] if c == 2 else range(c)) if 0 < (t == j).sum() < len(t)]
    return {"accuracy": sk.accuracy_score(t, top), "balanced_accuracy": np.mean([(top[t==j] == j).mean() for j in np.unique(t)]),
            "macro_auc": np.mean(auc), "macro_f1": sk.f1_score(t, top, average="macro"), "ece": ece_by_hand(t, p)}


# statistics

@pytest.mark.parametrize("n, c, decimals", [(50,2,None), (400,3,None), (400,2,1), (300,9,1), (2000,9,None)])
def test_scores_are_sklearns(n, c, decimals):
    t, p = predictions(n, c, decimals=decimals)
    got = scores(t, p)
    assert tuple(got) == METRICS
    assert got == pytest.approx(by_sklearn(t, p), abs=1e-6)
    assert (confusion(t, p) == sk.confusion_matrix(t, p.argmax(1), labels=range(c))).all()


def test_binary_auc_is_the_ordinary_one_and_multiclass_is_sklearns():
    t, p = predictions(300, 2)
    assert scores(t, p)["macro_auc"] == pytest.approx(sk.roc_auc_score(t, p[:,1]), abs=1e-9)
    t, p = predictions(300, 4)
    assert scores(t, p)["macro_auc"] == pytest.approx(sk.roc_auc_score(t, p, multi_class="ovr", average="macro"), abs=1e-9)


def test_absent_class_is_left_out():
    t, p = predictions(300, 4)
    keep = t != 2
    assert scores(t[keep], p[keep]) == pytest.approx(by_sklearn(t[keep], p[keep]), abs=1e-6)


@pytest.mark.parametrize("c, grouped", [(2,False), (5,False), (5,True)])
def test_each_draw_is_the_score_of_resampled_tiles(c, grouped):
    t, p = predictions(120, c, decimals=2)
    groups = np.arange(120)//7 if grouped else None
    weighted, seen = WeightedScores(t, p), 0
    for w in draw_weights(120, 20, groups, seed=3):
        got = weighted(w)
        for b in range(w.shape[1]):
            again = np.repeat(np.arange(120), w[:,b].astype(int))
            assert {k: got[k][b] for k in METRICS} == pytest.approx(by_sklearn(t[again], p[again]), abs=1e-6)
            seen += 1
    assert seen == 20


def test_draws_are_those_of_sampling_with_replacement():
    w = np.concatenate(list(draw_weights(500, 400, None, seed=0)), axis=1)
    assert (w.sum(0) == 500).all()
    assert w.mean(1).std() < .07 and abs(w.var() - (1 - 1/500)) < .02
    assert len(np.unique(w, axis=1).T) == 400


def test_groups_come_whole_and_single_tile_groups_are_tiles():
    groups = np.array(list("aabbbcdd"))
    w = np.concatenate(list(draw_weights(8, 50, groups, seed=0)), axis=1)
    for g in "abcd": assert (w[groups == g] == w[groups == g][0]).all()
    assert w.std(1).min() > 0
    t, p = predictions(80, 3)
    assert bootstrap(t, p, n=50) == bootstrap(t, p, groups=np.arange(80), n=50)


def test_interval_covers_the_truth_about_95_times_in_100():
    rng, covered, runs = np.random.default_rng(0), 0, 400
    for i in range(runs):
        right, t = rng.random(200) < .8, rng.integers(0, 2, 200)
        one = np.where(right, t, 1-t)*.6 + .2
        low, high = bootstrap(t, np.stack([1-one, one], 1), n=200, seed=i)["accuracy"]
        covered += low <= .8 <= high
    assert .915 <= covered/runs <= .98


def test_seed_decides_the_draws():
    t, p = predictions(200, 3)
    assert bootstrap(t, p, n=40, seed=1) == bootstrap(t, p, n=40, seed=1) != bootstrap(t, p, n=40, seed=2)


def test_several_seeds_are_averaged_within_each_draw():
    t, a = predictions(150, 3, seed=0)
    b = predictions(150, 3, skill=1., seed=0)[1]
    [both], [one], [two] = (draw_scores(t, [x], None, 30, 0) for x in ([a, b], [a], [b]))
    for k in METRICS: assert np.allclose(both[k], (one[k] + two[k])/2)
    assert bootstrap(t, [a, b], n=30)["ece"] == pytest.approx(tuple(np.quantile(both["ece"][1:], [.025, .975])))


def test_paired_difference():
    t, a = predictions(300, 3, skill=2.)
    b = predictions(300, 3, skill=1.)[1]
    ab, ba = paired_bootstrap(t, a, b, n=100), paired_bootstrap(t, b, a, n=100)
    for k in METRICS:
        assert ab[k][0] == pytest.approx(scores(t, a)[k] - scores(t, b)[k])
        assert ab[k] == pytest.approx((-ba[k][0], -ba[k][2], -ba[k][1]))
    assert ab["macro_auc"][1] > 0
    assert all(v == (0,0,0) for v in paired_bootstrap(t, a, [a], n=20).values())
    width = lambda d: d[-1] - d[-2]
    assert width(paired_bootstrap(t, [a, b], [a], n=100)["accuracy"]) < width(ab["accuracy"])


def test_rare_class_leaves_finite_intervals_that_json_takes():
    t, p = predictions(40, 3)
    t = np.where(t == 2, 1, t); t[0] = 2
    found = bootstrap(t, p, n=100)
    assert np.isfinite(np.array(list(found.values()))).all()
    json.dumps([found, scores(t, p), paired_bootstrap(t, p, p, n=20)], allow_nan=False)


def test_thousand_draws_take_seconds():
    t, p = predictions(10_000, 9)
    start = time.process_time() # of the processor: other tests may run beside this one
    bootstrap(t, p, n=1000)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("t, p, message", [
    ([0,1], [.5,.5], "expected \\(n, C\\)"),
    ([0,1,1], [[.5,.5]]*2, "one target a row"),
    ([0,2], [[.5,.5]]*2, "row 1: class 2"),
    ([0,-1], [[.5,.5]]*2, "row 1: class -1"),
    ([0.,1.], [[.5,.5]]*2, "class numbers"),
    ([0,1], [[.5,.5],[.5,np.nan]], "row 1"),
    ([0,1], [[3.,-2.],[.5,.5]], "row 0"),
    ([1,1], [[.5,.5]]*2, "two classes"),
    ([], np.zeros((0,2)), "at least one row")])
def test_bad_predictions_are_named(t, p, message):
    for f in (scores, bootstrap, confusion, lambda t, p: paired_bootstrap(t, [p, p], p)):
        with pytest.raises(ValueError, match=message): f(t, np.asarray(p))


@pytest.mark.parametrize("groups, message", [(["a"]*50, "two at least"), (["a","b"], "2 for 50 tiles")])
def test_bad_groups_are_named(groups, message):
    t, p = predictions(50, 2)
    with pytest.raises(ValueError, match=message): bootstrap(t, p, groups=groups)


def test_a_single_slide_is_told_before_anything_is_drawn():
    t, p = predictions(50, 2)
    groups, words = bootstrap_units(np.array(["s"]*50))
    assert groups is None and "all of one patient or slide" in words
    assert bootstrap(t, p, groups, n=20) == bootstrap(t, p, n=20)
    two = np.array(["s","t"]*25)
    assert (bootstrap_units(two)[0] == two).all() and bootstrap_units(two)[1].startswith("2 patients or slides")
    assert bootstrap_units(None) == (None, "test tiles")


def test_many_runs_have_fewer_draws(monkeypatch):
    import sdmae.evaluate.statistics as st
    seen = []
    monkeypatch.setattr(st, "draw_weights", lambda n, draws, *a: (seen.append(draws), iter([np.ones((n, draws))]))[1])
    t, p = predictions(40, 3)
    bootstrap(t, p, n=1000); bootstrap(t, [p]*30, n=1000); paired_bootstrap(t, [p]*20, [p]*50, n=1000); bootstrap(t, [p]*300, n=1000)
    assert seen == [1000, 333, 200, 200] == [affordable_draws(1000, r) for r in (1, 30, 50, 300)]
    assert all(affordable_draws(n, r)*r <= max(10_000, 200*r) and affordable_draws(n, r) <= n for n in (10, 500, 1000) for r in range(1, 60))


# scores by label

def several(n, c=5, decimals=None, seed=0):
    "Multi-hot targets, later labels rarer, some tiles without any, and probabilities; few decimals make ties."
    rng = np.random.default_rng(seed)
    t = (rng.random((n, c)) < .5/np.arange(1, c+1)).astype(np.float32)
    t[:2] = np.eye(2)[:, :1]
    p = 1/(1 + np.exp(-(rng.normal(size=(n, c)) + 1.5*(t - .5))))
    return t, p if decimals is None else p.round(decimals)


def labels_by_sklearn(y, p, right):
    "Oracle for one-hot or multi-hot y; labels without positives are left out of the means."
    there = y.any(0)
    each = {f"ap_{j}": sk.average_precision_score(y[:,j], p[:,j]) for j in np.flatnonzero(there)}
    auc = [sk.roc_auc_score(y[:,j], p[:,j]) for j in np.flatnonzero(there & ~y.all(0))]
    return {"accuracy": right.mean(), "macro_ap": np.mean(list(each.values())), "micro_ap": sk.average_precision_score(y, p, average="micro"),
            "macro_auc": np.mean(auc), "micro_auc": sk.roc_auc_score(y.ravel(), p.ravel()), **each}


@pytest.mark.parametrize("n, c, decimals", [(60,2,None), (300,5,None), (300,5,1), (400,9,1)])
def test_label_scores_are_sklearns(n, c, decimals):
    y, p = several(n, c, decimals)
    got = scores(y, p, LabelScores)
    assert tuple(got)[:5] == LABEL_METRICS
    assert got == pytest.approx(labels_by_sklearn(y, p, ((p >= .5) == y).all(1)), abs=1e-9)
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(y, p >= .5))
    for mean in ("macro", "micro"):
        assert got[f"{mean}_ap"] == pytest.approx(sk.average_precision_score(y, p, average=mean), abs=1e-9)
        assert got[f"{mean}_auc"] == pytest.approx(sk.roc_auc_score(y, p, average=mean), abs=1e-9)


@pytest.mark.parametrize("c, decimals", [(2,None), (4,None), (4,1)])
def test_label_scores_of_classes_are_sklearns_on_one_hot_targets(c, decimals):
    t, p = predictions(300, c, decimals=decimals)
    got = scores(t, p, LabelScores)
    assert got == pytest.approx(labels_by_sklearn(np.eye(c)[t], p, p.argmax(1) == t), abs=1e-9)
    for k in ("accuracy", "macro_auc"): assert got[k] == pytest.approx(scores(t, p)[k], abs=1e-6 if decimals else 1e-9)


def test_a_label_without_positives_is_left_out_of_the_means_only():
    y, p = several(200)
    y[:, 3] = 0
    got = scores(y, p, LabelScores)
    assert "ap_3" not in got and got == pytest.approx(labels_by_sklearn(y, p, ((p >= .5) == y).all(1)), abs=1e-9)
    y[:, 1] = 1 # nothing below it: precision, but no AUC
    got = scores(y, p, LabelScores)
    assert got["ap_1"] == 1 and got == pytest.approx(labels_by_sklearn(y, p, ((p >= .5) == y).all(1)), abs=1e-9)
    json.dumps([got, bootstrap(y, p, n=20, scorer=LabelScores)], allow_nan=False)


@pytest.mark.parametrize("multi, grouped", [(True,False), (True,True), (False,True)])
def test_each_draw_is_the_label_score_of_resampled_tiles(multi, grouped):
    y, p = several(120, decimals=2) if multi else predictions(120, 5, decimals=2)
    patients = np.arange(120)//7 if grouped else None
    weighted = LabelScores(y, p)
    for w in draw_weights(120, 12, patients, seed=3):
        got = weighted(w)
        for b in range(w.shape[1]):
            again = np.repeat(np.arange(120), w[:,b].astype(int))
            right = ((p >= .5) == y).all(1) if multi else p.argmax(1) == y
            want = labels_by_sklearn((y if multi else np.eye(5)[y])[again], p[again], right[again])
            assert {k: got[k][b] for k in want} == pytest.approx(want, abs=1e-6)


def test_label_scores_are_compared_on_the_same_draws():
    y, a = several(200); b = np.clip(a + np.random.default_rng(1).normal(scale=.3, size=a.shape), 0, 1)
    patients = np.arange(200)//2
    d = paired_bootstrap(y, a, [a, b], patients, n=60, scorer=LabelScores)
    for k, s in scores(y, a, LabelScores).items(): assert d[k][0] == pytest.approx((s - scores(y, b, LabelScores)[k])/2)
    assert all(v == (0,0,0) for v in paired_bootstrap(y, a, a, patients, n=20, scorer=LabelScores).values())
    found = bootstrap(y, a, patients, n=60, scorer=LabelScores)
    [drawn] = draw_scores(y, [[a]], patients, 60, 0, LabelScores)
    assert {*found} == {*LABEL_METRICS, *(f"ap_{j}" for j in range(5))} and found["macro_ap"] == pytest.approx(tuple(np.quantile(drawn["macro_ap"][1:], [.025, .975])))
    assert found != bootstrap(y, a, n=60, scorer=LabelScores), "patients, not lesions, are drawn"


def test_the_release_scores_joined_labels_as_absent():
    y, p = several(100)
    got = as_released(y)
    joined = y.sum(1) > 1
    assert joined.any() and not got[joined].any() and (got[~joined] == y[~joined]).all() and y[joined].any()
    assert scores(got, p, LabelScores)["macro_ap"] != scores(y, p, LabelScores)["macro_ap"]


@pytest.mark.parametrize("t, p, message", [
    ([[1,0],[0,1]], [[.5,.5]], r"\(2, 2\) and probabilities \(1, 2\)"),
    (np.zeros((0,2)), np.zeros((0,2)), "at least one row"),
    ([[1,0],[0,.5]], [[.5,.5]]*2, "targets, row 1"),
    ([[1,0],[0,1]], [[.5,.5],[.5,1.5]], "probabilities, row 1.*sigmoid"),
    ([[1,0],[0,1]], [[.5,np.nan],[.5,.5]], "probabilities, row 0"),
    ([[1,0],[1,0]], [[.5,.5]]*2, "nothing to score"),
    ([0,2], [[.5,.5]]*2, "row 1: class 2")])
def test_bad_label_predictions_are_named(t, p, message):
    for f in (scores, bootstrap):
        with pytest.raises(ValueError, match=message): f(t, np.asarray(p), scorer=LabelScores)


# choosing within the labelled tiles

def blobs(n, c=3, d=16, noise=1.5, seed=0):
    rng = np.random.default_rng(seed)
    y = np.r_[np.arange(c), rng.integers(0, c, n-c)]
    return np.random.default_rng(99).normal(size=(c, d))[y] + noise*rng.normal(size=(n, d)), y


@pytest.mark.parametrize("counts", [(11,)*9, (40,3,1), (2,2), (5,4,3,2,1), (1,1,2,6), (300,1,2)])
def test_folds_hold_out_each_tile_once_and_miss_no_class_in_training(counts):
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    splits = folds(y)
    times = np.bincount(np.concatenate([held for _, held in splits]), minlength=len(y))
    assert (times == (np.array(counts)[y] > 1)).all(), "each tile once; of a class with a single tile never"
    assert len(splits) == min(5, max(counts))
    for train, held in splits:
        assert set(y[train]) == set(range(len(counts))) and sorted([*train, *held]) == list(range(len(y))) and len(held)
    for c, n in enumerate(counts):
        assert sum(c in y[held] for _, held in splits) == (min(n, len(splits)) if n > 1 else 0)


def test_folds_are_sklearns_where_no_class_is_rare():
    y = blobs(97)[1]
    want = StratifiedKFold(5, shuffle=True, random_state=3).split(y, y)
    for (train, held), (a, b) in zip(folds(y, seed=3), want, strict=True): assert (train == a).all() and (held == b).all()
    assert [held.tolist() for _, held in folds(y)] == [held.tolist() for _, held in folds(y)]


@pytest.mark.parametrize("n, number", [(1000, 5), (2500, 4), (5000, 2), (10_000, 1)])
def test_enough_is_held_out_and_no_more(n, number):
    splits = folds(np.arange(n) % 9)
    assert len(splits) == number
    assert sum(len(held) for _, held in splits) >= min(n, 2000) > sum(len(held) for _, held in splits[:-1])


def test_nothing_to_hold_out_means_nothing_to_compare():
    for y in ([0,1,2], [0,0,0,1,2], [0,0]): assert folds(y) == [] and held_out_scores(np.eye(len(y)), np.array(y), None) is None
    x, y = blobs(3)
    knn, linear = fit_knn(x, y, None, None, 3), fit_linear(x, y, None, None, 3, C=[1., .1])
    assert (knn.k, linear.C) == (3, .1) and {c["macro_auc"] for c in knn.curve + linear.curve} == {None}
    assert fit_knn(*blobs(3), None, None, 3, neighbours=(1, 2, 3)).k == 3, "the rule of ties: the smoother"
    json.dumps(knn.curve, allow_nan=False)


@pytest.mark.parametrize("counts", [(40, 40, 40), (60, 8, 3), (30, 1, 30)])
def test_folds_never_split_a_patient(counts):
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(np.arange(3), counts))
    patients = np.array([f"p{i}" for i in rng.integers(0, 14, len(y))])
    splits = folds(y, groups=patients)
    assert splits
    for train, held in splits:
        assert not set(patients[train]) & set(patients[held]) and set(y[train]) == {0, 1, 2}
    times = np.bincount(np.concatenate([held for _, held in splits]), minlength=len(y))
    assert times.max() == 1


def test_a_class_of_one_patient_cannot_be_held_out():
    y, patients = np.repeat([0, 1], 20), np.r_[np.repeat(np.arange(5), 4), np.full(20, 9)]
    assert all(9 not in patients[held] for _, held in folds(y, groups=patients))
    assert folds(y, groups=np.zeros(40)) == [] and held_out_scores(np.eye(40), y, None, np.zeros(40)) is None


def test_what_tells_patients_apart_is_not_chosen():
    "Features that name the patient predict held-out tiles only where a fold splits patients: then the weakest penalty wins."
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(30), 6); y = (np.arange(30) % 2)[patients]
    x = np.c_[np.eye(30)[patients]*3, y[:, None] + rng.normal(size=(180, 1))*2]
    leaky, honest = fit_linear(x, y, None, None, 2), fit_linear(x, y, None, None, 2, groups=patients)
    assert max(c["macro_auc"] for c in leaky.curve) > .99 and max(c["macro_auc"] for c in honest.curve) < .9


def test_C_by_cross_validation_is_sklearns():
    x, y = blobs(120, d=64, noise=2.5)
    grid = [1e-4, 1e-3, 1e-2, 1.]
    probe = fit_linear(x, y, None, None, 3, C=grid)
    splits = folds(y)
    for c in probe.curve:
        cold = make_pipeline(StandardScaler(), LogisticRegression(C=c["C"], max_iter=1000))
        assert c["macro_auc"] == pytest.approx(sk.roc_auc_score(y, cross_val_predict(cold, x, y, cv=splits, method="predict_proba"), multi_class="ovr"), abs=2e-3)
    assert probe.C == max(probe.curve, key=lambda c: c["macro_auc"])["C"] and len({c["macro_auc"] for c in probe.curve}) > 1
    whole = make_pipeline(StandardScaler(), LogisticRegression(C=probe.C, max_iter=1000)).fit(x, y)
    assert np.allclose(probe.predict_proba(x), whole.predict_proba(x), atol=5e-3), "the fit is on every labelled tile"


def test_k_by_cross_validation_is_sklearns():
    x, y = blobs(100, noise=2.5)
    fitted = fit_knn(x, y, None, None, 3, neighbours=(1, 5, 20, 90))
    for c in fitted.curve:
        guess = np.empty((100, 3))
        for train, held in folds(y): # 90 neighbours are more than a fold has: all of it
            one = KNeighborsClassifier(min(c["k"], len(train)), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1-d)/.07)).fit(x[train], y[train])
            guess[held] = one.predict_proba(x[held])
        assert c["macro_auc"] == pytest.approx(sk.roc_auc_score(y, guess, multi_class="ovr"), abs=1e-4)
    assert fitted.k == max(fitted.curve, key=lambda c: (c["macro_auc"], c["k"]))["k"] and len(fitted.train_x) == 100


def test_labels_that_were_not_promised_are_not_used():
    "With few labels the choice does not depend on any other tile: not on validation, which is not even given."
    x, y = blobs(60); v, vy = blobs(200, seed=5)
    alone = fit_linear(x, y, None, None, 3)
    assert alone.curve != fit_linear(x, y, v, vy, 3).curve
    with pytest.raises(ValueError, match="valid: features"): fit_linear(x, y, v, None, 3)
    for fit in (fit_knn, fit_linear):
        with pytest.raises(ValueError, match=r"train: no tile of class \[1\]"): fit(x[y != 1], y[y != 1], None, None, 3)


# kNN

@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("temperature", [.07, 1.])
def test_knn_is_sklearns(k, temperature):
    x, y = blobs(300); new, _ = blobs(700, seed=1)
    oracle = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1-d)/temperature)).fit(x, y)
    got = knn_probabilities(x, y, new, k, 3, temperature)
    assert np.allclose(got, oracle.predict_proba(new), atol=2e-4)
    assert np.allclose(got.sum(1), 1, atol=1e-6)
    assert np.allclose(got, knn_probabilities(torch.tensor(x), torch.tensor(y), torch.tensor(new), k, 3, temperature))


def test_knn_survives_a_tiny_temperature():
    x, y = blobs(50)
    assert np.isfinite(knn_probabilities(x, y, x, 5, 3, temperature=1e-4)).all()


def test_k_is_the_best_on_validation_and_the_larger_of_equals():
    x, y = blobs(200); v, vy = blobs(100, seed=2)
    fitted = fit_knn(x, y, v, vy, 3, neighbours=(100, 1, 10, 500))
    assert [c["k"] for c in fitted.curve] == [1, 10, 100, 200], "more than there are means all"
    for c in fitted.curve: assert c["macro_auc"] == pytest.approx(scores(vy, knn_probabilities(x, y, v, c["k"], 3))["macro_auc"])
    assert fitted.curve[[c["k"] for c in fitted.curve].index(fitted.k)]["macro_auc"] == max(c["macro_auc"] for c in fitted.curve)
    assert fit_knn(x, y, None, None, 3).k == 20 and fit_knn(x[:15], y[:15], None, None, 3).k == 15, "fixed where nothing else is asked"
    far, fy = blobs(90, noise=.01); w, wy = blobs(30, noise=.01, seed=3)
    assert fit_knn(far, fy, w, wy, 3, neighbours=(1, 5, 10)).k == 10
    assert np.allclose(fitted.predict_proba(v), knn_probabilities(x, y, v, fitted.k, 3))


def test_knn_refuses_k_beyond_the_training_tiles():
    x, y = blobs(20)
    for k in (0, 21):
        with pytest.raises(ValueError, match=f"k: {k} neighbours"): knn_probabilities(x, y, x, k, 3)
    with pytest.raises(ValueError, match="neighbours: whole numbers from 1"): fit_knn(x, y, x, y, 3, neighbours=[0, 5])


# linear probe

@pytest.mark.parametrize("c", [2, 4])
def test_warm_started_fits_are_sklearns_cold_ones(c):
    x, y = blobs(300, c); v, vy = blobs(100, c, seed=1)
    x[:, 0] = 7. # a dead feature
    grid = (1e-3, .1, 1.)
    for C in grid:
        probe = fit_linear(x, y, v, vy, c, C=[C])
        oracle = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000)).fit(x, y)
        assert probe.C == C and np.allclose(probe.predict_proba(v), oracle.predict_proba(v), atol=1e-5)
    for C, model in path_of_fits(StandardScaler().fit_transform(x), y, grid, 1000):
        cold = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000)).fit(x, y)
        assert np.allclose(model.coef_, cold[-1].coef_, atol=5e-3)


def test_C_is_the_best_on_validation_and_the_smaller_of_equals():
    x, y = blobs(120, d=64, noise=2.5); v, vy = blobs(200, d=64, noise=2.5, seed=1)
    probe = fit_linear(x, y, v, vy, 3)
    values = [c["macro_auc"] for c in probe.curve]
    assert max(values) > min(values)
    assert probe.C == probe.curve[values.index(max(values))]["C"]
    assert scores(vy, probe.predict_proba(v))["macro_auc"] == pytest.approx(max(values))
    json.dumps(probe.curve)


def test_probe_does_not_care_for_the_scale_of_features():
    x, y = blobs(200); v, vy = blobs(100, seed=1)
    a, b = fit_linear(x, y, v, vy, 3), fit_linear(1000*x + 5, y, 1000*v + 5, vy, 3)
    assert a.C == b.C and np.allclose(a.predict_proba(v), b.predict_proba(1000*v + 5), atol=1e-3)


@pytest.mark.parametrize("fit", [fit_knn, fit_linear])
def test_unfit_labels_are_named(fit):
    x, y = blobs(60); v, vy = blobs(30, seed=1)
    with pytest.raises(ValueError, match=r"train: no tile of class \[1\]"): fit(x[y != 1], y[y != 1], v, vy, 3)
    with pytest.raises(ValueError, match="train: classes .* do not agree with n_classes 2"): fit(x, y, v, vy, 2)
    with pytest.raises(ValueError, match="valid: classes"): fit(x, y, v, vy + 1, 3)
    with pytest.raises(ValueError, match="valid: features"): fit(x, y, v, vy[:-1], 3)
    x[4, 2] = np.nan
    with pytest.raises(ValueError, match="train: row 4"): fit(x, y, v, vy, 3)


def test_C_must_be_positive():
    x, y = blobs(30)
    with pytest.raises(ValueError, match="positive"): fit_linear(x, y, x, y, 3, C=[0., 1.])


# several labels

def labelled(n, seed=0, noise=1.5):
    "Features and three labels: two of them joined in one of four classes, the third rare."
    x, y = blobs(n, 4, noise=noise, seed=seed)
    return x, np.stack([y == 0, y <= 1, (y == 2) & (x[:,0] > x[:,0].mean())], 1).astype(np.float32)


def test_the_probe_of_several_labels_is_sklearns_one_vs_rest():
    x, y = labelled(300); v, vy = labelled(150, seed=1)
    probe = fit_linear(x, y, v, vy, 3, C=(1e-3, 1e-2, .1))
    for c in probe.curve:
        cold = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(C=c["C"], max_iter=1000))).fit(x, y)
        assert c["macro_auc"] == pytest.approx(sk.roc_auc_score(vy, cold.predict_proba(v)), abs=5e-3)
        if c["C"] == probe.C: assert np.allclose(probe.predict_proba(v), cold.predict_proba(v), atol=5e-3)
    assert probe.C == max(probe.curve, key=lambda c: c["macro_auc"])["C"] and probe.predict_proba(v).shape == (150, 3)
    json.dumps(probe.curve)


def test_knn_of_several_labels_is_sklearns_regression_on_label_vectors():
    x, y = labelled(300); v, vy = labelled(150, seed=1)
    fitted = fit_knn(x, y, v, vy, 3, neighbours=(1, 10, 50))
    for c in fitted.curve:
        oracle = KNeighborsRegressor(c["k"], metric="cosine", algorithm="brute", weights=lambda d: np.exp((1-d)/.07)).fit(x, y)
        p = knn_probabilities(x, y, v, c["k"], 3)
        assert np.allclose(p, oracle.predict(v), atol=2e-4) and p.min() >= 0 and p.max() <= 1
        assert c["macro_auc"] == pytest.approx(sk.roc_auc_score(vy, p))
    assert fitted.k == max(fitted.curve, key=lambda c: (c["macro_auc"], c["k"]))["k"]
    assert np.allclose(fitted.predict_proba(v), knn_probabilities(x, y, v, fitted.k, 3))


def test_among_few_labels_each_label_has_folds_of_its_own():
    x, y = labelled(120, noise=2.5)
    grid = (1e-3, 1e-2, .1)
    probe = fit_linear(x, y, None, None, 3, C=grid)
    for c in probe.curve:
        cold = make_pipeline(StandardScaler(), LogisticRegression(C=c["C"], max_iter=1000))
        each = [sk.roc_auc_score(label, cross_val_predict(cold, x, label, cv=folds(label.astype(int)), method="predict_proba")[:,1]) for label in y.T]
        assert c["macro_auc"] == pytest.approx(np.mean(each), abs=.009)
    knn = fit_knn(x, y, None, None, 3, neighbours=(1, 20))
    for c in knn.curve:
        each = []
        for label in y.T.astype(int):
            p = np.empty(120)
            for train, held in folds(label): p[held] = knn_probabilities(x[train], label[train], x[held], c["k"], 2)[:,1]
            each.append(sk.roc_auc_score(label, p))
        assert c["macro_auc"] == pytest.approx(np.mean(each), abs=1e-6)
    single = np.zeros((6, 2), int); single[0, 0] = single[1, 1] = 1 # one tile a label: nothing to hold out
    assert {c["macro_auc"] for c in fit_linear(x[:6], single, None, None, 2, C=[1., .1]).curve} == {None}


@pytest.mark.parametrize("fit", [fit_knn, fit_linear])
def test_unfit_several_labels_are_named(fit):
    x, y = labelled(60); v, vy = labelled(30, seed=1)
    with pytest.raises(ValueError, match=r"train: label \[1\] is on no tile or on all"): fit(x, y*[1,0,1], v, vy, 3)
    with pytest.raises(ValueError, match=r"train: label \[0\] is on no tile or on all"): fit(x, np.maximum(y, [1,0,0]), None, None, 3)
    with pytest.raises(ValueError, match=r"valid: features \(30, 16\) and classes \(30, 2\)"): fit(x, y, v, vy[:,:2], 3)
    y[7, 1] = .5
    with pytest.raises(ValueError, match="train: row 7 has a target that is not 0 or 1"): fit(x, y, v, vy, 3)


# features

class Tiles:
    def __init__(self, n, size=16, seed=0, channels=3):
        self.tiles = np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), dtype=np.uint8)
    def batch(self, idx): return torch.from_numpy(self.tiles[idx]).permute(0, 3, 1, 2)


class Net(nn.Module):
    image_size = 16
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.drop, self.map = nn.Dropout(.5), nn.Linear(3, 8)
    def pooled(self, x): return self.map(self.drop(x).mean((2,3)))


def test_extract_is_the_encoder_on_normalised_images_in_order():
    store, net, mean, std = Tiles(20), Net().train(), (.4,.5,.6), (.2,.3,.1)
    net.drop.eval(); net.drop.training = True
    idx = np.array([19, 3, 3, 7, 11])
    x = (store.tiles[idx]/255 - mean)/std
    want = x.mean((1,2)) @ net.map.weight.detach().numpy().T + net.map.bias.detach().numpy()
    for size in (1, 2, 256): assert np.allclose(extract(net, store, idx, mean, std, "cpu", batch_size=size), want, atol=1e-5)
    assert net.training and net.drop.training and next(net.parameters()).requires_grad
    half = extract(net, store, idx, mean, std, "cpu", amp=torch.bfloat16)
    assert half.dtype == np.float32 and np.allclose(half, want, atol=.05) and not np.array_equal(half, want.astype(np.float32))


def test_extract_looks_at_the_centre_where_asked():
    store, net = Tiles(3), Net().eval()
    store.tiles[:, 4:12, 4:12] = (50, 100, 200)
    want = np.array([50, 100, 200])/255 @ net.map.weight.detach().numpy().T + net.map.bias.detach().numpy()
    assert np.allclose(extract(net, store, [0,1,2], [0.]*3, [1.]*3, "cpu", crop=.5), want, atol=1e-3)
    assert not np.allclose(extract(net, store, [0,1,2], [0.]*3, [1.]*3, "cpu"), want, atol=1e-2)


def test_extract_restores_the_mode_after_an_error():
    class Broken(Net):
        def pooled(self, x): raise RuntimeError("out of memory")
    net = Broken().train()
    with pytest.raises(RuntimeError, match="out of memory"): extract(net, Tiles(2), [0,1], [0.]*3, [1.]*3, "cpu")
    assert net.training and torch.is_grad_enabled()


def test_extract_names_what_is_wrong():
    net = Net()
    with pytest.raises(ValueError, match="no tiles"): extract(net, Tiles(2), [], [0.]*3, [1.]*3, "cpu")
    with torch.no_grad(): net.map.bias[2] = torch.inf
    with pytest.raises(ValueError, match="row 1 first"): extract(net, Tiles(2), [1,0], [0.]*3, [1.]*3, "cpu")


def test_extract_takes_the_librarys_encoder():
    from sdmae.models.vit import Encoder
    torch.manual_seed(0)
    encoder = Encoder(image_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2)
    store = Tiles(6)
    got = extract(encoder, store, np.arange(6), [.5]*3, [.25]*3, "cpu", batch_size=4)
    with torch.no_grad(): tokens = encoder.eval().tokens((store.batch(np.arange(6))/255 - .5)/.25)
    assert np.allclose(got, tokens[:, encoder.num_prefix_tokens:].mean(1).numpy(), atol=1e-5)


def test_grey_tiles_are_their_three_equal_channels():
    grey, three, net = Tiles(6, channels=1), Tiles(6), Net()
    three.tiles = grey.tiles.repeat(3, axis=3)
    a, b = (extract(net, store, [4,0,1], (.4,.5,.6), (.2,.3,.1), "cpu") for store in (grey, three))
    assert np.allclose(a, b, atol=1e-6)
