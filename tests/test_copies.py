"""Copies: what is found, what is not, and what happens to it; splits that keep copies and groups together."""
import io, os
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image

from sdmae.data.copies import compare, mark, near_copies, on_rings
from sdmae.data.records import Record, Source
from sdmae.data.store import prepare
from sdmae.params import DataParams
from sdmae.sources.publishers import assign_splits, check_splits, open_source

from test_data import by_split, params, put, real, zipped


def tissue(seed, size=64):
    "Structure on every scale."
    rng, out = np.random.default_rng(seed), np.zeros((size, size, 3))
    for n in (4, 8, 16, 32): out += np.asarray(Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((size, size)))/4
    return out.astype(np.uint8)

def saved(tile, form="PNG", **kwargs):
    b = io.BytesIO(); Image.fromarray(tile).save(b, form, **kwargs)
    return b.getvalue()

def again(tile, quality=60): return np.asarray(Image.open(io.BytesIO(saved(tile, "JPEG", quality=quality))))

def rings(tiles): return on_rings(np.stack([mark(np.ascontiguousarray(t))[1] for t in tiles]))

def source(tiles, splits, labels=None, publisher=False, channels=3):
    records = [Record(f"{i}.png", (labels or "ab"*len(tiles))[i], s, "", "", partial(np.copy, t)) for i, (t, s) in enumerate(zip(tiles, splits))]
    return Source("made", records, ["a","b"], False, [], publisher=publisher, channels=channels)

SPLITS = ["train"]*20 + ["valid"]*10 + ["test"]*10
def tiles(size=32): return [tissue(i, size) for i in range(40)]
def notes(tmp_path, src, **kwargs): return prepare(src, tmp_path/"out", params("x", image_size=32, **kwargs), 1).manifest["notes"]


# Marks

@pytest.mark.parametrize("size", [32, 48, 50, 96, 224])
def test_turns_flips_and_jpegs_are_alike(size):
    tile = tissue(1, size)
    eight = [np.rot90(t, k) for t in (tile, tile[:, ::-1]) for k in range(4)]
    for others, least in ((eight, .998), ([again(np.ascontiguousarray(t), 90 if size < 48 else 70) for t in eight], .96)):
        match, apart = compare(rings([tile]*8), rings(others))
        assert match.min() > least and apart.max() < 2.5

def test_other_tiles_are_not():
    match, apart = compare(rings([tissue(0)]*300), rings([tissue(i) for i in range(1, 301)]))
    assert match.max() < .9 and apart.min() > 5

def test_smooth_blots_of_other_grey_are_no_copies():
    "Correlation alone would take any two bright spots for one."
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    spots = [np.repeat((b*np.exp(-(x**2 + y**2)/w)).astype(np.uint8)[..., None], 3, 2) for b, w in ((250, .2), (180, .3), (120, .25))]
    assert near_copies(rings(spots), np.array(["train", "valid", "test"])) == {}

def test_near_copies_by_brute_force():
    "Against all pairs, on tiles half of which are copies of others."
    rng = np.random.default_rng(0)
    some = [tissue(i, 32) for i in range(40)]
    some += [again(np.ascontiguousarray(np.rot90(some[i], rng.integers(4))), 80) for i in rng.integers(0, 40, 40)]
    split, marks = rng.choice(["train", "valid", "test"], 80), rings(some)
    rank = {"train":0, "valid":1, "test":2}
    i, j = np.triu_indices(80, 1)
    match, apart = compare(marks[i], marks[j])
    hit = (match >= .95) & (apart <= 2.5)
    expected = {b if rank[split[b]] > rank[split[a]] else a for a, b in zip(i[hit], j[hit]) if split[a] != split[b]}
    found = near_copies(marks, split)
    assert expected and set(found) == expected and all(rank[split[a]] < rank[split[b]] for b, a in found.items())

def test_the_search_among_alike_tiles_ends(tmp_path):
    "Tiles of one kind that are no copies: all pairs are candidates."
    rng = np.random.default_rng(0)
    grey = lambda a, n: np.asarray(Image.fromarray(a.astype(np.float32)).resize((n, n), Image.Resampling.BICUBIC))
    base, some = grey(rng.integers(60, 200, (5, 5)), 32), []
    for n in (grey(rng.normal(0, 1, (8, 8)), 32) for _ in range(60)): some.append((base + (n - n.mean())/n.std()*3).clip(0, 255).round().astype(np.uint8)[..., None].repeat(3, 2))
    split = np.array(["train","test"]*30)
    near_copies(rings(some), split, said := [])
    assert said == []
    near_copies(rings(some), split, said, most=300)
    assert said == ["warning: near copies were looked for in 300 pairs of similar tiles, not in the rest"]

def test_many_tiles_take_seconds():
    "20,000 at a time and no table of all pairs; none of them is a copy."
    import time, tracemalloc
    marks = np.clip(np.repeat(rings([tissue(i, 32) for i in range(100)]), 200, 0) + np.random.default_rng(0).normal(0, 12, (20000, 256)), 0, 255).astype(np.uint8)
    tracemalloc.start(); start = time.process_time()
    assert near_copies(marks, np.resize(["train", "valid", "test"], 20000)) == {}
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 400e6


# Preparing

def test_an_exact_copy_over_splits_is_refused(tmp_path):
    some = tiles(); some[35] = some[3]
    with pytest.raises(ValueError, match="1 of test in train; the first is 35.png = 3.png.*data.copies: warn"): notes(tmp_path, source(some, SPLITS))
    assert not list(tmp_path.iterdir())
    assert notes(tmp_path, source(some, SPLITS), copies="warn")[0].startswith("warning: copies over splits, pixel for pixel: 1 of test in train")
    assert notes(tmp_path, source(some, SPLITS, publisher=True))[0].startswith("warning: copies over splits")

def test_copies_that_become_equal_by_fitting_are_found(tmp_path):
    "One is a border larger, which the crop takes away."
    some = tiles(); some[25] = np.pad(some[3], ((4,4), (4,4), (0,0)))
    some = [t if len(t) == 40 else np.pad(t, ((4,4), (4,4), (0,0)), constant_values=9) for t in some]
    with pytest.raises(ValueError, match="1 of valid in train"): notes(tmp_path, source(some, SPLITS), crop=32)

def test_near_copies_are_a_warning(tmp_path):
    some = tiles(); some[35], some[25] = again(np.rot90(some[3]).copy(), 95), np.ascontiguousarray(some[4][:, ::-1])
    assert notes(tmp_path, source(some, SPLITS)) == ["warning: near copies over splits, turned or saved anew: at least 1 of test in train, 1 of valid in train; the first is 25.png = 4.png"]

def test_grey_tiles(tmp_path):
    some = [t[..., 0].copy() for t in tiles()]; some[35] = np.rot90(some[3]).copy()
    assert "1 of test in train; the first is 35.png = 3.png" in notes(tmp_path, source(some, SPLITS, channels=1))[0]

def test_one_picture_of_two_labels_within_a_split(tmp_path):
    some = tiles(); some[8] = some[3]
    assert notes(tmp_path, source(some, SPLITS)) == ["warning: 1 picture has more than one label; the first is 3.png (b) = 8.png (a)", "1 tiles are copies of another tile of their own split"]

def test_nothing_to_say_of_different_tiles(tmp_path): assert notes(tmp_path, source(tiles(), SPLITS)) == []

def test_tiles_of_one_colour_are_told_and_not_refused(tmp_path):
    "Glass is white on every slide."
    some = tiles()
    for i in (3, 25, 35): some[i] = np.full_like(some[0], 255)
    assert notes(tmp_path, source(some, SPLITS)) == ["warning: tiles of one colour, equal over splits: 1 of test in train, 1 of valid in train; the first is 25.png = 3.png"]

def test_workers_find_the_same(tmp_path):
    some = tiles(); some[35] = again(np.rot90(some[3]).copy(), 80)
    src = source(some*20, SPLITS*20, publisher=True)
    assert prepare(src, tmp_path/"a", params("x"), 1).manifest == prepare(src, tmp_path/"b", params("x"), 2).manifest


# Own data whose split is drawn

def folder_of(tmp_path, n=30, pack=put, name="data.zip", same=()):
    files = {f"{l}/{i}.png": saved(tissue(i + 100*(l == "b"), 16)) for l in "ab" for i in range(n)}
    return pack(tmp_path/name, {**files, **{b: files[a] for a, b in same}})

@pytest.mark.parametrize("pack", [put, zipped])
@pytest.mark.parametrize("seed", range(3))
def test_copies_stay_together_in_a_draw(tmp_path, pack, seed):
    pairs = [(f"{l}/{i}.png", f"{l}/copy {i}.png") for l in "ab" for i in range(0, 30, 2)]
    path = folder_of(tmp_path, pack=pack, same=pairs)
    s = open_source(params(path, seed=seed))
    split = {r.path.removeprefix("data.zip/"): r.split for r in s.records}
    assert all(split[a] == split[b] for a, b in pairs) and set(split.values()) == {"train", "valid", "test"}
    assert "60 tiles are equal files" in " ".join(s.notes)
    assert not [n for n in prepare(s, tmp_path/"out", params(path), 1).manifest["notes"] if n.startswith("warning: copies")]

def test_copies_torn_by_a_draw_have_a_way_out(tmp_path):
    "Equal pixels in unequal files; the advice fits a split that was drawn."
    put(tmp_path, {f"{l}/{i}.{f.lower()}": saved(tissue(i + 40*(l == "b"), 32), f) for l in "ab" for i in range(12) for f in ("PNG", "BMP")})
    with pytest.raises(ValueError, match="keep both in one split: in a CSV by the column split, or, where the split is drawn, by one group"):
        prepare(open_source(params(tmp_path, image_size=32)), tmp_path/"out", params("x", image_size=32), 1)

def test_a_draw_without_copies_is_as_before(tmp_path):
    "Two files more that are no copies of one another, in zip and folder; the draw by the rule of old."
    a, b = (open_source(params(folder_of(tmp_path, pack=p, name=n))) for p, n in ((put, "f"), (zipped, "z.zip")))
    from sdmae.sources.publishers import draw_plain
    old = draw_plain([replace(r, split="") for r in a.records], .2, 0)
    assert [r.split for r in a.records] == [r.split for r in b.records] == [r.split for r in old]

def test_equal_files_with_two_labels_are_told(tmp_path):
    path = folder_of(tmp_path, same=[("a/1.png", "b/copy.png")], pack=put)
    got = prepare(open_source(params(path)), tmp_path/"out", params(path), 1).manifest["notes"]
    assert any("1 picture has more than one label; the first is data.zip/a/1.png (a) = data.zip/b/copy.png (b)" in n for n in got)

def test_patients_that_share_a_picture_stay_together(tmp_path):
    put(tmp_path, {f"{i}.png": saved(tissue(i, 16)) for i in range(40)} | {"40.png": saved(tissue(0, 16))})
    pd.DataFrame(dict(path=[f"{i}.png" for i in range(41)], label=list("ab"*20) + ["a"], group=[f"p{i%20}" for i in range(40)] + ["p7"])).to_csv(tmp_path/"t.csv", index=False)
    for seed in range(5):
        s = open_source(params(tmp_path/"t.csv", "csv", seed=seed))
        splits = defaultdict(set)
        for r in s.records: splits[r.group].add(r.split)
        assert splits["p0"] == splits["p7"] and all(len(v) == 1 for v in splits.values()) and {r.group for r in s.records} == {f"p{i}" for i in range(20)}

def test_few_files_are_read_for_it(tmp_path, monkeypatch):
    "Files of other sizes, and of equal size that differ in the middle, are not read to their end."
    from sdmae.data import copies
    path, read = folder_of(tmp_path, pack=put, same=[("a/1.png", "a/x.png")]), []
    monkeypatch.setattr(copies, "read_bytes", lambda place, name, shown: read.append(name) or (place/name).read_bytes())
    open_source(params(path))
    assert sorted(read) == ["a/1.png", "a/x.png"]

def test_a_publishers_folder_is_warned_of(tmp_path):
    files = {f"{s}/{l}/{i}.png": saved(tissue(i + 100*(l == "1") + 1000*k, 16)) for k, s in enumerate(("train", "valid", "test")) for l in "01" for i in range(6)}
    files["test/1/0.png"] = files["train/1/0.png"]
    p = params(put(tmp_path/"pcam", files), "pcam")
    assert any(n.startswith("warning: copies over splits, pixel for pixel: 1 of test in train") for n in prepare(open_source(p), tmp_path/"out", p, 1).manifest["notes"])
    with pytest.raises(ValueError, match="copies over splits"): prepare(open_source(params(tmp_path/"pcam")), tmp_path/"own", params(tmp_path/"pcam"), 1)


# Splits by group

def slides(n, per, rare, few=6): return [Record(f"s{s}_{i}", "tumor" if s < rare and i < few else "normal", "", f"s{s}", "", None) for s in range(n) for i in range(per)]

@pytest.mark.parametrize("n, rare", [(12, 4), (12, 3), (40, 3), (6, 3), (3, 3)])
def test_every_class_in_every_split_where_that_can_be(n, rare):
    records = slides(n, 20, rare)
    for seed in range(30):
        drawn = assign_splits(records, .15, seed)
        assert len({(r.split, r.label) for r in drawn}) == 6 and check_splits(drawn, ["normal", "tumor"], "x") == []
        splits = defaultdict(set)
        for r in drawn: splits[r.group].add(r.split)
        assert all(len(v) == 1 for v in splits.values())
    assert [r.split for r in assign_splits(records, .15, 3)] == [r.split for r in assign_splits(records, .15, 3)]

def test_several_rare_classes():
    records = [Record(f"s{s}_{i}", f"c{s//3}" if s < 24 and i < 3 else "normal", "", f"s{s}", "", None) for s in range(60) for i in range(10)]
    for seed in range(3):
        drawn = assign_splits(records, .2, seed)
        shares = Counter(r.split for r in drawn)
        assert len({(r.split, r.label) for r in drawn}) == 27 and shares["train"] > 300 and min(shares.values()) > 60

def test_valid_alone_is_dealt_from_train():
    records = [replace(r, split="train") for r in slides(10, 10, 2)] + [Record(f"t{i}", "ab"[i%2].replace("a", "tumor").replace("b", "normal"), "test", "t", "", None) for i in range(10)]
    for seed in range(20):
        drawn = assign_splits(records, .15, seed)
        assert {(r.split, r.label) for r in drawn} >= {(s, l) for s in ("train", "valid") for l in ("normal", "tumor")} and all(r.split == "test" for r in drawn[100:])

def test_a_draw_that_was_good_stays():
    from sdmae.sources.publishers import draw_plain
    records = slides(40, 20, 30)
    assert [r.split for r in assign_splits(records, .15, 0)] == [r.split for r in draw_plain(records, .15, 0)]

@pytest.mark.parametrize("group, words", [
    (lambda i: "P1", "1 groups .patients or slides. in all"), (lambda i: f"P{i%2}", "1 of 2 groups .patients or slides. hold 'a'"),
    (lambda i: f"P{i//12}", "2 groups .patients or slides. in all"), (lambda i: f"P{i//4}" if i%2 else "P9", "1 of 7 groups .patients or slides. hold 'a'")])
def test_too_few_groups_are_the_reason(tmp_path, group, words):
    put(tmp_path, {f"{i}.png": saved(tissue(i, 16)) for i in range(24)})
    pd.DataFrame(dict(path=[f"{i}.png" for i in range(24)], label=list("ab"*12), group=[group(i) for i in range(24)])).to_csv(tmp_path/"t.csv", index=False)
    with pytest.raises(ValueError, match=f"{words}.*3 splits need at least 3 groups of each class"): open_source(params(tmp_path/"t.csv", "csv"))


# Public sets

def prepared(tmp_path, p): return [n for n in prepare(open_source(p), tmp_path/"out", p).manifest["notes"] if "cop" in n]

def test_real_leaky_split_is_told_and_the_clean_one_is_not(tmp_path):
    "LC25000's copies are turned, flipped and zoomed; the first two kinds are found."
    import zipfile
    with zipfile.ZipFile(real("lc25000_lung_224px_jpg.zip")) as z: z.extractall(tmp_path)
    rows = pd.read_csv(tmp_path/"labels.csv").rename(columns=dict(file="path"))
    rows = rows[rows.group.isin(sorted(rows.group.unique())[::4])]
    rows.drop(columns="split_leaky").to_csv(tmp_path/"clean.csv", index=False)
    rows.drop(columns=["group", "split"]).rename(columns=dict(split_leaky="split")).to_csv(tmp_path/"leaky.csv", index=False)
    assert prepared(tmp_path, params(tmp_path/"clean.csv", "csv", image_size=64)) == []
    [note] = prepared(tmp_path, params(tmp_path/"leaky.csv", "csv", image_size=64))
    assert note.startswith("warning: near copies over splits") and " of test in train" in note

def test_real_pcam_has_copies_in_its_test_split_only(tmp_path):
    "A quarter of the set; pairs within a split are no leak."
    assert [n for n in prepared(tmp_path, params(real("pcam_12k_96px_jpg.zip"), "pcam", image_size=48, limit=1000)) if "over splits" in n] == []
