"""Readouts, few shots, calibration and shifts against independent oracles (timm, scikit-learn, scikit-image, torch, plain loops) and on bad input."""
import json, time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from skimage.color import hed2rgb, rgb2hed
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.neighbors import NearestCentroid
from timm.models.vision_transformer import VisionTransformer

from sdmae.evaluate.calibration import CALIBRATION, CalibrationScores, calibration_of, fit_temperature, mass_bins, reliability, tempered
from sdmae.evaluate.features import extract, extract_each
from sdmae.evaluate.fewshot import centred, distinct, draw_episodes, episode_scores, few_shot, over_tiles
from sdmae.evaluate.readout import choose_readout
from sdmae.evaluate.shift import Tiles, centre_shift, directions, halves, hed_shift, held_out, matched, one_centre, stain_shift
from sdmae.evaluate.statistics import LabelScores, WeightedScores, draw_weights, scores
from sdmae.models.convnet import ConvEncoder
from sdmae.models.histogram import HistogramEncoder
from sdmae.models.readout import JOINED, READOUTS, levels_of, readout_text
from sdmae.models.vit import Encoder
from sdmae.params import FewShotParams, ProbeParams, ShiftParams, TaskParams, typed
from sdmae.pipeline.plan import probe_faults
from sdmae.report.protocols import ROWS, calibration_table, collect_protocol, few_shot_table, reliability_of
from sdmae.views.augment import normalize, to_unit
from sdmae.views.stain import change_stains, hed_jitter, tissue as tissue_of


def vit(class_token, depth=5):
    torch.manual_seed(0)
    return Encoder(32, 8, 24, depth, 2, class_token=class_token).eval()


def images(n=3, size=32, seed=0): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# What is read of an encoder

@pytest.mark.parametrize("class_token", [True, False])
def test_readouts_of_a_vision_transformer_are_timms_intermediates(class_token):
    e, x = vit(class_token), images()
    with torch.no_grad():
        read = e.readouts(x)
        levels = VisionTransformer.forward_intermediates(e, x, indices=list(range(5)), norm=True, output_fmt="NLC", intermediates_only=True)
        tokens = e.tokens(x)
        assert torch.equal(read["mean"], e.pooled(x)), "the default is today's, to the last bit"
    means = [l.mean(1) for l in levels]
    theirs = dict(mean=means[4], joined=torch.cat(means[1:], 1), depth_25=means[1], depth_50=means[2], depth_75=means[3])
    theirs["token"] = tokens[:, 0] if class_token else tokens.amax(1)
    theirs["mean_token"] = torch.cat([theirs["mean"], theirs["token"]], 1)
    assert tuple(read) == READOUTS
    for k in READOUTS: torch.testing.assert_close(read[k], theirs[k], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "densenet121", "mobilenetv3_small_050"])
def test_readouts_of_convolutional_networks(arch):
    torch.manual_seed(0)
    e, x = ConvEncoder(64, arch).eval(), images(2, 64)
    with torch.no_grad(): read, pooled, maps = e.readouts(x), e.pooled(x), e.maps(x, list(range(len(e.strides))))
    torch.testing.assert_close(read["mean"], pooled)
    assert torch.equal(read["joined"], torch.cat([m.mean((2, 3)) for m in maps[-2:]], 1)) and tuple(read) == READOUTS
    assert (read["token"] >= read["mean"]).all() and read["mean_token"].shape[1] == 2*e.width
    for k in ("depth_25", "depth_50", "depth_75"):
        [i] = levels_of(k, len(e.strides), 2)
        assert torch.equal(read[k], maps[i].mean((2, 3))) and read[k].shape[1] == e.widths[i]


def test_every_network_has_as_many_candidates_and_the_histogram_one():
    encoders = [vit(True), vit(False), vit(False, depth=1), ConvEncoder(64, "resnet18").eval()]
    with torch.no_grad(): assert len({len(e.readouts(images(2, 64))) for e in encoders}) == 1
    assert set(HistogramEncoder(32).readouts(torch.rand(2, 3, 32, 32), READOUTS)) == {"mean"}
    for e in encoders: assert all(readout_text(e, k) for k in READOUTS)
    assert readout_text(encoders[0], "token") == "class token" and readout_text(encoders[1], "token") == "maximum over the patch tokens"
    assert readout_text(HistogramEncoder(32), "mean") == "colour histogram"
    with pytest.raises(ValueError, match="there is no cls"): vit(True).readouts(images(), ["cls"])


class Store:
    def __init__(self, n=10, size=32, channels=3): self.tiles = np.random.default_rng(0).integers(0, 256, (n, channels, size, size), dtype=np.uint8)
    def batch(self, idx): return torch.from_numpy(self.tiles[idx])


def test_extraction_of_one_and_of_several_candidates():
    e, s, args = vit(True), Store(), ([.5]*3, [.2]*3, "cpu")
    alone, several = extract(e, s, range(10), *args, batch_size=4), extract_each(e, s, range(10), *args, batch_size=4, readouts=READOUTS)
    with torch.inference_mode(): plain = torch.cat([e.pooled(normalize(to_unit(s.batch(range(i, min(i + 4, 10)))), *args[:2])) for i in (0, 4, 8)])
    assert np.array_equal(alone, plain.numpy()) and np.array_equal(alone, several["mean"]) and set(several) == set(READOUTS)
    assert extract_each(e, s, range(10), *args, readouts=["joined"])["joined"].shape == (10, 4*24)
    black = extract_each(e, s, range(10), *args, change=torch.zeros_like)["mean"]
    assert np.allclose(black, black[:1], atol=1e-6) and not np.allclose(alone, alone[:1], atol=1e-3)
    with torch.no_grad(): e.norm.weight[0] = np.nan
    with pytest.raises(ValueError, match="row 7 first"): extract_each(e, s, [7, 2], *args, readouts=READOUTS)


def told(y, skill, seed, d=3): return skill*np.eye(3, d)[y] + np.random.default_rng(seed).normal(size=(len(y), d))


def test_the_choice_is_the_best_on_validation_whatever_training_says():
    y, v = np.arange(90) % 3, np.arange(60) % 3
    train = dict(mean=told(y, 1., 0), token=told(y, 9., 1)) # tells training tiles apart, and no others
    valid = dict(mean=told(v, 1., 2), token=told(v, 0., 3))
    found = choose_readout(train, y, valid, v, 3, [.1, 1.])
    assert found["chosen"] == "mean" and found["by"] == "validation" and found["candidates"]["mean"] > found["candidates"]["token"]
    assert choose_readout(train, y, None, None, 3, [.1, 1.], groups=np.arange(90)//3)["chosen"] == "token"
    twice = choose_readout(dict(mean=train["mean"], joined=train["mean"]), y, dict(mean=valid["mean"], joined=valid["mean"]), v, 3, [1.])
    assert twice["chosen"] == "mean", "the first of equals"


# Few shots

def plain_simpleshot(x, y, new, new_y, episodes):
    "An episode, a tile, a class at a time."
    mean, unit = x.mean(0), lambda v: v/np.linalg.norm(v)
    x, new = np.array([unit(o - mean) for o in x]), np.array([unit(o - mean) for o in new])
    out = []
    for e in episodes:
        means = [x[rows].mean(0) for rows in e]
        said = [int(np.argmin([np.linalg.norm(o - m) for m in means])) for o in new]
        out.append(balanced_accuracy_score(new_y, said))
        with np.errstate(invalid="ignore"): theirs = NearestCentroid().fit(x[e.ravel()], y[e.ravel()]) # one tile a class has no variance
        assert (theirs.predict(new) == said).all()
    return np.array(out)


@pytest.mark.parametrize("shots", [1, 3])
def test_simpleshot_is_a_plain_loop(shots):
    y, new_y = np.repeat([0, 1, 2], [9, 14, 5]), np.repeat([0, 1, 2], [11, 4, 20])
    x, new = told(y, 1., 0, 7) + 3, told(new_y, 1., 1, 7) + 3
    e = draw_episodes(y, "abc", shots, 30)
    plain = plain_simpleshot(x, y, new, new_y, e)
    t = lambda o: centred(torch.tensor(o), torch.tensor(x).mean(0))
    got, right = episode_scores(t(x).float(), y, t(new).float(), new_y, e)
    assert got == pytest.approx(plain, abs=1e-6)
    assert np.mean([right[new_y == c].mean() for c in range(3)]) == pytest.approx(plain.mean(), abs=1e-6)
    entry = few_shot(x, y, new, new_y, "abc", (shots,), 30)[str(shots)]
    assert entry["balanced_accuracy"] == pytest.approx(plain.mean(), abs=1e-6) and entry["sd"] == pytest.approx(plain.std(ddof=1), abs=1e-6)
    assert entry["interval"] == pytest.approx(np.quantile(plain, [.025, .975]), abs=1e-6) and entry["n_train"] == 3*shots


def test_episodes_depend_on_the_labels_alone():
    y = np.arange(60) % 3
    a = few_shot(told(y, 1., 0), y, told(y, 1., 1), y, "abc", (2,), 20)["2"]
    assert a == few_shot(told(y, 1., 0), y, told(y, 1., 1), y, "abc", (1, 2, 4), 20)["2"], "neither on the encoder nor on what else is asked"
    assert np.array_equal(draw_episodes(y, "abc", 2), draw_episodes(y.astype(np.int32), "abc", 2))
    assert not np.array_equal(draw_episodes(y, "abc", 2), draw_episodes(y[::-1].copy(), "abc", 2))
    e = draw_episodes(np.r_[y, 2], "abc", 5)
    assert (np.sort(e, axis=2)[..., 1:] > np.sort(e, axis=2)[..., :-1]).all(), "no tile twice"


def test_each_tile_is_drawn_equally_often():
    n = np.bincount(distinct(20, 8, 5000, np.random.default_rng(1)).ravel(), minlength=20)
    assert np.abs(n - 2000).max() < 5*np.sqrt(5000*.4*.6)


def test_interval_over_tiles_is_that_of_resampled_groups():
    rng = np.random.default_rng(0)
    y, right, groups = np.arange(60) % 3, rng.random(60), np.arange(60)//4
    drawn = []
    for w in draw_weights(60, 40, groups, 0):
        for b in range(w.shape[1]):
            again = np.repeat(np.arange(60), w[:, b].astype(int))
            drawn.append(np.mean([right[again][y[again] == c].mean() for c in range(3)]))
    assert over_tiles(right, y, groups, 40, 0) == pytest.approx(np.quantile(drawn, [.025, .975]), abs=1e-6)


def test_few_shot_refuses_by_name():
    y = np.repeat([0, 1], [3, 30])
    with pytest.raises(ValueError, match=r"few_shot.shots 4: class tumour has 3 training tiles.*'stroma': 30.*fewer shots"):
        few_shot(told(y, 1., 0), y, told(y, 1., 1), y, ["tumour", "stroma"], (1, 4))
    with pytest.raises(ValueError, match="several labels.*few_shot: null"): draw_episodes(np.eye(4), "abcd", 1)


def test_a_thousand_episodes_take_seconds():
    "9 classes, 5 shots, 3,000 test tiles, 384 numbers each."
    rng, y, new_y = np.random.default_rng(0), np.arange(4000) % 9, np.arange(3000) % 9
    x, new = (rng.normal(size=(len(o), 384)).astype(np.float32) + np.eye(9, 384, dtype=np.float32)[o] for o in (y, new_y))
    start = time.perf_counter()
    few_shot(x, y, new, new_y, "abcdefghi", (5,), 1000)
    assert time.perf_counter() - start < 20 # measured: 1 to 2 s


# Calibration

def said(n, c=4, skill=1.5, sure=1., seed=0):
    rng = np.random.default_rng(seed)
    y = np.r_[:c, rng.integers(0, c, n - c)]
    p = np.exp(sure*(rng.normal(size=(n, c)) + skill*np.eye(c)[y]))
    return y, p/p.sum(1, keepdims=True)


@pytest.mark.parametrize("multi", [False, True])
def test_each_draw_is_the_score_of_resampled_tiles(multi):
    y, p = said(90)
    if multi: y, p = np.stack([y < 1, y > 1, y == 2], 1).astype(int), p[:, :3]
    w = next(iter(draw_weights(90, 8, None, 0)))
    scorer, found = CalibrationScores(y, p), []
    got = scorer(w)
    assert set(got) == set(CALIBRATION) - ({"ece", "adaptive_ece"} if multi else set())
    for b in range(8):
        again = np.repeat(np.arange(90), w[:, b].astype(int))
        one = scores(y[again], p[again], CalibrationScores)
        assert {k: got[k][b] for k in got if k != "adaptive_ece"} == pytest.approx({k: one[k] for k in got if k != "adaptive_ece"}) # its edges are the tiles'


def test_ece_by_hand_and_its_floor():
    y, p = np.array([0, 1, 0, 0]), np.array([[.9, .1], [.9, .1], [.6, .4], [.6, .4]])
    found = scores(y, p, CalibrationScores) # 0.9 with one of two right, 0.6 with both right
    assert found["ece"] == pytest.approx((.4 + .4)/2) == found["adaptive_ece"]
    assert found["brier"] == pytest.approx((.02 + 1.62 + .32 + .32)/4) and found["nll"] == pytest.approx(log_loss(y, p))
    prior = scores(np.arange(10) % 2, np.full((10, 2), .5), CalibrationScores)
    assert prior["ece"] == pytest.approx(0, abs=1e-12) and prior["brier"] == .5, "an ECE of zero says nothing of skill, a proper score does"


def test_a_certain_error_stays_finite():
    found = scores([0, 1, 1], [[1., 0.], [1., 0.], [0., 1.]], CalibrationScores)
    assert np.isfinite([*found.values()]).all() and found["nll"] == pytest.approx(-np.log(np.finfo(float).eps)/3)
    assert np.isfinite(fit_temperature([0, 1, 1], [[1., 0.], [1., 0.], [0., 1.]]))
    assert len(np.unique(mass_bins(np.r_[np.full(90, 1.), np.linspace(.3, .9, 10)]))) > 1


def by_lbfgs(logits, loss):
    log_T = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_T], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)
    def step():
        optimiser.zero_grad(); l = loss(logits/log_T.exp()); l.backward(); return l
    optimiser.step(step)
    return log_T.exp().item()


@pytest.mark.parametrize("sure", [.4, 1., 4.])
def test_temperature_is_that_of_lbfgs(sure):
    y, p = said(400, sure=sure)
    T = fit_temperature(y, p)
    assert T == pytest.approx(by_lbfgs(torch.tensor(np.log(p)), lambda z: torch.nn.functional.cross_entropy(z, torch.tensor(y))), rel=1e-4)
    hot, q = np.stack([y < 1, y > 1], 1).astype(float), p[:, :2]
    T = fit_temperature(hot, q)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    assert T == pytest.approx(min(20, by_lbfgs(torch.tensor(np.log(q/(1 - q))), lambda z: bce(z, torch.tensor(hot)))), rel=1e-4)


def test_temperature_changes_no_order_and_never_sees_test():
    (y, p), (v, q) = said(300, sure=3.), said(200, sure=3., seed=1)
    found = calibration_of(y, [p], (v, q))
    assert (tempered(p, found["temperature"]).argmax(1) == p.argmax(1)).all()
    other = calibration_of((y + 1) % 4, [p], (v, q))
    assert found["temperature"] == other["temperature"] > 1 and found["before"]["nll"] != other["before"]["nll"]
    assert found["after"]["nll"] < found["before"]["nll"] and found["before"]["ece"] == pytest.approx(scores(y, p)["ece"], abs=1e-6)
    low, high = found["before"]["intervals"]["nll"]
    assert low < found["before"]["nll"] < high
    assert set(calibration_of(y, [p, p])) == set(calibration_of(y, [p])) == {"before"}, "no label of validation to spare"
    json.dumps(found, allow_nan=False)


def test_reliability_sums_to_the_ece():
    y, p = said(500, sure=2.)
    r = reliability(y, p)
    assert sum(r["share"]) == pytest.approx(1) and np.abs(np.subtract(r["accuracy"], r["confidence"])) @ r["share"] == pytest.approx(scores(y, p)["ece"], abs=1e-6)


# Another stain

def test_the_shift_is_scikit_images():
    x = torch.randint(20, 200, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0))/255
    stain = rgb2hed(x.permute(0, 2, 3, 1).double().numpy())
    known = (stain > 0).all(-1) & (tissue_of(x)[:, 0] == 1).numpy() # scikit-image takes amounts below zero for zero
    assert known.sum() > 50
    for d in directions(4):
        mine = hed_shift(x, .05*d).permute(0, 2, 3, 1).numpy()
        assert np.abs(mine - hed2rgb(stain + .25*d/np.log(1e6)).clip(0, 1))[known].max() < .5/255 + 1e-3, "0.05 is 0.25 of optical density"
        assert np.allclose(mine*255, np.round(mine*255), atol=1e-4) and mine.min() >= 0 and mine.max() <= 1
    assert torch.allclose(hed_shift(x, [0, 0, 0]), x, atol=1e-6)
    with pytest.raises(ValueError, match="grey tiles have no stain"): hed_shift(x[:, :1], [0, 0, 0])


def test_a_test_at_a_strength_moves_as_far_as_the_views_of_that_strength():
    x = torch.full((1, 3, 4, 4), .5); x[:, 1] = .3
    one = lambda *v: torch.tensor(v).view(1, 3, 1, 1)
    assert torch.allclose(hed_shift(x, [.05, 0, 0]), change_stains(x, one(1., 1., 1.), one(.25, 0., 0.)), atol=.51/255)
    torch.manual_seed(0)
    far = max((hed_jitter(x, .05) - x).abs().max() for _ in range(300))
    tested = max((hed_shift(x, [.05*i, .05*j, .05*k]) - x).abs().max() for i in (-1, 1) for j in (-1, 1) for k in (-1, 1))
    assert .6*tested < far < 1.3*tested, "factors of the views come on top"


def test_glass_padding_and_grey_are_not_stained():
    d = [.1, .1, .1]
    for edge in (0., .95, 1.): assert (hed_shift(torch.full((1, 3, 4, 4), edge), d) - edge).abs().max() <= .51/255
    half = torch.full((1, 3, 4, 8), .96); half[..., 4:] = torch.tensor([.6, .3, .6]).view(3, 1, 1)
    moved = (hed_shift(half, d) - half).abs()
    assert moved[..., :4].max() <= .51/255 and moved[..., 4:].min() > .05


def test_directions_are_the_same_for_all_and_balanced():
    assert np.array_equal(directions(4), directions(4)) and np.array_equal(directions(6)[:4], directions(4))
    assert np.allclose(directions(8).sum(0), 0) and np.allclose(np.abs(directions(5)).max(1), 1)


def test_stain_shift_reports_means_losses_and_directions():
    y, p = said(200, sure=1.)
    T = SimpleNamespace(y=dict(test=y), groups=np.arange(200)//5, scorer=WeightedScores, chosen="balanced_accuracy", score=lambda y, p: scores(y, p))
    asked = []
    def predict(amounts):
        asked.append(amounts)
        return p if amounts is None else np.roll(p, int(round(100*np.abs(amounts).max())), 0)
    found = stain_shift(T, predict, [0., .05, .1], 3)
    assert len(asked) == 7 and asked[0] is None and found["middle"] == .05
    for r in found["strengths"][1:]:
        assert r["value"] == pytest.approx(np.mean(r["each"])) and r["drop"] == pytest.approx(found["strengths"][0]["value"] - r["value"]) and r["low"] > 0
    json.dumps(found, allow_nan=False)


# Another centre

def tissue(n, centres, seed, groups=True, classes=2):
    rng = np.random.default_rng(seed)
    centre = np.array([centres[i//6 % len(centres)] for i in range(n)])
    y = np.arange(n) % classes
    return Tiles(rng.normal(size=(n, 5)) + 2*np.eye(classes, 5)[y], y, centre, np.array([f"{c}{i//12}" for i, c in enumerate(centre)]) if groups else None)


def test_halves_never_part_a_group():
    for seed in range(20):
        t = tissue(100, "a", 0)
        learn, parted = halves(t, seed)
        assert parted == "patients or slides" and not set(t.groups[learn]) & set(t.groups[~learn]) and .2 < learn.mean() < .8
    assert halves(tissue(40, "a", 0, groups=False)) [1] == "tiles" == halves(Tiles(t.x, t.y, t.centre, np.array(["one"]*100)))[1]
    two = Tiles(t.x, t.y, t.centre, np.repeat(["p", "q"], [90, 10]))
    assert all(0 < halves(two, seed)[0].sum() < 100 for seed in range(9)), "neither half is empty, however unequal the groups"


def test_both_probes_have_the_same_counts_and_no_tile_of_test():
    train, test = tissue(240, "abc", 0), tissue(120, "abd", 1)
    for centre, source in (("a", "training tiles"), ("d", "half of its test tiles, parted by patients or slides")):
        own, others, asked, where = held_out(train, test, centre)
        without, within, k = matched(own, others)
        assert where == source and set(asked.centre) == {centre} == set(own.centre) and centre not in others.centre
        assert not set(without.centre) & {centre} and (within.centre == centre).sum() == k >= len(within.y)/2
        assert np.array_equal(np.bincount(without.y), np.bincount(within.y))
        rows = {o.tobytes() for o in asked.x}
        assert not rows & {o.tobytes() for o in np.r_[without.x, within.x]}


def test_tiles_of_an_unknown_centre_take_no_part():
    train, test = tissue(120, ["a", "b", ""], 0), tissue(60, ["a", "b", ""], 1)
    assert "" not in held_out(train, test, "a")[1].centre
    found = centre_shift(train, test, True, 1., WeightedScores, "balanced_accuracy")
    assert [r["centre"] for r in found["centres"]] == ["a", "b"] and all(np.isfinite(r["drop"]) for r in found["centres"])


def test_classes_that_a_centre_lacks_are_left_out_on_both_sides():
    train, test = tissue(240, "ab", 0, classes=3), tissue(120, "ab", 1, classes=3)
    test = test.at(~((test.centre == "a") & (test.y == 1)))
    row = one_centre(train, test, "a", 1., WeightedScores, "balanced_accuracy")
    assert row["classes"] == 2 and row["n_test"] == (test.centre == "a").sum()
    single = test.at(~((test.centre == "a") & (test.y != 0)))
    assert "two are needed" in centre_shift(train, single, ["a"], 1., WeightedScores, "balanced_accuracy")["left_out"]["a"]


def test_centres_bad_names_several_labels_and_none():
    train, test = tissue(60, "ab", 0), tissue(60, "ab", 1)
    with pytest.raises(ValueError, match="shift.centres: there is no centre Z; the table has a, b"): centre_shift(train, test, ["Z"], 1., WeightedScores, "accuracy")
    several = Tiles(train.x, np.eye(2)[train.y], train.centre, None)
    assert set(centre_shift(several, test, True, 1., LabelScores, "macro_auc")["left_out"]) == {"a", "b"}
    nowhere = Tiles(train.x, train.y, np.array([""]*60), None)
    assert centre_shift(nowhere, nowhere, True, 1., WeightedScores, "accuracy") == dict(metric="accuracy", centres=[], left_out={})


# Parameters and plan

def test_parameters_are_off_by_default_and_checked():
    p = ProbeParams()
    assert (p.readouts, p.few_shot, p.shift) == (["mean"], None, None)
    p = typed(ProbeParams, dict(readouts=["mean", "joined"], few_shot={}, shift=dict(hed=[])), "probe.few")
    assert p.few_shot == FewShotParams(shots=[1, 2, 4, 8, 16], episodes=1000) and p.shift == ShiftParams(hed=[], draws=4, centres=True)


@pytest.mark.parametrize("values, message", [
    (dict(readouts=["means"]), r"probe.few.readouts.0: .*did you mean mean"), (dict(readouts=[]), "probe.few.readouts"),
    (dict(readouts=["mean", "mean"]), "lists something twice"), (dict(few_shot=dict(shots=[0])), "probe.few.few_shot.shots.0"),
    (dict(few_shot=dict(episode=9)), "few_shot.episode: unknown parameter; did you mean episodes"),
    (dict(shift=dict(hed=[.05])), "hed must rise from 0"), (dict(shift=dict(hed=[0., .1, .05])), "hed must rise from 0"),
    (dict(shift=dict(hed=[0.])), "a strength above it"), (dict(shift=dict(draws=0)), "shift.draws")])
def test_faulty_parameters(values, message):
    with pytest.raises(ValueError, match=message): typed(ProbeParams, values, "probe.few")


def test_the_plan_refuses_what_the_data_cannot_give():
    table = pd.DataFrame(dict(centre=["a", "b", "", "a"]))
    def store(channels, multi=False):
        return SimpleNamespace(channels=channels, table=table, task=lambda t: SimpleNamespace(classes=["x", "y"], multi=multi),
                               indices=lambda s, t: np.arange(4), targets=lambda i, t: torch.tensor([0, 1, 1, 1]))
    def asked(**probe): return TaskParams(data="d", target="label", probe=ProbeParams(**probe))
    assert probe_faults(store(3), asked()) == probe_faults(store(3), asked(few_shot=dict(shots=[1]), shift={})) == []
    [fault] = probe_faults(store(3), asked(few_shot=dict(shots=[1, 2])))
    assert fault.startswith("few_shot.shots 2: class x has 1 training tiles")
    assert probe_faults(store(3, multi=True), asked(few_shot=dict(shots=[1, 2]))) == []
    assert probe_faults(store(1), asked(shift={})) == ["shift.hed: grey tiles have no stain; set it to []"]
    assert probe_faults(store(1), asked(shift=dict(hed=[], centres=["a", "Q"]))) == ["shift.centres: there is no centre Q; the table has a, b"]


# The report

def write(folder, **facts):
    path = folder/"tissue"/facts["protocol"]/f"{facts['encoder']}-{facts['seed']}"/"scores.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts))


def test_files_of_an_earlier_version_give_no_rows(tmp_path):
    write(tmp_path, protocol="probe", encoder="mae", seed=0, results={"linear": {"all": {}}})
    write(tmp_path, protocol="probe", encoder="sdmae", seed=0, results={"linear": {"all": {}}}, readout=None, few_shot=None, calibration=None,
          shift=dict(hed=None, centres=None))
    assert all(collect_protocol(tmp_path, "tissue", k).empty for k in ROWS) and reliability_of(tmp_path, "tissue", 0) == {}


def test_a_broken_file_is_named(tmp_path):
    write(tmp_path, protocol="probe", encoder="mae", seed=0, results={"linear": {"all": {}}}, few_shot={"1": {"balanced_accuracy": .5}})
    with pytest.raises(ValueError, match="mae-0/scores.json: not a file of scores"): collect_protocol(tmp_path, "tissue", "few_shot")


def test_longer_training_from_scratch_keeps_its_name(tmp_path):
    (y, p), (v, q) = said(100), said(60, seed=1)
    c = {"all": calibration_of(y, [p], (v, q)), "50": calibration_of(y, [p, p])}
    write(tmp_path, protocol="finetune", encoder="random", seed=0, results={"finetune": {"all": {}}}, calibration={"finetune": c, "finetune_long": c})
    df = collect_protocol(tmp_path, "tissue", "calibration")
    assert set(df.encoder) == {"random", "random_long"} and set(df.protocol) == {"finetune"} and len(df) == 6
    table = calibration_table(df)
    assert len(table) == 6 and table.labels.tolist()[:2] == ["50", "50"] and (table.temperature == "1").sum() == 4
    assert set(reliability_of(tmp_path, "tissue", 0)["finetune"]) == {"random", "random_long"}


def test_seeds_are_averaged_in_tables(tmp_path):
    for seed, value in ((0, .5), (1, .7)):
        entry = dict(balanced_accuracy=value, sd=.1, interval=[value - .1, value + .1], tiles=[value - .05, value + .05], n_train=2, episodes=10)
        write(tmp_path, protocol="probe", encoder="mae", seed=seed, results={"linear": {"all": {}}}, few_shot={"1": entry})
    assert few_shot_table(collect_protocol(tmp_path, "tissue", "few_shot")).loc["mae", "1 a class"] == "0.600 [0.550, 0.650]"
