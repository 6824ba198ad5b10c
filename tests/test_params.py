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
    ("model.patch_size", 7, "data.image_size 64 is not divisible by model.patch_size 7"),
    ("model.num_heads", 5, "embed_dim 192 is not divisible by num_heads 5"),
    ("method.mae.decoder.num_heads", 5, "embed_dim 96 is not divisible by num_heads 5"),
    ("method.mae.mask_ratio", 0.001, "method.mae.mask_ratio 0.001 leaves no visible or no masked token of 64"),
    ("method.mae.mask_ratio", 1.0, "method.mae.mask_ratio"),
    ("method.sdmae.center_on", "prob", "method.sdmae.center_on"),
    ("method.sdmae.views.scale", [0.5, 0.2], "scale must rise"),
    ("methods", ["random", "sdmea"], "methods lists 'sdmea', but there is no section method.sdmea"),
    ("methods", [], "methods"),
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


@pytest.mark.parametrize("group", ["data", "model", "budget"])
def test_every_group_composes(group):
    "Each file of a group gives valid parameters, with the model that fits the tiles."
    for file in sorted((CONF/group).glob("*.yaml")):
        fits = {"nct": ["model=vit_small_16"], "nct8": ["model=vit_small_16"], "vit_small_16": ["data=nct"], "vit_small_8": ["data=pcam"]}
        parse_params(compose([f"{group}={file.stem}", *fits.get(file.stem, [])]), where=file.name)


def test_the_releases_numbers():
    "The configurations `mae` and `sdmae` hold the authors' numbers; peak rates follow from the batch."
    p = parse_params(compose(["budget=paper", "data=nct8", "model=vit_small_16"]))
    assert p.pretrain.batch_size == 1024 and p.pretrain.epochs == 100 and p.finetune.optim.lr(p.finetune.batch_size) == pytest.approx(4e-3) and p.finetune.layer_decay == 0.75
    s, m = p.method.sdmae, p.method.mae
    assert s.optim.lr(1024) == pytest.approx(2.4e-3) and s.optim.min_lr == 1e-5 and s.optim.betas == (0.9, 0.999) and s.optim.weight_decay == 0.05
    assert int(s.mask_ratio*p.patches()) == 117 and s.decoder.model_dump() == dict(embed_dim=192, depth=4, num_heads=3)
    assert s.head.model_dump() == dict(hidden_dim=2048, bottleneck_dim=256, out_dim=4096)
    assert (s.loss_weight, s.student_temp, s.teacher_temp, s.center_momentum, s.center_on, s.detach_teacher) == (0.2, 0.1, 0.04, 0.9, "probs", False)
    assert s.views.scale == (0.08, 1.) and not s.views.hflip
    assert m.optim.lr(4096) == pytest.approx(2.4e-3) and m.optim.betas == (0.9, 0.95) and m.mask_ratio == 0.75
    assert m.decoder.model_dump() == dict(embed_dim=512, depth=8, num_heads=16) and m.views.scale == (0.2, 1.) and m.views.hflip


def test_params_yaml_is_the_composition_of_conf():
    assert yaml.safe_load((CONF.parent/"params.yaml").read_text()) == compose()
