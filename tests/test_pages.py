"""The page that a report becomes: what it says first, what it shows, what it links to, and what the command line says at the end."""
import base64, re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from sdmae.pipeline.code import computes, read_notebook, source, write_notebook
from sdmae.pipeline.pages import beside, contents, framed, html
from sdmae.pipeline import __main__ as stages
from sdmae.pipeline.schedule import LATER, Board, conclusion
from sdmae.report import figures as fg
from sdmae.report.captions import CAPTIONS, Captioned, caption_of
from sdmae.report.names import Names, curve_name

ROOT = Path(__file__).parents[1]
PNG = base64.b64encode(b"not looked at").decode()


def output(**data): return dict(output_type="display_data", data=data, metadata={})


@pytest.fixture
def page(tmp_path):
    "A notebook as the report leaves it: a figure with caption and alternative text, a bare one, a table, an empty progress bar."
    figure = output(**{"image/png": PNG}) | dict(metadata={"image/png": {"alt": 'Labels: "few" & many'}})
    caption = output(**{"text/markdown": '<div class="caption">Higher is better.</div>'})
    table = output(**{"text/markdown": "| a | b |\n|---|---|\n| 1 | 2 |"})
    blank = dict(output_type="stream", name="stdout", text="\n")
    cells = [dict(cell_type="markdown", metadata={}, source="# Old\n\n> of old"), dict(cell_type="markdown", metadata={}, source="## Verdict & more"),
             dict(cell_type="code", metadata={}, source="secret = 1", execution_count=1, outputs=[blank, figure, caption, output(**{"image/png": PNG}), table])]
    write_notebook(dict(cells=cells, nbformat=4, nbformat_minor=4, metadata={}), tmp_path/"a.ipynb")
    links = {"Tables": {"all <scores>": "results.csv"}, "Data sheets": {}}
    return BeautifulSoup(html(tmp_path/"a.ipynb", tmp_path/"a.html", title="Is 1 < 2?", links=links).read_text(), "html.parser")


def test_a_figure_has_its_words(page):
    first, second = page.find_all("figure")
    assert first.img["alt"] == 'Labels: "few" & many' and first.figcaption.get_text() == "Higher is better."
    assert second.figcaption is None, "a caption belongs to the figure before it alone"
    assert not page.find_all("div", class_="caption") and page.table.parent["class"] == ["wide"]


def test_the_head_fits_phone_dark_and_paper(page):
    assert page.title.get_text() == page.h1.get_text().strip("¶ ") == "Is 1 < 2?" and page.html["lang"] == "en"
    assert page.find("meta", attrs={"name": "viewport"})["content"].startswith("width=device-width")
    style = page.style.get_text()
    assert all(o in style for o in ("prefers-color-scheme: dark", "@media print", "max-width: 100%", "max-width: 62rem"))
    assert not page.find_all("script") and not [t for t in page.find_all(src=True) if not t["src"].startswith("data:")]


def test_contents_lead_to_sections_and_files(page):
    to = {a.get_text(): a["href"] for a in page.nav.find_all("a")}
    assert to["all <scores>"] == "results.csv" and page.find(id=to["Verdict & more"].removeprefix("#")).name == "h2"
    assert "Data sheets" not in page.nav.get_text() and "secret" not in page.get_text()
    assert contents(framed("<p>no section</p>")) == ""
    assert not [p for p in page.find_all("pre") if not p.get_text(strip=True)]


def test_links_name_what_is_there(tmp_path):
    folder = tmp_path/"tissue"
    (folder/"margins").mkdir(parents=True); (folder/"margins"/"card.csv").touch(); (folder/"odd_one.csv").touch()
    found = beside(folder, ["gone"], {"tissue": "T"})
    assert found["Tables"] == {"colour margins": "margins/card.csv", "odd one": "odd_one.csv"} and found["Data sheets"] == found["Other reports"] == {}


def test_every_figure_of_the_report_has_a_caption():
    "All names under which the report's notebook keeps figures."
    code = "\n".join(source(c) for c in read_notebook(ROOT/"nbs"/"pipeline"/"60_report.ipynb")["cells"] if c["cell_type"] == "code")
    kept = [n.split("{")[0].rstrip("_") for n in re.findall(r"keep\((?:[^()]|\([^()]*(?:\([^()]*\)[^()]*)*\))*?, f?\"([a-z_]+(?:\{[^\"]*)?)\"", code)]
    assert len(kept) > 15 and {"overview", "learning_curves", "tsne", "nuclei", "reconstructions"} <= set(kept)
    for name in kept: assert caption_of(name).endswith("."), name
    with pytest.raises(ValueError, match="'pie' has no caption: add its kind"): caption_of("pie")
    assert all(len(c.split(". ")) > 1 for k, c in CAPTIONS.items() if k not in ("nuclei",)), "what to see, and how it was made"


def test_losses_never_share_an_axis():
    steps = np.arange(5)
    def of(e, metric, values): return pd.DataFrame(dict(encoder=e, seed=0, metric=metric, step=steps, value=values))
    curves = pd.concat([of("mae", "loss", steps + 1.), of("mae", "loss_1", steps + 1.), of("sdmae", "loss", steps*2.), of("sdmae", "loss_mse", steps*1.),
                        of("mae", "rankme", steps), of("sdmae", "rankme", steps)])
    fig = fg.learning_curves(curves, "x", ["loss", "loss_1", "loss_mse", "rankme"], Names({"mae": dict(name="MAE"), "sdmae": dict(name="SD-MAE")}))
    assert [(ax.get_title(), len(ax.lines)) for ax in fig.axes] == [("MAE: loss", 1), ("SD-MAE: loss", 1), ("SD-MAE: reconstruction loss (MSE)", 1), ("RankMe", 2)]


@pytest.mark.parametrize("values", [[-.9, -.5], [-5., -.021], [-.9, -.0199], [-.9, .4], [0., 0.]])
def test_structure_never_turns_over(values):
    curves = pd.DataFrame(dict(encoder="mae", seed=0, metric="structure_r2", step=[0, 1], value=values))
    low, high = fg.learning_curves(curves, "x").axes[0].get_ylim()
    assert low < high and low <= max(values) <= high


def test_classes_differ_without_colour():
    kinds = list("abcdef")*10
    fig = fg.tsne({"mae": np.random.default_rng(0).normal(size=(60, 2))}, kinds, "x")
    assert len({l.get_marker() for l in fig.axes[0].lines}) == 6 and [t.get_text() for t in fig.legends[0].get_texts()] == list("abcdef")


def test_curves_have_names_not_keys():
    assert curve_name("loss_mse") == "reconstruction loss (MSE)" and curve_name("structure_r2_2") == "structure R², scale 2"
    fig = fg.reconstruction_grid({k: np.zeros((1, 3, 4, 4)) for k in ("original", "original_2")}, "x")
    assert [ax.get_ylabel() for ax in fig.axes] == ["original", "original at scale 2"]


def test_the_bar_counts_stages_and_reports():
    board = Board([{"a@x-1": 30., "b@x-1": 10.}, {"a@x-2": 20.}], {"report@x": 40.})
    board.show(0, "a@x-1"); board.show(1, "a@x-2", .5)
    assert (board.bar.postfix, board.bar.n, board.bar.total) == ("stage 2 of 4, now: x-1, x-2", 10, 100)
    board.show(0, None); board.show(1, None)
    assert board.bar.postfix.startswith("stage 3 of 4") and board.bar.n == 60 and "left in all" in board.bar.bar_format
    board.bar.close()


def test_a_run_ends_with_what_came_out(tmp_path):
    (tmp_path/"reports"/"x").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="dvc repro report@x"): conclusion("x", tmp_path)
    (tmp_path/"reports"/"x"/"verdict.md").write_text("Asked: why?\n\n**MAE is level.**\n\n- " + "many words "*20 + "\n\n**Warning**: one seed.\n\nNext: `dvc exp run -S 'seeds=[0,1,2]'`.\n")
    lines = conclusion("x", tmp_path).splitlines()
    assert lines[0] == "== x ==" and lines[-1] == "All of it: reports/x/index.html" and max(map(len, lines)) <= 100
    assert "MAE is level." in lines and "Warning: one seed." in lines and "Next: `dvc exp run -S 'seeds=[0,1,2]'`." in lines


def test_a_report_made_alone_says_what_came_out(tmp_path, monkeypatch, capsys):
    "As `dvc repro` and `dvc exp run` make it; `make repro` says all of it at its end."
    (tmp_path/"reports"/"tissue").mkdir(parents=True)
    (tmp_path/"reports"/"tissue"/"verdict.md").write_text("**MAE is level.**\n")
    for o in ("need", "run"): monkeypatch.setattr(stages, o, lambda *args: None)
    monkeypatch.setattr(stages, "project_root", lambda: tmp_path)
    monkeypatch.setattr("sdmae.pipeline.pages.html", lambda *args, **kwargs: None)
    monkeypatch.setattr("sdmae.pipeline.sweep.sweep", lambda: None)
    stages.report("tissue")
    assert capsys.readouterr().out.splitlines()[1:] == ["== tissue ==", "MAE is level.", "", "All of it: reports/tissue/index.html"]
    monkeypatch.setenv(LATER, "1"); stages.report("tissue")
    assert capsys.readouterr().out == ""


def test_docstrings_and_comments_compute_nothing():
    "Of the module whose docstrings once retrained everything."
    code = (ROOT/"sdmae"/"evaluate"/"statistics.py").read_text()
    reworded = re.sub(r'^(    )"[A-Z][^"\n]*"$', r'\1"Said otherwise."', code, flags=re.M).replace("# (n, C)", "# probabilities of n tiles")
    assert reworded != code and computes(reworded) == computes(code)
