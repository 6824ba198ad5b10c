"The engine with the real methods and with fine-tuning: resumed runs, checkpoints, faults; losses and optimisers against independent oracles."
from functools import partial
from types import SimpleNamespace

import numpy as np, pytest, torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

import sdmae.evaluate.finetune as finetune
from sdmae.evaluate.finetune import Classifier, balance, fit_classifier, predict
from sdmae.evaluate.statistics import LabelScores, scores
from sdmae.methods.registry import method_of, method_params
from sdmae.models.vit import Encoder
from sdmae.params import FinetuneParams, OptimParams, ViewParams, compose, parse_params
from sdmae.train.batches import Batches
from sdmae.train.engine import Callback, Trainer, lr_at, make_optimizer, pick_device, pick_precision
from sdmae.train.monitor import Reconstructions, warnings_of
from toys import Follower


class Tiles:
    "Twenty-four random tiles; stands for a TileStore."
    image_size = 32
    images = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    def batch(self, rows): return self.images[torch.as_tensor(rows)]


PARAMS = parse_params(compose(["only=tissue", "data.tissue.image_size=32", "model.embed_dim=24", "model.depth=2", "model.num_heads=2",
                               "+encoder.miram={of: mae, method: miram}", # MIRAM by its defaults
                               *(f"++encoder.{name}={{data: tissue, pretrain: tissue, method: {name}, optim: {{name: {optim}, base_lr: 0.5, clip_norm: 3.0}}, {rest}}}" for name, optim, rest in (
                                   ("moco", "sgd", "head: {hidden_dim: 16, out_dim: 8}, queue: 16, momentum: 0.9"),
                                   ("swav", "lars", "head: {hidden_dim: 16, out_dim: 8}, prototypes: 6, queue: 16, queue_start: 0.2, freeze_prototypes: 0.3, local_crops: 1, local_size: 16"),
                                   ("barlow", "adam", "head: {hidden_dim: 16, out_dim: 8}, model: {arch: test_resnet}"),
                                   ("dino", "adamw", "head: {hidden_dim: 16, bottleneck_dim: 8, out_dim: 12}, freeze_last_layer: 0.3, local_crops: 1, local_size: 16")))]))


class Stop(Callback):
    "Ends the run from outside after an epoch."
    def __init__(self, epoch): self.epoch = epoch
    def after_epoch(self, trainer):
        if trainer.history[-1]["epoch"] == self.epoch: raise KeyboardInterrupt


def build(name, device="cpu"):
    if name == "follower": torch.manual_seed(0); return Follower()
    return method_of(PARAMS, name, device=device)


def run(name, callbacks=(), epochs=4, **kwargs):
    model = build(name)
    optim = Follower.optim if name == "follower" else method_params(PARAMS, name).optim
    torch.manual_seed(0)
    t = Trainer(model, Batches(Tiles(), np.arange(24), 8), optim, epochs, torch.device("cpu"), callbacks=callbacks, **kwargs)
    return model, t.fit()


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("name", ["mae", "sdmae", "miram", "follower", "moco", "swav", "barlow", "dino"])
def test_a_resumed_run_is_the_uninterrupted_one(name, stop, tmp_path):
    "Views, masks, moments, centre, queue, teacher copy, running statistics and the layer that is frozen in the first epoch: equal weights to the last bit."
    whole, history = run(name)
    with pytest.raises(KeyboardInterrupt): run(name, (Stop(stop),), checkpoint=tmp_path/"c.pt", checkpoint_minutes=0)
    resumed, again = run(name, checkpoint=tmp_path/"c.pt")
    for (k, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()): assert torch.equal(a, b), k
    assert [r["loss"] for r in history] == [r["loss"] for r in again] and len(again) == 4
    third, once_more = run(name, checkpoint=tmp_path/"c.pt") # complete: what came after the training may have failed
    assert once_more == again and all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), third.state_dict().values()))


def test_a_damaged_checkpoint_is_named_and_kept(tmp_path):
    (tmp_path/"c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="c.pt cannot be resumed.*delete it"): run("mae", checkpoint=tmp_path/"c.pt")
    assert (tmp_path/"c.pt").exists()


def test_a_checkpoint_cannot_carry_code(tmp_path):
    class Evil:
        def __reduce__(self): return (print, ("code ran",))
    torch.save(dict(model=Evil()), tmp_path/"c.pt")
    with pytest.raises(ValueError, match="cannot be resumed"): run("mae", checkpoint=tmp_path/"c.pt")


class Keep(Callback):
    "The weights after each epoch, and the number of parameters that the optimiser has moments of."
    def __init__(self): self.weights, self.moments = [], []
    def after_epoch(self, trainer):
        self.weights.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
        self.moments.append(len(trainer.optimizer.state))


def test_a_frozen_layer_stays_as_it_is_until_it_learns():
    "Without gradient there is no step, no moment and no decay; a quarter of the steps is the first of four epochs."
    keep, fresh = Keep(), build("follower").state_dict()
    run("follower", (keep,))
    for k in ("last.weight", "last.bias"):
        assert torch.equal(keep.weights[0][k], fresh[k]) and not torch.equal(keep.weights[1][k], fresh[k])
    assert keep.moments == [2, 4, 4, 4]
    assert not torch.equal(keep.weights[0]["student.0.weight"], fresh["student.0.weight"])


def test_hooks_are_told_how_far_the_run_is():
    "Once a step, whatever the number of parts: before it from 0, after it up to 1."
    told = dict(before_step=[], after_step=[])
    class Told(Follower):
        def before_step(self, progress): told["before_step"].append(progress)
        def after_step(self, progress): super().after_step(progress); told["after_step"].append(progress)
    Trainer(Told(), Batches(Tiles(), np.arange(24), 8), Follower.optim, 2, torch.device("cpu"), accumulate=2).fit()
    assert told == dict(before_step=[i/6 for i in range(6)], after_step=[i/6 for i in range(1, 7)])


class Late(torch.nn.Module):
    "Two layers in float64; the second learns from the third of six steps on. It may break off before a step."
    frozen_for, stop = 2/6, None
    def __init__(self):
        super().__init__(); torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(48, 5).double(), torch.nn.Linear(5, 3).double()
    def forward(self, images): return dict(loss=(self.last(self.first(F.avg_pool2d(images.double(), 8).flatten(1)/255).tanh()) - 1).square().sum(1).mean())
    def before_forward(self, progress):
        if self.stop is not None and progress >= self.stop: raise KeyboardInterrupt
    def before_step(self, progress):
        if progress < self.frozen_for:
            for p in self.last.parameters(): p.grad = None


def late(optim, stop=None, **kwargs):
    "Its six steps."
    model = Late(); model.stop = stop
    Trainer(model, Batches(Tiles(), np.arange(24), 8), optim, 2, torch.device("cpu"), **kwargs).fit()
    return model.state_dict()


def updated(o, lr, w, g, memory):
    "One weight after one step by the formulas of Adam, AdamW, SGD and LARS; `memory` is of this weight alone, and counts its own steps."
    decay = o.weight_decay*(w.ndim > 1)
    if o.name in ("adam", "adamw"):
        if o.name == "adam": g = g + decay*w
        else: w = w*(1 - lr*decay)
        t, m, v = memory.get("t", 0) + 1, o.betas[0]*memory.get("m", 0) + (1 - o.betas[0])*g, o.betas[1]*memory.get("v", 0) + (1 - o.betas[1])*g*g
        memory.update(t=t, m=m, v=v)
        return w - lr*(m/(1 - o.betas[0]**t))/(np.sqrt(v/(1 - o.betas[1]**t)) + 1e-8)
    ratio = .001*np.linalg.norm(w)/(np.linalg.norm(g) + decay*np.linalg.norm(w) + 1e-8) if o.name == "lars" and w.ndim > 1 else 1.
    g = (g + decay*w)*ratio
    memory["buffer"] = o.momentum*memory["buffer"] + g if "buffer" in memory else g
    return w - lr*(g + o.momentum*memory["buffer"] if o.nesterov else memory["buffer"])


def late_by_hand(o):
    "The same six steps; only gradients are torch's."
    model, batches, memory = Late(), Batches(Tiles(), np.arange(24), 8), {}
    for step in range(6):
        model.zero_grad(); model(*batches.batch(*divmod(step, 3)))["loss"].backward()
        g = {k: p.grad.numpy() for k, p in model.named_parameters() if step >= 2 or not k.startswith("last")}
        norm = np.sqrt(sum((v*v).sum() for v in g.values()))
        if o.clip_norm: g = {k: v*min(1, o.clip_norm/(norm + 1e-6)) for k, v in g.items()}
        for k, v in g.items():
            p = model.get_parameter(k)
            p.data = torch.from_numpy(updated(o, lr_at(step, 6, o.lr(8), o), p.detach().numpy(), v, memory.setdefault(k, {})))
    return model.state_dict()


@pytest.mark.parametrize("clip_norm", [None, .5])
@pytest.mark.parametrize("name, more", [("adamw", {}), ("adam", {}), ("sgd", {}), ("sgd", dict(nesterov=True)), ("lars", {})])
def test_every_optimiser_takes_a_layer_that_begins_late(name, more, clip_norm, tmp_path):
    "Its moments and its count begin with its own first step, and what is clipped is the gradient that there is; on from a checkpoint of the frozen time it is the same to the last bit."
    o = OptimParams(name=name, base_lr=200. if name == "lars" else 1., weight_decay=.1, warmup=.2, clip_norm=clip_norm, **more)
    whole, fresh = late(o), Late().state_dict()
    for k, v in late_by_hand(o).items(): assert torch.allclose(v, whole[k], rtol=0, atol=1e-9) and not torch.allclose(v, fresh[k], atol=1e-4), k
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt): late(o, stop/6, checkpoint=tmp_path/f"{stop}.pt", checkpoint_minutes=0)
        resumed = late(o, checkpoint=tmp_path/f"{stop}.pt")
        assert all(torch.equal(v, resumed[k]) for k, v in whole.items())


MADE = dict(code={"sdmae/methods/sdmae.py": "0a1b", "sdmae/train/engine.py": "77"}, torch="2.11", params=dict(seed=0, scale=(.2, 1.)))


def interrupted(path, **kwargs):
    with pytest.raises(KeyboardInterrupt): run("mae", (Stop(3),), checkpoint=path, checkpoint_minutes=0, **kwargs)


def test_a_checkpoint_goes_on_where_it_was_made_of_the_same(tmp_path):
    interrupted(tmp_path/"c.pt", made_of=MADE)
    resumed, history = run("mae", checkpoint=tmp_path/"c.pt", made_of=MADE)
    whole, _ = run("mae")
    for (k, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()): assert torch.equal(a, b), k


@pytest.mark.parametrize("change, message", [
    (dict(code={"sdmae/methods/sdmae.py": "93fe", "sdmae/train/engine.py": "77"}, torch="2.12"), "code of sdmae/methods/sdmae.py; torch: 2.11 → 2.12. Delete it"),
    (dict(code={"sdmae/methods/sdmae.py": "0a1b"}), "else: code of sdmae/train/engine.py. Delete it"),
    (dict(params=dict(seed=1, scale=(.2, 1.))), "else: params.seed: 0 → 1. Delete it"),
    (dict(precision="bfloat16"), "else: precision: nothing → bfloat16. Delete it")])
def test_a_checkpoint_made_of_something_else_is_refused_with_the_reason(change, message, tmp_path):
    "And kept, for the other way out is to go back."
    interrupted(tmp_path/"c.pt", made_of=MADE)
    with pytest.raises(ValueError) as e: run("mae", checkpoint=tmp_path/"c.pt", made_of=MADE | change)
    assert "c.pt was made of something else" in str(e.value) and message in str(e.value) and "go back to what made it" in str(e.value)
    assert (tmp_path/"c.pt").exists()


def test_a_finished_training_of_other_code_gives_way(tmp_path):
    "It would mix with nothing, so an edit of a method asks nobody to delete anything; the run begins anew, and says so."
    run("mae", checkpoint=tmp_path/"c.pt", made_of=MADE)
    with pytest.warns(UserWarning, match="c.pt is a finished training of something else .torch: 2.11 → 2.12.; this one begins anew"): _, history = run("mae", checkpoint=tmp_path/"c.pt", made_of=MADE | dict(torch="2.12"))
    assert len(history) == 4 and len(run("mae", checkpoint=tmp_path/"c.pt", made_of=MADE | dict(torch="2.12"))[1]) == 4


def test_a_checkpoint_that_does_not_say_what_made_it(tmp_path):
    "It is refused where that is asked for; where it is not, it goes on as before."
    interrupted(tmp_path/"c.pt")
    with pytest.raises(ValueError, match="torch: nothing → 2.11"): run("mae", checkpoint=tmp_path/"c.pt", made_of=MADE)
    assert len(run("mae", checkpoint=tmp_path/"c.pt")[1]) == 4


def test_the_monitor_asks_what_there_is():
    "A method without pictures leaves none, and one without warnings has the general ones only."
    pictures, reconstructed = Reconstructions(1, Tiles.images[:2]), Reconstructions(1, Tiles.images[:2])
    model, _ = run("follower", (pictures,), epochs=1); mae, _ = run("mae", (reconstructed,), epochs=1)
    assert pictures.pictures == {} and reconstructed.pictures.keys() == {1}
    row = dict(epoch=1, rankme=1.2, structure_r2=0., teacher_information=0., teacher_entropy=0.)
    found = {k: [o[:27] for o in warnings_of(row, m)] for k, m in dict(none=None, follower=model, mae=mae, sdmae=build("sdmae")).items()}
    features, structure, teacher = "the features have collapsed", "structure was not learned: ", "the teacher has collapsed: "
    assert found == dict(none=[features], follower=[features], mae=[features, structure], sdmae=[features, teacher, structure])


def test_accumulation_is_one_step_of_the_whole_batch():
    "MAE's loss is a mean over images, so two halves with the same masks give the same gradient."
    model = build("mae")
    x, ids = Tiles.images[:8].float()/255, model.draw_mask(8, "cpu")
    model.loss_on(x, *ids)["loss"].backward()
    whole = model.pixels.weight.grad.clone(); model.zero_grad()
    for half in (slice(0, 4), slice(4, 8)): (model.loss_on(x[half], ids[0][half], ids[1][half])["loss"]/2).backward()
    assert torch.allclose(model.pixels.weight.grad, whole, atol=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run():
    class Broken(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.ones(()))
        def forward(self, images): return dict(loss=self.w*float("nan"))
    t = Trainer(Broken(), Batches(Tiles(), np.arange(24), 8), method_params(PARAMS, "mae").optim, 2, torch.device("cpu"))
    with pytest.raises(FloatingPointError, match="the loss is nan and the norm of the gradient nan in step 1 of 6.*its images: row 18.*Lower base_lr"): t.fit()


def test_the_last_small_batch_is_left_out_and_an_epoch_repeats_no_tile():
    b = Batches(Tiles(), np.arange(10), 4)
    rows = np.concatenate([b.rows(5, i) for i in range(len(b))])
    assert len(b) == 2 and len(set(rows)) == 8
    assert len(Batches(Tiles(), np.arange(3), 4)) == 1
    with pytest.raises(ValueError, match="split is empty"): Batches(Tiles(), [], 4)


def test_schedule():
    lrs = [lr_at(s, 100, 1., OptimParams(base_lr=1., min_lr=0.1, warmup=0.1)) for s in range(100)]
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
        m = build(name, device)
        ids = build(name).draw_mask(8, "cpu", torch.Generator().manual_seed(0))
        losses.append(m.loss_on(x.to(device), *(i.to(device) for i in ids))["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_views_and_targets_stay_float32_under_autocast():
    "Mixed precision is for the network: pixels and targets are the same with and without."
    m, images = build("sdmae"), Tiles.images[:4]
    def draw(dtype):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            x = m.views(images); ids = m.draw_mask(4, "cpu")
            return x, m.target(x, ids[1])
    for plain, mixed in zip(draw(None), draw(torch.bfloat16)):
        assert mixed.dtype == torch.float32 and torch.equal(plain, mixed)


def test_adam_is_adam_with_decay_in_the_gradient():
    "Three steps by hand (Kingma and Ba 2015, algorithm 1), weight decay as L2."
    w = torch.nn.Parameter(torch.tensor([1., -2., .5]))
    o = OptimParams(name="adam", base_lr=1., betas=(0.9, 0.95))
    optimizer = make_optimizer([dict(params=[w], weight_decay=0.3)], o, 0.05)
    x, m, v = w.detach().double().numpy().copy(), 0., 0.
    for t in range(1, 4):
        g = 2*x + np.array([.1, .2, -.3]) + 0.3*x
        m, v = .9*m + .1*g, .95*v + .05*g*g
        w.grad = 2*w.detach() + torch.tensor([.1, .2, -.3])
        optimizer.step()
        x = x - 0.05*(m/(1 - .9**t))/(np.sqrt(v/(1 - .95**t)) + 1e-8)
        assert np.allclose(w.detach(), x, atol=1e-6)


# fine-tuning

class Labelled(Tiles):
    "The same tiles with a task of classes and one of several labels; grey where asked."
    def __init__(self, grey=False): self.images = Tiles.images[:, :1] if grey else Tiles.images
    def task(self, name): return SimpleNamespace(classes=list("abc"), multi=name == "margins")
    def targets(self, rows, task):
        r = torch.as_tensor(np.asarray(rows))
        return torch.stack([r % 2 == 0, r % 3 == 0, r % 5 == 0], 1).float() if task == "margins" else r % 3


RECIPE = FinetuneParams(epochs=4, batch_size=8, optim=OptimParams(name="adam", base_lr=.01), views=ViewParams(scale=(0.5, 1.)))


def tune(store=Labelled(), task="label", valid=None, callbacks=(), checkpoint=None, **recipe):
    torch.manual_seed(0)
    encoder = Encoder(32, 8, 24, 2, 2, num_classes=3)
    return fit_classifier(encoder, store, np.arange(16), RECIPE.model_copy(update=recipe), callbacks=callbacks, checkpoint=checkpoint, task=task, valid=valid)


def test_a_classifier_of_then_says_what_it_was_made_under(tmp_path, monkeypatch):
    "A finished training that is only scored anew, on another machine or commit, keeps its own circumstances."
    for now in ("then", "today"):
        monkeypatch.setattr("sdmae.evaluate.finetune.circumstances", lambda device, precision: dict(commit=now))
        assert tune(checkpoint=tmp_path/"last.pt")[0].under == dict(commit="then")


def test_losses_are_those_by_hand():
    "Balanced weights as scikit-learn's; a weighted mean for classes; negatives over positives for labels."
    torch.manual_seed(0)
    images, rows = Tiles.images[:8], np.array([0, 3, 6, 1, 2, 9, 12, 15])
    exact = RECIPE.model_copy(update=dict(views=ViewParams(scale=(1., 1.), ratio=(1., 1.), hflip=False)))
    for task in ("label", "margins"):
        t, encoder = Labelled().targets(rows, task), Encoder(32, 8, 24, 2, 2, num_classes=3)
        encoder.head.weight.data.normal_()
        weights = balance(t, list("abc"))
        c = Classifier(encoder, exact, multi=task == "margins", weights=weights).eval()
        z, y = c.logits(c.views(images)).detach().double().numpy(), t.numpy()
        if task == "label":
            w = compute_class_weight("balanced", classes=np.arange(3), y=y)
            nll = np.log(np.exp(z).sum(1)) - z[np.arange(8), y]
            want = (w[y]*nll).sum()/w[y].sum()
        else:
            w = (8 - y.sum(0))/y.sum(0)
            p = 1/(1 + np.exp(-z))
            want = -(w*y*np.log(p) + (1-y)*np.log(1-p)).mean()
        assert np.allclose(weights, w) and w.std() > .1
        assert c(images, t)["loss"].item() == pytest.approx(want, rel=1e-5)


def test_probabilities_of_labels_are_independent_and_of_classes_a_distribution():
    for task in ("label", "margins"):
        classifier, history = tune(task=task)
        p = predict(classifier, Labelled(), np.arange(24), batch_size=7)
        assert p.shape == (24, 3) and len(history) == 4 and ((p > 0) & (p < 1)).all()
        assert np.allclose(p.sum(1), 1) == (task == "label")
        z = torch.logit(torch.tensor(p)) if task == "margins" else torch.tensor(p).log()
        with torch.no_grad(): raw = classifier.logits(Tiles.images/255).double()
        assert torch.allclose(z - z[:, :1]*(task == "label"), raw - raw[:, :1]*(task == "label"), atol=1e-4)


@pytest.mark.parametrize("task", ["label", "margins"])
def test_the_best_epoch_counts_and_survives_an_interruption(task, tmp_path, monkeypatch):
    "Of four epochs the second is best; the run is broken off in the third."
    monkeypatch.setattr(finetune, "Trainer", partial(Trainer, checkpoint_minutes=0))
    def scripted(*values):
        values = iter(values)
        monkeypatch.setattr(finetune, "macro_auc", lambda *a: next(values))
    class Keep(Callback):
        weights = []
        def after_epoch(self, trainer): self.weights.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    scripted(.6, .9, .7, .9)
    whole, history = tune(task=task, valid=np.arange(16, 24), callbacks=(Keep(),), select="macro_auc")
    for k, v in whole.state_dict().items(): assert torch.equal(v, Keep.weights[1][k]), k
    assert not all(torch.equal(v, Keep.weights[3][k]) for k, v in whole.state_dict().items())
    assert [r["valid_macro_auc"] for r in history] == [.6, .9, .7, .9]
    scripted(.6, .9, .7)
    with pytest.raises(KeyboardInterrupt): tune(task=task, valid=np.arange(16, 24), callbacks=(Stop(3),), checkpoint=tmp_path/"c.pt", select="macro_auc")
    scripted(.7, .9) # what is left: the third epoch again, and the fourth
    resumed, again = tune(task=task, valid=np.arange(16, 24), checkpoint=tmp_path/"c.pt", select="macro_auc")
    for (k, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True): assert torch.equal(a, b), k
    assert [(r["loss"], r["valid_macro_auc"]) for r in history] == [(r["loss"], r["valid_macro_auc"]) for r in again]


def test_selecting_does_not_change_the_training_and_finds_the_highest():
    valid = np.arange(12, 24)
    _, plain = tune(task="margins")
    chosen, history = tune(task="margins", valid=valid, select="macro_auc")
    assert [r["loss"] for r in plain] == [r["loss"] for r in history]
    best = scores(Labelled().targets(valid, "margins"), predict(chosen, Labelled(), valid), LabelScores)["macro_auc"]
    assert best == pytest.approx(max(r["valid_macro_auc"] for r in history))


def test_a_checkpoint_without_the_best_epoch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "Trainer", partial(Trainer, checkpoint_minutes=0))
    with pytest.raises(KeyboardInterrupt): tune(callbacks=(Stop(3),), checkpoint=tmp_path/"c.pt")
    with pytest.raises(ValueError, match="cannot be resumed.*delete it"): tune(valid=np.arange(16, 24), checkpoint=tmp_path/"c.pt", select="macro_auc")


@pytest.mark.parametrize("recipe", [dict(), dict(mixup=.8, cutmix=1., epochs=2)])
def test_grey_tiles_are_trained_as_their_three_equal_channels(recipe):
    grey = Labelled(grey=True); three = Labelled(); three.images = grey.images.expand(-1, 3, -1, -1)
    (a, ha), (b, hb) = tune(grey, **recipe), tune(three, **recipe)
    assert [r["loss"] for r in ha] == pytest.approx([r["loss"] for r in hb], abs=1e-5)
    assert np.allclose(predict(a, grey, np.arange(24)), predict(b, three, np.arange(24)), atol=1e-4)


@pytest.mark.parametrize("change, message", [
    (dict(task="margins", mixup=.8), "mixup 0.8: not for a task of several labels; set it to 0"),
    (dict(task="margins", cutmix=1.), "cutmix 1.0: not"), (dict(task="margins", label_smoothing=.1), "label_smoothing 0.1: not"),
    (dict(select="macro_auc"), "no rows of it; use select: last"), (dict(select="macro_auc", valid=[]), "no rows of it"),
    (dict(select="macro_auc", valid=[0, 3, 6]), "all 3 rows of validation have the same label of the task label")])
def test_recipes_that_do_not_fit_a_task_are_refused(change, message):
    with pytest.raises(ValueError, match=message): tune(**change)


def test_class_weights_need_every_class():
    with pytest.raises(ValueError, match="0 of 3 labelled tiles are of class c.*class_weights: false"): balance(torch.tensor([0, 1, 1]), list("abc"))
    with pytest.raises(ValueError, match="2 of 2 labelled tiles are of class b"): balance(torch.tensor([[0., 1.], [1., 1.]]), list("ab"))
    with pytest.raises(ValueError, match="task label has 3 classes.*num_classes 2"):
        fit_classifier(Encoder(32, 8, 24, 2, 2, num_classes=2), Labelled(), np.arange(8), RECIPE)


def test_biases_norms_and_spared_names_do_not_decay():
    "timm's argument for them has another place in newer versions, so it is given by its name."
    torch.manual_seed(0)
    for name in ("mae", "sdmae"):
        model = method_of(PARAMS, name)
        groups = Trainer(model, Batches(Tiles(), np.arange(24), 8), method_params(PARAMS, name).optim, 1, torch.device("cpu")).optimizer.param_groups
        decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
        spared = getattr(model, "no_weight_decay", ())
        for k, p in model.named_parameters():
            if p.requires_grad: assert (id(p) in decayed) == (p.ndim > 1 and not k.endswith(".bias") and k not in spared), k
