"""Segmentation: reading annotated images, views of image and mask, UPerNet, windows and scores, against independent oracles and on bad input."""
import io, json, zipfile, shutil
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch, yaml
from PIL import Image
from skimage.draw import disk
from skimage.measure import label
from sklearn.metrics import f1_score, jaccard_score
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF, InterpolationMode

from sdmae.sources.masks import Pair, decode_mask, instances, load_pairs, pair_notes, read_pairs, save_pairs, split_by_group, toy_nuclei
from sdmae.evaluate.segment import (STRIDES, Segmenter, SegmentViews, Windows, crop_nearest, fit_segmenter, lift, mirrored, overlaps,
                                    pixel_cells, predict_masks, segment_encoder, segment_groups, segment_scores, sliding, starts)
from sdmae.evaluate.statistics import draw_weights
from sdmae.models.encoders import build_encoder, save_encoder
from sdmae.models.vit import Encoder, position_table
from sdmae.pipeline.run import run
from sdmae.params import EncoderForm, ModelParams, OptimParams, SegmentParams, ViewParams, store_of
from sdmae.views.augment import normalize

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent/"shared"/"realdata"
GROUP = r"^([^_]+)_"
PLAIN = ViewParams(scale=(1., 1.), ratio=(1., 1.), interpolation="bilinear", hflip=False)


def encoded(array, form="PNG"):
    b = io.BytesIO()
    Image.fromarray(np.asarray(array)).save(b, form)
    return b.getvalue()

def files(n=6, slides="ABC", side="masks", prefix="", binary=True, size=32):
    "A small set: name -> bytes."
    out = {}
    for i in range(n):
        image, labels = toy_nuclei(i, size, 4)
        name = f"{slides[i % len(slides)]}_{i}.png"
        out[f"{prefix}images/{name}"] = encoded(image)
        out[f"{prefix}{side}/{name}"] = encoded(((labels > 0)*255).astype(np.uint8) if binary else labels)
    return out

def put(folder, contents):
    for name, data in contents.items():
        p = Path(folder)/name
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(data)
    return Path(folder)

def zipped(file, contents):
    with zipfile.ZipFile(file, "w") as z:
        for name, data in contents.items(): z.writestr(name, data)
    return Path(file)

def segment_params(**kwargs):
    base = dict(image_size=64, stride=48, steps=10, batch_size=2, blocks=[0, 1, 2, 3], channels=16, views=PLAIN,
                optim=OptimParams(base_lr=0.1, weight_decay=0.05, betas=(0.9, 0.999)))
    return SegmentParams(**{**base, **kwargs})

def tensors(toys):
    "Images and binary masks."
    return ([torch.from_numpy(im).permute(2, 0, 1) for im, _ in toys], [torch.from_numpy((m > 0).astype(np.uint8)) for _, m in toys])

encoder_of = partial(Encoder, patch_size=8, embed_dim=32, depth=4, num_heads=2)


# Reading

@pytest.mark.parametrize("side, binary", [("masks", True), ("labels", False)])
def test_folder_and_zip_are_read_alike(tmp_path, side, binary):
    contents = files(side=side, binary=binary)
    a, b = read_pairs(put(tmp_path/"set", contents), GROUP), read_pairs(zipped(tmp_path/"set.zip", contents), GROUP)
    assert [(p.name, p.slide) for p in a] == [(p.name, p.slide) for p in b] == [(n, n[0]) for n in sorted(f"{'ABC'[i%3]}_{i}" for i in range(6))]
    for p, q in zip(a, b):
        image, labels = toy_nuclei(int(p.name[2:]), 32, 4)
        for o in (p, q):
            np.testing.assert_array_equal(o.read(), image)
            np.testing.assert_array_equal(o.read_mask(), (labels > 0)*255 if binary else labels)

def test_folders_above_are_allowed(tmp_path):
    contents = files(2, prefix="set/train/") | files(2, prefix="set/test/")
    pairs = read_pairs(zipped(tmp_path/"set.zip", contents | {"set/SOURCE.txt": b"x", "__MACOSX/set/train/images/._A_0.png": b"x"}), GROUP)
    assert [p.name for p in pairs] == ["set/test/A_0", "set/test/B_1", "set/train/A_0", "set/train/B_1"]

@pytest.mark.parametrize("array, form, expected", [
    (np.array([[True, False]]), "PNG", [[1, 0]]), (np.array([[0, 255]], np.uint8), "PNG", [[0, 255]]),
    (np.array([[0, 40000]], np.uint16), "PNG", [[0, 40000]]), (np.array([[0, 700]], np.int32), "TIFF", [[0, 700]]), (np.array([[0, 70000]], np.int32), "TIFF", [[0, 70000]])])
def test_forms_of_masks(array, form, expected):
    mask = decode_mask(encoded(array, form), "a")
    assert mask.tolist() == expected and mask.dtype in (np.uint8, np.uint16, np.int32)

@pytest.mark.parametrize("data, message", [
    (encoded(np.zeros((4, 4, 3), np.uint8)), "one channel"), (encoded(np.zeros((4, 4), np.float32), "TIFF"), "one channel"),
    (encoded(np.zeros((4, 4), np.uint8), "JPEG"), "JPEG"), (encoded(np.array([[0, -7]], np.int32), "TIFF"), "numbers from -7"),
    (encoded(np.zeros((40, 40), np.uint8))[:50], "truncated"), (b"no image", "truncated")])
def test_faulty_masks(data, message):
    with pytest.raises(ValueError, match=message) as e: decode_mask(data, "masks/a.png")
    assert "masks/a.png" in str(e.value)

def test_instances():
    mask = np.zeros((40, 40), np.uint8)
    for centre in ((8, 8), (8, 30), (30, 20)): mask[disk(centre, 4)] = 255
    mask[0, 0] = mask[1, 1] = 255 # corners touch: one region
    assert instances(mask).max() == 4
    labels = np.where(mask > 0, 7, 0).astype(np.uint16)
    np.testing.assert_array_equal(instances(labels), labels)
    mask[30, 20] = 3
    np.testing.assert_array_equal(instances(mask), mask)
    assert instances(np.zeros((4, 4), np.uint8)).max() == 0

def without(contents, *names): return {k: v for k, v in contents.items() if k not in names}

@pytest.mark.parametrize("change, group, message", [
    (lambda c: without(c, "masks/A_0.png"), GROUP, r"images/A_0\.png has no mask"),
    (lambda c: without(c, "images/B_1.png"), GROUP, r"masks/B_1\.png has no image"),
    (lambda c: c | {"masks/A_0.png": encoded(np.zeros((16, 32), np.uint8))}, GROUP, r"images/A_0\.png is 32 × 32 px, .*masks/A_0\.png is 32 × 16 px"),
    (lambda c: {k.replace("images", "pictures"): v for k, v in c.items()}, GROUP, "no image below a folder images/"),
    (lambda c: c | {"images/A_0.jpg": c["images/A_0.png"]}, GROUP, r"A_0\.png and .*A_0\.jpg|A_0\.jpg and .*A_0\.png"),
    (lambda c: c | {"labels/A_0.png": c["masks/A_0.png"]}, GROUP, "same name"),
    (lambda c: c | {"images/A_0.png": c["images/A_0.png"][:20]}, GROUP, r"images/A_0\.png: truncated"),
    (lambda c: c, r"^([a-z]+)_", r"images/A_0\.png: masks.group"),
    (lambda c: c, r"^[A-Z]_", "has no group"), (lambda c: c, r"^([A-Z_", "no regular expression"), (lambda c: c, r"^([a-z]*)", "finds no slide")])
@pytest.mark.parametrize("packed", [False, True])
def test_faulty_sets(tmp_path, change, group, message, packed):
    contents = change(files(4))
    place = zipped(tmp_path/"set.zip", contents) if packed else put(tmp_path/"set", contents)
    with pytest.raises(ValueError, match=message): read_pairs(place, group)

def exif(turn):
    e = Image.Exif(); e[0x112] = turn
    return e

def written(array, form="PNG", mode=None, **kwargs):
    b, im = io.BytesIO(), Image.fromarray(np.asarray(array))
    (im.convert(mode) if mode else im).save(b, form, **kwargs)
    return b.getvalue()

def palette(*colours):
    im = Image.fromarray(np.uint8([[0, 1, 2]])); im.putpalette(sum(colours, []))
    b = io.BytesIO(); im.save(b, "PNG")
    return b.getvalue()

BINARY = np.uint8([[0, 255, 0], [0, 0, 255]])

@pytest.mark.parametrize("data, expected", [
    (written(BINARY, exif=exif(6)), np.rot90(BINARY, -1)), (written(BINARY, "TIFF", exif=exif(3)), BINARY[::-1, ::-1]), (palette([0, 0, 0], [255, 0, 0], [0, 255, 0]), [[0, 1, 2]]),
    (written(BINARY, transparency=0), BINARY), (written(BINARY.astype(np.uint16)*257), BINARY.astype(int)*257), (written(BINARY.astype(np.uint16)*257, "TIFF"), BINARY.astype(int)*257)])
def test_more_forms_of_masks(data, expected):
    np.testing.assert_array_equal(decode_mask(data, "a"), expected)

@pytest.mark.parametrize("data, message", [
    (written(BINARY, mode="RGBA"), "one channel of whole numbers, this image is of type RGBA"), (written(BINARY, mode="LA"), "type LA"), (written(BINARY, mode="RGB"), "type RGB"),
    (palette([255, 255, 255], [0, 0, 0], [9, 9, 9]), "a palette whose number 0 is not black"), (written(BINARY, "TIFF", save_all=True, append_images=[Image.fromarray(BINARY)]), "several pages"), (b"", "truncated")])
def test_more_faulty_masks(data, message):
    with pytest.raises(ValueError, match=f"^masks/a.png: .*{message}"): decode_mask(data, "masks/a.png")

def renamed(contents, old, new): return {k.replace(old, new): v for k, v in contents.items()}

@pytest.mark.parametrize("change, message", [
    (lambda c: renamed(c, "masks/A_0.png", "masks/A_0_mask.png"), r"images/A_0\.png has no mask.*\(1 such files\). The nearest is .*masks/A_0_mask\.png"), (lambda c: renamed(c, "masks/", "outlines/"), "has no mask.*There are folders images, outlines"),
    (lambda c: renamed(c, "images/", "Images/"), "no image below a folder images/.*There are folders Images, masks"), (lambda c: c | {"masks/A_0.png": written(np.zeros((32, 32), np.uint8), exif=exif(3))}, r"stored turned in different ways .EXIF orientation 1 and 3"),
    (lambda c: renamed(c, "masks/A_0.png", "masks/a_0.png"), r"images/A_0\.png has no mask.*nearest is .*masks/a_0\.png"), (lambda c: c | {"masks/A_0.tif": written(np.zeros((32, 32), np.uint8), "TIFF")}, r"A_0\.(png|tif) and .*A_0\.(png|tif) have the same name")])
def test_sets_that_do_not_meet(tmp_path, change, message):
    with pytest.raises(ValueError, match=message): read_pairs(put(tmp_path, change(files(4))), GROUP)

def test_images_and_masks_turned_alike(tmp_path):
    image, mask = toy_nuclei(0, 32, 4)
    pairs = read_pairs(put(tmp_path, {"images/A_0.png": written(image[:20], exif=exif(6)), "masks/A_0.png": written((mask[:20] > 0)*np.uint8(255), exif=exif(6))}), GROUP)
    np.testing.assert_array_equal(pairs[0].read_mask(), np.rot90((mask[:20] > 0)*255, -1))

def test_names_in_two_forms_of_unicode(tmp_path):
    image, mask = toy_nuclei(0, 32, 4)
    contents = {"images/Gro\u00df\u00e9_0.png": encoded(image), "masks/Gro\u00dfe\u0301_0.png": encoded((mask > 0)*np.uint8(255)), "images/ Gro\u00df\u00e9 _1.png": encoded(image.T.copy().T[::-1]), "masks/ Gro\u00df\u00e9 _1.png": encoded((mask > 0)*np.uint8(255))}
    for place in (put(tmp_path/"a", contents), zipped(tmp_path/"a.zip", contents)): assert {p.slide for p in read_pairs(place, GROUP)} == {"Gro\u00df\u00e9"}

def test_what_is_not_read_is_counted(tmp_path):
    contents = files(6, slides=("A1", "a1", "B-1", "B  01", "C", "D"))
    place = put(tmp_path, contents | {"overlays/A_0.png": b"", "README": b"", "images/A1_0.json": b"", "index.csv": b""})
    assert pair_notes(place, read_pairs(place, GROUP)) == ["4 files were not read: README, images/A1_0.json, index.csv, overlays/A_0.png",
        "warning: slides that may be the same: 'A1' and 'a1', 'B 01' and 'B-1'"]
    place = put(tmp_path/"b", files(6, slides=("P1", "P10", "P2", "10", "100")))
    assert pair_notes(place, read_pairs(place, GROUP)) == []

def test_splits_of_a_publisher_are_told(tmp_path):
    place = put(tmp_path, {f"{s}/{k}": v for s in ("train", "Test") for k, v in files(4, slides=("A", "B")).items()})
    assert pair_notes(place, read_pairs(place, GROUP)) == ["folders Test, train are not read as splits: whole slides are held out by masks.group"]

@pytest.mark.parametrize("turn", [lambda o: o, np.rot90, lambda o: o[::-1], lambda o: o.transpose(1, 0, 2), lambda o: np.rot90(o[:, ::-1], 3)])
def test_one_image_on_two_slides(tmp_path, turn):
    "In any turn or flip, and whatever the file is: the pixels tell."
    contents = files(4, slides="AB")
    copy = turn(np.asarray(Image.open(io.BytesIO(contents["images/A_0.png"]))))
    place = put(tmp_path/"set", renamed(contents | {"images/B_1.png": encoded(copy, "BMP")}, "images/B_1.png", "images/B_1.bmp"))
    with pytest.raises(ValueError, match="images A_0 and B_1 are the same, on slides A and B: what was trained would be tested"): save_pairs(read_pairs(place, GROUP), tmp_path/"out", "x")
    assert not (tmp_path/"out").exists()
    save_pairs(read_pairs(place, "(_)"), tmp_path/"out", "x") # all of one slide
    assert json.loads((tmp_path/"out"/"manifest.json").read_text())["notes"] == ["warning: 1 images are copies of another one on their slide"]

def test_blank_images_are_no_copies(tmp_path):
    blank = encoded(np.full((32, 32, 3), 240, np.uint8))
    place = put(tmp_path/"set", files(4, slides="AB") | {"images/A_0.png": blank, "images/B_1.png": blank, "masks/A_0.png": encoded(np.zeros((32, 32), np.uint8))})
    save_pairs(read_pairs(place, GROUP), tmp_path/"out", "x", ["told"])
    assert json.loads((tmp_path/"out"/"manifest.json").read_text())["notes"] == ["told", "1 of 4 masks have no nucleus, the first is A_0"]

@pytest.mark.parametrize("value, what", [(0, "nucleus"), (255, "background")])
def test_masks_that_say_nothing(tmp_path, value, what):
    place = put(tmp_path, {k: encoded(np.full((32, 32), value, np.uint8)) if "masks" in k else v for k, v in files(4).items()})
    with pytest.raises(ValueError, match=f"none of 4 masks has a {what}, A_0 for one"): save_pairs(read_pairs(place, GROUP), tmp_path/"out", "x")

def flipped(path, at=-200):
    data = bytearray(path.read_bytes()); data[at] ^= 1
    path.write_bytes(data)

@pytest.mark.parametrize("damage, error, message", [
    (lambda o: flipped(o/"images.npz"), ValueError, "images.npz is not as it was written"), (lambda o: flipped(o/"table.csv", -3), ValueError, "table.csv is not as it was written"), (lambda o: (o/"table.csv").unlink(), FileNotFoundError, "table.csv is missing"),
    (lambda o: (o/"manifest.json").write_text("{"), ValueError, "manifest.json: damaged"), (lambda o: (o/"manifest.json").write_text('{"sha256": "x", "name": "x", "types": {}}'), ValueError, "not as it was written"),
    (lambda o: (o/"manifest.json").write_text("{}"), ValueError, "of an earlier version. Run the stage prepare again"), (lambda o: shutil.rmtree(o), FileNotFoundError, "holds no prepared images")])
def test_a_prepared_set_that_changed(tmp_path, damage, error, message):
    place = put(tmp_path/"set", files(4, slides=("NA", "B")))
    save_pairs(read_pairs(place, GROUP), tmp_path/"out", "x"); save_pairs(read_pairs(place, GROUP), tmp_path/"out", "x")
    assert [p.slide for p in load_pairs(tmp_path/"out")] == ["B", "B", "NA", "NA"] and {p.name for p in tmp_path.iterdir()} == {"set", "out"}
    damage(tmp_path/"out")
    with pytest.raises(error, match=message): load_pairs(tmp_path/"out")

def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="change the data"): read_pairs(tmp_path/"none.zip", GROUP)
    (tmp_path/"empty").mkdir()
    with pytest.raises(FileNotFoundError, match="nothing in it that ends in"): read_pairs(tmp_path/"empty", GROUP)
    (tmp_path/"a.zip").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match="a.zip"): read_pairs(tmp_path/"a.zip", GROUP)

def test_damage_inside_an_archive(tmp_path):
    file = zipped(tmp_path/"set.zip", files(2))
    data, name = bytearray(file.read_bytes()), b"masks/B_1.png"
    data[data.index(name) + len(name) + 30] ^= 255
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"masks/B_1\.png: truncated, or not an image"): read_pairs(file, GROUP)


# The split

def some_pairs(*counts): return [Pair(f"{s}_{i}", s, None, None) for s, n in zip("ABCDEFGHIJK", counts) for i in range(n)]

@pytest.mark.parametrize("fraction, n_test", [(0.3, 3), (0.01, 1), (0.99, 10)])
def test_whole_slides(fraction, n_test):
    pairs, seen = some_pairs(*range(1, 12)), set()
    for seed in range(5):
        train, test, slides = split_by_group(pairs, fraction, seed)
        assert {p.slide for p in test} == set(slides) and not {p.slide for p in train} & set(slides) and len(slides) == n_test
        assert sorted(p.name for p in train + test) == sorted(p.name for p in pairs)
        assert split_by_group(pairs, fraction, seed)[2] == slides
        seen.add(tuple(slides))
    assert len(seen) > 1

def test_one_slide_cannot_be_split():
    with pytest.raises(ValueError, match="one slide only .A, 3 images"): split_by_group(some_pairs(3), 0.3, 0)


# Views

def test_mask_crop_is_torchvision_nearest():
    torch.manual_seed(0)
    masks = torch.randint(0, 9, (4, 40, 48))
    boxes = torch.tensor([[0, 0, 40, 48], [5, 7, 12, 9], [1, 20, 33, 25], [39, 47, 1, 1]])
    want = torch.stack([TF.resized_crop(m[None], *b.tolist(), [16, 16], interpolation=InterpolationMode.NEAREST_EXACT)[0] for m, b in zip(masks, boxes)])
    assert torch.equal(crop_nearest(masks, boxes, 16), want)

@pytest.mark.parametrize("change", [{}, dict(vflip=True), dict(rot90=True), dict(hflip=True, vflip=True, rot90=True, scale=(0.25, 1.), ratio=(0.75, 4/3))])
def test_views_act_alike(change):
    "The image is the mask itself, drawn with no symmetry: after any view they must still agree, except at edges."
    torch.manual_seed(0)
    mask = torch.zeros(64, 64, dtype=torch.uint8); mask[8:20, 5:60] = 1; mask[20:50, 5:14] = 1
    x, masks = SegmentViews(PLAIN.model_copy(update=change), 64)((mask*255).expand(24, 3, -1, -1), mask.expand(24, -1, -1))
    assert ((x[:, 0] > 0.5) == masks).float().mean() > 0.98 and masks.dtype == torch.uint8
    if not change: assert torch.equal(masks[0], mask)
    elif "scale" not in change: assert len({m.numpy().tobytes() for m in masks}) == (2 if change == dict(vflip=True) else 4 if change == dict(rot90=True) else 8)
    else: assert len({m.numpy().tobytes() for m in masks}) > 20

def test_colours_are_drawn_for_the_image_alone():
    images, masks = tensors([toy_nuclei(0)])
    x, m = SegmentViews(PLAIN.model_copy(update=dict(od_jitter=0.5, color_jitter=0.4)), 64)(images[0][None], masks[0][None])
    assert torch.equal(m[0], masks[0]) and (x[0] - images[0]/255).abs().mean() > 0.01


# The encoder at another size

@pytest.fixture
def saved(tmp_path):
    def save(image_size=32, class_token=True, pos_embed="sincos1d", patch_size=8):
        torch.manual_seed(0)
        model, form = ModelParams(patch_size=patch_size, embed_dim=32, depth=4, num_heads=2), EncoderForm(class_token=class_token, pos_embed=pos_embed)
        config = dict(method="random", image_size=image_size, model=model.model_dump(), form=form.model_dump(), mean=[0.5]*3, std=[0.2]*3)
        save_encoder(tmp_path/"run", build_encoder(image_size, model, form), config)
        return tmp_path/"run"
    return save

@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("kind", ["sincos1d", "sincos2d"])
def test_positions_are_resampled(saved, class_token, kind):
    folder, prefix = saved(32, class_token, kind), int(class_token)
    table = position_table(kind, 4, 32, prefix)
    same, _ = segment_encoder(folder, 32)
    other, config = segment_encoder(folder, 64)
    assert torch.equal(same.pos_embed, table) and config["mean"] == [0.5]*3
    positions = other.positions((8, 8))
    assert torch.equal(positions, resample_abs_pos_embed(table, [8, 8], num_prefix_tokens=prefix))
    assert torch.equal(positions[:, :prefix], table[:, :prefix]) and not positions.requires_grad
    corners = positions[0, prefix:].reshape(8, 8, 32)[::7, ::7], table[0, prefix:].reshape(4, 4, 32)[::3, ::3]
    assert F.cosine_similarity(*corners, dim=-1).min() > 0.95
    assert other.tokens(torch.rand(1, 3, 64, 64)).shape == (1, 64 + prefix, 32)

def test_windows_that_patches_do_not_tile(saved):
    with pytest.raises(ValueError, match="image_size 60 is not divisible by the encoder's patch size 8"): segment_encoder(saved(), 60)


# The network

@pytest.mark.parametrize("patch, kinds", [(4, [0, 0, 0, 0]), (8, [1, 0, 0, 0]), (16, [2, 1, 0, 0]), (32, [3, 2, 1, 0])])
def test_maps_are_brought_to_their_strides(patch, kinds):
    lifts = [lift(6, patch, s) for s in STRIDES]
    assert [sum(isinstance(m, torch.nn.ConvTranspose2d) for m in o.modules()) for o in lifts] == kinds
    assert [o(torch.zeros(2, 6, 64//patch, 64//patch)).shape[-1] for o in lifts] == [64//s for s in STRIDES]
    at_patch = STRIDES.index(patch)
    x = torch.rand(2, 6, 64//patch, 64//patch)
    assert torch.equal(lifts[at_patch](x), x)

@pytest.mark.parametrize("patch, which", [(8, 1), (16, 2)])
@pytest.mark.parametrize("class_token", [False, True])
def test_maps_are_the_tokens_of_the_chosen_blocks(patch, which, class_token):
    torch.manual_seed(0)
    encoder = Encoder(64, patch, 32, 6, 2, class_token=class_token)
    x = torch.rand(2, 3, 64, 64)
    t, seen = encoder.embed(normalize(x, (0.4,)*3, (0.3,)*3)), []
    for b in encoder.blocks: t = b(t); seen.append(t[:, int(class_token):])
    segmenter = Segmenter(encoder, segment_params(blocks=[0, 2, 3, 4]), (0.4,)*3, (0.3,)*3).eval()
    side = 64//patch
    want = seen[[0, 2, 3, 4][which]].transpose(1, 2).reshape(2, 32, side, side)
    torch.testing.assert_close(segmenter.maps(x)[which], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(segmenter.maps(x)[3], F.max_pool2d(seen[4].transpose(1, 2).reshape(2, 32, side, side), 32//patch), rtol=1e-4, atol=1e-5)
    assert len(segmenter.encoder.blocks) == 5

def test_the_loss_is_the_cross_entropy_of_both_heads():
    torch.manual_seed(0)
    images, masks = (torch.stack(o) for o in tensors([toy_nuclei(i) for i in range(2)]))
    losses = {}
    for weight in (0., 0.4):
        torch.manual_seed(1)
        segmenter = Segmenter(encoder_of(64), segment_params(aux_weight=weight)).eval()
        losses[weight] = segmenter(images, masks)
    got, p = losses[0.4], segmenter.logits(images/255).softmax(1)
    chosen = torch.where(masks == 1, p[:, 1], p[:, 0])
    torch.testing.assert_close(got["main"], -chosen.log().mean())
    assert got["aux"] != got["main"] and losses[0.]["loss"] == losses[0.]["main"]
    torch.testing.assert_close(got["loss"], got["main"] + 0.4*got["aux"])

def test_everything_learns():
    "No weight is left without a gradient: nothing that the decoder brings along stands idle."
    torch.manual_seed(0)
    images, masks = (torch.stack(o) for o in tensors([toy_nuclei(i) for i in range(2)]))
    segmenter = Segmenter(encoder_of(64), segment_params())
    segmenter(images, masks)["loss"].backward()
    assert [n for n, p in segmenter.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [n for n, p in segmenter.named_parameters() if not p.requires_grad] == ["encoder.pos_embed"]

@pytest.mark.parametrize("decay", [1., 0.65])
def test_layer_decay(decay):
    segmenter = Segmenter(encoder_of(64), segment_params(layer_decay=decay))
    scale, weight_decay = {}, {}
    names = {id(p): n for n, p in segmenter.named_parameters()}
    for g in segment_groups(segmenter, segment_params(layer_decay=decay)):
        for p in g["params"]: scale[names[id(p)]], weight_decay[names[id(p)]] = g.get("lr_scale", 1.), g["weight_decay"]
    assert set(scale) == {n for n, p in segmenter.named_parameters() if p.requires_grad}
    for name, s in scale.items():
        level = int(name.split(".")[2]) + 1 if name.startswith("encoder.blocks") else 0 if name.startswith("encoder") else 5
        assert s == pytest.approx(decay**(5 - level)), name
        assert weight_decay[name] == (0.05 if dict(segmenter.named_parameters())[name].ndim > 1 else 0.), name

@pytest.mark.parametrize("change, message", [
    (dict(blocks=[0, 1, 2, 4]), r"blocks \[0, 1, 2, 4\] must rise within 0 … 3"), (dict(blocks=[0, 2, 1, 3]), "must rise"),
    (dict(blocks=[0, 0, 1, 2]), "must rise"), (dict(blocks=[-1, 0, 1, 2]), "must rise"), (dict(image_size=48), "48 is not divisible by 32"), (dict(image_size=96), "built for 64 px")])
def test_faulty_parameters(change, message):
    params = segment_params().model_copy(update=change)
    with pytest.raises(ValueError, match=message): Segmenter(encoder_of(params.image_size if params.image_size == 48 else 64), params)

def test_a_batch_of_one_is_refused():
    with pytest.raises(ValueError, match="batch_size 1"): Segmenter(encoder_of(64), segment_params().model_copy(update=dict(batch_size=1)))

def test_patches_of_fourteen_are_refused():
    with pytest.raises(ValueError, match="patch_size 14"): Segmenter(Encoder(224, 14, 32, 4, 2), segment_params(image_size=224))


# Windows

@pytest.mark.parametrize("shape, size", [((5, 9), 20), ((30, 9), 20), ((30, 25), 20), ((1, 1), 4)])
def test_mirrored_is_symmetric_padding(shape, size):
    x = np.random.default_rng(0).integers(0, 99, (3, *shape))
    want = np.pad(x, [(0, 0), *[(0, max(0, size-n)) for n in shape]], mode="symmetric")
    assert torch.equal(mirrored(torch.from_numpy(x), size), torch.from_numpy(want))

def test_windows_are_parts_of_images():
    "Every pixel tells its image and place, and the mask of a window tells the same."
    rows, cols = np.mgrid[:40, :50]
    images = [torch.from_numpy(np.stack([np.full((40, 50), k), rows, cols]).astype(np.uint8)) for k in range(3)]
    masks = [torch.from_numpy((k*100 + rows + cols).astype(np.uint8)) for k in range(3)]
    windows = Windows(images, masks, 32, 4, steps=60, seed=3)
    assert len(windows)*windows.epochs == 60
    seen, corners = [], set()
    for epoch in range(windows.epochs):
        for i in range(len(windows)):
            x, m = windows.batch(epoch, i)
            assert x.shape == (4, 3, 32, 32) and x.dtype == torch.uint8 and torch.equal(m.int(), (x[:, 0]*100 + x[:, 1] + x[:, 2]).int())
            seen += x[:, 0, 0, 0].tolist(); corners |= {tuple(c) for c in x[:, 1:, 0, 0].tolist()}
    assert np.bincount(seen).tolist() == [80]*3 and len(corners) > 60
    assert {r for r, _ in corners} == set(range(9)) and {c for _, c in corners} == set(range(19))
    again = Windows(images, masks, 32, 4, steps=60, seed=3)
    assert torch.equal(again.batch(7, 0)[0], windows.batch(7, 0)[0]) and not torch.equal(windows.batch(7, 0)[0], windows.batch(8, 0)[0])
    assert not torch.equal(Windows(images, masks, 32, 4, steps=60, seed=4).batch(7, 0)[0], windows.batch(7, 0)[0])

@pytest.mark.parametrize("steps, stretch, epochs", [(20000, 400, 50), (7, 1, 7), (120, 2, 60), (101, 1, 101), (1, 1, 1)])
def test_the_number_of_steps_is_exact(steps, stretch, epochs):
    images, masks = tensors([toy_nuclei(0, 20)])
    windows = Windows(images, masks, 32, 4, steps)
    assert (len(windows), windows.epochs) == (stretch, epochs) and windows.batch(0, 0)[0].shape == (4, 3, 32, 32)

def test_no_images():
    with pytest.raises(ValueError, match="no images to train on"): Windows([], [], 32, 4, 10)


# Sliding windows

def test_windows_without_overlap_are_blocks():
    torch.manual_seed(0)
    segmenter = Segmenter(encoder_of(64), segment_params()).eval()
    image = torch.rand(3, 128, 192)
    with torch.no_grad():
        got = sliding(segmenter.logits, image, 64, 64, batch_size=4)
        want = torch.cat([torch.cat([segmenter.logits(image[None, :, t:t+64, l:l+64])[0] for l in (0, 64, 128)], 2) for t in (0, 64)], 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("shape", [(100, 150), (64, 64), (65, 200), (40, 50), (30, 100)])
def test_overlaps_are_averaged(shape):
    "A model that returns the window's own number for each pixel; the mean over windows is counted pixel by pixel."
    size, stride, calls = 64, 48, []
    def model(x):
        calls.extend(range(len(calls), len(calls) + len(x)))
        return torch.tensor(calls[-len(x):])[:, None, None, None].float().expand(-1, 2, size, size)
    got = sliding(model, torch.rand(3, *shape), size, stride, batch_size=2)
    H, W = (max(size, n) for n in shape)
    begins = [sorted({*range(0, n - size, stride), n - size}) for n in (H, W)]
    total, times = np.zeros((H, W)), np.zeros((H, W))
    for k, (t, l) in enumerate((t, l) for t in begins[0] for l in begins[1]):
        for r in range(t, t+size): total[r, l:l+size] += k; times[r, l:l+size] += 1
    assert times.min() > 0 and got.shape == (2, *shape)
    np.testing.assert_allclose(got[0].numpy(), (total/times)[:shape[0], :shape[1]], rtol=1e-5)

@pytest.mark.parametrize("stride", [0, 65, -3])
def test_gaps_are_refused(stride):
    with pytest.raises(ValueError, match=f"stride {stride}"): starts(200, 64, stride)


# Scores

def some_masks(n=6, seed=0):
    rng = np.random.default_rng(seed)
    truths = [(rng.random((20 + i, 30)) < 0.3).astype(np.uint16)*(i + 1) for i in range(n)]
    return truths, [np.where(rng.random(t.shape) < 0.15 + 0.05*i, t == 0, t > 0).astype(np.uint8) for i, t in enumerate(truths)]

def test_scores_are_scikit_learns():
    truths, predictions = some_masks()
    got = segment_scores(truths, predictions, list("aabbcc"))
    t, p = (np.concatenate([o.ravel() > 0 for o in os]) for os in (truths, predictions))
    for key, want in dict(miou=jaccard_score(t, p, average="macro"), iou_nucleus=jaccard_score(t, p), iou_background=jaccard_score(~t, ~p), dice=f1_score(t, p)).items():
        assert got[key] == pytest.approx(want, abs=1e-12), key
        low, high = got["intervals"][key]
        assert low < got[key] < high

def test_intervals_draw_whole_slides():
    "The same draws, made the slow way: a slide drawn twice has its pixels twice."
    truths, predictions = some_masks()
    slides = np.array(list("aabbcc"))
    got = segment_scores(truths, predictions, slides, n=40, seed=5)["intervals"]["dice"]
    weights = np.concatenate(list(draw_weights(6, 40, slides, 5)), axis=1).astype(int)
    assert (weights[::2] == weights[1::2]).all()
    values = [f1_score(*(np.concatenate([np.tile(o.ravel() > 0, k) for o, k in zip(os, w)]) for os in (truths, predictions))) for w in weights.T]
    np.testing.assert_allclose(got, np.quantile(values, [0.025, 0.975]), atol=1e-9)

def test_classes_that_are_not_there():
    empty, full = np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)
    got = segment_scores([empty], [empty])
    assert got["miou"] == got["iou_background"] == 1 and np.isnan(got["dice"]) and np.isnan(got["iou_nucleus"]) and got["intervals"] == {}
    assert segment_scores([full], [empty])["miou"] == 0 and segment_scores([full], [full])["dice"] == 1
    assert overlaps(np.zeros((2, 2, 2)))["miou"].shape == (2,)

def test_one_test_slide_has_no_interval():
    truths, predictions = some_masks(3)
    assert segment_scores(truths, predictions, ["a"]*3)["intervals"] == {}
    assert set(segment_scores(truths, predictions)["intervals"]) == {"miou", "dice", "iou_nucleus", "iou_background"}

def test_masks_that_do_not_fit_together():
    with pytest.raises(ValueError, match="different images"): pixel_cells(np.zeros((4, 4)), np.zeros((4, 5)))
    with pytest.raises(ValueError, match="1 predictions for 2 masks"): segment_scores([np.zeros((4, 4))]*2, [np.zeros((4, 4))])
    with pytest.raises(ValueError, match="one at least"): segment_scores([], [])


# The whole

def test_two_images_are_learned_by_heart():
    torch.manual_seed(0)
    images, masks = tensors([toy_nuclei(i) for i in range(2)])
    params = segment_params(steps=100, batch_size=4, layer_decay=1.)
    segmenter, history = fit_segmenter(encoder_of(64), images, masks, params)
    assert segment_scores([m.numpy() for m in masks], predict_masks(segmenter, images, 64, 48))["dice"] > 0.9
    assert history[-1]["loss"] < 0.5*history[0]["loss"] and not segmenter.training

class Stop(Exception): pass

class StopAfter:
    def __init__(self, epochs): self.left = epochs
    def before_fit(self, trainer): pass
    def after_fit(self, trainer): pass
    def after_epoch(self, trainer):
        self.left -= 1
        if self.left < 0: raise Stop

def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    from sdmae.train import engine
    images, masks = tensors([toy_nuclei(i) for i in range(3)])
    params = segment_params(steps=5, views=PLAIN.model_copy(update=dict(hflip=True, od_jitter=0.2)))
    def fit(**kwargs):
        torch.manual_seed(0)
        return fit_segmenter(encoder_of(64), images, masks, params, seed=1, **kwargs)[1]
    whole, file = fit(), tmp_path/"last.pt"
    monkeypatch.setattr(engine.Trainer.__init__, "__defaults__", tuple(0. if v == 2. else v for v in engine.Trainer.__init__.__defaults__)) # a checkpoint after every step
    with pytest.raises(Stop): fit(checkpoint=file, callbacks=(StopAfter(3),))
    assert file.exists()
    assert [r["loss"] for r in fit(checkpoint=file)] == [r["loss"] for r in whole] and file.exists()

def test_masks_that_were_turned_are_not_gone_on_with(tmp_path):
    "Same names, same means, as many pixels of nuclei: by their content they are others."
    images, masks = tensors([toy_nuclei(i) for i in range(2)])
    params, file = segment_params(steps=2), tmp_path/"last.pt"
    first, turned = fit_segmenter(encoder_of(64), images, masks, params, checkpoint=file), [m.flip(1) for m in masks]
    with pytest.warns(UserWarning, match="another training.batches.images.*this one begins anew"):
        again = fit_segmenter(encoder_of(64), images, turned, params, checkpoint=file)
    assert again[1][-1]["loss"] != first[1][-1]["loss"]

def test_a_training_of_then_says_what_it_was_made_under(tmp_path, monkeypatch):
    import sdmae.evaluate.segment as module
    images, masks = tensors([toy_nuclei(0)])
    for now in ("then", "today"):
        monkeypatch.setattr(module, "circumstances", lambda device, precision: dict(commit=now))
        assert fit_segmenter(encoder_of(64), images, masks, segment_params(steps=1), checkpoint=tmp_path/"last.pt")[0].under == dict(commit="then")

def test_the_stage(saved, tmp_path, request):
    "The notebook on a small set: what it scores is what it kept, and test slides are never trained on."
    values, name, out = yaml.safe_load((ROOT/"params.yaml").read_text()), f"test_{tmp_path.name}", tmp_path/"out"
    archive = zipped(tmp_path/"set.zip", files(6, binary=False, size=80))
    values["data"][name] = dict(name="toys", adapter="masks", path=str(archive), masks=dict(group=GROUP), valid_fraction=0.34)
    values["task"][name] = dict(data=name, target="nuclei", segment="toy")
    values["segment"] = dict(toy=segment_params(steps=2).model_dump(mode="json"))
    (tmp_path/"params.yaml").write_text(yaml.safe_dump(values | dict(device="cpu", precision="float32")))
    given = dict(params=str(tmp_path/"params.yaml"))
    request.addfinalizer(lambda: shutil.rmtree(ROOT/store_of(name), ignore_errors=True))
    run(ROOT/"nbs"/"pipeline"/"11_masks.ipynb", tmp_path/"prepared.ipynb", given | dict(data=name, out=store_of(name), report=str(tmp_path/"look"), metrics=str(tmp_path/"facts.json")))
    run(ROOT/"nbs"/"pipeline"/"50_segment.ipynb", tmp_path/"done.ipynb", given | dict(study="tissue", protocol="segment", task=name, encoder="random", seed=0, weights=str(saved(32)), out=str(out)))
    assert (tmp_path/"look"/"outlines.png").is_file() and json.loads((tmp_path/"facts.json").read_text())["images"] == 6
    scores = json.loads((out/"scores.json").read_text())
    entry = scores["results"]["segment"]["all"]
    assert (scores["encoder"], scores["task"]) == ("random", name)
    kept = np.load(out/"predictions.npz", allow_pickle=False)
    assert entry["slides_test"] == sorted(set(kept["slides"])) and entry["n_train"] == 4 and entry["n_test"] == len(kept["names"]) == 2
    assert entry["miou"] == pytest.approx(float(overlaps(kept["cells"].sum(0))["miou"])) and kept["cells"].sum() == 2*80*80
    i = int(kept["shown"][0])
    truth, guess = (np.unpackbits(kept[f"{k}_{i}"], axis=1, count=80) for k in ("truth", "prediction"))
    np.testing.assert_array_equal(truth, toy_nuclei(int(str(kept["names"][i])[2:]), 80, 4)[1] > 0)
    np.testing.assert_array_equal(pixel_cells(truth, guess), kept["cells"][i])
    assert (out/"outlines.png").is_file()


# Real images

def real(name):
    if not (REAL/name).is_file(): pytest.skip(f"../shared/realdata/{name} is not here")
    return REAL/name

def test_tnbc():
    pairs = read_pairs(real("tnbc50_512px.zip"), GROUP)
    assert len(pairs) == 50 and sorted({p.slide for p in pairs}) == [f"{i:02}" for i in range(1, 12)]
    train, test, slides = split_by_group(pairs, 0.3, 0)
    assert len(slides) == 3 and not {p.slide for p in train} & {p.slide for p in test}
    masks = [p.read_mask() for p in pairs]
    assert {m.shape for m in masks} == {(512, 512)} and pairs[0].read().shape == (512, 512, 3)
    assert sum(label(m, connectivity=1).max() for m in masks) == 4056 # as the set's README counts, corners apart
    assert sum(instances(m).max() for m in masks) == 4028             # nearer to the 4022 nuclei published

def test_dsb2018():
    pairs = read_pairs(real("dsb2018_color107_instances.zip"), r"^(.+)$")
    assert len(pairs) == len({p.slide for p in pairs}) == 107
    assert sum(len(np.unique(instances(p.read_mask()))) - 1 for p in pairs) == 4550
