"""data/fineweb.py against a local server that answers like the Hugging Face hub."""
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train_gpt
from data import UserError, fineweb
from data.fineweb import DEFAULT_SHARDS, VARIANTS, shard_names
from data.shards import write_shard

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
VARIANT = VARIANTS["10B"]
NAMES = shard_names(VARIANT, 3)   # the files of the test's hub
VAL, FIRST, SECOND, THIRD = NAMES
NOWHERE = "http://127.0.0.1:9"    # the discard port, where nothing listens


class Handler(BaseHTTPRequestHandler):
    """The answers that the client needs: the listing, the redirect of a large file, its content."""
    protocol_version = "HTTP/1.1"

    def answer(self, status, headers=None, body=b"", send=None):
        """send: how many bytes of the body to send, if not all."""
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:send])

    def do_GET(self):
        hub = self.server
        path = self.path.partition("?")[0]
        name = path.rsplit("/", 1)[-1]
        if path in hub.refusals:
            status = hub.refusals[path].pop(0)
            if not hub.refusals[path]:
                del hub.refusals[path]
            self.answer(status, {"Retry-After": 0})
        elif path == f"/api/datasets/{VARIANT.repo}":
            self.answer(200, {"Content-Type": "application/json"}, self.listing())
        elif path == f"/datasets/{VARIANT.repo}/resolve/main/{name}" and name in hub.files:
            storage = hub.url.replace("127.0.0.1", "localhost")  # another host, as the hub has
            digest = hashlib.sha256(hub.files[name]).hexdigest()
            self.answer(302, {"Location": f"{storage}/storage/{name}", "X-Repo-Commit": "0" * 40,
                              "X-Linked-Etag": f'"{digest}"',
                              "X-Linked-Size": len(hub.files[name])})
        elif path == f"/storage/{name}" and name in hub.files:
            self.content(name)
        else:
            known = path.startswith(f"/datasets/{VARIANT.repo}/")
            self.answer(404, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

    def listing(self):
        siblings = []
        for name, body in self.server.files.items():
            digest = hashlib.sha256(body).hexdigest()
            lfs = {"size": len(body), "pointerSize": 130, "sha256": digest}
            siblings.append({"rfilename": name, "size": len(body), "lfs": lfs})
        return json.dumps({"id": VARIANT.repo, "siblings": siblings}).encode()

    def content(self, name):
        hub = self.server
        if self.command == "GET":
            hub.sent.append(name)
        body = hub.corrupt_once.pop(name, hub.files[name])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        rest = body[start:]
        send = None
        if name in hub.break_once:
            hub.break_once.remove(name)
            send = len(rest) // 2
            self.close_connection = True
        if start:
            last = len(body) - 1
            headers = {"Content-Range": f"bytes {start}-{last}/{len(body)}"}
            self.answer(206, headers, rest, send)
        else:
            self.answer(200, {}, rest, send)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def hub(server, tmp_path):
    """The server with small shards; files are kept in .files, the names it sent in .sent."""
    server.files = {}
    server.sent = []
    server.break_once = set()    # names whose connection breaks in the middle, once
    server.corrupt_once = {}     # name: bytes that are sent instead, once
    server.refusals = {}         # path: statuses with which it is refused, one after the other
    for number, name in enumerate(NAMES):
        tokens = np.random.default_rng(number).integers(0, 50257, 5000 + number)
        write_shard(tmp_path / "source.bin", tokens)
        server.files[name] = (tmp_path / "source.bin").read_bytes()
    (tmp_path / "source.bin").unlink()
    return server


PROGRAM = """
import sys
from data import fineweb
fineweb.FIRST_WAIT_S = 0.01
sys.exit(fineweb.main(sys.argv[1:]))
"""


@pytest.fixture
def fetch(tmp_path):
    """A function that runs the command in a new process, where it reads HF_ENDPOINT."""
    def run(endpoint, *words):
        env = {name: value for name, value in os.environ.items()
               if not name.lower().endswith("_proxy")}
        env.update(HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_XET="1")
        command = [sys.executable, "-c", PROGRAM, "--dir", tmp_path / "data", *words]
        return subprocess.run([str(word) for word in command], cwd=ROOT, env=env, timeout=300,
                              capture_output=True, text=True)
    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_missing_and_damaged_shards_are_downloaded(hub, fetch, tmp_path):
    data = tmp_path / "data"
    done = fetch(hub.url, "--shards", 2)
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar without a terminal
    assert contents(data) == {name: hub.files[name] for name in (VAL, FIRST, SECOND)}
    assert sorted(hub.sent) == sorted([VAL, FIRST, SECOND])
    hub.sent.clear()
    (data / FIRST).write_bytes(hub.files[FIRST][:-2])
    assert fetch(hub.url, "--shards", 3).returncode == 0
    assert sorted(hub.sent) == sorted([FIRST, THIRD])
    assert contents(data) == hub.files
    assert fetch(NOWHERE, "--shards", 3).returncode == 0  # with all shards there it needs no hub


def test_without_a_network_a_missing_shard_is_one_line(hub, fetch, tmp_path):
    assert fetch(hub.url, "--shards", 1).returncode == 0
    done = fetch(NOWHERE, "--shards", 2)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "HF_ENDPOINT" in done.stderr
    assert contents(tmp_path / "data") == {name: hub.files[name] for name in (VAL, FIRST)}


@pytest.mark.parametrize("refused", ["storage", "listing"])
@pytest.mark.parametrize("statuses", [[429], [503, 500]])
def test_a_busy_hub_is_asked_again(hub, fetch, tmp_path, refused, statuses):
    path = f"/storage/{FIRST}" if refused == "storage" else f"/api/datasets/{VARIANT.repo}"
    hub.refusals[path] = list(statuses)
    assert fetch(hub.url, "--shards", 1).returncode == 0
    assert not hub.refusals
    assert contents(tmp_path / "data") == {name: hub.files[name] for name in (VAL, FIRST)}


def test_a_broken_connection_gives_a_complete_file(hub, fetch, tmp_path):
    hub.break_once.add(FIRST)
    assert fetch(hub.url, "--shards", 1).returncode == 0
    assert not hub.break_once
    assert contents(tmp_path / "data") == {name: hub.files[name] for name in (VAL, FIRST)}


@pytest.mark.parametrize("status", [401, 404, 503])
def test_a_hub_that_keeps_refusing_is_one_line(hub, fetch, tmp_path, status):
    hub.refusals[f"/storage/{FIRST}"] = [status] * 200
    done = fetch(hub.url, "--shards", 1)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert FIRST in done.stderr and str(status) in done.stderr
    assert contents(tmp_path / "data") == {VAL: hub.files[VAL]}


def test_wrong_bytes_in_the_right_form_are_downloaded_again(hub, fetch, tmp_path):
    """Header, length and token ids are right, so only the hash can tell."""
    body = bytearray(hub.files[FIRST])
    body[1030:1034] = b"\0\0\0\0"
    hub.corrupt_once[FIRST] = bytes(body)
    assert fetch(hub.url, "--shards", 1).returncode == 0
    assert hub.sent.count(FIRST) == 2
    assert contents(tmp_path / "data") == {name: hub.files[name] for name in (VAL, FIRST)}


@pytest.mark.parametrize("damage", [lambda body: body[:-2], lambda body: b"<html>" + body[6:],
                                    lambda body: body[:-2] + b"\xff\xff"],
                         ids=["short", "magic", "id"])
def test_a_bad_file_never_gets_the_final_name(hub, fetch, tmp_path, damage):
    hub.files[FIRST] = damage(hub.files[FIRST])
    done = fetch(hub.url, "--shards", 2)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and FIRST in done.stderr
    assert contents(tmp_path / "data") == {VAL: hub.files[VAL]}


def test_a_shard_that_the_hub_lacks_is_named_before_any_download(hub, fetch, tmp_path):
    done = fetch(hub.url, "--shards", 4)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "fineweb_train_000004.bin" in done.stderr
    assert hub.sent == []
    assert not (tmp_path / "data").exists()


def test_a_repository_that_the_hub_lacks_is_named(hub, fetch):
    done = fetch(hub.url, "--variant", "edu")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and VARIANTS["edu"].repo in done.stderr


@pytest.fixture
def listed(monkeypatch):
    """A hub that lists files of 1 GB, in this process. Tests replace the download."""
    listing = {name: fineweb.HubFile(10**9, None) for name in NAMES}
    monkeypatch.setattr(fineweb, "hub_files", lambda repo: listing)
    monkeypatch.setattr(fineweb, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    return pytest.importorskip("huggingface_hub")


def test_a_disk_that_is_too_small_is_noticed_before_any_download(listed, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * 10**9 - 1))
    monkeypatch.setattr(fineweb, "download", lambda *args: pytest.fail("downloads"))
    with pytest.raises(UserError, match="4.0 GB"):
        fineweb.fetch(VARIANT, 3, tmp_path)


@pytest.mark.parametrize("error, attempts", [
    (OSError(errno.ENOSPC, "No space left on device"), 1),
    (PermissionError(errno.EACCES, "Permission denied"), 1),
    (RuntimeError("of\nsome library"), fineweb.ATTEMPTS)], ids=["disk full", "denied", "other"])
def test_a_download_that_fails_leaves_nothing(listed, monkeypatch, tmp_path, error, attempts):
    seen = []

    def fail(repo, name, repo_type, local_dir):
        seen.append(name)
        (Path(local_dir) / name).write_bytes(b"half a file")
        raise error
    monkeypatch.setattr(listed, "hf_hub_download", fail)
    with pytest.raises(UserError):
        fineweb.fetch(VARIANT, 1, tmp_path)
    assert len(seen) == attempts
    assert list(tmp_path.iterdir()) == []


def test_without_huggingface_hub_complete_shards_are_enough(monkeypatch, tmp_path):
    monkeypatch.setattr(fineweb, "find_spec", lambda name: None)
    for name in NAMES[:2]:
        write_shard(tmp_path / name, np.arange(10))
    fineweb.fetch(VARIANT, 1, tmp_path)
    with pytest.raises(UserError, match="huggingface_hub"):
        fineweb.fetch(VARIANT, 2, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_number_of_shards_is_checked(variant, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fineweb, "hub_files", lambda repo: pytest.fail("asks the hub"))
    for number in (0, -1, VARIANTS[variant].num_train_shards + 1):
        words = ["--variant", variant, "--shards", str(number), "--dir", str(tmp_path)]
        assert fineweb.main(words) == 2
        assert str(number) in capsys.readouterr().err


def test_the_files_are_those_of_the_track():
    track = train_gpt.TRACKS["fineweb"]
    val, *train = shard_names(VARIANT, DEFAULT_SHARDS)
    assert Path("data", VARIANT.folder, val).match(track.val_files)
    assert all(Path("data", VARIANT.folder, name).match(track.train_files) for name in train)
    assert shard_names(VARIANT, VARIANT.num_train_shards)[-1] == "fineweb_train_000103.bin"
