"""Kills at random moments: whatever is killed and started again leaves what an undisturbed run leaves, to the last bit.
`python tests/kills.py --kills 200` shares them out among pre-training by every method, fine-tuning, segmentation and preparation, and prints a table;
a process is forked for each attempt, so that a start costs no imports. The quick tests run it with a few kills, a slow one with two hundred."""
import argparse, hashlib, json, os, random, shutil, signal, sys, tempfile, time, traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml

from sdmae.data.records import Record, Source
from sdmae.data.store import TileStore, prepare
from sdmae.evaluate.finetune import fit_classifier, predict
from sdmae.evaluate.segment import fit_segmenter, predict_masks, segment_encoder
from sdmae.files import whole, write_json
from sdmae.models.encoders import load_encoder, save_encoder
from sdmae.params import FinetuneParams, OptimParams, SegmentParams, compose, load_params
from sdmae.pipeline.pretrain import pretrain
from sdmae.train.checkpoint import checkpoint_of

TRAINED = ("mae", "sdmae", "miram", "supervised")


def world(folder, epochs):
    "Parameters of tiny networks, and forty-eight tiles of noise."
    values = compose(["only=tissue", "data.tissue.image_size=32", "model.embed_dim=24", "model.depth=4", "model.num_heads=2", f"pretrain.tissue.epochs={epochs}",
                      "pretrain.tissue.batch_size=8", "pretrain.tissue.watch_every=2", "++pretrain.tissue.checkpoint_minutes=0", f"pretrain.supervised.epochs={epochs}",
                      "+encoder.miram={of: mae, method: miram}", "device=cpu", "precision=float32"])
    (folder/"params.yaml").write_text(yaml.safe_dump(values))
    noise = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)
    records = [Record(f"{i}.png", "ab"[i//4 % 2], ("train", "train", "valid", "test")[i % 4], "", "", partial(np.copy, noise[i])) for i in range(48)]
    return Source("noise", records, ["a", "b"], False, []), load_params(folder/"params.yaml")


def pretraining(method, folder, out): pretrain(params=folder/"params.yaml", tiles=folder/"tiles", encoder=method, out=out)


def preparation(source, data, folder, out):
    for r in source.records: object.__setattr__(r, "read", partial(slowly, r.read))
    prepare(source, out, data, 1)

def slowly(read): time.sleep(0.004); return read()


def finetuning(folder, out):
    "Two draws, each with its checkpoint, as the stage has them."
    store, recipe = TileStore(folder/"tiles"), FinetuneParams(epochs=3, batch_size=8, optim=OptimParams(base_lr=1e-2), labels=["all"])
    drawn = []
    for k in range(2):
        model, config = load_encoder(folder/"encoder", num_classes=2)
        rows = store.subset("train", 16, k)
        classifier, _ = fit_classifier(model, store, rows, recipe, 0, checkpoint=checkpoint_of(out, dict(draw=k)), made_of=dict(draw=k))
        drawn.append(predict(classifier, store, store.indices("test")))
    with whole(out/"encoder") as part: save_encoder(part, classifier.encoder, config)
    write_json(out/"scores.json", np.stack(drawn).tolist())


def segmentation(folder, out):
    recipe = SegmentParams(image_size=32, stride=32, steps=24, batch_size=2, blocks=[0, 1, 2, 3], channels=16, optim=OptimParams(base_lr=1e-2))
    rng = np.random.default_rng(1)
    images = [torch.from_numpy(rng.integers(0, 256, (3, 40, 40), dtype=np.uint8)) for _ in range(3)]
    model, config = segment_encoder(folder/"encoder", 32, torch.device("cpu"))
    segmenter, _ = fit_segmenter(model, images, [(i[0] > 128).byte() for i in images], recipe, checkpoint=checkpoint_of(out, {}), made_of={})
    write_json(out/"scores.json", [m.tolist() for m in predict_masks(segmenter, images, 32, 32)])


def every_step():
    "Checkpoints after each step; fine-tuning and segmentation have no parameter for it."
    from sdmae.train import engine
    engine.Trainer.maybe_checkpoint = lambda self: self.save() if self.checkpoint else None


def left(folder):
    "What a run leaves, by name: content of results, speeds and times aside."
    found = {}
    for p in sorted(o for o in folder.rglob("*") if o.is_file()):
        if p.suffix == ".tsv" and "images_per_s" not in p.name: found[p.name] = [l.split("\t")[-2:] for l in p.read_text().splitlines()]
        elif p.name == "made.json": found[p.name] = {k: v for k, v in (json.loads(p.read_text())["last"] or {}).items() if k != "images_per_s"}
        elif p.suffix in (".safetensors", ".npy", ".csv", ".json") and p.name != "metrics.json": found[p.name] = hashlib.sha256(p.read_bytes()).hexdigest()
        elif p.name.startswith("."): found[p.name] = "left behind"
    return found


def attempt(work, log):
    "A forked process that does the work; its number."
    if pid := os.fork(): return pid
    code = 1
    try:
        with open(log, "a") as f: os.dup2(f.fileno(), 1); os.dup2(f.fileno(), 2)
        work(); code = 0
    except BaseException: traceback.print_exc()
    finally: os._exit(code)


def ended(pid, seconds):
    "The exit status of a process, or None while it runs."
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)


def attack(work, folder, out, kills, rng):
    "Undisturbed once; then killed and started again until enough kills have hit. Facts of it."
    log, start = folder/"log.txt", time.monotonic()
    assert ended(attempt(partial(work, folder/"undisturbed"), log), 300) == 0, log.read_text()[-3000:]
    duration, wanted, hits, runs, other, failed = time.monotonic() - start, left(folder/"undisturbed"), 0, 0, [], 0
    while hits < kills:
        runs += 1
        for o in (out, out.parent/"checkpoints"/out.name): shutil.rmtree(o, ignore_errors=True)
        tries = 0
        while True:
            if out.exists() and rng.random() < .5 and not (out/"tiles.npy").exists(): shutil.rmtree(out) # as DVC does before a stage
            pid, tries = attempt(partial(work, out), log), tries + 1
            status = ended(pid, rng.uniform(0, duration) if hits < kills and tries < 12 else 300)
            if status is None: os.kill(pid, signal.SIGTERM if rng.random() < .1 else signal.SIGKILL); os.waitpid(pid, 0); hits += 1; continue
            failed += status != 0
            break
        found = left(out) | {p.name: "left behind" for p in out.parent.glob(".*") if p.suffix in (".part", ".old")}
        if found != wanted: other.append(sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k)))
    return dict(kills=hits, runs=runs, failed=failed, different=len(other), what=other[:1])


def main(kills=200, seed=0, only="", epochs=3):
    "A row of facts for each kind of work."
    torch.set_num_threads(1); every_step()
    rows, rng = {}, random.Random(seed)
    with tempfile.TemporaryDirectory() as d:
        base = Path(d)
        source, P = world(base, epochs)
        prepare(source, base/"tiles", P.data["tissue"], 1)
        pretrain(params=base/"params.yaml", tiles=base/"tiles", encoder="random", out=base/"random")
        shutil.copytree(base/"random"/"encoder", base/"encoder")
        works = {f"pre-training, {m}": partial(pretraining, m, base) for m in TRAINED} | {"fine-tuning, two draws": partial(finetuning, base),
                 "segmentation": partial(segmentation, base), "preparation": partial(preparation, source, P.data["tissue"], base)}
        works = {k: w for k, w in works.items() if only in k}
        for i, (name, work) in enumerate(works.items()):
            folder = base/f"work{i}"; folder.mkdir()
            rows[name] = attack(work, folder, folder/"out", kills//len(works) + (i < kills % len(works)), rng)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill runs at random moments and compare what they leave.")
    parser.add_argument("--kills", type=int, default=200); parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="work whose name holds this")
    a = parser.parse_args()
    rows = main(a.kills, a.seed, a.only)
    for name, facts in rows.items(): print(f"{name:28}", facts)
    sys.exit(any(f["different"] or f["failed"] for f in rows.values()))
