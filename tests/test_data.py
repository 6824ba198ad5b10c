"""Sources, store and sample: every adapter in each of its forms, and every kind of bad input."""
import io, json, os, struct, tarfile, unicodedata, zipfile, zlib
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py, numpy as np, pandas as pd, pytest, torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sdmae.sample.tissue import CENTRES, TEST_CENTRE, make_sample, make_tile
from sdmae.data.records import Record, Source, Task, decode, quotas, read_image, size_of
from sdmae.sources.publishers import NCT_CLASSES, open_source
from sdmae.data.store import TileStore, contact_sheet, fit, prepare
from sdmae.files import sha256
from sdmae.evaluate.features import extract
from sdmae.models.histogram import HistogramEncoder
from sdmae.evaluate.linear import fit_linear
from sdmae.params import DataParams

REAL = Path(__file__).parents[2]/"shared"/"realdata"


def params(path, adapter="folder", **kwargs):
    return DataParams(**{"name":"test", "adapter":adapter, "path":str(path), "image_size":16, "valid_fraction":.2, **kwargs})

def image(value=100, size=(16,16), form="PNG", mode="RGB"):
    b = io.BytesIO()
    Image.new(mode, size, (value,)*3 if mode == "RGB" else value).save(b, form)
    return b.getvalue()

def put(folder, files):
    for name, data in files.items():
        p = Path(folder)/name
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(data)
    return Path(folder)

def zipped(file, files):
    with zipfile.ZipFile(file, "w") as z:
        for name, data in files.items(): z.writestr(name, data)
    return Path(file)

def tiles(n=10, labels="ab", prefix="", suffix="png", form="PNG"):
    return {f"{prefix}{l}/{i}.{suffix}": image(10*i, form=form) for l in labels for i in range(n)}

def by_split(source): return Counter(r.split for r in source.records)

@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    make_sample(folder, n_train=10, n_test=3, n_pcam=(32,8,12))
    return folder


# NCT-CRC-HE

def test_nct_zip(sample):
    s = open_source(params("nct", "nct"), root=sample)
    assert by_split(s) == {"train":72, "valid":18, "test":27} and s.classes == NCT_CLASSES and s.synthetic
    assert {(r.split == "test", r.centre) for r in s.records} == {(False,"NCT-CRC-HE-100K"), (True,"CRC-VAL-HE-7K")}
    assert s.notes[0] == "read 90 tiles in 9 classes from nct/NCT-CRC-HE-100K.zip: train"
    r = s.records[0]
    assert r.path.startswith("NCT-CRC-HE-100K.zip/NCT-CRC-HE-100K/ADI/ADI-") and r.path.endswith(".tif")
    assert r.read().shape == (64,64,3) and r.read().dtype == np.uint8
    assert Counter((r.split, r.label) for r in s.records)["valid","TUM"] == 2

def test_nct_folder_reads_the_same(sample, tmp_path):
    for name in ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K"): zipfile.ZipFile(sample/f"nct/{name}.zip").extractall(tmp_path)
    a, b = open_source(params(sample/"nct", "nct")), open_source(params(tmp_path, "nct"))
    assert b.synthetic and [(r.label, r.split) for r in a.records] == [(r.label, r.split) for r in b.records]
    assert (a.records[7].read() == b.records[7].read()).all()

def test_nct_without_background(sample):
    s = open_source(params("nct", "nct", drop_classes=["BACK"]), root=sample)
    assert len(s.classes) == 8 and "BACK" not in {r.label for r in s.records} and "dropped BACK" in s.notes[2]
    with pytest.raises(ValueError, match="drop_classes: no class 'BACKGROUND'"):
        open_source(params("nct", "nct", drop_classes=["BACKGROUND"]), root=sample)
    with pytest.raises(ValueError, match="1 class left"): open_source(params("nct", "nct", drop_classes=NCT_CLASSES[1:]), root=sample)

def test_nct_two_training_sets_must_be_told_apart(sample, tmp_path):
    for name in ("NCT-CRC-HE-100K", "NCT-CRC-HE-100K-NONORM"):
        zipped(tmp_path/f"{name}.zip", {f"{name}/{c}/{c}-{i}.png": image() for c in NCT_CLASSES for i in range(4)})
    zipped(tmp_path/"CRC-VAL-HE-7K.zip", {f"CRC-VAL-HE-7K/{c}/{c}-0.png": image() for c in NCT_CLASSES})
    with pytest.raises(ValueError, match="NONORM.zip both lie there"): open_source(params(tmp_path, "nct"))
    s = open_source(params(tmp_path/"NCT-CRC-HE-100K-NONORM.zip", "nct"))
    assert {r.centre for r in s.records} == {"NCT-CRC-HE-100K-NONORM", "CRC-VAL-HE-7K"} and not s.synthetic

@pytest.mark.parametrize("missing, message", [("NCT-CRC-HE-100K", "NCT-CRC-HE-100K.zip or"), ("CRC-VAL-HE-7K", "CRC-VAL-HE-7K.zip")])
def test_nct_missing(tmp_path, missing, message):
    for name in {"NCT-CRC-HE-100K", "CRC-VAL-HE-7K"} - {missing}: zipped(tmp_path/f"{name}.zip", {f"{name}/TUM/a.png": image()})
    with pytest.raises(FileNotFoundError, match=message): open_source(params(tmp_path, "nct"))
    with pytest.raises(FileNotFoundError, match="does not exist"): open_source(params(tmp_path/"nowhere", "nct"))

@pytest.mark.parametrize("name", ["NCT-CRC-HE-100K/TUMOR/a.png", "NCT-CRC-HE-100K/test/TUM/a.png", "NCT-CRC-HE-100K/a.png", "a.png"])
def test_nct_wrong_layout(tmp_path, name):
    zipped(tmp_path/"NCT-CRC-HE-100K.zip", {name: image()})
    zipped(tmp_path/"CRC-VAL-HE-7K.zip", {"CRC-VAL-HE-7K/TUM/a.png": image()})
    with pytest.raises(ValueError, match="expected .*<class>/<image>|expected .*label/image"): open_source(params(tmp_path, "nct"))


def unpacked(sample, folder):
    for name in ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K"): zipfile.ZipFile(sample/f"nct/{name}.zip").extractall(folder)
    return folder

def nct_moves(d):
    "Spellings and places that are unambiguous."
    a, b = d/"NCT-CRC-HE-100K", d/"CRC-VAL-HE-7K"
    def inside(top, name):
        (d/"tmp").mkdir(); top.rename(d/"tmp"/name); (d/"tmp").rename(top)
    return {"as it is": lambda: d, "the test set itself": lambda: b, "one level higher": lambda: d.parent, "(1)": lambda: b.rename(d/"CRC-VAL-HE-7K (1)") and d,
            "small letters": lambda: a.rename(d/"nct-crc-he-100k") and d, "class in small letters": lambda: (a/"MUC").rename(a/"muc") and d,
            "train and test inside": lambda: (inside(a, "train"), inside(b, "test"), d)[2], "nested": lambda: (inside(a, a.name), d)[1]}

@pytest.mark.parametrize("how", nct_moves(Path()))
def test_nct_other_spellings(sample, tmp_path, how):
    s = open_source(params(nct_moves(unpacked(sample, tmp_path/"in"))[how](), "nct"))
    assert by_split(s) == {"train":72, "valid":18, "test":27} and s.classes == NCT_CLASSES and not [n for n in s.notes if "warning" in n and "published" not in n]
    assert {r.centre for r in s.records} == {"NCT-CRC-HE-100K", "CRC-VAL-HE-7K"}

def nct_faults(d):
    a = d/"NCT-CRC-HE-100K"
    first = lambda c: next((a/c).iterdir())
    return {"class 'MUC' has no tile in train": lambda: (a/"MUC").rename(d/"MUC"), "a tile of TUM by its name, of ADI by its folder": lambda: first("TUM").rename(a/"ADI"/first("TUM").name),
            "the folder is 'test', in the archive for train": lambda: ((d/"tmp").mkdir(), a.rename(d/"tmp"/"test"), (d/"tmp").rename(a)),
            "has to be unpacked first": lambda: (a.rename(d/"x"), (d/"NCT-CRC-HE-100K.tar.gz").write_bytes(b""))}

@pytest.mark.parametrize("message", nct_faults(Path()))
def test_nct_faults(sample, tmp_path, message):
    nct_faults(unpacked(sample, tmp_path))[message]()
    with pytest.raises((ValueError, FileNotFoundError), match=message): open_source(params(tmp_path, "nct"))

def test_nct_incomplete_sets_say_so(tmp_path):
    for name in ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K"): put(tmp_path, {f"{name}/{c}/{i}.png": image(20*i) for c in NCT_CLASSES for i in range(4)})
    assert [n for n in open_source(params(tmp_path, "nct")).notes if "published" in n] == [
        "warning: NCT-CRC-HE-100K has 36 tiles, 100000 were published", "warning: CRC-VAL-HE-7K has 36 tiles, 7180 were published"]


# PatchCamelyon

def pcam_copy(sample, folder):
    return put(folder, {p.name: p.read_bytes() for p in (sample/"pcam").iterdir()})

def stem(split): return f"camelyonpatch_level_2_split_{split}"

def test_pcam_hdf5(sample):
    s = open_source(params("pcam", "pcam", image_size=96), root=sample)
    assert by_split(s) == {"train":32, "valid":8, "test":12} and s.classes == ["normal","tumor"] and s.synthetic
    assert s.notes == [f"read {n} tiles in 2 classes from pcam/{stem(k)}_x.h5: {k}" for k,n in (("train",32),("valid",8),("test",12))]
    with h5py.File(sample/f"pcam/{stem('valid')}_x.h5") as x, h5py.File(sample/f"pcam/{stem('valid')}_y.h5") as y:
        assert x["x"].shape == (8,96,96,3) and x["x"].dtype == np.uint8 and x["x"].compression == "gzip" and y["y"].shape == (8,1,1,1)
        valid = [r for r in s.records if r.split == "valid"]
        assert (valid[5].read() == x["x"][5]).all() and [r.label == "tumor" for r in valid] == (y["y"][:].ravel() == 1).tolist()
    assert len({r.group for r in s.records}) == 8 + 4 + 6

def test_pcam_without_valid_draws_whole_slides(sample, tmp_path):
    pcam_copy(sample, tmp_path)
    for p in tmp_path.glob("*valid*"): p.unlink()
    s = open_source(params(tmp_path, "pcam"))
    splits = defaultdict(set)
    for r in s.records: splits[r.group].add(r.split)
    assert set(by_split(s)) == {"train","valid","test"} and all(len(v) == 1 for v in splits.values())

def test_pcam_slide_in_two_official_splits_is_a_warning(sample, tmp_path):
    pcam_copy(sample, tmp_path)
    meta = pd.read_csv(tmp_path/f"{stem('valid')}_meta.csv", index_col=0)
    meta.wsi = "synthetic_train_000"; meta.to_csv(tmp_path/f"{stem('valid')}_meta.csv")
    notes = open_source(params(tmp_path, "pcam")).notes
    assert notes[-1].startswith("warning:") and "synthetic_train_000" in notes[-1]

@pytest.mark.parametrize("pack", [put, zipped])
def test_pcam_jpeg_folders(tmp_path, pack):
    files = {k: v for s in ("train","valid","test") for k,v in tiles(3, "01", f"{s}/", "jpg", "JPEG").items()}
    s = open_source(params(pack(tmp_path/"pcam.zip", {**files, "labels.csv":b"path,label"}), "pcam"))
    assert by_split(s) == {"train":6, "valid":6, "test":6} and s.classes == ["normal","tumor"] and not s.synthetic
    assert all((r.label == "tumor") == ("/1/" in r.path) for r in s.records)

def test_pcam_unknown_label(tmp_path):
    put(tmp_path, {**tiles(3, "012", "train/"), **tiles(3, "01", "test/")})
    with pytest.raises(ValueError, match="train/2/0.png: label '2' is out of range"): open_source(params(tmp_path, "pcam"))

def spoil(folder, split, key, change):
    file = folder/f"{stem(split)}_{key}.h5"
    with h5py.File(file) as f: data = change(f[key][:])
    file.unlink()
    with h5py.File(file, "w") as f: f[key] = data

def label_two(y): y[3] = 2; return y

@pytest.mark.parametrize("key, change, message", [
    ("y", label_two, "test_y.h5: label 2 in row 3 is out of range"),
    ("y", lambda y: y[:-1], "12 tiles but 11 labels"),
    ("x", lambda x: x.astype(np.float32), "x is float32"),
    ("x", lambda x: x[...,:1], "expected uint8"),
    ("x", lambda x: x[:0], "0 tiles but 12 labels")])
def test_pcam_bad_arrays(sample, tmp_path, key, change, message):
    spoil(pcam_copy(sample, tmp_path), "test", key, change)
    with pytest.raises(ValueError, match=message): open_source(params(tmp_path, "pcam"))

def test_pcam_bad_files(sample, tmp_path):
    file = pcam_copy(sample, tmp_path)/f"{stem('test')}_x.h5"
    data = file.read_bytes()
    file.write_bytes(data[:len(data)//2])
    with pytest.raises(ValueError, match="not an HDF5 file, or truncated"): open_source(params(tmp_path, "pcam"))
    file.unlink()
    with pytest.raises(FileNotFoundError, match="test_x.h5 is missing"): open_source(params(tmp_path, "pcam"))
    file.with_name(f"{file.name}.gz").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="gunzip"): open_source(params(tmp_path, "pcam"))
    with h5py.File(file, "w") as f: f["tiles"] = np.zeros(3)
    with pytest.raises(ValueError, match="no dataset 'x' in it, only \\['tiles'\\]"): open_source(params(tmp_path, "pcam"))

def test_pcam_compressed_valid_is_not_taken_for_absent(sample, tmp_path):
    pcam_copy(sample, tmp_path)
    file = tmp_path/f"{stem('valid')}_x.h5"
    file.rename(f"{file}.gz")
    with pytest.raises(FileNotFoundError, match="gunzip"): open_source(params(tmp_path, "pcam"))

@pytest.mark.parametrize("change, message", [(lambda m: m.iloc[:-1], "11 rows for 12 tiles"), (lambda m: m.drop(columns="wsi"), "no column 'wsi'")])
def test_pcam_bad_meta(sample, tmp_path, change, message):
    file = pcam_copy(sample, tmp_path)/f"{stem('test')}_meta.csv"
    change(pd.read_csv(file, index_col=0)).to_csv(file)
    with pytest.raises(ValueError, match=message): open_source(params(tmp_path, "pcam"))

@pytest.mark.parametrize("gone, message", [
    (["valid_y.h5"], "valid_y.h5 is missing"), (["valid_x.h5"], "valid_x.h5 is missing"), (["valid_x.h5", "valid_y.h5"], "valid_x.h5 is missing"),
    (["train_x.h5", "train_y.h5", "train_meta.csv"], "train_x.h5 is missing"), (["test_x.h5"], "test_x.h5 is missing"),
    (["test_meta.csv"], "test_meta.csv is missing or names no slide, but other splits have theirs")])
def test_pcam_incomplete(sample, tmp_path, gone, message):
    pcam_copy(sample, tmp_path)
    for g in gone: (tmp_path/f"camelyonpatch_level_2_split_{g}").unlink()
    with pytest.raises(FileNotFoundError, match=message): open_source(params(tmp_path, "pcam"))

def test_pcam_without_slides_says_so(sample, tmp_path):
    pcam_copy(sample, tmp_path)
    for p in tmp_path.glob("*_meta.csv"): p.unlink()
    assert open_source(params(tmp_path, "pcam")).notes[-1] == "the slides of its tiles are not known: no camelyonpatch_level_2_split_*_meta.csv"

def test_pcam_files_of_a_name_that_differs_a_little(sample, tmp_path):
    "A split is not drawn in the place of one that is there; a copy beside the files is told."
    pcam_copy(sample, tmp_path)
    (tmp_path/f"{stem('test')}_x (1).h5").write_bytes(b"")
    assert [n for n in open_source(params(tmp_path, "pcam")).notes if "not read: 1; the first is camelyonpatch_level_2_split_test_x (1).h5" in n]
    for p in tmp_path.glob("*_valid_*"): p.rename(p.with_name(p.name.replace("valid", "val")))
    with pytest.raises(ValueError, match="split_val_.*: PatchCamelyon has no split 'val'. Call it valid"): open_source(params(tmp_path, "pcam"))

@pytest.mark.parametrize("below", ["", "pcam", "x/pcam"])
def test_pcam_found_below_or_by_one_of_its_files(sample, tmp_path, below):
    pcam_copy(sample, tmp_path/below)
    for path in (tmp_path, tmp_path/below/f"{stem('train')}_x.h5"): assert by_split(open_source(params(path, "pcam"))) == {"train":32, "valid":8, "test":12}
    pcam_copy(sample, tmp_path/"again"/"pcam")
    if below: 
        with pytest.raises(ValueError, match="hold PatchCamelyon's files. Name one"): open_source(params(tmp_path, "pcam"))

def test_pcam_meta_of_another_order_is_told(sample, tmp_path):
    file = pcam_copy(sample, tmp_path)/f"{stem('test')}_meta.csv"
    pd.read_csv(file, index_col=0).iloc[::-1].rename(columns={"wsi":" WSI "}).to_csv(file)
    assert any("test_meta.csv speaks of" in n for n in open_source(params(tmp_path, "pcam")).notes)

@pytest.mark.parametrize("change", [lambda y: y.astype(float), lambda y: y.astype(bool), lambda y: y.ravel(), lambda y: y[:,0]])
def test_pcam_labels_of_any_form(sample, tmp_path, change):
    spoil(pcam_copy(sample, tmp_path), "test", "y", change)
    assert [r.label for r in open_source(params(tmp_path, "pcam")).records] == [r.label for r in open_source(params("pcam", "pcam"), root=sample).records]

def odd_h5(sample):
    "What an HDF5 file may say of itself without holding it."
    other = str(sample/f"pcam/{stem('test')}_x.h5")
    def virtual(f, x):
        layout = h5py.VirtualLayout(x.shape, "u1"); layout[:] = h5py.VirtualSource(other, "x", x.shape); f.create_virtual_dataset("x", layout)
    empty = lambda shape, chunks: lambda f, x: f.create_dataset("x", shape=shape, dtype="u1", chunks=chunks)
    return {"1000000000000 tiles but 12 labels": empty((10**12,96,96,3), (1,96,96,3)), "was not written to its end, 0% are there": empty((12,96,96,3), (1,96,96,3)),
            "was not written to its end, 50% are there": lambda f, x: empty((12,96,96,3), (1,96,96,3))(f, x).__setitem__(slice(6), x[:6]),
            "x is uint8 .12, 90000, 90000, 3.": empty((12,90000,90000,3), (1,96,96,3)), "kept in pieces of .* too large": lambda f, x: f.create_dataset("x", x.shape, "u1", chunks=(40_000,96,96,3), maxshape=(None,96,96,3)),
            "the pixels of 'x' lie in another file": virtual, "'x' lies in another file": lambda f, x: f.__setitem__("x", h5py.ExternalLink(other, "x")),
            "the pixels of 'x' lie in another file.": lambda f, x: f.create_dataset("x", x.shape, "u1", external=[(other, 0, x.nbytes)]),
            "'x' is no dataset": lambda f, x: f.create_group("x"), "x is uint16": lambda f, x: f.create_dataset("x", data=x.astype("u2")), "expected an array": lambda f, x: f.create_dataset("x", data=1)}

@pytest.mark.parametrize("message", odd_h5(Path()))
def test_pcam_hostile_headers(sample, tmp_path, message):
    file = pcam_copy(sample, tmp_path)/f"{stem('test')}_x.h5"
    with h5py.File(file) as f: x = f["x"][:]
    file.unlink()
    with h5py.File(file, "w") as f: odd_h5(sample)[message](f, x)
    with pytest.raises(ValueError, match=f"test_x.h5.*{message}"): open_source(params(tmp_path, "pcam"))

def test_pcam_tiles_of_another_size_are_refused_at_once(sample, tmp_path):
    "Rows of one pixel cost nothing to declare."
    import shutil
    shutil.copytree(sample/"pcam", tmp_path/"pcam")
    with h5py.File(tmp_path/"pcam"/"camelyonpatch_level_2_split_train_x.h5", "r+") as f: del f["x"]; f.create_dataset("x", (300_000_000, 1, 1, 3), "u1", chunks=(10**8, 1, 1, 3))
    with pytest.raises(ValueError, match=r"_train_x.h5: x is uint8 \(300000000, 1, 1, 3\), expected uint8 \(N, 96, 96, 3\)"): open_source(params(tmp_path/"pcam", "pcam"))

def test_pcam_without_its_valid_split_is_told(sample, tmp_path):
    said = "warning: the publisher's valid split is missing; another one is drawn from train"
    assert said not in open_source(params(sample/"pcam", "pcam")).notes
    for f in pcam_copy(sample, tmp_path/"a").glob("*valid*"): f.unlink()
    assert said in open_source(params(tmp_path/"a", "pcam")).notes
    put(tmp_path/"b", {**tiles(10, "01", "train/"), **tiles(10, "01", "test/")})
    assert said in open_source(params(tmp_path/"b", "pcam")).notes

def test_a_drawn_split_that_one_group_fills_is_told(tmp_path):
    groups = ["big"]*240 + [f"P{i//10}" for i in range(90)]
    put(tmp_path, {f"{i}.png": image(i % 256) for i in range(330)})
    said = []
    for seed in range(12):
        (tmp_path/"t.csv").write_text("path,label,group\n" + "".join(f"{i}.png,{'ab'[i%2]},{g}\n" for i, g in enumerate(groups)))
        s = open_source(params(tmp_path/"t.csv", "csv", seed=seed))
        counts, notes = by_split(s), [n for n in s.notes if n.startswith("warning: the drawn split is uneven: ")]
        odd = any(not share/2 <= counts[k]/330 <= 2*share for k, share in dict(train=.64, valid=.16, test=.2).items())
        assert len(notes) == odd and (not odd or notes[0].endswith("groups stay whole, and differ in size"))
        if counts["test"] > 240: assert f"test has {counts['test']} of 330 tiles, {counts['test']/330:.0%} instead of 20%" in notes[0]
        said += notes
    assert said
    even = "path,label,group\n" + "".join(f"{i}.png,{'ab'[i%2]},P{i//10}\n" for i in range(330))
    (tmp_path/"t.csv").write_text(even)
    assert not [n for n in open_source(params(tmp_path/"t.csv", "csv")).notes if "uneven" in n]

def test_pcam_damaged_chunk_names_the_row(sample, tmp_path):
    file = pcam_copy(sample, tmp_path)/f"{stem('test')}_x.h5"
    with h5py.File(file) as f: info = f["x"].id.get_chunk_info(4)
    data = bytearray(file.read_bytes())
    data[info.byte_offset+50:info.byte_offset+info.size//2] = bytes(info.size//2 - 50)
    file.write_bytes(data)
    record = [r for r in open_source(params(tmp_path, "pcam")).records if r.split == "test"][4]
    with pytest.raises(ValueError, match="test_x.h5#4: damaged"): record.read()


# Folders

@pytest.mark.parametrize("pack", [put, zipped])
@pytest.mark.parametrize("prefix", ["", "images/mine/"])
def test_folder_with_splits(tmp_path, pack, prefix):
    files = {**tiles(4, "ab", f"{prefix}train/"), **tiles(2, "ab", f"{prefix}val/"), **tiles(3, "ab", f"{prefix}test/")}
    s = open_source(params(pack(tmp_path/"data.zip", {**files, "README.md":b"", ".hidden/x/a.png":b""})))
    assert by_split(s) == {"train":8, "valid":4, "test":6} and s.classes == ["a","b"]
    assert s.notes[0].startswith("read 6 tiles in 2 classes") and s.notes[0].endswith("test")

def test_folder_without_splits(tmp_path):
    put(tmp_path, {**tiles(50, "a"), **tiles(20, "b")})
    s = open_source(params(tmp_path, seed=3))
    assert Counter((r.split, r.label) for r in s.records) == {("train","a"):32, ("valid","a"):8, ("test","a"):10, ("train","b"):13, ("valid","b"):3, ("test","b"):4}
    again, other = open_source(params(tmp_path, seed=3)), open_source(params(tmp_path, seed=4))
    assert [r.split for r in s.records] == [r.split for r in again.records] != [r.split for r in other.records]

def test_folder_of_train_and_test_draws_valid_from_train(tmp_path):
    put(tmp_path, {**tiles(10, "ab", "train/"), **tiles(5, "ab", "test/")})
    assert by_split(open_source(params(tmp_path))) == {"train":16, "valid":4, "test":10}

def test_natural_images_in_imagenets_layout(tmp_path):
    "Photographs of many shapes, train/<wordnet id>/*.JPEG: read, fitted to squares, and told apart by a colour histogram."
    from sklearn.datasets import load_sample_images
    rng = np.random.default_rng(0)
    for wnid, photo in zip(("n00000001", "n00000002"), load_sample_images().images):
        for i in range(24):
            h, w = rng.integers(80, 200, 2); y, x = rng.integers(0, photo.shape[0]-h), rng.integers(0, photo.shape[1]-w)
            b = io.BytesIO(); Image.fromarray(photo[y:y+h, x:x+w]).save(b, "JPEG")
            put(tmp_path, {f"{'test' if i >= 16 else 'train'}/{wnid}/{wnid}_{i}.JPEG": b.getvalue()})
    data = params(tmp_path, image_size=32)
    store = prepare(open_source(data), tmp_path/"prepared", data)
    x, y = {}, {}
    for split in ("train", "valid", "test"):
        i = store.indices(split); x[split], y[split] = extract(HistogramEncoder(32), store, i, [0.]*3, [1.]*3, "cpu"), store.targets(i).numpy()
    probe = fit_linear(x["train"], y["train"], x["valid"], y["valid"], 2)
    assert store.classes == ["n00000001", "n00000002"] and (probe.predict_proba(x["test"]).argmax(1) == y["test"]).mean() > 0.8

def test_train_and_val_alone_say_what_to_do(tmp_path):
    put(tmp_path, {**tiles(10, "ab", "train/"), **tiles(5, "ab", "val/")})
    with pytest.raises(ValueError, match="the split 'test' is empty.*name val test"): open_source(params(tmp_path))

@pytest.mark.parametrize("suffix, form", [("png","PNG"), ("JPG","JPEG"), ("jpeg","JPEG"), ("tif","TIFF"), ("tiff","TIFF"), ("bmp","BMP")])
def test_folder_formats(tmp_path, suffix, form):
    put(tmp_path, tiles(6, "ab", "", suffix, form))
    r = open_source(params(tmp_path)).records[3]
    assert r.read().shape == (16,16,3) and abs(int(r.read()[0,0,0]) - 30) <= 2

def test_grey_and_transparent_images_become_rgb(tmp_path):
    put(tmp_path, {**tiles(5, "ab"), "a/grey.png":image(77, mode="L")})
    r = [r for r in open_source(params(tmp_path)).records if r.path.endswith("grey.png")][0]
    assert (r.read() == 77).all() and r.read().shape == (16,16,3)

@pytest.mark.parametrize("files", [
    {"a/1.png":image(), "b.png":image()},
    {"a/patient1/1.png":image(), "b/patient1/1.png":image()},
    {"train/a/1.png":image(), "b/1.png":image()}])
def test_folder_wrong_layout(tmp_path, files):
    with pytest.raises(ValueError, match=r"expected \[split/\]label/image"): open_source(params(put(tmp_path, files)))

def test_folder_missing_and_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"): open_source(params(tmp_path/"nowhere"))
    with pytest.raises(FileNotFoundError, match="nothing in it that ends in .png"): open_source(params(put(tmp_path, {"a/readme.txt":b""})))

def test_empty_split_and_untrained_class(tmp_path):
    put(tmp_path/"one", {**tiles(5, "ab", "train/"), **tiles(5, "ab", "valid/")})
    with pytest.raises(ValueError, match="split 'test' is empty"): open_source(params(tmp_path/"one"))
    put(tmp_path/"two", {**tiles(5, "ab", "train/"), **tiles(5, "abc", "test/")})
    with pytest.raises(ValueError, match="class 'c' has no tile in train"): open_source(params(tmp_path/"two"))
    put(tmp_path/"three", {**tiles(1, "ab", "train/"), **tiles(5, "ab", "test/")})
    with pytest.raises(ValueError, match="split 'valid' is empty"): open_source(params(tmp_path/"three"))
    put(tmp_path/"four", {**tiles(5, "abc", "train/"), **tiles(5, "ab", "test/")})
    assert open_source(params(tmp_path/"four")).notes[-1] == "warning: test has no tile of c"
    put(tmp_path/"five", tiles(5, "ab", "test/"))
    with pytest.raises(ValueError, match="split 'train' is empty"): open_source(params(tmp_path/"five"))
    put(tmp_path/"six", {**tiles(9, "abc", "train/"), **tiles(5, "a", "test/")})
    with pytest.raises(ValueError, match="split 'test' has one class only.*Add tiles of b, c"): open_source(params(tmp_path/"six"))


@pytest.mark.parametrize("kind", ["loop", "self", "sibling", "gone", "gone folder", "pipe", "text"])
def test_links(tmp_path, kind):
    "A link to another disk is a folder like any other; what cannot be followed is told or refused."
    put(tmp_path/"mine", tiles(8, "ab")); put(tmp_path/"disk"/"c", {f"{i}.png": image(9*i) for i in range(8)})
    mine, c = tmp_path/"mine", tmp_path/"mine"/"c"
    c.symlink_to(tmp_path/"disk"/"c")
    {"loop": lambda: (c/"up").symlink_to(mine), "self": lambda: (mine/"a"/"self").symlink_to("self"), "sibling": lambda: (mine/"d").symlink_to(mine/"a"),
     "gone": lambda: (mine/"a"/"9.png").symlink_to("nowhere"), "gone folder": lambda: (mine/"d").symlink_to(tmp_path/"nowhere"), "pipe": lambda: os.mkfifo(mine/"a"/"9.png"),
     "text": lambda: (mine/"README.txt").symlink_to("nowhere")}[kind]()
    if kind in ("loop", "text"):
        s = open_source(params(mine))
        assert s.classes == ["a","b","c"] and len(s.records) == 24 and {"loop":"links back to a folder above them, not followed: 1; the first is c/up", "text":"1 file was not read: README.txt"}[kind] in s.notes[1]
    else:
        with pytest.raises((ValueError, FileNotFoundError), match={"sibling":"are one folder"}.get(kind, "is a link to nothing, or no file")): open_source(params(mine))

def test_what_is_not_read_is_told(tmp_path):
    put(tmp_path, {**tiles(8), "a/x.webp":b"", "a/y.xml":b"", "b/z.xml":b"", "a/._0.png":b"", ".DS_Store":b"", "Thumbs.db":b"", "__MACOSX/a/0.png":b"", "b/.hid.png":b""})
    (tmp_path/"c").mkdir()
    assert open_source(params(tmp_path)).notes[1:] == ["warning: 4 files were not read: 2 .xml, a/x.webp, b/.hid.png", "warning: empty folders: 1; the first is c/"]

@pytest.mark.parametrize("pack", [put, zipped])
def test_one_class_in_two_forms_of_unicode(tmp_path, pack):
    "Composed and decomposed, with a space behind, with one that does not break."
    forms = ["Tumeur bénigne", unicodedata.normalize("NFD", "Tumeur bénigne"), "Tumeur\u00a0bénigne", "Tumeur bénigne "]
    s = open_source(params(pack(tmp_path/"d.zip", {f"{f}/{i}.png": image(9*i) for i in range(8) for f in (forms[i%4], "b")})))
    assert any(n.startswith("joined as one label: ") and n.endswith(" and 'Tumeur bénigne'") for n in s.notes)
    assert s.classes == ["Tumeur bénigne", "b"] and len(s.records) == 16 and [r.read() for r in s.records]

def test_classes_that_differ_by_capitals_are_pointed_out(tmp_path):
    put(tmp_path/"x", {**tiles(8, ["Tumor", "normal"], "train/"), **tiles(8, ["tumor", "normal"], "test/")})
    with pytest.raises(ValueError, match="class 'tumor' has no tile in train.*Classes that may be the same: 'Tumor' and 'tumor'"): open_source(params(tmp_path/"x"))
    assert any("'A' and 'a'" in n for n in open_source(params(put(tmp_path/"y", tiles(8, "Aab")))).notes)

def test_one_level_too_low(tmp_path):
    put(tmp_path, {**tiles(8, "ab", "train/"), **tiles(8, "ab", "test/")})
    assert open_source(params(tmp_path/"train")).notes[-1] == "warning: train alone was read, test beside it not: name the folder above in data.path"
    put(tmp_path, {f"train/a/more{i}.png":image(i) for i in range(12)})
    assert "if a is a class, name the folder above" in open_source(params(tmp_path/"train"/"a", copies="warn")).notes[1]
    put(tmp_path/"turned", tiles(8, ["a/train", "b/train"]))
    with pytest.raises(ValueError, match="the folder of a label is called 'train'"): open_source(params(tmp_path/"turned"))

def test_what_cannot_be_written_into_a_table(tmp_path):
    put(tmp_path/"a", {**tiles(8), "a/x\r.png":image()})
    with pytest.raises(ValueError, match="carriage return"): prepare(open_source(params(tmp_path/"a")), tmp_path/"out", params("x"))
    put(tmp_path/"b", {**tiles(8), os.fsdecode(b"a/\xff.png"):image()})
    with pytest.raises(ValueError, match="not in UTF-8"): open_source(params(tmp_path/"b"))


# Pixels that need a decision

def saved(im, form, **kwargs):
    b = io.BytesIO(); im.save(b, form, **kwargs)
    return b.getvalue()

def png16(colour, channels):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = zlib.compress(b"".join(b"\0" + np.arange(4*channels, dtype=">u2").tobytes() for _ in range(4)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, colour, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")

def tif(array, **tags):
    "A plain TIFF of any depth, written by hand: Pillow writes none of 16-bit colour."
    h, w, c = array.shape
    entries = {256:w, 257:h, 258:8*array.itemsize, 259:1, 262:2 if c == 3 else 1, 273:8, 277:c, 278:h, 279:array.nbytes, **{int(k[1:]): v for k, v in tags.items()}}
    long = b"".join(struct.pack("<H", 8*array.itemsize) for _ in range(c))
    at = 8 + array.nbytes
    ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", k, 3, c, at) if k == 258 and c > 2 else struct.pack("<HHII", k, 4 if v > 65535 else 3, 1, v) for k, v in sorted(entries.items())) + b"\0"*4
    return struct.pack("<2sHI", b"II", 42, at + len(long)) + array.tobytes() + long + ifd

@pytest.mark.parametrize("data", [*[png16(*o) for o in ((0,1), (2,3), (4,2), (6,4))], tif(np.zeros((4,4,3), np.uint16)), tif(np.zeros((4,4,1), np.uint16)),
                                  saved(Image.new("F", (4,4)), "TIFF"), saved(Image.new("I", (4,4)), "TIFF"), tif(np.zeros((4,4,1), np.int8), t339=2)])
def test_deep_pixels_are_refused(data):
    with pytest.raises(ValueError, match="x.png: more than 8 bits a channel.*save it with 8"): decode(data, "x.png")

@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_modes_as_ever(mode):
    "What has 8 bits and nothing to see through is converted as Pillow does."
    data = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (8,8,3), dtype=np.uint8)).convert(mode), "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    for to in ("RGB", "L"): assert (decode(data, "x", to) == np.asarray(Image.open(io.BytesIO(data)).convert(to))).all()

def test_transparent_parts_are_glass_or_air():
    half = Image.new("RGBA", (2,1), (200,100,0,255)); half.putpixel((1,0), (200,100,0,51))
    for im in (half, half.convert("LA")):
        white, black = (decode(saved(im, "PNG"), "x", m).astype(int) for m in ("RGB", "L"))
        solid = np.asarray(im.convert("RGB"))[0,0]
        assert (white[0,0] == solid).all() and np.abs(white[0,1] - (solid*.2 + 255*.8)).max() <= 1 and abs(black[0,1] - black[0,0]*.2) <= 1
    keyed = saved(Image.new("RGB", (2,2), (9,9,9)), "PNG", transparency=(9,9,9))
    assert (decode(keyed, "x") == 255).all()

@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_pictures_stand_upright(tmp_path, form, turn):
    tile = np.zeros((8,16,3), np.uint8); tile[:4,:8] = 255
    exif = Image.Exif(); exif[0x0112] = turn
    (tmp_path/"x").write_bytes(saved(Image.fromarray(tile), form, exif=exif))
    got = decode((tmp_path/"x").read_bytes(), "x")
    assert np.abs(got.astype(int) - np.rot90(tile, {1:0, 3:2, 6:3, 8:1}[turn])).mean() < 30 and got.shape[:2] == ((8,16) if turn < 5 else (16,8))
    assert size_of(tmp_path, "x", "x") == got.shape[1::-1]

def test_several_pages():
    red, blue = (Image.new("RGB", (4,4), c) for c in ("red", "blue"))
    for form in ("TIFF", "GIF", "WEBP"):
        with pytest.raises(ValueError, match="x: several pages or frames"): decode(saved(red, form, save_all=True, append_images=[blue]), "x")
    for form in ("PNG", "MPO"): assert decode(saved(red, form, save_all=True, append_images=[blue]), "x")[0,0,0] > 250 # these have one that is shown
    thumb = Image.new("RGB", (2,2), "blue")
    for pages, size in (([(red, 0), (thumb, 1)], 4), ([(thumb, 1), (red, 0)], 4)): # a smaller copy is no page
        first, *others = (im for im, _ in pages)
        for im, reduced in pages: im.encoderinfo = {"tiffinfo": {254: reduced}}
        b = io.BytesIO(); first.save(b, "TIFF", save_all=True, append_images=others, tiffinfo={254: pages[0][1]})
        assert decode(b.getvalue(), "x").shape[0] == size

@pytest.mark.parametrize("extra", [0, None])
def test_two_channels_without_a_meaning(extra):
    "Pillow shows the first and says nothing; here the file is refused by name. Grey with transparency is read."
    import tifffile
    a, b = np.random.default_rng(0).integers(0, 255, (20, 24, 2), np.uint8), io.BytesIO()
    tifffile.imwrite(b, a, photometric="minisblack", planarconfig="contig", **({} if extra is None else dict(extrasamples=(extra,))))
    with pytest.raises(ValueError, match="x.tif: 2 channels, neither grey nor RGB"): decode(b.getvalue(), "x.tif")
    c = io.BytesIO(); tifffile.imwrite(c, a, photometric="minisblack", planarconfig="contig", extrasamples=(2,))
    assert decode(c.getvalue(), "y.tif").shape == (20, 24, 3)

def bombs():
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    png = lambda w, h: b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0"*1000)) + chunk(b"IEND", b"")
    tags = lambda *e: b"II*\0" + struct.pack("<IH", 8, len(e)) + b"".join(struct.pack("<HHII", t, 4, c, v) for t, c, v in e) + b"\0"*4
    return {"png":png(12000,12000), "larger":png(60000,60000), "largest":png(2**31-1, 2**31-1), "bmp":b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 10**5, 10**5, 1, 24, 0, 0, 0, 0, 0, 0),
            "tiff":tags((256,1,10**9), (257,1,10**9), (273,2**31-1,8)), "eps":b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"}

@pytest.mark.parametrize("kind", bombs())
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_that_promise_too_much(tmp_path, kind, monkeypatch):
    "Refused by the header: nothing is unpacked, and no program started."
    import subprocess
    monkeypatch.setattr(Image.Image, "convert", None); monkeypatch.setattr(subprocess, "Popen", None)
    (tmp_path/"x").write_bytes(bombs()[kind])
    for ask in (lambda: decode(bombs()[kind], "a/x.png"), lambda: size_of(tmp_path, "x", "a/x.png")):
        with pytest.raises(ValueError, match="a/x.png: "): ask()


# CSV

def table(folder, rows, **columns):
    put(folder, {f"img/{i}.png": image(i) for i in range(rows)})
    frame = pd.DataFrame({"path":[f"img/{i}.png" for i in range(rows)], "label":["ab"[i%2] for i in range(rows)], **columns})
    frame.to_csv(folder/"tiles.csv", index=False)
    return folder/"tiles.csv"

def test_csv_minimal(tmp_path):
    s = open_source(params(table(tmp_path, 20), "csv"))
    assert by_split(s) == {"train":12, "valid":4, "test":4} and s.records[7].path == "img/7.png" and (s.records[7].read() == 7).all()

def test_csv_with_everything(tmp_path):
    file = table(tmp_path, 12, split=["train"]*6 + ["val"]*3 + ["Test"]*3, group=[f"p{i//3}" for i in range(12)], centre=["x","y"]*6)
    s = open_source(params(file, "csv"))
    assert by_split(s) == {"train":6, "valid":3, "test":3} and s.records[4].group == "p1" and s.records[1].centre == "y"

@pytest.mark.parametrize("seed", range(5))
def test_csv_groups_never_straddle(tmp_path, seed):
    rng = np.random.default_rng(seed)
    group = [f"p{g}" if g else "" for g in rng.integers(0, 12, 120)]
    s = open_source(params(table(tmp_path, 120, group=group), "csv", seed=seed))
    splits = defaultdict(set)
    for r in s.records: splits[r.group].add(r.split)
    assert all(len(v) == 1 for g,v in splits.items() if g) and set(by_split(s)) == {"train","valid","test"}

def test_csv_own_split_tearing_a_group(tmp_path):
    file = table(tmp_path, 12, split=["train"]*6 + ["valid"]*3 + ["test"]*3, group=["p1"]*7 + ["p2"]*5)
    with pytest.raises(ValueError, match="group 'p1' is in train and valid"): open_source(params(file, "csv"))

@pytest.mark.parametrize("change, error, message", [
    (lambda t: t.drop(columns="path"), ValueError, "column 'path' is missing"),
    (lambda t: t.assign(split=["train"]*9 + ["holdout"]), ValueError, "row 11 has split 'holdout'"),
    (lambda t: t.assign(split=["train"]*9 + [""]), ValueError, "row 11 has split ''"),
    (lambda t: t.assign(label=["a"]*4 + [" "] + ["b"]*5), ValueError, "row 6 has no label"),
    (lambda t: t.assign(path=["gone.png"] + list(t.path[1:])), FileNotFoundError, "row 2 names gone.png"),
    (lambda t: t.iloc[:0], ValueError, "split 'train' is empty|class")])
def test_csv_bad_rows(tmp_path, change, error, message):
    file = table(tmp_path, 10)
    change(pd.read_csv(file)).to_csv(file, index=False)
    with pytest.raises(error, match=message): open_source(params(file, "csv"))

def test_csv_bad_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="must name a CSV"): open_source(params(tmp_path, "csv"))
    put(tmp_path, {"a.csv":b"", "b.csv":b"\xff\xfe\x00\x81"})
    for f in ("a.csv", "b.csv"):
        with pytest.raises(ValueError, match="not a CSV that can be read"): open_source(params(tmp_path/f, "csv"))

def write(folder, text, n=24, name=lambda i: f"{i}.png"):
    put(folder, {name(i): image(9*i) for i in range(n)} | {"t.csv": text if isinstance(text, bytes) else text.encode()})
    return open_source(params(folder/"t.csv", "csv"))

ROWS = "path,label\n" + "".join(f"{i}.png,{'ab'[i%2]}\n" for i in range(24))

@pytest.mark.parametrize("change", [lambda t: "\ufeff" + t.replace("\n", "\r\n"), lambda t: t.replace(",", ";"), lambda t: t.replace(",", "\t"), lambda t: t.replace("path,label", " Path ,LABEL"),
    lambda t: t.replace("\n7.", "\n\n7."), lambda t: "".join(f"{i or ''},{l}\n" for i, l in enumerate(t.splitlines())), lambda t: t.replace("\n3.png", "\n 3.png "), lambda t: t.replace("a\n", "a \n", 5),
    lambda t: t.replace("\n7.png", '\n"7.png"')])
def test_csv_as_programs_write_it(tmp_path, change):
    s = write(tmp_path, change(ROWS))
    assert s.classes == ["a","b"] and [r.label for r in s.records] == ["ab"[i%2] for i in range(24)] and [r.read().mean() for r in s.records] == [min(9*i, 255) for i in range(24)] and s.notes[1:] in ([], ["joined as one label: 'a ' and 'a'"])

@pytest.mark.parametrize("name, said", [(lambda i: unicodedata.normalize("NFD", f"é{i}.png"), lambda i: f"é{i}.png"), (lambda i: f"img/{i}.png", lambda i: f"img\\{i}.png"), (lambda i: f"my  img/{i}.png",)*2])
def test_csv_paths_as_other_systems_write_them(tmp_path, name, said):
    assert len(write(tmp_path, "path,label\n" + "".join(f"{said(i)},{'ab'[i%2]}\n" for i in range(24)), name=name).records) == 24

@pytest.mark.parametrize("text, message", [
    (ROWS.replace("\n7.png,b", "\n\n7.png,"), "row 10 has no label"), (ROWS + "3.png,a\n", "rows 5 and 26 name one file, 3.png, but its label is 'b' and 'a'"),
    (ROWS + "./3.png,a\n", "rows 5 and 26 name one file"), ("path,label,Label\n" + "".join(f"{l},{l[-1]}\n" for l in ROWS.splitlines()[1:]), "column 'label' is there twice"),
    (ROWS + "7.png\n", "row 26 has 1 values for 2 columns: is it cut off"), (ROWS + "7.png,\n", "row 26 has no label"), (ROWS + '"7.png,b\n', "not a CSV that can be read"), (ROWS.replace("a\n", "é\n").encode("latin-1"), "not a CSV that can be read.*UTF-8"),
    (ROWS.encode("utf-16"), "not a CSV"), ("path,label\n", "no row in it"), (ROWS.replace("3.png", "."), "row 5 names ., which is not there; 3 of 24 rows")])
def test_csv_faults_are_named(tmp_path, text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message): write(tmp_path, text)

def test_csv_rows_listed_twice_count_once(tmp_path):
    s = write(tmp_path, ROWS + ROWS.split("\n", 1)[1].replace("\n3.png", "\n./3.png"))
    assert len(s.records) == 24 and "warning: rows that name a file a second time, left out: 24; the first is row 26" in s.notes

def test_csv_a_file_in_two_splits_is_a_copy(tmp_path):
    from test_copies import saved as png, tissue
    put(tmp_path, {f"{i}.png": png(tissue(i, 16)) for i in range(24)})
    (tmp_path/"t.csv").write_text("path,label,split\n" + "".join(f"{i}.png,{'ab'[i%2]},{('train','valid','test')[i//8]}\n" for i in range(24)) + "20.png,a,train\n")
    with pytest.raises(ValueError, match="1 of test in train; the first is 20.png = 20.png"): prepare(open_source(params(tmp_path/"t.csv", "csv")), tmp_path/"out", params("x"))

def test_csv_one_name_in_several_spellings(tmp_path):
    "Spaces, accents and numbers are joined; capitals and zeros are left and told."
    rows = [(f"{i}.png", ("1","1.0")[i%4//2] if i%2 else "0", ("P1 ", "P1", "p1", "\u00a0P2", "P02", "nan")[i%6]) for i in range(24)]
    s = write(tmp_path, "path,label,group\n" + "".join(",".join(r) + "\n" for r in rows))
    assert s.classes == ["0","1"] and {r.group for r in s.records} == {"P1","p1","P2","P02","nan"}
    assert s.notes[1:5] == ["joined as one label: '1.0' and '1'", "joined as one group: 'P1 ' and 'P1'", "warning: groups that may be the same: 'P1' and 'p1', 'P2' and 'P02'", "warning: groups called nan: leave the cell empty where nothing is known"]
    split = write(tmp_path/"b", "path,label,group,split\n" + "".join(f"{i}.png,{'ab'[i%2]},G{i//8},{('train','valid','test')[i//8]}\n" for i in range(24)))
    assert by_split(split) == {"train":8, "valid":8, "test":8}
    with pytest.raises(ValueError, match="group 'P1' is in train and test"):
        write(tmp_path/"c", "path,label,group,split\n" + "".join(f"{i}.png,{'ab'[i%2]},{('P1','P1 ','P2')[i//8]},{('train','test','valid')[i//8]}\n" for i in range(24)))

def test_csv_columns_that_nobody_reads_are_told(tmp_path):
    text = ROWS.replace("path,label", "path,label,patient_id,stain").replace("a\n", "a,P1,HE\n").replace("b\n", "b,P2,HE\n")
    assert write(tmp_path, text).notes[1] == "warning: columns that are not used: patient_id, stain; one that says who belongs together must be called group"
    assert write(tmp_path/"b", text.replace("patient_id", "scanner")).notes[1] == "columns that are not used: scanner, stain"

@pytest.mark.parametrize("column, other", [("Group ID","group"), ("groups","group"), ("MRN","group"), ("pid","group"), ("set","split"), ("Fold","split")])
def test_csv_columns_that_mean_a_group_or_split_are_warned_of(tmp_path, column, other):
    text = ROWS.replace("path,label", f"path,label,{column}").replace("a\n", "a,1\n").replace("b\n", "b,2\n")
    note = write(tmp_path, text).notes[1]
    assert note.startswith(f"warning: columns that are not used: {column.lower()}; one that says") and note.endswith(f"must be called {other}")
    filled = text.replace(f"label,{column}", f"label,{column},group").replace(",1\n", ",1,P1\n").replace(",2\n", ",2,P2\n")
    if other == "group": # an empty column says nothing
        assert "must be called group" in write(tmp_path/"b", filled.replace(",P1", ",").replace(",P2", ",")).notes[1]

def test_groups_of_some_rows_only_are_warned_of(tmp_path):
    rows = [f"{i}.png,{'ab'[i%2]},{f'P{i//4}' if i < 12 else ''}\n" for i in range(24)]
    s = write(tmp_path, "path,label,group\n" + "".join(rows))
    assert "warning: 12 of 24 tiles have no group, the first is 12.png; each counts as a patient or slide of its own" in s.notes

def test_a_csv_that_is_a_link(tmp_path):
    "Images lie beside the link or beside its target."
    there = open_source(params(table(tmp_path/"data", 20), "csv"))
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"t.csv").symlink_to(tmp_path/"data"/"tiles.csv")
    s = open_source(params(tmp_path/"mine"/"t.csv", "csv"))
    assert [r.path for r in s.records] == [r.path for r in there.records] and all(r.read().shape == (16,16,3) for r in s.records)
    put(tmp_path/"mine", {r.path: image(i) for i, r in enumerate(s.records)})
    assert {r.file[0] for r in open_source(params(tmp_path/"mine"/"t.csv", "csv")).records} == {tmp_path/"mine"}

def test_an_empty_split_beside_an_archive(tmp_path):
    put(tmp_path, {**tiles(8, "ab", "train/"), "test.zip":b"PK"})
    with pytest.raises(ValueError, match=r"the split 'test' is empty.* 1 file was not read: test.zip\."): open_source(params(tmp_path))

def test_csv_with_excels_separator_line(tmp_path):
    text = "sep=;\n" + ROWS.replace(",", ";")
    assert [(r.path, r.label) for r in write(tmp_path, text).records] == [(r.path, r.label) for r in write(tmp_path/"b", ROWS).records]

def test_csv_decimals_are_names_of_their_own(tmp_path):
    s = write(tmp_path, "path,label\n" + "".join(f"{i}.png,{('1.1','1.10')[i%2]}\n" for i in range(24)))
    assert s.classes == ["1.1", "1.10"] and "warning: classes that may be the same: '1.1' and '1.10'" in s.notes
    assert open_source(params(put(tmp_path/"f", tiles(8, ["1.1", "1.10"])))).classes == ["1.1", "1.10"]

@pytest.mark.parametrize("other", ["P\u20131", "P\u20111", "\uff30-\uff11", "P \u2014 1", "p_01"])
def test_groups_that_look_alike(tmp_path, other):
    rows = "".join(f"{i}.png,{'ab'[i%2]},{('P-1','Q',other)[i//8]},{('train','valid','test')[i//8]}\n" for i in range(24))
    assert f"warning: groups that may be the same: 'P-1' and {other!r}" in write(tmp_path, "path,label,group,split\n" + rows).notes
    with pytest.raises(ValueError, match="group 'P-1' is in train and test"): write(tmp_path/"b", "path,label,group,split\n" + rows.replace(other, "\u202aP-1\u2069"))

def test_a_label_folder_that_nobody_sees(tmp_path):
    with pytest.raises(ValueError, match="label folder .* cannot be seen"): open_source(params(put(tmp_path, tiles(8, ["\u200b", "b", "c"]))))

def test_hidden_folders_are_not_entered(tmp_path):
    put(tmp_path, {**tiles(8), ".venv/lib/x.png":image(), "a/.old/0.png":image()})
    (tmp_path/".venv"/"lib64").symlink_to("lib"); (tmp_path/".root").symlink_to("/")
    s = open_source(params(tmp_path))
    assert len(s.records) == 16 and s.notes[1:] == ["hidden folders, not entered: 3; the first is .root/"]

def test_labels_that_pandas_would_eat(tmp_path):
    file = table(tmp_path, 20)
    file.write_text(file.read_text().replace(",a\n", ",NA\n").replace(",b\n", ",None\n"))
    store = prepare(open_source(params(file, "csv")), tmp_path/"out", params(file, "csv"))
    assert set(store.table.label) == {"NA","None"} and (store.table.group == "").all()


# Archives that are broken or hostile

@pytest.mark.parametrize("name", ["/etc/a/1.png", "../a/1.png", "data/../../a/1.png", "..\\a\\1.png", "C:/a/1.png"])
def test_zip_entry_outside(tmp_path, name):
    file = zipped(tmp_path/"data.zip", {**tiles(4), name:image()})
    with pytest.raises(ValueError, match="leads outside the archive"): open_source(params(file))

def test_zip_truncated(tmp_path):
    file = zipped(tmp_path/"data.zip", tiles(20))
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match="data.zip: not a zip, or truncated"): open_source(params(file))
    file.write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match="data.zip: not a zip"): open_source(params(file))

def test_zip_of_windows(tmp_path):
    with zipfile.ZipFile(tmp_path/"w.zip", "w") as z:
        for n, data in tiles(10, "ab", "mine/").items(): z.writestr(zipfile.ZipInfo(n.replace("/", "\\")), data)
    s = open_source(params(tmp_path/"w.zip"))
    assert s.classes == ["a","b"] and len(s.records) == 20 and [r.read().mean() for r in s.records[:3]] == [0, 10, 20]

def test_zip_of_macos(tmp_path):
    "Names in UTF-8 that are not said to be; and such as are really of DOS."
    file = zipped(tmp_path/"m.zip", {**{f"{i}xxxx/{k}.png": image(9*k) for i in ("cafe", "caff") for k in range(8)}})
    file.write_bytes(file.read_bytes().replace(b"cafexxxx", "caféxxx".encode()).replace(b"caffxxxx", "cafXxxxx".encode().replace(b"X", b"\x8a")))
    s = open_source(params(file))
    assert s.classes == ["cafèxxxx", "caféxxx"] and s.records[-1].read().mean() == 63

@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_with_a_name_twice(tmp_path):
    file = zipped(tmp_path/"data.zip", tiles(10))
    with zipfile.ZipFile(file, "a") as z: z.writestr("a/3.png", image(9))
    with pytest.raises(ValueError, match="data.zip: a/3.png is there twice"): open_source(params(file))

def altered(file, at, value, form="<I"):
    "The central directory's last entry with another number in it."
    data = bytearray(file.read_bytes()); i = data.rfind(b"PK\x01\x02")
    data[i+at:i+at+struct.calcsize(form)] = struct.pack(form, value); file.write_bytes(data)

@pytest.mark.parametrize("declared, message", [(3*10**9, "z/bomb.png: 3.0 GB are too much for one file"), (100, "z/bomb.png: damaged inside the archive")])
def test_zip_bombs(tmp_path, declared, message):
    "One that says so, and one that lies: no more is unpacked than was declared."
    import tracemalloc
    with zipfile.ZipFile(tmp_path/"data.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for n, data in {**tiles(5), "z/bomb.png": b"\0"*(60*2**20)}.items(): z.writestr(n, data)
    altered(tmp_path/"data.zip", 24, declared)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message): read_image(tmp_path/"data.zip", "z/bomb.png", "data.zip/z/bomb.png")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()

def test_zip_packed_as_python_cannot(tmp_path):
    file = zipped(tmp_path/"data.zip", tiles(10)); altered(file, 10, 9, "<H")
    with pytest.raises(ValueError, match="packed by method 9, which Python cannot read. Unpack"): open_source(params(file))

@pytest.mark.parametrize("name, data, message", [("a.tar.gz", None, "of kind tar"), ("a.7z", b"7z\xbc\xaf\x27\x1c", "of kind 7z"), ("a.h5", b"\x89HDF\r\n\x1a\n", "of kind HDF5"), ("a.csv", b"path,label\n", "data.adapter csv")])
def test_other_archives_are_called_by_their_kind(tmp_path, name, data, message):
    if data: put(tmp_path, {name: data})
    else:
        with tarfile.open(tmp_path/name, "w:gz") as t:
            for n, d in tiles(3).items():
                info = tarfile.TarInfo(n); info.size = len(d); t.addfile(info, io.BytesIO(d))
    with pytest.raises(ValueError, match=message): open_source(params(tmp_path/name))
    with pytest.raises(FileNotFoundError, match=f"nothing in it that ends in .png.* It holds {name}"): open_source(params(tmp_path))

def test_zip_replaced_while_the_kernel_runs(tmp_path):
    file = zipped(tmp_path/"data.zip", tiles(10))
    assert len(open_source(params(file)).records) == 20
    zipped(file, tiles(15))
    assert len(open_source(params(file)).records) == 30

def bad_files():
    png = image(size=(64,64))
    return {"truncated":png[:len(png)//2], "empty":b"", "text":b"not an image", "html":b"<html></html>", "deep":image(3000, mode="I;16")}

@pytest.mark.parametrize("kind", bad_files())
@pytest.mark.parametrize("pack", [put, zipped])
def test_bad_image_is_named_and_nothing_is_overwritten(tmp_path, kind, pack):
    good = put(tmp_path/"good", tiles(10))
    before = prepare(open_source(params(good)), tmp_path/"prepared", params(good)).manifest
    bad = pack(tmp_path/"bad.zip", {**tiles(10), "b/bad.png":bad_files()[kind]})
    with pytest.raises(ValueError, match="b/bad.png: (truncated, or not an image|more than 8 bits)"): prepare(open_source(params(bad)), tmp_path/"prepared", params(bad))
    after = TileStore(tmp_path/"prepared")
    assert after.manifest == before and sha256(tmp_path/"prepared/tiles.npy") == before["sha256"]["tiles.npy"]
    assert {p.name for p in tmp_path.iterdir()} == {"good", "prepared", "bad.zip"}

def test_zip_entry_damaged(tmp_path):
    file = zipped(tmp_path/"data.zip", tiles(10))
    data, png = file.read_bytes(), image(30)
    at = data.index(png)
    file.write_bytes(data[:at+40] + b"\0\1\2\3" + data[at+44:])
    with pytest.raises(ValueError, match="a/3.png: damaged inside the archive"):
        for r in open_source(params(file)).records: r.read()


# Preparing

def noise_source(n, shape=(20,20,3), seed=0, split=lambda i: ("train","valid","test")[i%3]):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (n,*shape), dtype=np.uint8)
    records = [Record(f"{i}.png", "ab"[i//3%2], split(i), f"g{i//6}", "", partial(np.copy, data[i])) for i in range(n)]
    return Source("noise", records, ["a","b"], False, []), data

def test_parallel_equals_serial(tmp_path):
    source, data = noise_source(1500)
    a = prepare(source, tmp_path/"a", params("x", image_size=20), workers=1)
    b = prepare(source, tmp_path/"b", params("x", image_size=20), workers=2)
    assert a.manifest == b.manifest and (b.tiles == data).all()
    train = data[::3]/255
    np.testing.assert_allclose(b.manifest["mean"], train.mean((0,1,2)), rtol=1e-9)
    np.testing.assert_allclose(b.manifest["std"], train.std((0,1,2)), rtol=1e-9)
    assert json.loads((tmp_path/"a/manifest.json").read_text())["counts"] == {s: {"a":250, "b":250} for s in ("train","valid","test")}

def broken_read(): raise ValueError("777.png: truncated")

def test_failure_in_a_worker(tmp_path):
    source, _ = noise_source(1200)
    prepare(source, tmp_path/"out", params("x", image_size=20), workers=2)
    before = sha256(tmp_path/"out/tiles.npy")
    source.records[777] = Record("777.png", "a", "train", "", "", broken_read)
    with pytest.raises(ValueError, match="777.png: truncated"): prepare(source, tmp_path/"out", params("x", image_size=20), workers=2)
    assert sha256(tmp_path/"out/tiles.npy") == before and [p.name for p in tmp_path.iterdir()] == ["out"]

def test_disk_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("usage", (), {"free":1000}))
    with pytest.raises(OSError, match="Make room or set data.limit"): prepare(noise_source(12)[0], tmp_path/"out", params("x"))
    assert not list(tmp_path.iterdir())

def test_much_shrunk_and_enlarged_tiles_are_noted(tmp_path):
    for name, size, said in (("a", 129, ["16 of 16 tiles were shrunk more than 8 times, the largest 8.1 times"]), ("b", 7, ["16 of 16 tiles were enlarged more than twice, the smallest 2.3 times"]), ("c", 32, [])):
        put(tmp_path/name, {f"{l}/{i}.png": image(10*i, (size, size)) for l in "ab" for i in range(8)})
        store = prepare(open_source(params(tmp_path/name)), tmp_path/"out", params("x", copies="warn"), 1)
        assert [n for n in store.manifest["notes"] if "times" in n] == said

def test_bmp_of_16_bits_a_pixel():
    "5-6-5 is less than 8 bits a channel."
    head = b"BM" + struct.pack("<IHHI", 70 + 32, 0, 0, 70) + struct.pack("<IiiHHIIiiII", 56, 4, 4, 1, 16, 3, 32, 0, 0, 0, 0) + struct.pack("<IIII", 0xF800, 0x7E0, 0x1F, 0)
    assert (decode(head + np.full(16, 0xF800, "<u2").tobytes(), "a.bmp") == [255, 0, 0]).all()

def test_not_square(tmp_path):
    source, data = noise_source(12, (20,30,3))
    store = prepare(source, tmp_path/"out", params("x", image_size=20))
    assert (store.tiles == data[:,:,5:25]).all() and store.manifest["notes"] == ["warning: 12 of 12 tiles were not square; their centre was kept"]
    with pytest.raises(ValueError, match="0.png: 50×12 px cannot be squared"): prepare(noise_source(6, (12,50,3))[0], tmp_path/"out", params("x"))

def test_fit_against_torchvision():
    from torchvision.transforms import v2
    tile = make_tile(np.random.default_rng(0), "NORM", TEST_CENTRE, 96)
    ours = fit(tile, 40, 80, "x")
    theirs = v2.Resize(40, v2.InterpolationMode.BICUBIC, antialias=True)(v2.CenterCrop(80)(torch.from_numpy(tile).permute(2,0,1)))
    assert np.abs(ours.astype(int) - theirs.permute(1,2,0).numpy()).max() <= 2

def test_limit_is_stratified(tmp_path):
    put(tmp_path, {**tiles(90, "a"), **tiles(25, "b")})
    s = open_source(params(tmp_path, limit=10))
    assert Counter((r.split, r.label) for r in s.records)["train","a"] == 8 and max(by_split(s).values()) == 10
    with pytest.raises(ValueError, match="data.limit is 1, fewer than the 2 classes"): open_source(params(tmp_path, limit=1))

def test_quotas():
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = rng.integers(1, 200, rng.integers(2, 10))
        last = np.ones(len(counts), int)
        for n in range(len(counts), counts.sum() + 1, 7):
            q = quotas(counts, n)
            assert q.sum() == n and (q <= counts).all() and (q >= last).all()       # a larger draw contains the smaller
            last = q
    assert quotas([10,0,10], 4).tolist() == [2,0,2]


# The store

@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepare(noise_source(300)[0], tmp_path_factory.mktemp("store")/"out", params("x", image_size=20))

def test_store_rows(store):
    parts = [store.indices(s) for s in ("train","valid","test")]
    assert sorted(np.concatenate(parts)) == list(range(300)) and all((np.diff(p) > 0).all() for p in parts)
    idx = parts[1][::-1]
    assert store.targets(idx).dtype == torch.int64 and [store.classes[t] for t in store.targets(idx)] == store.table.label[idx].tolist()
    assert store.groups(idx).tolist() == store.table.group[idx].tolist()
    with pytest.raises(ValueError, match="split 'val'"): store.indices("val")

@pytest.mark.parametrize("n, expected", [(2,2), (11,11), (.25,25), (1.,100), (None,100), (.001,2)])
def test_store_subset(store, n, expected):
    idx = store.subset("train", n, seed=1)
    counts = np.bincount(store.targets(idx))
    assert len(idx) == expected and set(idx) <= set(store.indices("train")) and abs(counts[0] - counts[1]) <= 1 and (np.diff(idx) > 0).all()
    assert (idx == store.subset("train", n, seed=1)).all() and set(idx) <= set(store.subset("train", 100, seed=1))
    if expected < 100: assert set(idx) != set(store.subset("train", n, seed=2)) 

@pytest.mark.parametrize("n", [0, 1, 101, 1.5, -.1])
def test_store_subset_refuses(store, n):
    with pytest.raises(ValueError, match="n_labels"): store.subset("train", n, seed=0)

def test_store_groups_unknown(tmp_path):
    source, _ = noise_source(12)
    source.records = [Record(r.path, r.label, r.split, "", "", r.read) for r in source.records]
    assert prepare(source, tmp_path/"none", params("x")).groups([0,1]) is None
    source.records[0] = Record("0.png", "a", "train", "p", "", source.records[0].read)
    assert prepare(source, tmp_path/"some", params("x")).groups([0,4,7]).tolist() == ["p", "row 4", "row 7"]

def test_store_batches(store):
    idx = torch.tensor([7,3,7])
    resident, mapped = store.to("cpu", max_bytes=10**9), store.to("cpu", max_bytes=1)
    assert resident.resident is not None and mapped.resident is None and store.resident is None
    for s in (resident, mapped, store):
        for i in (idx, idx.numpy(), idx.tolist()):
            b = s.batch(i)
            assert b.shape == (3,3,20,20) and b.dtype == torch.uint8 and (b.permute(0,2,3,1).numpy() == store.tiles[idx.numpy()]).all()

@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    "300 grey tiles with two further tasks, for which a fifth and half of them have no label."
    source, data = noise_source(300, (20,20))
    rng = np.random.default_rng(0)
    text = ["|".join(c for c in "xyz" if rng.random() < .4) or "z" if i%5 else "" for i in range(300)]
    source.records = [replace(r, labels={"many":m, "one":"uv"[i%4//2] if i%2 else ""}) for i,(r,m) in enumerate(zip(source.records, text))]
    source = replace(source, tasks={"many":Task(list("xyz"), True), "one":Task(list("uv"), False)}, channels=1, records=source.records)
    return prepare(source, tmp_path_factory.mktemp("asked")/"out", params("x", image_size=20)), data, text

def test_grey_tiles(asked):
    store, data, _ = asked
    assert store.channels == 1 and store.tiles.shape == (300,20,20,1) and (store.tiles[...,0] == data).all()
    np.testing.assert_allclose([store.manifest["mean"][0], store.manifest["std"][0]], [data[::3].mean()/255, data[::3].std()/255], rtol=1e-9)
    for s in (store, store.to("cpu", max_bytes=10**9)): assert s.batch([3,1]).shape == (2,1,20,20) and (s.batch([3,1])[:,0].numpy() == data[[3,1]]).all()
    assert contact_sheet(store, n=3).axes[0].images[0].get_array().shape == (40,60,3)

def test_tasks(asked):
    "Against pandas' own reading of joined labels."
    from sklearn.preprocessing import MultiLabelBinarizer
    store, _, text = asked
    hot = pd.Series(text).str.get_dummies("|").drop(columns="", errors="ignore")
    for split in ("train","valid","test"):
        rows = store.indices(split, "many")
        assert rows.tolist() == [i for i in store.indices(split) if text[i]]
        y = store.targets(rows, "many")
        assert y.dtype == torch.float32 and (y.numpy() == hot.loc[rows, list("xyz")]).all(axis=None) and (y.numpy() == MultiLabelBinarizer().fit_transform([text[i].split("|") for i in rows])).all()
        assert store.manifest["tasks"]["many"]["counts"][split] == hot.loc[rows].sum().to_dict()
        one = store.indices(split, "one")
        assert one.tolist() == [i for i in store.indices(split) if i%2] and store.targets(one, "one").tolist() == [i%4//2 for i in one]
    assert store.task("label") == Task(["a","b"], False) and store.task("many") == Task(list("xyz"), True) and store.targets([0,1]).dtype == torch.int64

@pytest.mark.parametrize("n", [3, 10, .2, 1., None])
def test_subset_of_a_task(asked, n):
    store, _, _ = asked
    idx = store.subset("valid", n, 1, "many")
    assert set(idx) <= set(store.indices("valid", "many")) and (store.targets(idx, "many").sum(0) > 0).all() and (np.diff(idx) > 0).all()
    assert len(idx) == {3:3, 10:10, .2:16, 1.:80, None:80}[n] and set(store.subset("valid", 3, 1, "many")) <= set(idx)

def test_task_refusals(asked):
    store, _, text = asked
    for ask in (lambda: store.task("margin"), lambda: store.indices("train", "margin"), lambda: store.subset("train", 5, 0, "margin")):
        with pytest.raises(ValueError, match="task 'margin': noise has label, many, one"): ask()
    with pytest.raises(ValueError, match="row 0 has no label of the task many"): store.targets([1,0], "many")
    with pytest.raises(ValueError, match="n_labels = 2: valid has 80 tiles in 3 classes"): store.subset("valid", 2, 0, "many")
    with pytest.raises(ValueError, match="probe.labels lists 500"): store.check_labels([500], "probe.labels", "one")

def test_colour_where_grey_was_announced(tmp_path):
    source, _ = noise_source(12)
    with pytest.raises(ValueError, match="0.png: uint8 .20, 20, 3., expected uint8 .H, W.\\."): prepare(replace(source, channels=1), tmp_path/"out", params("x"))

def test_store_damaged(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="Run the stage prepare"): TileStore(tmp_path)
    files = {p.name: p.read_bytes() for p in store.folder.iterdir()}
    put(tmp_path/"a", {**files, "tiles.npy":files["tiles.npy"][:-1000]})
    with pytest.raises(ValueError, match="tiles.npy: truncated"): TileStore(tmp_path/"a")
    put(tmp_path/"b", {**files, "table.csv":files["table.csv"].rsplit(b"\n", 2)[0]})
    with pytest.raises(ValueError, match="table.csv: not as it was written"): TileStore(tmp_path/"b")
    put(tmp_path/"c", {**files, "manifest.json":files["manifest.json"].replace(b'"tasks"', b'"other"')})
    with pytest.raises(ValueError, match="earlier version. Run the stage prepare again"): TileStore(tmp_path/"c")

def store_faults():
    def array(change): return lambda d: np.save(d/"tiles.npy", change(np.load(d/"tiles.npy")))
    def text(file, a, b): return lambda d: (d/file).write_text((d/file).read_text().replace(a, b))
    def byte(d):
        with open(d/"tiles.npy", "r+b") as f: f.seek(9999); b = f.read(1); f.seek(9999); f.write(bytes([b[0] ^ 1]))
    return {"other type": (array(lambda t: t.astype(np.int16)), "tiles.npy: int16"), "other shape": (array(lambda t: t[:, :10]), "tiles.npy: uint8 .300, 10, 20, 3."), "fewer": (array(lambda t: t[:-1]), "tiles.npy: uint8 .299"),
            "objects": (lambda d: np.save(d/"tiles.npy", np.array([{}]), allow_pickle=True), "tiles.npy: truncated or damaged"), "classes": (text("manifest.json", '"a",', '"c",'), "manifest.json: not as it was written"),
            "counts": (text("manifest.json", '"a": 50', '"a": 51'), "manifest.json: not as it was written"), "notes": (text("manifest.json", '"notes": []', '"notes": ["x"]'), "manifest.json: not as"), "no json": (text("manifest.json", "{", "["), "manifest.json: damaged"),
            "table": (text("table.csv", "0.png,a", "0.png,b"), "table.csv: not as it was written"), "hash of the table": (lambda d: (text("table.csv", "0.png,a", "0.png,b")(d), text("manifest.json", sha256(d/"table.csv"), "0"*64)(d)), "table.csv: not as"),
            "earlier": (lambda d: (d/"manifest.json").write_text(json.dumps({**json.loads((d/"manifest.json").read_text()), "sha256":{"tiles.npy":"", "table.csv":""}})), "earlier version. Run the stage prepare again"), "a byte": (byte, None)}

@pytest.mark.parametrize("kind", store_faults())
def test_store_knows_what_it_was_written_with(store, tmp_path, kind):
    change, message = store_faults()[kind]
    put(tmp_path, {p.name: p.read_bytes() for p in store.folder.iterdir()})
    assert TileStore(tmp_path).verify() is True
    change(tmp_path)
    if message:
        with pytest.raises(ValueError, match=message): TileStore(tmp_path)
    else:
        assert TileStore(tmp_path).verify(max_bytes=1000) is False
        with pytest.raises(ValueError, match="tiles.npy: not as it was written, its hash is another. Run the stage prepare again"): TileStore(tmp_path).verify()

def test_what_a_killed_prepare_left_is_cleared(tmp_path):
    "A folder half written by a process that is no more, and an earlier store that was moved aside; what a live process writes stays."
    source, _ = noise_source(30)
    prepare(source, tmp_path/"out", params("x", image_size=20))
    dead = next(p for p in range(4_000_000, 5_000_000) if not os.path.exists(f"/proc/{p}"))
    (tmp_path/"out").rename(tmp_path/".out.old"); (tmp_path/f".out.{dead}.part").mkdir(); (tmp_path/".out.1.part").mkdir()
    bad = replace(source, records=[replace(r, read=broken_read) if i == 7 else r for i, r in enumerate(source.records)])
    with pytest.raises(ValueError, match="777.png: truncated"): prepare(bad, tmp_path/"out", params("x", image_size=20))
    assert {p.name for p in tmp_path.iterdir()} == {"out", ".out.1.part"} and TileStore(tmp_path/"out").verify()

def test_contact_sheet(sample):
    import matplotlib.pyplot as plt
    p = params("nct", "nct")
    store = prepare(open_source(p, root=sample), sample/"prepared", p)
    fig = contact_sheet(store, n=5)
    assert "synthetic sample" in fig.get_suptitle() and [a.get_title().split()[0] for a in fig.axes] == ["train","test"]
    assert fig.axes[0].images[0].get_array().shape == (9*16, 5*16, 3) and [t.get_text() for t in fig.axes[0].get_yticklabels()] == NCT_CLASSES
    plt.close(fig)


# The sample

def test_sample_is_deterministic(tmp_path):
    for name, seed in (("a",0), ("b",0), ("c",1)): make_sample(tmp_path/name, seed, n_train=1, n_test=1, n_pcam=(8,4,6))
    files = [p.relative_to(tmp_path/"a") for p in (tmp_path/"a").rglob("*") if p.is_file()]
    assert len(files) == 11 and all((tmp_path/"a"/f).read_bytes() == (tmp_path/"b"/f).read_bytes() for f in files)
    assert all((tmp_path/"a"/f).read_bytes() != (tmp_path/"c"/f).read_bytes() for f in files if f.name.endswith((".zip","_x.h5")))

def test_sample_has_the_publishers_form(sample):
    with zipfile.ZipFile(sample/"nct/NCT-CRC-HE-100K.zip") as z:
        assert z.comment == b"sdmae synthetic sample"
        with Image.open(io.BytesIO(z.read([n for n in z.namelist() if "/TUM/" in n][0]))) as im:
            assert im.format == "TIFF" and im.info["compression"] == "jpeg" and im.size == (64,64) and im.mode == "RGB"
    meta = pd.read_csv(sample/f"pcam/{stem('train')}_meta.csv")
    assert len(meta) == 32 and meta.wsi.nunique() == 8 and meta.center_tumor_patch.sum() == 16

def test_bundled_sample_is_what_the_notebook_makes(bundled_sample):
    records = open_source(params("nct", "nct", image_size=64), root=bundled_sample).records
    for split, number, lab in (("train",0,CENTRES["A"]), ("test",1,TEST_CENTRE)):
        for c in (1, 6):
            name = "".join((rng := np.random.default_rng([0,number,c,0])).choice(list("ACDEFGHIKLMNPQRSTVWY"), 8))
            found = [r for r in records if name in r.path]
            assert len(found) == 1 and found[0].label == NCT_CLASSES[c]
            assert np.abs(found[0].read().astype(int) - make_tile(rng, NCT_CLASSES[c], lab)).mean() < 8
    assert sum(p.stat().st_size for p in bundled_sample.rglob("*") if p.is_file()) < 11.5e6

@pytest.fixture(scope="session")
def whole_store(bundled_sample, tmp_path_factory):
    p = params("nct", "nct", image_size=64, valid_fraction=.15)
    return prepare(open_source(p, root=bundled_sample), tmp_path_factory.mktemp("whole_store")/"out", p)

def histograms(tiles, bins=16): return np.stack([np.concatenate([np.histogram(t[...,c], bins, (0,256))[0] for c in range(3)]) for t in tiles])/tiles[0,...,0].size

def probe(store, features):
    "Test accuracy of logistic regression, C chosen on validation."
    (tr, va, te), best = (store.indices(s) for s in ("train","valid","test")), (0, 0)
    y = store.table.target.to_numpy()
    for C in (1e-3, 1e-2, .1, 1, 10):
        m = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=500)).fit(features[tr], y[tr])
        best = max(best, (m.score(features[va], y[va]), m.score(features[te], y[te])))
    return best[1]

def test_colour_does_not_give_the_class_away(whole_store):
    accuracy = probe(whole_store, histograms(whole_store.tiles))
    assert .15 < accuracy <= .60, f"48-bin colour histogram: {accuracy:.1%}"

def test_train_and_test_differ_in_stain(whole_store):
    density = -np.log(np.clip(whole_store.tiles/255, .01, None)).mean((1,2))
    a, b = (density[whole_store.indices(s)] for s in ("train","test"))
    assert (np.abs(a.mean(0) - b.mean(0)) > .3*a.std(0)).any() and (b.mean(0) > a.mean(0)).all()    # the test centre cuts thicker

def jitter(x):
    "Flips, a quarter turn, and optical density × and + random numbers per channel."
    x = x.flip(-1) if torch.rand(1) < .5 else x
    x = x.flip(-2) if torch.rand(1) < .5 else x
    x = x.transpose(-1,-2) if torch.rand(1) < .5 else x
    r = lambda *s: torch.randn(len(x), *s, 1, 1)
    od = -torch.log(x.clamp(.01))*(1 + .3*r(1)).clamp(.4,1.8)*(1 + .2*r(3)).clamp(.4,1.8) + .05*r(3)
    return torch.exp(-od.clamp(0))

def center(x): return (x - x.mean((2,3), keepdim=True))/x.std((2,3), keepdim=True).clamp(.02)

def small_cnn():
    layers, c = [], 3
    for w,s in ((24,1), (48,2), (96,2), (128,2)):
        layers += [torch.nn.Conv2d(c, w, 3, s, 1), torch.nn.BatchNorm2d(w), torch.nn.ReLU()]
        c = w
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(c, 9))

@pytest.mark.slow
def test_structure_does_give_the_class_away(whole_store):
    "A small CNN from scratch finds what the histogram and a random encoder do not."
    import timm
    torch.manual_seed(0)
    train, test = whole_store.subset("train", None, 0), whole_store.indices("test")
    model, epochs, x, y = small_cnn(), 14, whole_store.batch(train)/255, whole_store.targets(train)
    opt, steps = torch.optim.AdamW(model.parameters(), weight_decay=.05), len(x)//64
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=epochs*steps)
    for _ in range(epochs):
        for i in torch.randperm(len(x))[:steps*64].view(steps,64):
            torch.nn.functional.cross_entropy(model(center(jitter(x[i]))), y[i]).backward()
            opt.step(); opt.zero_grad(); schedule.step()
    model.eval()
    with torch.no_grad(): predicted = torch.cat([model(center(whole_store.batch(i)/255)).argmax(1) for i in np.array_split(test, 4)])
    accuracy = (predicted == whole_store.targets(test)).float().mean().item()
    vit = timm.models.VisionTransformer(img_size=64, patch_size=8, embed_dim=192, depth=6, num_heads=3, num_classes=0, class_token=False, global_pool="avg").eval()
    everything = np.array_split(np.arange(len(whole_store)), 20)
    with torch.no_grad(): features = torch.cat([vit.forward_features((whole_store.batch(i)/255 - .7)/.2).mean(1) for i in everything]).numpy()
    random = probe(whole_store, features)
    print(f"CNN {accuracy:.1%}, random ViT {random:.1%}")
    assert accuracy >= .90 and random < .70


# Real archives

def real(name):
    if not (REAL/name).is_file(): pytest.skip(f"{name} is not at hand: real data lies beside the project, never in it")
    return REAL/name

def test_real_pcam_subset():
    s = open_source(params(real("pcam_12k_96px_jpg.zip"), "pcam", image_size=96))
    assert by_split(s) == {"train":8000, "valid":1000, "test":3000} and s.classes == ["normal","tumor"] and not s.synthetic
    assert {k: round(v/len(s.records), 2) for k,v in Counter(r.label for r in s.records).items()} == {"normal":.5, "tumor":.5}
    for r in s.records[::1999]: assert r.read().shape == (96,96,3)

def test_real_pcam_subset_prepared(tmp_path):
    p = params(real("pcam_12k_96px_jpg.zip"), "pcam", image_size=48, limit=100)
    store = prepare(open_source(p), tmp_path/"out", p, workers=2)
    assert len(store) == 300 and store.manifest["counts"]["train"] == {"normal":50, "tumor":50} and .4 < store.manifest["mean"][0] < .9

def test_real_nct_tiles(tmp_path):
    with zipfile.ZipFile(real("nctcrc_70_224px_jpg.zip")) as z:
        put(tmp_path, {f"{n.split('___')[0]}/{n}": z.read(n) for n in z.namelist() if n.endswith(".jpg")})
    s = open_source(params(tmp_path))
    assert len(s.records) == 70 and len(s.classes) == 7 and by_split(s) == {"train":42, "valid":14, "test":14}
    assert s.records[0].read().shape == (224,224,3)
