"The engine with the real methods: resumed runs, checkpoints, faults; views against torchvision."
import numpy as np, pytest, torch
from sdmae.methods.registry import build_method
from sdmae.params import compose, parse_params
from sdmae.train.engine import Batches, Callback, Trainer, lr_at, pick_device, pick_precision


class Tiles:
    "Twenty-four random tiles; stands for a TileStore."
    image_size = 32
    images = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    def batch(self, rows): return self.images[torch.as_tensor(rows)]


VALUES = compose(["data.image_size=32", "model.embed_dim=24", "model.depth=2", "model.num_heads=2"])
PARAMS = parse_params(VALUES | dict(method=VALUES["method"] | dict(miram=VALUES["method"]["mae"]))) # MIRAM by its defaults


class Stop(Callback):
    "Ends the run from outside after an epoch."
    def __init__(self, epoch): self.epoch = epoch
    def after_epoch(self, trainer):
        if trainer.history[-1]["epoch"] == self.epoch: raise KeyboardInterrupt


def run(name, callbacks=(), epochs=4, **kwargs):
    model = build_method(name, PARAMS, seed=0)
    torch.manual_seed(0)
    t = Trainer(model, Batches(Tiles(), np.arange(24), 8), getattr(PARAMS.method, name).optim, epochs, torch.device("cpu"), callbacks=callbacks, **kwargs)
    return model, t.fit()


@pytest.mark.parametrize("name", ["mae", "sdmae", "miram"])
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    "Views, masks, moments and centre included: equal weights to the last bit."
    whole, history = run(name)
    with pytest.raises(KeyboardInterrupt): run(name, (Stop(3),), checkpoint=tmp_path/"c.pt", checkpoint_minutes=0)
    resumed, again = run(name, checkpoint=tmp_path/"c.pt")
    for (k, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()): assert torch.equal(a, b), k
    assert [r["loss"] for r in history] == [r["loss"] for r in again] and len(again) == 4
    assert not (tmp_path/"c.pt").exists()


def test_a_damaged_checkpoint_is_named_and_kept(tmp_path):
    (tmp_path/"c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="c.pt cannot be resumed.*delete it"): run("mae", checkpoint=tmp_path/"c.pt")
    assert (tmp_path/"c.pt").exists()


def test_a_checkpoint_cannot_carry_code(tmp_path):
    class Evil:
        def __reduce__(self): return (print, ("code ran",))
    torch.save(dict(model=Evil()), tmp_path/"c.pt")
    with pytest.raises(ValueError, match="cannot be resumed"): run("mae", checkpoint=tmp_path/"c.pt")


def test_accumulation_is_one_step_of_the_whole_batch():
    "MAE's loss is a mean over images, so two halves with the same masks give the same gradient."
    model = build_method("mae", PARAMS)
    x, ids = Tiles.images[:8].float()/255, model.draw_mask(8, "cpu")
    model.loss_on(x, *ids)["loss"].backward()
    whole = model.pixels.weight.grad.clone(); model.zero_grad()
    for half in (slice(0, 4), slice(4, 8)): (model.loss_on(x[half], ids[0][half], ids[1][half])["loss"]/2).backward()
    assert torch.allclose(model.pixels.weight.grad, whole, atol=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run():
    class Broken(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.ones(()))
        def forward(self, images): return dict(loss=self.w*float("nan"))
    t = Trainer(Broken(), Batches(Tiles(), np.arange(24), 8), PARAMS.method.mae.optim, 2, torch.device("cpu"))
    with pytest.raises(FloatingPointError, match="lower base_lr"): t.fit()


def test_the_last_small_batch_is_left_out_and_an_epoch_repeats_no_tile():
    b = Batches(Tiles(), np.arange(10), 4)
    rows = np.concatenate([b.rows(5, i) for i in range(len(b))])
    assert len(b) == 2 and len(set(rows)) == 8
    assert len(Batches(Tiles(), np.arange(3), 4)) == 1
    with pytest.raises(ValueError, match="split is empty"): Batches(Tiles(), [], 4)


def test_schedule():
    lrs = [lr_at(s, 100, 1., 0.1, 10) for s in range(100)]
    assert lrs[0] == pytest.approx(0.1) and lrs[9] == 1 and lrs[-1] == pytest.approx(0.1) and max(lrs) == 1
    assert all(a >= b for a, b in zip(lrs[9:], lrs[10:]))


def test_devices():
    assert pick_device("cpu").type == "cpu" and pick_precision("float32", torch.device("cpu")) is None
    assert pick_precision("bfloat16", torch.device("cpu")) == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="torch sees no GPU"): pick_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["mae", "sdmae", "miram"])
def test_gpu_gives_the_cpu_loss(name):
    "The same weights, tiles and masks: equal loss to float32's rounding, fused attention included."
    x = Tiles.images[:8].float()/255
    losses = []
    for device in ("cpu", "cuda"):
        m = build_method(name, PARAMS, device=device)
        ids = build_method(name, PARAMS).draw_mask(8, "cpu", torch.Generator().manual_seed(0))
        losses.append(m.loss_on(x.to(device), *(i.to(device) for i in ids))["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_views_and_targets_stay_float32_under_autocast():
    "Mixed precision is for the network: pixels and targets are the same with and without."
    m, images = build_method("sdmae", PARAMS), Tiles.images[:4]
    def draw(dtype):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            x = m.views(images); ids = m.draw_mask(4, "cpu")
            return x, m.target(x, ids[1])
    for plain, mixed in zip(draw(None), draw(torch.bfloat16)):
        assert mixed.dtype == torch.float32 and torch.equal(plain, mixed)
