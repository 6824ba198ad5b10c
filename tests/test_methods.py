"MAE and SD-MAE against independent implementations."
from pathlib import Path
import numpy as np, pytest, torch
from sdmae.params import DecoderParams, HeadParams, MAEParams, ModelParams, OptimParams, SDMAEParams
from sdmae.methods.mae import MAE
from sdmae.methods.sdmae import SDMAE
from sdmae.models.decoders import split_tokens
from sdmae.models.vit import sincos1d, sincos2d
from sdmae.reference import compare, float64, main
from sdmae.views.augment import normalize, to_unit

REFERENCE = Path(__file__).parents[2]/"shared"/"reference"/"sdmae.npz"
SHAPE = ModelParams(patch_size=8, embed_dim=48, depth=2, num_heads=3)
DECODER, OPTIM = DecoderParams(embed_dim=32, depth=2, num_heads=4), OptimParams(base_lr=1e-3)


@pytest.mark.skipif(not REFERENCE.exists(), reason=f"the authors' numbers are not here: {REFERENCE.name} beside the project")
def test_sdmae_is_the_authors_to_nine_digits(capsys):
    worst = compare(REFERENCE)
    assert len(worst) > 80 and {"pred", "target", "student", "teacher", "loss", "loss_mse", "loss_distill", "center"} <= worst.keys()
    assert max(worst.values()) <= 1e-9, worst
    assert main([str(REFERENCE)]) == 0
    assert main([str(REFERENCE), "--tolerance", "1e-30"]) == 1


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
    visible, masked = split_tokens(noise, ours.n_visible)
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


@pytest.mark.parametrize("switch", [{}, {"distill": "token"}, {"center_on": "logits"}, {"detach_teacher": True}, {"target_norm": "joint"}, {"class_token": True}])
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
        optimizer.zero_grad(); loss.backward(); optimizer.step(); m.after_step()
    assert losses[-1] < losses[0]
    assert m.center.norm() > 0
    before = m.center.clone(); m.eval().loss_on(x, *ids); m.after_step()
    assert torch.equal(m.center, before)


@pytest.mark.parametrize("center_on", ["probs", "logits"])
def test_accumulation_moves_the_centre_once(center_on):
    "Two unequal parts of a batch move the centre as the whole batch does."
    torch.manual_seed(0)
    m = SDMAE(SDMAEParams(decoder=DECODER, optim=OPTIM, center_on=center_on, head=HeadParams(hidden_dim=32, bottleneck_dim=16, out_dim=64)), SHAPE, 48)
    x, (v, k) = torch.rand(8, 3, 48, 48), m.draw_mask(8, "cpu")
    m.loss_on(x, v, k); m.after_step()
    whole = m.center.clone(); m.center.zero_()
    for part in (slice(0, 3), slice(3, 8)): m.loss_on(x[part], v[part], k[part])
    assert m.center.norm() == 0
    m.after_step()
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


def test_release_counts_masked_tokens():
    m = SDMAE(SDMAEParams(decoder=DECODER, optim=OPTIM, mask_ratio=0.6), ModelParams(patch_size=4, embed_dim=48, depth=1, num_heads=3), 56)
    assert m.n_tokens == 196 and m.n_tokens - m.n_visible == 117
