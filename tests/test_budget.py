"Equal budgets: what is held, what it costs, and that an interrupted training keeps the steps that it began with."
import json

import pytest, torch, yaml

from sdmae.data.store import TileStore
from sdmae.methods.registry import method_of, method_params
from sdmae.params import OptimParams, compose, parse_params, resolved
from sdmae.pipeline import pretrain as stage
from sdmae.pipeline.budget import count_flops, step_seconds
from sdmae.pipeline.plan import encoder_faults
from sdmae.train.batches import Batches
from sdmae.train.checkpoint import rng_state
from sdmae.train.engine import Callback, Trainer, lr_at
from toys import noise_tiles

CPU = torch.device("cpu")
SMALL = ["only=tissue", "data.tissue.image_size=32", "model.embed_dim=24", "model.depth=2", "model.num_heads=2", "pretrain.tissue.batch_size=8",
         "pretrain.tissue.watch_every=4", "device=cpu", "precision=float32"]


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return noise_tiles(tmp_path_factory.mktemp("tiles")/"tiles", parse_params(compose(SMALL)).data["tissue"])


def run(folder, tiles, encoder="mae", **held):
    "A pre-training with a budget: what it says of itself."
    values = compose(SMALL)
    values["pretrain"]["tissue"] |= dict(epochs=None) | held
    (folder/"params.yaml").write_text(yaml.safe_dump(values))
    stage.pretrain(folder/"params.yaml", encoder=encoder, out=folder/"run", tiles=tiles)
    return json.loads((folder/"run"/"made.json").read_text())


def test_one_budget_is_held_and_the_others_follow(tmp_path, tiles):
    made = run(tmp_path, tiles, images=100)
    assert (made["steps"], made["images"], made["epochs"]) == (12, 96, 6.0) and made["last"]["epoch"] == 6
    made = run(tmp_path, tiles, flops=made["flops"]*1.001)
    assert made["steps"] == 12
    assert run(tmp_path, tiles, epochs=3)["steps"] == 6


def test_minutes_are_about_kept(tmp_path, tiles):
    made = run(tmp_path, tiles, minutes=0.05)
    assert made["steps"] > 20 and 0.005 < made["minutes"] < 0.5 # others may use the machine


def test_operations_of_a_method_are_as_its_parts_say(tiles):
    "MAE without a class token: two blocks over the visible half, two narrow ones over all, whose last answers for hidden tokens alone, three maps."
    P = parse_params(compose([*SMALL, "encoder.mae.class_token=false"]))
    model, store = method_of(P, "mae"), TileStore(tiles)
    batch = (store.batch(store.indices("train")[:8]),)
    state = rng_state(CPU)
    counted = count_flops(model, batch, CPU)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), rng_state(CPU).values()) if torch.is_tensor(a))
    def block(n, d, asked=None): return 4*n*d*d + (asked or n)*(20*d*d + 4*n*d)
    d, D = 96, 24
    maps = 8*2*192*D + 8*2*D*d + 8*2*d*192
    expected = 3*(2*block(8, D) + block(16, d) + block(16, d, 8) + maps) - 8*2*192*D # backward twice the forward, but for pixels
    assert counted == pytest.approx(expected, rel=1e-9)


def test_a_search_takes_the_best_rate_of_validation_and_begins_anew(tmp_path, tiles, monkeypatch):
    seen = []
    def look(store, device, precision): return lambda model: dict(valid_knn_balanced_accuracy=[.2, .9, .4][len(seen) - 1])
    monkeypatch.setattr(stage, "feature_watch", look)
    real = stage.trial
    def noted(r, steps, planned, optim): seen.append((steps, optim.base_lr)); assert planned == 20; return real(r, steps, planned, optim)
    monkeypatch.setattr(stage, "trial", noted)
    made = run(tmp_path, tiles, epochs=10, search=dict(factors=[0.5, 2, 4], share=0.25))
    base = parse_params(compose(SMALL)).encoders["mae"].section["optim"]["base_lr"]
    assert seen == [(5, base*0.5), (5, base*2), (5, base*4)] and made["search"]["chosen"] == base*2 and made["search"]["score"] == [.2, .9, .4]
    assert made["last"]["lr"] < base and len(made["search"]["base_lr"]) == 3
    monkeypatch.undo()
    plain = run(tmp_path, tiles, epochs=10)
    values = compose([*SMALL, f"encoder.mae.optim.base_lr={base*2}", "pretrain.tissue.epochs=10"])
    (tmp_path/"params.yaml").write_text(yaml.safe_dump(values))
    stage.pretrain(tmp_path/"params.yaml", encoder="mae", out=tmp_path/"other", tiles=tiles)
    assert json.loads((tmp_path/"other"/"made.json").read_text())["last"]["loss"] == made["last"]["loss"] != plain["last"]["loss"]


def test_a_trial_that_diverges_is_out_and_all_of_them_are_an_error(tmp_path, tiles):
    made = run(tmp_path, tiles, epochs=4, search=dict(factors=[1, 1e30], share=0.5))
    assert made["search"]["score"][1] is None and made["search"]["score"][0] is not None
    with pytest.raises(FloatingPointError, match="no trial of the search was finite"):
        run(tmp_path, tiles, epochs=4, search=dict(factors=[1e29, 1e30], share=0.5))


@pytest.mark.parametrize("held, said", [
    (dict(minutes=1e-7), r"pretrain.minutes 1e-07 is less than one step"), (dict(images=7), "pretrain.images 7 is less than one step, which takes 8"),
    (dict(flops=10.), "pretrain.flops 10 is less than one step"), (dict(flops=None), "one of epochs, images, minutes, minutes_together, flops is needed"),
    (dict(minutes=1, images=5), "images and minutes: hold one of them equal"), (dict(epochs=1, search=dict(factors=[1])), "at least 2 items")])
def test_budgets_that_cannot_be(tmp_path, tiles, held, said):
    with pytest.raises(ValueError, match=said): run(tmp_path, tiles, **held)


def test_minutes_together_are_shared_out_equally_and_add_up():
    "Whatever the budget's own section is called: methods of another batch size draw on the same minutes."
    values = compose(["experiment=which"])
    P = parse_params(values)
    trained = [e for e in P.compare["tissue"].encoders if P.encoders[e].pretrain]
    minutes = [P.encoders[e].pretrain.minutes for e in trained]
    assert len(trained) == 6 and {resolved("encoder", P.encoder, e)["pretrain"] for e in trained} == {"tissue", "pairs"} and minutes == [10]*6
    values["seeds"] = [0, 1]; values["compare"]["tissue"]["encoders"] = ["random", "mae", "barlow"]
    assert parse_params(values).encoders["barlow"].pretrain.held == ("minutes", 15)
    values["pretrain"]["tissue"]["search"] = dict(factors=[1, 2], share=0.25)
    assert parse_params(values).encoders["mae"].pretrain.minutes == 10


class Stop(Callback):
    def __init__(self, epoch): self.epoch = epoch
    def after_epoch(self, trainer):
        if trainer.history[-1]["epoch"] == self.epoch: raise KeyboardInterrupt


def test_a_part_of_an_epoch_goes_on_as_if_nothing_had_happened(tmp_path, tiles):
    P = parse_params(compose([*SMALL]))
    store = TileStore(tiles)
    def train(callbacks=(), **kwargs):
        model = method_of(P, "mae"); torch.manual_seed(0)
        t = Trainer(model, Batches(store, store.indices("train"), 4), method_params(P, "mae").optim, 0, CPU, steps=13, callbacks=callbacks, **kwargs)
        return model.state_dict(), t.fit()
    whole, history = train()
    assert [r["epoch"] for r in history] == [1, 2, 3]
    for stop in (1, 2, 3):
        file = tmp_path/f"{stop}.pt"
        with pytest.raises(KeyboardInterrupt): train((Stop(stop),), checkpoint=file, checkpoint_minutes=0)
        state, again = train(checkpoint=file)
        assert all(torch.equal(a, state[k]) for k, a in whole.items()) and [r["loss"] for r in again] == [r["loss"] for r in history]


@pytest.mark.parametrize("search", [None, dict(factors=[0.5, 1], share=0.5)])
def test_steps_counted_once_stay(tmp_path, tiles, monkeypatch, search):
    "The second start measures nothing, though the machine is now slower: the checkpoints hold the count, those of a trial as well."
    held = dict(minutes=0.01, search=search, checkpoint_minutes=0)
    monkeypatch.setattr(stage, "step_seconds", lambda trainer: 0.06)
    real = stage.Trainer.log_epoch
    def breaks(self, epoch, *more):
        if self.step >= 4: raise KeyboardInterrupt
        return real(self, epoch, *more)
    monkeypatch.setattr(stage.Trainer, "log_epoch", breaks)
    with pytest.raises(KeyboardInterrupt): run(tmp_path, tiles, **held)
    monkeypatch.undo()
    monkeypatch.setattr(stage, "step_seconds", lambda trainer: 1/0)
    files = [f.name for f in tmp_path.rglob("*.pt")]
    assert len(files) == 1 and ("trial-" in files[0]) == bool(search) and not list(tmp_path.rglob("checkpoints/**/*.json"))
    made = run(tmp_path, tiles, **held)
    assert made["steps"] == 10 and sorted(made["checkpoints"]) == sorted(f.name for f in tmp_path.rglob("*.pt")) and len(made["checkpoints"]) == (3 if search else 1)


def test_steps_of_another_run_are_not_taken(tmp_path, tiles, monkeypatch):
    "Of another batch size they are counted anew; of damaged files the training itself tells."
    monkeypatch.setattr(stage, "step_seconds", lambda trainer: 0.06)
    assert run(tmp_path, tiles, minutes=0.01)["steps"] == 10
    monkeypatch.setattr(stage, "step_seconds", lambda trainer: 0.03)
    assert run(tmp_path, tiles, minutes=0.01, batch_size=4)["steps"] == 20 and run(tmp_path, tiles, minutes=0.01)["steps"] == 10
    for f in [o for end in ("pt", "before") for o in tmp_path.rglob(f"*.{end}")]: f.write_bytes(f.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot be resumed .* delete it to start again"): run(tmp_path, tiles, minutes=0.01)


@pytest.mark.parametrize("splits, label, watched", [
    (("train", "train", "valid", "test"), lambda i: "ab"[i//4%2], True), (("train", "train", "valid", "test"), lambda i: "ab"[i//4%2] if i%4 == 0 else "", False),
    (("train", "train", "valid", "test"), lambda i: "a" if i%4 == 2 else "ab"[i//4%2], False), (("train", "train", "valid", "test"), lambda i: "", False)])
def test_knn_is_watched_where_two_classes_are_on_both_sides(tmp_path, splits, label, watched):
    "Labels in training alone, or of one class in validation, leave RankMe, which a search then asks."
    tiles = noise_tiles(tmp_path/"tiles", parse_params(compose(SMALL)).data["tissue"], splits, label)
    made = run(tmp_path, tiles, epochs=4, watch_every=2, search=dict(factors=[0.5, 1], share=0.5))
    assert ("valid_knn_balanced_accuracy" in made["last"]) == watched and "rankme" in made["last"] and bool(made["labels"]) == watched
    assert made["search"]["by"] == ("kNN on validation" if watched else "RankMe on validation")


def test_a_step_is_timed_without_a_trace(tiles):
    P = parse_params(compose(SMALL)); store = TileStore(tiles)
    t = Trainer(method_of(P, "mae"), Batches(store, store.indices("train"), 8), method_params(P, "mae").optim, 0, CPU, steps=10**9)
    assert 1e-4 < step_seconds(t, least=3, seconds=0.) < 5


def test_schedule_in_steps_and_its_faults():
    o = OptimParams(base_lr=1., schedule="steps", warmup=0.1, milestones=[0.5, 0.75])
    assert [round(lr_at(s, 100, 1., o), 6) for s in (0, 9, 10, 49, 50, 74, 75, 99)] == [0.1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    for bad, said in ((dict(weight_decay=0., weight_decay_end=.4), "weight_decay_end"), (dict(nesterov=True), "nesterov is for name: sgd")):
        with pytest.raises(ValueError, match=said): OptimParams(base_lr=1., **bad)
