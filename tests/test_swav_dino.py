"SwAV and DINO: their losses against lightly's and by hand, their state, and what they refuse."
import math

import numpy as np, pytest, torch
from torch import nn
from torch.nn import functional as F

from sdmae.methods.dino import DINO, DINOParams, answer_statistics, teacher_probs
from sdmae.methods.joint import pair_loss
from sdmae.methods.registry import build_method
from sdmae.methods.swav import SwAV, SwAVHead, SwAVParams, prototype_use, sinkhorn
from sdmae.models.heads import HeadParams
from sdmae.params import ModelParams, OptimParams, PretrainParams, ViewParams, compose, parse_params

VIT, CONV = ModelParams(patch_size=8, embed_dim=24, depth=2, num_heads=2), ModelParams(arch="test_resnet")
OPTIM = OptimParams(base_lr=.01, warmup=0.)
LOCAL = dict(optim=OPTIM, local_crops=2, local_size=16)
TILES = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def swav(model=VIT, **kw):
    return build_method("swav", SwAVParams(**LOCAL | dict(prototypes=6, head=SwAVHead(hidden_dim=16, out_dim=8)) | kw), model, 32)


def dino(model=VIT, **kw):
    form = {} if model.arch == "vit" else dict(class_token=False, feature="mean")
    return build_method("dino", DINOParams(**LOCAL | dict(head=HeadParams(hidden_dim=16, bottleneck_dim=8, out_dim=12)) | form | kw), model, 32)


def step(method, progress=.5, images=TILES, dtype=None):
    "One step of plain gradient descent, with the engine's hooks."
    torch.manual_seed(0)
    method.before_forward(progress)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None): said = method(images)
    said["loss"].backward()
    method.before_step(progress)
    with torch.no_grad():
        for p in method.parameters():
            if p.grad is not None: p -= .1*p.grad; p.grad = None
    method.after_step(progress + .1)
    return said


def scores(*shape, seed=0, size=1.):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))*size


# SwAV: the codes

@pytest.mark.parametrize("epsilon", [.05, .1, .5])
def test_codes_are_lightlys(epsilon):
    theirs = pytest.importorskip("lightly.loss.swav_loss").sinkhorn
    s = scores(40, 12, size=.3)
    for iterations in (1, 3, 10): assert torch.allclose(sinkhorn(s, epsilon, iterations), theirs(s, iterations, epsilon), atol=1e-10)
    assert torch.allclose(sinkhorn(s.float(), epsilon), theirs(s, 3, epsilon).float(), atol=1e-6)


@pytest.mark.parametrize("epsilon", [.05, .01, .003])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_are_finite_whatever_the_precision(epsilon, dtype):
    "Trap 2: exp(1/0.003) overflows, and half precision already at 0.05; under autocast row sums drift."
    s = F.normalize(scores(64, 16), dim=1).to(dtype)
    s[0, 0], s[1] = 1, -1
    with torch.autocast("cpu", torch.bfloat16): q = sinkhorn(s, epsilon)
    assert q.dtype == torch.float32 and q.isfinite().all() and (q.sum(1) - 1).abs().max() < 1e-5
    assert torch.allclose(q, sinkhorn(s.double(), epsilon).float(), atol=1e-4)


def test_codes_use_all_prototypes_equally():
    "By hand: all prefer the first, and yet each prototype gets half of the images, those that prefer it least the second."
    s = torch.tensor([[1., .9], [1., .8], [1., .2], [1., .1]])
    q = sinkhorn(s, .05, 100)
    assert torch.allclose(q.sum(0), torch.tensor([2., 2.]), atol=.02) and q.argmax(1).tolist() == [1, 1, 0, 0]
    assert sinkhorn(s, .05, 0).argmax(1).tolist() == [0]*4
    two = torch.tensor([[1., 0.], [0., 0.]])
    a = torch.exp(two.double()); a = a/a.sum(0); a = a/a.sum(1, keepdim=True) # one iteration at ε 1
    assert torch.allclose(sinkhorn(two.double(), 1., 1), a)


def test_absent_rows_do_not_count():
    s, junk = scores(10, 4, size=.3), scores(5, 4, seed=3)
    absent = torch.tensor([False]*10 + [True]*5)
    assert torch.allclose(sinkhorn(torch.cat([s, junk]), absent=absent)[:10], sinkhorn(s), atol=1e-12)


# SwAV: the loss

def test_swav_loss_and_gradient_are_lightlys():
    theirs, ours = ([scores(16, 10, seed=i, size=.3).requires_grad_() for i in range(5)] for _ in range(2))
    queue = [scores(32, 10, seed=9 + i, size=.3) for i in range(2)]
    for q in (None, queue):
        reference = pytest.importorskip("lightly.loss").SwaVLoss()(theirs[:2], theirs[2:], q)
        codes = [sinkhorn(torch.cat([o.detach(), *([q[i]] if q else [])]))[:16] for i, o in enumerate(ours[:2])]
        loss = pair_loss(codes, ours, .1)
        assert abs(loss.item() - reference.item()) < 1e-6
        for a, b in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(reference.sum(), theirs)): assert torch.allclose(a, b, atol=1e-6)


def test_pair_loss_by_hand():
    "Codes certain of the first of two; a view that gives it odds of 3 to 1 at T 1 pays ln 4/3."
    q, s = torch.tensor([[1., 0.]]), torch.tensor([[math.log(3), 0.]])
    assert pair_loss([q, q], [s, s, s], 1.).item() == pytest.approx(math.log(4/3))
    assert pair_loss([q, q], [s, -s], 1.).item() == pytest.approx((math.log(4/3) + math.log(4))/2)


def test_losses_stay_float32_under_autocast():
    "Trap 5: bfloat16 has eight bits, and 36.65 became 36.5."
    q, s = (scores(32, 64, seed=i, size=3.).bfloat16() for i in range(2))
    with torch.autocast("cpu", torch.bfloat16): loss = pair_loss([q, q], [s, s], .1)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(pair_loss([q.double()]*2, [s.double()]*2, .1).item(), rel=1e-5)
    for method in (swav(), dino()):
        said = step(method, dtype=torch.bfloat16)
        assert said["loss"].dtype == torch.float32 and all(v.isfinite() for v in said.values())


# SwAV: the method

def test_prototypes_are_unit_rows_without_bias_and_frozen_at_first():
    m = swav(freeze_prototypes=.3)
    start = m.prototypes.detach().clone()
    assert torch.allclose(start.norm(dim=1), torch.ones(6)) and start.shape == (6, 8)
    step(m, .1)
    assert torch.equal(m.prototypes, F.normalize(start, dim=1))
    step(m, .4)
    assert not torch.allclose(m.prototypes, start, atol=1e-4) and torch.allclose(m.prototypes.norm(dim=1), torch.ones(6))


def test_the_head_can_do_without_batchnorm():
    has = lambda m: any(isinstance(o, nn.BatchNorm1d) for o in m.head)
    assert has(swav()) and not has(swav(head=SwAVHead(hidden_dim=16, out_dim=8, batchnorm=False)))


def test_the_queue_fills_from_the_front_and_starts_late():
    m = swav(queue=16, queue_start=.5)
    fresh = swav(queue=0)
    assert m.state_dict()["queue"].shape == (2, 16, 8), "trap 1: it is in the checkpoint"
    for i in range(3):
        torch.manual_seed(0); m.before_forward(.1)
        loss = m(TILES)["loss"]
        torch.manual_seed(0)
        assert torch.allclose(loss, fresh(TILES)["loss"], atol=1e-5), "before it starts, codes see the batch alone"
        newest = m.pending.transpose(0, 1).clone()
        m.after_step(.2)
        assert torch.equal(m.queue[:, :8], newest) and (m.queue[0].norm(dim=1) > .5).sum() == min(16, 8*(i + 1))
    m.queue.copy_(F.normalize(torch.randn(2, 16, 8), dim=2)) # copies of the batch itself would change no code
    torch.manual_seed(0); m.before_forward(.5)
    assert (m(TILES)["loss"] - loss).abs() > 1e-4
    m.eval(); m.pending = None; m(TILES)
    assert m.pending is None, "evaluation leaves the queue alone"


def test_codes_with_a_queue_are_those_of_the_longer_batch():
    m = swav(queue=16, queue_start=0.)
    m.queue.copy_(F.normalize(torch.randn(2, 16, 8), dim=2)); m.before_forward(.5)
    s = torch.randn(4, 6)*.3
    for view in range(2):
        assert torch.allclose(m.codes(s, view), sinkhorn(torch.cat([s, m.queue[view] @ m.prototypes.T]))[:4], atol=1e-6)


def test_use_of_prototypes():
    assert prototype_use(torch.eye(4)).item() == pytest.approx(1) and prototype_use(torch.eye(4)[[0]*8]).item() == 0
    assert prototype_use(torch.eye(100)[:7]).item() == pytest.approx(1), "seven images can use no more than seven"
    assert prototype_use(torch.eye(4)[[0, 0, 1, 1]]).item() == pytest.approx(.5)


@pytest.mark.parametrize("row, said", [(dict(loss_share=.99), ["learned nothing.* 0.990 of ln K.*epsilon to 0.03"]), (dict(prototype_use=.1), ["few prototypes"]),
                                       (dict(embedding_std=.01), ["collapsed"]), (dict(loss_share=.9, prototype_use=.8, embedding_std=.6), [])])
def test_alarms_of_swav(row, said):
    import re
    found = swav().warnings(dict(epoch=3) | row)
    assert len(found) == len(said) and all(re.search(a, b) for a, b in zip(said, found))


def test_what_swav_lacks_in_a_budget():
    budget = lambda **kw: PretrainParams(**dict(epochs=1, batch_size=64, watch_every=1) | kw)
    p = lambda **kw: SwAVParams(optim=OPTIM, **kw)
    [fault] = p().budget_faults(budget(), None)
    assert fault.startswith("prototypes 3000: more than the images that share them, pretrain.batch_size 64 and queue 0")
    assert p(queue=3840).budget_faults(budget(batch_size=256), 10_000) == []
    assert p(prototypes=64).budget_faults(budget(), 64) == []
    [fault] = p(prototypes=64).budget_faults(budget(), 63)
    assert fault.startswith("prototypes 64: more than the 63 tiles")
    [fault] = p(prototypes=64, queue=100).budget_faults(budget(), 5000)
    assert fault == "queue 100: not a multiple of pretrain.batch_size 64; set it to 128"
    [fault] = p(prototypes=64).budget_faults(budget(accumulate=2), None)
    assert "accumulate 2" in fault
    assert p(local_size=96).faults(CONV, 64, 64) == ["local_size 96 is larger than the large views, 64 px"]


# DINO

def test_dino_loss_and_gradient_are_lightlys():
    teacher = [scores(16, 20, seed=7 + i) for i in range(2)]
    theirs, ours = ([scores(16, 20, seed=i).requires_grad_() for i in range(5)] for _ in range(2))
    reference = pytest.importorskip("lightly.loss").DINOLoss(20, student_temp=.1).double()
    center = scores(20, seed=30)
    reference.center.copy_(center)
    expected = reference(teacher, theirs, teacher_temp=.04)
    loss = pair_loss(teacher_probs(torch.cat(teacher), center, .04).chunk(2), ours, .1)
    assert abs(loss.item() - expected.item()) < 1e-6
    for a, b in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs)): assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(center.lerp(torch.cat(teacher).mean(0), .1), reference.center.flatten())


def test_the_teacher_in_bfloat16_is_widened_first():
    s, center = scores(8, 50).bfloat16(), torch.zeros(50)
    with torch.autocast("cpu", torch.bfloat16): probs = teacher_probs(s, center, .04)
    assert probs.dtype == torch.float32 and torch.allclose(probs, (s.double()/.04).softmax(1).float(), atol=1e-6)


def test_teacher_is_a_copy_that_follows_and_keeps_its_mode():
    m = dino(CONV, teacher_momentum=.9)
    for (k, a), b in zip(m.student.named_parameters(), m.teacher.parameters()): assert torch.equal(a, b) and a is not b and not b.requires_grad, k
    assert m.teacher.training and not m.eval().teacher.training and m.train().teacher.training
    before = {k: v.clone() for k, v in m.teacher.named_parameters()}
    step(m, 0.)
    for k, v in m.teacher.named_parameters(): assert torch.allclose(v, before[k] + .1*(m.student.get_parameter(k) - before[k]), atol=1e-6), k
    before = m.teacher.head.mlp[0].weight.clone()
    step(m, 1.)
    assert torch.equal(m.teacher.head.mlp[0].weight, before), "at the end the momentum is 1"


def test_the_centre_moves_by_both_large_views():
    m = dino()
    torch.manual_seed(0); m.before_forward(.5)
    large = m.large(TILES)
    answers = torch.cat([m.teacher.head.scores(m.teacher(v)) for v in large])
    torch.manual_seed(0); m(TILES)
    assert not m.center.any()
    m.after_step(.6)
    assert torch.allclose(m.center, .1*answers.mean(0), atol=1e-6)
    m.eval(); m(TILES)
    assert m.pending is None, "evaluation leaves it alone"
    m = dino(center_momentum=1.); step(m)
    assert not m.center.any()


def test_schedules_of_dino():
    p = DINOParams(optim=OPTIM, teacher_temp_warmup=.2)
    assert [p.teacher_temp_at(t) for t in (0, .1, .2, .9)] == pytest.approx([.04, .055, .07, .07])
    assert DINOParams(optim=OPTIM, teacher_temp_warmup=0.).teacher_temp_at(0) == .07
    m = dino(freeze_last_layer=.3); start = m.student.head.prototypes.detach().clone()
    step(m, .1); assert torch.equal(m.student.head.prototypes, start)
    step(m, .4); assert not torch.equal(m.student.head.prototypes, start)


def test_what_is_kept_and_where_it_starts():
    for keep in ("teacher", "student"):
        m = dino(keep=keep)
        assert m.encoder is getattr(m, keep).encoder and sum(k.startswith("encoder.") for k in m.state_dict()) == 0
        with torch.no_grad(): m.encoder.cls_token.fill_(3.)
        m.begin()
        assert (m.student.encoder.cls_token == 3).all() and (m.teacher.encoder.cls_token == 3).all()
        assert m.student.encoder.cls_token.requires_grad and not m.teacher.encoder.cls_token.requires_grad


def test_the_head_begins_as_dinos():
    "A normal of deviation 0.02 that is not cut; the last layer has no bias and unit rows whatever its weights."
    m = build_method("dino", DINOParams(optim=OPTIM, head=HeadParams(hidden_dim=256, out_dim=64)), VIT, 32)
    w = m.student.head.mlp[2].weight
    assert w.std().item() == pytest.approx(.02, rel=.02) and w.abs().max() > .06
    p, s = F.normalize(torch.randn(5, 256), dim=1), m.student.head.scores
    before = s(p)
    with torch.no_grad(): m.student.head.prototypes *= 7
    assert torch.allclose(s(p), before, atol=1e-6)
    assert set(dict(m.student.head.named_parameters())) == {f"mlp.{i}.{o}" for i in (0, 2, 4) for o in ("weight", "bias")} | {"prototypes"}


def test_statistics_of_answers():
    said = answer_statistics(torch.eye(4))
    assert said["teacher_entropy"] == 0 and said["teacher_information"].item() == pytest.approx(math.log(4))
    said = answer_statistics(torch.full((6, 4), .25))
    assert said["teacher_entropy"].item() == pytest.approx(math.log(4)) and said["teacher_information"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("entropy, kind", [(.01, "one output alone.*center_momentum"), (2.4, "spread evenly.*teacher_temp")])
def test_both_kinds_of_collapse_are_told(entropy, kind):
    import re
    m = dino()
    [said] = m.warnings(dict(epoch=2, teacher_information=1e-4, teacher_entropy=entropy, embedding_std=.5))
    assert re.search(kind, said)
    assert m.warnings(dict(epoch=2, teacher_information=.5, teacher_entropy=entropy, embedding_std=.5)) == []


def test_what_dino_refuses():
    p = lambda **kw: DINOParams(optim=OPTIM, **kw)
    assert p().faults(CONV, 64, 64)[0] == "feature token: test_resnet has no class token; use mean"
    assert "local_size 96 is larger" in p().faults(VIT, 64, 64)[0] and "not divisible by patch_size" in p(local_size=20).faults(VIT, 64, 64)[0]
    [fault] = p(local_size=32).budget_faults(PretrainParams(epochs=1, batch_size=8, accumulate=2, watch_every=1), None)
    assert "accumulate 2" in fault
    with pytest.raises(ValueError, match="keep"): p(keep="both")


# Both

@pytest.mark.parametrize("make", [swav, dino])
@pytest.mark.parametrize("model", [VIT, CONV], ids=["vit", "conv"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_network_and_channel(make, model, channels):
    m = make(model)
    said = step(m, images=TILES[:, :channels], dtype=torch.bfloat16)
    assert all(v.ndim == 0 and v.isfinite() for v in said.values())
    assert m.encoder.pooled(torch.randn(2, 3, 32, 32)).shape == (2, m.encoder.width)


@pytest.mark.parametrize("make", [swav, dino])
def test_a_step_teaches(make):
    "Thirty steps on the same eight tiles bring the loss down; DINO's for a teacher that stands."
    m = make(views=ViewParams(scale=(.9, 1.)), local_crops=0, freeze_prototypes=0.) if make is swav else make(views=ViewParams(scale=(.9, 1.)), local_crops=0, freeze_last_layer=0., teacher_momentum=1., center_momentum=1., teacher_temp=.04)
    optimizer, losses = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 3e-3), []
    for i in range(30):
        m.before_forward(i/30); loss = m(TILES)["loss"]; loss.backward(); m.before_step(i/30); optimizer.step(); optimizer.zero_grad(); m.after_step((i+1)/30)
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - .05


@pytest.mark.parametrize("name", ["swav", "swav_small", "dino", "dino_small"])
def test_recipes_can_be_read(name):
    P = parse_params(compose([f"encoder@encoder.{name.removesuffix('_small')}={name}"]))
    from sdmae.methods.registry import method_params
    key = name.removesuffix("_small")
    p = method_params(P, key)
    if not name.endswith("small"): return
    assert p.faults(P.encoders[key].model, 64, 64) == [] and p.budget_faults(PretrainParams(epochs=1, batch_size=64, watch_every=1), 1000) == []
