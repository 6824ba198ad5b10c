"""CBIS-DDSM: the counts of the real case descriptions, every layout, every kind of bad input, and the synthetic lesions."""
import io, struct, zipfile, zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np, pandas as pd, pydicom, pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless
from skimage.measure import regionprops
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler

from sdmae.sources import cbis as cbis_module
from sdmae.sources.cbis import MARGINS, all_cases, answers, drop_shared, grey_size, read_grey, to_bytes
from sdmae.sample.lesions import draw_patient, make_lesions, make_mammogram
from sdmae.sources.publishers import open_source
from sdmae.data.store import prepare
from sdmae.params import DataParams

REAL = Path(__file__).parents[2]/"shared"/"realdata"/"cbis_mass_256px_png.zip"


def params(path, **cbis):
    return DataParams(name="test", adapter="cbis", path=str(path), image_size=32, valid_fraction=.3, cbis=cbis)


# A small set in each of the layouts

def row(finding, split, patient, lesion=1, pathology="BENIGN", words="CIRCUMSCRIBED", side="LEFT", view="CC", density="2"):
    return dict(finding=finding, split=split, patient=f"P_{patient:05d}", lesion=lesion, pathology=pathology, words=words, side=side, view=view, density=density)

def case(r): return f"{r['finding'].title()}-{'Training' if r['split'] == 'train' else 'Test'}_{r['patient']}_{r['side']}_{r['view']}"

ROWS = [row("mass", "train", 1, 1, "MALIGNANT", "SPICULATED"), row("mass", "train", 1, 2, "BENIGN", "N/A"),
        row("mass", "train", 1, 1, "MALIGNANT", "SPICULATED-ILL_DEFINED", view="MLO"),
        *(row("mass", "train", i, 1, ("BENIGN_WITHOUT_CALLBACK","MALIGNANT")[i%2], "OBSCURED", "RIGHT") for i in range(2, 10)),
        row("mass", "test", 20, 1, "BENIGN", "MICROLOBULATED"), row("mass", "test", 21, 1, "MALIGNANT", "CIRCUMSCRIBED-OBSCURED"),
        *(row("calc", "train", i, 1, ("BENIGN","MALIGNANT")[i%2], "PLEOMORPHIC-PLEOMORPHIC", density="0") for i in (20, 31, 32, 33, 34, 35)),
        row("calc", "test", 40, 1, "MALIGNANT", "AMORPHOUS-PUNCTATE"), row("calc", "test", 41, 1, "BENIGN", "N/A")]

def csvs(rows, spell=lambda c: c):
    "The four case descriptions, as bytes; paths end in a line break, as published."
    out = {}
    for finding in ("mass", "calc"):
        for split in ("train", "test"):
            said = lambda r: {"mass shape":"OVAL-LYMPH_NODE", "mass margins":r["words"]} if finding == "mass" else {"calc type":r["words"]}
            table = [{"patient_id":r["patient"], "breast_density":r["density"], "left or right breast":r["side"], "image view":r["view"], "abnormality id":r["lesion"], **said(r),
                      "pathology":r["pathology"], "image file path":f"{case(r)}/1.3/1.3/000000.dcm\n"} for r in rows if (r["finding"], r["split"]) == (finding, split)]
            frame = pd.DataFrame(table)
            out[f"{finding}_case_description_{split}_set.csv"] = frame.rename(columns=spell).to_csv(index=False).encode()
    return out

def pixels(r):
    "A mammogram from dark 0 to bright 255, and the lesion's mask: an ellipse that may reach the edge."
    rng = np.random.default_rng([int(r["patient"][2:]), r["view"] == "MLO"])
    y, x = np.mgrid[:70,:50]
    image = (127.5 + 127.5*np.sin(x/rng.uniform(6, 9))*np.cos(y/rng.uniform(6, 9))).astype(np.uint8)
    image[0,0], image[0,1] = 0, 255
    cy, cx = rng.uniform(8, 62), rng.uniform(8, 42)
    cy, cx = (cy, cx) if r["lesion"] == 1 else (69 - cy, 49 - cx)
    return image, ((y - cy)/9)**2 + ((x - cx)/5)**2 < 1

def crop(image, mask):
    "The lesion's square, another way: pad, then cut."
    top, left, bottom, right = regionprops(mask.astype(int))[0].bbox
    side = max(bottom - top, right - left)
    y, x = top - (side - bottom + top + 1)//2, left - (side - right + left + 1)//2
    return np.pad(image, 100)[100+y:100+y+side,100+x:100+x+side]

def encode(pixels, form, **kwargs):
    out = io.BytesIO(); Image.fromarray(pixels).save(out, form, **kwargs)
    return out.getvalue()

def dicom(pixels, photometric="MONOCHROME2", compressed=False):
    meta = FileMetaDataset(); meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    d, bits = FileDataset("", {}, file_meta=meta, preamble=b"\0"*128), pixels.dtype.itemsize*8
    d.Rows, d.Columns = pixels.shape; d.SamplesPerPixel, d.PhotometricInterpretation = 1, photometric
    d.BitsAllocated = d.BitsStored = bits; d.HighBit, d.PixelRepresentation, d.PixelData = bits - 1, 0, pixels.tobytes()
    if compressed: d.compress(RLELossless, generate_instance_uid=False)
    out = io.BytesIO(); d.save_as(out)
    return out.getvalue()

def as_dicom(rows, name="1-{}.dcm", first=1, compressed=False):
    "TCIA's folders; mask and cut-out change places from lesion to lesion."
    files = csvs(rows)
    for i,r in enumerate(rows):
        image, mask = pixels(r)
        files[f"CBIS-DDSM/{case(r)}/08-07-2016-DDSM-NA-1/1.000000-full mammogram images-2/{name.format(first)}"] = dicom(image.astype(np.uint16)*257, compressed=compressed)
        both = [dicom(crop(image, mask).astype(np.uint16)*257, compressed=compressed), dicom(mask*np.uint8(255), compressed=compressed)]
        for j,data in enumerate(both[::(-1)**i]): files[f"CBIS-DDSM/{case(r)}_{r['lesion']}/08-07-2016-DDSM-NA-3/1.000000-ROI mask images-4/{name.format(first+j)}"] = data
    return files

def as_jpeg(rows):
    "The copies with a dicom_info.csv, everything JPEG."
    files, info = {f"csv/{k}": v for k,v in csvs(rows).items()}, {}
    for i,r in enumerate(rows):
        image, mask = pixels(r)
        for key,what,data in ((case(r), "full mammogram images", image), (f"{case(r)}_{r['lesion']}", "cropped images", mask*np.uint8(255)), (f"{case(r)}_{r['lesion']}", "ROI mask images", crop(image, mask))):
            name = f"jpeg/1.3.6.1.4.{i}{len(what)}/1-{i:03d}.jpg"
            if key == case(r) and key in {v[0] for v in info.values()}: continue
            files[name], info[name] = encode(data, "JPEG", quality=95), (key, what)
    table = pd.DataFrame([{"image_path":f"CBIS-DDSM/{n}", "PatientID":k, "SeriesDescription":w} for n,(k,w) in info.items()])
    return {**files, "csv/dicom_info.csv":table.to_csv(index=False).encode()}

def repacked(rows):
    files = {f"csv/{k}": v for k,v in csvs(rows).items()}
    for r in rows:
        image, mask = pixels(r)
        files[f"{r['split']}/images/{case(r)}_FULL.png"], files[f"{r['split']}/masks/{case(r)}_MASK_{r['lesion']}.png"] = encode(image, "PNG"), encode(mask, "PNG")
    return files

def put(folder, files):
    for name, data in files.items():
        p = Path(folder)/name; p.parent.mkdir(parents=True, exist_ok=True); p.write_bytes(data)
    return Path(folder)

def zipped(file, files):
    with zipfile.ZipFile(file, "w") as z:
        for name, data in files.items(): z.writestr(name, data)
    return Path(file)


@pytest.mark.parametrize("pack", [put, zipped])
@pytest.mark.parametrize("layout", [as_dicom, lambda r: as_dicom(r, "00000{}.dcm", 0), lambda r: as_dicom(r, compressed=True), as_jpeg, repacked], ids=["1-1.dcm", "000000.dcm", "compressed", "jpeg", "repacked"])
def test_layouts_give_the_same(tmp_path, pack, layout):
    s = open_source(params(pack(tmp_path/"cbis.zip", layout(ROWS))))
    assert len(s.records) == len(ROWS) and s.classes == ["BENIGN_MASS","MALIGNANT_MASS","BENIGN_CALC","MALIGNANT_CALC"] and s.channels == 1 and not s.synthetic
    for r,record in zip(ROWS, s.records):
        assert record.label == r["pathology"].split("_")[0] + "_" + r["finding"].upper() and record.group == r["patient"] and (record.split == "test") == (r["split"] == "test")
        assert record.path.endswith(f"#{r['lesion']}")
        ours, theirs = record.read(), crop(*pixels(r))
        assert ours.dtype == np.uint8 and (ours.shape == theirs.shape or layout is as_jpeg)
        if layout is not as_jpeg: assert (ours == theirs).all()
        elif ours.shape == theirs.shape: assert np.abs(ours.astype(int) - theirs).mean() < 3
    assert [n.split(",")[0].split(" from")[0] for n in s.notes[:1]] == ["read 11 lesions on 10 mammograms of 9 patients"]

def test_tasks(tmp_path):
    p = params(put(tmp_path/"cbis", as_dicom(ROWS)))
    store = prepare(open_source(p), tmp_path/"out", p)
    assert list(store.tasks) == ["label", "pathology", "malignancy", "margins", "shape", "calc_type", "density", "dense"]
    assert store.task("calc_type").classes == ["AMORPHOUS", "PLEOMORPHIC", "PUNCTATE"] and store.task("shape").classes == ["LYMPH_NODE", "OVAL"]
    for split in ("train", "valid", "test"):
        rows = store.indices(split, "margins")
        text = [ROWS[i]["words"].split("-") for i in rows]
        assert rows.tolist() == [i for i in store.indices(split) if ROWS[i]["finding"] == "mass" and ROWS[i]["words"] != "N/A"]
        assert (store.targets(rows, "margins").numpy() == MultiLabelBinarizer(classes=MARGINS).fit_transform(text)).all()
        assert [ROWS[i]["density"] for i in store.indices(split, "density")] == [store.task("density").classes[t] for t in store.targets(store.indices(split, "density"), "density")]
    assert store.channels == 1 and store.tiles.shape[1:] == (32,32,1) and "6 lesions have a density outside 1 to 4: not labelled for density" in store.manifest["notes"]

def test_one_finding_only(tmp_path):
    files = {k: v for k,v in as_dicom(ROWS).items() if "calc" not in k.lower()}
    s = open_source(params(put(tmp_path, files), findings=["mass"]))
    assert s.classes == ["BENIGN_MASS","MALIGNANT_MASS"] and set(s.tasks) == {"pathology","malignancy","margins","shape","density","dense"} and len(s.records) == 13
    with pytest.raises(FileNotFoundError, match="calc_case_description_train_set.csv is missing"): open_source(params(tmp_path))

def test_fewer_classes_and_lesions(tmp_path):
    p = params(put(tmp_path, repacked(ROWS)), strict=True)
    s = open_source(p.model_copy(update={"drop_classes":["BENIGN_CALC","MALIGNANT_CALC"]}))
    assert s.classes == ["BENIGN_MASS","MALIGNANT_MASS"] and len(s.records) == 13
    assert max(Counter(r.split for r in open_source(p.model_copy(update={"limit":5})).records).values()) == 5

def test_views(tmp_path):
    s = open_source(params(put(tmp_path, repacked(ROWS)), images="view"))
    assert len(s.records) == len({case(r) for r in ROWS}) == len(ROWS) - 1
    first = s.records[0]
    assert first.label == "MALIGNANT_MASS" and first.labels["margins"] == "SPICULATED" and first.path.endswith("Mass-Training_P_00001_LEFT_CC_FULL.png")
    image = first.read()
    assert image.shape == (70,70) and (image[:,10:60] == pixels(ROWS[0])[0]).all() and not image[:,:10].any() and not image[:,60:].any()

def test_columns_in_each_spelling(tmp_path):
    read = []
    for i,spell in enumerate((lambda c: c.replace("_", " "), lambda c: c.replace(" ", "_"), lambda c: f" {c.title()}")):
        s = open_source(params(put(tmp_path/str(i), {**repacked(ROWS), **{f"csv/{k}": v for k,v in csvs(ROWS, spell).items()}})))
        read.append([(r.label, r.group, r.labels) for r in s.records])
    assert read[0] == read[1] == read[2]

@pytest.mark.parametrize("seed", range(4))
def test_validation_is_drawn_by_patient(tmp_path, seed):
    p = params(put(tmp_path, repacked(ROWS)), strict=True).model_copy(update={"seed":seed})
    splits = defaultdict(set)
    for r in open_source(p).records: splits[r.group].add(r.split)
    assert all(len(v) == 1 for v in splits.values()) and set.union(*splits.values()) == {"train","valid","test"}

def test_shared_patients(tmp_path):
    "Patient 20 is tested with a mass and trained with a calcification."
    put(tmp_path, repacked(ROWS))
    loose, strict = open_source(params(tmp_path)), open_source(params(tmp_path, strict=True))
    assert any(n.startswith("warning: groups in two splits, as their publisher has it: 1; group 'P_00020'") for n in loose.notes)
    assert not any(n.startswith("warning: groups") for n in strict.notes) and "strict: 1 patients of test taken out of train, 1 lesions" in strict.notes
    assert {r.split for r in strict.records if r.group == "P_00020"} == {"test"} and len(strict.records) == len(ROWS) - 1


# Pixels and masks

def change(files, part, data):
    "The files with every one whose name has `part` replaced, or taken out."
    hit = [k for k in files if part in k]
    assert hit
    return {k: v for k,v in files.items() if k not in hit} | ({k: data for k in hit} if data is not None else {})

def test_film_where_bright_is_air(tmp_path):
    files = as_dicom(ROWS)
    name = next(k for k in files if "P_00021_LEFT_CC/" in k)
    r = next(r for r in ROWS if r["patient"] == "P_00021")
    put(tmp_path, {**files, name: dicom((255 - pixels(r)[0]).astype(np.uint16)*257, "MONOCHROME1")})
    record = next(x for x in open_source(params(tmp_path)).records if x.group == "P_00021")
    assert (record.read() == crop(*pixels(r))).all()

def mask_files(mask, small): return {"1-1.dcm":dicom(small), "1-2.dcm":dicom(mask)}

def with_mask(mask, small=np.arange(90, dtype=np.uint16).reshape(9, 10)*300):
    "The set with other files for the lesion of patient 21."
    files = as_dicom(ROWS)
    folder = next(k for k in files if "P_00021_LEFT_CC_1/" in k).rsplit("/", 1)[0]
    return {**files, **{f"{folder}/{k}": v for k,v in mask_files(mask, small).items()}}

def test_mask_of_another_size_is_scaled(tmp_path):
    r = next(r for r in ROWS if r["patient"] == "P_00021")
    image, mask = pixels(r)
    s = open_source(params(put(tmp_path, with_mask(mask.repeat(2, 0).repeat(2, 1)*np.uint8(255)))))
    assert s.notes[-2 if "groups" in s.notes[-1] else -1].startswith("warning: 1 masks are larger or smaller") and "Mass-Test_P_00021_LEFT_CC_1" in str(s.notes)
    assert (next(x for x in s.records if x.group == "P_00021").read() == crop(image, mask)).all()

@pytest.mark.parametrize("mask, small, message", [
    (np.zeros((70,50), np.uint8), np.uint16([[1,2],[3,4]]), "row 3: the mask is empty"),
    (np.zeros((50,70), np.uint8), np.uint16([[1,2,3,4]]), "row 3: no mask of the mammogram's form: 4×1 and 70×50 px for 50×70 px"),
    (np.arange(3500, dtype=np.uint16).reshape(70,50), np.arange(4, dtype=np.uint16).reshape(2,2), "row 3: none of .*1-1.dcm.* is a mask of two grey values")])
def test_bad_masks(tmp_path, mask, small, message):
    put(tmp_path, with_mask(mask, small))
    with pytest.raises(ValueError, match=f"mass_case_description_test_set.csv: {message}"):
        for r in open_source(params(tmp_path)).records: r.read()

@pytest.mark.parametrize("data, message", [(b"DICM", "truncated, or not a DICOM"), (dicom(np.zeros((70,50), np.uint16))[:-2000], "truncated, or not a DICOM")])
def test_bad_dicom(tmp_path, data, message):
    put(tmp_path, change(as_dicom(ROWS), "P_00021_LEFT_CC/", data))
    with pytest.raises(ValueError, match=f"P_00021_LEFT_CC.*1-1.dcm: {message}"):
        for r in open_source(params(tmp_path, images="view")).records: r.read()


# Bad case descriptions, files that are missing or too many

def edited(split_rows, **changes): return [{**r, **changes} if r is split_rows else r for r in ROWS]

@pytest.mark.parametrize("rows, message", [
    (edited(ROWS[1], words="FUZZY"), "mass_case_description_train_set.csv: row 3 has the margin 'FUZZY'; known are ILL_DEFINED"),
    (edited(ROWS[2], pathology="UNKNOWN"), "mass_case_description_train_set.csv: row 4 has pathology 'UNKNOWN'"),
    (edited(ROWS[0], side="BOTH"), "row 2 has left_or_right_breast 'BOTH'; expected one of LEFT, RIGHT"),
    (edited(ROWS[1], lesion=1), "row 3 describes Mass-Training_P_00001_LEFT_CC_1 a second time")])
def test_bad_rows(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message): open_source(params(put(tmp_path, repacked(rows))))

def test_bad_csvs(tmp_path):
    files, name = repacked(ROWS), "csv/mass_case_description_test_set.csv"
    for i,(data,message) in enumerate(((files[name].replace(b"mass margins", b"margin"), "mass_case_description_test_set.csv: column 'mass_margins' is missing; there are"), (b"", "not a CSV that can be read"), (b"\xff\xfe\x00\x81", "not a CSV that can be read"))):
        with pytest.raises(ValueError, match=message): open_source(params(put(tmp_path/str(i), {**files, name: data})))
    with pytest.raises(ValueError, match="csv/mass_case_description_test_set.csv and mass_case_description_test_set.csv: keep one"):
        open_source(params(put(tmp_path/"twice", {**files, "mass_case_description_test_set.csv":files[name]})))
    with pytest.raises(ValueError, match="dicom_info.csv: column 'patientid' is missing"):
        open_source(params(put(tmp_path/"info", change(as_jpeg(ROWS), "dicom_info", b"image_path\nx\n"))))

@pytest.mark.parametrize("files, error, message", [
    (lambda: change(as_dicom(ROWS), "P_00021_LEFT_CC/", None), FileNotFoundError, "mass_case_description_test_set.csv: row 3: .* has no image of Mass-Test_P_00021_LEFT_CC"),
    (lambda: change(as_dicom(ROWS), "P_00021_LEFT_CC_1/", None), FileNotFoundError, "row 3: .* has no mask of Mass-Test_P_00021_LEFT_CC_1"),
    (lambda: {**repacked(ROWS), "test/images/Mass-Test_P_00099_LEFT_CC_FULL.png":b""}, ValueError, "Mass-Test_P_00099_LEFT_CC_FULL.png is in no row"),
    (lambda: {**repacked(ROWS), "copy/Mass-Test_P_00021_LEFT_CC_FULL.png":b""}, ValueError, "row 3: 2 images of Mass-Test_P_00021_LEFT_CC"),
    (lambda: {**repacked(ROWS), "test/images/holiday.png":b""}, ValueError, "test/images/holiday.png: no mammogram is named in its path"),
    (lambda: {**as_jpeg(ROWS), "jpeg/1.2/1-1.jpg":b""}, ValueError, "jpeg/1.2/1-1.jpg: csv/dicom_info.csv has no row for it")])
def test_files_and_rows_that_do_not_meet(tmp_path, files, error, message):
    with pytest.raises(error, match=message): open_source(params(put(tmp_path, files())))

def test_repacked_without_some_masks(tmp_path):
    "A mask of all lesions together is no lesion's."
    files = change(repacked(ROWS), "P_00001_LEFT_CC_MASK", None)
    s = open_source(params(put(tmp_path, {**files, "train/masks/Mass-Training_P_00001_LEFT_CC_MASK.png":encode(pixels(ROWS[0])[1], "PNG")})))
    assert len(s.records) == len(ROWS) - 2 and any(n.startswith(f"warning: 2 of {len(ROWS)} lesions have no mask of their own and were left out, the first is Mass-Training_P_00001_LEFT_CC_1") for n in s.notes)


# The real case descriptions and views

@pytest.fixture(scope="module")
def real():
    if not REAL.is_file(): pytest.skip(f"{REAL.name} is not at hand: real data lies beside the project, never in it")
    return REAL

def test_real_counts(real):
    "As published: CBIS-DDSM's four CSVs, counted by others."
    rows = all_cases(real, ["mass", "calc"])
    count = lambda f, s: rows[(rows.finding == f) & (rows.split == s)]
    for f,s,lesions,images,patients,malignant,benign,without in (("mass","train",1318,1231,691,637,577,104), ("mass","test",378,361,201,147,194,37), ("calc","train",1546,1227,602,544,528,474), ("calc","test",326,284,151,129,130,67)):
        g = count(f, s)
        assert (len(g), g.case.nunique(), g.patient_id.nunique()) == (lesions, images, patients)
        assert Counter(g.pathology) == {"MALIGNANT":malignant, "BENIGN":benign, "BENIGN_WITHOUT_CALLBACK":without}
    for split,four,margins,missing,joined in (("train", (681,637,1002,544), (358,352,318,116,243), 43, 106), ("test", (231,147,197,129), (114,103,89,27,65), 17, 29)):
        each = [(f, answers(rows.loc[[i]])) for i,f in zip(rows.index[rows.split == split], rows.finding[rows.split == split])]
        assert tuple(Counter((f, a["malignancy"]) for f,a in each)[k] for k in (("mass","BENIGN"), ("mass","MALIGNANT"), ("calc","BENIGN"), ("calc","MALIGNANT"))) == four
        said = [a["margins"] for f,a in each if f == "mass"]
        assert tuple(sum(m in t.split("|") for t in said) for m in MARGINS) == margins and said.count("") == missing and sum("|" in t for t in said) == joined
    assert len(set(rows.patient_id[rows.split == "train"]) & set(rows.patient_id[rows.split == "test"])) == 31
    left, notes = drop_shared(rows)
    assert notes[0].startswith("strict: 31 patients") and not set(left.patient_id[left.split == "train"]) & set(left.patient_id[left.split == "test"]) and (left.split == "test").sum() == 378 + 326

def test_real_views(real, tmp_path):
    s = open_source(params(real, findings=["mass"], images="view"))
    assert Counter(r.split == "test" for r in s.records) == {False:1231, True:361} and s.records[5].read().shape == (256,256)
    splits = defaultdict(set)
    for r in s.records: splits[r.group].add(r.split)
    assert all(len(v) == 1 for v in splits.values()) and len(splits) == 691 + 201

def test_real_lesions(real):
    "The set has one mask a view at 256 px: lesions without one are left out, and the report says so."
    s = open_source(params(real, findings=["mass"]))
    assert len(s.records) == 1521 and any("175 of 1696 lesions have no mask" in n for n in s.notes)
    with zipfile.ZipFile(real) as z:
        for r in s.records[::40]:
            case, lesion = r.path.split("/")[-1].replace("_FULL.png", "").split("#")
            left, top, right, bottom = Image.open(io.BytesIO(z.read(f"{'test' if r.split == 'test' else 'train'}/masks/{case}_MASK_{lesion}.png"))).getbbox()
            assert r.read().shape == (max(right - left, bottom - top),)*2


# Synthetic lesions

def test_lesions_are_deterministic(tmp_path):
    for name,seed in (("a",0), ("b",0), ("c",1)): make_lesions(tmp_path/f"{name}.zip", seed, n_mass=(4,3), n_calc=(4,3))
    a, b, c = ((tmp_path/f"{n}.zip").read_bytes() for n in "abc")
    assert a == b != c and [p.name for p in tmp_path.iterdir() if p.suffix != ".zip"] == []

@pytest.fixture(scope="module")
def bundled(bundled_sample): return bundled_sample/"cbis"/"CBIS-DDSM.zip"

def test_bundled_lesions_are_what_the_notebook_makes(bundled):
    s = open_source(params(bundled, images="view"))
    assert s.synthetic and Counter(r.split == "test" for r in s.records) == {False:700, True:250} and len({r.group for r in s.records}) == 475
    assert bundled.stat().st_size < 3e6 and not any("groups" in n for n in s.notes)
    for i in (0, 1, 500):
        r = s.records[i]; number, view = int(r.group[2:]), int("MLO" in r.path)
        finding = "calc" if "CALC" in r.label else "mass"
        p = draw_patient(np.random.default_rng([0,number]), finding)
        image, _ = make_mammogram(np.random.default_rng([0,number,view]), finding, p["kinds"], p["shape"], p["density"], p["left"])
        assert np.abs(r.read()[:,6:-6].astype(int) - image).mean() < 4 and r.labels["malignancy"] == p["pathology"].split("_")[0]

def test_margins_lie_at_the_finer_scale(bundled, tmp_path):
    "Local patterns tell them at 64 px, less so at 32 px, and brightness not at all."
    from skimage.feature import local_binary_pattern
    p = params(bundled, findings=["mass"]).model_copy(update={"image_size":64})
    store = prepare(open_source(p), tmp_path/"out", p)
    train, test = (np.concatenate([store.indices(s, "margins") for s in part]) for part in (("train","valid"), ("test",)))
    y, truth = (store.targets(i, "margins").numpy() for i in (train, test))
    def auc(features):
        model = lambda c: make_pipeline(StandardScaler(), LogisticRegression(C=.1, max_iter=500)).fit(features[train], y[:,c])
        return roc_auc_score(truth, np.stack([model(c).decision_function(features[test]) for c in range(5)], 1))
    patterns = lambda tiles: np.array([np.concatenate([np.histogram(local_binary_pattern(t, 8, r, "uniform"), 10, (0,10))[0] for r in (1, 2)]) for t in tiles], float)
    tiles = store.tiles[...,0]
    fine, coarse = auc(patterns(tiles)), auc(patterns(tiles.reshape(-1, 32, 2, 32, 2).mean((2, 4)).astype(np.uint8)))
    light = auc(np.array([np.histogram(t, 32, (0,256))[0] for t in tiles], float))
    print(f"64 px {fine:.2f}, 32 px {coarse:.2f}, brightness {light:.2f}")
    assert fine > .8 and coarse < fine - .05 and light < .6


# Another spelling, and files of another kind

def respell(files, change):
    "The set with its case descriptions written in another way."
    return {k: change(v.decode()).encode() if "case_description" in k else v for k, v in files.items()}

def seen(source): return [(r.label, r.group, r.path.rpartition("#")[2] if "#" in r.path else "", r.labels, r.read().tolist()) for r in source.records]

@pytest.fixture(scope="module")
def published(tmp_path_factory): return seen(open_source(params(put(tmp_path_factory.mktemp("cbis"), repacked(ROWS)))))

@pytest.mark.parametrize("change", [
    lambda t: t.replace(",2,LEFT", ",2.0,left").replace(",2,RIGHT", ", 2.00 ,Right"), lambda t: t.replace(",CC,1,", ",cc, 1,").replace(",MLO,1,", ",mlo,1.0,"),
    lambda t: t.replace("MALIGNANT", " malignant").replace("BENIGN_WITHOUT_CALLBACK", "Benign without-callback"), lambda t: t.replace("P_00", "p_00"),
    lambda t: t.replace("P_0000", "P_").replace("P_000", "P_"), lambda t: t.replace("SPICULATED-ILL_DEFINED", "spiculated - ill defined"), lambda t: "\ufeff" + t.replace("\n", "\r\n"),
    lambda t: t.replace(",", ";"), lambda t: t.replace(",", "\t"), lambda t: t + "\n,,\n", lambda t: t.replace("LEFT", "\u00a0LEFT\u2009").replace(",1,", ",\u200b1,"),
    lambda t: t.replace("left or right breast", "Left-or-right  Breast").replace("abnormality id", "AbnormalityID"), lambda t: "\n".join(f"{i},{o}" if o[:2] in ("P_", "pa") else o for i, o in enumerate(t.split("\n")))])
def test_other_spellings_say_the_same(tmp_path, published, change):
    files = respell(repacked(ROWS), change)
    assert any(files[k] != v for k, v in repacked(ROWS).items())
    assert seen(open_source(params(put(tmp_path, files)))) == published

@pytest.mark.parametrize("rename", [lambda k: k.replace("_set.csv", "_set (1).csv"), lambda k: k.replace("mass_case_description", "Mass case-description"),
                                    lambda k: k.replace("Mass-Test_P_00", "mass-test_p_00").replace("LEFT_CC", "left_cc"), lambda k: k.replace("_MASK_1", "_MASK_01"), lambda k: f"deep/er/{k}",
                                    lambda k: k.replace("_FULL.png", "_FULL (1).png").replace("_MASK_1.png", "_MASK_1(2).png")])
def test_other_names_say_the_same(tmp_path, published, rename):
    files = {rename(k): v for k, v in repacked(ROWS).items()}
    s = open_source(params(put(tmp_path, files)))
    assert files.keys() != repacked(ROWS).keys() and seen(s) == published and not any("not read" in n for n in s.notes)

def test_copies_of_a_browser_are_counted(tmp_path, published):
    files = repacked(ROWS)
    s = open_source(params(put(tmp_path, {**files, "csv/mass_case_description_test_set (1).csv":b"old", "csv/metadata.csv":b"", "LICENSE":b"", "a.xml":b""})))
    assert seen(s) == published and "4 files were not read: 2 .csv, LICENSE, a.xml" in s.notes
    two = {k.replace("mass_case_description_test_set", "mass_case_description_test_set (2)"): v for k, v in files.items()} | {"mass_case_description_test_set (1).csv":b""}
    with pytest.raises(ValueError, match=r"test_set \(2\).csv and mass_case_description_test_set \(1\).csv: keep one"): open_source(params(put(tmp_path/"two", two)))

HEAD = "patient_id,breast_density,left or right breast,image view,abnormality id,mass shape,mass margins,pathology\n"
@pytest.mark.parametrize("text, message", [
    (HEAD + "P_00020,2,LEFT,CC,1,OVAL,N/A,BENIGN\nP_00021,2,LEFT,CC,1,OVAL,N/A", "mass_case_description_test_set.csv: row 3 has 7 values for 8 columns: is it cut off"), (HEAD + "P_00020,2,LEFT,CC,1,OVAL,\"N/A,BENIGN\nP_00021,2,LEFT,CC,1,OVAL,N/A,BENIGN\n", "not a CSV that can be read"), (HEAD, "no lesion in it"), (HEAD + ",,,,,,,\n", "no lesion in it"),
    (HEAD + "P_00020,2,LEFT,CC,1,OVAL,N/A,BENIGN,more\n", "row 2 has 9 values for 8 columns"), (HEAD.replace("\n", ",Pathology \n") + "P_00020,2,LEFT,CC,1,OVAL,N/A,BENIGN,BENIGN\n", "column 'pathology' is there twice"),
    (HEAD + "P_00020,2,LEFT,CC,0,OVAL,N/A,BENIGN\n", "row 2 has abnormality_id '0'; expected 1, 2"), (HEAD + "\nP_00020,2,LEFT,CC,1.5,OVAL,N/A,BENIGN\n", "row 3 has abnormality_id '1.5'"),
    (HEAD + "D_4112,2,LEFT,CC,1,OVAL,N/A,BENIGN\n", "row 2 has patient_id 'D_4112'; expected P_00001"), (HEAD + "P_00020,2,BOTH,CC,1,OVAL,N/A,BENIGN\n", "row 2 has left_or_right_breast 'BOTH'"),
    (HEAD + "P_00020,2,LEFT,CC,1,OVAL,N/A,BENIGN\nP_20,2,left,CC,1.0,OVAL,N/A,BENIGN\n", "row 3 describes Mass-Test_P_00020_LEFT_CC_1 a second time")])
def test_faulty_case_descriptions(tmp_path, text, message):
    with pytest.raises(ValueError, match=message): open_source(params(put(tmp_path, {**repacked(ROWS), "csv/mass_case_description_test_set.csv":text.encode()})))

def test_densities_that_are_none_are_counted(tmp_path):
    s = open_source(params(put(tmp_path, repacked([{**r, "density":d} for r, d in zip(ROWS, ["", "n/a", "5", "2.5", *["2"]*99])]))))
    assert "4 lesions have a density outside 1 to 4: not labelled for density" in s.notes and [r.labels["dense"] for r in s.records[:5]] == ["", "", "", "", "NOT_DENSE"]

def test_dicom_without_ending(tmp_path, published):
    "As TCIA's series come from some tools: named by their UID or by nothing."
    for i, name in enumerate((lambda k, n: k.replace(".dcm", ""), lambda k, n: k.rsplit("/", 1)[0] + f"/1.3.6.1.4.1.9590.{n}", lambda k, n: k.replace(".dcm", ".DCM"), lambda k, n: k.replace(".dcm", ".ima"))):
        files = {name(k, n) if k.endswith(".dcm") else k: v for n, (k, v) in enumerate(as_dicom(ROWS).items())}
        s = open_source(params((put, zipped)[i % 2](tmp_path/str(i), {**files, "LICENSE":b"x"*200, "DICOMDIR":dicom(DEEP)})))
        assert seen(s) == published and "2 files were not read: 2 without ending" in s.notes

def test_what_is_not_asked_for_is_counted(tmp_path):
    files = {**repacked(ROWS), "train/masks/Mass-Training_P_00001_LEFT_CC_MASK.png":encode(pixels(ROWS[0])[1], "PNG")}
    s = open_source(params(put(tmp_path, files), findings=["mass"]))
    assert "16 images were not read: data.cbis.findings is mass" in s.notes and "1 masks of all lesions of a view together were not read" in s.notes and "2 files were not read: 2 .csv" in s.notes

@pytest.mark.parametrize("files, error, message", [
    (lambda: change(repacked(ROWS), "mass_case_description_test", None), FileNotFoundError, "mass_case_description_test_set.csv is missing. TCIA offers it"),
    (lambda: {"CBIS-DDSM.zip":b"PK"}, FileNotFoundError, "There is CBIS-DDSM.zip: unpack it, or point data.path at it"), (lambda: {"manifest.tcia":b""}, FileNotFoundError, "manifest.tcia is but a list .*NBIA Data Retriever"),
    (lambda: {k.replace("mass_case_description_test", "x").replace("mass_case_description_train", "mass_case_description_test").replace("x_set", "mass_case_description_train_set"): v for k, v in repacked(ROWS).items()}, FileNotFoundError, "row 2: .* has no image of Mass-Training_P_00020_LEFT_CC.*There is Mass-Test_P_00020_LEFT_CC: is the CSV named after the other split"),
    (lambda: change(as_jpeg(ROWS), "dicom_info", None), ValueError, "no mammogram is named in its path, and there is no dicom_info.csv"),
    (lambda: {**as_jpeg(ROWS), "dicom_info.csv":b""}, ValueError, "csv/dicom_info.csv and dicom_info.csv: keep one"),
    (lambda: change(as_jpeg(ROWS), "dicom_info", as_jpeg(ROWS)["csv/dicom_info.csv"] + b"CBIS-DDSM/jpeg/1.3/9.jpg,somebody,x\n"), ValueError, "dicom_info.csv: row 64 has PatientID 'somebody', which names no lesion"),
    (lambda: change(as_jpeg(ROWS), "dicom_info", as_jpeg(ROWS)["csv/dicom_info.csv"] + b"x/1.3.6.1.4.021/1-000.jpg,Mass-Test_P_00020_LEFT_CC_1,x\n"), ValueError, "row 64 says Mass-Test_P_00020_LEFT_CC_1 of 1.3.6.1.4.021/1-000.jpg, an earlier row Mass-Training_P_00001_LEFT_CC. Keep one"),
    (lambda: {k.replace("train/", "CBIS_MASKS/").replace("_MASK_", "_"): v for k, v in change(repacked(ROWS), "P_00021_LEFT_CC_MASK", None).items()}, FileNotFoundError, "row 3: .* has no mask of Mass-Test_P_00021_LEFT_CC_1")])
def test_sets_that_are_incomplete(tmp_path, files, error, message):
    with pytest.raises(error, match=message): open_source(params(put(tmp_path, files())))

def test_jpeg_tables_of_other_machines(tmp_path):
    files = as_jpeg(ROWS)
    ours = seen(open_source(params(put(tmp_path/"a", files))))
    table = files["csv/dicom_info.csv"].decode().replace("/", "\\").replace("PatientID", "Patient ID").replace("image_path", "image path") + "CBIS-DDSM\\jpeg\\9\\9.jpg,Mass-Test_P_00021_LEFT_CC_1,x\n"
    s = open_source(params(put(tmp_path/"b", {**files, "csv/dicom_info.csv":table.encode()})))
    assert seen(s) == ours and "warning: 1 rows of csv/dicom_info.csv name files that are not there, the first is 9/9.jpg" in s.notes


# Pixels that need a rule

def built(pixels, compressed=False, **tags):
    "A DICOM file with other tags."
    d = pydicom.dcmread(io.BytesIO(dicom(pixels, compressed=compressed)))
    for k, v in tags.items():
        setattr(d, k, v)
    out = io.BytesIO(); d.save_as(out)
    return out.getvalue()

DEEP = np.arange(2100, dtype=np.uint16).reshape(42, 50)*25

def grey(folder, data, name="a.dcm"):
    (folder/name).write_bytes(data)
    return read_grey(folder, name, name), grey_size(folder, name, name)

@pytest.mark.parametrize("data, expected", [
    (lambda: dicom(DEEP), DEEP), (lambda: dicom(DEEP, "MONOCHROME1"), DEEP.max() - DEEP), (lambda: built(DEEP, RescaleSlope="1", RescaleIntercept="0"), DEEP),
    (lambda: built(DEEP, RescaleSlope="-0.5", RescaleIntercept="7"), 7 - DEEP*.5), (lambda: built(DEEP, RescaleIntercept="-1024"), DEEP - 1024.), (lambda: built(DEEP, RescaleSlope="", WindowCenter="9", WindowWidth="2"), DEEP),
    (lambda: built(DEEP, "MONOCHROME1", RescaleSlope="2"), DEEP*2.), (lambda: built(DEEP - 26_000, PixelRepresentation=1, PhotometricInterpretation="MONOCHROME1"), int(DEEP.max()) - DEEP.astype(int)),
    (lambda: built(DEEP, NumberOfFrames="1"), DEEP), (lambda: dicom(DEEP, compressed=True), DEEP)])
def test_dicom_values(tmp_path, data, expected):
    values, size = grey(tmp_path, data())
    assert (values == expected).all() and size == (50, 42)
    b = to_bytes(values)
    assert b.dtype == np.uint8 and (b.min(), b.max()) == (0, 255) and (np.argsort(b, None, "stable") == np.argsort(b.ravel(), kind="stable")).all()

def test_small_slopes_keep_their_scale():
    assert (to_bytes(DEEP*1e-6) == to_bytes(DEEP)).mean() > .99 and not to_bytes(np.full((2, 2), 7.)).any()

@pytest.mark.parametrize("data, message", [
    (lambda: built(DEEP, Rows=60_000, Columns=60_000), "declares 60000 × 60000 px, 89,478,485 at most .sdmae.data.records.MAX_PIXELS"), (lambda: built(DEEP, Rows=0), "declares 50 × 0 px"),
    (lambda: built(DEEP, NumberOfFrames="3"), "3 frames of 1 samples"), (lambda: built(DEEP, NumberOfFrames="999999999"), "999999999 frames"), (lambda: built(DEEP, SamplesPerPixel=3), "1 frames of 3 samples"),
    (lambda: built(DEEP, PhotometricInterpretation="PALETTE COLOR"), "PALETTE COLOR; expected one grey image"), (lambda: built(DEEP, RescaleSlope="0"), "rescale slope 0.0"),
    (lambda: built(DEEP, Rows=21), "holds 4,200 bytes of pixels, its header declares 2,100"), (lambda: built(DEEP, RescaleSlope="1e999"), "rescale slope inf|truncated"),
    (lambda: built(DEEP, ModalityLUTSequence=[]), "Modality LUT"), (lambda: built(DEEP, Rows=43), "truncated, or not a DICOM"), (lambda: b"\0"*128 + b"DICM" + b"\2\0\0\0UI\x1a\x001.2.840.10008.1.2.1.99", "deflated"),
    (lambda: dicom(DEEP, compressed=True).replace(b"1.2.840.10008.1.2.5", b"1.2.840.10008.1.2.9"), "truncated, or not a DICOM"), (lambda: b"", "truncated, or not a DICOM"), (lambda: encode(DEEP, "PNG"), "truncated, or not a DICOM")])
def test_dicom_that_is_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=f"^a.dcm: .*{message}"): grey(tmp_path, data())

def test_packed_pixels_that_promise_too_little_or_too_much(tmp_path):
    "A megabyte of RLE for 42 × 50 px, and a JPEG of another size than the header says; the same JPEG of the right size is read."
    d = pydicom.dcmread(io.BytesIO(dicom(DEEP, compressed=True)))
    d.PixelData = encapsulate([np.array([2, 64, 2**19] + [0]*13, "<u4").tobytes() + b"\x81\0"*2**19])
    d.save_as(out := io.BytesIO())
    with pytest.raises(ValueError, match="holds 1,.* bytes of pixels, its header declares 4,200"): grey(tmp_path, out.getvalue())
    for form, syntax in (("JPEG", JPEGBaseline8Bit), ("JPEG2000", JPEG2000Lossless)):
        for shape, fits in (((42, 50), True), ((420, 500), False)):
            d = pydicom.dcmread(io.BytesIO(dicom(np.zeros((42, 50), np.uint8))))
            d.file_meta.TransferSyntaxUID, d.PixelData = syntax, encapsulate([encode(np.full(shape, 90, np.uint8), form)])
            d["PixelData"].VR = "OB"; d["PixelData"].is_undefined_length = True
            d.save_as(out := io.BytesIO())
            if fits: assert grey(tmp_path, out.getvalue())[0].shape == (42, 50)
            else:
                with pytest.raises(ValueError, match="50 × 42 px by its header, 500 × 420 by its pixels"): grey(tmp_path, out.getvalue())

def test_a_missing_decoder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cbis_module, "get_decoder", lambda uid: type("None", (), dict(is_available=False)))
    with pytest.raises(ValueError, match="a.dcm: compressed as RLE Lossless, and no decoder for it is installed. `pip install pylibjpeg"): grey(tmp_path, dicom(DEEP, compressed=True))

def test_headers_are_read_before_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(pydicom.dataset.Dataset, "pixel_array", property(lambda d: pytest.fail("pixels were read")))
    with pytest.raises(ValueError, match="declares"): grey(tmp_path, built(DEEP, Rows=60_000, Columns=60_000))

def png_of(width, height):
    "A PNG that declares a size and holds nothing of it."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0"*99)) + chunk(b"IEND", b"")

SMALL = (DEEP >> 8).astype(np.uint8)

def image(pixels, form, mode=None, **kwargs):
    out = io.BytesIO(); im = Image.fromarray(pixels)
    (im.convert(mode) if mode else im).save(out, form, **kwargs)
    return out.getvalue()

def exif(turn):
    e = Image.Exif(); e[0x112] = turn
    return e

@pytest.mark.parametrize("data, expected", [
    (lambda: image(DEEP, "PNG"), DEEP), (lambda: image(DEEP, "TIFF"), DEEP), (lambda: image(DEEP.astype(np.int32), "TIFF"), DEEP), (lambda: image(SMALL, "PNG"), SMALL), (lambda: image(SMALL, "PNG", "RGB"), SMALL),
    (lambda: image(SMALL, "PNG", "RGBA"), SMALL), (lambda: image(SMALL, "PNG", "LA"), SMALL), (lambda: image(SMALL > 90, "PNG"), (SMALL > 90)*255), (lambda: image(SMALL, "PNG", "P"), SMALL), (lambda: image(SMALL, "BMP"), SMALL),
    (lambda: image(SMALL, "TIFF", compression="tiff_lzw"), SMALL), (lambda: image(SMALL, "PNG", exif=exif(6)), np.rot90(SMALL, -1)), (lambda: image(SMALL, "TIFF", exif=exif(3)), SMALL[::-1, ::-1]), (lambda: image(DEEP, "TIFF", exif=exif(6)), np.rot90(DEEP, -1)), (lambda: image(DEEP, "PNG", exif=exif(8)), np.rot90(DEEP)), (lambda: image(np.dstack([SMALL]*3 + [SMALL*0]), "PNG"), SMALL*0), (lambda: dicom(DEEP), DEEP)])
def test_pictures(tmp_path, data, expected):
    "Whatever the name says: the content tells."
    values, size = grey(tmp_path, data(), "a.png")
    assert values.shape == expected.shape == size[::-1] and (values == expected).all() and values.dtype in (np.uint8, np.uint16)

def wide_colour():
    "A PNG with 16 bits in each of three colours."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" + b"\1\2"*6)) + chunk(b"IEND", b"")

@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("data, message", [
    (lambda: png_of(100_000, 9_000), "exceeds limit"), (lambda: png_of(10_000, 9_000), "10000×9000 px are too many"), (wide_colour, "more than 8 bits a channel"), (lambda: image(DEEP.astype(np.float32), "TIFF"), "more than 8 bits a channel"),
    (lambda: image(SMALL, "TIFF", save_all=True, append_images=[Image.fromarray(SMALL)]), "several pages"), (lambda: image(DEEP.astype(np.int32)*2, "TIFF"), "beyond 16 bits"), (lambda: image(SMALL, "PNG")[:-30], "truncated"), (lambda: b"", "truncated")])
def test_pictures_that_are_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=f"^a.png: .*({message})"): grey(tmp_path, data(), "a.png")

@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_named(tmp_path):
    "Whatever byte is wrong: read, or a `ValueError` that begins with the name."
    rng, told = np.random.default_rng(0), 0
    for name, data in (("a.dcm", dicom(DEEP)), ("b.dcm", dicom(DEEP, compressed=True)), ("c.png", image(DEEP, "PNG")), ("d.tif", image(SMALL, "TIFF", compression="tiff_lzw")), ("e.jpg", image(SMALL, "JPEG"))):
        for i in range(60):
            broken = bytearray(data)
            for at in rng.integers(0, (min(400, len(data)), len(data))[i % 2], 3): broken[at] = rng.integers(256)
            try: grey(tmp_path, bytes(broken[:rng.integers(len(data))] if i % 5 == 0 else broken), name)
            except ValueError as e:
                assert str(e).startswith(f"{name}: "), e
                told += 1
    assert told > 100

@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("values", [(0, 65535), (0, 1), (7, 4000)])
def test_masks_of_16_bits(tmp_path, published, form, values):
    ending = ".png" if form == "PNG" else ".tif"
    files = {(k.replace(".png", ending) if "MASK" in k else k): image(np.where(np.asarray(Image.open(io.BytesIO(v))) > 0, values[1], values[0]).astype(np.uint16), form) if "MASK" in k else v for k, v in repacked(ROWS).items()}
    assert seen(open_source(params(put(tmp_path, files)))) == published

def test_deep_pictures_become_bytes_by_the_same_rule(tmp_path):
    deep = {k: image(np.asarray(Image.open(io.BytesIO(v))).astype(np.uint16)*257, "PNG") if "FULL" in k else v for k, v in repacked(ROWS).items()}
    as_png, as_dcm = (seen(open_source(params(put(tmp_path/n, f)))) for n, f in (("a", deep), ("b", as_dicom(ROWS))))
    assert as_png == as_dcm

def test_two_masks_of_one_lesion(tmp_path, published):
    files, name = repacked(ROWS), "test/masks/Mass-Test_P_00021_LEFT_CC_MASK_1.png"
    mask = np.asarray(Image.open(io.BytesIO(files[name])))
    assert seen(open_source(params(put(tmp_path/"a", {**files, f"copy/{name}":files[name]})))) == published
    for i, (other, message) in enumerate(((np.roll(mask, 3), "row 3: masks that differ in"), (~mask, "row 3: masks that differ in"))):
        with pytest.raises(ValueError, match=message): seen(open_source(params(put(tmp_path/str(i), {**files, f"copy/{name}":encode(other, "PNG")}))))
    with pytest.raises(ValueError, match="row 3: the mask holds all four corners: is it inverted"): seen(open_source(params(put(tmp_path/"d", {**files, name:encode(~mask, "PNG")}))))

def test_a_split_without_masks(tmp_path):
    files = {k: v for k, v in repacked(ROWS).items() if "masks/Mass-Test" not in k}
    with pytest.raises(FileNotFoundError, match="none of 2 lesions of mass test has a mask. Get them, or set data.cbis.images to view"): open_source(params(put(tmp_path, files)))
    assert len(open_source(params(tmp_path, images="view")).records) == len(ROWS) - 1

def test_a_blank_mammogram(tmp_path):
    put(tmp_path, change(repacked(ROWS), "P_00021_LEFT_CC_FULL", encode(np.full((70,50), 9, np.uint8), "PNG")))
    for images in ("view", "lesion"):
        with pytest.raises(ValueError, match="P_00021_LEFT_CC_FULL.png: a mammogram of one value only"): seen(open_source(params(tmp_path, images=images)))
