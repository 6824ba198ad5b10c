"""Whole slides: what is cut and what is refused, on made pyramids and on the small real ones where they are there."""
import json, zipfile
from pathlib import Path

import numpy as np, pandas as pd, pytest
openslide = pytest.importorskip("openslide")
import tifffile
from pydantic import ValidationError

import sdmae.sources.slides as slides
from sdmae.data.records import Unfit
from sdmae.data.store import prepare
from sdmae.params import DataParams, SlidesParams
from sdmae.sources.publishers import open_source
from sdmae.sources.slides import (component, cut_slide, list_slides, mpp_of, open_slides, plan_slide, read_table, read_tile, slide_at, slide_map,
                                  tile_places, tissue_mask)

REAL = Path(__file__).parents[2]/"shared"/"realdata"


def slide(path, seed=0, size=(600, 800), mpp=0.5, tissue=True, turn=None, levels=2):
    "A pyramid: a block of coloured noise whose brightness tells the place, on glass."
    rng, image = np.random.default_rng(seed), np.full((*size, 3), 240, np.uint8)
    if tissue:
        inside = image[100:500, 150:650]
        inside[:] = rng.integers(90, 190, inside.shape); inside[..., 1] //= 2
    more = dict(resolution=(1e4/mpp,)*2, resolutionunit=3) if mpp else {}
    if turn: more["extratags"] = [(274, 3, 1, turn, True)]
    with tifffile.TiffWriter(path) as f:
        for k in range(levels): f.write(image[::4**k, ::4**k], tile=(128, 128), compression="zlib", photometric="rgb", subfiletype=bool(k), **(more if not k else {}))
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "cut_folder", lambda: tmp_path/".cut")
    folder = tmp_path/"slides"; folder.mkdir()
    return folder


def data(folder, size=32, **kwargs):
    return DataParams(name="made", adapter="slides", path=str(folder), image_size=size, valid_fraction=.34, copies="warn", slides=SlidesParams(**kwargs))


def test_a_store_of_slides(place, tmp_path):
    "Slides are groups; each tile has its place in µm and its magnification; no tile is glass; reading it again gives the same."
    for i in range(5): slide(place/f"s{i}.tif", i)
    d = data(place, tiles=12, mpp=[0.5, 1.0])
    source = open_source(d)
    store = prepare(source, tmp_path/"store", d)
    t = store.table
    assert set(t.group) == {f"s{i}" for i in range(5)} and t.groupby("group").split.nunique().max() == 1 and len(t) == 5*24
    assert (t.groupby(["group", "mpp"]).size() == 12).all()
    x, y = t.x.astype(float), t.y.astype(float)
    assert x.between(75, 325).all() and y.between(50, 250).all(), "within the tissue, in µm"
    r = t.iloc[0]
    left, top = map(int, r.path.split("#")[1].split(",")[:2])
    np.testing.assert_array_equal(store.tiles[0], read_tile(place/r.path.split("#")[0], left, top, 32*float(r.mpp)/0.5, 32))
    assert (float(r.x), float(r.y)) == pytest.approx(((left + 16)*.5, (top + 16)*.5))
    again = open_source(d)
    assert [o.path for o in again.records] == [o.path for o in source.records]


def test_a_slide_gives_the_same_tiles_whatever_lies_beside_it(place):
    one = slide(place/"b.tif", 3)
    alone = [r.path for r in open_slides(place, data(place, tiles=9)).records]
    slide(place/"a.tif", 4)
    assert [r.path for r in open_slides(place, data(place, tiles=9)).records if r.group == "b"] == alone
    assert plan_slide(one, SlidesParams(tiles=9), 32, 0) != plan_slide(one, SlidesParams(tiles=9), 32, 1)


def test_finished_slides_are_not_cut_again(place, monkeypatch):
    for i in range(3): slide(place/f"s{i}.tif", i)
    d = data(place, tiles=5)
    open_slides(place, d)
    def never(*a): raise AssertionError("cut again")
    monkeypatch.setattr(slides, "plan_slide", never)
    assert len(open_slides(place, d).records) == 15
    monkeypatch.undo(); monkeypatch.setattr(slides, "cut_folder", lambda: place.parent/".cut")
    slide(place/"s1.tif", 9, size=(640, 800))                       # another file of that name is cut
    assert len(open_slides(place, d).records) == 15


def test_places_by_hand():
    mask = np.zeros((8, 8), bool); mask[2:6, 2:6] = True
    found = tile_places(mask, (80, 80), 20., 1., 99, (0,))
    assert found.tolist() == [[20, 20], [40, 20], [20, 40], [40, 40]]
    assert len(tile_places(mask, (80, 80), 20., 1., 2, (0,))) == 2 and len(tile_places(mask, (10, 10), 20., .1, 9, (0,))) == 0


def test_glass_and_pen_are_no_tissue():
    glass = np.random.default_rng(0).integers(232, 240, (100, 100, 1)).repeat(3, 2).astype(np.uint8)
    assert not tissue_mask(glass).any()
    pen = glass.copy(); pen[40:60] = 5
    assert not tissue_mask(pen).any()
    pink = glass.copy(); pink[20:70, 20:70] = (200, 120, 180)
    assert tissue_mask(pink)[25:65, 25:65].all() and not tissue_mask(pink)[80:].any()


def test_the_magnification_is_that_asked_for(place):
    "A tile at twice the µm shows twice the side, averaged."
    one = slide(place/"s.tif")
    fine, wide = read_tile(one, 200, 200, 64, 64), read_tile(one, 200, 200, 64, 32)
    np.testing.assert_allclose(fine.reshape(32, 2, 32, 2, 3).mean((1, 3)), wide, atol=1)
    with pytest.raises(Unfit, match="it has 0.5 µm a pixel, and 0.25 are asked for"): plan_slide(one, SlidesParams(mpp=[0.25]), 32, 0)


# What cannot be used

@pytest.mark.parametrize("make, why", [
    (lambda p: slide(p, mpp=None), "µm a pixel are not in the file; say data.slides.default_mpp"),
    (lambda p: slide(p, mpp=352.8), "352.8 µm a pixel cannot be right"),
    (lambda p: slide(p, tissue=False), "no tissue was found"), (lambda p: slide(p, turn=6), r"stored turned \(TIFF orientation 6\)"),
    (lambda p: p.write_bytes(b"no slide"), "cannot be read"), (lambda p: p.write_bytes(slide(p).read_bytes()[:20_000]), "bad.tif: "),
    (lambda p: slide(p, size=(20, 24)), "bad.tif: ")])
def test_a_bad_slide_is_named_and_left_out(place, make, why):
    slide(place/"good.tif"); make(place/"bad.tif")
    source = open_slides(place, data(place, tiles=4))
    assert {r.group for r in source.records} == {"good"}
    assert len(source.notes) == 2 and "1 of 2 slides were left out: bad.tif" in source.notes[1]
    (place/"good.tif").unlink()
    with pytest.raises(ValueError, match="none of 1 slides can be used: .*" + why): open_slides(place, data(place, tiles=4))


def test_names_and_tables(place, tmp_path):
    slide(place/"a.tif"); slide(place/"b.tif", 1); (place/"more").mkdir(); slide(place/"more"/"a.tiff")
    with pytest.raises(ValueError, match="a.tif and more/a.tiff have one name"): list_slides(place)
    (place/"more"/"a.tiff").unlink()
    t = tmp_path/"t.csv"
    def said(text): t.write_text(text); return open_slides(place, data(place, tiles=4, table=str(t)))
    source = said("slide,label,group,split,centre\na.tif,x,p1,train,H\nb,y,p2,test,I\n")
    assert source.classes == ["x", "y"] and {(r.group, r.split, r.centre) for r in source.records} == {("p1", "train", "H"), ("p2", "test", "I")}
    for text, why in (("name\na\n", "no column slide; there are name"), ("slide,split\na,later\nb,test\n", "split 'later'; known are"),
                      ("slide\na\n", r"no row for slide b \(1 such\)"), ("slide\na\na\nb\n", "slide a has two rows")):
        with pytest.raises(ValueError, match=why): said(text)
    with pytest.raises(FileNotFoundError, match="none.csv does not exist"): read_table("none.csv", ["a"])
    with pytest.raises(FileNotFoundError, match="no slide in it"): list_slides(tmp_path/"t.csv" if False else (tmp_path/"empty").mkdir() or tmp_path/"empty")
    with pytest.raises(ValidationError, match="a section slides belongs to adapter: slides"): DataParams(name="x", adapter="slides", path="p", image_size=32)


def test_maps_on_a_slide(place):
    slide(place/"a.tif"); slide(place/"b.tif", 1)
    source = open_slides(place, data(place, tiles=6, mpp=[0.5, 1.0]))
    table = pd.DataFrame([(r.path, *r.place) for r in source.records], columns=["path", "x", "y", "mpp"])
    features = np.random.default_rng(0).normal(size=(len(table), 5)); features[:, 0] *= 30
    values = component(features)
    assert abs(np.corrcoef(values, features[:, 0])[0, 1]) > .99
    fig = slide_map(place, table, values)
    assert [a.get_title() for a in fig.axes[:2]] == ["a", "b"]
    with pytest.raises(ValueError, match="slide c.tif of the store is not there"): slide_map(place, table.assign(path="c.tif#0,0,0.5"), values)


# Real ones

def real(name, tmp_path):
    if not (REAL/name).is_file(): pytest.skip(f"{name} is not beside the project")
    with zipfile.ZipFile(REAL/name) as z: z.extractall(tmp_path/"real")
    return tmp_path/"real"


def test_real_slides(place, tmp_path):
    "The one of TCGA does not say its µm a pixel: it is left out, or told."
    folder = real("wsi_small_svs.zip", tmp_path)
    source = open_slides(folder, data(folder, size=64, tiles=10))
    assert {r.group for r in source.records} == {"cmu-1-small-region"} and "say data.slides.default_mpp" in source.notes[1]
    told = open_slides(folder, data(folder, size=64, tiles=10, default_mpp=0.25))
    assert len({r.group for r in told.records}) == 2 and len(told.records) == 20


def test_odd_slides(place, tmp_path):
    "Broken, turned, of unknown compression or without resolution: each is named, and the two that can be used are."
    folder = real("wsi_odd_tiff.zip", tmp_path)
    try: note = open_slides(folder, data(folder, size=64, tiles=3, tissue=.1)).notes[-1]
    except ValueError as e: note = str(e)
    for name, why in (("broken.svs", "cannot be read"), ("test_orient3.tif", "stored turned"), ("unopenable.tiff", "compression"),
                      ("cmu1_crop_pyramid_nompp.tiff", "not in the file")):
        assert name in note and why in note
