"""Annotated nuclei in every layout, on tiny copies, on real sets where they are present, and on bad input."""
import io, json, zipfile
from pathlib import Path

import numpy as np, pytest
from PIL import Image
from pydantic import ValidationError
from scipy.io import savemat
from skimage.measure import label

from sdmae.params import DataParams, MasksParams
from sdmae.sample.nuclei import make_nuclei_sample
from sdmae.sources.masks import Pair, instances, load_pairs, save_pairs, toy_nuclei, type_names
from sdmae.sources.nuclei import CONSEP, MERGED, PANNUKE, how_counted, merged_channels, read_nuclei, split_in
from sdmae.sources.polygons import features_of, read_geojson, rings_of, write_geojson

REAL = Path(__file__).parents[2]/"shared"/"realdata"
needs = lambda name: pytest.mark.skipif(not (REAL/name).exists(), reason=f"{name} is not beside the project (../shared/realdata)")


def png(array):
    b = io.BytesIO(); Image.fromarray(np.asarray(array)).save(b, "PNG")
    return b.getvalue()

def mat(**arrays):
    b = io.BytesIO(); savemat(b, arrays)
    return b.getvalue()

def put(folder, contents):
    for name, data in contents.items():
        (Path(folder)/name).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder)/name).write_bytes(data)
    return Path(folder)

def zipped(file, contents):
    with zipfile.ZipFile(file, "w") as z:
        for name, data in contents.items(): z.writestr(name, data)
    return Path(file)

def kinds_of(m, n=7): return {int(i): 1 + int(i) % n for i in np.unique(m) if i}

def painted(m, kinds): return np.array([0, *(kinds.get(i, 0) for i in range(1, int(m.max()) + 1))], np.uint8)[m]

def same(a, b):
    "Whether two maps are one but for their numbers."
    pairs = {*zip(a.ravel().tolist(), b.ravel().tolist())}
    return len(pairs) == len(np.unique(a)) == len(np.unique(b)) and all((x == 0) == (y == 0) for x, y in pairs)

def read(place, layout, **kwargs): return read_nuclei(place, MasksParams(layout=layout, **kwargs))


# CoNSeP, and others of its form

def consep(splits=("Train", "Train", "Test"), change=lambda found: found, image=lambda o: o):
    out = {}
    for i, split in enumerate(splits):
        x, m = toy_nuclei(i, 48, 8); k = painted(m, kinds_of(m))
        found = change(dict(inst_map=m.astype(float), type_map=k.astype(float), inst_type=np.array([[kinds_of(m)[j]] for j in np.unique(m)[1:].tolist()])))
        out |= {f"CoNSeP/{split}/Images/{split.lower()}_{i}.png": png(image(x)), f"CoNSeP/{split}/Labels/{split.lower()}_{i}.mat": mat(**found),
                f"CoNSeP/{split}/Overlay/{split.lower()}_{i}.png": png(x)}
    return out

@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kept", [("inst_map", "type_map", "inst_type"), ("inst_map", "type_map"), ("inst_map", "inst_type")])
def test_consep(tmp_path, packed, kept):
    contents = consep(change=lambda f: {k: f[k] for k in kept})
    pairs, names, _ = read(zipped(tmp_path/"a.zip", contents) if packed else put(tmp_path/"a", contents), "consep")
    assert [(p.name, p.slide, p.split) for p in pairs] == [("test_2", "test_2", "test"), ("train_0", "train_0", "train"), ("train_1", "train_1", "train")]
    assert names == CONSEP and {*MERGED.values()} == {*CONSEP} and [MERGED[k] for k in (3, 4)] == [3, 3] and [MERGED[k] for k in (5, 6, 7)] == [4]*3
    for p in pairs:
        x, m = toy_nuclei(int(p.name[-1]), 48, 8)
        assert (p.read() == x).all() and (p.read_mask() == m).all() and p.read_mask().dtype == np.int32
        assert p.read_types() == {i: MERGED[k] for i, k in kinds_of(m).items()}

def test_the_form_of_consep_without_types(tmp_path):
    "As HoVer-Net's authors ship Kumar and CPM: no types, and no split by that name."
    contents = {k.replace("/Train/", "/train_all/").replace("/Test/", "/test_same/"): v for k, v in consep(change=lambda f: dict(inst_map=f["inst_map"])).items()}
    pairs, names, _ = read(put(tmp_path, contents), "consep", group=r"^([a-z]+)_")
    assert names == {} and all(p.read_types is None for p in pairs) and [(p.split, p.slide) for p in pairs] == [("test", "test"), ("train", "train"), ("train", "train")]

def faulty(key, value): return lambda f: f | {key: value(f[key])}

@pytest.mark.parametrize("contents, message", [
    (lambda: consep(image=lambda x: x[:40]), r"test_2: the image is \(40, 48\), its map \(48, 48\)"),
    (lambda: consep(change=faulty("type_map", lambda t: t*0)), r"Labels/\w+_\d.mat: nucleus 1 has no type"),
    (lambda: consep(change=faulty("type_map", lambda t: t[:9])), r"type_map is \(9, 48\), inst_map \(48, 48\)"),
    (lambda: consep(change=faulty("type_map", lambda t: t + 3*(t > 0))), "none of CoNSeP's, 1 … 7"),
    (lambda: consep(change=faulty("inst_map", lambda m: m + .5)), "ids are whole"),
    (lambda: consep(change=faulty("inst_map", lambda m: -m)), "ids are whole"),
    (lambda: consep(change=faulty("inst_map", lambda m: np.arange(48*48).reshape(48, 48).astype(np.uint8))), "8-bit labels with all of their 255 numbers"),
    (lambda: consep(change=lambda f: dict(map=f["inst_map"])), "has no inst_map"),
    (lambda: consep(change=lambda f: dict(inst_map=f["inst_map"], inst_type=f["inst_type"][1:])), "no inst_type for each of its 8 nuclei"),
    (lambda: consep() | {"CoNSeP/Test/Labels/test_2.mat": b"no"}, r"test_2\.mat: is no MATLAB file"),
    (lambda: {k: v for k, v in consep().items() if "train_1.mat" not in k}, r"Images/train_1\.png has no annotations, train_1\.mat"),
    (lambda: {k: v for k, v in consep().items() if "train_1.png" not in k}, r"Labels/train_1\.mat has no image of that name"),
    (lambda: consep() | {"CoNSeP/Train/Images/train_1.jpg": b""}, r"2 images of that name: .*train_1\.jpg, .*train_1\.png"),
    (lambda: consep() | {"more/train_1.mat": b""}, "have one name")])
def test_faulty_consep(tmp_path, contents, message):
    with pytest.raises(ValueError, match=message): read(put(tmp_path, contents()), "consep")

def test_the_sample_is_of_this_form(tmp_path):
    make_nuclei_sample(tmp_path/"a.zip", n={"Train": 2, "Test": 1})
    pairs, names, _ = read(tmp_path/"a.zip", "consep")
    assert names == CONSEP and [p.split for p in pairs] == ["test", "train", "train"]
    touching = [((m := p.read_mask())[:, 1:] != m[:, :-1]) & (m[:, 1:] > 0) & (m[:, :-1] > 0) for p in pairs]
    assert all(t.any() for t in touching) and all({*p.read_types()} == {*np.unique(p.read_mask())} - {0} for p in pairs)


# MoNuSeg and Kumar

def xml(m):
    "Corners of outlines, in pixels from the centre of the first one."
    points = lambda i: "".join(f'<Vertex X="{x - .5}" Y="{y - .5}" Z="0"/>' for x, y in rings_of(m == i, 0, 0)[0])
    return f"<Annotations><Annotation><Regions>{''.join(f'<Region><Vertices>{points(i)}</Vertices></Region>' for i in np.unique(m) if i)}</Regions></Annotation></Annotations>".encode()

def discs(seed): return toy_nuclei(seed, 48, 5, (4., 6.))

def monuseg():
    x, y = discs(0), discs(1)
    return {"MoNuSeg 2018 Training Data/Tissue Images/TCGA-1.tif": png(x[0]), "MoNuSeg 2018 Training Data/Annotations/TCGA-1.xml": xml(x[1]),
            "MoNuSeg 2018 Training Data/Binary masks/TCGA-1.png": png(x[0]), "MoNuSegTestData/TCGA-2.tif": png(y[0]), "MoNuSegTestData/TCGA-2.xml": xml(y[1])}

def test_outlines_in_xml(tmp_path):
    pairs, names, _ = read(put(tmp_path, monuseg()), "xml")
    assert names == {} and [(p.name, p.slide, p.split) for p in pairs] == [("TCGA-1", "TCGA-1", "train"), ("TCGA-2", "TCGA-2", "test")]
    for i, p in enumerate(pairs): assert ((p.read_mask() > 0) == (discs(i)[1] > 0)).mean() > .995 and p.read_mask().max() == len(np.unique(discs(i)[1])) - 1

REGION = '<Annotation><Region><Vertices>{}</Vertices></Region></Annotation>'

@pytest.mark.parametrize("data, message", [
    (b"no", "TCGA-1.xml: is no XML"), (b"<Annotations/>", "TCGA-1.xml has no region"), (REGION.format('<Vertex X="1" Y="2"/>').encode(), "no region"),
    (REGION.format("".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in ((200, 200), (220, 200), (220, 230)))).encode(), r"region 1 lies at x .* outside the image of 48 × 48 px")])
def test_faulty_xml(tmp_path, data, message):
    contents = monuseg(); contents["MoNuSeg 2018 Training Data/Annotations/TCGA-1.xml"] = data
    with pytest.raises(ValueError, match=message): read(put(tmp_path, contents), "xml")

@pytest.mark.parametrize("folder, split", [("CoNSeP/Train/Images", "train"), ("a/val", "valid"), ("MoNuSegTestData", "test"), ("TestSet/train", "train"),
                                           ("latest", ""), ("Evaluation", ""), ("trainer_test", "test"), ("", "")])
def test_splits_by_folders(folder, split): assert split_in(f"{folder}/train_1.png") == split


# PanNuke

def pannuke(folder, masks=None, images=None, folds=(1, 2, 3)):
    for f in folds:
        m = np.zeros((2, 16, 16, 6)); m[:, :4, :4, 0] = 7; m[:, 8:12, :4, 0] = 9; m[0, :4, 8:12, 2] = 7; m[0, 2:6, 2:6, 4] = 3
        x = np.random.default_rng(f).integers(0, 256, (2, 16, 16, 3)).astype(float)
        for kind, a in (("images", x if images is None else images), ("masks", m if masks is None else masks)):
            (at := folder/f"Fold {f}"/kind/f"fold{f}").mkdir(parents=True)
            np.save(at/f"{kind}.npy", a)
    return folder

def test_pannuke(tmp_path):
    pairs, names, _ = read(pannuke(tmp_path), "pannuke")
    assert [(p.name, p.slide, p.split) for p in pairs] == [(f"fold{f}_{i:05d}", f"fold{f}_{i:05d}", "test" if f == 3 else "train") for f in (1, 2, 3) for i in (0, 1)]
    assert names == PANNUKE and pairs[0].read_types() == {1: 1, 2: 1, 3: 3, 4: 5} and pairs[1].read_types() == {1: 1, 2: 1}
    assert [int((pairs[0].read_mask() == i).sum()) for i in range(1, 5)] == [12, 16, 16, 16] and pairs[0].read().dtype == np.uint8

def test_a_nucleus_hidden_by_another():
    "A channel that covers a nucleus of an earlier one altogether takes its place, and no type without pixels is left."
    m = np.zeros((4, 4, 6)); m[0, 0, 0] = 5; m[:2, :2, 1] = 5
    out, types = merged_channels(m)
    assert types == {2: 2} and set(np.unique(out)) == {0, 2}
    out, types = merged_channels(np.zeros((4, 4, 6)))
    assert types == {} and not out.any()

@pytest.mark.parametrize("given, message", [
    (dict(masks=np.zeros((2, 16, 16, 5))), r"\(2, 16, 16, 5\) masks for \(2, 16, 16, 3\) images"), (dict(masks=np.zeros((3, 16, 16, 6))), r"\(3, 16, 16, 6\) masks for"),
    (dict(masks=np.full((2, 16, 16, 6), .5)), "ids are whole")])
def test_faulty_pannuke(tmp_path, given, message):
    with pytest.raises(ValueError, match=message): read(pannuke(tmp_path, **given), "pannuke")

def test_pannuke_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="unpack"): read(zipped(tmp_path/"a.zip", {"a": b""}), "pannuke")
    with pytest.raises(FileNotFoundError, match="no images.npy"): read(put(tmp_path/"b", {"x.npy": b""}), "pannuke")
    (place := pannuke(tmp_path/"c"))
    (place/"Fold 2/masks/fold2/masks.npy").write_bytes(b"no")
    with pytest.raises(ValueError, match="fold2: an array that cannot be read"): read(place, "pannuke")
    (place/"Fold 2/masks/fold2/masks.npy").unlink()
    with pytest.raises(FileNotFoundError, match="has no masks beside it"): read(place, "pannuke")


# Pairs, with types or not

def pairs_of(n=4, types=True, side="instances", dtype=np.uint16, prefix=lambda i: ""):
    out = {}
    for i in range(n):
        x, m = toy_nuclei(i, 48, 6); name = f"{'AB'[i % 2]}_{i}.png"
        out |= {f"{prefix(i)}images/{name}": png(x), f"{prefix(i)}{side}/{name}": png(m.astype(dtype))}
        if types: out[f"{prefix(i)}types/{name}"] = png(painted(m, kinds_of(m, 2)))
    return out

@pytest.mark.parametrize("side", ["masks", "labels", "instances"])
def test_pairs_with_types(tmp_path, side):
    pairs, names, notes = read(zipped(tmp_path/"a.zip", pairs_of(side=side)), "pairs", types=["round", "long"])
    assert names == {1: "round", 2: "long"} and [p.slide for p in pairs] == ["A", "A", "B", "B"] and notes == []
    for p in pairs: assert p.read_types() == kinds_of(toy_nuclei(int(p.name[2:]), 48, 6)[1], 2)

def test_splits_of_pairs(tmp_path):
    "Folders are the split where that is said, and are pointed out where it is not."
    place = put(tmp_path, pairs_of(prefix=lambda i: "Train/" if i < 3 else "test/", types=False))
    pairs, names, notes = read(place, "pairs", folders="split")
    assert [p.split for p in pairs] == ["train"]*3 + ["test"] and names == {} and notes == []
    pairs, _, notes = read(place, "pairs")
    assert [p.split for p in pairs] == [""]*4 and "are not read as splits" in notes[0]

def test_labels_of_32_bits(tmp_path):
    x, m = toy_nuclei(0, 48, 6)
    b = io.BytesIO(); Image.fromarray(m.astype(np.int32)*100_003).save(b, "TIFF")
    pairs, _, _ = read(put(tmp_path, {"images/A_0.png": png(x), "labels/A_0.tif": b.getvalue()}), "pairs")
    assert (pairs[0].read_mask() == m.astype(np.int64)*100_003).all() and same(instances(pairs[0].read_mask()), m)

@pytest.mark.parametrize("change, types, message", [
    (lambda c: c, [], r"A_0: nucleus \d is of type \d, which has no name. Name types 1, 2, … in masks.types; there are none"),
    (lambda c: c, ["one"], "is of type 2, which has no name.*there are one"),
    (lambda c: c | {"types/A_0.png": png(np.zeros((48, 48), np.uint8))}, ["a", "b"], r"types/A_0\.png: nucleus 1 has no type"),
    (lambda c: c | {"types/A_0.png": png(np.zeros((48, 40), np.uint8))}, ["a", "b"], r"types/A_0\.png is 40 × 48 px: they do not belong together"),
    (lambda c: c | {"instances/A_0.png": png(np.zeros((40, 48), np.uint8))}, ["a", "b"], r"instances/A_0\.png is 48 × 40 px: they do not belong together"),
    (lambda c: {k: v for k, v in c.items() if k != "types/B_1.png"}, ["a", "b"], r"images/B_1\.png has no map of types"),
    (lambda c: c | {"types/C_9.png": c["types/A_0.png"]}, ["a", "b"], r"types/C_9\.png has no image"),
    (lambda c: c | {"instances/A_0.png": png(np.arange(48*48).reshape(48, 48).astype(np.uint8))}, ["a", "b"], r"instances/A_0\.png: 8-bit labels with all of their 255")])
def test_faulty_pairs(tmp_path, change, types, message):
    with pytest.raises(ValueError, match=message): read(put(tmp_path, change(pairs_of())), "pairs", types=types)

def test_8_bits_suffice_for_254_nuclei(tmp_path):
    m = np.zeros((48, 48), np.uint8); m.ravel()[:254] = np.arange(1, 255)
    pairs, _, _ = read(put(tmp_path, {"images/A_0.png": png(np.zeros((48, 48, 3), np.uint8)), "labels/A_0.png": png(m)}), "pairs")
    assert instances(pairs[0].read_mask()).max() == 254

def test_binary_masks_are_told():
    m = toy_nuclei(0, 48, 6)[1]
    assert how_counted([m, (m > 0)*np.uint8(255), m.astype(np.uint8)]) == ["nuclei of 1 of 3 images are connected regions of a binary mask: those that touch are one"]
    assert how_counted([m]) == []

def test_empty_maps(tmp_path):
    "One is a field without nuclei, and is noted; where all are, the maps are wrong."
    empty = png(np.zeros((48, 48), np.uint16))
    pairs, names, notes = read(put(tmp_path/"a", pairs_of() | {"instances/A_0.png": empty}), "pairs", types=["a", "b"])
    assert pairs[0].read_types() == {}
    save_pairs(pairs, tmp_path/"out", "x", notes, names)
    assert "1 of 4 masks have no nucleus, the first is A_0" in json.loads((tmp_path/"out/manifest.json").read_text())["notes"]
    assert load_pairs(tmp_path/"out")[0].read_types() == {} and not load_pairs(tmp_path/"out")[0].read_mask().any()
    pairs, names, _ = read(put(tmp_path/"b", pairs_of() | {k: empty for k in pairs_of() if "instances" in k}), "pairs", types=["a", "b"])
    with pytest.raises(ValueError, match="none of 4 masks has a nucleus"): save_pairs(pairs, tmp_path/"none", "x", [], names)
    assert not (tmp_path/"none").exists()


# The prepared form

@pytest.mark.parametrize("gaps", [1, 1009])
def test_prepared(tmp_path, gaps):
    "Numbers with gaps, types, splits, names and resolution come back as they were."
    made = []
    for i in range(3):
        x, m = toy_nuclei(i, 40, 6); m = m.astype(np.int32)*gaps
        made.append(Pair(f"n{i}", f"s{i}", lambda x=x: x, lambda m=m: m, lambda m=m: kinds_of(m, 4), ("train", "train", "test")[i]))
    save_pairs(made, tmp_path/"out", "toy", ["told"], {1: "a", 2: "b", 3: "c", 4: "d"}, .25)
    back = load_pairs(tmp_path/"out")
    assert type_names(tmp_path/"out") == {1: "a", 2: "b", 3: "c", 4: "d"} and json.loads((tmp_path/"out/manifest.json").read_text())["mpp"] == .25
    for p, q in zip(made, back, strict=True):
        assert (p.name, p.slide, p.split, p.read_types()) == (q.name, q.slide, q.split, q.read_types())
        assert (p.read() == q.read()).all() and (p.read_mask() == q.read_mask()).all() and q.read_mask().dtype == np.int32

def test_nothing_there(tmp_path):
    for layout in ("pairs", "consep", "pannuke", "xml", "geojson"):
        with pytest.raises(FileNotFoundError, match="none does not exist"): read(tmp_path/"none", layout)
    (tmp_path/"empty").mkdir()
    for layout in ("consep", "xml", "geojson"):
        with pytest.raises(FileNotFoundError, match="nothing in it that ends in"): read(tmp_path/"empty", layout)

def test_a_layout_nobody_knows():
    with pytest.raises(ValidationError, match="layout"): MasksParams(layout="coco")
    with pytest.raises(ValidationError, match="mpp"): DataParams(name="a", adapter="masks", path="a", masks=dict(mpp=0))


# GeoJSON, there and back

@pytest.mark.parametrize("seed", range(8))
def test_outlines_there_and_back(tmp_path, seed):
    "Touching, cut into pieces, with holes, at the border, single pixels, numbers with gaps: every pixel comes back."
    rng = np.random.default_rng(seed)
    m = toy_nuclei(seed, 64, 20, (3., 9.))[1].astype(np.int32)*3
    m[rng.random(m.shape) < (0, .02, .3)[seed % 3]] = 0                 # holes, and more holes
    m[0, :], m[:, 0], m[63, 63], m[10:20, 30] = 100, 101, 102, 103
    kinds = kinds_of(m, 3)
    write_geojson(tmp_path/"a.geojson", m, kinds, {1: "a", 2: "b", 3: "c"}, {i: {"probability": .5} for i in kinds})
    back, found = read_geojson((tmp_path/"a.geojson").read_bytes(), m.shape, "a")
    assert same(m, back)
    of = {int(b): int(a) for a, b in zip(m.ravel(), back.ravel()) if a}
    assert {i: " abc"[kinds[of[i]]] for i in of} == found
    assert back.dtype == np.int32

def test_what_qupath_expects(tmp_path):
    m = np.zeros((9, 9), int); m[2:5, 3:7] = 4
    write_geojson(tmp_path/"a.geojson", m, {4: 2}, {2: "tumour"}, {4: {"probability": .75}}, {2: (1, 2, 3)})
    file = json.loads((tmp_path/"a.geojson").read_text())
    assert file["type"] == "FeatureCollection" and [f["type"] for f in file["features"]] == ["Feature"]
    [ring] = file["features"][0]["geometry"]["coordinates"]
    x, y = np.array(ring).T
    assert file["features"][0]["geometry"]["type"] == "Polygon" and ring[0] == ring[-1]
    assert (x.min(), x.max(), y.min(), y.max()) == (3, 7, 2, 5)        # px from the image's corner: x first
    assert file["features"][0]["properties"] | {"name": 0} == dict(objectType="detection", name=0, classification=dict(name="tumour", color=[1, 2, 3]), measurements=dict(probability=.75))
    assert features_of(m, kind="annotation")[0]["properties"]["objectType"] == "annotation"
    with pytest.raises(ValueError, match="type 2 has no name"): features_of(m, {4: 2}, {1: "a"})
    with pytest.raises(ValueError, match="nucleus 4 has no type"): features_of(m, {5: 2}, {2: "a"})

SQUARE = [[1, 1], [5, 1], [5, 5], [1, 5], [1, 1]]

@pytest.mark.parametrize("geometry, message", [
    (dict(type="Point", coordinates=[1, 1]), "object 2 is a Point, not a polygon"), (dict(type="LineString", coordinates=SQUARE), "is a LineString"), (None, "is a None"),
    (dict(type="Polygon", coordinates=[[[1, 1], [2, 2]]]), "fewer than three points"), (dict(type="Polygon", coordinates=[]), "none"), (dict(type="Polygon"), "no coordinates"),
    (dict(type="Polygon", coordinates=[[["a", 1], [2, 2], [3, 3]]]), "no coordinates that can be read"),
    (dict(type="Polygon", coordinates=[[[90, 90], [99, 90], [99, 99]]]), "outside the image of 40 × 40 px"), (dict(type="Polygon", coordinates=[[[-9, -9], [-1, -9], [-1, -1]]]), "outside the image")])
def test_geojson_that_is_no_outline_of_this_image(geometry, message):
    good = dict(type="Feature", geometry=dict(type="Polygon", coordinates=[SQUARE]), properties={})
    data = json.dumps(dict(type="FeatureCollection", features=[good, good | dict(geometry=geometry)]))
    with pytest.raises(ValueError, match=f"A_0.geojson.*{message}"): read_geojson(data, (40, 40), "A_0.geojson")

@pytest.mark.parametrize("data", ["", "<xml/>", "7", '{"features": 3}', '{"type": "FeatureCollection", "features": [1]}'])
def test_no_geojson(data):
    with pytest.raises(ValueError, match="A_0.geojson"): read_geojson(data, (9, 9), "A_0.geojson")

def corrected(folder, n=3, without=(), classes={1: "tumour", 2: "stroma"}):
    folder.mkdir(exist_ok=True)
    for i in range(n):
        x, m = toy_nuclei(i, 48, 6)
        (folder/f"A_{i}.png").write_bytes(png(x))
        if i not in without: write_geojson(folder/f"A_{i}.png.geojson", m.astype(int), kinds_of(m, 2) if classes else None, classes)
    return folder

def test_corrections(tmp_path):
    pairs, names, notes = read(corrected(tmp_path/"a", without=(2,)), "geojson")
    assert names == {1: "stroma", 2: "tumour"} and [p.name for p in pairs] == ["A_0", "A_1"] and notes == ["1 images have no GeoJSON and are left out, the first is A_2.png"]
    for i, p in enumerate(pairs):
        m = toy_nuclei(i, 48, 6)[1]
        assert same(p.read_mask(), m) and sorted(names[k] for k in p.read_types().values()) == sorted({1: "tumour", 2: "stroma"}[k] for k in kinds_of(m, 2).values())
    save_pairs(pairs, tmp_path/"out", "x", notes, names)
    assert load_pairs(tmp_path/"out")[1].read_types() == pairs[1].read_types()

def test_classes_keep_the_order_of_the_set_that_was_corrected(tmp_path):
    place = corrected(tmp_path/"a")
    assert read(place, "geojson", types=["tumour", "vessel", "stroma"])[1] == {1: "tumour", 2: "vessel", 3: "stroma"}
    with pytest.raises(ValueError, match=r"A_\d.png.geojson: class 'stroma' is not in masks.types"): read(place, "geojson", types=["tumour"])

def test_corrections_without_classes(tmp_path):
    pairs, names, _ = read(corrected(tmp_path/"a", classes=None), "geojson")
    assert names == {} and all(p.read_types is None for p in pairs)
    write_geojson(tmp_path/"a/A_0.png.geojson", toy_nuclei(0, 48, 6)[1].astype(int), kinds_of(toy_nuclei(0, 48, 6)[1], 1), {1: "tumour"})
    with pytest.raises(ValueError, match=r"A_\d.png.geojson: some nuclei have no class, others are tumour"): read(tmp_path/"a", "geojson")


# Real sets

@needs("consep_256px_instances.zip")
def test_real_consep(tmp_path):
    "Official split, 27 and 14 tiles; numbers are those of the whole tile."
    with zipfile.ZipFile(REAL/"consep_256px_instances.zip") as z:
        some = {n: z.read(n) for n in z.namelist() if n.endswith(("train_10_000.png", "train_10_000.jpg", "train_1_003.png", "train_1_003.jpg", "test_9_015.png", "test_9_015.jpg"))}
        index = z.read("index.csv").decode().splitlines()
    pairs, names, _ = read(zipped(tmp_path/"a.zip", some), "pairs", group=r"^([a-z]+_\d+)_", types=[*CONSEP.values()], folders="split")
    told = {r.split(",")[0]: [int(o) for o in r.split(",")[6:]] for r in index[1:]}
    assert [(p.split, p.slide) for p in pairs] == [("test", "test_9"), ("train", "train_10"), ("train", "train_1")] and names == CONSEP
    for p in pairs:
        kinds = [*p.read_types().values()]
        assert [len(kinds), *(kinds.count(k) for k in CONSEP)] == told[p.name.split("/")[1]]

@needs("cpm15_instances.zip")
def test_real_cpm15():
    pairs, names, _ = read(REAL/"cpm15_instances.zip", "pairs", group="^(.+)$")
    assert names == {} and (len(pairs), sum(len(np.unique(p.read_mask())) - 1 for p in pairs)) == (15, 2905)

@needs("dsb2018_color107_instances.zip")
def test_real_dsb2018():
    pairs, _, _ = read(REAL/"dsb2018_color107_instances.zip", "pairs", group="^(.+)$")
    assert (len(pairs), sum(len(np.unique(p.read_mask())) - 1 for p in pairs)) == (107, 4550)

@needs("tnbc50_512px.zip")
def test_real_tnbc():
    "Binary: 4,028 connected regions, corners included, and 4,056 without them, for 4,022 published nuclei."
    pairs, _, _ = read(REAL/"tnbc50_512px.zip", "pairs")
    assert (len(pairs), len({p.slide for p in pairs}), sum(instances(p.read_mask()).max() for p in pairs)) == (50, 11, 4028)
    assert sum(label(p.read_mask() > 0, connectivity=1).max() for p in pairs) == 4056
    assert how_counted([p.read_mask() for p in pairs[:2]])[0].startswith("nuclei of 2 of 2 images are connected regions")
