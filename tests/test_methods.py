"MAE, SD-MAE and MIRAM against independent implementations."
import ast, copy, inspect, json, math, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from sklearn.utils.class_weight import compute_class_weight
from timm.layers import Attention
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF, InterpolationMode
from sdmae.evaluate.features import extract
from sdmae.evaluate.finetune import fit_classifier, predict
from sdmae.params import EncoderForm, FinetuneParams, ModelParams, OptimParams, Section, ViewParams
from sdmae.methods.mae import MAE, MAEParams
from sdmae.methods.masked import pixel_target, random_masking
from sdmae.methods.miram import MIRAM, MIRAMParams, Nystrom, NystromParams, finer, in_order
from sdmae.methods.registry import METHODS, build_method, method_class
from sdmae.methods.sdmae import SDMAE, SDMAEParams, teacher_statistics
from sdmae.methods.supervised import Supervised, SupervisedParams
from sdmae.models.decoders import Decoder, DecoderParams
from sdmae.models.heads import HeadParams
from sdmae.models.encoders import build_encoder
from sdmae.models.vit import compile_blocks, sincos1d, sincos2d
from sdmae.models.weights import our_mae_name
from sdmae.reference import compare, float64, main
from sdmae.views import augment
from sdmae.views.augment import MEAN, STD, Views, normalize, to_unit, center_resize
from sdmae.views.geometry import random_boxes

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent/"shared"/"reference"/"sdmae.npz"
MIRAM_REFERENCE = REFERENCE.with_name("miram.npz")
SHAPE = ModelParams(patch_size=8, embed_dim=48, depth=2, num_heads=3)
DECODER, OPTIM = DecoderParams(embed_dim=32, depth=2, num_heads=4), OptimParams(base_lr=1e-3)


@pytest.mark.skipif(not REFERENCE.exists(), reason=f"the authors' numbers are not here: {REFERENCE.name} beside the project")
def test_sdmae_is_the_authors_to_nine_digits(capsys):
    worst = compare(REFERENCE)
    assert len(worst) > 80 and {"pred", "target", "student", "teacher", "loss", "loss_mse", "loss_distill", "center"} <= worst.keys()
    assert max(worst.values()) <= 1e-9, worst
    assert main([str(REFERENCE)]) == 0
    assert main([str(REFERENCE), "--tolerance", "1e-30"]) == 1


@pytest.mark.skipif(not MIRAM_REFERENCE.exists(), reason=f"the authors' numbers are not here: {MIRAM_REFERENCE.name} beside the project")
def test_miram_is_the_authors_to_nine_digits():
    worst = compare(MIRAM_REFERENCE)
    assert len(worst) > 100 and {"pred", "highres_pred", "mask", "loss", "grad mask_token", "grad highres_decoder_pred.bias"} <= worst.keys()
    assert max(worst.values()) <= 1e-9, worst
    assert main([str(MIRAM_REFERENCE), str(REFERENCE)]) == 0


def hf_mae():
    transformers = pytest.importorskip("transformers")
    c = transformers.ViTMAEConfig(image_size=48, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192,
        decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=128,
        mask_ratio=0.75, norm_pix_loss=True, hidden_act="gelu", layer_norm_eps=1e-6, attn_implementation="sdpa")
    with float64(): return transformers.ViTMAEForPreTraining(c).double()


def hf_names(depth=2):
    "Our names → those of transformers; attention's q, k, v apart."
    names = {"decoder.mask_token": "decoder.mask_token", "encoder.cls_token": "vit.embeddings.cls_token", "decoder.embed": "decoder.decoder_embed",
             "encoder.patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "encoder.norm": "vit.layernorm",
             "decoder.norm": "decoder.decoder_norm", "pixels": "decoder.decoder_pred"}
    for ours, theirs in (("encoder.blocks", "vit.layers"), ("decoder.blocks", "decoder.decoder_layers")):
        for i in range(depth):
            for a, b in (("norm1", "layernorm_before"), ("norm2", "layernorm_after"), ("attn.proj", "attention.o_proj"),
                         ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"), ("attn.qkv", "attention.{}_proj")):
                names[f"{ours}.{i}.{a}"] = f"{theirs}.{i}.{b}"
    return names


def copy_to_ours(ours, theirs, get):
    "A dict of our parameters' names → the other's tensors, by `get(parameter)`."
    table, params, out = hf_names(), dict(theirs.named_parameters()), {}
    for name in dict(ours.named_parameters()):
        if name.endswith("pos_embed"): continue
        stem, leaf = (name, "") if name in table else name.rsplit(".", 1)
        target = table[stem] + (f".{leaf}" if leaf else "")
        out[name] = torch.cat([get(params[target.format(p)]) for p in "qkv"]) if "{}" in target else get(params[target])
    return out


def test_mae_is_transformers_vitmae():
    "Loss, prediction and every gradient, from the same weights and masks."
    torch.manual_seed(0)
    theirs = hf_mae()
    with float64(): ours = MAE(MAEParams(decoder=DECODER, optim=OPTIM), SHAPE, 48)
    for p in theirs.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=0.1)
    for table, of in ((theirs.vit.embeddings.position_embeddings, ours.encoder), (theirs.decoder.decoder_pos_embed, ours.decoder)):
        table.data.copy_(of.pos_embed)  # the tables have a test of their own
    ours.load_state_dict(copy_to_ours(ours, theirs, lambda p: p.data), strict=False)
    x, noise = to_unit(torch.randint(0, 256, (3, 3, 48, 48)), torch.float64), torch.rand(3, 36, dtype=torch.float64)
    out = theirs(normalize(x), noise=noise); out.loss.backward()
    visible, masked = random_masking(noise, ours.n_visible)
    loss = ours.loss_on(x, visible, masked)["loss"]; loss.backward()
    pred = ours.forward_masked(x, visible, masked)["pred"]
    assert abs(loss.item() - out.loss.item()) < 1e-9
    wanted = out.logits.gather(1, masked[..., None].expand_as(pred))
    assert (pred - wanted).abs().max() < 1e-9
    for name, grad in copy_to_ours(ours, theirs, lambda p: p.grad).items():
        assert torch.allclose(dict(ours.named_parameters())[name].grad, grad, atol=1e-9, rtol=0), name


def test_position_tables_are_their_formulas():
    pos, dim = 7, 12
    table = sincos1d(9, dim)
    for j in range(dim):
        angle = pos / 10000**(2*(j//2)/dim)
        assert abs(table[pos, j].item() - (np.sin(angle) if j % 2 == 0 else np.cos(angle))) < 1e-12
    row, col, omega = 4, 1, 1 / 10000**(np.arange(6)/6)
    expected = np.concatenate([np.sin(col*omega), np.cos(col*omega), np.sin(row*omega), np.cos(row*omega)])
    assert np.allclose(sincos2d(6, 24)[row*6 + col].numpy(), expected, atol=1e-12)


def heads_after(steps, **switches):
    "An SD-MAE after some steps: the model, and its state dict at the start."
    torch.manual_seed(0)
    m = SDMAE(SDMAEParams(decoder=DECODER, optim=OPTIM, head=HeadParams(hidden_dim=32, bottleneck_dim=16, out_dim=64), **switches), SHAPE, 48)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-3)
    for _ in range(steps):
        m(torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8))["loss"].backward()
        optimizer.step(); optimizer.zero_grad(); m.after_step(1.)
    return m, before


@pytest.mark.parametrize("switches, learns", [(dict(), True), (dict(detach_teacher=True), False), (dict(detach_teacher=True, center_on="logits"), False),
                                              (dict(detach_teacher=True, center_on="logits", teacher_momentum=.9), True), (dict(loss_weight=0.), False)])
def test_each_head_learns_or_is_said_not_to(switches, learns):
    "A stop-gradient alone leaves the teacher's head at its random start; with momentum it follows the student's; p = 0 moves neither but by weight decay."
    m, before = heads_after(50, **switches)
    moved = {head: (dict(m.named_parameters())[f"{head}.prototypes"] - before[f"{head}.prototypes"]).norm().item() for head in ("student_head", "teacher_head")}
    decay = 1e-2 # AdamW's own, where a gradient is zero
    assert (moved["teacher_head"] > decay) == learns and (moved["student_head"] > decay) == (m.params.loss_weight > 0), moved
    if m.params.teacher_momentum is None: return
    gap = lambda a, b: sum((x - y).square().sum() for x, y in zip(a, b)).sqrt().item()
    now, start = list(m.teacher_head.parameters()), [v for k, v in before.items() if k.startswith("teacher_head")]
    assert gap(now, m.student_head.parameters()) < gap(start, m.student_head.parameters()), "nearer to the student than where it began"
    assert all(not p.requires_grad for p in now)


def test_a_following_head_asks_for_a_detached_teacher():
    with pytest.raises(ValueError, match="teacher_momentum 0.9 is for a detached teacher: set detach_teacher: true"): SDMAEParams(decoder=DECODER, optim=OPTIM, teacher_momentum=.9)


@pytest.mark.parametrize("switch", [{}, {"distill": "token"}, {"center_on": "logits"}, {"detach_teacher": True}, {"detach_teacher": True, "center_on": "logits", "teacher_momentum": .9}, {"target_norm": "joint"}, {"class_token": True}])
def test_every_switch_trains(switch):
    "Each variant's loss falls on one batch, and the centre moves in training only."
    torch.manual_seed(0)
    m = SDMAE(SDMAEParams(decoder=DECODER, optim=OPTIM, head=HeadParams(hidden_dim=32, bottleneck_dim=16, out_dim=64), **switch), SHAPE, 48)
    images = torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8)
    x, ids = to_unit(images), m.draw_mask(8, "cpu")
    optimizer = torch.optim.AdamW(m.parameters(), 1e-3)
    losses = []
    for _ in range(20):
        loss = m.loss_on(x, *ids)["loss"]; losses.append(loss.item())
        optimizer.zero_grad(); loss.backward(); optimizer.step(); m.after_step(1.)
    assert losses[-1] < losses[0]
    assert m.center.norm() > 0
    before = m.center.clone(); m.eval().loss_on(x, *ids); m.after_step(1.)
    assert torch.equal(m.center, before)


@pytest.mark.parametrize("center_on", ["probs", "logits"])
def test_accumulation_moves_the_centre_once(center_on):
    "Two unequal parts of a batch move the centre as the whole batch does."
    torch.manual_seed(0)
    m = SDMAE(SDMAEParams(decoder=DECODER, optim=OPTIM, center_on=center_on, head=HeadParams(hidden_dim=32, bottleneck_dim=16, out_dim=64)), SHAPE, 48)
    x, (v, k) = torch.rand(8, 3, 48, 48), m.draw_mask(8, "cpu")
    m.loss_on(x, v, k); m.after_step(1.)
    whole = m.center.clone(); m.center.zero_()
    for part in (slice(0, 3), slice(3, 8)): m.loss_on(x[part], v[part], k[part])
    assert m.center.norm() == 0
    m.after_step(1.)
    assert whole.norm() > 0 and torch.allclose(m.center, whole, atol=1e-6)


def test_distill_token_equals_mean_for_one_visible_token():
    "With a single visible token there is nothing to average."
    torch.manual_seed(0)
    params = SDMAEParams(decoder=DECODER, optim=OPTIM, mask_ratio=35/36, head=HeadParams(hidden_dim=32, bottleneck_dim=16, out_dim=64))
    m = SDMAE(params, SHAPE, 48); n = SDMAE(params.model_copy(update={"distill": "token"}), SHAPE, 48); n.load_state_dict(m.state_dict())
    x, ids = torch.rand(4, 3, 48, 48), m.draw_mask(4, "cpu")
    assert m.n_visible == 1
    a, b = m.loss_on(x, *ids)["loss"], n.loss_on(x, *ids)["loss"]
    assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("cls, params", [(MAE, MAEParams), (SDMAE, SDMAEParams), (MIRAM, MIRAMParams)])
def test_a_convolution_over_neighbours_begins_as_nothing_and_learns(cls, params):
    "The same first weights and loss as without it, whatever is drawn later; its gradient is there from the first step, and no encoder keeps it."
    def made(on):
        torch.manual_seed(0)
        return cls(params(decoder=DECODER.model_copy(update=dict(convolution=on)), optim=OPTIM), SHAPE, 48)
    plain, with_it = made(False), made(True)
    more = {k for k in with_it.state_dict() if "neighbours" in k}
    assert len(more) == (4 if cls is MIRAM else 2) and not any(k.startswith("encoder") for k in more)
    assert all(torch.equal(v, with_it.state_dict()[k]) for k, v in plain.state_dict().items()) and len(plain.state_dict()) + len(more) == len(with_it.state_dict())
    images = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8)
    losses = []
    for m in (plain, with_it):
        torch.manual_seed(1); losses.append(m(images)["loss"]); losses[-1].backward()
    assert torch.allclose(*losses, rtol=1e-6) and all(p.grad.abs().max() > 0 for n, p in with_it.named_parameters() if "neighbours" in n)


def test_the_convolution_is_torchs_over_the_grid():
    "Tokens in any order, class token apart: as a convolution of the image of tokens that is put together by hand."
    torch.manual_seed(0)
    d = Decoder(DECODER.model_copy(update=dict(convolution=True)), 3, 48, n_prefix=1)
    torch.nn.init.normal_(d.neighbours.weight)
    visible, masked = torch.tensor([[7, 2, 4], [0, 8, 3]]), torch.tensor([[0, 1, 3, 5, 6, 8], [1, 2, 4, 5, 6, 7]])
    tokens, seen = torch.randn(2, 4, 48), []
    d.blocks[0].register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    d(tokens, visible, masked)
    for b in range(2):
        places, x = [*visible[b].tolist(), *masked[b].tolist()], d.embed(tokens[b])
        rows = [x[1 + i] if i < 3 else d.mask_token[0, 0] for i in range(9)]
        grid = torch.empty(32, 3, 3)
        for place, row in zip(places, rows): grid[:, place//3, place%3] = row + d.pos_embed[0, 1 + place]
        after = grid + F.conv2d(grid[None], d.neighbours.weight, d.neighbours.bias, padding=1)[0]
        assert torch.allclose(seen[0][b, 0], x[0] + d.pos_embed[0, 0], atol=1e-6)
        for i, place in enumerate(places): assert torch.allclose(seen[0][b, 1 + i], after[:, place//3, place%3], atol=1e-5)


def test_release_counts_masked_tokens():
    m = SDMAE(SDMAEParams(decoder=DECODER, optim=OPTIM, mask_ratio=0.6), ModelParams(patch_size=4, embed_dim=48, depth=1, num_heads=3), 56)
    assert m.n_tokens == 196 and m.n_tokens - m.n_visible == 117


# MIRAM

def miram(model=SHAPE, image_size=48, **kwargs):
    "Random weights, each of its own."
    torch.manual_seed(0)
    m = MIRAM(MIRAMParams(**dict(decoder=DECODER, optim=OPTIM) | kwargs), model, image_size)
    for p in m.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=0.1)
    return m


def release_state(m, of=lambda v: v):
    "Weights under the names of MIRAM's release, by the inverse of none of our code: each part written out."
    parts = [("decoder.mask_token", "mask_token"), ("decoder.pos_embed", "decoder_pos_embed"), ("decoder.embed.", "decoder_embed."), ("decoder.blocks.", "decoder_blocks."), ("decoder.norm.", "decoder_norm."),
             ("pixels.", "decoder_pred."), ("fine_decoders.0.pos_embed", "highres_decoder_pos_embed"), ("fine_decoders.0.blocks.", "highres_decoder_blocks."), ("fine_decoders.0.norm.", "highres_decoder_norm."),
             ("fine_decoders.0.pixels.", "highres_decoder_pred."), ("encoder.", "")]
    return {next(name.replace(a, b, 1) for a, b in parts if name.startswith(a)): of(v) for name, v in m.state_dict(keep_vars=True).items()}


def plain_miram(w, x, noise, patch, heads, decoder_heads, keep):
    "MIRAM from the release's weights alone, in plain tensor algebra: masks of full size, tokens put back by sorting."
    norm = lambda name, t: F.layer_norm(t, t.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    linear = lambda name, t: t @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    place = lambda t, ids: t.gather(1, ids[..., None].expand(-1, -1, t.shape[-1]))

    def blocks(name, t, heads):
        for i in range(1 + max(int(k.split(".")[1]) for k in w if k.startswith(f"{name}."))):
            b = f"{name}.{i}"
            q, k, v = (o.unflatten(2, (heads, -1)).transpose(1, 2) for o in linear(f"{b}.attn.qkv", norm(f"{b}.norm1", t)).chunk(3, -1))
            t = t + linear(f"{b}.attn.proj", ((q @ k.mT / q.shape[-1]**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
            t = t + linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", t))))
        return t

    def target(image):
        t = image.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        return (t - t.mean(2, keepdim=True)) / (t.var(2, keepdim=True) + 1e-6).sqrt()

    order = noise.argsort(1); back = order.argsort(1)
    t = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch).flatten(2).mT + w["pos_embed"][:, 1:]
    t = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(len(x), -1, -1), place(t, order[:, :keep])], 1)
    t = linear("decoder_embed", norm("norm", blocks("blocks", t, heads)))
    full = place(torch.cat([t[:, 1:], w["mask_token"].expand(len(x), noise.shape[1] - keep, -1)], 1), back)
    low = blocks("decoder_blocks", torch.cat([t[:, :1], full], 1) + w["decoder_pos_embed"], decoder_heads)
    grid = math.isqrt(noise.shape[1])
    fine = F.interpolate(full.mT.unflatten(2, (grid, grid)), scale_factor=2, mode="nearest").flatten(2).mT
    high = blocks("highres_decoder_blocks", torch.cat([t[:, :1], fine], 1) + w["highres_decoder_pos_embed"], decoder_heads)
    low, high = linear("decoder_pred", norm("decoder_norm", low))[:, 1:], linear("highres_decoder_pred", norm("highres_decoder_norm", high))[:, 1:]
    mask = (back >= keep).to(x)
    errors = [(low - target(x)).square().mean(2), (high - target(F.interpolate(x, scale_factor=2, mode="nearest"))).square().mean(2)]
    return low, high, mask, (errors[0]*mask).sum()/mask.sum() + errors[1].mean()


ODD = dict(model=ModelParams(patch_size=4, embed_dim=32, depth=1, num_heads=2, mlp_ratio=3.), image_size=20, mask_ratio=0.6, decoder=DecoderParams(embed_dim=20, depth=3, num_heads=5))

@pytest.mark.parametrize("form", [{}, ODD], ids=["even", "odd"])
def test_miram_is_its_description(form):
    "Both predictions, loss and every gradient against plain tensor algebra."
    with float64(): m = miram(**form)
    w = release_state(m, lambda v: v.detach().clone().requires_grad_())
    n, size = m.n_tokens, m.encoder.image_size
    x, noise = torch.rand(3, 3, size, size, dtype=torch.float64), torch.rand(3, n, dtype=torch.float64)
    model, decoder = form.get("model", SHAPE), form.get("decoder", DECODER)
    low, high, mask, wanted = plain_miram(w, normalize(x), noise, model.patch_size, model.num_heads, decoder.num_heads, m.n_visible)
    visible, masked = random_masking(noise, m.n_visible)
    out, parts = m.forward_scales(x, visible, masked, ["all", "all"]), m.loss_on(x, visible, masked)
    for (ids, pred), theirs in zip(out.values(), (low, high)): assert (in_order(pred, ids) - theirs).abs().max() < 1e-12
    assert torch.equal(torch.zeros_like(noise).scatter(1, masked, 1.), mask) and abs(parts["loss"] - wanted) < 1e-12
    parts["loss"].backward(); wanted.backward()
    own = dict(m.named_parameters())
    for name, v in w.items():
        if not name.endswith("pos_embed"): assert (own[our_mae_name(name)].grad - v.grad).abs().max() < 1e-12, name


def test_reference_files_of_any_size(tmp_path):
    "A file as the authors' are, of other sizes, made from plain tensor algebra; a spoiled number is told."
    with float64(): m = miram(**ODD)
    w = release_state(m, lambda v: v.detach().clone().requires_grad_())
    images, noise = torch.randint(0, 256, (2, 3, 3, 20, 20), dtype=torch.uint8), torch.rand(2, 3, 25, dtype=torch.float64)
    steps = [plain_miram(w, normalize(to_unit(i, torch.float64)), o, 4, 2, 5, int(25*0.4)) for i, o in zip(images, noise)]
    steps[-1][-1].backward()
    meta = dict(img_size=20, patch_size=4, encoder=dict(dim=32, depth=1, heads=2), decoder=dict(dim=20, depth=3, heads=5), mask_ratio=0.6, scales=[1, 2], target_interpolation="nearest",
                loss=dict(low="masked patches", high="all patches", weights=[1, 1]), norm_pix=True, layernorm_eps=1e-6, grad_norm_last_step={k: v.grad.norm().item() for k, v in w.items() if not k.endswith("pos_embed")})
    arrays = {f"weight/{k}": v.detach() for k, v in w.items()} | {"in/images": images, "in/noise": noise}
    arrays |= {f"out/{k}": torch.stack(v).detach() for k, v in zip(("pred", "highres_pred", "mask", "loss"), zip(*steps))}
    def write(**change): np.savez(tmp_path/"a.npz", meta=json.dumps(meta | change), **arrays); return [str(tmp_path/"a.npz")]
    assert main(write()) == 0
    arrays["out/highres_pred"] = arrays["out/highres_pred"] + 1e-8
    assert main(write()) == 1
    assert main(write(scales=[1, 2, 4])) == 2 and main(write(loss=meta["loss"] | dict(low="some"))) == 2


def test_miram_of_one_scale_is_mae():
    "From one seed: equal weights, and from equal views and masks equal loss and gradients."
    views = ViewParams(hflip=False, scale=(1., 1.), ratio=(1., 1.))
    with float64():
        torch.manual_seed(0); a = MAE(MAEParams(decoder=DECODER, optim=OPTIM, views=views), SHAPE, 48)
        torch.manual_seed(0); b = MIRAM(MIRAMParams(decoder=DECODER, optim=OPTIM, views=views, scales=[1], patches=["masked"], weights=[1.], target="native"), SHAPE, 48)
        assert a.state_dict().keys() == b.state_dict().keys() and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
        images = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8)
        torch.manual_seed(1); one = a.loss_on(to_unit(images, torch.float64), *a.draw_mask(4, "cpu"))
        torch.manual_seed(1); two = b.loss_on(to_unit(images, torch.float64), *b.draw_mask(4, "cpu"))
    one["loss"].backward(); two["loss"].backward()
    assert abs(one["loss"] - two["loss"]) <= 1e-12 and abs(one["structure_r2"] - two["structure_r2"]) <= 1e-12
    for (k, p), q in zip(a.named_parameters(), b.parameters()): assert p.grad is None or (p.grad - q.grad).abs().max() <= 1e-12, k


@pytest.mark.parametrize("switch", [{}, {"target": "native"}, {"attention": "nystrom", "nystrom": NystromParams(landmarks=10, kernel=5)}, {"patches": ["all", "masked"]}, {"class_token": False}, {"target_norm": "none"},
                                    {"scales": [1, 2, 3], "patches": ["masked", "all", "masked"], "weights": [1., .5, .2], "target": "native", "pos_embed": "sincos1d"}], ids=str)
def test_every_switch_of_miram_trains(switch):
    "The loss falls on one batch, every weight is reached, and a step from tiles gives the same parts."
    m = miram(**switch)
    tiles = torch.randint(0, 256, (6, 1, 48*m.params.scales[-1], 48*m.params.scales[-1]), dtype=torch.uint8)
    fine = center_resize(to_unit(tiles), m.views.image_size)
    x, ids = center_resize(fine, 48), m.draw_mask(6, "cpu")
    optimizer, losses = torch.optim.AdamW(m.parameters(), 1e-3), []
    for _ in range(15):
        loss = m.loss_on(x, *ids, fine)["loss"]; losses.append(loss.item())
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.grad.abs().sum() > 0 for p in m.parameters() if p.requires_grad)
    parts = m(tiles)
    assert {"loss", *(f"loss_{s}" for s in m.params.scales), "structure_r2", "structure_r2_2"} <= parts.keys()
    assert parts["loss"].item() == pytest.approx(sum(w*parts[f"loss_{s}"].item() for w, s in zip(m.params.weights, m.params.scales)))


def test_structure_is_that_of_hidden_patches():
    "Whether or not the loss counts the visible ones."
    x, parts = torch.rand(2, 3, 48, 48), []
    for patches in (["masked", "all"], ["all", "masked"]):
        m = miram(patches=patches)
        parts.append(m.loss_on(x, *m.draw_mask(2, "cpu", torch.Generator().manual_seed(0))))
    a, b = parts
    assert all(a[k].item() == pytest.approx(b[k].item(), rel=1e-5) for k in ("structure_r2", "structure_r2_2"))
    assert all(abs(a[k] - b[k]) > 1e-5 for k in ("loss_1", "loss_2"))


def test_a_scale_without_weight_teaches_nothing():
    m = miram(weights=[1., 0.])
    m(torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8))["loss"].backward()
    assert all(p.grad.abs().sum() == 0 for p in m.fine_decoders.parameters()) and m.pixels.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_finer_patches_are_the_enlarged_mask(scale):
    "Indices against numpy's Kronecker product of the mask."
    mask = np.random.default_rng(0).random((5, 5)) < 0.4
    ids = torch.from_numpy(np.flatnonzero(mask))[None]
    assert sorted(finer(ids, 5, scale)[0].tolist()) == np.flatnonzero(np.kron(mask, np.ones((scale, scale)))).tolist()


def test_targets_of_miram():
    "Upsampled repeats the input's pixels; native is the tile itself, and the input torchvision's antialiased resize of it."
    tile = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    plain = ViewParams(hflip=False, scale=(1., 1.), ratio=(1., 1.))
    seen, m = {}, miram(target="native", views=plain)
    m.loss_on = lambda x, visible, masked, fine: seen.update(x=x, fine=fine)
    m(tile)
    assert torch.allclose(seen["fine"], tile/255, atol=1e-5) and torch.equal(m.image_at(2, seen["x"], seen["fine"]), seen["fine"])
    small = TF.resize(tile/255, [48, 48], interpolation=InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    assert torch.allclose(seen["x"], small, atol=2e-3)
    up = miram().image_at(2, small)
    assert np.array_equal(up.numpy(), small.numpy().repeat(2, 2).repeat(2, 3))
    with pytest.raises(ValueError, match="native needs the view"): m.image_at(2, small)
    with pytest.raises(ValueError, match="needs tiles of 96 px, these have 48: raise data.image_size"): m(tile[..., :48, :48])


@pytest.mark.parametrize("target", ["upsampled", "native"])
def test_reconstruction_at_two_scales(target):
    "A perfect prediction gives the original; the first scale's pictures are MAE's."
    m, tile = miram(target=target), torch.randint(0, 256, (2, 1, 96, 96), dtype=torch.uint8)
    pictures = m.reconstruct(tile, seed=3)
    assert list(pictures) == ["original", "masked", "reconstruction", "original_2", "reconstruction_2"]
    assert [v.shape[-1] for v in pictures.values()] == [48, 48, 48, 96, 96] and all(v.shape[1] == 3 and 0 <= v.min() and v.max() <= 1 for v in pictures.values())
    for k, v in MAE.reconstruct(m, tile, seed=3).items(): assert torch.equal(v, pictures[k])
    if target == "native": assert torch.equal(pictures["original_2"], (tile/255).expand(-1, 3, -1, -1))
    every = torch.arange(144).expand(2, -1)
    m.forward_scales = lambda x, visible, masked: {1: None, 2: (every, pixel_target(normalize(pictures["original_2"]), every, 8, "joint"))}
    perfect = m.reconstruct(tile, seed=3)
    assert (perfect["reconstruction_2"] - perfect["original_2"]).abs().max() < 1e-4


def nystrom_and_full(landmarks, n, iterations=6, dim=48, heads=3):
    "Both attentions with the same weights, and smooth tokens."
    torch.manual_seed(0)
    full, ours = Attention(dim, heads), Nystrom(dim, heads, NystromParams(landmarks=landmarks, iterations=iterations))
    for a, b in ((ours.to_qkv, full.qkv), (ours.to_out[0], full.proj)): a.weight.data.copy_(torch.nn.init.xavier_uniform_(b.weight))
    for p in (full.proj.bias, ours.to_out[0].bias, ours.res_conv.weight): torch.nn.init.zeros_(p)
    x = 1.4*torch.sin(torch.linspace(0, 30, n)[:, None]*torch.rand(dim) + 6*torch.rand(dim))[None]
    return ours, full, x


@pytest.mark.parametrize("landmarks, n, iterations, tolerance", [(65, 65, 6, 0.03), (65, 65, 20, 1e-3), (64, 197, 6, 0.03), (50, 65, 6, 0.03), (100, 65, 20, 1e-3)])
def test_nystrom_attention_is_near_full_attention(landmarks, n, iterations, tolerance):
    "Up to the pseudo-inverse: about 2 % after 6 iterations, 0.1 % after 20; token counts need not be multiples of the landmarks."
    ours, full, x = nystrom_and_full(landmarks, n, iterations)
    a, b = ours(x), full(x)
    assert (a - b).norm() / b.norm() < tolerance
    a.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in ours.parameters())


# Grey images

@pytest.mark.parametrize("kind", ["mae", "sdmae", "upsampled", "native"])
def test_methods_train_on_grey_batches(kind):
    "One channel gives the loss of three equal ones, and reconstructions in their mean."
    views = ViewParams(vflip=True, rot90=True, rotate=20, zoom=(.8, 1.2), intensity=.1, color_jitter=.2, od_jitter=0.)
    torch.manual_seed(0)
    if kind == "mae": m = MAE(MAEParams(decoder=DECODER, optim=OPTIM, views=views), SHAPE, 48)
    elif kind == "sdmae": m = SDMAE(SDMAEParams(decoder=DECODER, optim=OPTIM, views=views, head=HeadParams(hidden_dim=32, bottleneck_dim=16, out_dim=64)), SHAPE, 48)
    else: m = miram(target=kind, views=views)
    images = torch.randint(0, 256, (4, 1, 96, 96), dtype=torch.uint8)
    torch.manual_seed(1); one = m(images)["loss"]
    torch.manual_seed(1); three = m(images.expand(-1, 3, -1, -1))["loss"]
    assert one.item() == pytest.approx(three.item(), rel=1e-3)  # luma's weights add up to 0.9999
    one.backward()
    coloured = m.reconstruct(images.repeat(1, 3, 1, 1))
    for k, v in m.reconstruct(images).items():
        within = (coloured[k].amin(1) > 0) & (coloured[k].amax(1) < 1)  # where no channel was clamped
        assert v.shape[1] == 3 and torch.equal(v[:, 0], v[:, 1]) and torch.equal(v[:, 0], v[:, 2]) and within.float().mean() > .5, k
        torch.testing.assert_close(v[:, 0][within], coloured[k].mean(1)[within], rtol=0, atol=1e-5)


def test_evaluation_sees_grey_images():
    "Features, fine-tuning and predictions of one channel are those of three."
    class Store:
        def __init__(self, images): self.images = images
        def batch(self, rows): return self.images[torch.as_tensor(rows)]
        def task(self, name): return SimpleNamespace(classes=["a", "b"], multi=False)
        def targets(self, rows, task="label"): return torch.as_tensor(rows) % 2
    images, rows = torch.randint(0, 256, (12, 1, 40, 40), dtype=torch.uint8), np.arange(12)
    grey, colour = Store(images), Store(images.repeat(1, 3, 1, 1))
    params = FinetuneParams(epochs=1, batch_size=4, optim=OPTIM, views=ViewParams(vflip=True, rotate=25, intensity=.08, erasing=.5), mixup=.8)
    def features(store): torch.manual_seed(0); return extract(build_encoder(32, SHAPE, EncoderForm()), store, rows, MEAN, STD, "cpu")
    def probabilities(store):
        torch.manual_seed(0)
        return predict(fit_classifier(build_encoder(32, SHAPE, EncoderForm(), num_classes=2), store, rows, params)[0], store, rows)
    assert np.allclose(features(grey), features(colour), atol=1e-5) and np.allclose(probabilities(grey), probabilities(colour), atol=1e-4)


@pytest.mark.parametrize("change", [dict(od_jitter=.3), dict(color_jitter=.4), dict(rand_augment="rand-m9-mstd0.5-inc1"), dict(intensity=.2)])
def test_grey_views_stay_grey(change):
    out = Views(ViewParams(**change), 24)(torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8))
    assert out.shape == (5, 3, 24, 24) and 0 <= out.min() and out.max() <= 1
    if "rand_augment" not in change: assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0], out[:, 2])


def test_two_channels_are_refused():
    with pytest.raises(ValueError, match="images of 2 channels: one .grey. or three"): Views(ViewParams(), 24)(torch.zeros(2, 2, 32, 32, dtype=torch.uint8))


# Views

def test_views_that_are_off_draw_no_number():
    "The generator is left where box and flip leave it, and the pixels are theirs."
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(0); Views(ViewParams(rotate=0., zoom=(1., 1.), intensity=0.), 24)(images); after = torch.rand(1)
    torch.manual_seed(0); random_boxes(5, 32, 32, (0.2, 1.), (3/4, 4/3)); torch.rand(5)
    assert torch.equal(torch.rand(1), after)


def test_rotation_and_zoom_are_torchvisions(monkeypatch):
    "Angles and factors lie in their bounds, and the pixels are those of `affine`."
    drawn, real = [], augment.rotate_zoom
    def note(images, angle, factor): drawn.append((images, angle, factor)); return real(images, angle, factor)
    monkeypatch.setattr(augment, "rotate_zoom", note)
    images = torch.randint(0, 256, (200, 1, 6, 6), dtype=torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    out = Views(ViewParams(rotate=25, zoom=(.8, 1.3), hflip=False), 24)(images)
    (x, angle, factor), = drawn
    assert -25 <= angle.min() < -20 and 20 < angle.max() <= 25 and .8 <= factor.min() < .85 and 1.25 < factor.max() <= 1.3
    for i in range(5):
        wanted = TF.affine(x[i], angle[i].item(), [0, 0], factor[i].item(), [0., 0.], interpolation=InterpolationMode.BILINEAR)
        assert torch.allclose(out[i], wanted.expand(3, -1, -1), atol=1e-4)
    Views(ViewParams(zoom=(1.2, 1.2)), 24)(images[:2])
    assert drawn[1][1].abs().max() == 0 and torch.allclose(drawn[1][2], torch.tensor(1.2)), "zoom alone does not turn"


@pytest.mark.parametrize("name", ["mae", "miram"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_last_block_for_hidden_tokens_only(name, fused):
    "Decoding all tokens and then picking gives the same loss and gradients, in float64."
    torch.manual_seed(0)
    shape, optim = DecoderParams(embed_dim=24, depth=2, num_heads=3), OptimParams(base_lr=1.)
    kind, params = dict(mae=(MAE, MAEParams), miram=(MIRAM, MIRAMParams))[name]
    with float64(): model = kind(params(decoder=shape, optim=optim), ModelParams(patch_size=8, embed_dim=32, depth=2, num_heads=2), 32)
    for m in model.modules():
        if isinstance(m, Attention): m.fused_attn = fused
    x, ids, decode, found = torch.rand(3, 3, 32, 32, dtype=torch.float64), model.draw_mask(3, "cpu"), model.decoder.forward, []
    for short in (True, False):
        if not short: model.decoder.forward = lambda t, v, m, last=None: decode(t, v, m)[:, -last:]
        loss = model.loss_on(x, *ids)["loss"]
        model.zero_grad(); loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_compiled_blocks_give_the_gradients_of_plain_ones():
    "float32; what is compiled keeps its names."
    plain = MAE(MAEParams(decoder=DECODER, optim=OPTIM, views=ViewParams(scale=(1, 1), ratio=(1, 1))), SHAPE, 32)
    fast = compile_blocks(copy.deepcopy(plain))
    x, ids = torch.rand(2, 3, 32, 32), torch.arange(16).expand(2, 16)
    for model in (plain, fast): model.loss_on(x, ids[:, :8], ids[:, 8:])["loss"].backward()
    assert plain.state_dict().keys() == fast.state_dict().keys()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters()):
        if p.requires_grad: torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")


def test_collapse_is_told_by_what_the_teacher_says_of_images_not_by_its_entropy():
    soft = torch.rand(64).softmax(-1)
    alike, apart = soft.expand(16, 64), torch.rand(16, 64).mul(60).softmax(-1)
    row = lambda probs: dict(epoch=1) | {k: v.item() for k, v in teacher_statistics(probs, torch.tensor(9.)).items()}
    silent, _ = heads_after(1, loss_weight=0.)
    assert row(alike)["teacher_entropy"] > 4 and "the teacher has collapsed" in silent.warnings(row(alike))[0]
    assert row(apart)["teacher_entropy"] < 1.5 and silent.warnings(row(apart)) == []
    assert row(apart)["teacher_information"] <= np.log(16) + 1e-5
    tokens = teacher_statistics(apart.reshape(4, 4, 64), torch.tensor(9.))
    assert torch.allclose(tokens["teacher_information"], teacher_statistics(apart, torch.tensor(9.))["teacher_information"])
    assert "teacher_information" not in silent(torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8)), "p = 0 has no teacher to collapse"


# The registry, and methods without masks

@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_what_the_registry_says(name):
    "Its module, its notebook, the class of its parameters: enough for whoever asks by name."
    kind = method_class(name)
    assert kind.__module__ == f"sdmae.methods.{METHODS[name].split(':')[0]}" and (ROOT/"nbs"/"methods"/f"{METHODS[name].split(':')[0]}.ipynb").is_file()
    assert issubclass(kind.Params, Section) and kind.Params.__doc__
    for hook in ("before_step", "after_step"):
        if hasattr(kind, hook): assert list(inspect.signature(getattr(kind, hook)).parameters) == ["self", "progress"]


def test_an_unknown_method_is_told_what_is_near():
    with pytest.raises(ValueError, match="unknown method 'sdame', did you mean 'sdmae'\\? known: random, histogram, imported, supervised, mae, sdmae, miram"): method_class("sdame")
    with pytest.raises(ValueError, match="unknown method 'zebra'; known: random"): build_method("zebra", None, SHAPE, 32)


def test_methods_are_loaded_when_asked_for():
    "So that one method's code concerns no other's run."
    code = "import sys; from sdmae.methods.registry import method_class; method_class('mae'); print([o for o in sys.modules if o.startswith('sdmae.methods.')])"
    r = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert sorted(ast.literal_eval(r.stdout)) == ["sdmae.methods.mae", "sdmae.methods.masked", "sdmae.methods.registry"], r.stderr


def supervised(n_classes=3, multi=False, weights=None, **kwargs):
    "A head that says something."
    torch.manual_seed(0)
    m = Supervised(SupervisedParams(optim=OPTIM, **kwargs), SHAPE, 48, n_classes, multi, weights)
    torch.nn.init.normal_(m.head.weight, std=1.)
    return m


@pytest.mark.parametrize("smoothing", [0., .1])
@pytest.mark.parametrize("weighted", [False, True])
def test_supervised_loss_is_its_formula(smoothing, weighted):
    "Mean over images of −w·Σ q·log p with smoothed labels q; the weights are scikit-learn's."
    y = torch.tensor([0, 1, 1, 2, 1, 0, 1, 1])
    w = torch.tensor(compute_class_weight("balanced", classes=np.arange(3), y=y.numpy())).float() if weighted else None
    m, x = supervised(weights=w, class_weights=weighted, label_smoothing=smoothing).eval(), torch.rand(8, 3, 48, 48)
    with torch.no_grad(): parts, z = m.loss_on(x, y), m.head(m.encoder.pooled(normalize(x))).double().numpy()
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    q = np.eye(3)[y]*(1-smoothing) + smoothing/3
    want = -(q*log_p*(w.double().numpy() if weighted else 1)).sum(1).mean()
    assert parts["loss"].item() == pytest.approx(want, rel=1e-5) and parts["accuracy"].item() == (z.argmax(1) == y.numpy()).mean()


def test_supervised_of_several_labels():
    y, w, x = torch.randint(0, 2, (8, 3)).float(), torch.tensor([.5, 2., 3.]), torch.rand(8, 3, 48, 48)
    m = supervised(multi=True, weights=w, class_weights=True)
    with torch.no_grad(): p = torch.sigmoid(m.head(m.encoder.pooled(normalize(x)))).double()
    assert m.loss_on(x, y)["loss"].item() == pytest.approx(-(w*y*p.log() + (1-y)*(1-p).log()).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="label_smoothing 0.1: not for a task of several labels"): supervised(multi=True, label_smoothing=.1)
    with pytest.raises(ValueError, match="class_weights: false, but weights are"): supervised(weights=w)


@pytest.mark.parametrize("kwargs", [dict(weights=torch.tensor([.2, 1., 5.]), class_weights=True, label_smoothing=.1), dict(multi=True)])
def test_parts_of_a_supervised_batch_add_up(kwargs):
    "Gradients of two unequal parts are the whole batch's, class weights included."
    m, x, grads = supervised(**kwargs), torch.rand(8, 3, 48, 48), []
    y = torch.randint(0, 2, (8, 3)).float() if "multi" in kwargs else torch.tensor([0, 1, 1, 2, 1, 0, 1, 1])
    for parts in ([slice(0, 8)], [slice(0, 3), slice(3, 8)]):
        m.zero_grad()
        for o in parts: (m.loss_on(x[o], y[o])["loss"]*(o.stop - o.start)/8).backward()
        grads.append(m.encoder.blocks[0].attn.qkv.weight.grad.clone())
    assert torch.allclose(*grads, atol=1e-6) and grads[0].norm() > 0


@pytest.mark.parametrize("channels", [3, 1])
def test_the_histogram_is_numpys(channels):
    "Through the path that every encoder's features take."
    tiles = torch.randint(0, 256, (6, 3, 24, 24), dtype=torch.uint8)[:, :channels]
    store, m = SimpleNamespace(batch=lambda rows: tiles[torch.as_tensor(rows)]), method_class("histogram")(method_class("histogram").Params(channels=channels), SHAPE, 24)
    found = extract(m.encoder, store, np.arange(6), **m.normalization, device="cpu").reshape(6, -1, 16)
    for image, shares in zip(tiles.expand(-1, found.shape[1], -1, -1), found):
        for c, share in zip(image, shares): np.testing.assert_allclose(share, np.histogram(c, 16, (0, 256))[0]/24**2, rtol=1e-6)
