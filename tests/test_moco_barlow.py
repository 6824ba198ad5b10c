"""MoCo and Barlow Twins against lightly, by hand, and what they refuse."""
import re

import pytest, torch
from lightly.loss import BarlowTwinsLoss, NTXentLoss
from torch.nn import functional as F

from sdmae.methods.barlow import BarlowParams, BarlowTwins, barlow_loss
from sdmae.methods.moco import MoCo, MoCoParams, info_nce
from sdmae.params import ModelParams, OptimParams, PretrainParams

OPTIM = OptimParams(base_lr=.1)
VIT, CONV = ModelParams(patch_size=8, embed_dim=24, depth=2, num_heads=2), ModelParams(arch="test_resnet")
HEAD = dict(hidden_dim=16, out_dim=8)


def rows(*shape, seed=0): return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moco(model=VIT, **kwargs):
    torch.manual_seed(0)
    return MoCo(MoCoParams(optim=OPTIM, head=HEAD, **dict(queue=16) | kwargs), model, 32)


def barlow(model=VIT, **kwargs):
    torch.manual_seed(0)
    return BarlowTwins(BarlowParams(optim=OPTIM, head=HEAD, **kwargs), model, 32)


def images(n=8, channels=3): return torch.randint(0, 256, (n, channels, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def both(ours, theirs, z):
    "Loss and gradient of two functions of the same rows."
    found = []
    for f in (ours, theirs):
        x = z.clone().requires_grad_()
        loss = f(x); loss.backward(); found += [loss.detach(), x.grad]
    torch.testing.assert_close(found[0], found[2], atol=1e-6, rtol=1e-6); torch.testing.assert_close(found[1], found[3], atol=1e-6, rtol=1e-6)


def test_queued_contrast_is_lightlys():
    "Its bank is filled with our queue."
    q, k, queue = rows(8, 6), rows(8, 6, seed=1), F.normalize(rows(32, 6, seed=2), dim=1)
    def theirs(x):
        loss = NTXentLoss(temperature=.2, memory_bank_size=(32, 6))
        loss.memory_bank.bank, loss.memory_bank.bank_ptr = queue.clone(), torch.zeros(1, dtype=torch.long)
        return loss(x, k)
    both(lambda x: info_nce(x, queue, .2, k)[0], theirs, q)


def test_contrast_within_a_batch_is_cross_entropy_over_cosines():
    "The other keys of the batch, written as a loop."
    q, k = rows(6, 5), rows(6, 5, seed=1)
    def theirs(x):
        cos = [[F.cosine_similarity(a, b, dim=0)/.3 for b in k] for a in x]
        return sum(torch.logsumexp(torch.stack(c), 0) - c[i] for i, c in enumerate(cos))/6
    both(lambda x: info_nce(x, k, .3)[0], theirs, q)


def test_barlow_is_lightlys():
    a, b = rows(12, 5), rows(12, 5, seed=1)
    def ours(x):
        diagonal, off = barlow_loss(x, b, .0051)
        return diagonal + .0051*off
    both(ours, lambda x: BarlowTwinsLoss(lambda_param=.0051)(x, b), a)


def test_losses_are_float32_under_bfloat16():
    z = [rows(16, 8, seed=i).bfloat16() for i in range(3)]
    wide = [x.float() for x in z]
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce(z[0], z[2], .2, z[1])[0], *barlow_loss(z[0], z[1], .0051)
    expected = info_nce(wide[0], wide[2], .2, wide[1])[0], *barlow_loss(wide[0], wide[1], .0051)
    for a, b in zip(found, expected): assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("scale", [0., 1e-20, 1e4])
def test_barlow_gives_no_nan(scale):
    z = (rows(8, 4)*scale).float().requires_grad_()
    loss = sum(barlow_loss(z, z.detach().clone(), .0051)); loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("make", [moco, lambda **k: moco(version="v3", **k), barlow], ids=["v2", "v3", "barlow"])
@pytest.mark.parametrize("model", [VIT, CONV], ids=["vit", "conv"])
def test_a_step_in_bfloat16_of_grey_images(make, model):
    m = make(model=model)
    with torch.autocast("cpu", torch.bfloat16): parts = m(images(channels=1))
    parts["loss"].backward()
    assert all(v.isfinite() for v in parts.values()) and parts["loss"].dtype == torch.float32
    still = {k for k, p in m.named_parameters() if p.grad is None}
    frozen = {k for k, p in m.named_parameters() if k.endswith("encoder.pos_embed") or k.startswith(("key_", *(["encoder.patch_embed"] if getattr(m, "third", False) and model is VIT else [])))}
    assert still == frozen and all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)


def test_the_head_reads_the_class_token():
    for cls, params in ((MoCo, MoCoParams(optim=OPTIM, head=HEAD, queue=16, class_token=True, feature="token")),
                        (BarlowTwins, BarlowParams(optim=OPTIM, head=HEAD, class_token=True, feature="token"))):
        m = cls(params, VIT, 32); m(images())["loss"].backward()
        assert m.encoder.cls_token.grad.abs().sum() > 0


def test_the_queue_moves_by_whole_batches_and_is_kept():
    "Trap 1: oldest keys go first, in the batch's order, nothing is cut, and the state has all of it."
    m, batches = moco(), []
    for i in range(3):
        m(images()); batches.append(m.pending.clone()); m.after_step(.5)
    assert torch.equal(m.queue, torch.cat([batches[2], batches[1]])) and m.place == 8
    other = moco(); other.load_state_dict(m.state_dict())
    assert torch.equal(other.queue, m.queue) and other.place == 8


def test_a_forward_without_a_step_leaves_the_queue():
    m = moco(); before = m.queue.clone()
    m.eval()(images()); m.after_step(.5)
    assert torch.equal(m.queue, before) and torch.allclose(m.queue.norm(dim=1), torch.ones(16))
    assert torch.equal(before, moco().queue), "drawn from the seed"


def test_momentum_stays_in_v2_and_rises_in_v3():
    for version, moved in (("v2", .1), ("v3", .05)):
        m = moco(version=version, momentum=.9)
        before = m.key_head[0].weight.clone()
        with torch.no_grad(): m.head[0].weight += 1
        m.after_step(.5)
        assert torch.allclose(m.key_head[0].weight - before, torch.full_like(before, moved), atol=1e-5)


def test_given_weights_reach_the_keys():
    m = moco()
    with torch.no_grad(): m.encoder.norm.bias += 1
    m.begin()
    assert torch.equal(m.key_encoder.norm.bias, m.encoder.norm.bias)


def budget(n): return PretrainParams(epochs=1, batch_size=n, watch_every=1)


@pytest.mark.parametrize("queue, ok", [(8, False), (12, False), (20, False), (16, True), (64, True)])
def test_a_queue_is_a_multiple_of_the_batch_and_larger(queue, ok):
    lines = MoCoParams(optim=OPTIM, queue=queue).budget_faults(budget(8), None)
    assert (lines == []) == ok
    if not ok: assert f"queue {queue}" in lines[0] and "pretrain.batch_size 8" in lines[0]


def test_the_size_that_is_proposed_fits():
    for queue in (3, 8, 9, 1000):
        line = MoCoParams(optim=OPTIM, queue=queue).budget_faults(budget(96), None)[0]
        assert MoCoParams(optim=OPTIM, queue=int(line.rsplit(" ", 1)[1])).budget_faults(budget(96), None) == []


@pytest.mark.parametrize("queue, tiles, said", [
    (1920, 1919, "queue 1920: more than the 1919 tiles of the training split.*their own negatives; use 1824$"), (192, 191, "use version v3, or lower pretrain.batch_size$")])
def test_a_queue_is_no_longer_than_the_training_split(queue, tiles, said):
    "Else it holds older keys of the query's own tile: false negatives."
    def lines(tiles, **more): return MoCoParams(optim=OPTIM, queue=queue, **more).budget_faults(budget(96), tiles)
    line, = lines(tiles)
    assert re.search(said, line) and lines(None) == lines(queue) == lines(tiles, version="v3") == []
    assert MoCoParams(optim=OPTIM, queue=1824).budget_faults(budget(96), 1919) == []


def test_what_is_proposed_fits_the_tiles_too():
    "A queue that is neither a multiple nor short enough is told both, and one number mends both."
    found = MoCoParams(optim=OPTIM, queue=1000).budget_faults(budget(96), 500)
    assert [o.rsplit("; ", 1)[1] for o in found] == ["use 480"]*2 and "500 tiles" in found[0] and "pretrain.batch_size 96" in found[1]
    assert MoCoParams(optim=OPTIM, queue=480).budget_faults(budget(96), 500) == []


def test_v3_needs_no_queue_and_small_batches_are_refused():
    assert MoCoParams(optim=OPTIM, version="v3", queue=7).budget_faults(budget(96), None) == []
    for params in (MoCoParams(optim=OPTIM, version="v3"), BarlowParams(optim=OPTIM, head=HEAD)):
        assert any("pretrain.batch_size 2" in o for o in params.budget_faults(budget(2), None))


def test_the_floor_of_barlow():
    "Trap 4: λD²/N of answers that have nothing in common; too wide a head is refused, by the number that fits."
    a, b = rows(64, 256).float(), rows(64, 256, seed=1).float()
    assert barlow_loss(a, b, .0051)[1].item() == pytest.approx(256**2/64, rel=.1)
    line, = BarlowParams(optim=OPTIM, head=dict(out_dim=8192)).budget_faults(budget(64), None)
    assert "head.out_dim 8192" in line and BarlowParams(optim=OPTIM, head=dict(out_dim=6274)).budget_faults(budget(64), None) == []


def test_alarms():
    calm = dict(epoch=2, loss=1., loss_at_chance=3., embedding_std=.9, redundancy=.1)
    assert moco().warnings(calm) == barlow().warnings(calm) == []
    assert "by chance" in moco().warnings(calm | dict(loss=2.99))[0] and "collapsed" in moco().warnings(calm | dict(embedding_std=.01))[0]
    assert "repeat each other" in barlow().warnings(calm | dict(redundancy=.9))[0]
