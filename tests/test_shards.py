"Shards: every image once an epoch over all processes, the same batches after an interruption, flat memory, and every kind of bad input."
import io, json, tarfile, tracemalloc
from collections import Counter
from functools import partial

import numpy as np, pytest, torch, webdataset as wds
from PIL import Image
from torch import nn
from torchvision.io import ImageReadMode, decode_jpeg

from sdmae.data.records import Record, Source
from sdmae.data.shards import ShardBatches, Shards, index_shards, main, write_shards
from sdmae.data.store import fit, prepare
from sdmae.params import DataParams, OptimParams
from sdmae.train.batches import Batches, prefetch
from sdmae.train.engine import Trainer


def noise(n, size=16, seed=0):
    "Tiles that compress badly, each with its number in its first pixel."
    tiles = np.random.default_rng(seed).integers(0, 256, (n,size,size,3), dtype=np.uint8)
    tiles[:,0,0] = np.stack([np.arange(n)//256, np.arange(n)%256, np.zeros(n)], 1)
    return tiles

def records(tiles, split="train"): return [Record(f"{i}.png", "ab"[i%2], split, "", "", partial(np.copy, t)) for i,t in enumerate(tiles)]

def numbers(images): return (images[:,0,0,0].int()*256 + images[:,1,0,0].int()).tolist()

def jpeg(tile, form="JPEG"):
    b = io.BytesIO(); Image.fromarray(tile).save(b, form)
    return b.getvalue()

def tar(file, files):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as t:
        for name, data in files.items():
            info = tarfile.TarInfo(name); info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return file

@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    "203 images of about 850 bytes in 12 files."
    return write_shards(records(noise(203)), tmp_path_factory.mktemp("shards")/"set", format="png", shard_mb=0.015)


# Writing

def test_png_shards_hold_the_tiles(shards):
    assert len(shards) == 203 and len(shards.files) == 12
    images = ShardBatches(shards, 16, 203).batch(0, 0)[0]
    assert (images[np.argsort(numbers(images))].permute(0,2,3,1).numpy() == noise(203)).all()

def test_webdataset_reads_them(shards):
    "An independent reader finds the same images, with path and label beside each."
    samples = list(wds.WebDataset([str(f) for f in shards.files], shardshuffle=False))
    about = [json.loads(s["json"]) for s in samples]
    assert Counter(a["path"] for a in about) == Counter(f"{i}.png" for i in range(203))
    for s, a in zip(samples, about):
        tile = np.asarray(Image.open(io.BytesIO(s["png"]))).astype(int)
        assert tile[0,0,0]*256 + tile[0,0,1] == int(a["path"][:-4]) and a["label"] == "ab"[int(a["path"][:-4])%2]

def test_each_shard_is_a_mix(shards):
    samples = [json.loads(s["json"])["path"] for s in wds.WebDataset(str(shards.files[0]), shardshuffle=False)]
    assert np.ptp([int(p[:-4]) for p in samples]) > 100

def test_jpeg_of_a_store(tmp_path):
    "torchvision's decoder, another than the one used here, gives the same within a rounding; only the split asked for is there."
    smooth = np.repeat(np.repeat(noise(30, 4), 4, 1), 4, 2)
    source = Source("test", records(smooth[:20]) + records(smooth[20:25], "valid") + records(smooth[25:], "test"), ["a","b"], False, [])
    store = prepare(source, tmp_path/"store", DataParams(name="test", adapter="folder", path="x", image_size=16))
    shards = write_shards(store, tmp_path/"jpg", quality=95)
    assert len(shards) == 20
    batches = ShardBatches(shards, 16, 20)
    data, starts = shards.read([(0, 20)])
    for image, row in zip(batches.batch(0, 0)[0], batches.rows(0, 0)):
        assert (image.int() - decode_jpeg(torch.from_numpy(data[starts[row]:starts[row+1]]), ImageReadMode.RGB).int()).abs().max() <= 2

def test_the_same_set_is_written_alike(tmp_path):
    a, b = (write_shards(records(noise(20)), tmp_path/o, shard_mb=0.005) for o in "ab")
    assert a.sha256 == b.sha256 and len(a.files) > 1

def test_a_failure_keeps_the_earlier_shards(tmp_path):
    def broken(): raise ValueError("tile 7 is truncated")
    before = write_shards(records(noise(10)), tmp_path/"set").sha256
    bad = records(noise(10)); object.__setattr__(bad[7], "read", broken)
    with pytest.raises(ValueError, match="tile 7"): write_shards(bad, tmp_path/"set")
    assert Shards(tmp_path/"set").sha256 == before and [p.name for p in tmp_path.iterdir()] == ["set"]

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_decodes_batches(tmp_path):
    "In the mean within two steps of 255 of the CPU's pixels; a file that it cannot decode is named all the same."
    smooth = np.repeat(np.repeat(noise(12, 8), 4, 1), 4, 2)
    shards = write_shards(records(smooth), tmp_path/"set", quality=95)
    gpu, cpu = (ShardBatches(shards, 32, 4, device=torch.device(d)) for d in ("cuda", "cpu"))
    for i, (images,) in enumerate(prefetch(gpu, 0)):
        assert images.device.type == "cuda" and images.dtype == torch.uint8
        assert (images.cpu().float() - cpu.batch(0, i)[0].float()).abs().mean() < 2
    tar(tmp_path/"bad"/"a.tar", {"good.jpg": jpeg(smooth[0]), "bad.jpg": jpeg(smooth[1])[:300]})
    with pytest.raises(ValueError, match="a.tar: bad.jpg: truncated"): ShardBatches(index_shards(tmp_path/"bad"), 32, 2, device=torch.device("cuda")).batch(0, 0)


# The order

@pytest.mark.parametrize("buffer_mb", [0.004, 0.03, 10])
@pytest.mark.parametrize("world, batch_size", [(1,7), (2,14), (3,21)])
def test_every_image_once_an_epoch(shards, world, batch_size, buffer_mb):
    "Over all processes nothing twice; what does not fill a batch is left out, and it is other images in each epoch."
    ranks = [ShardBatches(shards, 16, batch_size, 3, rank=r, world=world, buffer_mb=buffer_mb) for r in range(world)]
    left = []
    for epoch in range(4):
        seen = [n for b in ranks for i in range(len(b)) for n in numbers(b.batch(epoch, i)[0])]
        assert len(seen) == len(set(seen)) == 203 - 203%batch_size
        left.append(frozenset(range(203)) - set(seen))
    if 203%batch_size: assert len(set(left)) == 4

def test_rows_are_those_of_the_images(shards):
    whole = ShardBatches(shards, 16, 203)
    number = dict(zip(whole.rows(0, 0).tolist(), numbers(whole.batch(0, 0)[0])))
    b = ShardBatches(shards, 16, 10, 1, rank=1, world=2, buffer_mb=0.02)
    for i in (0, 7, 3): assert [number[r] for r in b.rows(2, i)] == numbers(b.batch(2, i)[0])

def test_seed_and_epoch_make_the_order(shards):
    order = lambda seed, epoch: np.concatenate([ShardBatches(shards, 16, 29, seed, buffer_mb=0.03).rows(epoch, i) for i in range(7)]).tolist()
    assert order(0, 0) == order(0, 0) and len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9

def test_what_is_left_out_is_drawn_evenly(shards):
    "11 of 203 images, 600 times: each is left out about 32 times."
    counts = np.zeros(203)
    for epoch in range(600):
        b = ShardBatches(shards, 16, 16, buffer_mb=10)
        for a, z in b.arc(epoch): counts[a:z] += 1
    missed = 600 - counts
    assert missed.sum() == 600*11 and missed.min() > 5 and missed.max() < 75

def test_a_process_reads_few_files_of_another(shards):
    for epoch in range(5):
        files = [{int(np.searchsorted(shards.ends, a, "right")) for a, _ in ShardBatches(shards, 16, 20, rank=r, world=4).arc(epoch)} for r in range(4)]
        assert sum(map(len, files)) <= 12 + 5 # a file cut at each end of an arc, one more by the ring's cut

def test_a_resumed_epoch_reads_its_group_only(shards, monkeypatch):
    make = lambda: ShardBatches(shards, 16, 10, 5, buffer_mb=0.02)
    whole, read, asked = [b[0] for b in prefetch(make(), 1)], Shards.read, []
    monkeypatch.setattr(Shards, "read", lambda self, ranges: asked.append(ranges) or read(self, ranges))
    late = make()
    assert torch.equal(late.batch(1, 13)[0], whole[13])
    late.reader.shutdown()
    assert len(late.groups(1)) > 8 and len(asked) <= 3 # its group or two, and the one read ahead

def test_each_group_is_read_once(shards, monkeypatch):
    "Three epochs: every group of each, and the one that is read ahead at the end."
    read, asked = Shards.read, []
    monkeypatch.setattr(Shards, "read", lambda self, ranges: asked.append(ranges) or read(self, ranges))
    b = ShardBatches(shards, 16, 7, buffer_mb=0.02)
    for epoch in range(3): list(prefetch(b, epoch))
    b.reader.shutdown()
    assert asked == [g for epoch in range(3) for g in b.groups(epoch)] + b.groups(3)[:1]

def test_read_ahead_gives_the_same(shards):
    make = lambda: ShardBatches(shards, 16, 10, buffer_mb=0.02)
    plain = make()
    for (a,), i in zip(prefetch(make(), 0, 4), range(4, 20), strict=True): assert torch.equal(a, plain.batch(0, i)[0])

class Slope(nn.Module):
    def __init__(self, stop=None): super().__init__(); self.w, self.steps, self.stop = nn.Parameter(torch.zeros(1)), 0, stop
    def forward(self, images):
        self.steps += 1
        if self.steps == self.stop: raise KeyboardInterrupt
        return dict(loss=(images.float().mean((1,2,3))/255 * self.w - images[:,0,0,1].float()/255).pow(2).mean())

def test_training_goes_on_in_the_middle_of_an_epoch(shards, tmp_path):
    def fit(stop=None, **kwargs):
        model = Slope(stop)
        Trainer(model, ShardBatches(shards, 16, 10, buffer_mb=0.02), OptimParams(base_lr=1.), 2, torch.device("cpu"), **kwargs).fit()
        return model
    whole = fit()
    with pytest.raises(KeyboardInterrupt): fit(28, checkpoint=tmp_path/"c.pt", checkpoint_minutes=0)
    resumed = fit(checkpoint=tmp_path/"c.pt")
    assert resumed.steps == 40-27 and torch.equal(resumed.w, whole.w)

def test_a_memory_map_trains_as_a_resident_store(tmp_path):
    source = Source("test", [r for k, s in enumerate(("train","valid","test")) for r in records(noise(40, seed=k), s)], ["a","b"], False, [])
    store = prepare(source, tmp_path/"store", DataParams(name="test", adapter="folder", path="x", image_size=16))
    def fit(max_bytes):
        model, batches = Slope(), Batches(store.to("cpu", max_bytes), store.indices("train"), 8)
        Trainer(model, batches, OptimParams(base_lr=1.), 2, torch.device("cpu")).fit()
        return model.w, batches.resident
    (mapped, thread), (resident, plain) = fit(0), fit(10**9)
    assert torch.equal(mapped, resident) and mapped != 0 and plain and not thread


# Memory

def test_memory_is_flat(tmp_path):
    "A set of more than ten buffers is streamed twice; numpy's and Python's own count of what is held stays below two, and a decoded batch."
    shards, buffer = write_shards(records(noise(700, 64)), tmp_path/"set", format="png", shard_mb=1), 0.8
    assert shards.table[:,1].sum() > 10*buffer*1e6
    batches = ShardBatches(shards, 64, 16, buffer_mb=buffer)
    tracemalloc.start()
    for epoch in range(2):
        for i in range(len(batches)): batches.batch(epoch, i)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    batch = 16*3*64*64 # pixels: as tiles, stacked, and in the channels' order
    assert buffer*1e6 < peak < 2*buffer*1e6 + 3*batch


# Shards from elsewhere

def test_tars_of_any_origin(tmp_path):
    "Any keys and suffixes, in folders, beside what is no image; other sizes are fitted as by `prepare`."
    tiles = noise(4, 40)[:, :, :32].copy()
    tar(tmp_path/"in"/"x.tar", {"a/1.PNG": jpeg(tiles[0], "PNG"), "a/1.cls": b"3", "a/._1.png": b"resource fork", "2.jpeg": jpeg(np.ascontiguousarray(tiles[1,:32]))})
    tar(tmp_path/"y.tar", {"b.c.png": jpeg(tiles[2], "PNG"), "grey.png": jpeg(tiles[3,...,0], "PNG")})
    shards = index_shards(tmp_path)
    assert len(shards) == 4 and [str(f.relative_to(tmp_path)) for f in shards.files] == ["in/x.tar", "y.tar"]
    b = ShardBatches(shards, 20, 4)
    images = dict(zip(b.rows(0, 0).tolist(), b.batch(0, 0)[0].permute(0,2,3,1).numpy()))
    for row, tile in {0:tiles[0], 2:tiles[2], 3:np.repeat(tiles[3,...,:1], 3, 2)}.items(): assert (images[row] == fit(tile, 20, None, "x")).all()


# Bad input

def test_nothing_to_index_or_write(tmp_path):
    with pytest.raises(FileNotFoundError, match="none is no folder"): index_shards(tmp_path/"none")
    (tmp_path/"empty").mkdir()
    with pytest.raises(FileNotFoundError, match="nothing in it that ends in .tar"): index_shards(tmp_path/"empty")
    tar(tmp_path/"bare"/"a.tar", {"a.txt": b"no image"})
    with pytest.raises(ValueError, match="no image in its 1 tars"): index_shards(tmp_path/"bare")
    with pytest.raises(FileNotFoundError, match="index.json is missing. Index the folder"): Shards(tmp_path/"bare")
    with pytest.raises(FileExistsError, match="bare exists and holds no shards"): write_shards(records(noise(4)), tmp_path/"bare")
    with pytest.raises(ValueError, match="no tile of the split 'test'"): write_shards(records(noise(4)), tmp_path/"out", "test")
    with pytest.raises(ValueError, match="format 'webp'"): write_shards(records(noise(4)), tmp_path/"out", format="webp")

@pytest.mark.parametrize("cut", [-1024, -1400, 512+100, 512, 300])
def test_truncated_tar(tmp_path, cut):
    "Cut in the end mark, in an image, between header and image, in a header."
    f = tar(tmp_path/"a.tar", {f"{i}.png": jpeg(t, "PNG") for i,t in enumerate(noise(3))})
    whole = 3*(512 + 1024) + 1024 # headers, images rounded up, end mark
    data = f.read_bytes()[:whole]
    f.write_bytes(data[:cut])
    with pytest.raises(ValueError, match="a.tar: truncated"): index_shards(tmp_path)

def test_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path/"a.tar", "w:gz") as t: t.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ValueError, match="not a plain tar"): index_shards(tmp_path)

@pytest.fixture
def fresh(tmp_path): return write_shards(records(noise(12)), tmp_path/"set", format="png", shard_mb=0.003)

def test_tars_that_the_index_does_not_know(fresh):
    f, data = fresh.files[1], fresh.files[1].read_bytes()
    f.write_bytes(data[:-512])
    with pytest.raises(ValueError, match="000001.tar: .* bytes, but .* in index.json"): Shards(fresh.folder)
    f.unlink()
    with pytest.raises(FileNotFoundError, match="000001.tar is missing, but index.json lists it"): Shards(fresh.folder)
    np.save(fresh.folder/"index.npy", fresh.table[:5])
    with pytest.raises(ValueError, match="do not belong together"): Shards(fresh.folder)

def index_faults():
    def text(a, b): return lambda d: (d/"index.json").write_text((d/"index.json").read_text().replace(a, b))
    return {"images": (text('"images": 12', '"images": 11'), "index.json: not as it was written"), "bytes": (text('"bytes": ', '"bytes": 1'), "index.json: not as it was"), "no json": (text("{", "["), "index.json: damaged"),
            "earlier": (lambda d: (d/"index.json").write_text(json.dumps({**json.loads((d/"index.json").read_text()), "sha256":"0"})), "earlier version. Index the folder again"),
            "objects": (lambda d: np.save(d/"index.npy", np.array([{}]), allow_pickle=True), "do not belong together"), "an offset": (lambda d: np.save(d/"index.npy", np.load(d/"index.npy") + 1), "do not belong together")}

@pytest.mark.parametrize("kind", index_faults())
def test_an_index_knows_what_it_was_written_with(fresh, kind):
    change, message = index_faults()[kind]
    change(fresh.folder)
    with pytest.raises(ValueError, match=f"{message}|{message}.*Index the folder again"): Shards(fresh.folder)

def test_a_changed_byte_is_found_by_verify(fresh):
    assert fresh.verify() and not fresh.verify(max_bytes=1000)
    data = bytearray(fresh.files[1].read_bytes()); data[700] ^= 1; fresh.files[1].write_bytes(data)
    with pytest.raises(ValueError, match="000001.tar: not as it was indexed"): Shards(fresh.folder).verify()
    index_shards(fresh.folder).verify()

def test_truncated_while_open(fresh):
    fresh.files[0].write_bytes(fresh.files[0].read_bytes()[:600])
    with pytest.raises(ValueError, match="000000.tar: truncated since it was indexed"): ShardBatches(fresh, 16, 12).batch(0, 0)

@pytest.mark.parametrize("form, damage", [("JPEG", lambda d: d[:len(d)//2]), ("JPEG", lambda d: b"\xff\xd8nonsense"), ("PNG", lambda d: d[:-30]), ("PNG", lambda d: b"")])
def test_an_image_that_does_not_decode_is_named(tmp_path, form, damage):
    "Also through the thread that reads ahead."
    suffix = dict(JPEG="jpg", PNG="png")[form]
    files = {f"key{i}.{suffix}": jpeg(t, form) for i,t in enumerate(noise(6))}
    files[f"key4.{suffix}"] = damage(files[f"key4.{suffix}"])
    tar(tmp_path/"a.tar", files)
    batches = ShardBatches(index_shards(tmp_path), 16, 3)
    with pytest.raises(ValueError, match=rf"a.tar: key4.{suffix}: truncated.*Replace the file.*index"): list(prefetch(batches, 0))

def test_an_image_too_long_to_be_squared_is_named(tmp_path):
    tar(tmp_path/"a.tar", {"strip.png": jpeg(noise(1, 64)[0,:8].copy(), "PNG")})
    with pytest.raises(ValueError, match="a.tar: strip.png: 64×8 px cannot be squared"): ShardBatches(index_shards(tmp_path), 16, 1).batch(0, 0)

def test_batches_that_cannot_be(shards):
    with pytest.raises(ValueError, match="batch_size 204 is more than the 203 images of .*set"): ShardBatches(shards, 16, 204)
    with pytest.raises(ValueError, match="batch_size 16 is not divisible by 3 processes"): ShardBatches(shards, 16, 16, world=3)


# The command

def test_the_command(tmp_path, capsys):
    source = Source("test", [r for k, s in enumerate(("train","valid","test")) for r in records(noise(6, seed=k), s)], ["a","b"], False, [])
    prepare(source, tmp_path/"store", DataParams(name="test", adapter="folder", path="x", image_size=16))
    assert main(["write", str(tmp_path/"store"), str(tmp_path/"set"), "--format", "png", "--split", "test"]) == 0
    assert main(["index", str(tmp_path/"set")]) == 0
    assert capsys.readouterr().out.count("Shards(set: 6 images in 1 files") == 2
    assert main(["write", str(tmp_path/"nothing"), str(tmp_path/"set")]) == 2
    assert "tiles.npy is missing" in capsys.readouterr().err and len(Shards(tmp_path/"set")) == 6

@pytest.mark.parametrize("beside", ["photo.png", "inner/photo.png", ".hidden", None])
def test_only_what_write_wrote_is_replaced(tmp_path, beside):
    folder = tmp_path/"set"
    write_shards(records(noise(6)), folder); write_shards(records(noise(4)), folder)
    assert len(Shards(folder)) == 4
    if beside: (folder/beside).parent.mkdir(exist_ok=True); (folder/beside).write_bytes(b"only copy")
    else: tar(folder/"mine.tar", {"0.png": jpeg(noise(1)[0], "PNG")}); index_shards(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match="holds .*It would be replaced"): write_shards(records(noise(6)), folder)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

@pytest.mark.parametrize("index", ["{}", "[]", "no JSON"])
def test_any_index_is_no_leave_to_replace(tmp_path, index):
    (tmp_path/"index.json").write_text(index); (tmp_path/"work.txt").write_text("of years")
    with pytest.raises(FileExistsError): write_shards(records(noise(6)), tmp_path)
    assert (tmp_path/"work.txt").read_text() == "of years"

def test_what_index_leaves_out_is_counted(tmp_path, capsys):
    one = jpeg(noise(1)[0])
    tar(tmp_path/"a.tar", {"0.jpg": one, "0.json": b"{}", "1.tif": jpeg(noise(1)[0], "TIFF"), "2.webp": b"", "._0.jpg": b""})
    with tarfile.open(tmp_path/"a.tar", "a") as t:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            link = tarfile.TarInfo("link.jpg"); link.type, link.linkname = kind, "0.jpg"; t.addfile(link)
    (tmp_path/"b.tar.gz").write_bytes(b"\x1f\x8b"); (tmp_path/"c.tgz").write_bytes(b"\x1f\x8b")
    for _ in range(2): # the index of the first time is no file that was not read
        assert main(["index", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert "warning: 2 files were not read: b.tar.gz, c.tgz" in said
        assert "warning: 5 files inside the tars were not read: 2 .jpg (link), 1 .json, 1 .tif, 1 .webp" in said
    assert index_shards(tmp_path).notes == Shards(tmp_path).notes
    (tmp_path/"b.tar.gz").unlink(); (tmp_path/"c.tgz").unlink(); tar(tmp_path/"a.tar", {"0.jpg": one, "0.json": b"{}"})
    assert index_shards(tmp_path).notes == ["1 files inside the tars were not read: 1 .json; images end in .jpg, .jpeg, .png"]
