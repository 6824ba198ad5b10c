"""Scores of nuclei against an independent package, by hand, and where there is nothing or too much."""
import numpy as np, pytest
from scipy import ndimage

from sdmae.evaluate.instances import (Counted, aji, aji_plus, count, fitting, instance_scores, numbered, of_type, overlap, quality,
                                      rankings, ratio, scores_of, typed_scores)


def made(seed, size=96, n=14, gaps=True):
    "A true map of discs that may touch, and one predicted: moved, dropped, merged, made up, cut."
    rng, maps = np.random.default_rng(seed), []
    yy, xx = np.mgrid[:size, :size]
    centres = rng.integers(4, size - 4, (n, 2)); radii = rng.integers(2, 9, n)
    for which in range(2):
        m = np.zeros((size, size), np.int32)
        for i, (c, r) in enumerate(zip(centres, radii)):
            if which and rng.random() < .2: continue
            y, x = c + (rng.integers(-2, 3, 2) if which else 0)
            m[(yy - y)**2 + (xx - x)**2 <= (r + (rng.integers(-1, 2) if which else 0))**2] = i + 1
        if which and n > 3: m[m == 2] = 3; m[(m == 4) & (xx > centres[3, 1])] = n + 5; m[:3, :3] = n + 9
        maps.append(m*7 if gaps else m)
    return maps


@pytest.mark.parametrize("seed", range(60))
def test_oracle(seed):
    "PQ, DQ, SQ and Dice of random maps are those of cellseg-metrics."
    oracle = pytest.importorskip("cellseg_metrics")
    truth, pred = made(seed, n=1 + seed % 25)
    c, theirs = count([truth], [pred]), oracle.panoptic_quality(truth, pred)
    s = {k: v[0] for k, v in scores_of(c, np.ones((1, 1))).items()}
    for ours, name in (("pq", "pq"), ("dq", "dq"), ("sq", "sq")): assert s[ours] == pytest.approx(theirs[name], abs=1e-6)
    tp, fp, fn = oracle.get_stats((truth > 0).astype(int), (pred > 0).astype(int))
    assert s["dice"] == pytest.approx(oracle.dice_coef(tp, fp, fn), abs=1e-6)


def plain_aji(truth, pred, plus):
    "Both forms, pixel by pixel and pair by pair: slow, and from the definition."
    t, p = ([m == i for i in np.unique(m) if i] for m in (truth, pred))
    iou = np.array([[(a & b).sum() / (a | b).sum() for b in p] for a in t]).reshape(len(t), len(p))
    pairs = []
    if plus and iou.size:
        from scipy.optimize import linear_sum_assignment
        pairs = [(i, j) for i, j in zip(*linear_sum_assignment(-iou)) if iou[i, j] > 0]
    elif iou.size: pairs = [(i, iou[i].argmax()) for i in range(len(t)) if iou[i].max() > 0]
    shared, union = sum((t[i] & p[j]).sum() for i, j in pairs), sum((t[i] | p[j]).sum() for i, j in pairs)
    union += sum(a.sum() for i, a in enumerate(t) if i not in {o for o, _ in pairs})
    return [shared, union + sum(b.sum() for j, b in enumerate(p) if j not in {o for _, o in pairs})]


@pytest.mark.parametrize("seed", range(30))
def test_aji_from_its_definition(seed):
    truth, pred = made(seed, 64, 1 + seed % 12)
    o = overlap(truth, pred)
    assert aji(o).tolist() == plain_aji(truth, pred, False)
    assert ratio(aji_plus(o)) == pytest.approx(np.divide(*plain_aji(truth, pred, True)))


def test_nasty_maps():
    "Nothing, everything, nested, split, merged."
    none, all_ = np.zeros((8, 8), int), np.ones((8, 8), int)
    assert np.isnan(quality(fitting(overlap(none, none)))["pq"]) and np.isnan(ratio(aji(overlap(none, none))))
    for t, p in ((none, all_), (all_, none)):
        c = count([t], [p])
        assert {k: v[0] for k, v in scores_of(c, np.ones((1, 1))).items()} == dict.fromkeys(("dice", "aji", "aji_plus", "dq", "sq", "pq"), 0)
    assert all(v[0] == 1 for v in scores_of(count([all_], [all_*9]), np.ones((1, 1))).values())
    nested = all_.copy(); nested[3:5, 3:5] = 2
    o = overlap(nested, all_)
    assert fitting(o)[:3].tolist() == [1, 0, 1] and aji(o).tolist() == [60 + 4, 64 + 64]
    assert aji_plus(o).tolist() == [60, 64 + 4]


def test_half_is_not_enough():
    "IoU has to be above 0.5: at exactly one half a nucleus could fit twice."
    truth = np.zeros((2, 4), int); truth[:, :2] = 1
    assert fitting(overlap(truth, np.ones_like(truth)))[:3].tolist() == [0, 1, 1]


def test_ids():
    "Numbers with gaps and of any whole type give the same; others are refused."
    truth, pred = made(1, gaps=False)
    same = scores_of(count([truth], [pred]), np.ones((1, 1)))
    far = scores_of(count([(truth.astype(np.int64)*100_003)], [pred.astype(np.uint16)*3]), np.ones((1, 1)))
    assert same == far
    for bad, word in ((truth.astype(float), "whole numbers"), (-truth, "ids start at 1"), (truth[None], "whole numbers")):
        with pytest.raises(ValueError, match=word): numbered(bad)
    with pytest.raises(ValueError, match="image 1: .*different images"): count([truth, truth], [truth, truth[:-1]])
    with pytest.raises(ValueError, match="1 predictions for 2 maps"): count([truth, truth], [truth])


def test_types():
    "A type's score is that of its nuclei alone; a nucleus without a type is named."
    truth, pred = made(3, n=20)
    kinds = [{int(i): int(i) // 7 % 3 for i in np.unique(m) if i} for m in (truth, pred)]
    for k in range(3):
        alone = [np.where(np.isin(m, [i for i, t in of.items() if t == k]), m, 0) for m, of in zip((truth, pred), kinds)]
        assert fitting(of_type(overlap(truth, pred), *kinds, k)).tolist() == pytest.approx(fitting(overlap(*alone)).tolist())
    s = instance_scores([truth], [pred], [kinds[0]], [kinds[1]], {0: "a", 1: "b", 2: "c"})
    assert s["mpq"] == pytest.approx(np.mean([s["pq_a"], s["pq_b"], s["pq_c"]])) and s["intervals"] == {}
    lost = dict(kinds[1]); lost.pop(next(iter(lost)))
    with pytest.raises(ValueError, match="image 0: predicted nucleus .* has no type"): count([truth], [pred], [kinds[0]], [lost], (0,))


def test_pooled_is_one_large_image():
    "Pooled scores of images are those of the images laid side by side."
    pairs = [made(s, n=9) for s in range(4)]
    beside = [np.concatenate([np.where(m, m + 1000*i, 0) for i, m in enumerate(maps)], 1) for maps in zip(*pairs)]
    many, one = count(*map(list, zip(*pairs))), count([beside[0]], [beside[1]])
    a, b = scores_of(many, np.ones((4, 1)), "pooled"), scores_of(one, np.ones((1, 1)))
    for k in a: assert a[k][0] == pytest.approx(b[k][0]), k


def test_weights_are_copies():
    "An image that is drawn twice counts as two, by every convention."
    pairs = [made(s, n=6) for s in range(3)]; t, p = map(list, zip(*pairs))
    kinds = lambda ms: [{int(i): int(i) % 2 for i in np.unique(m) if i} for m in ms]
    w = np.array([[2.], [0.], [1.]])
    for average in ("images", "pooled"):
        drawn = scores_of(count(t, p), w, average)
        copied = scores_of(count([t[0], t[0], t[2]], [p[0], p[0], p[2]]), np.ones((3, 1)), average)
        for k in drawn: assert drawn[k][0] == pytest.approx(copied[k][0])
    for order in ("images", "types", "pooled"):
        drawn = typed_scores(count(t, p, kinds(t), kinds(p), (0, 1)), w, order)[1]
        ts, ps = [t[0], t[0], t[2]], [p[0], p[0], p[2]]
        assert drawn[0] == pytest.approx(typed_scores(count(ts, ps, kinds(ts), kinds(ps), (0, 1)), np.ones((3, 1)), order)[1][0])


def test_intervals_over_slides():
    "Slides are drawn, not images: with one slide there is no interval, with copies it is that of two slides."
    t, p = map(list, zip(*[made(s, n=8) for s in (0, 1)]))
    assert instance_scores(t, p, groups=["s", "s"])["intervals"] == {}
    two = instance_scores(t, p, groups=["a", "b"], n=200)
    low, high = two["intervals"]["pq"]
    ones = sorted(instance_scores([a], [b])["pq"] for a, b in zip(t, p))
    assert (low, high) == pytest.approx(tuple(ones)) and low < two["pq"] < high


def test_unknown_convention():
    c = count(*[[m] for m in made(0)])
    with pytest.raises(ValueError, match="averages are images, pooled"): scores_of(c, np.ones((1, 1)), "mean")
    with pytest.raises(ValueError, match="skip, zero, one"): scores_of(c, np.ones((1, 1)), empty="count")
    assert len(rankings(dict(a=c))) == 1
