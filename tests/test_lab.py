"`make lab`: what JupyterLab saves is what git should see. The server is asked as its page asks it, by the contents API."
import json, os, re, shutil, socket, subprocess, time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (shutil.which("jupyter-lab") and shutil.which("make")), reason="JupyterLab or make is not installed")


def git(folder, *args): return subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The server as the Makefile starts it, on a copy of a notebook in a git repository."
    d, token = tmp_path_factory.mktemp("lab"), "secret"
    (d/"nbs").mkdir(); (d/"sdmae").mkdir()
    for o in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT/o, d)
    shutil.copy(ROOT/"nbs"/"files.ipynb", d/"nbs")
    git(d, "init", "-q"); git(d, "add", "-A"); git(d, "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", "one")
    said = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    flags = re.search(r"jupyter lab (.*)", said)[1].split()
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = os.environ | dict(JUPYTER_CONFIG_DIR=str(d/"config"), JUPYTER_DATA_DIR=str(d/"data"), JUPYTER_RUNTIME_DIR=str(d/"runtime"))
    with open(d/"log", "w") as log:
        server = subprocess.Popen(["jupyter-lab", *flags, "--no-browser", f"--port={port}", f"--IdentityProvider.token={token}"], cwd=d/"nbs",
                                  stdout=log, stderr=log, env=env)

    def ask(path, method="GET", body=None):
        r = Request(f"http://127.0.0.1:{port}/{path}", method=method, data=body and json.dumps(body).encode(), headers=dict(Authorization=f"token {token}"))
        with urlopen(r, timeout=20) as f: return json.load(f)
    try:
        for _ in range(120):
            try: ask("api"); break
            except URLError:
                assert server.poll() is None, (d/"log").read_text()
                time.sleep(.25)
        yield d, ask
    finally: server.terminate(); server.wait(20)


def opened(ask):
    "A notebook as the page holds it once its kernel has told what it is, and a cell was run that shows nothing; what is shown is kept."
    model = ask("api/contents/files.ipynb")
    nb = model["content"]
    nb["metadata"]["language_info"] = dict(name="python", version="3.12.1")
    [code, *_] = [c for c in nb["cells"] if c["cell_type"] == "code"]
    code["execution_count"], code["metadata"] = 7, dict(trusted=True, scrolled=True)
    return nb


def test_opening_and_running_marks_nothing_changed(lab):
    d, ask = lab
    nb = opened(ask)
    ask("api/contents/files.ipynb", "PUT", dict(type="notebook", format="json", content=nb))
    assert git(d, "diff") == "", (d/"log").read_text()


def test_a_one_line_edit_is_a_one_line_diff(lab):
    d, ask = lab
    nb = opened(ask)
    nb["cells"][0]["source"] += "\nOne more line."
    ask("api/contents/files.ipynb", "PUT", dict(type="notebook", format="json", content=nb))
    lines = [o for o in git(d, "diff", "-U0").splitlines() if re.match(r"[+-](?![+-])", o)]
    assert 1 <= len(lines) <= 3 and sum(o.startswith("+") for o in lines) <= 2 and any("One more line." in o for o in lines), lines


def test_no_news_are_asked_for(lab):
    d, ask = lab
    assert ask("lab/api/news") == {"news": []} and ask("lab/api/update")["notification"] is None
