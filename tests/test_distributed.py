"""Two processes on CPU against one. torchrun runs this file once, as a program, for all checks that need two;
what its processes saw is compared here with what one process sees."""
import os, shutil, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
import torch.distributed as dist

import sdmae.pipeline.pretrain as pretrain
import sdmae.views.augment as augment
from sdmae.methods.registry import method_of, method_params
from sdmae.params import OptimParams, compose, parse_params
from sdmae.train.batches import Batches
from sdmae.train.engine import Callback, Trainer, pick_device
from sdmae.pipeline.ingredients import made_of_encoder
from toys import Follower

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
METHODS = ["mae", "sdmae", "sdmae_momentum", "miram", "follower", "dino"]
PARAMS = parse_params(compose(["only=tissue", "data.tissue.image_size=32", "model.embed_dim=24", "model.depth=2", "model.num_heads=2", "+encoder.miram={of: mae, method: miram}",
                               "encoder.mae.views={of: tissue, color_jitter: 0.3, hue: 0.05, jitter_probability: 0.8, grayscale: 0.2, hed_jitter: 0.05, fields: [1.0, 0.5]}",
                               "+encoder.sdmae_momentum={of: sdmae, detach_teacher: true, center_on: logits, teacher_momentum: 0.9}",
                               "+encoder.dino={data: tissue, pretrain: tissue, method: dino, head: {hidden_dim: 16, bottleneck_dim: 8, out_dim: 12}, teacher_momentum: 0.9, freeze_last_layer: 0.1, "
                               "local_crops: 1, local_size: 16, optim: {base_lr: 0.1, clip_norm: 3.0, weight_decay_end: 0.4}}"]))


RESUMED = ["sdmae", "follower", "dino"] # what they have beside weights: a centre; a queue, a teacher, a layer that began later
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
    return method_of(PARAMS, name), method_params(PARAMS, name).optim


def run(name, stop=None, accumulate=1, **kwargs):
    "Fifty steps in batches of eight: the state of the method, each step's loss."
    model, optim = build(name)
    torch.manual_seed(0)
    t = Recorded(model, Batches(Tiles(), np.arange(40), 8, accumulate=accumulate), optim, 10, CPU, accumulate=accumulate, **kwargs)
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


def program(out):
    "What torchrun runs."
    seen = {name: run(name) for name in METHODS}
    for name in RESUMED:
        file = out/f"{name}.pt"
        try: run(name, stop=28, checkpoint=file, checkpoint_minutes=0)
        except KeyboardInterrupt: pass
        dist.barrier()
        if dist.get_rank() == 0: shutil.copy(file, out/f"{name}_interrupted.pt")
        seen[f"{name} resumed"] = run(name, checkpoint=file)
        seen[f"{name} left"] = file.exists()
    seen["toy"] = toy(accumulate=2)
    for name in PARTED: seen[f"{name} parts"] = run(name, accumulate=2)
    b = Batches(Tiles(), np.arange(40), 8)
    seen["rows"] = both([b.rows(3, i).tolist() for i in range(len(b))])
    counts = Count()
    toy(callbacks=(counts,))
    seen["counts"] = both(counts.epochs)
    t = Trainer(Toy(), b, OptimParams(base_lr=1.), 1, CPU, checkpoint=out/"none.pt")
    t.step = dist.get_rank()
    broken = Trainer(Broken(), b, OptimParams(base_lr=1.), 2, CPU)
    seen["errors"] = both([told(lambda: Batches(Tiles(), np.arange(40), 9)), told(lambda: Batches(Tiles(), np.arange(40), 8, accumulate=8)), told(t.fit), told(broken.fit), told(lambda: augment.rand_augment(Tiles.images/255, "rand-m9"))])
    if dist.get_rank() == 0: torch.save(seen, out/"seen.pt")


if __name__ == "__main__":
    with pretrain.process_group(CPU): program(Path(sys.argv[1]))
    sys.exit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, out], cwd=ROOT, capture_output=True, text=True,
                       env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)))
    assert r.returncode == 0, r.stderr[-6000:]
    return out


@pytest.fixture(scope="module")
def two(folder): return torch.load(folder/"seen.pt")


@pytest.fixture(scope="module")
def one(): return {name: run(name) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_follow_one(name, one, two):
    "Fifty steps of real views and masks in float32: each step's loss, and the weights in the end."
    assert len(one[name]["losses"]) == len(two[name]["losses"]) == 50
    assert np.abs(np.subtract(one[name]["losses"], two[name]["losses"])).max() <= 1e-5
    for k, v in one[name]["state"].items(): assert torch.allclose(v, two[name]["state"][k], atol=1e-4), k


def test_the_centre_is_that_of_the_whole_batch(one, two):
    for name in ("sdmae", "sdmae_momentum"):
        a, b = (o[name]["state"]["center"] for o in (one, two))
        assert a.norm() > 0.1 and torch.allclose(a, b, atol=1e-6), name


def test_a_head_with_momentum_follows_in_two_processes_too(one, two):
    fresh = build("sdmae_momentum")[0].state_dict()
    assert not any(torch.equal(v, fresh[k]) for k, v in two["sdmae_momentum"]["state"].items() if k.startswith("teacher_head") and not k.endswith("bias")), "it follows the student"


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
    "To the last bit, after the checkpoint of step 28 in the middle of an epoch; the complete one is left."
    whole, resumed = two[name], two[f"{name} resumed"]
    assert len(resumed["losses"]) == 50 - 28 and resumed["losses"] == whole["losses"][28:] and two[f"{name} left"]
    for k, v in whole["state"].items(): assert torch.equal(v, resumed["state"][k]), k


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_in_one_process(name, one, folder):
    "Two processes' checkpoint goes on in one."
    resumed = run(name, checkpoint=folder/f"{name}_interrupted.pt")
    assert np.abs(np.subtract(resumed["losses"], one[name]["losses"][28:])).max() <= 1e-5


def test_only_the_first_process_watches(two):
    assert two["counts"] == [3, 0]


def test_what_processes_refuse(two):
    for batches, parts, steps, loss, policy in two["errors"]:
        assert batches == "ValueError: pretrain.batch_size 9 is not divisible by 2 processes: change one of them"
        assert parts == "ValueError: pretrain.batch_size 8 is not divisible by 2 processes times pretrain.accumulate 8: change one of them"
        assert "would go on from steps [0, 1]" in steps and "none.pt must lie on a disk that all machines share" in steps
        assert loss.startswith("FloatingPointError") and "the loss is nan and the norm of the gradient" in loss and "in step 1 of 10 (epoch 1)" in loss
        assert "set pretrain.num_processes to 1" in policy


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
