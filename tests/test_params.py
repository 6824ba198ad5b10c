"Faults in params.yaml are told by name before anything runs, and conf/ holds what it says."
import json, re, shlex
from pathlib import Path

import pytest
import yaml

from sdmae.methods.registry import method_params
from sdmae.params import compose, load_params, main, parse_params
from sdmae.pipeline.plan import check_params, report_names

CONF = Path(__file__).parents[1]/"conf"


def edit(path, value):
    "The default parameters with one value changed or added."
    values = compose()
    *sections, last = path.split(".")
    at = values
    for s in sections: at = at[s]
    at[last] = value
    return values


def faults(values):
    "What is told of a file that cannot be used."
    with pytest.raises(ValueError, match="cannot be used") as e: check_params(parse_params(values))
    return str(e.value)


@pytest.mark.parametrize("path, value, words", [
    ("encoder.sdmae.mask_ration", 0.6, "encoder.sdmae.mask_ration: unknown parameter"),
    ("pretrian", {}, "pretrian: unknown parameter"),
    ("pretrain.tissue.epochs", 0, "pretrain.tissue.epochs"),
    ("pretrain.tissue.epochs", "many", "pretrain.tissue.epochs"),
    ("pretrain.tissue.accumulate", 7, "is not divisible by accumulate 7"),
    ("pretrain.tissue.shards", "", "pretrain.tissue.shards"),
    ("views.tissue.blur_sigma", [0.0, 2.0], "blur_sigma must rise"), ("views.tissue.solarize", 2, "finetune.few.views.solarize"), ("views.lesions.solarize", 2, "encoder.lesion_mae.views.solarize"),
    ("model.patch_size", 7, "encoder.mae.image_size 64 is not divisible by patch_size 7"),
    ("model.num_heads", 5, "embed_dim 128 is not divisible by num_heads 5"),
    ("encoder.mae.decoder.num_heads", 5, "embed_dim 96 is not divisible by num_heads 5"),
    ("encoder.mae.mask_ratio", 0.001, "encoder.mae.mask_ratio 0.001 leaves no visible or no masked token of 64"),
    ("encoder.mae.mask_ratio", 1.0, "encoder.mae.mask_ratio"),
    ("encoder.sdmae.center_on", "prob", "encoder.sdmae.center_on"),
    ("encoder.mae.views", "tisue", "there is no views.tisue"), ("encoder.mae.pretrain", "tisue", "there is no pretrain.tisue"),
    ("encoder.mae.data", "tisue", "encoder.mae.data: there is no data.tisue"), ("encoder.mae.method", "mea", "'mea'"),
    ("encoder.mae.of", "mae", "leads back to itself"), ("task.tissue.probe", "fwe", "there is no probe.fwe"), ("task.tissue.data", "tisue", "task.tissue.data"),
    ("views.tissue.scale", [0.5, 0.2], "scale must rise"),
    ("compare.tissue.encoders", ["random", "sdmea"], "there is no encoder 'sdmea'"), ("compare.tissue.tasks", ["tisue"], "there is no task 'tisue'"),
    ("compare.tissue.encoders", [], "compare.tissue.encoders is empty"), ("compare.tissue.encoders", ["random", "mae", "mae"], "lists something twice"),
    ("compare.tissue.pairs", [["mae", "miram"]], "compare.tissue.pairs: there is no encoder 'miram'"),
    ("reports", ["tisue"], "reports: there is no compare.tisue"), ("seeds", [0, 0], "seeds lists something twice"),
    ("data.tissue.adapter", "pcamm", "data.tissue.adapter"), ("data.tissue.path", "data/nowhere", "data.tissue.path data/nowhere does not exist"),
    ("device", 3, "device"), ("device", "cdua", "device"),
    ("probe.few.labels", [], "probe.few.labels"), ("probe.few.labels", [0], "probe.few.labels"), ("finetune.few.labels", [1.5], "finetune.few.labels"),
    ("probe.few.C", [-1.0], "probe.few.C"), ("probe.few.neighbours", [0], "probe.few.neighbours"), ("views.labelled.ratio", [2.0, 0.5], "ratio must rise"),
    ("encoder.mae.mask_ratio", 0.985, "leaves no visible or no masked token"),
    ("encoder.mae.decoder", dict(embed_dim=30, depth=1, num_heads=3), "needs widths divisible by 4"),
    ("protocols", ["probe", "prob"], "protocols"), ("finetune.few.accumulate", 3, "finetune.few: batch_size 16 is not divisible by accumulate 3"),
    ("finetune.few.pool", "token", "has no class token"), ("views.labelled.rand_augment", "m9", "finetune.few.views.rand_augment"),
    ("model.image_size", 60, "60 is not divisible by patch_size 8"),
    ("data.lesions.image_size", 48, "encoder.lesion_miram_native.target native reconstructs 64 px, but the prepared images have 48"),
    ("encoder.lesion_miram.scales", [2, 1], "scales must rise from 1"), ("encoder.lesion_miram.weights", [1.0], "weights needs one entry"),
    ("encoder.lesion_miram.nystrom.kernel", 32, "kernel must be odd"), ("encoder.mae.start", "runs/tissue/mae-0", "copy it elsewhere first"),
])
def test_a_fault_is_named(path, value, words): assert words in faults(edit(path, value))


@pytest.mark.parametrize("path, words", [("encoder.my-mae", "encoder.my-mae: a name has small letters"), ("encoder.random_long", "encoder.random_long: tables call so"),
                                         ("data.a/b", "data.a/b: a name"), ("task.1st", "task.1st: a name"), ("compare.data", "compare.data: the folder")])
def test_names_are_those_of_folders(path, words):
    kind, name = path.split(".")
    values = compose(); values[kind][name] = next(iter(values[kind].values()))
    assert words in faults(values)


def test_no_name_can_be_a_command():
    "Of any section; among them such as would end one command of a shell and begin another."
    names, kinds = ("v;touch x;true", "$(touch x)", "a b", "é", "a\n", "", "../x", "A", "a"*101, "1"), ("data", "encoder", "task", "compare", "views", "pretrain", "probe", "finetune", "segment")
    values = compose()
    for kind in kinds: values[kind] |= {name: next(iter(values[kind].values()), {}) for name in names}
    assert faults(values).count("a name has small letters") == len(names)*len(kinds)


@pytest.mark.parametrize("path, value", [("seeds", ["0;touch x"]), ("seeds", [0.5]), ("seeds", [True]), ("seeds", [-1]), ("seeds", [2**32]), ("seeds", ["0"]), ("protocols", ["probe;touch x"]),
                                         ("reports", ["tissue;touch x"]), ("compare.tissue.encoders", ["mae;touch x"]), ("compare.tissue.tasks", ["$(touch x)"]), ("device", "cpu;touch x"), ("task.tissue.data", "tissue;touch x")])
def test_what_commands_are_made_of(path, value):
    "Whatever a stage's command in dvc.yaml takes from the file is a name or a number."
    assert path.split(".")[0] in faults(edit(path, value))


# What people type

@pytest.mark.parametrize("typed, path, name, classes", [
    ("data.tissue.path=/mnt/Données/tiles", "/mnt/Données/tiles", None, None), ("data.tissue.path=data/my tiles (copy)", "data/my tiles (copy)", None, None), ("data.tissue.path=data/slide[1]", "data/slide[1]", None, None),
    ("data.tissue.path=~/tiles", "~/tiles", None, None), ("data.tissue.path=a=b", "a=b", None, None), ("data.tissue.path=it's", "it's", None, None), ("data.tissue.path=C:\\d\\é\\", "C:\\d\\é\\", None, None),
    ("data.tissue.path=a\\'b", "a\\'b", None, None), ("data.tissue.path='/mnt/Données/a, b'", "/mnt/Données/a, b", None, None), ("data.tissue.name=2024", None, "2024", None), ("data.tissue.name=f(x)", None, "f(x)", None),
    ("data.tissue.name=日本#1", None, "日本#1", None), ("data.tissue.drop_classes=[0,1]", None, None, ["0", "1"]), ("data.tissue.drop_classes=[007,'a b']", None, None, ["007", "a b"])])
def test_text_is_read_as_it_is_typed(typed, path, name, classes):
    d = parse_params(compose(["data=csv", typed])).data["tissue"]
    assert [b for a, b in zip((path, name, classes), (d.path, d.name, d.drop_classes)) if a is not None] == [a for a in (path, name, classes) if a is not None]


@pytest.mark.parametrize("typed, words", [
    ("data.tissue.pathh=x", "did you mean data.tissue.path?"), ("data.path=x", r"did you mean data\.(tissue|lesions)\.path\?"), ("modle=sample", "did you mean model?"), ("data=csvv", "did you mean csv?"),
    ("experiment=ablatoin", "did you mean ablation?"), ("~encoder.maee", "did you mean encoder.mae?"), ("pretrain.lesions.batch_size=8", "two plus signs, ++pretrain.lesions.batch_size=8"), ("encoder.lesion_mae.decoder.depth=3", "++encoder.lesion_mae.decoder.depth=3"), ("+data=csv", "without a plus sign"),
    ("data.tissue.name=a,b", "-S \"data.tissue.name='a,b'\""), ("data.tissue.name=range(1,3)", "'range(1,3)'"), ("data.tissue.drop_classes=[a b,c(d)]", "quoted twice"), ("data.tissue.name='x", "quoted text that cannot be read"),
    ("data.tissue.path=${HOME}/x", "stands for another parameter"), ("data.tissue.name", "a section and key"), ("", "a section and key"), ("=3", "a section and key"), ("a b=c", "a section and key"), ("+encoder=3", "encoder has no 3"),
    ("data.tissue.valid_fraction=0,2", "as 0.2 or 5000"), ("data.tissue.limit=5,000", "as 0.2 or 5000"), ("data.tissue.limit=1,000,000", "as 0.2 or 5000"), ("+encoder.Ünï={of: mae}", "encoder.Ünï is no name"), ("data.tissue.größe=3", "data.tissue.größe is no name")])
def test_an_override_that_cannot_be_is_explained(typed, words):
    "With the override's own text."
    with pytest.raises(ValueError) as e: compose([typed])
    assert f"-S {typed}" in str(e.value) and (words in str(e.value) or re.search(words, str(e.value)))


def test_of_several_overrides_the_one_at_fault_is_named():
    with pytest.raises(ValueError, match="^-S data.tissue.pathh=x: there is no"): compose(["data=csv", "seeds=[0,1]", "data.tissue.pathh=x", "model=vit_small_8"])


@pytest.mark.parametrize("typed, words", [("+data.tissue.pathh=x", "data.tissue.pathh: unknown parameter; did you mean path?"), ("+encoder.mae.mask_ration=0.5", "encoder.mae.mask_ration: unknown parameter; did you mean mask_ratio?"),
                                          ("data.tissue.adapter=cvs", "did you mean csv?"), ("compare.tissue.encoders=[random,sdmea]", "did you mean sdmae?"), ("encoder.mae.views=tisue", "did you mean tissue?"), ("reports=[lesion]", "did you mean lesions?"),
                                          ("data.tissue.drop_classes=[1.10]", "read as 1.1 (float), and text is meant"), ("data.tissue.name=true", "read as True"), ("data.tissue.path=", "data.tissue.path"),
                                          ("data.tissue.drop_classes=BACK", "data.tissue.drop_classes: a list is needed, [BACK]"), ("seeds=0", "seeds: a list is needed, [0]"), ("seeds=null", "seeds: a list is needed, [a, b]")])
def test_the_name_that_was_meant(typed, words): assert words in faults(compose([typed]))


def test_the_command_writes_what_can_be_used(tmp_path, monkeypatch, capsys):
    "As `dvc exp run -S` does, for `dvc repro`; and nothing else."
    for o in ("conf", "nbs"): (tmp_path/o).symlink_to(CONF.parent/o)
    (tmp_path/"settings.ini").write_text(""); (tmp_path/"params.yaml").write_text("old: 1\n")
    monkeypatch.chdir(tmp_path)
    for wrong in ("data.tissue.pathh=x", "data.tissue.crop=many"):
        assert main([wrong]) == 2 and "data.tissue" in capsys.readouterr().err and (tmp_path/"params.yaml").read_text() == "old: 1\n"
    assert main(["data=csv", "data.tissue.path=/mnt/Données/[1]"]) == 0
    assert load_params().data["tissue"].path == "/mnt/Données/[1]" and sorted(o.name for o in tmp_path.iterdir()) == ["conf", "nbs", "params.yaml", "settings.ini"]
    assert main([]) == 0 and (tmp_path/"params.yaml").read_bytes() == (CONF.parent/"params.yaml").read_bytes(), "`make params`"


def test_all_faults_are_told_at_once():
    values = edit("pretrain.tissue.epochs", -1); values["model"]["depth"] = 0; values["finetune"]["few"]["mixupp"] = 1
    assert "model.depth" in faults(values)
    values["model"]["depth"] = 4
    assert all(w in faults(values) for w in ("pretrain.tissue.epochs", "finetune.few.mixupp"))


@pytest.mark.parametrize("typed, classes", [("[010, 011]", ["010", "011"]), ("[12:30]", ["12:30"]), ("[1_0, 0x10, 0b11]", ["1_0", "0x10", "0b11"]), ("[10, 0]", ["10", "0"])])
def test_only_plain_digits_are_numbers(tmp_path, typed, classes):
    text = (CONF.parent/"params.yaml").read_text()
    (tmp_path/"p.yaml").write_text(text.replace("drop_classes: []", f"drop_classes: {typed}", 1))
    assert load_params(tmp_path/"p.yaml").data["tissue"].drop_classes == classes


def test_a_key_that_stands_twice_is_refused(tmp_path):
    text = (CONF.parent/"params.yaml").read_text()
    for twice, key in ((text.replace("data:\n", "data:\n  tissue: {adapter: csv}\n", 1), "tissue"), (text + "\n\"seeds\": [7]\n", "seeds")):
        (tmp_path/"p.yaml").write_text(twice)
        with pytest.raises(ValueError, match=rf"p.yaml is no valid YAML: {key} stands twice in a section, in lines \d+ and \d+"): load_params(tmp_path/"p.yaml")
    for text in ("a: 2020-13-45", "a: " + "9"*5000):
        (tmp_path/"p.yaml").write_text(text)
        with pytest.raises(ValueError, match="p.yaml is no valid YAML"): load_params(tmp_path/"p.yaml")


def test_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.yaml"): load_params(tmp_path/"absent.yaml")
    (tmp_path/"bad.yaml").write_text("a: [1,\n")
    with pytest.raises(ValueError, match="bad.yaml is no valid YAML"): load_params(tmp_path/"bad.yaml")
    (tmp_path/"empty.yaml").write_text("")
    with pytest.raises(ValueError, match="empty.yaml holds no sections"): load_params(tmp_path/"empty.yaml")


def fine(overrides):
    "The parameters of a composition, checked but for archives that a reader has to fetch."
    p = parse_params(compose(overrides))
    with pytest.MonkeyPatch.context() as m:
        m.setattr("sdmae.pipeline.plan.data_faults", lambda P: [])
        check_params(p)
    return p


@pytest.mark.parametrize("group", ["data", "model", "budget", "lesions", "only", "labels"])
def test_every_group_composes(group):
    "Each file of a group gives valid parameters, with the model that fits the tiles."
    for file in sorted((CONF/group).glob("*.yaml")):
        big = ["only=tissue", "data=nct"]
        fits = {"vit_tiny_16": big, "vit_base_16": big, "vit_small_16": big, "nct": ["model=vit_small_16", "only=tissue"], "nct8": ["model=vit_small_16", "only=tissue"],
                "vit_small_8": ["data=pcam", "only=tissue"], "mae": ["compare.tissue.encoders=[random,mae]", "compare.tissue.pairs=[]"]}
        fine([f"{group}={file.stem}", *fits.get(file.stem, [])])


RARE = {"schedule", "milestones", "nesterov", "adapt", "vector_scale", "weight_decay_end", "clip_norm"} # that the file leaves at their defaults


def test_what_is_complete_can_be_set_without_a_plus_sign():
    "Base sections hold every parameter but rare ones: what differs from one (`of`) says only what differs."
    values = compose()
    p = parse_params(values)
    def missing(full, there, path):
        return [f"{path}.{k}" for k in full if k not in there and k not in RARE] + [o for k, v in full.items() if isinstance(v, dict) and isinstance(there.get(k), dict) for o in missing(v, there[k], f"{path}.{k}")]
    lost = [o for e in ("random", "supervised", "mae", "sdmae") for o in missing(method_params(p, e).model_dump(), values["encoder"][e], f"encoder.{e}")]
    lost += missing(p.tasks["tissue"].probe.model_dump(), values["probe"]["few"], "probe.few") + missing(p.tasks["tissue"].finetune.model_dump(), values["finetune"]["few"], "finetune.few")
    lost += missing(p.encoders["mae"].pretrain.model_dump(), values["pretrain"]["tissue"], "pretrain.tissue") + missing(p.data["tissue"].model_dump(exclude={"masks", "slides", "union", "folders", "columns", "splits", "groups", "pick"}), values["data"]["tissue"], "data.tissue")
    assert lost == []


def test_a_rare_parameter_is_set_with_a_plus_sign():
    assert compose(["+encoder.mae.optim.clip_norm=1"])["encoder"]["mae"]["optim"]["clip_norm"] == 1
    with pytest.raises(ValueError, match=r"clip_norm is left at its default, so the file does not hold it.*\+encoder.mae.optim.clip_norm=1"):
        compose(["encoder.mae.optim.clip_norm=1"])


def test_nothing_is_said_twice():
    "What comes from `of` does not stand beside it with the same value."
    values = compose()
    from sdmae.params import flat, resolved
    for kind in ("views", "pretrain", "probe", "finetune", "task", "encoder"):
        for name, section in values[kind].items():
            if "of" not in section: continue
            base, own = flat(resolved(kind, values[kind], section["of"])), flat({k: v for k, v in section.items() if k != "of"})
            assert [k for k, v in own.items() if base.get(k, "") == v] == [], f"{kind}.{name}"


def test_params_yaml_is_the_composition_of_conf():
    assert yaml.safe_load((CONF.parent/"params.yaml").read_text()) == compose()


# Variants

def test_a_variant_is_its_encoder_with_changes():
    p = fine(["experiment=ablation"])
    assert p.encoders["sdmae_momentum"].of == "sdmae" and method_params(p, "sdmae_momentum").teacher_momentum == 0.996
    base = method_params(p, "sdmae")
    assert method_params(p, "sdmae_decoder8").model_dump() == base.model_copy(update=dict(decoder=base.decoder.model_copy(update=dict(depth=8)))).model_dump()
    names = report_names(p, "tissue")
    assert names["sdmae_decoder8"]["of"] == "sdmae" and names["sdmae_decoder8"]["changes"] == {"decoder.depth": 8} and names["mae"]["of"] is None
    lesions = report_names(fine([]), "lesions")
    assert lesions["lesion_mae"]["name"] == "MAE" and lesions["lesion_mae_fine"]["of"] is None, "an encoder with a name of its own is no variant"


@pytest.mark.parametrize("variant, words", [
    (dict(of="sdmea"), "there is no encoder.sdmea"), (dict(loss_weight=0.1), "encoder.v.method: missing"), (dict(of="sdmae", loss_wight=0.1), "encoder.v.loss_wight: unknown parameter"),
    (dict(of="sdmae", loss_weight=2), "encoder.v.loss_weight"), (dict(of="sdmae", mask_ratio=0.999), "encoder.v.mask_ratio 0.999 leaves no visible or no masked token"), (3, "encoder.v")])
def test_a_faulty_variant_is_named(variant, words):
    values = edit("encoder.v", variant)
    values["compare"]["tissue"] |= dict(encoders=["random", "v"], pairs=[])
    assert words in faults(values)


@pytest.mark.parametrize("change, words", [
    (dict(blocks=[3, 2, 5, 7]), "segment.upernet: blocks must rise"), (dict(image_size=500), "not divisible by 32"), (dict(stride=600), "leaves gaps"), (dict(views=dict(of="tissue", rotate=5.0)), "masks are not turned")])
def test_segmentation_that_cannot_be_is_named(change, words):
    values = compose(["experiment=upernet"]); values["segment"]["upernet"] |= change
    assert words in faults(values)


# What README and guides say to type

PAGES = ("README.md", *(f"nbs/guides/{o}.ipynb" for o in ("own", "cluster", "pipeline", "sets", "weights")))


def commands():
    "Every `dvc exp run` of the pages, a part of a line each."
    for page in PAGES:
        text = (CONF.parent/page).read_text()
        if page.endswith(".ipynb"): text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"])
        for line in re.findall(r"dvc exp run[^`#|\n]*", text.replace("\\\n", " ")):
            yield shlex.split(line.split(";")[0].replace("$p", "0.1"))


SAID = sorted({tuple(b for a, b in zip(c, c[1:]) if a == "-S") for c in commands()} - {()})


@pytest.mark.parametrize("overrides", SAID, ids=" ".join)
def test_what_the_pages_say_can_be_typed(overrides):
    "Composed and checked; only archives, weights and a method of one's own are not there."
    if any("toy" in o for o in overrides): pytest.skip("a test of the pipeline follows this recipe")
    fine(list(overrides))


def test_the_pages_say_something(): assert len(SAID) > 20


# Recipes of the releases, to the digit

def patches(p, name): return (p.image_size(name) // p.encoders[name].model.patch_size)**2


EXPERIMENTS = sorted(p.stem for p in (CONF/"experiment").glob("*.yaml"))


@pytest.mark.parametrize("overrides", [[f"experiment={e}"] for e in EXPERIMENTS] + [["labels=fractions"], ["experiment=sdmae_pcam", "labels=fractions"], ["experiment=ablation", "data=pcam64", "budget=hour"]], ids=" ".join)
def test_every_experiment_composes(overrides): fine(overrides)


@pytest.mark.parametrize("experiment, data, classes_dropped", [("sdmae_pcam", "pcam", []), ("sdmae_nct", "nct", ["BACK"])])
def test_sdmae_as_released(experiment, data, classes_dropped):
    p = parse_params(compose([f"experiment={experiment}"]))
    s, f, l, b = method_params(p, "sdmae"), p.tasks["tissue"].finetune, p.tasks["tissue"].linear_sgd, p.encoders["sdmae"].pretrain
    assert p.protocols == ["probe", "finetune", "linear_sgd"] and p.reports == ["tissue"]
    assert (p.data["tissue"].adapter, p.data["tissue"].drop_classes, p.image_size("sdmae"), patches(p, "sdmae")) == (data, classes_dropped, 224, 196)
    assert (p.model.patch_size, p.model.embed_dim, p.model.depth, p.model.num_heads, p.model.mlp_ratio) == (16, 384, 12, 6, 4)
    assert (s.decoder.embed_dim, s.decoder.depth, s.decoder.num_heads) == (192, 4, 3)
    assert int(s.mask_ratio*patches(p, "sdmae")) == 117 and not s.class_token and (s.pos_embed, s.target_norm) == ("sincos1d", "channel")
    assert (s.head.hidden_dim, s.head.bottleneck_dim, s.head.out_dim) == (2048, 256, 4096)
    assert (s.loss_weight, s.student_temp, s.teacher_temp, s.center_momentum, s.center_on, s.detach_teacher, s.distill) == (0.2, 0.1, 0.04, 0.9, "probs", False, "mean")
    # pre-training
    assert (b.epochs, b.batch_size, round(s.optim.warmup*b.epochs)) == (100, 1024, 5)
    assert s.optim.lr(b.batch_size) == pytest.approx(2.4e-3, rel=1e-12) and (s.optim.min_lr, s.optim.betas, s.optim.weight_decay) == (1e-5, (0.9, 0.999), 0.05)
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
    shape = lambda p: (p.image_size("sdmae"), p.model.patch_size, p.model.embed_dim, p.model.depth, p.model.num_heads, *list(method_params(p, "sdmae").decoder.model_dump().values())[:3])
    assert shape(ex) == (224, 16, 384, 12, 6, 192, 8, 3) and shape(tiny) == (224, 16, 192, 12, 3, 192, 2, 2) and shape(eight) == (96, 8, 384, 12, 6, 192, 4, 3)


def test_mae_as_released():
    p = parse_params(compose(["experiment=mae_nct"]))
    m, f, l, b = method_params(p, "mae"), p.tasks["tissue"].finetune, p.tasks["tissue"].linear_sgd, p.encoders["mae"].pretrain
    assert p.protocols == ["probe", "finetune", "linear_sgd"]
    assert (int(m.mask_ratio*patches(p, "mae")), m.class_token, m.pos_embed, m.target_norm) == (147, True, "sincos2d", "joint")
    assert (m.decoder.embed_dim, m.decoder.depth, m.decoder.num_heads) == (512, 8, 16)
    assert (b.epochs, b.batch_size, round(m.optim.warmup*b.epochs), m.optim.betas) == (800, 4096, 40, (0.9, 0.95))
    assert m.optim.lr(b.batch_size) == pytest.approx(2.4e-3, rel=1e-12) and (m.views.scale, m.views.hflip) == ((0.2, 1.0), True)
    assert f.optim.lr(f.batch_size) == pytest.approx(2e-3, rel=1e-12) and (f.layer_decay, f.drop_path, f.epochs) == (0.65, 0.1, 100)
    assert (l.optim.name, l.batch_size, l.pool, l.epochs) == ("lars", 16384, "token", 90) and l.optim.lr(l.batch_size) == pytest.approx(6.4, rel=1e-12)


def test_miram_as_released():
    p = fine(["lesions=cbis"])
    m, f, model, b = method_params(p, "lesion_miram"), p.tasks["margins"].finetune, p.encoders["lesion_miram"].model, p.encoders["lesion_miram"].pretrain
    assert (p.data["lesions"].image_size, p.image_size("lesion_miram"), patches(p, "lesion_miram"), int(49*(1-m.mask_ratio))) == (224, 112, 49, 12)
    assert (m.scales, m.patches, m.weights, m.target, m.attention, m.target_norm, m.class_token, m.pos_embed) == ([1, 2], ["masked", "all"], [1, 1], "upsampled", "full", "joint", True, "sincos2d")
    assert m.decoder.model_dump() == dict(embed_dim=512, depth=8, num_heads=16, convolution=False) and m.nystrom.model_dump() == dict(landmarks=64, iterations=6, kernel=33)
    assert (model.embed_dim, model.depth, model.num_heads, model.patch_size) == (768, 12, 12, 16)
    assert (b.epochs, b.batch_size, m.optim.warmup*500, m.optim.base_lr, m.optim.weight_decay, m.optim.betas, m.views.scale) == (500, 1024, 40, 1.5e-4, .05, (.9, .95), (.2, 1.))
    assert (f.optim.name, f.epochs, f.batch_size, f.optim.weight_decay, f.drop_path, f.class_weights, f.select, f.layer_decay) == ("adam", 100, 32, .01, .1, True, "macro_auc", 1.)
    assert abs(f.optim.lr(32) - 1e-5) < 1e-12 and f.optim.warmup*100 == 2
    assert (f.views.rotate, f.views.zoom, round(255*f.views.intensity), f.views.hflip, f.views.vflip, f.views.scale, f.views.rot90) == (25., (.8, 1.2), 20, True, True, (1., 1.), False)
    assert method_params(p, "lesion_miram_native").target == "native" and patches(p, "lesion_mae_fine") == 196
