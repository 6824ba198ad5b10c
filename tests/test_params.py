"Faults in params.yaml are told by name before anything runs, and conf/ holds what it says."
from pathlib import Path

import pytest
import yaml

from sdmae.params import compose, load_params, parse_params

CONF = Path(__file__).parents[1]/"conf"


def edit(path, value):
    "The default parameters with one value changed or added."
    values = compose()
    *sections, last = path.split(".")
    at = values
    for s in sections: at = at[s]
    at[last] = value
    return values


@pytest.mark.parametrize("path, value, words", [
    ("method.sdmae.mask_ration", 0.6, "method.sdmae.mask_ration: unknown parameter"),
    ("pretrian", {}, "pretrian: unknown parameter"),
    ("pretrain.epochs", 0, "pretrain.epochs"),
    ("pretrain.epochs", "many", "pretrain.epochs"),
    ("pretrain.accumulate", 7, "is not divisible by accumulate 7"),
    ("pretrain.shards", "", "pretrain.shards"), ("method.mae.views.blur_sigma", [0.0, 2.0], "blur_sigma must rise"), ("method.mae.views.solarize", 2, "method.mae.views.solarize"),
    ("model.patch_size", 7, "data.image_size 64 is not divisible by model.patch_size 7"),
    ("model.num_heads", 5, "embed_dim 128 is not divisible by num_heads 5"),
    ("method.mae.decoder.num_heads", 5, "embed_dim 96 is not divisible by num_heads 5"),
    ("method.mae.mask_ratio", 0.001, "method.mae.mask_ratio 0.001 leaves no visible or no masked token of 64"),
    ("method.mae.mask_ratio", 1.0, "method.mae.mask_ratio"),
    ("method.sdmae.center_on", "prob", "method.sdmae.center_on"),
    ("method.sdmae.views.scale", [0.5, 0.2], "scale must rise"),
    ("methods", ["random", "sdmea"], "methods: unknown method 'sdmea'"),
    ("methods", [], "methods"), ("methods", ["random", "mae", "mae"], "methods lists something twice"), ("seeds", [0, 0], "seeds lists something twice"),
    ("methods", ["random", "supervised"], "supervised is the name of a baseline"),
    ("data.adapter", "pcamm", "data.adapter"),
    ("device", 3, "device"), ("device", "cdua", "device"),
    ("probe.labels", [], "probe.labels"), ("probe.labels", [0], "probe.labels"), ("finetune.labels", [1.5], "finetune.labels"),
    ("probe.C", [-1.0], "probe.C"), ("probe.neighbours", [0], "probe.neighbours"), ("finetune.views.ratio", [2.0, 0.5], "ratio must rise"),
    ("methods", ["mae", "sdmae"], "methods must list random"), ("method.mae.mask_ratio", 0.985, "leaves no visible or no masked token"),
    ("method.mae.decoder", dict(embed_dim=30, depth=1, num_heads=3), "needs widths divisible by 4"),
])
def test_a_fault_is_named(path, value, words):
    with pytest.raises(ValueError, match="cannot be used") as e: parse_params(edit(path, value))
    assert words in str(e.value)


def test_all_faults_are_told_at_once():
    values = edit("pretrain.epochs", -1); values["model"]["depth"] = 0; values["finetune"]["mixupp"] = 1
    with pytest.raises(ValueError) as e: parse_params(values)
    assert all(w in str(e.value) for w in ("pretrain.epochs", "model.depth", "finetune.mixupp"))


def test_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.yaml"): load_params(tmp_path/"absent.yaml")
    (tmp_path/"bad.yaml").write_text("a: [1,\n")
    with pytest.raises(ValueError, match="bad.yaml is no valid YAML"): load_params(tmp_path/"bad.yaml")
    (tmp_path/"empty.yaml").write_text("")
    with pytest.raises(ValueError, match="empty.yaml holds no sections"): load_params(tmp_path/"empty.yaml")


@pytest.mark.parametrize("group", ["data", "model", "budget", "lesions"])
def test_every_group_composes(group):
    "Each file of a group gives valid parameters, with the model that fits the tiles."
    for file in sorted((CONF/group).glob("*.yaml")):
        fits = {"vit_tiny_16": ["data=nct"], "vit_base_16": ["data=nct"], "nct": ["model=vit_small_16"], "nct8": ["model=vit_small_16"], "vit_small_16": ["data=nct"], "vit_small_8": ["data=pcam"], "mae": ["methods=[random,mae]"]}
        parse_params(compose([f"{group}={file.stem}", *fits.get(file.stem, [])]), where=file.name)


def test_every_parameter_is_written_out():
    "What can be set can be seen in params.yaml, and set by -S without a plus sign; only optional sections are left out."
    values = compose()
    def missing(full, there, path=""):
        return [f"{path}{k}" for k in full if k not in there] + [o for k, v in full.items() if isinstance(v, dict) and k in there for o in missing(v, there[k], f"{path}{k}.")]
    full = parse_params(values).model_dump()
    assert missing(full, values) == ["linear_sgd", "method.imported", "method.miram", "lesions.linear_sgd", "lesions.method.imported"]


def test_params_yaml_is_the_composition_of_conf():
    assert yaml.safe_load((CONF.parent/"params.yaml").read_text()) == compose()


# Variants

def test_a_variant_is_its_method_with_changes():
    values = compose(["experiment=ablation"])
    m = parse_params(values).method
    assert m.of("sdmae_momentum") == "sdmae" and m.section("sdmae_momentum").teacher_momentum == 0.996 and m.changes("sdmae_decoder8") == {"decoder.depth": 8}
    assert m.section("sdmae_decoder8").model_dump() == m.sdmae.model_copy(update=dict(decoder=m.sdmae.decoder.model_copy(update=dict(depth=8)))).model_dump()


@pytest.mark.parametrize("variant, words", [
    (dict(of="sdmea"), "v.of: 'sdmea' is no method"), (dict(loss_weight=0.1), "unknown method 'v'"), (dict(of="sdmae", loss_wight=0.1), "v.loss_wight: unknown parameter"),
    (dict(of="sdmae", loss_weight=2), "v.loss_weight"), (dict(of="sdmae", mask_ratio=0.999), "leaves no visible or no masked token"), (3, "unknown method 'v'")])
def test_a_faulty_variant_is_named(variant, words):
    values = edit("method.v", variant)
    values["methods"] = ["random", "v"]
    with pytest.raises(ValueError) as e: parse_params(values)
    assert words in str(e.value)


@pytest.mark.parametrize("path, value, words", [
    ("protocols", ["linear_sgd"], "protocols must list finetune"), ("protocols", ["finetune", "linear_sgd"], "there is no section linear_sgd"),
    ("finetune.accumulate", 3, "finetune.batch_size 16 is not divisible by finetune.accumulate 3"), ("finetune.pool", "token", "has no class token"),
    ("segment.encoders", ["sdmea"], "segment.encoders lists 'sdmea'"), ("segment.encoders", ["sdmae"], "segment.blocks: there is no block"),
    ("finetune.views.rand_augment", "m9", "finetune.views.rand_augment"), ("model.image_size", 60, "model.image_size 60 is not divisible by model.patch_size 8")])
def test_a_protocol_that_cannot_be_is_named(path, value, words):
    with pytest.raises(ValueError) as e: parse_params(edit(path, value))
    assert words in str(e.value)


# Recipes of the releases, to the digit

EXPERIMENTS = sorted(p.stem for p in (CONF/"experiment").glob("*.yaml"))


@pytest.mark.parametrize("overrides", [[f"experiment={e}"] for e in EXPERIMENTS] + [["labels=fractions"], ["experiment=sdmae_pcam", "labels=fractions"], ["experiment=ablation", "data=pcam64", "budget=hour"]], ids=" ".join)
def test_every_experiment_composes(overrides): parse_params(compose(overrides))


@pytest.mark.parametrize("experiment, data, classes_dropped", [("sdmae_pcam", "pcam", []), ("sdmae_nct", "nct", ["BACK"])])
def test_sdmae_as_released(experiment, data, classes_dropped):
    p = parse_params(compose([f"experiment={experiment}"]))
    s, f, l = p.method.sdmae, p.finetune, p.linear_sgd
    assert p.protocols == ["finetune", "linear_sgd"]
    assert (p.data.adapter, p.data.drop_classes, p.image_size("sdmae"), p.patches("sdmae")) == (data, classes_dropped, 224, 196)
    assert (p.model.patch_size, p.model.embed_dim, p.model.depth, p.model.num_heads, p.model.mlp_ratio) == (16, 384, 12, 6, 4)
    assert (s.decoder.embed_dim, s.decoder.depth, s.decoder.num_heads) == (192, 4, 3)
    assert int(s.mask_ratio*p.patches("sdmae")) == 117 and not s.class_token and (s.pos_embed, s.target_norm) == ("sincos1d", "channel")
    assert (s.head.hidden_dim, s.head.bottleneck_dim, s.head.out_dim) == (2048, 256, 4096)
    assert (s.loss_weight, s.student_temp, s.teacher_temp, s.center_momentum, s.center_on, s.detach_teacher, s.distill) == (0.2, 0.1, 0.04, 0.9, "probs", False, "mean")
    # pre-training
    assert (p.pretrain.epochs, p.pretrain.batch_size, round(s.optim.warmup*p.pretrain.epochs)) == (100, 1024, 5)
    assert s.optim.lr(p.pretrain.batch_size) == pytest.approx(2.4e-3, rel=1e-12) and (s.optim.min_lr, s.optim.betas, s.optim.weight_decay) == (1e-5, (0.9, 0.999), 0.05)
    assert s.views.interpolation == "bilinear" and (s.views.scale, s.views.hflip, s.views.vflip, s.views.rot90, s.views.od_jitter, s.views.color_jitter) == ((0.08, 1.0), False, False, False, 0, 0)
    # fine-tuning
    assert (f.epochs, f.batch_size, f.optim.name, f.optim.lr(f.batch_size)) == (100, 1024, "adamw", pytest.approx(4e-3, rel=1e-12))
    assert (f.optim.betas, f.optim.weight_decay, f.optim.min_lr, round(f.optim.warmup*f.epochs), f.layer_decay, f.drop_path) == ((0.9, 0.999), 0.05, 1e-6, 5, 0.75, 0.1)
    assert (f.views.rand_augment, f.views.color_jitter, f.label_smoothing, f.views.erasing, f.mixup, f.cutmix, f.crop) == ("rand-m9-mstd0.5-inc1", 0.4, 0.1, 0.25, 0.8, 1.0, 224/256)
    # linear probe
    assert l.frozen and (l.epochs, l.batch_size, l.optim.name, l.optim.momentum, l.optim.weight_decay, round(l.optim.warmup*l.epochs)) == (90, 512, "sgd", 0.9, 0, 10)
    assert l.optim.lr(l.batch_size) == pytest.approx(0.2, rel=1e-12) and l.views.hflip and not l.views.vflip and l.pool == "mean"


def test_the_other_sizes_of_the_release():
    ex, tiny, eight = (parse_params(compose([f"experiment=sdmae_pcam{e}"])) for e in ("_ex", "_tiny", "8"))
    shape = lambda p: (p.image_size("sdmae"), p.model.patch_size, p.model.embed_dim, p.model.depth, p.model.num_heads, *p.method.sdmae.decoder.model_dump().values())
    assert shape(ex) == (224, 16, 384, 12, 6, 192, 8, 3) and shape(tiny) == (224, 16, 192, 12, 3, 192, 2, 2) and shape(eight) == (96, 8, 384, 12, 6, 192, 4, 3)


def test_mae_as_released():
    p = parse_params(compose(["experiment=mae_nct"]))
    m, f, l = p.method.mae, p.finetune, p.linear_sgd
    assert p.protocols == ["finetune", "linear_sgd"]
    assert (int(m.mask_ratio*p.patches("mae")), m.class_token, m.pos_embed, m.target_norm) == (147, True, "sincos2d", "joint")
    assert (m.decoder.embed_dim, m.decoder.depth, m.decoder.num_heads) == (512, 8, 16)
    assert (p.pretrain.epochs, p.pretrain.batch_size, round(m.optim.warmup*p.pretrain.epochs), m.optim.betas) == (800, 4096, 40, (0.9, 0.95))
    assert m.optim.lr(p.pretrain.batch_size) == pytest.approx(2.4e-3, rel=1e-12) and (m.views.scale, m.views.hflip) == ((0.2, 1.0), True)
    assert f.optim.lr(f.batch_size) == pytest.approx(2e-3, rel=1e-12) and (f.layer_decay, f.drop_path, f.epochs) == (0.65, 0.1, 100)
    assert (l.optim.name, l.batch_size, l.pool, l.epochs) == ("lars", 16384, "token", 90) and l.optim.lr(l.batch_size) == pytest.approx(6.4, rel=1e-12)


def test_miram_as_released():
    L = parse_params(compose(["lesions=cbis"])).lesions
    m, f = L.method.miram, L.finetune
    assert (L.data.image_size, L.model.image_size, L.patches("miram"), int(49*(1-m.mask_ratio))) == (224, 112, 49, 12)
    assert (m.scales, m.patches, m.weights, m.target, m.attention, m.target_norm, m.class_token, m.pos_embed) == ([1, 2], ["masked", "all"], [1, 1], "upsampled", "full", "joint", True, "sincos2d")
    assert m.decoder.model_dump() == dict(embed_dim=512, depth=8, num_heads=16) and m.nystrom.model_dump() == dict(landmarks=64, iterations=6, kernel=33)
    assert (L.model.embed_dim, L.model.depth, L.model.num_heads, L.model.patch_size) == (768, 12, 12, 16)
    assert (L.pretrain.epochs, L.pretrain.batch_size, m.optim.warmup*500, m.optim.base_lr, m.optim.weight_decay, m.optim.betas, m.views.scale) == (500, 1024, 40, 1.5e-4, .05, (.9, .95), (.2, 1.))
    assert (f.optim.name, f.epochs, f.batch_size, f.optim.weight_decay, f.drop_path, f.class_weights, f.select, f.layer_decay) == ("adam", 100, 32, .01, .1, True, "macro_auc", 1.)
    assert abs(f.optim.lr(32) - 1e-5) < 1e-12 and f.optim.warmup*100 == 2
    assert (f.views.rotate, f.views.zoom, round(255*f.views.intensity), f.views.hflip, f.views.vflip) == (25., (.8, 1.2), 20, True, True)
    assert L.method.section("miram_native").target == "native" and L.patches("mae_fine") == 196


@pytest.mark.parametrize("change, message", [
    ("lesions.data.image_size=48", "method.miram_native.target native reconstructs 64 px, but data.image_size is 48"),
    ("lesions.method.miram.scales=[2,1]", "scales must rise from 1"), ("lesions.method.miram.weights=[1.0]", "weights needs one entry"),
    ("lesions.method.miram.nystrom.kernel=32", "kernel must be odd")])
def test_miram_misfits(change, message):
    with pytest.raises(ValueError, match=message): parse_params(compose([change]))


def test_what_both_comparisons_share_is_set_once():
    with pytest.raises(ValueError, match="lesions.device: unknown parameter"): parse_params(compose(["+lesions.device=cpu"]))
