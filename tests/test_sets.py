"""Data sets in their publishers' layouts, tables of one's own, and unions: tiny copies of each, and what may be wrong with them."""
import json, zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image

from sdmae.data.store import prepare
from sdmae.params import DataParams, compose, parse_params
from sdmae.sources.publishers import ADAPTERS, open_source

REAL = Path(__file__).parents[2]/"shared"/"realdata"
has = lambda name: pytest.mark.skipif(not (REAL/name).is_file(), reason=f"../shared/realdata/{name} is not here")


def params(path, adapter, **more): return DataParams(**{"name": "a set", "adapter": adapter, "path": str(path), "image_size": 8, **more})


def tiles(folder, names):
    "A tile of noise of its own for each name."
    for i, n in enumerate(names):
        (folder/n).parent.mkdir(parents=True, exist_ok=True)
        im = Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8))
        im.save(folder/n, {"tif": "TIFF", "png": "PNG"}.get(n.rsplit(".")[-1], "JPEG"))
    return folder


def said(source, *keys): return {tuple(getattr(r, k) for k in keys) for r in source.records}


def by_split(source): return Counter(r.split for r in source.records)


def whole_groups(source):
    where = {}
    for r in source.records: where.setdefault(r.group, set()).add(r.split)
    return all(len(s) == 1 for s in where.values())


BACH = [f"ICIAR2018_BACH_Challenge/Photos/{c}/{p}{i:03}.tif" for c, p in zip(("Benign", "InSitu", "Invasive", "Normal"), ("b", "is", "iv", "n"))
        for i in range(6)]
BREAKHIS = [f"BreaKHis_v1/histology_slides/breast/{k}/SOB/{t}/SOB_{l}_{s}_14-{p}/{m}X/SOB_{l}_{s}-14-{p}-{m}-{i:03}.png"
            for k, t, l, s, ps in (("benign", "adenosis", "B", "A", ("22549AB", "29960CD", "22549CD", "1")),
                                   ("malignant", "ductal_carcinoma", "M", "DC", ("2523", "2773", "3909", "4364")))
            for p in ps for m in (40, 100) for i in (1, 2)]
KATHER = [f"Kather_texture_2016_image_tiles_5000/{c}/{i}A{s}_CRC-Prim-HE-{s:02}_0{i}.tif_Row_151_Col_{i}.tif"
          for c in ("01_TUMOR", "02_STROMA", "03_COMPLEX", "04_LYMPHO", "05_DEBRIS", "06_MUCOSA", "07_ADIPOSE", "08_EMPTY")
          for s in range(1, 7) for i in (1, 2)]
IDC = [f"{p}/{c}/{p}_idx5_x{x}_y51_class{c}.png" for p in range(8863, 8871) for c in (0, 1) for x in (1, 51)]
LC = [f"lung_colon_image_set/{o}_image_sets/{c}/{s}{i}.jpeg" for o, c, s in (("lung", "lung_aca", "lungaca"), ("lung", "lung_n", "lungn"),
      ("lung", "lung_scc", "lungscc"), ("colon", "colon_aca", "colonca"), ("colon", "colon_n", "colonn")) for i in range(1, 13)]
CHAOYANG = {"train": [("353042_4", 0), ("353042_5", 1), ("535940", 2), ("1234", 3), ("61", 0), ("62", 1), ("63", 2), ("64", 3)],
            "test": [("77", 0), ("78", 1), ("79", 2), ("80_1", 3)]}


def mhist(folder, **change):
    rows = [dict(zip(("Image Name", "Majority Vote Label", "Number of Annotators who Selected SSA (Out of 7)", "Partition"),
                     (f"MHIST_{i:03}.png", ("HP", "SSA")[i % 2], (i//2 % 4, 4 + i//2 % 4)[i % 2], ("train", "test")[i > 15]))) for i in range(24)]
    tiles(folder, [f"images/{r['Image Name']}" for r in rows])
    pd.DataFrame(rows).rename(columns=change).to_csv(folder/"annotations.csv", index=False)
    return folder


def chaoyang(folder):
    for s, cases in CHAOYANG.items():
        rows = [dict(name=f"{s}/{c}-IMG{i:03}x0{i}-{l}.JPG", label=l) for c, l in cases for i in range(4)]
        tiles(folder, [r["name"] for r in rows])
        (folder/f"{s}.json").write_text(json.dumps(rows))
    return folder


def wilds(folder, **change):
    rows = [dict(patient=f"{4*c + p:03}", node=p, x_coord=100*t, y_coord=7, tumor=t % 2, slide=4*c + p, center=c, split=int(c != 2 and t > 3)) | change
            for c in range(5) for p in range(2) for t in range(6)]
    for r in rows: tiles(folder, ["patches/patient_{patient}_node_{node}/patch_patient_{patient}_node_{node}_x_{x_coord}_y_{y_coord}.png".format(**r)])
    pd.DataFrame(rows).to_csv(folder/"metadata.csv")
    return folder


def pathmnist(file, n=18, **change):
    make = lambda i: np.random.default_rng(i).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    arrays = {f"{s}_{k}": v for i, s in enumerate(("train", "val", "test")) for k, v in (("images", make(i)), ("labels", np.arange(n)[:, None] % 9))}
    np.savez_compressed(file, **(arrays | change))
    return file


# Each as its publisher ships it

@pytest.mark.parametrize("adapter, names, classes, groups, published", [
    ("bach", BACH, ["Normal", "Benign", "InSitu", "Invasive"], 0, 400),
    ("breakhis", BREAKHIS, ["benign", "malignant"], 8, 7909),
    ("kather2016", KATHER, ["TUMOR", "STROMA", "COMPLEX", "LYMPHO", "DEBRIS", "MUCOSA", "ADIPOSE", "EMPTY"], 6, 5000),
    ("idc", IDC, ["no IDC", "IDC"], 8, 277524),
    ("lc25000", LC, ["lung_n", "lung_aca", "lung_scc", "colon_n", "colon_aca"], 0, 25000)])
@pytest.mark.parametrize("zipped", [False, True])
def test_sets_that_say_all_in_their_names(tmp_path, adapter, names, classes, groups, published, zipped):
    tiles(tmp_path/"set", names)
    if zipped:
        with zipfile.ZipFile(tmp_path/"set.zip", "w") as z: [z.write(tmp_path/"set"/n, n) for n in names]
    source = open_source(params(tmp_path/("set.zip" if zipped else "set"), adapter))
    assert source.classes == classes and len(source.records) == len(names) and {r.label for r in source.records} == set(classes)
    assert len({r.group for r in source.records} - {""}) == groups and (not groups or whole_groups(source))
    assert set(by_split(source)) == {"train", "valid", "test"} and source.records[0].read().shape == (8, 8, 3)
    assert any(n.startswith("warning:") and f"{len(names)} tiles, {published} were published" in n for n in source.notes)


def test_a_zip_may_stay_packed_in_the_folder_that_is_named(tmp_path):
    tiles(tmp_path/"x", KATHER)
    (tmp_path/"data").mkdir()
    with zipfile.ZipFile(tmp_path/"data/Kather_texture_2016_image_tiles_5000.zip", "w") as z: [z.write(tmp_path/"x"/n, n) for n in KATHER]
    assert len(open_source(params(tmp_path/"data", "kather2016")).records) == len(KATHER)


def test_what_lies_beside_the_tiles_of_bach(tmp_path):
    source = open_source(params(tiles(tmp_path, [*BACH, "ICIAR2018_BACH_Challenge/WSI/gt_thumbnails/A01.png"]), "bach"))
    assert len(source.records) == 24 and "images that are no tiles, left out: 1" in source.notes


def test_breakhis_asks_three_questions_and_one_magnification_may_be_picked(tmp_path):
    tiles(tmp_path, BREAKHIS)
    source = open_source(params(tmp_path, "breakhis", pick="/40X/"))
    assert {r.labels["magnification"] for r in source.records} == {"40X"} and len(source.records) == 16
    assert {(r.label, r.labels["subtype"]) for r in source.records} == {("benign", "adenosis"), ("malignant", "ductal carcinoma")}
    store = prepare(source, tmp_path/"store", params(tmp_path, "breakhis"))
    assert len(store.tasks["subtype"].classes) == 8 and set(store.table.magnification) == {"40X"}
    with pytest.raises(ValueError, match="data.pick: no path has '/41X/'"): open_source(params(tmp_path, "breakhis", pick="/41X/"))


def test_the_usual_copy_of_idc_holds_it_twice(tmp_path):
    source = open_source(params(tiles(tmp_path, [*IDC, *(f"IDC_regular/{n}" for n in IDC)]), "idc"))
    assert len(source.records) == len(IDC) and f"images that lie there a second time, in another folder, left out: {len(IDC)}" in source.notes


def test_mhist_keeps_the_votes(tmp_path):
    source = open_source(params(mhist(tmp_path), "mhist"))
    assert by_split(source)["test"] == 8 and source.publisher and source.tasks["votes"].classes[0] == "0 of 7"
    assert {(r.label, r.labels["votes"]) for r in source.records} >= {("HP", "3 of 7"), ("SSA", "4 of 7"), ("SSA", "7 of 7")}


def test_chaoyang_knows_its_patients(tmp_path):
    source = open_source(params(chaoyang(tmp_path), "chaoyang"))
    assert {g for s, g in said(source, "split", "group") if s == "test"} == {"77", "78", "79", "80"} and whole_groups(source)
    assert {g for s, g in said(source, "split", "group") if s != "test"} == {"353042", "535940", "1234", "61", "62", "63", "64"}
    assert source.classes == ["normal", "serrated", "adenocarcinoma", "adenoma"] and by_split(source)["test"] == 16


def test_a_patient_on_both_sides_of_chaoyangs_split_is_told(tmp_path):
    chaoyang(tmp_path)
    rows = json.loads((tmp_path/"test.json").read_text())
    rows.append(dict(name="test/535940-IMG009x009-2.JPG", label=2))
    tiles(tmp_path, [rows[-1]["name"]]); (tmp_path/"test.json").write_text(json.dumps(rows))
    assert any("warning: groups in two splits, as their publisher has it: 1" in n for n in open_source(params(tmp_path, "chaoyang")).notes)


def test_wilds_splits_by_hospital(tmp_path):
    source = open_source(params(wilds(tmp_path), "wilds"))
    assert said(source, "split", "centre") == {("train", "hospital 0"), ("train", "hospital 3"), ("train", "hospital 4"),
                                               ("valid", "hospital 1"), ("test", "hospital 2")}
    assert len({r.group for r in source.records}) == 10 and whole_groups(source)
    assert "tiles for tuning from hospitals of training, left out: 12" in source.notes and by_split(source) == dict(train=24, valid=12, test=12)


def test_pathmnist_is_read_without_being_loaded(tmp_path):
    file = pathmnist(tmp_path/"pathmnist_64.npz")
    source = open_source(params(tmp_path, "pathmnist"))
    with np.load(file) as npz: pixels = npz["val_images"]
    valid = [r for r in source.records if r.split == "valid"]
    assert all((r.read() == pixels[i]).all() for i, r in [*enumerate(valid)][::-1]) and source.classes[0] == "ADI" and valid[8].label == "TUM"
    store = prepare(source, tmp_path/"store", params(tmp_path, "pathmnist"))
    assert (np.asarray(store.tiles[18:36]) == pixels).all()


# Bad input

@pytest.mark.parametrize("adapter, names, message", [
    ("bach", BACH[:12], "'(Normal|Invasive)' has no tile in train.*drop_classes"),          # half of a download
    ("bach", ["Photos/Benign/b001.tif", "Photos/Bening/b002.tif"], "Photos/Bening/b002.tif is not named as its publisher does"),
    ("idc", ["8863/1/8863_idx5_x1_y1_class0.png"], "is not named as its publisher does"),  # folder and name disagree
    ("kather2016", ["01_TUMOUR/1_CRC-Prim-HE-01_1.tif"], "is not named"),
    ("breakhis", ["SOB_B_X-14-1-40-001.png"], "is not named"),
    ("mhist", ["images/MHIST_1.png"], "annotations.csv is missing"),
    ("chaoyang", ["train/1-IMG1-0.JPG"], "train.json is missing"),
    ("wilds", ["patches/a/b.png"], "metadata.csv is missing"),
    ("pathmnist", ["a.png"], "pathmnist.npz or one of its larger sizes is needed")])
def test_another_layout_or_half_of_it(tmp_path, adapter, names, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message): open_source(params(tiles(tmp_path, names), adapter))


@pytest.mark.parametrize("make, adapter, pattern", [(mhist, "mhist", "images/*"), (chaoyang, "chaoyang", "train/*"), (wilds, "wilds", "patches/*/*")])
def test_a_table_that_names_more_than_was_downloaded(tmp_path, make, adapter, pattern):
    make(tmp_path)
    for p in sorted(tmp_path.glob(pattern))[::2]: p.unlink()
    with pytest.raises(FileNotFoundError, match=r"row .* names .*, which is not in .* of .* rows name such files. Is the download complete"):
        open_source(params(tmp_path, adapter))


def test_tables_with_other_columns_or_words(tmp_path):
    with pytest.raises(ValueError, match="column 'partition' is missing; there are"):
        open_source(params(mhist(tmp_path/"a", Partition="Fold"), "mhist"))
    mhist(tmp_path/"b")
    file = tmp_path/"b/annotations.csv"
    file.write_text(file.read_text().replace(",train", ",training set"))
    with pytest.raises(ValueError, match="row 2 has partition 'training set'; expected train, test"): open_source(params(tmp_path/"b", "mhist"))
    mhist(tmp_path/"c")
    file = tmp_path/"c/annotations.csv"
    file.write_text(file.read_text().replace("MHIST_001.png,SSA,4", "MHIST_001.png,SSA,3"))
    with pytest.raises(ValueError, match="row 3 is SSA by 3 of 7 votes"): open_source(params(tmp_path/"c", "mhist"))
    with pytest.raises(ValueError, match="row 2 has tumor '2'"): open_source(params(wilds(tmp_path/"d", tumor=2), "wilds"))


def test_a_truncated_or_foreign_npz(tmp_path):
    file = pathmnist(tmp_path/"pathmnist.npz")
    data = file.read_bytes()
    file.write_bytes(data[:len(data)//2])
    with pytest.raises(ValueError, match="pathmnist.npz: damaged"): open_source(params(file, "pathmnist"))
    pathmnist(file, val_labels=np.full((18, 1), 9))
    with pytest.raises(ValueError, match="val_labels has 9, expected 0 to 8"): open_source(params(file, "pathmnist"))
    pathmnist(file, test_images=np.zeros((18, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="test_images"): open_source(params(file, "pathmnist"))


# Groups that others found

def test_lc25000_with_a_table_of_groups_keeps_copies_together(tmp_path):
    tiles(tmp_path, LC)
    names = [Path(n).name for n in LC]
    table = pd.DataFrame(dict(filename=names, group_id=[f"{n[:5]}{i//3}" for i, n in enumerate(names)], tissue="lung"))
    table.to_csv(tmp_path/"groups.csv", index=False)
    told = dict(groups="groups.csv", columns={"path": "filename", "group": "group_id"})
    source = open_source(params(tmp_path, "lc25000", **told))
    assert whole_groups(source) and len({r.group for r in source.records}) == 20
    assert not any("about twenty times" in n for n in source.notes)
    assert any("about twenty times" in n for n in open_source(params(tmp_path, "lc25000")).notes)
    table.iloc[:-1].to_csv(tmp_path/"groups.csv", index=False)
    with pytest.raises(ValueError, match="no group of colonn12.jpeg; 1 of 60 tiles have none"): open_source(params(tmp_path, "lc25000", **told))
    with pytest.raises(ValueError, match="takes group from 'cluster', and there is no such column; there are .*'group_id'"):
        open_source(params(tmp_path, "lc25000", groups="groups.csv", columns={"path": "filename", "group": "cluster"}))
    with pytest.raises(FileNotFoundError, match="clean.csv does not exist: data.groups"):
        open_source(params(tmp_path, "lc25000", groups="clean.csv"))
    pd.concat([table, table.iloc[:1].assign(group_id="x")]).to_csv(tmp_path/"groups.csv", index=False)
    with pytest.raises(ValueError, match="names lungaca1.jpeg again, in another group"): open_source(params(tmp_path, "lc25000", **told))


# Tables of one's own

def table(folder, splits=("trainA", "testA", "testB")):
    rows = [dict(name=f"t{i}", set=splits[i % 3], patient=f"p{i % 3}{i % 2}{i // 24}", kind="ab"[i // 3 % 2]) for i in range(48)]
    tiles(folder, [f"{r['set']}/{r['name']}.png" for r in rows])
    pd.DataFrame(rows).to_csv(folder/"index.csv", index=False)
    return folder/"index.csv"


OWN = {"path": "{set}/{name}.png", "group": "patient", "label": "kind", "split": "set"}


def test_a_table_says_which_column_is_which(tmp_path):
    source = open_source(params(table(tmp_path), "csv", columns=OWN, splits={"trainA": "train", "testA": "valid", "testB": "test"}))
    assert by_split(source) == dict(train=16, valid=16, test=16) and source.classes == ["a", "b"] and len({r.group for r in source.records}) == 12
    assert not any("not used" in n for n in source.notes) and source.records[1].path == "testA/t1.png"


@pytest.mark.parametrize("change, message", [
    (dict(columns=OWN | {"group": "case"}), "data.columns takes group from 'case', and there is no such column; there are .*'patient'"),
    (dict(columns=OWN | {"path": "{set}/{file}.png"}), "takes path from 'file'"),
    (dict(columns=OWN), "row 2 has split 'trainA'; expected one of train, valid, test .* data.splits"),
    (dict(columns={k: v for k, v in OWN.items() if k != "path"}), "column 'path' is missing; .* data.columns says which it is")])
def test_columns_and_words_that_are_not_there(tmp_path, change, message):
    with pytest.raises(ValueError, match=message): open_source(params(table(tmp_path), "csv", **change))


def test_columns_are_for_tables():
    with pytest.raises(ValueError, match="columns is for adapter: csv"): params("x", "folder", columns={"path": "file"})
    with pytest.raises(ValueError, match="splits is for adapter: csv"): params("x", "folder", splits={"testA": "test"})
    with pytest.raises(ValueError, match="'path', 'label'"): params("x", "csv", columns={"patient": "file"})


# Real sets

def unpacked(name, folder):
    with zipfile.ZipFile(REAL/name) as z: z.extractall(folder)
    return folder


@has("idc_50px_jpg.zip")
def test_real_idc_by_patient(tmp_path):
    path = unpacked("idc_50px_jpg.zip", tmp_path)/"labels.csv"
    source = open_source(params(path, "csv", columns={"path": "file", "group": "patient"}))
    assert by_split(source) == dict(train=4556, valid=1017, test=1510) and whole_groups(source)
    names = pd.read_csv(path).file
    pd.read_csv(path).assign(split=["train" if i % 2 else "test" for i in range(len(names))]).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"tiles of one patient or slide must stay in one split, and \d+ of \d+ groups"):
        open_source(params(path, "csv", columns={"path": "file", "group": "patient"}))


@has("lc25000_lung_224px_jpg.zip")
def test_real_lc25000_leak_is_found_by_group(tmp_path):
    path = unpacked("lc25000_lung_224px_jpg.zip", tmp_path)/"labels.csv"
    source = open_source(params(path, "csv", columns={"path": "file"}))
    assert len(source.records) == 2220 and whole_groups(source)
    with pytest.raises(ValueError, match=r"must stay in one split, and \d+ of \d+ groups are in several"):
        open_source(params(path, "csv", columns={"path": "file", "split": "split_leaky"}))


@has("glas165_halfsize_glands.zip")
def test_real_glas_shares_patients_between_its_official_splits(tmp_path):
    path = unpacked("glas165_halfsize_glands.zip", tmp_path)/"index.csv"
    told = dict(columns={"path": "{split}/images/{name}.jpg", "group": "patient"}, splits={"testA": "test", "testB": "test"})
    with pytest.raises(ValueError, match=r"and 11 of 1\d groups are in several"): open_source(params(path, "csv", **told))
    rows = pd.read_csv(path).rename(columns={"split": "set"})
    rows.to_csv(path, index=False)
    source = open_source(params(path, "csv", columns={"path": "{set}/images/{name}.jpg", "group": "patient"}))
    assert len(source.records) == 165 and whole_groups(source)

# Configurations

@pytest.mark.parametrize("name", ["bach", "breakhis", "chaoyang", "idc", "kather2016", "lc25000", "mhist", "pathmnist", "wilds"])
def test_each_set_is_chosen_by_its_name(name):
    data = parse_params(compose([f"data={name}"])).data["tissue"]
    assert data.adapter == name and data.path == f"data/{name}" and name in ADAPTERS


# %% several sets as one
def two_sets(folder):
    tiles(folder/"both"/"idc", IDC); mhist(folder/"both"/"mhist")
    return dict(idc=dict(name="IDC", adapter="idc", path="both/idc"), mhist=dict(name="MHIST", adapter="mhist", path="both/mhist"))


def test_a_union_keeps_splits_and_groups_of_its_parts_and_leaves_labels_out(tmp_path):
    parts = two_sets(tmp_path)
    union = params("both", "union", union=parts)
    source = open_source(union, tmp_path)
    alone = {k: open_source(params(**v), tmp_path) for k, v in parts.items()}
    assert len(source.records) == sum(len(a.records) for a in alone.values()) and source.classes == [] and source.tasks == {}
    assert {r.label for r in source.records} == {""} and {r.centre for r in source.records} == {"IDC", "MHIST"}
    for name, a in alone.items():
        own = [r for r in source.records if r.path.startswith(f"{name}/")]
        assert [(r.path, r.split) for r in own] == [(f"{name}/{r.path}", r.split) for r in a.records]
        assert [r.group for r in own] == [f"{name}/{r.group}"*bool(r.group) for r in a.records]
        assert all((one.read() == other.read()).all() for one, other in zip(own[:3], a.records))
    assert source.publisher and any(n.startswith("warning: MHIST: ") for n in source.notes)
    store = prepare(source, tmp_path/"store", union)
    assert len(store) == len(source.records) and not store.tasks and set(store.table.centre) == {"IDC", "MHIST"}


@pytest.mark.parametrize("change, message", [
    (dict(union=None), "a section union belongs to adapter: union"),
    (dict(union={"idc": dict(adapter="idc", path="both/idc")}), "at least two sets are needed"),
    (dict(drop_classes=["IDC"]), "drop_classes is said of a part, union.idc.drop_classes"),
    (dict(idc=dict(image_size=16)), "union.idc.image_size is said of the whole union"),
    (dict(idc=dict(path="elsewhere/idc")), "union.idc.path: elsewhere/idc is not in both"),
    (dict(idc=dict(adapter="union", union={})), "union.idc.adapter: union cannot be a part|at least two sets"),
    (dict(idc=dict(columns={"path": "file"})), "columns is for adapter: csv")])
def test_a_union_that_cannot_be(change, message):
    parts = {k: dict(adapter=k, path=f"both/{k}") for k in ("idc", "mhist")}
    parts["idc"] |= change.pop("idc", {})
    with pytest.raises(ValueError, match=message): params("both", "union", **{"union": parts} | change)


def test_a_part_that_is_missing_is_named(tmp_path):
    parts = two_sets(tmp_path)
    with pytest.raises(FileNotFoundError, match="data union.idc: .*lost does not exist"):
        open_source(params("both", "union", union=parts | dict(idc=dict(adapter="idc", path="both/lost"))), tmp_path)
    (tmp_path/"both/mhist/images/MHIST_003.png").unlink()
    with pytest.raises(FileNotFoundError, match="data union.mhist: .*MHIST_003.png"): open_source(params("both", "union", union=parts), tmp_path)


def test_grey_and_colour_are_not_mixed(tmp_path, monkeypatch):
    parts, read = two_sets(tmp_path), ADAPTERS["idc"]
    monkeypatch.setitem(ADAPTERS, "idc", lambda path, data: replace(read(path, data), channels=1))
    with pytest.raises(ValueError, match="data union: IDC is grey"): open_source(params("both", "union", union=parts), tmp_path)
