"""Colour spaces, colour and fields of view against scikit-image, torchvision and plain formulas. What is off leaves the views of
before as they were, to the last bit and to the last number drawn."""
import warnings

import numpy as np, pytest, torch
from pydantic import ValidationError
from skimage import color
from torchvision.transforms.v2 import InterpolationMode, functional as TF

from sdmae.evaluate.segment import SegmentViews
from sdmae.params import ViewParams
from sdmae.views.augment import Views, to_unit
from sdmae.views.colour import BLENDS, blend, color_jitter, draw, grayscale, turn_hue
from sdmae.views.geometry import boxes_in_fields, central_box, fields_of_view, random_boxes
from sdmae.views.spaces import hed_to_rgb, hsv_to_rgb, lab_to_rgb, rgb_to_hed, rgb_to_hsv, rgb_to_lab

last = lambda x: x.movedim(1, -1).numpy()
tiles = lambda n=5, size=32, channels=3: torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


# Colour spaces

@pytest.fixture(scope="module")
def lattice():
    "All colours of 18 levels a channel, as two images: black, white, greys and full colours are among them."
    levels = torch.linspace(0, 255, 18).round()/255
    return torch.cartesian_prod(*[levels]*3).T.reshape(3, 2, 54, 54).transpose(0, 1).contiguous()


@pytest.mark.parametrize("there, back, theirs, atol", [
    (rgb_to_lab, lab_to_rgb, color.rgb2lab, 1e-3), (rgb_to_hsv, hsv_to_rgb, color.rgb2hsv, 1e-6), (rgb_to_hed, hed_to_rgb, color.rgb2hed, 1e-6)])
def test_spaces_are_scikit_images(there, back, theirs, atol, lattice):
    values = there(lattice)
    assert values.dtype == torch.float32
    mine = values.clamp(min=0) if there is rgb_to_hed else values  # where scikit-image sets negative amounts to zero
    np.testing.assert_allclose(last(mine), theirs(last(lattice.double())), rtol=0, atol=atol)
    torch.testing.assert_close(back(values), lattice, rtol=0, atol=2e-5)


@pytest.mark.parametrize("back, theirs, low, high", [(lab_to_rgb, color.lab2rgb, (-10, -150, -150), (110, 150, 150)), (hed_to_rgb, color.hed2rgb, (-.3,)*3, (.6,)*3),
                                                     (hsv_to_rgb, color.hsv2rgb, (0,)*3, (1,)*3)])
def test_what_is_no_colour_is_clipped(back, theirs, low, high):
    low, high = (torch.tensor(o)[None, :, None, None] for o in (low, high))
    values = low + (high - low)*torch.rand(2, 3, 40, 40)
    out = back(values)
    assert out.isfinite().all() and 0 <= out.min() and out.max() <= 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of negative Z, which scikit-image sets to zero
        wanted = theirs(last(values.double()))
    light = (values[:, 0] + 16)/116 - values[:, 2]/200 >= 0 if back is lab_to_rgb else torch.ones(2, 40, 40, dtype=torch.bool)
    assert light.float().mean() > .5
    np.testing.assert_allclose(last(out)[light.numpy()], wanted[light.numpy()], rtol=0, atol=2e-3)


def test_hue_goes_round():
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(hsv_to_rgb(x + torch.tensor([3., 0, 0])[None, :, None, None]), hsv_to_rgb(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("f", [rgb_to_lab, rgb_to_hed, lambda x: lab_to_rgb(rgb_to_lab(x)), lambda x: hed_to_rgb(rgb_to_hed(x)), lambda x: turn_hue(x, torch.full((2, 1, 1, 1), .1))])
def test_autocast_changes_nothing(f):
    x = torch.rand(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16): low = f(x)
    assert torch.equal(low, f(x)) and f(x.half()).dtype == torch.float32


# Colour

def test_hue_and_greys_are_torchvisions():
    x, shares = torch.rand(6, 3, 24, 24), torch.tensor([-.5, -.2, 0., .05, .3, .5])
    theirs = torch.stack([TF.adjust_hue(im, h) for im, h in zip(x, shares.tolist())])
    torch.testing.assert_close(turn_hue(x, shares[:, None, None, None]), theirs, rtol=0, atol=2e-6)
    torch.testing.assert_close(grayscale(x, 1.), TF.rgb_to_grayscale(x, 3), rtol=0, atol=1e-6)
    mono = x[:, :1]
    assert turn_hue(mono, shares) is mono and torch.equal(grayscale(mono, 1.), mono) and torch.equal(grayscale(x, 0.), x)


def jitter_of_before(x, strength):
    for i in torch.randperm(3).tolist(): x = blend(x, BLENDS[i](x), 1 + draw(1, strength, x))
    return x


def test_colour_jitter_is_that_of_before():
    "The same pixels, and the same number drawn next."
    x = torch.rand(5, 3, 16, 16)
    for ours in (color_jitter, lambda x, s: color_jitter(x, (s,)*3)):
        torch.manual_seed(3); a, after = ours(x, .4), torch.rand(1)
        torch.manual_seed(3); b = jitter_of_before(x, .4)
        assert torch.equal(a, b) and torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("which", range(3))
def test_three_strengths_are_those_of_brightness_contrast_saturation(which):
    x, strength = .4 + .1*torch.rand(200, 3, 4, 4), tuple(.3 if i == which else 0. for i in range(3))
    out = color_jitter(x, strength)
    base = BLENDS[which](x)
    factor = ((out - base)/(x - base)).flatten(1)
    assert factor.std(1).max() < .02 and .7 <= factor.mean(1).min() < .72 and 1.28 < factor.mean(1).max() <= 1.301


def test_hue_is_drawn_with_the_others():
    "In any place of the order, uniform in ± hue."
    x = torch.tensor([.7, .4, .6])[None, :, None, None].expand(2000, 3, 1, 1)
    moved = (rgb_to_hsv(color_jitter(x, 0., .1)) - rgb_to_hsv(x))[:, 0].flatten()
    assert -.1 <= moved.min() < -.098 and .098 < moved.max() <= .1001 and abs(moved.mean()) < .005 and moved.std() == pytest.approx(.1/3**.5, rel=.05)
    places = []
    for seed in range(12):
        torch.manual_seed(seed); places.append(torch.randperm(4).tolist().index(3))
    assert set(places) == {0, 1, 2, 3}


def test_jitter_and_grey_of_some():
    x = torch.rand(2000, 3, 4, 4)
    for out, share in ((color_jitter(x, .4, .1, .8), .8), (grayscale(x, .2), .2)):
        assert (out != x).flatten(1).any(1).float().mean().item() == pytest.approx(share, abs=.03)


RECIPE = dict(scale=(.14, 1.), color_jitter=(.4, .4, .2), hue=.1, jitter_probability=.8, grayscale=.2, blur=.5, solarize=.2, vflip=True)

def test_a_recipe_of_self_supervision():
    out = Views(ViewParams(**RECIPE, hed_jitter=.05, fields=[1., .5]), 24)(tiles(8))
    assert out.shape == (8, 3, 24, 24) and 0 <= out.min() and out.max() <= 1
    grey = Views(ViewParams(**RECIPE), 24)(tiles(8, channels=1))
    assert torch.equal(grey[:, 0], grey[:, 2])


@pytest.mark.parametrize("change, value, words", [
    ("color_jitter", 1.5, "number from 0 to 1"), ("color_jitter", [.1, .2], "or three"), ("color_jitter", "strong", "got 'strong'"), ("color_jitter", True, "got True"),
    ("color_jitter", [.1, .2, None], "brightness, contrast, saturation"), ("hue", .6, "less than or equal to 0.5"), ("jitter_probability", 2, "less than or equal"),
    ("grayscale", -1, "greater than or equal"), ("hed_jitter", -1, "greater than or equal"), ("fields", [], "at least 1"), ("fields", [0], "greater than 0"), ("fields", [1, 2], "less than or equal to 1"),
    ("stain", dict(file=""), "at least 1"), ("stain", dict(file="a", kind="normal"), "'gaussian' or 'mixture'"), ("stain", dict(file="a", spaces=["lab", "lab"]), "twice"),
    ("stain", dict(file="a", spaces=["rgb"]), "'lab', 'hsv' or 'hed'"), ("stain", dict(file="a", strength=0), "greater than 0")])
def test_faults_are_told(change, value, words):
    with pytest.raises(ValidationError, match=words) as e: ViewParams(**{change: value})
    assert e.value.errors()[0]["loc"][0] == change


def test_hue_and_rand_augment_exclude_each_other():
    with pytest.raises(ValidationError, match="hue belongs to color_jitter, whose place rand_augment takes"): ViewParams(rand_augment="rand-m9", hue=.1)


# Fields of view

def central_of_before(height, width, ratio):
    w = min(width, round(height*ratio[1])) if width/height > ratio[1] else width
    h = min(height, round(width/ratio[0])) if width/height < ratio[0] else height
    return [(height-h)//2, (width-w)//2, h, w]


@pytest.mark.parametrize("ratio", [(3/4, 4/3), (1., 1.), (1.2, 1.5), (.3, .7)])
def test_the_central_box_is_that_of_before(ratio):
    sizes = [(h, w) for h in (1, 7, 31, 32, 224, 225) for w in (1, 8, 31, 33, 224, 1001)]
    assert [central_box(h, w, ratio).long()[0].tolist() for h, w in sizes] == [central_of_before(h, w, ratio) for h, w in sizes]
    together = central_box(*(torch.tensor(o)[:, None] for o in zip(*sizes)), ratio).long()
    assert together.tolist() == [central_of_before(h, w, ratio) for h, w in sizes]


def test_the_whole_tile_draws_nothing_more():
    torch.manual_seed(0); a, after = boxes_in_fields(50, 40, 32, (.2, 1.), (.75, 1.3)), torch.rand(1)
    torch.manual_seed(0); b = random_boxes(50, 40, 32, (.2, 1.), (.75, 1.3))
    assert torch.equal(a, b) and torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("height, width", [(64, 64), (48, 96)])
def test_fields_are_squares_of_the_shares_anywhere(height, width):
    corner, side = fields_of_view(6000, height, width, (1., .5, .25))
    counts = {s.item(): (side == s).double().mean().item() for s in side.unique()}
    short = min(height, width)
    assert set(counts) == {short, short//2, short//4} and all(c == pytest.approx(1/3, abs=.03) for c in counts.values())
    half = corner[side[:, 0] == short//2]
    room = torch.tensor([height, width]) - short//2
    assert half.amin(0).tolist() == [0, 0] and half.amax(0).tolist() == room.tolist() and torch.allclose(half.float().mean(0), room/2, atol=1.5)
    assert ((corner + side) <= torch.tensor([height, width])).all()


def test_crops_lie_in_their_field():
    torch.manual_seed(1); boxes = boxes_in_fields(500, 64, 64, (.5, 1.), (.75, 4/3), (1., .5))
    torch.manual_seed(1); corner, side = fields_of_view(500, 64, 64, (1., .5))
    assert ((boxes[:, :2] >= corner) & (boxes[:, :2] + boxes[:, 2:] <= corner + side)).all()
    share = (boxes[:, 2]*boxes[:, 3])/side[:, 0]**2
    assert share.min() > .45 and share.max() <= 1


def test_a_field_is_resampled_once():
    "The pixels are those of torchvision's crop of the composed box."
    x, p = tiles(6, 64), ViewParams(scale=(.5, .9), fields=[.5], hflip=False)
    torch.manual_seed(2); out = Views(p, 24)(x)
    torch.manual_seed(2); boxes = boxes_in_fields(6, 64, 64, p.scale, p.ratio, p.fields)
    assert (boxes[:, 2:] <= 32).all()
    theirs = torch.stack([TF.resized_crop(im, *b.tolist(), [24, 24], interpolation=InterpolationMode.BICUBIC, antialias=True) for im, b in zip(to_unit(x), boxes)])
    torch.testing.assert_close(out, theirs.clamp(0, 1), rtol=0, atol=1e-4)


def test_masks_follow_their_field():
    image = (torch.arange(64)[None, None, :, None] + torch.arange(64)[None, None, None]).expand(4, 3, -1, -1).byte()
    x, m = SegmentViews(ViewParams(scale=(1., 1.), ratio=(1., 1.), fields=[.5], hflip=False), 32)(image, image[:, 0])
    assert torch.equal((x[:, 0]*255).round().byte(), m) and m.flatten(1).amax(1).max() - m.min() > 62 and m.unique().numel() > 62
