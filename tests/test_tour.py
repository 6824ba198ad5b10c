"""The tour on images, an encoder and an evaluation of one's own, with few steps; what cannot be shown is refused."""
import json
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from sdmae.evaluate.hovernet import HoverNet, save_nuclei
from sdmae.models.encoders import build_encoder, own_config, save_encoder
from sdmae.models.histogram import HistogramEncoder
from sdmae.params import EncoderForm, ModelParams, NucleiParams, PostParams, ViewParams
from sdmae.pipeline.code import read_notebook
from sdmae.pipeline.run import NotebookFailed, run
from sdmae.views.augment import MEAN, STD

TOUR = Path(__file__).parents[1]/"nbs"/"tour.ipynb"
FORM, SIZES = EncoderForm(class_token=True), ModelParams(patch_size=8, embed_dim=32, depth=4, num_heads=2)
CONFIG = dict(image_size=32, model=SIZES.model_dump(), form=FORM.model_dump(), mean=list(MEAN), std=list(STD))


def tiles(folder, n):
    folder.mkdir()
    for i in range(n): Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder/f"{i}.png")
    return str(folder)


def tour(tmp_path, **given): return read_notebook(run(TOUR, tmp_path/"tour.ipynb", dict(steps=2) | given))


def test_own_images_encoder_and_nuclei(tmp_path):
    torch.manual_seed(0)
    save_encoder(tmp_path/"run", build_encoder(32, SIZES, FORM), CONFIG)
    recipe = NucleiParams(image_size=32, stride=16, blocks=[0, 1, 2, 3], channels=8, batch_size=2, views=ViewParams())
    own = build_encoder(32, SIZES, FORM)
    save_nuclei(tmp_path/"nuclei", HoverNet(own, recipe, MEAN, STD, 0), CONFIG | own_config(own), recipe, PostParams(), {})
    nb = tour(tmp_path, place=tiles(tmp_path/"mine", 9), image=8, weights=str(tmp_path/"run"), nuclei=str(tmp_path/"nuclei"))
    shown = json.dumps([c.get("outputs") for c in nb["cells"]])
    assert shown.count('"image/png"') == 8 and "No evaluation is given" not in shown # one figure more than without nuclei


@pytest.mark.parametrize("n, given, message", [
    (9, dict(image=9), "image 9: there are 9 images, 0 to 8"),
    (5, dict(image=0), "has 5 images: the tour compares an image with others, and needs 8 at least"),
    (9, dict(weights="histogram"), "is a histogram: the tour hides patches, so it needs a vision transformer")])
def test_what_cannot_be_shown_is_refused(tmp_path, n, given, message):
    if "weights" in given:
        save_encoder(tmp_path/"histogram", HistogramEncoder(32), dict(image_size=32, channels=3, bins=16, mean=list(MEAN), std=list(STD)))
        given = dict(weights=str(tmp_path/"histogram"))
    with pytest.raises(NotebookFailed, match=message): tour(tmp_path, place=tiles(tmp_path/"mine", n), **given)
