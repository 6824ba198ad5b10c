"""Forward passes on a GPU that is not there. Under `FakeTensorMode` tensors have a shape, a type and a device, but no values:
what meets a tensor of another device is found, and so is every step that would wait for the device (`.item()`, boolean indexing)."""
from functools import partial
from types import SimpleNamespace

import pytest, torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from sdmae.evaluate.finetune import Classifier
from sdmae.evaluate.knn import nearest
from sdmae.evaluate.segment import Segmenter
from sdmae.methods.registry import METHODS, build_method, method_class
from sdmae.models.decoders import DecoderParams
from sdmae.models.encoders import build_encoder
from sdmae.models.vit import attention_maps, suit_attention
from sdmae.params import EncoderForm, FinetuneParams, ModelParams, OptimParams, SegmentParams, ViewParams
from sdmae.views.augment import MEAN, STD, Views, center_resize, normalize, to_unit
from toys import Follower

SHAPE = ModelParams(patch_size=8, embed_dim=48, depth=4, num_heads=3)
GIVEN = dict(optim=OptimParams(base_lr=1e-3), decoder=DecoderParams(embed_dim=24, depth=2, num_heads=3))
EVERYTHING = ViewParams(vflip=True, rot90=True, rotate=20, zoom=(.8, 1.2), intensity=.1, od_jitter=.2, color_jitter=(.3, .3, .2), hue=.1, jitter_probability=.8, grayscale=.2, fields=[1., .5], blur=.5, solarize=.2, erasing=.3)
SWITCHES = dict(sdmae=[dict(detach_teacher=True, center_on="logits", teacher_momentum=.9), dict(distill="token", target_image="normalized")],
                miram=[dict(target="native"), dict(attention="nystrom")])
LEARNING = [(name, {}) for name in METHODS if "optim" in method_class(name).Params.model_fields] + [(name, o) for name, all_ in SWITCHES.items() for o in all_]


@pytest.fixture(autouse=True)
def what_cannot_be_faked(monkeypatch):
    "A generator of the device, and the one thing that the host itself draws: the order of `color_jitter`."
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
    monkeypatch.setattr(torch, "randperm", lambda n: SimpleNamespace(tolist=lambda: list(range(n))))


def fake(*shape, dtype=torch.float32): return torch.empty(shape, dtype=dtype, device="cuda")


def on_gpu(model):
    "In place: what `.to(device)` moves, parameters and buffers."
    like = lambda t: fake(*t.shape, dtype=t.dtype)
    for m in suit_attention(model, "cuda").modules():
        m._parameters.update({k: nn.Parameter(like(p), requires_grad=p.requires_grad) for k, p in m._parameters.items() if p is not None})
        m._buffers.update({k: like(b) for k, b in m._buffers.items() if b is not None})
    return model


def method(name, **changes):
    kind = method_class(name)
    given = {k: v for k, v in GIVEN.items() if k in kind.Params.model_fields}
    labels = dict(n_classes=3) if getattr(kind, "labelled", False) else {}
    return build_method(name, kind.Params(**given | changes), SHAPE, 32, **labels)


def is_on_gpu(values): return all(v.device.type == "cuda" for v in values.values())


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name, changes", LEARNING, ids=lambda o: o if isinstance(o, str) else "-".join(o))
def test_a_training_step(name, changes, channels):
    "Views, forward pass, what follows a step, and pictures."
    m = method(name, **changes | dict(views=EVERYTHING))
    with FakeTensorMode():
        batch = [fake(4, channels, 72, 72, dtype=torch.uint8)] + [fake(4, dtype=torch.long)]*getattr(m, "labelled", False)
        on_gpu(m)
        parts = m(*batch)
        assert parts["loss"].requires_grad and is_on_gpu(parts) and all(v.shape == () for v in parts.values())
        if hasattr(m, "after_step"): m.after_step(1.)
        if hasattr(m, "reconstruct"): assert is_on_gpu(m.eval().reconstruct(batch[0]))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "imported"]) # which is an encoder as the others are
def test_features(name):
    encoder = method(name).encoder.eval()
    with FakeTensorMode(), torch.inference_mode():
        on_gpu(encoder)
        x = encoder.pooled(normalize(center_resize(to_unit(fake(4, 3, 40, 40, dtype=torch.uint8)), 32), MEAN, STD))
        similarity, rows = nearest(x, x, 2)
    assert x.device.type == rows.device.type == "cuda" and x.ndim == 2


def test_a_toy_with_everything():
    m = Follower()
    with FakeTensorMode():
        on_gpu(m)
        assert is_on_gpu(m(fake(4, 3, 40, 40, dtype=torch.uint8)))
        m.before_step(0.); m.after_step(.5)
        assert m.queue.device.type == "cuda"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_views(interpolation):
    views = Views(EVERYTHING.model_copy(update=dict(interpolation=interpolation)), 32)
    with FakeTensorMode():
        x = views(fake(4, 3, 40, 40, dtype=torch.uint8))
        assert x.device.type == "cuda" and x.shape == (4, 3, 32, 32)


RECIPE = partial(FinetuneParams, epochs=1, batch_size=4, optim=GIVEN["optim"], views=EVERYTHING)

@pytest.mark.parametrize("recipe, multi", [(dict(), False), (dict(), True), (dict(frozen=True), False), (dict(label_smoothing=.1, drop_path=.1), False)])
def test_fine_tuning(recipe, multi):
    params = RECIPE(**recipe)
    model = Classifier(build_encoder(32, SHAPE, EncoderForm(), num_classes=3, drop_path=params.drop_path, final_norm=False), params, multi=multi, weights=torch.ones(3))
    with FakeTensorMode():
        on_gpu(model)
        targets = fake(4, 3) if multi else fake(4, dtype=torch.long)
        assert is_on_gpu(model(fake(4, 3, 40, 40, dtype=torch.uint8), targets))
        assert model.eval().logits(fake(4, 3, 32, 32)).shape == (4, 3)


def test_segmentation():
    params = SegmentParams(image_size=64, stride=64, blocks=[0, 1, 2, 3], channels=16, views=EVERYTHING.model_copy(update=dict(rotate=0., zoom=(1., 1.))))
    model = Segmenter(build_encoder(64, SHAPE, EncoderForm()), params)
    with FakeTensorMode():
        on_gpu(model)
        assert is_on_gpu(model(fake(2, 3, 96, 96, dtype=torch.uint8), fake(2, 96, 96, dtype=torch.uint8)))
        assert model.eval().logits(fake(2, 3, 64, 64)).shape == (2, 2, 64, 64)


def test_attention():
    encoder = build_encoder(32, SHAPE, EncoderForm(class_token=True))
    with FakeTensorMode(): assert attention_maps(on_gpu(encoder), fake(2, 3, 32, 32)).device.type == "cuda"


@pytest.mark.parametrize("fault, error", [
    (lambda x: x.sum().item(), DataDependentOutputException), (lambda x: x[x > 0], DynamicOutputShapeException),
    (lambda x: x @ torch.eye(2), RuntimeError), (lambda x: float(x.mean()), DataDependentOutputException)])
def test_faults_are_found(fault, error):
    with FakeTensorMode(), pytest.raises(error): fault(fake(2, 2))
