"""Sources, store and sample: every adapter in each of its forms, and every kind of bad input."""
import io, json, zipfile
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
from sdmae.data.records import Record, Source, Task, quotas
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
    {"a.png":image()}, {"a/1.png":image(), "b.png":image()},
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
    (lambda t: t.drop(columns="label"), ValueError, "column 'label' is missing"),
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
    hot = pd.Series(text).str.get_dummies("|")
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
