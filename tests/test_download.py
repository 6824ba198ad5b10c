"""Downloads, against a server on this machine that cuts, delays, redirects, ignores what was asked, and sends what is wrong."""
import errno, gzip, hashlib, io, json, os, signal, subprocess, sys, threading, time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import sdmae.sources.download as dl
from sdmae.sources.download import SETS, ZENODO, Dataset, Remote, download, fetch, main, need_room, table, unpack, wait_asked

BODY = bytes(range(256))*4000 # 1,024,000 bytes
NOISY = gzip.compress(hashlib.shake_128(b"").digest(9000))


class Server(ThreadingHTTPServer):
    "Answers each request by the next of `acts`; the last one stays. `asked` has the headers of each."
    daemon_threads = True
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.acts, self.asked, self.url = [], [], f"http://127.0.0.1:{self.server_port}"
    def handle_error(self, *a): pass

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def do_GET(self):
        s = self.server
        s.asked.append(SimpleNamespace(path=self.path, range=self.headers["Range"], if_range=self.headers["If-Range"]))
        act = s.acts[min(len(s.asked), len(s.acts)) - 1]
        act(self)

def answer(h, code, body=b"", **headers):
    h.send_response(code)
    headers = {"Content-Length": len(body), **{k.replace("_", "-"): v for k, v in headers.items()}}
    for k, v in headers.items():
        if v is not None: h.send_header(k, str(v))
    h.end_headers(); h.wfile.write(body)

def serve(body=BODY, upto=None, etag='"v1"', ranges=True, length=None, **more):
    "The file, or what is asked of it; only `upto` bytes, then the connection ends."
    def act(h):
        asked = ranges and h.headers["Range"] and h.headers["If-Range"] in (None, etag)
        at = int(h.headers["Range"][6:-1]) if asked else 0
        if at >= len(body): return answer(h, 416)
        whole = dict(ETag=etag, Content_Length=len(body) - at if length is None else length, **more)
        if asked: whole["Content_Range"] = f"bytes {at}-{len(body) - 1}/{len(body)}"
        answer(h, 206 if asked else 200, body[at:][:upto], **whole)
        h.close_connection = True
    return act

def status(code, **headers): return lambda h: answer(h, code, **headers)
def lead(url, code=302): return lambda h: answer(h, code, Location=url() if callable(url) else url)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    s = Server()
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
    yield s
    s.shutdown(); s.server_close()

def remote(server, body=BODY, size=True, name="tiles.zip"):
    return Remote(name, f"{server.url}/{name}", len(body) if size else None, f"md5:{hashlib.md5(body).hexdigest()}")

def get(server, folder, acts, tries=3, timeout=5., **kwargs):
    server.acts[:] = acts; server.asked.clear()
    return fetch(remote(server, **kwargs), folder, timeout=timeout, tries=tries, wait=0)

def names(folder): return sorted(p.name for p in folder.iterdir())
def ranges(server): return [o.range for o in server.asked]


# Broken and busy

@pytest.mark.parametrize("size", [True, False])
def test_a_broken_download_goes_on(server, tmp_path, size):
    assert get(server, tmp_path, [serve(upto=300_000), serve(upto=1), serve(upto=0), serve()], size=size, tries=4).read_bytes() == BODY
    assert ranges(server) == [None, "bytes=300000-", "bytes=300001-", "bytes=300001-"] and names(tmp_path) == ["tiles.zip"]
    assert [o.if_range for o in server.asked] == [None, '"v1"', '"v1"', '"v1"']

def test_a_later_call_goes_on(server, tmp_path, capsys):
    with pytest.raises(ConnectionError, match=r"tiles.zip: the connection ended after 400,000 of 1,024,000 bytes. 2 tries without progress. The same"):
        get(server, tmp_path, [serve(upto=400_000), serve(upto=0)], tries=2)
    assert names(tmp_path) == ["tiles.zip.part", "tiles.zip.part.json"]
    assert json.loads((tmp_path/"tiles.zip.part.json").read_text()) == dict(url=f"{server.url}/tiles.zip", size=len(BODY), digest=remote(server).digest, etag='"v1"')
    assert get(server, tmp_path, [serve()]).read_bytes() == BODY and ranges(server) == ["bytes=400000-"]
    assert "400k" in capsys.readouterr().err # the bar begins where the part ends

def test_a_killed_download_goes_on(server, tmp_path):
    def slow(h):
        answer(h, 200, BODY[:500_000], ETag='"v1"', Content_Length=len(BODY)); h.wfile.flush(); time.sleep(20)
    server.acts[:] = [slow]
    code = f"from sdmae.sources.download import *; fetch({remote(server)!r}, {str(tmp_path)!r})"
    p = subprocess.Popen([sys.executable, "-c", code], cwd=Path(dl.__file__).parents[2], env={**os.environ, "no_proxy": "*"}, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 20
    while time.monotonic() < end and not ((o := tmp_path/"tiles.zip.part").exists() and o.stat().st_size == 500_000): time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    assert get(server, tmp_path, [serve()]).read_bytes() == BODY and ranges(server) == ["bytes=500000-"] and names(tmp_path) == ["tiles.zip"]

def test_tries_count_since_the_last_progress(server, tmp_path, monkeypatch):
    monkeypatch.setattr(dl, "STEP", 100_000)
    assert get(server, tmp_path, [serve(upto=150_000)], tries=2).read_bytes() == BODY and len(server.asked) == 7
    with pytest.raises(ConnectionError, match="2 tries without progress"): get(server, tmp_path/"b", [serve(upto=1_000)], tries=2)
    with pytest.raises(ConnectionError, match="2 tries without progress"): get(server, tmp_path/"c", [serve(upto=900_000, ranges=False)], tries=2)

def test_delays(server, tmp_path):
    def stall(h): answer(h, 200, BODY[:200_000], ETag='"v1"', Content_Length=len(BODY)); h.wfile.flush(); time.sleep(5)
    assert get(server, tmp_path, [stall, serve()], timeout=.5, tries=9).read_bytes() == BODY and ranges(server)[:2] == [None, "bytes=200000-"]
    with pytest.raises(ConnectionError, match="timed out"): get(server, tmp_path/"b", [lambda h: time.sleep(.5)], timeout=.1, tries=2)

@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_busy_servers_are_asked_again(server, tmp_path, code, capsys):
    assert get(server, tmp_path, [status(code), serve()]).read_bytes() == BODY and f"answers {code}" in capsys.readouterr().err

def test_a_server_may_ask_to_wait(server, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(dl.time, "sleep", slept.append)
    get(server, tmp_path, [status(503, Retry_After=7), status(429, Retry_After=formatdate(time.time() + 60, usegmt=True)), serve()])
    assert slept[0] == 7 and 50 < slept[1] <= 60
    with pytest.raises(ConnectionError, match="answers 429 .*asks to wait 9000 s"): get(server, tmp_path/"b", [status(429, Retry_After=9000)], tries=9)
    assert len(server.asked) == 1 and [wait_asked(o) for o in (None, "", "soon", "-5", "nan")] == [0]*5

def test_waits_grow_and_end(monkeypatch):
    slept = []
    monkeypatch.setattr(dl.time, "sleep", slept.append)
    def act(): raise dl.Again("busy")
    with pytest.raises(ConnectionError, match="busy. 9 tries without progress"): dl.patiently(act, tries=9)
    assert slept == [1, 2, 4, 8, 16, 32, 60, 60]

@pytest.mark.parametrize("code, message", [(404, "404 Not Found. The file has moved or is gone"), (410, "is gone"), (401, "asks for a login"), (403, "It refuses"), (418, "418 I'm a Teapot")])
def test_what_stays_is_not_tried_again(server, tmp_path, code, message):
    with pytest.raises(ValueError, match=f"{server.url}/tiles.zip: the server answers {code}.*{message[-9:]}"): get(server, tmp_path, [status(code)])
    assert len(server.asked) == 1 and "tiles.zip" not in names(tmp_path)

def test_nobody_there(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(ConnectionError, match="http://127.0.0.1:9/a: .*refused. 2 tries"): fetch(Remote("a", "http://127.0.0.1:9/a", 1, "md5:0"), tmp_path, tries=2, wait=0)


# Another file than was expected

def test_a_server_without_ranges_begins_anew(server, tmp_path, capsys):
    assert get(server, tmp_path, [serve(upto=300_000, ranges=False), serve(ranges=False)]).read_bytes() == BODY
    assert ranges(server) == [None, "bytes=300000-"] and "no part of it can be had, begun anew" in capsys.readouterr().err

def test_the_file_changed_meanwhile(server, tmp_path):
    "The part is of another version: its ETag tells, and not one byte of it stays."
    old = bytes(len(BODY))
    assert get(server, tmp_path, [serve(old, upto=300_000, etag='"v0"'), serve()]).read_bytes() == BODY
    careless = lambda h: answer(h, 206, BODY[300_000:], ETag='"v1"', Content_Range=f"bytes 300000-{len(BODY) - 1}/{len(BODY)}") # ignores If-Range
    assert get(server, tmp_path/"b", [serve(old, upto=300_000, etag='"v0"'), careless, serve()]).read_bytes() == BODY and ranges(server) == [None, "bytes=300000-", None]

@pytest.mark.parametrize("said", [f"bytes 0-{len(BODY) - 1}/{len(BODY)}", "bytes */5", "", None])
def test_another_piece_than_was_asked_for(server, tmp_path, said):
    other = lambda h: answer(h, 206, BODY[:10], ETag='"v1"', Content_Range=said)
    assert get(server, tmp_path, [serve(upto=300_000), other, serve()]).read_bytes() == BODY and ranges(server) == [None, "bytes=300000-", None]

def test_a_part_of_another_file_is_not_used(server, tmp_path, capsys):
    with pytest.raises(ConnectionError): get(server, tmp_path, [serve(bytes(500_000), upto=400_000)], tries=1, body=bytes(500_000))
    assert get(server, tmp_path, [serve()]).read_bytes() == BODY and ranges(server) == [None] and "begun anew" in capsys.readouterr().err

@pytest.mark.parametrize("note", [None, "", "[]", "{"])
def test_a_part_of_somebody_else(server, tmp_path, note):
    (tmp_path/"tiles.zip.part").write_bytes(b"mine")
    if note is not None: (tmp_path/"tiles.zip.part.json").write_text(note)
    with pytest.raises(FileExistsError, match="tiles.zip.part is there, and not from this command"): get(server, tmp_path, [serve()])
    assert (tmp_path/"tiles.zip.part").read_bytes() == b"mine"

@pytest.mark.parametrize("acts, message", [
    ([serve(b"<html>log in</html>")], "offers 19 bytes, published are 1,024,000: another file, or a page in its place"),
    ([serve(length=len(BODY) + 100)], "offers 1,024,100 bytes"), ([serve(upto=300_000), serve(BODY + b"x")], "offers 1,024,001 bytes"),
    ([lambda h: answer(h, 200, BODY + b"more", Content_Length=None)], "sends more than the file's 1,024,000 bytes"),
    ([lambda h: answer(h, 200, BODY, Content_Encoding="br")], "encoded as br"), ([status(204)], "the server answers 204")])
def test_files_of_another_size(server, tmp_path, acts, message):
    with pytest.raises(ValueError, match=message): get(server, tmp_path, acts)
    assert "tiles.zip" not in names(tmp_path)

def test_a_wrong_answer_spoils_no_part(server, tmp_path):
    with pytest.raises(ConnectionError): get(server, tmp_path, [serve(upto=300_000)], tries=1)
    with pytest.raises(ValueError): get(server, tmp_path, [serve(b"<html>", ranges=False)])
    with pytest.raises(ValueError): get(server, tmp_path, [status(404)])
    assert get(server, tmp_path, [serve()]).read_bytes() == BODY and ranges(server) == ["bytes=300000-"]

def test_corrupt_bytes(server, tmp_path):
    bad = BODY[:700_000] + b"?" + BODY[700_001:]
    with pytest.raises(ValueError, match=r"what came has md5:\w+, published is md5:\w+. It was taken away; the same command begins anew"):
        get(server, tmp_path, [serve(bad, upto=300_000), serve(bad)])
    assert names(tmp_path) == []
    assert get(server, tmp_path, [serve()]).read_bytes() == BODY

def test_an_empty_file(server, tmp_path):
    assert get(server, tmp_path, [lambda h: answer(h, 200)], body=b"").read_bytes() == b""


# Redirects

def test_redirects_keep_what_was_asked(server, tmp_path):
    get(server, tmp_path, [lead("/b"), serve(upto=300_000), lead("/b", 307), lead("/c", 308), serve()])
    assert [(o.path, o.range) for o in server.asked] == [("/tiles.zip", None), ("/b", None), *((p, "bytes=300000-") for p in ("/tiles.zip", "/b", "/c"))]

@pytest.mark.parametrize("to, message", [
    ("http://localhost:1/a", "leads to http://localhost:1/a: not an encrypted address"), ("http://example.invalid/a", "not an encrypted address"),
    ("ftp://127.0.0.1/a", "not an encrypted address|ftp"), ("file:///etc/passwd", "not allowed"), ("/tiles.zip", "go in a circle"), ("", "circle|nowhere")])
def test_redirects_that_are_not_followed(server, tmp_path, to, message):
    with pytest.raises(ValueError, match=message): get(server, tmp_path, [lead(to)])
    assert len(server.asked) <= 11 and "tiles.zip" not in names(tmp_path)

def test_a_long_way(server, tmp_path):
    with pytest.raises(ValueError, match="circle"): get(server, tmp_path, [lead(lambda: f"/{len(server.asked)}")])
    assert len(server.asked) == 11

@pytest.mark.parametrize("url", ["http://zenodo.org/a", "ftp://zenodo.org/a", "file:///etc/passwd", "zenodo.org/a", ""])
def test_addresses_that_are_not_asked(tmp_path, url):
    with pytest.raises(ValueError, match="not an encrypted address"): fetch(Remote("a", url, 1, "md5:0"), tmp_path)

def test_certificates_are_verified(tmp_path, monkeypatch):
    import ssl
    bad = ssl.SSLCertVerificationError(1, "bad"); bad.verify_message = "self-signed certificate"
    def opener(*a): return SimpleNamespace(open=lambda *a, **k: (_ for _ in ()).throw(dl.URLError(bad)))
    monkeypatch.setattr(dl, "build_opener", opener)
    with pytest.raises(ValueError, match="certificate cannot be verified .self-signed"): fetch(Remote("a", "https://zenodo.org/a", 1, "md5:0"), tmp_path)


# What is there already, and the disk

def test_nothing_is_overwritten(server, tmp_path, capsys):
    path = get(server, tmp_path, [serve()])
    get(server, tmp_path, [])
    assert server.asked == [] and "tiles.zip is there, as published" in capsys.readouterr().out
    for data in (BODY[:-1], BODY[:-1] + b"?", b""):
        path.write_bytes(data)
        with pytest.raises(FileExistsError, match="is there, but not as published"): get(server, tmp_path, [])
        assert path.read_bytes() == data and server.asked == []
    path.unlink(); path.mkdir()
    with pytest.raises(FileExistsError, match="a folder"): get(server, tmp_path, [])

def test_a_file_that_appears_meanwhile(server, tmp_path):
    def act(h): (tmp_path/"tiles.zip").write_bytes(b"mine"); serve()(h)
    with pytest.raises(FileExistsError, match="has appeared meanwhile"): get(server, tmp_path, [act])
    assert (tmp_path/"tiles.zip").read_bytes() == b"mine"

@pytest.mark.parametrize("name", ["../a", "a/b", ".a", "..", "/a"])
def test_names_lead_nowhere(tmp_path, name):
    with pytest.raises(ValueError, match="no plain name"): fetch(Remote(name, "https://zenodo.org/a", 1, "md5:0"), tmp_path/"in")

@pytest.mark.parametrize("size", [True, False])
def test_no_room(server, tmp_path, monkeypatch, size):
    monkeypatch.setattr(dl.shutil, "disk_usage", lambda p: SimpleNamespace(free=1_000_000))
    with pytest.raises(OSError, match="are needed and 0.0 GB are free. Make room, or choose another place by --to"): get(server, tmp_path, [serve()], size=size)
    monkeypatch.setattr(dl.shutil, "disk_usage", lambda p: SimpleNamespace(free=1_100_000))
    assert get(server, tmp_path, [serve()], size=size).read_bytes() == BODY

def test_the_disk_gets_full(server, tmp_path, monkeypatch):
    "It is not tried again, and what has come stays."
    class Full(io.FileIO):
        def write(self, b):
            if self.tell() > 200_000: raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(b)
    with monkeypatch.context() as m:
        m.setattr(dl, "open", lambda p, mode: Full(p, mode.replace("b", "")), raising=False)
        with pytest.raises(OSError, match="No space left on device. Make room; the same command goes on.*tiles.zip.part"): get(server, tmp_path, [serve()])
    assert len(server.asked) == 1
    assert get(server, tmp_path, [serve()]).read_bytes() == BODY and server.asked[0].range


# Records and sets

def record(server, files, **changes):
    "As Zenodo's API describes one."
    listed = [dict(key=n, size=len(b), checksum=f"md5:{hashlib.md5(b).hexdigest()}", links=dict(self=f"{server.url}/api/records/7/files/{n}/content")) for n, b in files.items()]
    about = dict(title="Tiles", doi="10.5281/zenodo.7", publication_date="2018-04-07", license=dict(id="cc-by-4.0"), creators=[dict(name=n) for n in ("Kather", "Halama", "Marx", "More")])
    return {**dict(id=7, metadata=about, files=listed), **changes}

FILES = {"x.h5.gz": gzip.compress(BODY), "y.h5.gz": gzip.compress(b"label"*99), "meta.csv": b"a,b\n"}
SET = {"tiny": Dataset("Tiny set", "tissue", "3", "1 MB", "CC BY 4.0", record=7, files=tuple(FILES), unpacked=len(BODY) + 495)}

def zenodo(server, files=FILES, said=None):
    def act(h):
        if h.path == "/api/records/7": return answer(h, 200, json.dumps(said or record(server, files)).encode())
        serve(files[h.path.split("/")[-2]])(h)
    server.acts[:] = [act]; server.asked.clear()

def bring(server, to, sets=SET): return download("tiny", to, sets, base=server.url, tries=2, wait=0)

def test_a_set_of_a_record(server, tmp_path, capsys):
    zenodo(server)
    assert [p.name for p in bring(server, tmp_path)] == [*FILES, "x.h5", "y.h5"]
    assert all((tmp_path/"tiny"/n).read_bytes() == b for n, b in {**FILES, "x.h5": BODY, "y.h5": b"label"*99}.items())
    said = capsys.readouterr().out
    assert said.startswith("Tiny set\nlicence: CC BY 4.0; the record says cc-by-4.0\nplease cite: Kather; Halama; Marx et al. (2018). Tiles. https://doi.org/10.5281/zenodo.7\n")
    zenodo(server); bring(server, tmp_path)
    assert [o.path for o in server.asked] == ["/api/records/7"] and capsys.readouterr().out.count("is there, as published") == 5

def test_archives_that_were_removed_do_not_come_again(server, tmp_path, capsys, monkeypatch):
    zenodo(server); bring(server, tmp_path)
    for n in ("x.h5.gz", "y.h5.gz"): (tmp_path/"tiny"/n).unlink()
    monkeypatch.setattr(dl.shutil, "disk_usage", lambda p: SimpleNamespace(free=0))
    zenodo(server); capsys.readouterr()
    assert [p.name for p in bring(server, tmp_path)] == ["meta.csv", "x.h5", "y.h5"] and len(server.asked) == 1
    said = capsys.readouterr().out
    assert "x.h5 is there and x.h5.gz is not: left as it is" in said and "y.h5 is there and y.h5.gz is not" in said
    monkeypatch.undo(); monkeypatch.setenv("no_proxy", "*")
    (tmp_path/"tiny"/"x.h5").unlink() # both are gone: both come
    zenodo(server); bring(server, tmp_path); assert len(server.asked) == 2 and (tmp_path/"tiny"/"x.h5").read_bytes() == BODY

def test_links_that_lead_nowhere_are_kept(server, tmp_path):
    for name in ("tiles.zip", "tiles.zip.part"):
        folder = tmp_path/name; folder.mkdir(); (folder/name).symlink_to(tmp_path/"elsewhere")
        with pytest.raises(FileExistsError, match=f"{name} is (a link to .*elsewhere, which does not exist|there, and not from)"): get(server, folder, [serve()])
        assert (folder/name).is_symlink() and not (tmp_path/"elsewhere").exists() and not server.asked
    (tmp_path/"x.h5.gz").write_bytes(FILES["x.h5.gz"]); (tmp_path/"x.h5").symlink_to(tmp_path/"elsewhere")
    with pytest.raises(FileExistsError, match="x.h5 is a link"): unpack(tmp_path/"x.h5.gz", len(BODY))

@pytest.mark.parametrize("about, cited", [
    (None, "authors not named (no year). Tiny set. https://zenodo.org/records/7\n"), (dict(creators=None, publication_date=None, license=None, title=None), "authors not named (no year). Tiny set."), ([1], "authors not named"),
    (dict(creators=[None, dict(name=None), dict(name="Kather")], publication_date=2018, license="cc"), "Kather (2018). Tiny set.")])
def test_records_that_say_little(server, tmp_path, capsys, about, cited):
    zenodo(server, said=record(server, FILES, metadata=about))
    assert len(bring(server, tmp_path)) == 5 and f"please cite: {cited}" in capsys.readouterr().out

def test_only_what_is_missing_comes(server, tmp_path):
    (tmp_path/"tiny").mkdir(); (tmp_path/"tiny"/"meta.csv").write_bytes(FILES["meta.csv"])
    zenodo(server); bring(server, tmp_path)
    assert [o.path.split("/")[-2] for o in server.asked[1:]] == ["x.h5.gz", "y.h5.gz"]
    (tmp_path/"tiny"/"y.h5").write_bytes(b"other")
    with pytest.raises(FileExistsError, match="y.h5 is there, but is not what y.h5.gz holds"): bring(server, tmp_path)
    assert (tmp_path/"tiny"/"y.h5").read_bytes() == b"other"

def test_what_is_wrong_is_seen_before_anything_comes(server, tmp_path, monkeypatch):
    (tmp_path/"tiny").mkdir(); (tmp_path/"tiny"/"meta.csv").write_bytes(b"mine")
    zenodo(server)
    with pytest.raises(FileExistsError, match="meta.csv"): bring(server, tmp_path)
    monkeypatch.setattr(dl.shutil, "disk_usage", lambda p: SimpleNamespace(free=sum(map(len, FILES.values())) + 1000))
    with pytest.raises(OSError, match="Make room"): bring(server, tmp_path/"b")
    assert [o.path for o in server.asked] == ["/api/records/7"]*2

@pytest.mark.parametrize("change, message", [
    (dict(files=[]), "lists no files"), (dict(files=None), "lists no files"), (dict(files=[dict(key="x.h5.gz")]), "no y.h5.gz any more; it has x.h5.gz"),
    ("size", "gives no size or no hash of x.h5.gz"), ("checksum", "no size or no hash"), ("links", "gives no address of x.h5.gz"), (dict(files=[1]), "lists no files"), (dict(files={"x.h5.gz": {}}), "lists no files"),
    (("links", None), "gives no address of x.h5.gz"), (("links", [1]), "gives no address"), (("links", dict(self=5)), "not an encrypted address"), (("size", -5), "gives no size or no hash"), (("checksum", 7), "no size or no hash")])
def test_faulty_records(server, tmp_path, change, message):
    said = record(server, FILES)
    if isinstance(change, dict): said |= change
    elif isinstance(change, tuple): said["files"][0][change[0]] = change[1]
    else: del said["files"][0][change]
    zenodo(server, said=said)
    with pytest.raises(ValueError, match=message): bring(server, tmp_path)

@pytest.mark.parametrize("body", [b"<html>log in</html>", b"\xff\xfe", b"[]", b"null", b""])
def test_an_answer_that_is_no_record(server, tmp_path, body):
    server.acts[:] = [lambda h: answer(h, 200, body)]
    with pytest.raises(ValueError, match=f"{server.url}/api/records/7: .*(not Zenodo's|no files)"): bring(server, tmp_path)

def test_one_at_a_time(server, tmp_path):
    from sdmae.files import only_one
    zenodo(server); (tmp_path/"tiny").mkdir()
    code = f"import time; from sdmae.files import only_one\nwith only_one({str(tmp_path/'tiny'/'.lock')!r}, 'x'): print('has it', flush=True); time.sleep(30)"
    p = subprocess.Popen([sys.executable, "-c", code], cwd=Path(dl.__file__).parents[2], stdout=subprocess.PIPE)
    p.stdout.readline()
    try:
        with pytest.raises(RuntimeError, match=f"tiny is being written by process {p.pid}"): bring(server, tmp_path)
    finally: p.kill(); p.wait(); p.stdout.close()

@pytest.mark.parametrize("data, message", [(gzip.compress(BODY)[:-9], "x.h5.gz: damaged"), (b"no gz", "x.h5.gz: damaged"), (NOISY[:2000] + bytes(50) + NOISY[2050:], "x.h5.gz: damaged"), (gzip.compress(bytes(len(BODY) + 1)), "holds more than 1,024,000 bytes")])
def test_archives_that_cannot_be_unpacked(tmp_path, data, message):
    (tmp_path/"x.h5.gz").write_bytes(data)
    with pytest.raises(ValueError, match=message): unpack(tmp_path/"x.h5.gz", len(BODY))
    assert names(tmp_path) == ["x.h5.gz"]


# The command

def test_the_command(server, tmp_path, monkeypatch, capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(n in said and d.licence in said for n, d in SETS.items())
    assert main(["NCT"]) == 1 and "no set 'NCT'; did you mean nct?" in capsys.readouterr().err
    for n, d in SETS.items():
        if d.how: assert main([n, "--to", str(tmp_path)]) == 1 and d.how in capsys.readouterr().err
    zenodo(server)
    monkeypatch.setattr(dl, "download", lambda name, to: download(name, to, SET, base=server.url))
    assert main(["tiny", "--to", str(tmp_path)]) == 0 and (tmp_path/"tiny"/"x.h5").is_file()
    def stop(name, to): raise KeyboardInterrupt
    monkeypatch.setattr(dl, "download", stop)
    assert main(["tiny"]) == 130 and "goes on from here" in capsys.readouterr().err

def test_the_sets_are_complete():
    for n, d in SETS.items():
        assert (d.how != "") + bool(d.record and d.files) + bool(d.remotes) == 1 and all((d.title, d.what, d.images, d.size, d.licence)), n
        assert all(r.url.startswith("https://") and len(r.digest) == 71 for r in d.remotes) and (d.cite or not d.remotes)
    assert ZENODO.startswith("https://") and len(table()) == len(SETS)
    assert sum(n.endswith(".h5.gz") for n in SETS["pcam"].files) == 6 and SETS["pcam"].unpacked > 327_680*96*96*3
