"The benchmark is fair, counts right, and runs."
import json, sys

import pytest
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block

from sdmae.bench.measure import SETTINGS, complete, count, enter, setting
from sdmae.bench.peers import PEERS, Transcription, contestant
from sdmae.methods.registry import method_params
from sdmae.methods.sdmae import SDMAE
from sdmae.pipeline.run import run
from sdmae.params import compose, parse_params, project_root

SMALL = parse_params(compose(["only=tissue", "data.tissue.image_size=32", "model.embed_dim=32", "model.depth=2", "model.num_heads=2", "+encoder.miram={of: mae, method: miram}"]))


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_transcription_is_sdmae(float64, seed):
    "Loss, gradients and centre, over two steps; the key biases, which the release has not, at zero."
    torch.manual_seed(seed)
    own = SDMAE(method_params(SMALL, "sdmae"), SMALL.model, 32).train()
    for p in own.parameters(): p.data += 0.1*torch.randn_like(p)
    for m in own.modules():
        if isinstance(m, Attention): m.qkv.bias.data.chunk(3)[1].zero_()
    plain = Transcription(own)
    for _ in range(2):
        image, (visible, masked) = torch.rand(3, 3, 32, 32), own.draw_mask(3, "cpu")
        ours = own.loss_on(image, visible, masked)["loss"]
        theirs = plain.loss_on(image, torch.zeros(3, own.n_tokens, dtype=torch.bool).scatter(1, masked, True))
        assert abs(ours - theirs).item() < 1e-9
        ours.backward(); theirs.backward(); own.after_step(1.)
        torch.testing.assert_close(plain.center[0], own.center, rtol=0, atol=1e-12)
    for a, b in [(own.encoder.blocks[0].mlp.fc1.weight, plain.blocks[0].mlp.fc1.weight), (own.decoder.mask_token, plain.mask_token),
                 (own.teacher_head.mlp[0].weight, plain.teacher.mlp[0].weight), (own.student_head.prototypes, plain.student.last.parametrizations.weight.original1)]:
        torch.testing.assert_close(b.grad.reshape(a.shape), a.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("heads", [1, 4])
def test_count_of_a_block(heads):
    "Forward, and twice as much backward: weights of 12·D² at each of N tokens, two products of N × N × D."
    N, D = 7, 8
    assert count(Block(D, heads, 4.), torch.randn(3, N, D, requires_grad=True)) == 3*2*(12*D*D*N + 2*N*N*D)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_learns(name):
    "Its loss falls on one batch, and its work is that of the method it stands against, and not more than half as much again."
    if name == "lightly": pytest.importorskip("lightly")
    x = torch.rand(4, 3, 32, 32)
    peer, own = contestant(name, SMALL), contestant(PEERS[name], SMALL)
    assert 1 <= count(peer, x) / count(own, x) < 1.5
    optimizer, losses = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-3), []
    for _ in range(15):
        loss = peer(x); loss.backward(); optimizer.step(); optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses[-3:]) < losses[0]


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly.models.modules", None)
    entry, row = enter("lightly", "float32", SMALL, torch.rand(2, 3, 32, 32))
    assert entry is None and "lightly" in row["why"]
    row = complete(dict(setting="s", batch=2) | row, {}, {}, dict(float32=1e9))
    assert row["images_per_s"] is None and row["against"] == "mae"


def test_settings_are_the_releases():
    for name in SETTINGS:
        P = setting(name)
        assert P.image_size("mae") == P.image_size("sdmae") and P.encoders["mae"].model == P.encoders["sdmae"].model
    assert setting("ViT-B/16 at 224").model.embed_dim == 768 and setting("ViT-S/8 at 96").image_size("mae") == 96


def test_the_notebook_runs(tmp_path):
    "At its smallest size; its JSON has every field."
    run(project_root()/"nbs"/"bench"/"speed.ipynb", tmp_path/"speed.ipynb", dict(metrics=str(tmp_path/"bench.json")))
    result = json.loads((tmp_path/"bench.json").read_text())
    assert result.keys() == {"size", "machine", "ceilings", "rows", "together", "nuclei", "ahead"} and result["size"] == "tiny"
    for row in result["rows"]:
        assert row.keys() == {"setting", "contestant", "configuration", "against", "batch", "images_per_s", "low", "high", "mfu", "flops", "ceiling",
                              "compile_seconds", "memory_bytes", "why"}
        assert row["low"] <= row["images_per_s"] <= row["high"] and 0 < row["mfu"] < 1.5
    assert [r["method"] for r in result["together"]] == ["mae", "sdmae"] and all(r["share"] > 0 for r in result["together"])
    assert len(result["nuclei"]) == 3 and all(r["nuclei"] > 500 and r["px_per_s"] >= r["slowest"] > 0 for r in result["nuclei"])
    assert [r["times_shipped"].keys() for r in result["ahead"]] == [{"transformers"}, {"transcription"}]


def test_the_notebook_of_growth_runs(tmp_path):
    run(project_root()/"nbs"/"bench"/"growth.ipynb", tmp_path/"growth.ipynb", dict(metrics=str(tmp_path/"growth.json")))
    result = json.loads((tmp_path/"growth.json").read_text())
    assert {r["grows"] for r in result["steps"]} == {"images", "side", "model"} and all(r["seconds"] > 0 for r in result["steps"])
    assert result["processes"] == []
    assert result["judging"][0].keys() == {"features", "knn", "linear", "bootstrap"}
