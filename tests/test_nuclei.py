"""Nuclei one by one: targets and watershed against plain code, branches on both kinds of encoder, two phases, whole images, bad input."""
import json, sys, zipfile
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from sdmae.evaluate.hovernet import (HoverNet, dice_loss, distance_loss, fit_nuclei, load_nuclei, nucleus_loss, pack, predict_maps,
                                     predict_nuclei, save_nuclei, type_loss, unpack)
from sdmae.evaluate.instances import count, quality
from sdmae.evaluate.nuclei import choose_thresholds, hv_maps, mean_within, nuclei_of
from sdmae.evaluate.segment import SegmentViews, sliding
from sdmae.models.encoders import build_encoder, own_config
from sdmae.nuclei import grid_of, main, nuclei_in, open_picture, resized
from sdmae.params import EncoderForm, ModelParams, NucleiParams, OptimParams, PostParams, ViewParams
from sdmae.sample.nuclei import TYPES, make_nuclei
from sdmae.sample.tissue import CENTRES, jittered_stains
from sdmae.sources.masks import toy_nuclei

REAL = Path(__file__).parents[2]/"shared"/"realdata"
VIEWS = ViewParams(scale=(0.5, 1.), interpolation="bilinear", vflip=True, rot90=True)


def sample(seed, size=96):
    rng, centre = np.random.default_rng(seed), CENTRES["A"]
    return make_nuclei(rng, centre, jittered_stains(rng, centre), size, 40)


def recipe(**kwargs):
    base = dict(image_size=64, stride=32, batch_size=2, blocks=[0, 1, 2, 3], channels=16, frozen_steps=2, steps=2, views=VIEWS,
                optim=OptimParams(name="adam", base_lr=0.2, betas=(.9, .999), weight_decay=0.))
    return NucleiParams(**base | kwargs)


def encoder(arch="vit"):
    torch.manual_seed(0)
    model = ModelParams(patch_size=8, embed_dim=32, depth=4, num_heads=2) if arch == "vit" else ModelParams(arch=arch)
    return build_encoder(64, model, EncoderForm(class_token=False, pos_embed="sincos2d"))


def training(n=3, n_types=4):
    tiles = [sample(s) for s in range(n)]
    return [torch.from_numpy(i).permute(2, 0, 1) for i, _, _ in tiles], [pack(m, t, n_types) for _, m, t in tiles]


# Targets

def plain_hv(m):
    "One nucleus after the other, one pixel after the other."
    out = np.zeros((2, *m.shape))
    for i in np.unique(m[m > 0]):
        rows, columns = np.nonzero(m == i)
        for axis, at in enumerate((columns, rows)):
            d = at - at.mean()
            scale = np.where(d < 0, -d.min(), d.max())
            out[axis, rows, columns] = np.divide(d, scale, out=np.zeros(len(d)), where=scale > 0)
    return out


@pytest.mark.parametrize("seed", range(4))
def test_distances(seed):
    maps = np.stack([toy_nuclei(10*seed + s, 48, 9)[1].astype(np.int64)*k for s, k in ((0, 1), (1, 1000))])
    np.testing.assert_allclose(hv_maps(torch.from_numpy(maps)).numpy(), [plain_hv(m) for m in maps], atol=1e-5)


def test_distances_of_nothing(): assert not hv_maps(torch.zeros(2, 5, 6, dtype=torch.int32)).any()


def test_views_move_image_and_nuclei_together():
    "An image that shows its own map still does after crops, flips and turns; types stay with their nuclei."
    m, types = sample(1)[1:]
    packed = pack(m, types, 4)
    shown = (m > 0).astype(np.uint8)*200
    views = SegmentViews(ViewParams(scale=(0.9, 1.), interpolation="bilinear", vflip=True, rot90=True), 96)
    torch.manual_seed(0)
    x, moved = views(torch.from_numpy(shown).expand(6, 3, -1, -1), packed.expand(6, -1, -1))
    ids, kinds = unpack(moved, 4)
    same = ((x[:, 0] > 100/255) == (ids > 0)).float().mean()
    assert same > .93 and len({o.sum().item() for o in ids}) > 1
    for i, k in {(int(i), int(k)) for i, k in zip(ids.flatten(), kinds.flatten()) if i}: assert types[i] == k


# Watershed

@pytest.mark.parametrize("seed", range(3))
def test_true_maps_give_nuclei_back(seed):
    m = sample(seed, 160)[1]
    again = nuclei_of((m > 0).astype(float), hv_maps(torch.from_numpy(m)[None])[0].numpy(), PostParams(min_size=3))
    assert again.dtype == np.int32 and set(np.unique(again)) == set(range(again.max() + 1))
    q = quality(count([m], [again]).fits[0])
    assert q["dq"] > .9 and q["sq"] > .95


@pytest.mark.parametrize("down", [False, True])
def test_two_that_touch_come_apart(down):
    "Along a whole side, beside one another or one above the other; and without distances they are one."
    m = np.zeros((24, 24), np.int32); m[6:18, 4:12] = 1; m[6:18, 12:20] = 2
    m = np.ascontiguousarray(m.T) if down else m
    inside, hv = (m > 0).astype(float), hv_maps(torch.from_numpy(m)[None])[0].numpy()
    again = nuclei_of(inside, hv)
    q = quality(count([m], [again]).fits[0])
    assert again.max() == 2 and q["dq"] == 1 and q["sq"] > .95
    assert nuclei_of(inside, 0*hv).max() == 1


def test_one_odd_pixel_changes_nothing_elsewhere():
    "Scaled by the image's own extremes, one pixel would move the threshold of all nuclei."
    m = sample(0, 128)[1]
    hv = hv_maps(torch.from_numpy(m)[None])[0].numpy()
    before = nuclei_of((m > 0).astype(float), hv)
    hv[0, 4, 4] = 50.
    after = nuclei_of((m > 0).astype(float), hv)
    assert ((before[30:] > 0) == (after[30:] > 0)).all()
    assert len({(a, b) for a, b in zip(before[30:].ravel(), after[30:].ravel())}) == len(np.unique(before[30:]))


def test_means_within():
    m, rng = sample(2)[1], np.random.default_rng(0)
    v = rng.random((3, *m.shape))
    np.testing.assert_allclose(mean_within(m, v), [[o[m == i].mean() for o in v] for i in range(1, m.max() + 1)])


def test_thresholds_see_validation_alone():
    m = sample(3)[1]
    hv = hv_maps(torch.from_numpy(m)[None])[0].numpy()
    p, tried = choose_thresholds([((m > 0)*.45 + .02, hv)], [m], PostParams())
    assert p.threshold == 0.4 and len(tried) == 12 and p.smooth == PostParams().smooth


# Losses by hand

def test_losses_by_hand():
    t = torch.zeros(1, 2, 2, dtype=torch.long); t[0, 0, 0] = 1
    logits = torch.zeros(1, 1, 2, 2)
    half = torch.full((1, 1, 2, 2), .5)
    assert dice_loss(half, (t > 0)[:, None].float(), 0.).item() == pytest.approx(1 - 2*.5/(2 + 1))
    assert nucleus_loss(logits, t).item() == pytest.approx(np.log(2) + 1 - (1 + 1e-3)/(3 + 1e-3), abs=1e-6)
    even = torch.zeros(1, 3, 2, 2)
    third = [2*4/3*s/(4/3 + n) if n else 0 for s, n in ((.75, 3), (.25, 1), (0, 0))]
    want = np.log(3) + np.mean([1 - (2*n/3 + 1e-3)/(4/3 + n + 1e-3) for n in (3, 1, 0)])
    assert type_loss(even, t).item() == pytest.approx(want, abs=1e-6)
    far = torch.zeros(1, 2, 6, 6); m = torch.zeros(1, 6, 6, dtype=torch.long); m[0, 2:4, 2:4] = 5
    true = hv_maps(m)
    assert distance_loss(true, m).item() == 0
    assert distance_loss(far, m).item() > true.square().mean().item()


def test_slopes_against_plain_sums():
    "The error of slopes is that of sums over 5 × 5 neighbours, each by its distance, within nuclei alone (Graham et al. 2019, equation 4)."
    m = torch.from_numpy(toy_nuclei(5, 16, 3)[1].astype(np.int64))[None]
    true, pred = hv_maps(m)[0].numpy().astype(float), np.random.default_rng(0).normal(size=(2, 16, 16)).astype(np.float32)
    off, steep = np.pad(pred - true, ((0, 0), (2, 2), (2, 2))), 0.
    for r, c in zip(*np.nonzero(m[0].numpy())):
        sums = [sum(off[k, r+2+y, c+2+x]*(y if k else x)/(x*x + y*y) for y in range(-2, 3) for x in range(-2, 3) if x or y) for k in (0, 1)]
        steep += sums[0]**2 + sums[1]**2
    want = np.square(pred - true).mean() + steep/(m > 0).sum().item()
    assert distance_loss(torch.from_numpy(pred)[None], m).item() == pytest.approx(want, rel=1e-4)


# Training

@pytest.mark.parametrize("arch", ["vit", "resnet18"])
def test_two_phases(arch):
    "The frozen phase leaves the encoder and its BatchNorm as they were; the second one moves them."
    own = encoder(arch)
    before, seen = {k: v.clone() for k, v in own.state_dict().items()}, {}
    images, packed = training()
    def after(model, phase): seen[phase] = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    model, rows = fit_nuclei(own, images, packed, recipe(), 4, after=after)
    assert all(torch.equal(v, before[k]) for k, v in seen["frozen"].items())
    assert any(not torch.equal(v, before[k]) for k, v in seen["tuned"].items())
    assert {r["frozen"] for r in rows} == {True, False} and {"nucleus", "distance", "type"} <= rows[0].keys()
    model.train()(torch.stack([i[:, :64, :64] for i in images[:2]]), torch.stack([p[:64, :64] for p in packed[:2]]))["loss"].backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle


def test_it_learns():
    images, packed = training(4)
    model, rows = fit_nuclei(encoder(), images, packed, recipe(frozen_steps=0, steps=60, batch_size=4, channels=24), 4, scratch=True)
    first, last = (np.mean([r["nucleus"] for r in part]) for part in (rows[:5], rows[-5:]))
    assert last < .7*first
    maps = predict_maps(model, images[0], recipe())
    found, types, sure = predict_nuclei(maps, PostParams())
    assert maps[1].shape == (2, 96, 96) and set(types.values()) <= set(TYPES) and ((0 <= sure) & (sure <= 1)).all()


def test_without_types():
    images, packed = training(2, 0)
    model, rows = fit_nuclei(encoder(), images, [p for p in packed], recipe(frozen_steps=0), 0)
    found, types, sure = predict_nuclei(predict_maps(model, images[0], recipe()), PostParams())
    assert types == {} and np.isnan(sure[:, 1]).all() and "type" not in rows[0]


@pytest.mark.parametrize("phase", ["frozen", "tuned"])
def test_goes_on_after_a_stop(tmp_path, monkeypatch, phase):
    "Stopped within a phase and run again it gives the same network, bit by bit, and makes no step twice."
    from sdmae.train import engine
    images, packed = training()
    whole, rows = fit_nuclei(encoder(), images, packed, recipe(frozen_steps=3, steps=4), 4)
    class Stop(Exception): pass
    done = []
    class Counting(engine.Callback):
        def after_epoch(self, trainer): done.append((trainer.steps, trainer.step))
    class Stopping(engine.Callback):
        def after_epoch(self, trainer):
            if trainer.steps == dict(frozen=3, tuned=4)[phase] and trainer.step == 2: raise Stop
    monkeypatch.setattr(engine.Trainer.__init__, "__defaults__", tuple(0. if v == 2. else v for v in engine.Trainer.__init__.__defaults__)) # a checkpoint after every step
    again = dict(checkpoint=tmp_path/"a.pt", made_of={})
    with pytest.raises(Stop): fit_nuclei(encoder(), images, packed, recipe(frozen_steps=3, steps=4), 4, callbacks=(Stopping(),), **again)
    resumed, later = fit_nuclei(encoder(), images, packed, recipe(frozen_steps=3, steps=4), 4, callbacks=(Counting(),), **again)
    for (k, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()): assert torch.equal(a, b), k
    assert [r["loss"] for r in later] == [r["loss"] for r in rows] and 0 < len(done) < 7


# Kept, and used on whole images

def kept(folder, mpp=.5):
    images, packed = training(2)
    own = encoder()
    config = own_config(own) | dict(image_size=64, model=ModelParams(patch_size=8, embed_dim=32, depth=4, num_heads=2).model_dump(),
                                    form=dict(class_token=False, pos_embed="sincos2d"))
    model, _ = fit_nuclei(own, images, packed, recipe(frozen_steps=0, steps=12), 4)
    save_nuclei(folder, model, config, recipe(), PostParams(), TYPES, mpp)
    return model, images


def test_kept_and_loaded(tmp_path):
    model, images = kept(tmp_path/"model")
    again, params, post, made = load_nuclei(tmp_path)
    for a, b in zip(predict_maps(model, images[0], recipe()), predict_maps(again, images[0], params)): np.testing.assert_array_equal(a, b)
    assert made["types"] == TYPES and post == PostParams()
    (tmp_path/"model"/"nuclei.json").write_text("{}")
    with pytest.raises(ValueError, match="do not fit together, or are damaged"): load_nuclei(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no network for nuclei"): load_nuclei(tmp_path/"none")


def test_the_command(tmp_path, capsys):
    "Image in, three files out; every nucleus has an outline and a line; errors are one line, and nothing is written."
    kept(tmp_path/"run"/"model")
    Image.fromarray(sample(8, 150)[0]).save(tmp_path/"a.png")
    assert main([str(tmp_path/"a.png"), "--weights", str(tmp_path/"run"), "--block", "64", "--device", "cpu"]) == 0
    features = json.loads((tmp_path/"a-nuclei.geojson").read_text())["features"]
    lines = (tmp_path/"a-nuclei.csv").read_text().splitlines()
    assert len(features) == len(lines) - 1 and Image.open(tmp_path/"a-nuclei.png").size == (150, 150)
    assert all(f["properties"]["classification"]["name"] in TYPES.values() for f in features)
    assert "say --mpp" in capsys.readouterr().out
    (tmp_path/"b.png").write_bytes(b"no image")
    assert main([str(tmp_path/"b.png"), "--weights", str(tmp_path/"run"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "b.png" in said and len(said.strip().splitlines()) == 1 and not (tmp_path/"b-nuclei.csv").exists()
    before = (tmp_path/"a.png").read_bytes()
    assert main([str(tmp_path/"a.png"), "--weights", str(tmp_path/"run"), "--out", str(tmp_path/"a"), "--device", "cpu"]) == 2
    assert (tmp_path/"a.png").read_bytes() == before and "a.png" in capsys.readouterr().err
    assert main([str(tmp_path/"a.png"), "--weights", str(tmp_path/"run"), "--out", str(tmp_path/"c"), "--annotations", "--device", "cpu"]) == 0
    assert {f["properties"]["objectType"] for f in json.loads((tmp_path/"c.geojson").read_text())["features"]} == {"annotation"}


def in_memory(image, own=None, wanted=None): return resized(image.shape[:2], lambda t, l, h, w: image[t:t+h, l:l+w], own, wanted)


@pytest.mark.parametrize("stride, own", [(32, None), (48, None), (48, .3)])
def test_blocks_find_what_the_whole_finds(stride, own):
    "A network whose answers depend on where a pixel lies in its windows finds the same nuclei, at another scale as well; windows elsewhere do not."
    params, bend = recipe(stride=stride), torch.linspace(-4, 4, 64)
    logits = lambda x: torch.stack([(.6 - x.mean(1))*20 + bend + bend[:, None], *(0*x[:, :2]).unbind(1)], 1)
    def predict(x):
        y = sliding(logits, torch.from_numpy(x.copy()).permute(2, 0, 1)/255, 64, stride).numpy()
        return predict_nuclei((1/(1 + np.exp(-y[0])), y[1:3], y[:0]), PostParams())
    picture = in_memory(np.concatenate([np.concatenate([sample(20 + 3*i + j, 170)[0] for j in range(3)], 1) for i in range(2)]), own, .5)
    told = lambda **k: {(round(n["row"], 4), round(n["column"], 4), n["area"], str(n["rings"])) for n in nuclei_in(picture, predict, **k)}
    whole = told(size=10_000)
    assert len(whole) > 20 and told(**grid_of(96, params)) == whole
    assert told(size=100, margin=64) != whole


def test_large_nuclei_are_not_cut():
    "The outline has the area that the table says, whatever the nucleus's size."
    image = np.full((300, 420, 3), 255, np.uint8); image[60:240, 40:380] = 0
    predict = lambda x: ((x[..., 0] == 0).astype(np.int32), {}, np.ones((1, 2)))
    [n] = nuclei_in(in_memory(image), predict)
    low, high = n["rings"][0].min(0), n["rings"][0].max(0)
    assert n["area"] == 180*340 and low.tolist() == [40, 60] and high.tolist() == [380, 240]


def test_memory_does_not_grow_with_the_image():
    "No piece is larger than a block and its margins, whatever the image's size."
    asked = []
    def read(top, left, h, w): asked.append(h*w); return np.full((h, w, 3), 255, np.uint8)
    for side in (300, 1500):
        asked.clear()
        assert not list(nuclei_in(resized((side, side), read, None, None), lambda x: (np.zeros(x.shape[:2], np.int32), {}, np.zeros((0, 2))), 128, 16))
        assert max(asked) == 160*160 or side < 160


# Bad input

def test_bad_input():
    with pytest.raises(ValueError, match="nucleus 3 has no type"): pack(np.full((2, 2), 3), {}, 2)
    with pytest.raises(ValueError, match="nucleus 3 has type 5, types are 1 … 2"): pack(np.full((2, 2), 3), {3: 5}, 2)
    with pytest.raises(ValueError, match="both 0"): recipe(frozen_steps=0, steps=0)
    small = torch.zeros(3, 20, 30, dtype=torch.uint8) # smaller than the window: mirrored, and cut off again
    net = HoverNet(encoder(), recipe(), n_types=0).eval()
    assert predict_maps(net, small, recipe())[0].shape == (20, 30)


def flat_image(size, value=200): return np.full((*size, 3), value, np.uint8)


def test_odd_images(tmp_path, monkeypatch):
    "Grey, transparent, tiny and large ones are read; more than 8 bits and several pages are refused by name."
    from PIL import Image as P
    for mode, value, want in (("L", 7, [7]*3), ("RGBA", (10, 20, 30, 0), [255]*3), ("P", 0, [0]*3)):
        P.new(mode, (9, 5), value).save(tmp_path/"a.png")
        picture = open_picture(tmp_path/"a.png")
        assert picture.shape == (5, 9) and picture.piece(1, 1, 1, 1).tolist() == [[want]]
    P.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path/"deep.png")
    with pytest.raises(ValueError, match="deep.png: more than 8 bits"): open_picture(tmp_path/"deep.png")
    P.fromarray(flat_image((4, 4))).save(tmp_path/"pages.tif", save_all=True, append_images=[P.fromarray(flat_image((4, 4)))])
    with pytest.raises(ValueError, match="pages.tif: several pages"): open_picture(tmp_path/"pages.tif")
    monkeypatch.setattr(P, "MAX_IMAGE_PIXELS", 100)
    P.fromarray(flat_image((40, 30))).save(tmp_path/"large.png")
    assert open_picture(tmp_path/"large.png").shape == (40, 30) and P.MAX_IMAGE_PIXELS == 100
    with pytest.raises(ValueError, match="--mpp 352"): open_picture(tmp_path/"a.png", mpp=352.8)
    (tmp_path/"a.svs").write_bytes(b"none")
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ValueError, match=r"sdmae\[slides\]"): open_picture(tmp_path/"a.svs")


def test_one_pixel(tmp_path, capsys):
    "The smallest image that there is, and nothing in it: three files without a nucleus; the second time they are not written over."
    kept(tmp_path/"run"/"model")
    Image.fromarray(flat_image((1, 1))).save(tmp_path/"a.png")
    command = [str(tmp_path/"a.png"), "--weights", str(tmp_path/"run"), "--device", "cpu"]
    assert main(command) == 0 and json.loads((tmp_path/"a-nuclei.geojson").read_text())["features"] == []
    before = {p: p.read_bytes() for p in tmp_path.glob("a-nuclei.*")}
    assert len(before) == 3 and main(command) == 2 and "is there already" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in before} == before


# Slides

def test_a_tiled_tiff_is_read_in_pieces(tmp_path):
    "OpenSlide gives the pixels that were written; a resolution of 72 dots an inch is nobody's pixel size."
    pytest.importorskip("openslide"); tifffile = pytest.importorskip("tifffile")
    noise = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    for name, per_cm in (("half", 20_000), ("screen", 28.35)):
        tifffile.imwrite(tmp_path/f"{name}.tif", noise, tile=(64, 64), photometric="rgb", resolution=(per_cm, per_cm), resolutionunit=3)
    picture, screen = open_picture(tmp_path/"half.tif"), open_picture(tmp_path/"screen.tif")
    assert picture.shape == (300, 500) and picture.mpp == pytest.approx(.5, rel=1e-3) and screen.mpp is None
    np.testing.assert_array_equal(picture.piece(100, 70, 90, 130), noise[100:190, 70:200])
    same = in_memory(noise, .5, 1.).piece(20, 30, 40, 50)
    np.testing.assert_array_equal(open_picture(tmp_path/"half.tif", wanted=1.).piece(20, 30, 40, 50), same)


def test_a_slide_of_a_scanner(tmp_path):
    "Its size of pixels is its own; what is read at a coarser one is the mean of the fine."
    pytest.importorskip("openslide")
    if not (REAL/"wsi_small_svs.zip").exists(): pytest.skip("shared/realdata has no slide")
    with zipfile.ZipFile(REAL/"wsi_small_svs.zip") as z: z.extract("cmu-1-small-region.svs", tmp_path)
    file = tmp_path/"cmu-1-small-region.svs"
    fine, coarse = open_picture(file), open_picture(file, wanted=1.)
    assert fine.shape == (2967, 2220) and fine.mpp == pytest.approx(.499) and coarse.scale == pytest.approx(1/.499)
    part = fine.piece(1000, 1000, 400, 400).mean((0, 1))
    np.testing.assert_allclose(coarse.piece(499, 499, 200, 200).mean((0, 1)), part, atol=2)
