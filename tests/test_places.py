"Where the project may lie: folders with odd names, archives without git, inside other repositories, in a clone of another owner."
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

from sdmae import made
from sdmae.made import git_advice, git_place, git_state

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b.c", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b.c"}
git = lambda folder, *args: subprocess.run(["git", "-c", "protocol.file.allow=always", "-C", str(folder), *args], env=ENV, capture_output=True, text=True, check=True).stdout.strip()

needs_git = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


# Make

STUB = """#!/bin/sh
printf "%s\\t%s\\t%s\\n" "$(basename "$0")" "$PWD" "$*" >> "$CALLS"
[ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" && for o in python dvc; do cp "$0" "$3/bin/$o"; done
[ "$2" = sdmae.made ] && exit "${WITHOUT_GIT:-0}"
exit 0
"""


def made_in(folder, tmp_path, target="repro", **env):
    "`make` in a copy of what set-up reads, with an interpreter that writes down how it is called."
    folder.mkdir(parents=True)
    for o in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt"): shutil.copy(ROOT/o, folder)
    python = tmp_path/"an interpreter"/"python3"
    python.parent.mkdir(); python.write_text(STUB); python.chmod(0o755)
    before = sorted(tmp_path.rglob("*"))
    r = subprocess.run(["make", target, f"PYTHON={python}"], cwd=folder, env=ENV | dict(CALLS=str(tmp_path/"calls")) | env, capture_output=True, text=True)
    calls = [o.split("\t") for o in (tmp_path/"calls").read_text().splitlines()] if (tmp_path/"calls").exists() else []
    return r, calls, [o for o in sorted(tmp_path.rglob("*")) if o not in before and o != tmp_path/"calls" and folder/".venv" not in (o, *o.parents)]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("name", ["my project", "it's", "tête à tête", "a&b;(c)|d>e", "x*y[1]?{2}", "#1 100%", "-dash", "a  b=c, !d ~e"])
def test_make_works_in_folders_of_any_name(tmp_path, name):
    folder = tmp_path/name/"sdmae"
    r, calls, elsewhere = made_in(folder, tmp_path)
    assert r.returncode == 0, r.stderr
    assert elsewhere == [] and {o[1] for o in calls} == {str(folder)} and (folder/".venv"/".set-up-pipeline").exists()
    assert [(o[0], o[2].split(" ")[:2]) for o in calls[2:]] == [("python", ["-m", "pip"]), ("python", ["-m", "sdmae.made"]), ("dvc", ["pull", "data.dvc"]), ("python", ["-m", "sdmae.pipeline"])]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("name", ['two"quotes', "dollar $HOME", "back`id`", "co:lon", "back\\slash"])
def test_make_refuses_what_cannot_be_quoted_before_it_writes(tmp_path, name):
    r, calls, elsewhere = made_in(tmp_path/name/"sdmae", tmp_path)
    assert r.returncode and f"Move it, and try again: {tmp_path/name}" in r.stderr and calls == elsewhere == [] and not (tmp_path/name/"sdmae"/".venv").exists()


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_tells_dvc_that_there_is_no_git(tmp_path):
    r, calls, _ = made_in(tmp_path/"sdmae", tmp_path, WITHOUT_GIT="1")
    assert r.returncode == 0 and [o[2] for o in calls if o[0] == "dvc"] == ["config --local core.no_scm true", "pull data.dvc"]


# Git

@pytest.fixture
def project(tmp_path):
    "What makes a folder the project to git and to `project_root`."
    def make(folder):
        for o in ("sdmae/params.py", "nbs/params.ipynb", "settings.ini", "params.yaml", "dvc.yaml"):
            (folder/o).parent.mkdir(parents=True, exist_ok=True); (folder/o).write_text("")
        return folder
    return make


def repository(folder):
    folder.mkdir(exist_ok=True); git(folder, "init", "-q"); git(folder, "add", "-A"); git(folder, "commit", "-q", "--allow-empty", "-m", "one")
    return git(folder, "rev-parse", "--short=12", "HEAD")


@needs_git
def test_a_clone_of_ones_own(tmp_path, project):
    commit = repository(project(tmp_path/"a"))
    assert (git_place(tmp_path/"a"), git_state(tmp_path/"a"), git_advice(tmp_path/"a")) == ("own", commit, "")
    (tmp_path/"a"/"params.yaml").write_text("x: 1\n"); (tmp_path/"a"/"sdmae"/"new.py").write_text("")
    assert git_state(tmp_path/"a") == f"{commit}, with 2 changed or new: params.yaml, sdmae/new.py"
    (tmp_path/"link").symlink_to(tmp_path/"a")
    assert git_place(tmp_path/"link") == "own"


@needs_git
def test_worktrees_and_submodules_are_clones(tmp_path, project):
    commit = repository(project(tmp_path/"a"))
    git(tmp_path/"a", "worktree", "add", "-q", str(tmp_path/"tree"))
    repository(tmp_path/"super"); git(tmp_path/"super", "submodule", "add", "-q", str(tmp_path/"a"), "sub"); git(tmp_path/"super", "commit", "-q", "-m", "two")
    for place in (tmp_path/"tree", tmp_path/"super"/"sub"): assert (git_place(place), git_state(place)) == ("own", commit)


@needs_git
def test_a_foreign_commit_is_never_named(tmp_path, project, monkeypatch):
    "An archive outside git, below a repository, over one, beside a hook's variables; a repository without a commit."
    assert git_place(project(tmp_path/"archive")) == "none" and "core.no_scm true" in git_advice(tmp_path/"archive")
    foreign = repository(tmp_path/"thesis")
    assert git_place(project(tmp_path/"thesis"/"code"/"sdmae")) == "foreign" and "git init" in git_advice(tmp_path/"thesis"/"code"/"sdmae")
    assert git_place(project(tmp_path/"thesis")) == "uncommitted"
    git(project(tmp_path/"new"), "init", "-q")
    assert git_place(tmp_path/"new") == "uncommitted"
    for o in ("archive", "thesis", "thesis/code/sdmae", "new"): assert git_state(tmp_path/o) == "no git commit"
    own = repository(project(tmp_path/"own"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path/"thesis"/".git")); monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path/"thesis"/".git"/"index"))
    assert git_state(tmp_path/"own") == own != foreign and git_state(tmp_path/"archive") == "no git commit"
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path/"archive"))
    assert git_state(tmp_path/"archive") == "no git commit"


@needs_git
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files to another owner")
def test_a_clone_of_another_owner(tmp_path, project, monkeypatch):
    for o in ("GIT_CONFIG_COUNT", "SUDO_UID"): monkeypatch.delenv(o, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path/"gitconfig"))
    commit = repository(project(tmp_path/"the clone"))
    for p in (tmp_path/"the clone", *(tmp_path/"the clone").rglob("*")): os.chown(p, 12345, 12345)
    assert (git_place(tmp_path/"the clone"), git_state(tmp_path/"the clone")) == ("refused", "no git commit")
    line = git_advice(tmp_path/"the clone").split("`")[1]
    assert line.startswith("git config --global --add safe.directory")
    subprocess.run(line, shell=True, check=True)
    assert git_state(tmp_path/"the clone") == commit, "the line that is said helps"


def test_without_git(tmp_path, project, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (git_place(tmp_path), git_state(tmp_path)) == ("no git", "no git commit") and "not installed" in git_advice(tmp_path)


@needs_git
def test_the_command_says_the_line(tmp_path, project, monkeypatch, capsys):
    repository(project(tmp_path/"own")); project(tmp_path/"archive"); repository(tmp_path/"thesis"); project(tmp_path/"thesis"/"sdmae"); project(tmp_path/"thesis"/"ignored")
    (tmp_path/"thesis"/".gitignore").write_text("/ignored/\n")
    for place, code, words in (("own", 0, ""), ("archive", 1, "no git repository"), ("thesis/sdmae", 0, "inside another git repository"), ("thesis/ignored", 1, "inside another git repository")):
        monkeypatch.chdir(tmp_path/place)
        assert made.main() == code and words in (said := capsys.readouterr().err) and bool(said) == bool(words)


@needs_git
def test_dvc_in_an_archive(tmp_path, project):
    "DVC stops without git, and fetches the sample after the line that is said."
    folder = project(tmp_path/"archive")
    shutil.copytree(ROOT/".dvc", folder/".dvc", ignore=lambda d, names: {"tmp", "cache", "config.local"} & {*names} if Path(d).name == ".dvc" else ())
    shutil.copy(ROOT/"data.dvc", folder)
    (folder/"dvc.yaml").unlink()
    dvc = lambda *args: subprocess.run([sys.executable, "-m", "dvc", *args], cwd=folder, env=ENV, capture_output=True, text=True)
    stopped = dvc("pull", "data.dvc")
    assert stopped.returncode and "is not a git repository" in stopped.stderr
    line = git_advice(folder).split("`")[1].split()
    assert dvc(*line[1:]).returncode == 0 and dvc("pull", "data.dvc").returncode == 0 and (folder/"data"/"sample"/"nct").is_dir()
