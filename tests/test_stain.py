"""Stain: HED jitter, RandStainNA and RandStainNA-GMM, against plain formulas in float64 with scikit-image's colours. Each trap that is
known of such augmentations has its test: deviations below zero, background in the statistics, BGR, the wrong channel, scaling by the
extremes of an image, units of OpenCV."""
import copy, json, zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from PIL import Image
from skimage import color
from torch._subclasses.fake_tensor import FakeTensorMode

import sdmae.views.draws as draws
import sdmae.views.spaces as spaces
import sdmae.views.stain as stain
from sdmae.data.records import Record, Source
from sdmae.data.store import prepare
from sdmae.params import DataParams, StainParams, ViewParams, compose, parse_params
from sdmae.pipeline.ingredients import made_of_encoder, made_of_task
from sdmae.pipeline.plan import encoder_faults, task_faults
from sdmae.pipeline.pretrain import run_config
from sdmae.sample.tissue import CENTRES, make_tile
from sdmae.views.augment import Views
from sdmae.views.spaces import DARKEST, STAINS, in_parts, rgb_to_hed
from sdmae.views.stain import FEWEST, SPACES, Law, Stain, change_stains, describe, digest, fit, fit_law, hed_jitter, in_groups, law_of, main, read_stain, tissue, transfer

REAL = Path(__file__).parents[2]/"shared"/"realdata"
ALL = list(SPACES)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.fixture(scope="module")
def tissues():
    "(64, 48, 48, 3) uint8 from four laboratories."
    return np.stack([make_tile(np.random.default_rng([7, i]), ("NORM", "STR", "TUM")[i % 3], list(CENTRES.values())[i % 4], size=48) for i in range(64)])


@pytest.fixture(scope="module")
def x(tissues): return torch.from_numpy(tissues).permute(0, 3, 1, 2)/255


def save(folder, images, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, im in enumerate(images, first): Image.fromarray(im).save(folder/f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def file(tissues, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stain")
    return fit(save(folder/"tiles", tissues), folder/"stain.json", components=3)


def edited(file, tmp_path, **changes):
    "A copy of a file of stain with a value changed; a path is joined by two underscores."
    made = json.loads(file.read_text())
    for path, value in changes.items():
        *sections, key = path.split("__")
        at = made
        for s in sections: at = at[s]
        at[key] = value
    made.pop("content")
    out = tmp_path/"edited.json"
    out.write_text(json.dumps(made | dict(content=digest(made))))
    return out


def params(file, **kwargs): return StainParams(file=str(file), **kwargs)
def own(x, space): return describe(SPACES[space].to(x), tissue(x), SPACES[space].flat)


# The traps

def plain(image, targets, space): # (H, W, 3) float64 in [0, 1], (6,)
    "Reinhard's transfer of one image by scikit-image and NumPy."
    to, back = dict(lab=(color.rgb2lab, color.lab2rgb), hsv=(color.rgb2hsv, color.hsv2rgb),
                    hed=(lambda im: -np.log(im.clip(1/255))/np.log(1e6) @ np.linalg.inv(STAINS), lambda v: np.exp(-np.log(1e6)*v @ STAINS).clip(0, 1)))[space]
    density = -np.log(image.min(-1).clip(1/255))
    w = ((density - .1)/.1).clip(0, 1)[..., None]*((image.max(-1) - .02)/.04).clip(0, 1)[..., None]
    v = to(image)
    if space == "hsv": v[..., 0] = (v[..., 0] - 1/3) % 1
    mean = (v*w).sum((0, 1))/w.sum(); std = np.sqrt((w*(v - mean)**2).sum((0, 1))/w.sum())
    moved = (v - mean)*(np.exp(targets[3:])/std).clip(1/3, 3) + targets[:3]
    if space == "hsv": moved = np.concatenate([(moved[..., :1] + 1/3) % 1, moved[..., 1:].clip(0, 1)], -1)
    return image*(1 - w) + back(moved).clip(0, 1)*w


@pytest.mark.parametrize("space", ALL)
def test_transfer_is_reinhards(space, x):
    "In RGB and not in BGR, batched as one by one; and a tile's own colours change nothing."
    targets = own(x, space)[0].roll(5, 0)
    out = transfer(x, targets, SPACES[space])
    for i in range(0, 64, 9):
        np.testing.assert_allclose(out[i].permute(1, 2, 0), plain(x[i].permute(1, 2, 0).double().numpy(), targets[i].double().numpy(), space), rtol=0, atol=3e-3)
    torch.testing.assert_close(transfer(x, own(x, space)[0], SPACES[space]), x.clamp(min=1/255) if space == "hed" else x, rtol=0, atol=1e-3)
    torch.testing.assert_close(out[8:9], transfer(x[8:9], targets[8:9], SPACES[space]), rtol=0, atol=1e-6)


def test_what_is_asked_for_is_reached(x):
    "Within the colours that there are, means and deviations are those drawn: nothing is scaled by the extremes of an image."
    mild = (.35 + .3*x)[own(.35 + .3*x, "hed")[1]]
    stats, usable = own(mild, "hed")
    targets = stats + torch.tensor([.005, .005, .0, .1, -.1, .1])
    got = own(transfer(mild, targets, SPACES["hed"]), "hed")[0]
    assert usable.all() and len(mild) > 50
    torch.testing.assert_close(got, targets, rtol=0, atol=2e-3)


def test_one_outlier_does_not_move_the_others(x):
    "As it would if the result were scaled to the full range of the image."
    targets = own(x[:1], "hed")[0] + .1
    spoiled = x[:1].clone()
    spoiled[..., 0, 0] = torch.tensor([.9, .02, .9])
    a, b = (transfer(o, targets, SPACES["hed"])[..., 1:, 1:] for o in (x[:1], spoiled))
    assert (a - b).abs().max() < .02


def test_no_deviation_is_negative(x):
    "A normal law of the deviation itself is below zero here every few draws, and would turn the tile into its negative."
    wide = fit_law(np.random.default_rng(0).normal([50, 20, -20, 1., 1., 1.], [1, 1, 1, 1.5, 1.5, 1.5], (500, 6)), 1, 0)
    drawn = law_of(wide, "gaussian")(torch.rand(20_000), torch.randn(20_000, 6))
    of_itself = np.random.default_rng(0).normal(*(o.item() for o in torch.std_mean(drawn[:, 3].exp())[::-1]), 20_000)
    assert (drawn[:, 3:].exp() > 0).all() and (of_itself < 0).mean() > .1
    for low in (-4., 4.):
        targets = own(x, "lab")[0].clone(); targets[:, 3:] = low
        out = transfer(x, targets, SPACES["lab"])
        for a, b in zip(SPACES["lab"].to(x)[:, 0].flatten(1), SPACES["lab"].to(out)[:, 0].flatten(1)): assert np.corrcoef(a, b)[0, 1] > .5


@pytest.mark.parametrize("colour", [1., .93, 0.])
@pytest.mark.parametrize("space", ALL)
def test_background_is_not_counted_and_not_changed(space, colour, x):
    "White, pale glass, and the black of padding."
    framed = torch.nn.functional.pad(x, (8,)*4, value=colour)
    (stats, _), (wanted, _) = own(framed, space), own(x, space)
    torch.testing.assert_close(stats, wanted, rtol=0, atol=2e-3)
    targets = wanted.roll(3, 0)
    out = transfer(framed, targets, SPACES[space])
    frame = torch.ones_like(framed[:1, :1]); frame[..., 8:-8, 8:-8] = 0
    assert torch.equal(out*frame, framed*frame)
    torch.testing.assert_close(out[..., 8:-8, 8:-8], transfer(x, targets, SPACES[space]), rtol=0, atol=3e-3)


@pytest.mark.parametrize("dye", range(3))
def test_each_number_moves_its_own_stain(dye, x):
    mild = .3 + .4*x[:8]
    factor, shift = torch.ones(8, 3, 1, 1), torch.zeros(8, 3, 1, 1)
    factor[:, dye], shift[:, dye] = 1.1, .05
    wanted = rgb_to_hed(mild)*factor + shift/DARKEST
    torch.testing.assert_close(rgb_to_hed(change_stains(mild, factor, shift)), wanted, rtol=0, atol=1e-5)


def test_units_of_opencv_are_refused(file, tmp_path):
    "RandStainNA's own files count L in 255ths and add 128 to a and b."
    law = json.loads(file.read_text())["spaces"]["lab"]["gaussian"]
    L, a, b = law["mean"][:3]
    with pytest.raises(ValueError, match="edited.json is damaged, lab: means lie outside .* OpenCV's bytes have other units; fit it anew"):
        read_stain(params(edited(file, tmp_path, spaces__lab__gaussian__mean=[L*2.55, a + 128, b + 128, *law["mean"][3:]])))


# HED jitter

@pytest.mark.parametrize("strength", [.05, .2])
def test_hed_jitter_has_the_published_law(strength):
    "A straight line through the amounts of each image finds the draw again: factors 1 ± s, shifts ± 5 s of density."
    amounts = torch.linspace(.01, .03, 30)[None, None, None].expand(1500, 3, -1, -1)
    tiles = torch.exp(-DARKEST*torch.einsum("sc,bshw->bchw", torch.tensor(STAINS).float(), amounts))
    assert tiles.min() > .3
    strong = stain.SHIFT; scale = .02  # so that nothing reaches glass or black
    factor, shift = [], []
    out = rgb_to_hed(hed_jitter(tiles, strength*scale))
    for c in range(3):
        line = np.polyfit(np.linspace(.01, .03, 30), out[:, c, 0].T.double().numpy(), 1)
        factor.append((line[0] - 1)/scale); shift.append(line[1]*DARKEST/scale)
    for drawn, half in ((np.array(factor), strength), (np.array(shift), strong*strength)):
        assert np.abs(drawn).max() <= half*1.02 and np.quantile(drawn, .75) == pytest.approx(half/2, abs=.06*half) and np.quantile(drawn, .25) == pytest.approx(-half/2, abs=.06*half)
    assert np.abs(np.corrcoef([*factor, *shift]) - np.eye(6)).max() < .1


def test_hed_jitter_of_strength_zero_is_the_tile(x): torch.testing.assert_close(hed_jitter(x, 0.), x.clamp(min=1/255), rtol=0, atol=1e-5)


def test_parts_are_the_whole(x, monkeypatch):
    for n in (1, 3*48*48, 10*3*48*48, 2**30):
        monkeypatch.setattr(spaces, "PART", n)
        torch.manual_seed(1); out = hed_jitter(x, .1)
        if n == 1: whole = out
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-6)
    assert in_parts(lambda a: a, x[:0]).shape == (0, 3, 48, 48)


# Tiles without stain

@pytest.mark.parametrize("space", ALL)
def test_a_tile_without_stain_stays(space, x):
    "White, black, one colour with and without noise of a byte, grey, and a speck of tissue."
    flat = torch.tensor([.7, .4, .6])[:, None, None].expand(3, 48, 48)
    speck = torch.ones(3, 48, 48); speck[:, :8, :8] = x[0, :, :8, :8]
    noisy = ((flat*255).round() + torch.randint(0, 2, (1, 48, 48)))/255 if space == "lab" else flat
    bare = torch.stack([torch.ones(3, 48, 48), torch.zeros(3, 48, 48), flat, noisy, x[0].mean(0).expand(3, 48, 48), speck])
    for targets in (torch.randn(6, 6), torch.full((6, 6), 50.)): assert torch.equal(transfer(bare, targets, SPACES[space]), bare)


@pytest.mark.parametrize("space", ALL)
def test_extreme_targets_give_colours(space, x):
    for targets in (torch.full((64, 6), 1e4), torch.full((64, 6), -1e4), 30*torch.randn(64, 6)):
        out = transfer(x, targets, SPACES[space])
        assert out.isfinite().all() and 0 <= out.min() and out.max() <= 1


# The laws

def test_a_law_has_the_moments_of_its_mixture():
    weights, means = np.array([.2, .5, .3]), np.arange(18).reshape(3, 6)/3.
    a = np.random.default_rng(0).normal(size=(3, 6, 6)); covs = a @ a.transpose(0, 2, 1)
    drawn = Law(weights, means, np.linalg.cholesky(covs))(torch.rand(100_000), torch.randn(100_000, 6)).double().numpy()
    mean = weights @ means
    cov = np.einsum("k,kij->ij", weights, covs) + np.einsum("k,ki,kj->ij", weights, means - mean, means - mean)
    np.testing.assert_allclose(drawn.mean(0), mean, atol=.05)
    np.testing.assert_allclose(np.cov(drawn.T), cov, atol=.03*np.abs(cov).max())


def test_the_mixture_keeps_covariance_and_modes_and_the_gaussian_neither():
    rng = np.random.default_rng(0)
    one, other = rng.multivariate_normal(np.zeros(2), [[1, .9], [.9, 1]], 400), rng.multivariate_normal([12, -12], [[1, -.8], [-.8, 1]], 400)
    samples = np.concatenate([np.concatenate([one, other]), rng.normal(size=(800, 4))], 1)
    law = fit_law(samples, 2, 0)
    joint, alone = (law_of(law, k)(torch.rand(4000), torch.randn(4000, 6)).numpy() for k in ("mixture", "gaussian"))
    between = lambda p: (np.abs(p[:, 0] - 6) < 2).mean()
    left = joint[joint[:, 0] < 6]
    assert between(samples) == 0 and between(joint) < .01 < .2 < between(alone)
    assert np.corrcoef(left[:, :2].T)[0, 1] == pytest.approx(.9, abs=.03) and np.corrcoef(joint[:, :2].T)[0, 1] == pytest.approx(np.corrcoef(samples[:, :2].T)[0, 1], abs=.02)
    assert abs(np.corrcoef(alone[:, :2].T)[0, 1]) < .05 and np.allclose(alone.std(0), samples.std(0), rtol=.05)


def test_units_do_not_matter_to_the_fit():
    "Numbers of HED are a thousandth of those of LAB."
    samples, scale = np.random.default_rng(0).normal(size=(300, 6)), np.array([1e-3, 1e-3, 1e-3, 1, 100, 1])
    a, b = fit_law(samples, 3, 0)["mixture"], fit_law(samples*scale, 3, 0)["mixture"]
    np.testing.assert_allclose(np.array(b["means"])/scale, a["means"], atol=1e-6)


@pytest.mark.parametrize("n, asked, used", [(50, 10, 1), (99, 10, 1), (100, 10, 2), (300, 4, 4)])
def test_components_need_fifty_tiles_each(n, asked, used):
    assert len(fit_law(np.random.default_rng(0).normal(size=(n, 6)), asked, 0)["mixture"]["weights"]) == used


# Drawing for a batch

@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_colours_are_drawn(kind, file, x):
    out = Stain(params(file, kind=kind))(x)
    assert out.isfinite().all() and 0 <= out.min() and out.max() <= 1 and ((out - x).abs().amax((1, 2, 3)) > .02).all()


def test_the_same_tile_gets_many_colours_of_the_law(file, x):
    s = Stain(params(file, spaces=["lab"]))
    out = s((.3 + .4*x[:1]).expand(400, -1, -1, -1))
    drawn = own(out, "lab")[0]
    law = json.loads(file.read_text())["spaces"]["lab"]["gaussian"]
    assert torch.allclose(drawn[:, 0].mean(), torch.tensor(law["mean"][0]), atol=3.) and drawn[:, 0].std() == pytest.approx(law["std"][0], rel=.3)


def test_probability_and_strength(file, x):
    many = x[:1].expand(600, -1, -1, -1)
    changed = (Stain(params(file, probability=.3))(many) != many).flatten(1).any(1).float().mean()
    assert changed.item() == pytest.approx(.3, abs=.05)
    far = []
    for strength in (1e-4, .3, 1.): torch.manual_seed(1); far.append((Stain(params(file, strength=strength))(x) - x).abs().mean().item())
    assert far[0] < 1e-3 and far[0] < far[1] < far[2]


def test_spaces_have_equal_shares():
    torch.manual_seed(0)
    groups = in_groups(12, 3)
    assert sorted(sum(groups, [])) == list(range(12)) and [len(g) for g in groups] == [4]*3
    assert len({tuple(in_groups(12, 3)[0]) for _ in range(20)}) > 15 and in_groups(1, 3).count([]) == 2


@pytest.mark.parametrize("kwargs", [dict(stain=dict(probability=.7)), dict(hed_jitter=.1, color_jitter=.3, hue=.1, jitter_probability=.5, grayscale=.3), dict(fields=[1., .5])])
def test_two_processes_draw_what_one_draws(kwargs, file, tissues, monkeypatch):
    if "stain" in kwargs: kwargs = dict(stain=dict(file=str(file), **kwargs["stain"]))
    views, images = Views(ViewParams(**kwargs), 32), torch.from_numpy(tissues[:12]).permute(0, 3, 1, 2)
    torch.manual_seed(0); whole = views(images)
    parts = []
    for rank in range(2):
        for module in (draws, stain): monkeypatch.setattr(module, "rank_and_world", lambda: (rank, 2))
        torch.manual_seed(0); parts.append(views(images[6*rank:6*rank + 6]))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)


def test_no_stain_draws_nothing(tissues):
    images = torch.from_numpy(tissues[:4]).permute(0, 3, 1, 2)
    torch.manual_seed(0); Views(ViewParams(hflip=False), 24)(images); after = torch.rand(1)
    torch.manual_seed(0); torch.rand(4, 4, 10)
    assert torch.equal(torch.rand(1), after)


def test_a_law_is_no_part_of_a_checkpoint(file):
    views = Views(ViewParams(stain=params(file)), 24)
    assert views.state_dict() == {} and len(list(views.buffers())) == 9 and not list(views.parameters())
    assert len(list(copy.deepcopy(views).buffers())) == 9


def test_nobody_waits_for_the_device(file, monkeypatch):
    "On a GPU that is not there: no number is read back."
    views = Views(ViewParams(stain=params(file, probability=.5), hed_jitter=.1, hue=.1, color_jitter=.2, jitter_probability=.5, grayscale=.2, fields=[1., .5]), 24)
    monkeypatch.setattr(torch, "randperm", lambda n: SimpleNamespace(tolist=lambda: list(range(n)))) # which the host draws
    with FakeTensorMode():
        for m in views.modules(): m._buffers.update({k: torch.empty(b.shape, dtype=b.dtype, device="cuda") for k, b in m._buffers.items()})
        out = views(torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="cuda"))
        assert out.device.type == "cuda" and out.shape == (4, 3, 24, 24)


@pytest.mark.parametrize("kwargs", [dict(hed_jitter=.1), dict(stain={})])
def test_grey_images_have_no_stain(kwargs, file):
    if "stain" in kwargs: kwargs = dict(stain=params(file))
    with pytest.raises(ValueError, match=f"views.{next(iter(kwargs))} changes stains, and these images are grey"):
        Views(ViewParams(**kwargs), 24)(torch.zeros(2, 1, 32, 32, dtype=torch.uint8))


# Fitting

def store(folder, images, splits, channels=3):
    read = lambda im: (lambda: im if channels == 3 else im[..., 0])
    records = [Record(f"{i}.png", "a", s, "", "", read(im)) for i, (im, s) in enumerate(zip(images, splits))]
    source = Source("Made", records, ["a"], True, [], channels=channels)
    prepare(source, folder, DataParams(name="Made", adapter="folder", path="x", image_size=48, copies="warn"))
    return folder


def test_a_store_gives_its_training_split_alone(tissues, tmp_path):
    "The other splits are red here, and would be seen."
    red = np.broadcast_to(np.array([200, 20, 20], np.uint8), (40, 48, 48, 3))
    folder = store(tmp_path/"tissue", [*tissues, *red], ["train"]*64 + ["valid"]*20 + ["test"]*20)
    made = json.loads(fit(folder, tmp_path/"a.json", ["lab"]).read_text())
    source = made["source"]
    assert {k: source[k] for k in ("name", "kind", "split", "tiles", "looked_at", "used")} == dict(name="Made", kind="store", split="train", tiles=64, looked_at=64, used=64)
    folder_of_images = json.loads(fit(save(tmp_path/"images", tissues), tmp_path/"b.json", ["lab"]).read_text())
    assert made["spaces"] == folder_of_images["spaces"] and source["sha256"] == folder_of_images["source"]["sha256"]
    assert made["sdmae"] and made["sklearn"] and made["numbers"] and list(made["spaces"]) == ["lab"]


def test_a_zip_a_limit_and_a_seed(tissues, tmp_path):
    folder = save(tmp_path/"images", tissues)
    with zipfile.ZipFile(tmp_path/"images.zip", "w") as z:
        for p in sorted(folder.iterdir()): z.write(p, p.name)
    a, b, c, d = (json.loads(fit(place, tmp_path/"out.json", ["hsv"], replace=True, seed=seed, tiles=tiles).read_text())
                  for place, seed, tiles in ((folder, 0, 55), (tmp_path/"images.zip", 0, 55), (folder, 1, 55), (folder, 0, 5000)))
    assert a["spaces"] == b["spaces"] != c["spaces"] and (a["source"]["looked_at"], d["source"]["looked_at"]) == (55, 64)
    mean = np.mean([own(torch.from_numpy(t).permute(2, 0, 1)[None]/255, "hsv")[0][0].numpy() for t in tissues], 0)
    np.testing.assert_allclose(d["spaces"]["hsv"]["gaussian"]["mean"], mean, atol=1e-5)


def test_large_images_and_small_ones_together(tissues, tmp_path):
    "Of a large image every k-th pixel is looked at; its stain is that of the small one."
    folder = save(tmp_path/"images", tissues)
    Image.fromarray(tissues[0].repeat(50, 0).repeat(50, 1)).save(folder/"large.png")
    assert json.loads(fit(folder, tmp_path/"a.json", ["lab"]).read_text())["source"]["used"] == 65


def test_what_has_no_stain_is_skipped_and_counted(tissues, tmp_path):
    others = [np.full((48, 48, 3), 255, np.uint8), np.broadcast_to(tissues[0].mean(-1, keepdims=True).astype(np.uint8), (48, 48, 3)), np.broadcast_to(np.array([180, 90, 150], np.uint8), (48, 48, 3))]
    save(tmp_path/"images", [*tissues, *others])
    source = json.loads(fit(tmp_path/"images", tmp_path/"a.json").read_text())["source"]
    assert (source["used"], source["skipped"]) == (64, {"little stained tissue": 2, "one colour": 1})


def test_too_few_tiles(tissues, tmp_path, capsys):
    save(tmp_path/"images", [*tissues[:FEWEST - 1], *[np.full((48, 48, 3), 255, np.uint8)]*3])
    with pytest.raises(ValueError, match="images: 49 tiles have a stain, 50 are needed .looked at 52; skipped: {'little stained tissue': 3.*Give more tiles"): fit(tmp_path/"images", tmp_path/"a.json")
    assert main(["fit", str(tmp_path/"images"), "--out", str(tmp_path/"a.json")]) == 2 and "49 tiles have a stain" in capsys.readouterr().err
    assert not (tmp_path/"a.json").exists()
    assert stain.gather([], ["lab"])[1]["used"] == 0


def test_other_faults_of_a_fit(tissues, tmp_path, capsys):
    with pytest.raises(ValueError, match="its tiles are grey. Stain needs colour"): fit(store(tmp_path/"grey", tissues[:4], ["train"]*4, 1), tmp_path/"a.json")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"): fit(tmp_path/"nowhere", tmp_path/"a.json")
    (save(tmp_path/"images", tissues)/"000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="images/000.png"): fit(tmp_path/"images", tmp_path/"a.json")
    for odd in (["--components", "0"], ["--tiles", "0"]):
        assert main(["fit", str(tmp_path/"images"), *odd]) == 2 and odd[0].strip("-") in capsys.readouterr().err
    with pytest.raises(SystemExit): main(["fit", str(tmp_path/"images"), "--space", "rgb"])


def test_the_command(tissues, tmp_path, capsys):
    save(tmp_path/"images", tissues)
    assert main(["fit", str(tmp_path/"images"), "--out", str(tmp_path/"a.json"), "--space", "hed", "hsv", "--components", "1"]) == 0
    made = json.loads((tmp_path/"a.json").read_text())
    assert "64 tiles of 64" in capsys.readouterr().out and list(made["spaces"]) == ["hed", "hsv"] and made["components"] == 1


# Reading

@pytest.mark.parametrize("changes, words", [
    (dict(format="other"), "is no file of stain"), (dict(source__used=12), "was fitted to 12 tiles, 50 are needed"),
    (dict(spaces__lab__gaussian__std=[0]*6), "lab: a deviation or a weight is not above 0"), (dict(spaces__lab__gaussian__mean=[float("nan")]*6), "numbers are not finite"),
    (dict(spaces__hsv__mixture__means=[[0]*5]), "six numbers are needed"), (dict(spaces__hsv__mixture={}), "hsv: 'weights'"), (dict(spaces__hed=3), "hed: "),
    (dict(spaces__hed__mixture__covariances=[np.zeros((6, 6)).tolist()]), "hed: Matrix is not positive definite"), (dict(source={}), "is damaged, source: 'used'"), (dict(spaces=[]), "has the colour spaces , not lab")])
def test_a_file_that_cannot_be_used(changes, words, file, tmp_path):
    with pytest.raises(ValueError, match=f"edited.json.*{words}.*fit it anew by `python -m sdmae.views.stain fit`"): read_stain(params(edited(file, tmp_path, **changes)))


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json does not exist: write it by `python -m sdmae.views.stain fit TILES --out .*none.json`"): read_stain(params(tmp_path/"none.json"))
    (tmp_path/"a.json").write_text("{")
    with pytest.raises(ValueError, match="a.json is no JSON"): read_stain(params(tmp_path/"a.json"))
    (tmp_path/"a.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no file of stain"): read_stain(params(tmp_path/"a.json"))


def test_a_number_that_was_changed_is_noticed(file, tmp_path):
    made = json.loads(file.read_text())
    made["spaces"]["lab"]["gaussian"]["mean"][0] *= 0.1
    (tmp_path/"a.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match="a.json is not as it was written, by its checksum: fit it anew"): read_stain(params(tmp_path/"a.json"))


def test_a_file_of_another_space(tissues, file, tmp_path):
    made = json.loads(file.read_text())
    only = edited(file, tmp_path, spaces=dict(hsv=made["spaces"]["hsv"]))
    assert list(read_stain(params(only, spaces=["hsv"]))) == ["hsv"]
    with pytest.raises(ValueError, match="edited.json has the colour spaces hsv, not lab: change stain.spaces, or fit it anew .* --space lab hsv"): read_stain(params(only, spaces=["lab", "hsv"]))


# The pipeline

def test_a_plan_sees_the_file(file, tmp_path):
    "Another content is another encoder and another evaluation; encoders of other views are what they were."
    mine = tmp_path/"stain.json"; mine.write_bytes(file.read_bytes())
    values = compose()
    values["views"]["stained"] = dict(of="tissue", stain=dict(file=str(mine)))
    values["encoder"]["mae"]["views"] = "stained"
    values["finetune"]["few"]["views"] = dict(of="stained")
    P, things = parse_params(values), (("mae", None), ("tissue", "finetune"), ("tissue", "probe"))
    made = lambda: [made_of_encoder(P, a) if b is None else made_of_task(P, a, b) for a, b in things]
    Store = SimpleNamespace(manifest=dict(name="a", sha256={}))
    config = lambda: run_config(P, "mae", 0, Store, torch.device("cpu"), None)["stain"]
    before, agreed = made(), config()
    assert [encoder_faults(P, "mae"), task_faults(P, "tissue")] == [[], []]
    mine.write_text(mine.read_text() + "\n")
    after = made()
    assert [a == b for a, b in zip(before, after)] == [False, False, True] and agreed != config()
    assert list(before[0]["stain"]) == ["views.stain.file"] and json.loads(json.dumps(before)) == before
    assert made_of_encoder(P, "random")["stain"] == {}
    mine.unlink()
    assert made_of_encoder(P, "mae")["stain"] == {"views.stain.file": None}
    told = [*encoder_faults(P, "mae"), *task_faults(P, "tissue")]
    assert all("stain.json does not exist" in o for o in told) and [o.split(": ")[0] for o in told] == ["encoder.mae.views.stain.file", "task.tissue.finetune.views.stain.file"]


def test_a_plan_refuses_stain_of_grey_images(file):
    values = compose()
    values["views"]["lesions"].update(hed_jitter=.05, stain=dict(file=str(file)))
    told = encoder_faults(parse_params(values), "lesion_mae")
    assert len(told) == 2 and all("changes stains, and data" in o and "is grey" in o for o in told) and told[0].startswith("encoder.lesion_mae.views.stain")


def test_unknown_parameters_of_stain_are_told(file):
    values = compose()
    values["views"]["tissue"]["stain"] = dict(file=str(file), probabilty=.5)
    with pytest.raises(ValueError, match="finetune.few.views.stain.probabilty: unknown parameter; did you mean probability?"): parse_params(values)


# Real tissue

@pytest.mark.parametrize("name, tiles", [("pcam_12k_96px_jpg.zip", 400), ("nctcrc_70_224px_jpg.zip", 70)])
def test_real_tissue(name, tiles, tmp_path):
    "Most tiles have a stain, and the mixture is nearer to them than independent laws."
    if not (REAL/name).is_file(): pytest.skip(f"../shared/realdata/{name} is not here")
    out = fit(REAL/name, tmp_path/"a.json", ["lab"], tiles=tiles)
    source, law = (json.loads(out.read_text())[k] for k in ("source", "spaces"))
    assert source["used"] > .9*tiles
    found, batches = stain.tiles_of(REAL/name, tiles, 0)
    real = stain.gather(batches, ["lab"])[0]["lab"]
    corr = lambda p: np.corrcoef(p.T)
    off = {k: np.abs(corr(law_of(law["lab"], k)(torch.rand(4000), torch.randn(4000, 6)).numpy()) - corr(real)).max() for k in ("gaussian", "mixture")}
    assert off["mixture"] < .2 < .4 < off["gaussian"]


def test_an_earlier_file_stays(tissues, tmp_path, capsys):
    folder = save(tmp_path/"images", tissues)
    out = fit(folder, tmp_path/"a.json", ["lab"])
    before = out.read_bytes()
    assert main(["fit", str(folder), "--out", str(out), "--seed", "1"]) == 2 and "a.json exists: give another name (--out), or say --replace" in capsys.readouterr().err
    assert out.read_bytes() == before and main(["fit", str(folder), "--out", str(out), "--space", "hsv", "--replace"]) == 0 and out.read_bytes() != before
