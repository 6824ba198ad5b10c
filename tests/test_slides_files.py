"Slides: where a tile lies, what is left out and why, going on after an interruption, and memory that does not grow with a slide."
import os, zipfile
from pathlib import Path

import numpy as np, pandas as pd, pytest

pytest.importorskip("openslide", reason="slides need the extra sdmae[slides]")
import tifffile

from sdmae.data.store import open_store, prepare
from sdmae.params import DataParams, SlidesParams
from sdmae.sources import slides as S
from sdmae.sources.publishers import open_source

REAL = Path(__file__).parents[2]/"shared"/"realdata"


def tissue(seed=0, size=(600, 800)):
    "Coloured discs on glass."
    rng = np.random.default_rng(seed)
    image = np.full((*size, 3), 240, np.uint8)
    yy, xx = np.mgrid[:size[0], :size[1]]
    for _ in range(4):
        y, x, r = rng.uniform(.2, .8)*size[0], rng.uniform(.15, .85)*size[1], rng.uniform(80, 160)
        inside = (yy - y)**2 + (xx - x)**2 < r*r
        image[inside] = rng.normal((190, 110, 170), 25, (inside.sum(), 3)).clip(0, 255)
    return image


def write(path, image, mpp=(0.5, 0.5), levels=(1, 4), **more):
    "A pyramid; mpp None: its resolution is not told."
    path.parent.mkdir(parents=True, exist_ok=True)
    told = dict(resolution=tuple(1e4/m for m in mpp), resolutionunit=3) if mpp else {}
    with tifffile.TiffWriter(path) as f:
        for k in levels:
            f.write(image[::k, ::k], tile=(128, 128), compression="zlib", photometric="rgb", subfiletype=int(k > 1), **(told if k == 1 else {}), **more)
    return path


def data_of(folder, **changed):
    own = {k: changed.pop(k) for k in ("tiles", "mpp", "default_mpp", "tissue", "table") if k in changed}
    return DataParams(**dict(name="slides", adapter="slides", path=str(folder), image_size=32, copies="warn", slides=SlidesParams(**own)) | changed)


@pytest.fixture(autouse=True)
def kept_beside(tmp_path, monkeypatch): monkeypatch.setattr(S, "cut_folder", lambda: tmp_path/"kept")


@pytest.fixture
def three(tmp_path):
    for i in range(3): write(tmp_path/"slides"/f"s{i}.tif", tissue(i))
    return tmp_path/"slides"


def test_a_tile_is_the_slide_at_its_place(three):
    "Pixels and µm agree with the image that was written; a wider field is its mean."
    image = tissue(0)
    source = S.open_slides(three/"s0.tif", data_of(three, mpp=[0.5, 2.0], tiles=30))
    assert {r.place[2] for r in source.records} == {0.5, 2.0}
    for r in source.records:
        x, y, mpp = r.place
        side = round(32*mpp/0.5)
        left, top = round(x/0.5 - side/2), round(y/0.5 - side/2)
        assert r.path == f"s0.tif#{left},{top},{mpp:g}"
        part = image[top:top+side, left:left+side].astype(float)
        if mpp == 0.5: np.testing.assert_array_equal(r.read(), part)
        else: assert abs(r.read().mean((0, 1)) - part[::4, ::4].mean((0, 1))).max() < 1 # level 4 holds each fourth pixel


def test_a_level_that_is_missing_is_made_of_a_finer_one(tmp_path):
    image = tissue(1)
    path = write(tmp_path/"flat.tif", image, levels=(1,))
    tile = S.read_tile(path, 64, 128, 128, 32)
    mean = image[128:256, 64:192].reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert abs(tile - mean).max() <= 1


def test_tissue_is_found_where_it_is(tmp_path):
    image = tissue(2)
    mask = S.tissue_mask(S.thumbnail(write(tmp_path/"a.tif", image)))
    truth = (image != 240).any(2)
    assert (mask & truth).sum() > .9*truth.sum() and (mask & ~truth).sum() < .02*truth.sum()
    for blank in (np.full((300, 300, 3), 240, np.uint8), np.zeros((300, 300, 3), np.uint8)): assert not S.tissue_mask(blank).any()


def test_bands_are_the_whole(tmp_path, monkeypatch):
    "The picture does not depend on how much is read at once, and no more is read at once than is allowed."
    path = write(tmp_path/"flat.tif", tissue(3, (900, 1700)), levels=(1,))
    monkeypatch.setattr(S, "LONGEST", 340) # each pixel is 5 × 5 of the slide
    whole, asked = S.thumbnail(path), []
    slide = S.slide_at(path)
    read = type(slide).read_region
    monkeypatch.setattr(type(slide), "read_region", lambda self, at, level, size: asked.append(size) or read(self, at, level, size))
    monkeypatch.setattr(S, "BAND", 1700*50)
    np.testing.assert_array_equal(S.thumbnail(path), whole)
    assert len(asked) > 10 and max(w*h for w, h in asked) <= 1700*50
    assert whole.shape == (180, 340, 3)


@pytest.mark.parametrize("made,why", [
    (dict(mpp=None), "µm a pixel are not in the file; say data.slides.default_mpp"),
    (dict(mpp=(352.8, 352.8)), "352.8 µm a pixel cannot be right"),
    (dict(mpp=(0.5, 0.25)), "not square"),
    (dict(mpp=(2., 2.)), "nothing finer is there"),
    (dict(extratags=[(274, "H", 1, 6, True)]), "stored turned (TIFF orientation 6)")])
def test_left_out_by_name(three, made, why):
    "One slide that cannot be used is named and counted; the others go on. Alone, it is an error."
    write(three/"odd.tif", tissue(4), **made)
    source = S.open_slides(three, data_of(three, tiles=5))
    assert {r.group for r in source.records} == {"s0", "s1", "s2"}
    assert "1 of 4 slides were left out: odd.tif: " in source.notes[1] and why in source.notes[1]
    for i in range(3): (three/f"s{i}.tif").unlink()
    with pytest.raises(ValueError, match="none of 1 slides can be used: odd.tif"): S.open_slides(three, data_of(three, tiles=5))


def test_default_mpp(three):
    write(three/"odd.tif", tissue(4), mpp=None)
    source = S.open_slides(three, data_of(three, tiles=5, default_mpp=0.25))
    assert {r.group for r in source.records} == {"s0", "s1", "s2", "odd"} and len(source.notes) == 1


@pytest.mark.parametrize("spoil", [lambda b: b[:len(b)//3], lambda b: b[:len(b)//2] + bytes(4000) + b[len(b)//2 + 4000:], lambda b: b"", lambda b: b"no slide"])
def test_damage_is_left_out_by_name(three, spoil):
    "Truncated, with a hole, empty, something else."
    (three/"s1.tif").write_bytes(spoil((three/"s1.tif").read_bytes()))
    source = S.open_slides(three, data_of(three, tiles=500, tissue=.05))
    assert {r.group for r in source.records} == {"s0", "s2"}
    assert "1 of 3 slides were left out: s1.tif: " in source.notes[1]


def test_two_of_one_name(three):
    write(three/"deep"/"s1.tiff", tissue(5))
    with pytest.raises(ValueError, match=r"deep/s1.tiff and s1.tif have one name"): S.open_slides(three, data_of(three))
    with pytest.raises(FileNotFoundError, match="no slide in it"): S.list_slides(Path(__file__).parent)


def test_the_same_again_whatever_lies_beside(three):
    "By the seed and a slide's name: not by its neighbours, nor by how many processes there are."
    draw = lambda where, **more: {r.path: r.read() for r in S.open_slides(where, data_of(three, tiles=9, **more)).records}
    many, one, other = draw(three), draw(three/"s1.tif"), draw(three/"s1.tif", seed=1)
    assert all(np.array_equal(many[k], v) for k, v in one.items()) and len(one) == 9 and len(many) == 27
    assert set(one) != set(other)


def test_goes_on_where_it_stopped(three, tmp_path, monkeypatch):
    "A finished slide is not read again; one that was not finished, or has changed, is."
    S.open_slides(three, data_of(three, tiles=5))
    cut = {p.parent: p.stat().st_mtime_ns for p in (tmp_path/"kept").glob("*/plan.json")}
    assert len(cut) == 3
    write(three/"s1.tif", tissue(9)); os.utime(three/"s1.tif", ns=(1, 1))
    S.open_slides(three, data_of(three, tiles=5))
    again = {p.parent: p.stat().st_mtime_ns for p in (tmp_path/"kept").glob("*/plan.json")}
    assert cut.items() <= again.items() and len(again) == 4
    monkeypatch.setattr(S, "plan_slide", lambda *a: 1/0)
    S.open_slides(three, data_of(three, tiles=5)) # all are there: nothing is planned


@pytest.mark.parametrize("text,why", [
    ("name,label\ns0,a\n", "no column slide"), ("slide,label\ns0,a\ns0.tif,b\n", "slide s0 has two rows"),
    ("slide,label\ns0,a\n", r"no row for slide s1 \(2 such\)"), ("slide,split\ns0,train\ns1,learning\ns2,test\n", "split 'learning'")])
def test_tables_that_do_not_fit(three, text, why):
    (three/"table.csv").write_text(text)
    with pytest.raises(ValueError, match=why): S.open_slides(three, data_of(three, table=str(three/"table.csv")))


def test_the_prepared_store(three, tmp_path):
    "Slide, place and magnification of every tile; a slide in one split; labels of a table; none without one."
    bare = data_of(three, tiles=6)
    store = prepare(open_source(bare), tmp_path/"bare", bare)
    t = open_store(tmp_path/"bare").table
    assert {"x", "y", "mpp"} <= set(t) and (t.groupby("group").split.nunique() == 1).all() and set(t.target) == {-1}
    for i in range(3, 6): write(three/f"s{i}.tif", tissue(i))
    rows = [(f"s{i}", "ab"[i//3], f"p{i}", ("train", "valid", "test")[i%3]) for i in range(6)]
    pd.DataFrame(rows, columns=["slide", "label", "group", "split"]).to_csv(three/"table.csv", index=False)
    told = data_of(three, tiles=6, table=str(three/"table.csv"))
    t = prepare(open_source(told), tmp_path/"told", told).table
    assert set(zip(t.group, t.split, t.label)) == {(g, s, l) for _, l, g, s in rows}


def test_a_map_lies_where_the_tiles_are(three):
    "A value is drawn over its own tile, and a store whose slides are gone says which."
    source = S.open_slides(three/"s0.tif", data_of(three, tiles=8))
    table = pd.DataFrame([(r.path, *r.place) for r in source.records], columns=["path", "x", "y", "mpp"])
    fig = S.slide_map(three, table, np.arange(8.))
    drawn = fig.axes[0].images[1].get_array()
    for k, (x, y) in enumerate(zip(table.x, table.y)): assert drawn[int(y/0.5), int(x/0.5)] == k
    assert np.isfinite(np.ma.filled(drawn, np.nan)).sum() == 8*32*32
    with pytest.raises(ValueError, match="slide gone.tif of the store is not there"):
        S.slide_map(three, table.assign(path="gone.tif#0,0,0.5"), np.arange(8.))


def unpacked(name, out):
    if not (REAL/name).is_file(): pytest.skip(f"../shared/realdata/{name} is not here")
    with zipfile.ZipFile(REAL/name) as z: z.extractall(out)
    return out


def test_real_slides(tmp_path):
    "Two Aperio files; one does not tell its µm a pixel."
    folder = unpacked("wsi_small_svs.zip", tmp_path/"svs")
    notes = S.open_slides(folder, data_of(folder, image_size=96, tiles=10)).notes
    assert "1 of 2 slides were left out: tcga-cr-7395-01a-01-ts1.svs: µm a pixel are not in the file" in notes[1]
    source = S.open_slides(folder, data_of(folder, image_size=96, tiles=10, default_mpp=0.25, mpp=[0.5, 1.0]))
    assert len(source.records) == 40 and len(source.notes) == 1
    assert all(r.read().std() > 10 for r in source.records)


def test_odd_files(tmp_path):
    "Each is used or named with its reason; none ends the others."
    folder = unpacked("wsi_odd_tiff.zip", tmp_path/"odd")
    source = S.open_slides(folder, data_of(folder, tiles=5, default_mpp=0.5, mpp=[1.0]))
    # yb10kx5k.zstd is drawn, of two colours: either may be taken for glass
    assert {r.group for r in source.records} - {"yb10kx5k.zstd"} == {"cmu1_crop_10x_mpp0.998", "cmu1_crop_pyramid_nompp", "generic_boxes_nompp"}
    for why in ("broken.svs: cannot be read", "unopenable.tiff: cannot be read (Unsupported TIFF compression",
                "test_orient3.tif: stored turned (TIFF orientation 3)", "test_orient6.tif: stored turned (TIFF orientation 6)",
                "grey10kx5k.tif: cannot be read", "zero_gi.tif: cannot be read"): assert why in source.notes[1]
