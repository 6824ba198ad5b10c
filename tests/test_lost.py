"Nothing is lost: damaged checkpoints, numbers that are not finite, full disks, two processes at once, kills; and what is the same again."
import json, subprocess, sys, time, warnings
from functools import partial
from pathlib import Path

import numpy as np, psutil, pytest, torch
from safetensors.torch import load_file

import kills
from sdmae.data.store import prepare
from sdmae.files import Busy, only_one, recover, whole
from sdmae.made import circumstances
from sdmae.params import OptimParams
from sdmae.pipeline.sweep import sweep
from sdmae.report.provenance import circumstances_of
from sdmae.train import checkpoint, engine
from sdmae.train.batches import Batches
from sdmae.train.checkpoint import before, load_checkpoint, read_checkpoint
from sdmae.train.engine import Callback, Trainer

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


class Tiles:
    "Twenty-four tiles; stands for a TileStore."
    images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    def batch(self, rows): return self.images[torch.as_tensor(rows)]


class Net(torch.nn.Module):
    "A linear map whose loss is not finite from a given step on."
    def __init__(self, bad=None):
        super().__init__()
        self.w, self.bad, self.calls = torch.nn.Linear(192, 4), bad, 0
    def forward(self, images):
        self.calls += 1
        loss = (self.w(images.flatten(1).float()/255) - 1).square().mean()
        return dict(loss=loss*(float("nan") if self.bad and self.calls >= self.bad else 1))


class Stop(Callback):
    def __init__(self, epoch): self.epoch = epoch
    def after_epoch(self, trainer):
        if trainer.history[-1]["epoch"] == self.epoch: raise KeyboardInterrupt


def trainer(path, bad=None, epochs=4, callbacks=(), optim=None, **kwargs):
    torch.manual_seed(0)
    return Trainer(Net(bad), Batches(Tiles(), np.arange(24), 8), optim or OptimParams(base_lr=1e-2), epochs, CPU, callbacks=callbacks, checkpoint=path, checkpoint_minutes=0, **kwargs)


def interrupted(path, epoch=2, **kwargs):
    with pytest.raises(KeyboardInterrupt): trainer(path, callbacks=(Stop(epoch),), **kwargs).fit()
    return path


# Damaged checkpoints

def test_no_flipped_bit_gives_other_weights(tmp_path):
    "Of each flip the file is refused, or what it holds is what was saved: one bit at a time, all over the file."
    path = interrupted(tmp_path/"c.pt")
    whole_file, wanted, rng, refused = path.read_bytes(), read_checkpoint(path), np.random.default_rng(0), 0
    for at in rng.integers(0, 8*len(whole_file), 150):
        data = bytearray(whole_file); data[at//8] ^= 1 << at % 8
        path.write_bytes(data)
        try: found = read_checkpoint(path)
        except ValueError as e: refused += 1; assert "delete it to start again" in str(e)
        else: assert checkpoint.content(found).hexdigest() == checkpoint.content(wanted).hexdigest()
    assert refused > 50


@pytest.mark.parametrize("damage", [lambda d: d[:len(d)//2], lambda d: b"", lambda d: d[:2000] + bytes(200) + d[2200:]])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, tmp_path):
    "The run ends as if nothing had been, and the damaged file is kept aside."
    path = interrupted(tmp_path/"c.pt")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="c.pt is damaged; going on from the one before it, of step 4"): resumed = trainer(path); history = resumed.fit()
    undisturbed = trainer(None); assert [r["loss"] for r in undisturbed.fit()] == [r["loss"] for r in history]
    assert all(torch.equal(a, b) for a, b in zip(undisturbed.model.state_dict().values(), resumed.model.state_dict().values()))
    assert path.with_suffix(".damaged").exists()


def test_both_damaged_is_an_error_that_keeps_them(tmp_path):
    path = interrupted(tmp_path/"c.pt")
    for p in (path, before(path)): p.write_bytes(b"PK")
    with pytest.raises(ValueError, match="c.pt cannot be resumed.*delete it to start again"): trainer(path).fit()
    assert path.read_bytes() == before(path).read_bytes() == b"PK"


def rewritten(path, change):
    "A checkpoint whose content was changed by somebody who also made its checksum anew."
    state = read_checkpoint(path)
    change(state)
    torch.save(state | dict(sha256=checkpoint.content(state).hexdigest()), path)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.update(step=10**6), "step 1000000 with 1 epochs, in a run of 12 steps"),
    (lambda s: s.update(step=9), "step 9 with 1 epochs"),
    (lambda s: s.update(model={k: v.half() for k, v in s["model"].items()}), "w.weight is torch.float16, here torch.float32"),
    (lambda s: s["model"].update({"w.weight": torch.full((4, 192), float("nan"))}), "w.weight is not finite"),
    (lambda s: s["made_of"]["training"].update(epochs=40), "made of something else: training.epochs: 40 → 4"),
    (lambda s: s["made_of"]["training"]["batches"].update(seed=1), "training.batches.seed: 1 → 0"),
    (lambda s: s.pop("rng"), "cannot be resumed")])
def test_a_checkpoint_of_another_run_is_refused(change, message, tmp_path):
    path = interrupted(tmp_path/"c.pt")
    rewritten(path, change); before(path).unlink()
    with pytest.raises(ValueError, match=message): trainer(path).fit()
    assert path.exists()


def test_a_checkpoint_of_other_tiles_is_refused(tmp_path):
    path, t = interrupted(tmp_path/"c.pt"), trainer(None)
    t.batches, t.checkpoint = Batches(Tiles(), np.arange(1, 24), 8), path
    with pytest.raises(ValueError, match="another training.batches.rows"): load_checkpoint(path, t)


# A finished run is not lost

def test_what_fails_after_the_last_step_costs_no_step(tmp_path):
    "A callback fails at the end, as a plot may; the second start trains nothing and ends as the first would have."
    class Broken(Callback):
        def after_fit(self, trainer): raise OSError("no space left on device")
    with pytest.raises(OSError): trainer(tmp_path/"c.pt", callbacks=(Broken(),)).fit()
    again = trainer(tmp_path/"c.pt"); history = again.fit()
    assert again.model.calls == 0 and [r["loss"] for r in history] == [r["loss"] for r in trainer(None).fit()]


def test_a_full_disk_is_a_warning(tmp_path, monkeypatch):
    "Of intermediate checkpoints and of the last; the numbers are those of an undisturbed run, and no half file is left."
    def full(state, path): Path(path).write_bytes(b"half"); raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="checkpoint of step 3 could not be saved"): history = trainer(tmp_path/"c.pt").fit()
    assert [r["loss"] for r in history] == [r["loss"] for r in trainer(None).fit()]
    assert [p.name for p in tmp_path.iterdir() if "lock" not in p.name and ".by" not in p.name] == []


def test_a_failed_save_keeps_the_one_before(tmp_path, monkeypatch):
    path = interrupted(tmp_path/"c.pt"); step = read_checkpoint(path)["step"]
    def full(*a): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
        warnings.simplefilter("ignore"); m.setattr(torch, "save", full); trainer(path, callbacks=(Stop(3),)).fit()
    assert read_checkpoint(path)["step"] == step and trainer(path).fit()


# Numbers that are not finite

@pytest.mark.parametrize("bad", [2, 5, 12])
def test_nan_ends_the_run_and_the_last_good_checkpoint_stays(bad, tmp_path):
    "Whichever step it is, in the middle of an epoch or the last; no file holds such weights."
    with pytest.raises(FloatingPointError, match=rf"the loss is nan and the norm of the gradient nan in step {bad} of 12 \(epoch {(bad-1)//3 + 1}\), at learning rate .*its images: row \d+.*Lower base_lr"):
        trainer(tmp_path/"c.pt", bad=bad).fit()
    good = read_checkpoint(tmp_path/"c.pt")
    assert good["step"] == bad - 1 and all(v.isfinite().all() for v in good["model"].values())
    assert len(trainer(tmp_path/"c.pt").fit()) == 4, "a run whose data were mended goes on"


def test_weights_that_overflow_are_not_saved(tmp_path):
    "The loss is finite in every step; the optimiser's last step is too long for a float."
    class Long(Callback):
        def after_epoch(self, trainer): trainer.model.w.weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="w.weight is not finite after step 3 of 12.*The last good checkpoint stays"): trainer(tmp_path/"c.pt", callbacks=(Long(),)).fit()
    assert read_checkpoint(tmp_path/"c.pt")["step"] == 2


def test_nan_is_seen_within_an_epoch(monkeypatch):
    "Without a checkpoint, too: within so many steps."
    monkeypatch.setattr(engine, "LOOK_EVERY", 4)
    torch.manual_seed(0)
    t = Trainer(Net(bad=6), Batches(Tiles(), np.arange(24), 1), OptimParams(base_lr=1e-2), 2, CPU)
    with pytest.raises(FloatingPointError, match="in step 6 of 48"): t.fit()
    assert t.model.calls == 8


# One process

HOLD = "import sys, time; from sdmae.files import only_one\nwith only_one(sys.argv[1], ''): print('held', flush=True); time.sleep(60)"

def test_a_second_process_waits_and_then_says_who_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "only_one", partial(only_one, wait=0.1))
    p = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path/"c.lock"], stdout=subprocess.PIPE, cwd=ROOT); p.stdout.readline()
    with pytest.raises(Busy, match=f"c.pt is being written by process {p.pid} on .*Wait until it has ended, or end it"): trainer(tmp_path/"c.pt").fit()
    p.kill(); p.wait(); p.stdout.close()
    assert len(trainer(tmp_path/"c.pt").fit()) == 4, "a killed process holds nothing"


def test_files_are_whole_or_not_there(tmp_path):
    "A process is killed while it writes, before and between the renames of a folder; the next one cleans up."
    write = "import os, sys; from pathlib import Path; from sdmae.files import whole\nwith whole(Path(sys.argv[1])) as p: p.mkdir(); (p/'a').write_text('new'); os.kill(os.getpid(), 9)"
    (tmp_path/"run").mkdir(); (tmp_path/"run"/"a").write_text("old")
    assert subprocess.run([sys.executable, "-c", write, tmp_path/"run"], cwd=ROOT).returncode == -9
    assert (tmp_path/"run"/"a").read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    (tmp_path/"run").rename(tmp_path/".run.old")
    recover(tmp_path/"run")
    assert (tmp_path/"run"/"a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with whole(tmp_path/"run") as p: p.mkdir(); (p/"b").write_text("new")
    assert [o.name for o in (tmp_path/"run").iterdir()] == ["b"] and len(list(tmp_path.iterdir())) == 1


def test_a_run_that_goes_on_elsewhere_names_both_places(tmp_path):
    "What it was begun under is in its result, and the report says it."
    places = [circumstances("cpu") | dict(threads=n) for n in (1, 2)]
    first, second = trainer(tmp_path/"c.pt", callbacks=(Stop(2),)), trainer(tmp_path/"c.pt")
    first.under, second.under = places
    with pytest.raises(KeyboardInterrupt): first.fit()
    second.fit()
    assert second.under["threads"] == 2 and [o["threads"] for o in second.under["begun"]] == [1]
    assert circumstances_of({"MAE": second.under})["threads"] == "1 thread, then 2 threads" and "then" not in circumstances_of({"MAE": second.under})["device"]


# Checkpoints of results that are safe

def test_what_is_swept_leaves_nothing_and_an_encoder_taken_out_keeps_no_others_there(tmp_path):
    "DVC's own answers, of two stages of which params.yaml has one no more: its checkpoint stays, for nobody can say that its result is safe."
    def dvc(*args): subprocess.run([sys.executable, "-m", "dvc", *args], cwd=tmp_path, check=True, capture_output=True)
    def stages(*names): (tmp_path/"dvc.yaml").write_text(json.dumps(dict(stages={o: dict(cmd=f"{sys.executable} make.py {o}", outs=[f"runs/{o}"]) for o in names})))
    (tmp_path/"make.py").write_text("import json, sys, pathlib\np = pathlib.Path('runs', sys.argv[1]); p.mkdir(parents=True); (p/'made.json').write_text(json.dumps(dict(checkpoints=['x.pt'])))")
    dvc("init", "--no-scm"); stages("a", "b"); dvc("repro"); stages("a")
    for o in "ab":
        (folder := tmp_path/"checkpoints"/"runs"/o).mkdir(parents=True)
        for name in ("x.pt", "x.before"): (folder/name).write_text("")
        with only_one(folder/"x.lock", ""): pass # as a training does
    sweep(tmp_path)
    assert sorted(str(p.relative_to(tmp_path/"checkpoints")) for p in (tmp_path/"checkpoints").rglob("x.[pb]*")) == ["runs/b/x.before", "runs/b/x.by", "runs/b/x.pt"]
    assert not (tmp_path/"checkpoints"/"runs"/"a").exists()


# Kills

def test_kills_change_nothing():
    "A few, of SD-MAE; `python tests/kills.py` has two hundred, of everything."
    facts, = subprocess_kills(5, "sdmae").values()
    assert facts["kills"] == 5 and not facts["different"] and not facts["failed"], facts


SLOW = """import sys; sys.path.insert(0, 'tests'); import kills, time; from pathlib import Path; from functools import partial; from sdmae.data.store import prepare
d = Path(sys.argv[1]); source, P = kills.world(d, 1)
for r in source.records: object.__setattr__(r, 'read', partial(time.sleep, 60))
prepare(source, d/'tiles', P.data['tissue'], 2)"""

def test_workers_end_with_a_killed_preparation(tmp_path):
    "They would wait for work for ever; and what was begun is cleaned up by the next preparation."
    p = subprocess.Popen([sys.executable, "-c", SLOW, tmp_path], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (workers := psutil.Process(p.pid).children()): assert p.poll() is None; time.sleep(0.05)
    time.sleep(0.5); p.kill(); p.wait()
    assert psutil.wait_procs(workers, timeout=10)[1] == [] and len(list(tmp_path.glob(".tiles.*.part"))) == 1
    source, P = kills.world(tmp_path, 1)
    prepare(source, tmp_path/"tiles", P.data["tissue"], 1)
    assert not list(tmp_path.glob(".*"))


def subprocess_kills(n, only=""):
    "In a process of their own, for it forks, and counts threads."
    code = f"import json, sys; sys.path.insert(0, {str(ROOT/'tests')!r}); import kills; print(json.dumps(kills.main({n}, only={only!r})))"
    r = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=kills.os.environ | dict(OMP_NUM_THREADS="1"))
    assert r.returncode == 0, r.stderr[-4000:]
    return kills.json.loads(r.stdout.splitlines()[-1])


@pytest.mark.slow
def test_two_hundred_kills_change_nothing():
    facts = subprocess_kills(200)
    assert sum(f["kills"] for f in facts.values()) == 200 and not any(f["different"] or f["failed"] for f in facts.values()), facts


# The same again

def test_exact_is_the_same_on_any_number_of_threads(tmp_path):
    "Pre-training, features and classifiers; in float32 the number of threads shows."
    code = """import sys, json, torch; sys.path.insert(0, 'tests'); from pathlib import Path; import kills, yaml
from sdmae.data.store import TileStore, prepare; from sdmae.pipeline.pretrain import pretrain; from sdmae.models.encoders import load_encoder
from sdmae.evaluate.features import extract; from sdmae.evaluate.linear import fit_linear
d = Path(sys.argv[1]); d.mkdir(); source, P = kills.world(d, 2)
values = yaml.safe_load((d/'params.yaml').read_text()); values['precision'] = sys.argv[2]; (d/'params.yaml').write_text(yaml.safe_dump(values))
prepare(source, d/'tiles', P.data['tissue'], 1)
pretrain(params=d/'params.yaml', tiles=d/'tiles', encoder='mae', out=d/'mae')
store = TileStore(d/'tiles'); model, config = load_encoder(d/'mae'); rows = {s: store.indices(s) for s in ('train', 'valid', 'test')}
x = {s: extract(model, store, i, config['mean'], config['std'], torch.device('cpu')) for s, i in rows.items()}
f = fit_linear(x['train'], store.targets(rows['train']).numpy(), x['valid'], store.targets(rows['valid']).numpy(), 2, [0.1, 1.])
print(json.dumps(f.predict_proba(x['test']).tolist()))"""
    def run(name, precision, threads):
        r = subprocess.run([sys.executable, "-c", code, tmp_path/name, precision], cwd=ROOT, capture_output=True, text=True, env=kills.os.environ | dict(OMP_NUM_THREADS=str(threads)))
        assert r.returncode == 0, r.stderr[-3000:]
        return r.stdout.splitlines()[-1], load_file(tmp_path/name/"mae"/"encoder"/"encoder.safetensors")
    (p, a), (q, b) = run("one", "exact", 1), run("two", "exact", 2)
    assert p == q and all(torch.equal(a[k], b[k]) for k in a)
