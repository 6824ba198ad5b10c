"""Two processes on CPU against one. torchrun runs this file once, as a program, for all checks that need two;
what its processes saw is compared here with what one process sees."""
import os, shutil, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
import torch.distributed as dist

import sdmae.pipeline.pretrain as pretrain
import sdmae.views.augment as augment
from timm.layers import BatchNormAct2d
from torch import nn
from sdmae.methods.registry import method_of, method_params
from sdmae.models.together import gather, mean_of_all, share_batchnorm
from sdmae.params import OptimParams, compose, parse_params
from sdmae.train.batches import Batches
from sdmae.train.engine import Callback, Trainer, pick_device
from sdmae.pipeline.ingredients import made_of_encoder
from sdmae.views.draws import rank_and_world
from toys import Follower, noise_tiles

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
JOINT = ["moco", "moco_conv", "moco_v3", "moco_v3_conv", "swav", "swav_conv", "barlow", "barlow_conv", "dino_conv"] # ten steps each, in float64
METHODS = ["mae", "sdmae", "sdmae_momentum", "miram", "follower", "dino", *JOINT]
CONV, SMALL = "model: {arch: test_resnet}", "head: {hidden_dim: 16, out_dim: 8}, optim: {name: sgd, base_lr: 0.5, warmup: 0.0}"
PARAMS = parse_params(compose(["only=tissue", "data.tissue.image_size=32", "model.embed_dim=24", "model.depth=2", "model.num_heads=2", "+encoder.miram={of: mae, method: miram}",
                               "encoder.mae.views={of: tissue, color_jitter: 0.3, hue: 0.05, jitter_probability: 0.8, grayscale: 0.2, hed_jitter: 0.05, fields: [1.0, 0.5]}",
                               "+encoder.sdmae_momentum={of: sdmae, detach_teacher: true, center_on: logits, teacher_momentum: 0.9}",
                               "+encoder.dino={data: tissue, pretrain: tissue, method: dino, head: {hidden_dim: 16, bottleneck_dim: 8, out_dim: 12}, teacher_momentum: 0.9, freeze_last_layer: 0.1, "
                               "local_crops: 1, local_size: 16, optim: {base_lr: 0.1, clip_norm: 3.0, weight_decay_end: 0.4}}",
                               f"+encoder.moco={{data: tissue, pretrain: tissue, method: moco, version: v2, queue: 24, momentum: 0.9, {SMALL}}}", f"+encoder.moco_conv={{of: moco, {CONV}}}",
                               "+encoder.moco_v3={of: moco, version: v3}", f"+encoder.moco_v3_conv={{of: moco_v3, {CONV}}}",
                               f"+encoder.swav={{data: tissue, pretrain: tissue, method: swav, prototypes: 6, queue: 16, queue_start: 0.3, freeze_prototypes: 0.15, local_crops: 2, local_size: 16, {SMALL}}}",
                               f"+encoder.swav_conv={{of: swav, {CONV}}}",
                               f"encoder.barlow={{data: tissue, pretrain: tissue, method: barlow, {SMALL}}}", f"+encoder.barlow_conv={{of: barlow, {CONV}}}",
                               f"+encoder.dino_conv={{of: dino, {CONV}, class_token: false, feature: mean, optim: {{name: sgd, base_lr: 0.5, warmup: 0.0, weight_decay_end: null}}}}"]))


# what they have beside weights: a centre; a queue, a teacher, a layer that began later, running statistics
RESUMED = ["sdmae", "follower", "dino", *JOINT]
PARTED = ["sdmae", "follower"] # their losses can be worked off in parts


class Tiles:
    "Forty random tiles; stands for a TileStore."
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    def batch(self, rows): return self.images[torch.as_tensor(rows)]


class Recorded(Trainer):
    "Keeps each step's loss, and is broken off before step `stop`."
    losses, stop = (), None
    def averaged(self, losses):
        mean = super().averaged(losses)
        self.losses = (*self.losses, float(mean["loss"]))
        return mean
    def train_step(self, batch):
        if self.step == self.stop: raise KeyboardInterrupt
        return super().train_step(batch)


def build(name):
    "A method from its seed, and its optimiser's parameters."
    if name == "follower": torch.manual_seed(0); return Follower(), Follower.optim
    method = method_of(PARAMS, name)
    return widened(method) if name in JOINT else method, method_params(PARAMS, name).optim


def widened(method):
    "The method in float64, its views as they are drawn. BatchNorms of few small images make much of any rounding; what is left in float64 would be a fault."
    for name in ("large", "small"):
        drawn = getattr(method, name)
        setattr(method, name, lambda images, drawn=drawn: [v.double() for v in drawn(images)])
    return method.double()


def steps_of(name): return 10 if name in JOINT else 50
def break_of(name): return 7 if name in JOINT else 28 # in the middle of an epoch


def run(name, stop=None, accumulate=1, **kwargs):
    "All steps in batches of eight: the state of the method, each step's loss."
    model, optim = build(name)
    torch.manual_seed(0)
    t = Recorded(model, Batches(Tiles(), np.arange(40), 8, accumulate=accumulate), optim, 10, CPU, accumulate=accumulate, steps=steps_of(name), **kwargs)
    t.stop = stop
    t.fit()
    return dict(state=model.state_dict(), losses=t.losses)


class Toy(torch.nn.Module):
    "No draws, and a weight that gets no gradient."
    def __init__(self): super().__init__(); self.used, self.unused = (torch.nn.Linear(3, 1) for _ in range(2))
    def forward(self, images): return dict(loss=(self.used(images.float().mean((2, 3))/255) - 1).square().mean())


def toy(**kwargs):
    torch.manual_seed(0)
    model = Toy()
    Trainer(model, Batches(Tiles(), np.arange(40), 8), OptimParams(base_lr=1., weight_decay=0.5), 3, CPU, **kwargs).fit()
    return model.state_dict()


class Broken(Toy):
    "Its loss is not a number in the last process alone."
    def forward(self, images): return dict(loss=super().forward(images)["loss"]*(float("nan") if dist.get_rank() else 1))


class Count(Callback):
    def __init__(self): self.epochs = 0
    def after_epoch(self, trainer): self.epochs += 1; return dict(seen=self.epochs)


def told(f):
    "What an error says."
    try: f()
    except Exception as e: return f"{type(e).__name__}: {e}"


def both(value):
    "The values of the two processes."
    values = [None]*2
    dist.all_gather_object(values, value)
    return values


def search(out):
    "A search of the rate of which one trial is not finite: what it found. Checkpoints come after every step, which is when the first process would see it first."
    values = compose(["only=tissue", "data.tissue.image_size=32", "model.embed_dim=24", "model.depth=2", "model.num_heads=2", "pretrain.tissue.batch_size=4", "device=cpu", "precision=float32"])
    values["pretrain"]["tissue"] |= dict(checkpoint_minutes=0, search=dict(factors=[1, 1e30], share=0.5))
    P, tiles = parse_params(values), out/"tiles"
    if rank_and_world()[0] == 0: noise_tiles(tiles, P.data["tissue"])
    if dist.is_initialized(): dist.barrier()
    r = pretrain.Run(P, "mae", 0, pretrain.open_store(tiles), CPU, None, dict(method="mae", seed=0), out/"searched")
    return pretrain.searched(r, 22)[1]["search"]


def norms():
    "BatchNorms of every kind that a network may have, and rows for them."
    torch.manual_seed(0)
    made = [nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False), nn.BatchNorm2d(5, momentum=None), BatchNormAct2d(5), nn.BatchNorm2d(5, track_running_stats=False), nn.Sequential(nn.BatchNorm2d(5).eval())]
    return [(m.double(), torch.randn(8, *((5, 3, 2) if i > 1 else (5,)), dtype=torch.float64)*3 + i) for i, m in enumerate(made)]


def norm_alike(m, x, share):
    "Two steps of one norm on `x`, in this process its rows: outputs, gradients, running statistics."
    torch.manual_seed(1)
    weights, (rank, world), found = torch.randn(x.shape, dtype=torch.float64), rank_and_world(), []
    if share: share_batchnorm(m)
    for scale in (1., 2.):
        rows = (scale*x).chunk(world)[rank].clone().requires_grad_()
        y = m(rows); ((y**3)*weights.chunk(world)[rank]).sum(dim=0).mean().backward()
        found += [gather(y.detach()), gather(rows.grad)]
    mean = lambda g: sum(both(g)) if world > 1 else g # of the sums over rows that each process has
    return found + [mean(p.grad) for p in m.parameters()] + [b.double() for b in m.buffers()]


def rows_and_means():
    "What losses do with rows and means of all processes: one gradient that goes two ways, an answer used twice, a loss of the own rows."
    rank, world = rank_and_world()
    a, b, c, d = (torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).chunk(world)[rank].clone().requires_grad_() for i in range(4))
    u, v, w, x = (gather(o) for o in (a, b, c, d))
    m, n, o, p = (mean_of_all(o.mean(0)) for o in (a, b, c, d))
    two_ways, whole = ((u + v)**3).sum() + ((m + n)**3).sum(), (w.T @ x).square().sum() + (o @ p)**3
    own = ((c @ w.T).softmax(1)*(o @ p)).square().sum(1).mean()
    (two_ways + whole + own).backward()
    return [gather(o.grad)/world for o in (a, b, c, d)] + [w.detach(), p.detach()] # the engine takes the mean over the processes


def program(out):
    "What torchrun runs."
    seen = {name: run(name) for name in METHODS}
    for name in RESUMED:
        file = out/f"{name}.pt"
        try: run(name, stop=break_of(name), checkpoint=file, checkpoint_minutes=0)
        except KeyboardInterrupt: pass
        dist.barrier()
        if dist.get_rank() == 0: shutil.copy(file, out/f"{name}_interrupted.pt")
        seen[f"{name} resumed"] = run(name, checkpoint=file)
        seen[f"{name} left"] = file.exists()
    seen["toy"] = toy(accumulate=2)
    seen["rows and means"], seen["norms"] = rows_and_means(), [norm_alike(m, x, True) for m, x in norms()]
    for name in PARTED: seen[f"{name} parts"] = run(name, accumulate=2)
    b = Batches(Tiles(), np.arange(40), 8)
    seen["rows"] = both([b.rows(3, i).tolist() for i in range(len(b))])
    counts = Count()
    toy(callbacks=(counts,))
    seen["counts"] = both(counts.epochs)
    t = Trainer(Toy(), b, OptimParams(base_lr=1.), 1, CPU, checkpoint=out/"none.pt")
    t.step = dist.get_rank()
    broken = Trainer(Broken(), b, OptimParams(base_lr=1.), 2, CPU)
    last = Trainer(Toy(), b, OptimParams(base_lr=1e45), 1, CPU, steps=1, checkpoint=out/"last.pt")
    seen["search"], seen["last"] = both(search(out)), both([told(last.fit), (out/"last.pt").exists()])
    seen["errors"] = both([told(lambda: Batches(Tiles(), np.arange(40), 9)), told(lambda: Batches(Tiles(), np.arange(40), 8, accumulate=8)), told(t.fit), told(broken.fit), told(lambda: augment.rand_augment(Tiles.images/255, "rand-m9"))])
    if dist.get_rank() == 0: torch.save(seen, out/"seen.pt")


if __name__ == "__main__":
    with pretrain.process_group(CPU): program(Path(sys.argv[1]))
    sys.exit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, out], cwd=ROOT, capture_output=True, text=True, timeout=900,
                       env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)))
    assert r.returncode == 0, r.stderr[-6000:]
    return out


@pytest.fixture(scope="module")
def two(folder): return torch.load(folder/"seen.pt")


@pytest.fixture(scope="module")
def one(): return {name: run(name) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_follow_one(name, one, two):
    "Steps of real views and masks, fifty in float32 or ten in float64: each step's loss, and the weights in the end."
    assert len(one[name]["losses"]) == len(two[name]["losses"]) == steps_of(name)
    assert np.abs(np.subtract(one[name]["losses"], two[name]["losses"])).max() <= (1e-9 if name in JOINT else 1e-5)
    for k, v in one[name]["state"].items(): assert torch.allclose(v, two[name]["state"][k], rtol=0, atol=1e-9 if name in JOINT else 1e-4), k


@pytest.mark.parametrize("name", JOINT)
def test_the_state_of_joint_methods_moves(name, two):
    "So that what is compared above is compared at all: weights, queue, key network, prototypes, centre, teacher, running statistics."
    fresh = build(name)[0].state_dict()
    still = {k for k, v in two[name]["state"].items() if torch.equal(v, fresh[k])}
    assert still == {k for k in fresh if k.endswith("pos_embed") or name == "moco_v3" and "patch_embed" in k or k.endswith("prototypes.weight_g")}
    assert all(v.dtype in (torch.float64, torch.long) for v in fresh.values())


def test_the_centre_is_that_of_the_whole_batch(one, two):
    for name in ("sdmae", "sdmae_momentum"):
        a, b = (o[name]["state"]["center"] for o in (one, two))
        assert a.norm() > 0.1 and torch.allclose(a, b, atol=1e-6), name


def test_a_head_with_momentum_follows_in_two_processes_too(one, two):
    fresh = build("sdmae_momentum")[0].state_dict()
    assert not any(torch.equal(v, fresh[k]) for k, v in two["sdmae_momentum"]["state"].items() if k.startswith("teacher_head") and not k.endswith("bias")), "it follows the student"


def alike(a, b): return len(a) == len(b) > 0 and all(torch.allclose(x, y, rtol=0, atol=1e-12) for x, y in zip(a, b))


def test_gradients_through_rows_and_means_of_all_processes(two):
    assert alike(rows_and_means(), two["rows and means"])


def test_batchnorm_over_processes_is_torchs_over_the_batch(two):
    "Answers, gradients and running statistics, of norms that forget by a mean, that keep none, that have an activation, and of one at rest."
    for (m, x), shared in zip(norms(), two["norms"], strict=True): assert alike(norm_alike(m, x, False), shared), m


def test_accumulating_in_two_processes_is_the_step_of_one(two):
    for k, v in toy().items(): assert torch.allclose(v, two["toy"][k], atol=1e-6), k


@pytest.mark.parametrize("name", PARTED)
def test_every_part_of_a_batch_is_that_of_one(name, two):
    "Batches worked off in two parts, with real views and masks: each step's loss, and what is kept from step to step."
    alone, shared = run(name, accumulate=2), two[f"{name} parts"]
    assert np.abs(np.subtract(alone["losses"], shared["losses"])).max() <= 1e-5
    for k in ("center", "queue"): assert k not in alone["state"] or torch.allclose(alone["state"][k], shared["state"][k], atol=1e-5)


def test_a_queue_and_a_teacher_are_those_of_one_process(one, two):
    "The queue holds the answers of the whole batch in its order; the teacher has followed, and the late layer has learned."
    fresh = build("follower")[0].state_dict()
    for k in ("queue", "teacher.0.weight", "last.weight"):
        a, b = (o["follower"]["state"][k] for o in (one, two))
        assert not torch.allclose(a, fresh[k], atol=1e-3) and torch.allclose(a, b, atol=1e-5), k


def test_every_row_once_an_epoch(two):
    a, b = two["rows"]
    whole = Batches(Tiles(), np.arange(40), 8)
    assert sorted(sum(a + b, [])) == list(range(40))
    assert [x + y for x, y in zip(a, b)] == [whole.rows(3, i).tolist() for i in range(len(whole))]


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_in_two_processes(name, two):
    "To the last bit, after a checkpoint in the middle of an epoch; the complete one is left."
    whole, resumed = two[name], two[f"{name} resumed"]
    assert len(resumed["losses"]) == steps_of(name) - break_of(name) and resumed["losses"] == whole["losses"][break_of(name):] and two[f"{name} left"]
    for k, v in whole["state"].items(): assert torch.equal(v, resumed["state"][k]), k


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_in_one_process(name, one, folder):
    "Two processes' checkpoint goes on in one."
    resumed = run(name, checkpoint=folder/f"{name}_interrupted.pt")
    assert np.abs(np.subtract(resumed["losses"], one[name]["losses"][break_of(name):])).max() <= (1e-9 if name in JOINT else 1e-5)


def test_only_the_first_process_watches(two):
    assert two["counts"] == [3, 0]


def test_what_processes_refuse(two):
    for batches, parts, steps, loss, policy in two["errors"]:
        assert batches == "ValueError: pretrain.batch_size 9 is not divisible by 2 processes: change one of them"
        assert parts == "ValueError: pretrain.batch_size 8 is not divisible by 2 processes times pretrain.accumulate 8: change one of them"
        assert "would go on from steps [0, 1]" in steps and "none.pt must lie on a disk that all machines share" in steps
        assert loss.startswith("FloatingPointError") and "the loss is nan and the norm of the gradient" in loss and "in step 1 of 10 (epoch 1)" in loss
        assert "set pretrain.num_processes to 1" in policy


def test_a_trial_that_diverges_ends_in_all_processes_at_once(two, tmp_path):
    a, b = two["search"]
    alone = search(tmp_path)
    assert a == b and a["score"][1] is None and a["score"][0] == pytest.approx(alone["score"][0], abs=0.11) and a["chosen"] == alone["chosen"]
    for said, kept in two["last"]: assert "is not finite after step 1 of 1" in said and not kept


def test_the_first_error_reaches_the_notebook(capfd):
    with pytest.raises(RuntimeError, match="in 2 processes stopped. FileNotFoundError: .*nowhere.yaml does not exist"): pretrain.launch(2, params="nowhere.yaml", encoder="mae")


def test_a_killed_process_is_told(tmp_path):
    assert "run out of memory" in pretrain.first_error(tmp_path/"none.json")


def test_each_process_takes_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", int(rank)) and pick_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "2"); monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RuntimeError, match="cuda:2 was asked for, but torch sees 2 of them.*no more processes than GPUs"): pick_device("auto")
    with pytest.raises(ValueError, match="cuda:0 is one GPU, for 3 processes; use device: cuda"), pretrain.process_group(torch.device("cuda:0")): pass


def with_processes(n, **more):
    "The parameters with a number of processes."
    values = compose(["only=tissue"])
    values["pretrain"]["tissue"]["num_processes"] = n
    return parse_params(values | more)


def test_how_many_processes(monkeypatch):
    def asked(n, device="auto", encoder="mae"): return pretrain.num_processes(with_processes(n, device=device), encoder)
    assert asked("auto", "cpu") == 1 and asked(4) == 4 and asked(4, encoder="random") == 1
    with pytest.raises(ValueError, match="pretrain.tissue: batch_size 16 is not divisible by num_processes 3"): asked(3)
    with pytest.raises(ValueError, match="pretrain.tissue.num_processes"): asked(0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert asked("auto") == 8 and asked("auto", "cuda:1") == 1


def test_the_number_of_processes_is_no_part_of_a_run(tmp_path):
    "Nor is it what a stage depends on."
    class Store: manifest = dict(name="noise", sha256="0")
    configs = [pretrain.run_config(with_processes(n), "mae", 0, Store(), CPU, None) for n in (1, 2)]
    assert configs[0] == configs[1] and "num_processes" not in str(configs)
    assert made_of_encoder(with_processes(1), "mae") == made_of_encoder(with_processes(2), "mae")
