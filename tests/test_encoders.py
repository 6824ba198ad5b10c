"Every encoder keeps one protocol, against timm, torchvision and numpy."
import copy, json
from functools import partial
import numpy as np, pytest, timm, torch, torchvision
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn
from sdmae.evaluate.features import extract
from sdmae.evaluate.finetune import Classifier, decay_groups, fit_classifier, predict
from sdmae.evaluate.segment import STRIDES, Segmenter, fit_segmenter, predict_masks, segment_encoder, segment_groups
from sdmae.methods.imported import Imported, ImportedParams
from sdmae.models.convnet import ConvEncoder
from sdmae.models.encoders import build_encoder, load_encoder, save_encoder
from sdmae.models.histogram import HistogramEncoder
from sdmae.models.vit import Encoder, attention_maps, has_attention, suit_attention
from sdmae.models.weights import export_timm, find_encoder, import_encoder, main
from sdmae.params import EncoderForm, FinetuneParams, ModelParams, OptimParams, SegmentParams, ViewParams

HALF, FORM = [0.5]*3, EncoderForm()
SHAPE = ModelParams(patch_size=8, embed_dim=48, depth=4, num_heads=3)
CONVS = ["resnet18", "resnet50", "convnext_atto", "tf_efficientnet_lite0", "mobilenetv3_small_050", "regnetx_002"]


def images(size=32, n=2, seed=0): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))

def made(arch, size=32, seed=0, **kwargs):
    "An encoder in evaluation mode whose BatchNorms have seen images and let all branches through (timm starts some at zero)."
    torch.manual_seed(seed)
    encoder = suit_attention(build_encoder(size, SHAPE if arch == "vit" else ModelParams(arch=arch), FORM, **kwargs), "cpu")
    for m in encoder.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.uniform_(m.weight, 0.5, 1.5)
    with torch.no_grad(): encoder.train().pooled(images(64, 4, 1))
    return encoder.eval()

def saved(folder, encoder, size=32):
    model = dict(model=SHAPE.model_dump()) if encoder.kind == "vit" else {}
    save_encoder(folder, encoder, dict(image_size=size, form=FORM.model_dump(), mean=HALF, std=HALF, **model))
    return folder


# The protocol

@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize("arch", ["vit", *CONVS])
def test_pooled_and_maps(arch, size):
    encoder, x = made(arch), images(size)
    blocks = [0, len(encoder.strides)-1]
    with torch.no_grad(): pooled, maps = encoder.pooled(x), encoder.maps(x, blocks)
    assert pooled.shape == (2, encoder.width) and pooled.isfinite().all() and encoder.image_size == 32
    assert [m.shape for m in maps] == [(2, encoder.widths[i], size//encoder.strides[i], size//encoder.strides[i]) for i in blocks]

@pytest.mark.parametrize("arch", CONVS)
def test_convolutional_maps_and_features_are_timms(arch):
    encoder, x = made(arch), images(96)
    state = encoder.network.state_dict()
    theirs, staged = timm.create_model(arch, num_classes=0, global_pool="").eval(), timm.create_model(arch, features_only=True).eval()
    theirs.load_state_dict(state)
    own = {k.replace(".", "_", 1) if k not in staged.state_dict() else k: v for k, v in state.items()} # features_only writes stages.0 as stages_0
    missing, _ = staged.load_state_dict(own, strict=False)
    assert missing == [] and encoder.strides == staged.feature_info.reduction() and encoder.widths == staged.feature_info.channels()
    with torch.no_grad():
        torch.testing.assert_close(encoder.pooled(x), theirs.forward_features(x).mean((2, 3)), rtol=0, atol=0)
        for a, b in zip(encoder.maps(x, range(len(encoder.strides))), staged(x)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("size", [32, 64])
def test_resnets_are_torchvisions(arch, size):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)(weights=None)
    theirs.fc = nn.Identity()
    with torch.no_grad(): theirs.train()(images(64, 4))
    encoder = ConvEncoder(size, arch)
    encoder.network.load_state_dict(theirs.state_dict())
    seen = []
    for stage in (theirs.relu, theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4): stage.register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval().pooled(images(size)), theirs.eval()(images(size)), rtol=1e-4, atol=1e-5)
        for a, b in zip(encoder.maps(images(size), range(5)), seen): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("arch, message", [("resnet81", "no network of that name; close are .*resnet18"), ("swin_tiny_patch4_window7_224", "is a SwinTransformer"),
                                           ("vit_tiny_patch16_224", r"is a VisionTransformer.*arch: vit"), ("qqqq", "no network of that name$")])
def test_networks_that_are_refused(arch, message):
    with pytest.raises(ValueError, match=message): build_encoder(32, ModelParams(arch=arch), FORM)

def test_arguments_that_a_network_does_not_take():
    with pytest.raises(ValueError, match="vgg11 does not take num_classes, drop_path_rate"): ConvEncoder(32, "vgg11", drop_path=0.1)
    with pytest.raises(ValueError, match="pool token: resnet18 has no class token"): ConvEncoder(32, "resnet18", 2, pool="token")

def test_the_head_starts_near_zero():
    for arch, head in (("resnet18", "fc"), ("convnext_atto", "head.fc"), ("tf_efficientnet_lite0", "classifier"), ("vit", "head")):
        encoder = made(arch, num_classes=3)
        linear = encoder.network.get_submodule(head)
        assert encoder.head_parts[0] == head and linear.weight.shape[0] == 3 and linear.weight.abs().max() < 2e-4 and not linear.bias.any()

@pytest.mark.parametrize("arch", ["resnet18", "convnext_atto"])
def test_drop_path_acts(arch):
    encoder = made(arch, drop_path=0.5).train()
    for m in encoder.modules():
        if isinstance(m, nn.BatchNorm2d): m.eval()
    torch.manual_seed(0)
    with torch.no_grad(): assert not torch.equal(encoder.pooled(images()), encoder.pooled(images()))


# Parameters

def test_model_params():
    assert SHAPE.arch == "vit" and SHAPE.mlp_ratio == 4. and ModelParams(arch="resnet50").mlp_ratio is None
    for model in (SHAPE, ModelParams(arch="resnet50", image_size=64)): assert ModelParams(**model.model_dump()) == model
    old = dict(patch_size=8, embed_dim=48, depth=4, num_heads=3, mlp_ratio=4., image_size=None)
    assert ModelParams(**old) == SHAPE, "written before there was an arch"

@pytest.mark.parametrize("values, message", [
    (dict(arch="resnet50", patch_size=8, depth=3), "patch_size, depth: timm knows the sizes of resnet50"), (dict(arch="resnet50", mlp_ratio=4.), "mlp_ratio: timm knows"),
    (dict(patch_size=8, embed_dim=48), "depth, num_heads: a vision transformer needs them"), (dict(), "patch_size, embed_dim, depth, num_heads: a vision"),
    (dict(patch_size=8, embed_dim=48, depth=2, num_heads=5), "embed_dim 48 is not divisible by num_heads 5")])
def test_faulty_model_params(values, message):
    with pytest.raises(ValidationError, match=message): ModelParams(**values)


# Crops of another size

@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("kind", ["sincos1d", "sincos2d"])
@pytest.mark.parametrize("shape", [(32, 32), (48, 48), (16, 16), (24, 64)])
def test_positions_of_crops_are_timms(class_token, kind, shape):
    torch.manual_seed(0)
    ours = Encoder(32, 8, 48, 2, 3, class_token=class_token, pos_embed=kind).eval()
    theirs = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, class_token=class_token, num_classes=0, dynamic_img_size=True,
                               global_pool="", norm_layer=partial(nn.LayerNorm, eps=1e-6)).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, *shape)
    with torch.no_grad():
        for _ in range(2): torch.testing.assert_close(ours.tokens(x), theirs.forward_features(x), rtol=1e-4, atol=1e-5)
        for a, b in zip(ours.maps(x, [0, 1]), theirs.forward_intermediates(x, intermediates_only=True)): assert torch.equal(a, b)
    grid = shape[0]//8, shape[1]//8
    assert torch.equal(ours.positions(grid), resample_abs_pos_embed(ours.pos_embed, grid, (4, 4), int(class_token)))

def test_a_table_is_made_once_and_again_when_its_source_changes():
    encoder = made("vit")
    with torch.inference_mode(): first = encoder.positions((6, 6))
    assert encoder.positions((6, 6)) is first and not first.is_inference() and encoder.positions((4, 4)) is encoder.pos_embed
    encoder.tokens(images(48)).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    encoder.load_state_dict({k: 2*v for k, v in encoder.state_dict().items()})
    assert torch.equal(encoder.positions((6, 6)), 2*first)
    other = copy.deepcopy(encoder)
    assert torch.equal(other.positions((6, 6)), 2*first) and encoder.double().positions((6, 6)).dtype == torch.float64

def test_visible_tokens_of_a_crop():
    encoder, x = made("vit"), images(48)
    ids = torch.tensor([[0, 7, 35], [1, 2, 3]])
    torch.testing.assert_close(encoder.embed(x, ids), encoder.embed(x).gather(1, ids[..., None].expand(-1, -1, 48)))
    with pytest.raises(ValueError, match="40 × 44 px cannot be cut into patches of 8"): encoder.embed(torch.zeros(1, 3, 40, 44))


# To a file and back

@pytest.mark.parametrize("arch", ["vit", "resnet18", "convnext_atto", "tf_efficientnet_lite0"])
def test_a_folder_knows_its_kind(tmp_path, arch):
    encoder = made(arch, num_classes=2)
    saved(tmp_path/"run"/"encoder", encoder)
    for folder in (tmp_path/"run", tmp_path/"run"/"encoder"):
        again, config = load_encoder(folder)
        tuned, _ = load_encoder(folder, num_classes=3, drop_path=0.1, pool="mean")
        with torch.no_grad():
            if arch != "vit": assert torch.equal(again.eval().pooled(images()), encoder.pooled(images())), "a fine-tuned vision transformer has no final norm"
            assert torch.equal(load_encoder(saved(tmp_path/"twice", again))[0].eval().pooled(images()), again.eval().pooled(images()))
            assert torch.equal(tuned.eval().pooled(images()), encoder.pooled(images())) and tuned.network(images()).shape == (2, 3)
    assert config["kind"] == encoder.kind and config["model"]["arch"] == arch
    state = load_file(tmp_path/"run"/"encoder"/"encoder.safetensors")
    assert not [k for k in state if k.startswith(encoder.head_parts)]
    if arch != "vit": timm.create_model(arch, num_classes=0).load_state_dict(state)

def test_old_folders_are_vision_transformers(tmp_path):
    encoder = made("vit")
    config = json.loads((saved(tmp_path, encoder)/"config.json").read_text())
    old = {k: v for k, v in config.items() if k != "kind"} | dict(model={k: v for k, v in config["model"].items() if k != "arch"})
    (tmp_path/"config.json").write_text(json.dumps(old))
    assert torch.equal(load_encoder(tmp_path)[0].eval().pooled(images()), encoder.pooled(images()))

def test_folders_that_do_not_fit(tmp_path):
    saved(tmp_path, made("resnet18"))
    config = json.loads((tmp_path/"config.json").read_text())
    (tmp_path/"config.json").write_text(json.dumps(config | dict(model=dict(arch="resnet34"))))
    with pytest.raises(ValueError, match="of another architecture. Missing: .'layer1.2"): load_encoder(tmp_path)
    (tmp_path/"encoder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="encoder.safetensors does not exist"): load_encoder(tmp_path)


# The histogram

class Tiles:
    def __init__(self, n, size=16, channels=3):
        self.tiles = np.random.default_rng(0).integers(0, 256, (n, size, size, channels), dtype=np.uint8)
    def batch(self, idx): return torch.from_numpy(self.tiles[idx]).permute(0, 3, 1, 2)

def histogram(store, idx, **kwargs):
    encoder = HistogramEncoder(16, **kwargs)
    return extract(encoder, store, idx, encoder.mean, encoder.std, "cpu", batch_size=2)

@pytest.mark.parametrize("bins", [1, 7, 16, 256])
def test_the_histogram_is_numpys(bins):
    store, idx = Tiles(9), np.array([8, 0, 4])
    got = histogram(store, idx, bins=bins)
    assert got.dtype == np.float32
    for row, i in zip(got.reshape(3, 3, bins), idx):
        for c in range(3): assert np.allclose(row[c], np.histogram(store.tiles[i,...,c], bins=bins, range=(0,256))[0]/256, atol=1e-7)

def test_a_grey_tile_has_one_histogram():
    grey, three = Tiles(6, channels=1), Tiles(6)
    three.tiles = grey.tiles.repeat(3, axis=3)
    h = histogram(grey, [4,0,1], channels=1)
    assert h.shape == (3, 16) and (np.tile(h, 3) == histogram(three, [4,0,1])).all()

def test_the_histogram_from_its_folder(tmp_path):
    save_encoder(tmp_path, HistogramEncoder(16, channels=1, bins=7), {})
    again, config = load_encoder(tmp_path)
    assert config["kind"] == "histogram" and config["mean"] == [0.]*3 and config["std"] == [1.]*3 and load_file(tmp_path/"encoder.safetensors") == {}
    store = Tiles(3, channels=1)
    assert (extract(again, store, [0, 1, 2], config["mean"], config["std"], "cpu") == histogram(store, [0, 1, 2], channels=1, bins=7)).all()
    with pytest.raises(ValueError, match="not fine-tuned"): load_encoder(tmp_path, num_classes=2)
    with pytest.raises(ValueError, match="holds a colour histogram"): find_encoder(tmp_path)
    with pytest.raises(ValueError, match="holds a colour histogram"): export_timm(tmp_path, tmp_path/"h.safetensors")

def test_faulty_histograms():
    with pytest.raises(ValueError, match="bins: 0"): HistogramEncoder(16, bins=0)
    with pytest.raises(ValueError, match="channels: 2"): HistogramEncoder(16, channels=2)
    with pytest.raises(ValueError, match="no tiles"): histogram(Tiles(2), [])


# Attention

def test_attention_is_for_vision_transformers():
    assert has_attention(made("vit")) and attention_maps(made("vit"), images(48)).shape == (2, 6, 6)
    for encoder in (made("resnet18"), HistogramEncoder(32)):
        assert not has_attention(encoder)
        with pytest.raises(ValueError, match=f"{type(encoder).__name__} has no attention"): attention_maps(encoder, images())


# Fine-tuning

class Bright:
    "Tiles of two classes, told apart by their brightness."
    def task(self, name): return type("Task", (), dict(classes=["dark", "bright"], multi=False))
    def targets(self, rows, task): return torch.as_tensor(rows) % 2
    def batch(self, rows):
        g = torch.Generator().manual_seed(int(np.sum(rows)))
        return (torch.randint(0, 128, (len(rows), 3, 32, 32), generator=g) + 127*(torch.as_tensor(rows) % 2)[:, None, None, None]).byte()

def tuning(**kwargs):
    return FinetuneParams(**dict(epochs=3, batch_size=8, optim=OptimParams(base_lr=0.03, weight_decay=0.05), layer_decay=0.5, views=ViewParams(scale=(0.8, 1.))) | kwargs)

@pytest.mark.parametrize("arch", ["vit", "resnet18", "resnet50", "convnext_atto"])
def test_layer_decay_is_timms_own(arch):
    params = tuning()
    classifier = Classifier(made(arch, num_classes=2), params)
    named = {id(p): n for n, p in classifier.encoder.network.named_parameters()}
    told = lambda groups: {named[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    scales, network = told(decay_groups(classifier, params)), classifier.encoder.network
    skip = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    assert scales == told(param_groups_layer_decay(network, 0.05, skip, layer_decay=0.5))
    head = classifier.encoder.head_parts[0]
    first = dict(vit="patch_embed.proj", resnet18="conv1", resnet50="conv1", convnext_atto="stem.0")[arch]
    depth = dict(vit=4, resnet18=8, resnet50=16)
    assert scales[f"{head}.weight"] == (1., 0.05) and scales[f"{head}.bias"] == (1., 0.) and scales[f"{first}.weight"][0] == min(s for s, _ in scales.values())
    if arch in depth: assert len({s for s, _ in scales.values()}) == depth[arch] + 2, "each block has a rate, between stem and head"
    assert scales.keys() == {n for n, p in network.named_parameters() if p.requires_grad}

@pytest.mark.parametrize("arch", ["resnet18", "convnext_atto"])
def test_convolutional_networks_are_fine_tuned(arch, tmp_path):
    encoder = made(arch, num_classes=2, drop_path=0.1)
    classifier, history = fit_classifier(encoder, Bright(), np.arange(32), tuning(layer_decay=0.9, epochs=6))
    accuracy = (predict(classifier, Bright(), np.arange(100, 140)).argmax(1) == np.arange(100, 140) % 2).mean()
    assert history[-1]["loss"] < history[0]["loss"] and accuracy > 0.8
    again, _ = load_encoder(saved(tmp_path, classifier.encoder))
    with torch.no_grad(): assert torch.equal(again.eval().pooled(images()), classifier.encoder.pooled(images()))

@pytest.mark.parametrize("arch, head", [("resnet18", "fc"), ("convnext_atto", "head.fc"), ("tf_efficientnet_lite0", "classifier")])
def test_a_frozen_network_stays_as_it_was(arch, head):
    encoder = made(arch, num_classes=2)
    before = {k: v.clone() for k, v in encoder.network.state_dict().items() if not k.startswith(head)}
    classifier, history = fit_classifier(encoder, Bright(), np.arange(32), tuning(frozen=True, epochs=10, optim=OptimParams(name="sgd", base_lr=1., weight_decay=0.)))
    after = classifier.encoder.network.state_dict()
    assert [k for k, v in before.items() if not torch.equal(v, after[k])] == [] and np.isfinite(history[-1]["loss"])
    assert [n for n, p in classifier.encoder.network.named_parameters() if p.requires_grad] == [f"{head}.1.weight", f"{head}.1.bias"]
    features = encoder.network.forward_head(encoder.network.forward_features(images(32, 8)), pre_logits=True)
    assert classifier.train().encoder.network.get_submodule(head)[0].training and features.shape[1] == encoder.network.get_submodule(head)[1].in_features

def test_classes_of_another_number():
    with pytest.raises(ValueError, match="2 classes, but the encoder was built with num_classes 3"): fit_classifier(made("resnet18", num_classes=3), Bright(), np.arange(8), tuning())


# Segmentation

def segmenting(**kwargs):
    return SegmentParams(**dict(image_size=64, stride=48, steps=8, batch_size=4, blocks=[0, 1, 2, 3], channels=16, layer_decay=0.5,
                                optim=OptimParams(base_lr=0.2, weight_decay=0.), views=ViewParams(scale=(0.5, 1.), interpolation="bilinear")) | kwargs)

@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "convnext_atto", "tf_efficientnet_lite0", "mobilenetv3_small_050", "regnetx_002"])
def test_segmentation_takes_the_four_stages(arch):
    encoder = made(arch, 64)
    staged = timm.create_model(arch, features_only=True, out_indices=[encoder.strides.index(s) for s in STRIDES]).eval()
    state = encoder.network.state_dict()
    staged.load_state_dict({k.replace(".", "_", 1) if k not in staged.state_dict() else k: v for k, v in state.items()}, strict=False)
    segmenter, x = Segmenter(encoder, segmenting(), [0.]*3, [1.]*3), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for m, own, s in zip(segmenter.eval().maps(x), staged(x), STRIDES):
            torch.testing.assert_close(m, own, rtol=1e-4, atol=1e-5); assert m.shape[-1] == 64//s
    segmenter.train()((x*255).byte(), (x[:, 0] > 0.5).byte())["loss"].backward()
    assert [n for n, p in segmenter.named_parameters() if p.grad is None] == [], "nothing stands idle"

def test_layer_decay_of_a_segmenter():
    segmenter = Segmenter(made("resnet18", 64), segmenting())
    named = {id(p): n for n, p in segmenter.named_parameters()}
    scales = {named[id(p)]: g.get("lr_scale", 1.) for g in segment_groups(segmenter, segmenting()) for p in g["params"]}
    assert scales.keys() == set(named.values()) and scales["encoder.network.layer4.1.conv2.weight"] == 0.5 and scales["encoder.network.conv1.weight"] == 0.5**9
    assert {s for n, s in scales.items() if not n.startswith("encoder")} == {1.}

def test_a_convolutional_segmenter_learns(tmp_path):
    folder = saved(tmp_path, made("resnet18"))
    encoder, config = segment_encoder(folder, 64)
    g = torch.Generator().manual_seed(0)
    masks = [torch.zeros(80, 80, dtype=torch.uint8) for _ in range(3)]
    for m in masks: m[20:60, 20:60] = 1
    pictures = [(torch.randint(0, 100, (3, 80, 80), generator=g) + 120*m).byte() for m in masks]
    segmenter, history = fit_segmenter(encoder, pictures, masks, segmenting(steps=40))
    assert history[-1]["main"] < 0.5*history[0]["main"] and config["kind"] == "timm"
    assert np.mean([(p == m.numpy()).mean() for p, m in zip(predict_masks(segmenter, pictures, 64, 48), masks)]) > 0.9

def test_stages_that_are_not_there():
    encoder = made("resnet18", 64); encoder.strides = [2, 4, 8, 16, 16]
    with pytest.raises(ValueError, match=r"resnet18 has maps at strides \[2, 4, 8, 16, 16\]"): Segmenter(encoder, segmenting())


# In and out

def local(folder, arch, **kwargs):
    "A folder as the hub has it."
    model = made(arch).network
    folder.mkdir()
    save_file(model.state_dict(), folder/"model.safetensors")
    cfg = dict(input_size=[3, 96, 96], mean=[.7, .5, .6], std=HALF, num_classes=0, classifier=model.pretrained_cfg["classifier"])
    (folder/"config.json").write_text(json.dumps(dict(architecture=arch, num_classes=0, model_args=kwargs, pretrained_cfg=cfg)))
    return model.eval()

@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "convnext_atto"])
def test_in_and_out_and_in_again(tmp_path, arch):
    theirs, x = local(tmp_path/"hub", arch), images(64)
    config = import_encoder(f"local-dir:{tmp_path/'hub'}", tmp_path/"run")
    assert config["model"]["arch"] == arch and config["image_size"] == 96 and config["mean"] == [.7, .5, .6] and config["std"] == HALF
    args = export_timm(tmp_path/"run", tmp_path/"out.safetensors")
    assert args == dict(model_name=arch, num_classes=0, checkpoint_path=str(tmp_path/"out.safetensors"))
    again = import_encoder(tmp_path/"out.safetensors", tmp_path/"again")
    assert {k: again[k] for k in ("image_size", "mean", "std", "model")} == {k: config[k] for k in ("image_size", "mean", "std", "model")}
    with torch.no_grad():
        wanted = theirs.forward_features(x)
        assert torch.equal(timm.create_model(**args).eval()(x), theirs(x)), "timm loads strictly"
        for folder in ("run", "again"): assert torch.equal(load_encoder(tmp_path/folder)[0].eval().pooled(x), wanted.mean((2, 3)))
    a, b = (load_file(tmp_path/o/"encoder.safetensors") for o in ("run", "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    with pytest.raises(ValueError, match="has no class token"): export_timm(tmp_path/"run", tmp_path/"out.safetensors", class_token=True)

def test_the_command_for_a_convolutional_network(tmp_path, capsys):
    local(tmp_path/"hub", "resnet18")
    assert main(["import", f"local-dir:{tmp_path/'hub'}", str(tmp_path/"run"), "--image-size", "48"]) == 0
    assert "resnet18 of timm, images of 48 px, mean [0.7, 0.5, 0.6]" in capsys.readouterr().out
    assert main(["export", str(tmp_path/"run"), str(tmp_path/"b.safetensors")]) == 0
    assert eval(capsys.readouterr().out, dict(timm=timm)).eval()(images(48)).shape == (2, 512)

def test_imported_convolutional_networks(tmp_path):
    theirs = local(tmp_path/"hub", "resnet18")
    import_encoder(f"local-dir:{tmp_path/'hub'}", tmp_path/"run"/"encoder")
    export_timm(tmp_path/"run", tmp_path/"out.safetensors")
    for source in (f"local-dir:{tmp_path/'hub'}", tmp_path/"run", tmp_path/"run"/"encoder", tmp_path/"out.safetensors"):
        for model in (SHAPE, ModelParams(arch="resnet50")):
            method = Imported(ImportedParams(weights=str(source)), model, 64)
            assert method.encoder.image_size == 64 and method.normalization == dict(mean=[.7, .5, .6], std=HALF) and method.source["layout"] == "timm"
            with torch.no_grad(): assert torch.equal(method.encoder.eval().pooled(images(64)), theirs.forward_features(images(64)).mean((2, 3)))

def test_a_vision_transformer_beside_a_convolutional_model(tmp_path):
    saved(tmp_path, made("vit"))
    with pytest.raises(ValueError, match="model.arch is resnet18, the weights are a vision transformer's"): Imported(ImportedParams(weights=str(tmp_path)), ModelParams(arch="resnet18"), 32)
