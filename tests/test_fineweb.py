"""data/fineweb.py against a local server that speaks the hub's protocol: the command, its requests, its failures."""
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
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from data import fineweb
from data.fineweb import VARIANTS, shard_names
from data.shards import write_shard
from train_gpt import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
REPO = VARIANTS["10B"].repo
NAMES = shard_names(VARIANTS["10B"], 3)  # all that the test's hub holds
NOWHERE = "http://127.0.0.1:9"           # the discard port: nothing listens


class Handler(BaseHTTPRequestHandler):
    """The three answers of the hub that the client uses: the listing, the redirect of a large file, its content."""
    protocol_version = "HTTP/1.1"

    def answer(self, status, headers=(), body=b"", send=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:send])

    def do_GET(self):
        hub, url = self.server, urlsplit(self.path)
        name = url.path.rsplit("/", 1)[-1]
        hub.requests.append((self.command, url.path))
        if url.path == f"/api/datasets/{REPO}":
            sizes = "blobs" in parse_qs(url.query)
            files = [{"rfilename": name, **({"size": len(body), "lfs": {
                "size": len(body), "pointerSize": 130, "sha256": hashlib.sha256(body).hexdigest()}} if sizes else {})}
                     for name, body in hub.files.items()]
            self.answer(200, {"Content-Type": "application/json"}, json.dumps({"id": REPO, "siblings": files}).encode())
        elif url.path == f"/datasets/{REPO}/resolve/main/{name}" and name in hub.files:
            etag = hashlib.sha256(hub.files[name]).hexdigest()
            storage = hub.url.replace("127.0.0.1", "localhost")  # another host, as the hub's is
            self.answer(302, {"Location": f"{storage}/cdn/{name}", "X-Repo-Commit": "0" * 40,
                              "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": len(hub.files[name])})
        elif url.path == f"/cdn/{name}" and hub.refuse.get(name):
            self.answer(hub.refuse[name].pop(), {"Retry-After": "0"})
        elif url.path == f"/cdn/{name}" and name in hub.files:
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            whole = hub.corrupt.pop(name, hub.files[name])
            body = whole[start:]
            broken = name in hub.break_once
            hub.break_once.discard(name)
            extra = {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(hub.files[name])}"} if start else {}
            self.answer(206 if start else 200, extra, body, send=len(body) // 2 if broken else None)
            self.close_connection = broken
        else:
            known = url.path.startswith(f"/datasets/{REPO}/")
            self.answer(404, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

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
    """The server with NAMES as different small shards, and what clients ask of it recorded from here on."""
    server.files, server.requests, server.break_once, server.refuse, server.corrupt = {}, [], set(), {}, {}
    for number, name in enumerate(NAMES):
        write_shard(tmp_path / "source.bin", np.random.default_rng(number).integers(0, 50257, 5000 + number))
        server.files[name] = (tmp_path / "source.bin").read_bytes()
    return server


def content_requests(hub):
    return sorted(path.rsplit("/", 1)[-1] for method, path in hub.requests if method == "GET" and "/api/" not in path)


def environment(endpoint, home):
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {**inherited, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


def command(endpoint, home, *words):
    return subprocess.run([sys.executable, "-m", "data.fineweb", *map(str, words)], cwd=REPOSITORY, text=True,
                          env=environment(endpoint, home), capture_output=True)


class Client:
    """A process with HF_ENDPOINT set that runs the command's main again and again: torch is imported only once."""
    CODE = """if True:
        import json, sys
        from data import fineweb
        from data.fineweb import main
        fineweb.FIRST_WAIT_S = 0.01
        for line in sys.stdin:
            code = main(json.loads(line))
            print(f"exit {code}", flush=True)"""

    def __init__(self, endpoint, folder):
        self.errors = (folder / "errors").open("w+")
        self.process = subprocess.Popen([sys.executable, "-c", self.CODE], cwd=REPOSITORY, text=True,
                                        env=environment(endpoint, folder), stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors)

    def __call__(self, *words):
        """(exit code, lines of stdout, lines of stderr) of one command."""
        self.errors.seek(0, os.SEEK_END)
        start = self.errors.tell()
        self.process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        self.process.stdin.flush()
        lines = []
        while not (line := self.process.stdout.readline()).startswith("exit"):
            assert line, Path(self.errors.name).read_text()
            lines.append(line)
        self.errors.seek(start)
        return int(line.split()[1]), lines, self.errors.read().splitlines()

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


@pytest.fixture(scope="module")
def fetch(server, tmp_path_factory):
    client = Client(server.url, tmp_path_factory.mktemp("client"))
    yield client
    client.close()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_command_fetches_what_is_missing_and_works_offline_afterwards(hub, tmp_path):
    data, home = tmp_path / "data", tmp_path / "home"
    run = command(hub.url, home, "--shards", 2, "--dir", data)
    assert (run.returncode, run.stderr) == (0, "")  # not a terminal: no progress bar
    assert contents(data) == {name: hub.files[name] for name in NAMES[:3]}  # and no other file
    assert all(sum(name in line for line in run.stdout.splitlines()) == 1 for name in NAMES[:3])
    run = command(NOWHERE, home, "--shards", 2, "--dir", data)
    assert run.returncode == 0 and contents(data) == {name: hub.files[name] for name in NAMES[:3]}
    run = command(NOWHERE, home, "--shards", 3, "--dir", data)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and "HF_ENDPOINT" in run.stderr
    assert contents(data) == {name: hub.files[name] for name in NAMES[:3]}


def test_whole_files_are_not_fetched_again_and_damaged_ones_are(hub, fetch, tmp_path):
    data = tmp_path / "data"
    assert fetch("--shards", 3, "--dir", data)[0] == 0
    assert content_requests(hub) == sorted(NAMES)
    hub.requests.clear()
    assert fetch("--shards", 3, "--dir", data)[0] == 0
    assert content_requests(hub) == []
    (data / NAMES[1]).write_bytes(hub.files[NAMES[1]][:-2])   # cut off
    write_shard(data / NAMES[2], np.arange(10))               # a whole shard, but not of the size that the hub gives
    assert fetch("--shards", 3, "--dir", data)[0] == 0
    assert content_requests(hub) == sorted(NAMES[1:3]) and contents(data) == hub.files


def test_a_connection_that_breaks_gives_a_whole_file(hub, fetch, tmp_path):
    hub.break_once.add(NAMES[1])
    assert fetch("--shards", 1, "--dir", tmp_path / "data")[0] == 0
    assert not hub.break_once and contents(tmp_path / "data") == {name: hub.files[name] for name in NAMES[:2]}


@pytest.mark.parametrize("statuses", [[429], [503], [503, 500, 429]])
def test_a_busy_server_is_asked_again(hub, fetch, tmp_path, statuses):
    hub.refuse[NAMES[1]] = list(statuses)
    assert fetch("--shards", 1, "--dir", tmp_path / "data")[0] == 0
    assert contents(tmp_path / "data") == {name: hub.files[name] for name in NAMES[:2]}


@pytest.mark.parametrize("status", [404, 503])
def test_a_server_that_goes_on_refusing_ends_the_command(hub, fetch, tmp_path, status):
    hub.refuse[NAMES[1]] = [status] * 200
    code, _, errors = fetch("--shards", 1, "--dir", tmp_path / "data")
    assert code == 2 and len(errors) == 1 and NAMES[1] in errors[0] and len(hub.refuse[NAMES[1]]) > 100
    assert contents(tmp_path / "data") == {NAMES[0]: hub.files[NAMES[0]]}


def test_wrong_bytes_of_the_right_form_are_fetched_again(hub, fetch, tmp_path):
    """Header, length and ids are right, but not the content: only the hub's hash can tell."""
    body = bytearray(hub.files[NAMES[1]])
    body[1030:1034] = b"\0\0\0\0"
    hub.corrupt[NAMES[1]] = bytes(body)
    code, lines, _ = fetch("--shards", 1, "--dir", tmp_path / "data")
    assert code == 0 and any("SHA-256" in line for line in lines)
    assert contents(tmp_path / "data") == {name: hub.files[name] for name in NAMES[:2]}


@pytest.mark.parametrize("damage", [lambda body: body[:-2], lambda body: b"<html>" + body[6:],
                                    lambda body: body[:-2] + b"\xff\xff"], ids=["truncated", "magic", "id"])
def test_bad_content_never_gets_the_final_name(hub, fetch, tmp_path, damage):
    hub.files[NAMES[1]] = damage(hub.files[NAMES[1]])
    code, _, errors = fetch("--shards", 2, "--dir", tmp_path / "data")
    assert code == 2 and len(errors) == 1 and NAMES[1] in errors[0]
    assert contents(tmp_path / "data") == {NAMES[0]: hub.files[NAMES[0]]}


def test_a_shard_the_hub_lacks_is_named_before_anything_is_fetched(hub, fetch, tmp_path):
    code, _, errors = fetch("--shards", 4, "--dir", tmp_path / "data")
    assert code == 2 and len(errors) == 1 and "fineweb_train_000004.bin" in errors[0] and "--shards" in errors[0]
    assert content_requests(hub) == [] and contents(tmp_path / "data") == {}


def test_a_repository_the_hub_lacks(fetch, tmp_path):
    code, _, errors = fetch("--variant", "edu", "--dir", tmp_path / "data")
    assert code == 2 and len(errors) == 1 and VARIANTS["edu"].repo in errors[0]


LAUNCH = """if True:
    import sys, launch, train_gpt
    launch.TOKENS_A_SHARD = 20_000
    train_gpt.main = lambda words: 0  # nothing is trained
    sys.exit(launch.main(sys.argv[1:]))"""


@pytest.mark.parametrize("variables, shards", [({}, 5), ({"SHARDS": "2"}, 2)])
def test_launch_fetches_the_shards_that_it_counts(hub, tmp_path, variables, shards):
    """27 sequences of 2,048 tokens from documents of 1,500 tokens, of which 896 are read in the first of the stages."""
    for name in ("launch.py", "train_gpt.py", "run.sh", "data"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.bin"))
        else:
            shutil.copy(source, tmp_path)
    documents = np.tile([50_256, *range(1499)], 100)
    for number, tokens in enumerate(np.split(documents, range(20_000, len(documents), 20_000)), 1):
        write_shard(tmp_path / "source.bin", tokens)
        hub.files[f"fineweb_train_{number:06d}.bin"] = (tmp_path / "source.bin").read_bytes()
    flags = "--track=fineweb --num_steps=12 --extension_steps=3 --batch_size=1 --sequence_length=2048".split()
    run = subprocess.run([sys.executable, "-c", LAUNCH, *flags], cwd=tmp_path, text=True, capture_output=True,
                         env={**environment(hub.url, tmp_path / "home"), "NPROC": "1", **variables})
    assert (run.returncode, run.stderr) == (0, "")
    names = shard_names(VARIANTS["10B"], shards)
    assert contents(tmp_path / "data/fineweb10B") == {name: hub.files[name] for name in names}
    assert content_requests(hub) == sorted(names)  # each once


@pytest.fixture
def listed(monkeypatch):
    """The hub lists all, and asking it for content fails the test unless it is replaced."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(fineweb, "hub_files", lambda repo: (dict.fromkeys(NAMES, fineweb.HubFile(10**9)), ""))
    monkeypatch.setattr(fineweb, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: pytest.fail("asked for content"))
    return huggingface_hub


def test_a_disk_too_small_is_seen_before_fetching(listed, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * 10**9 - 1))
    with pytest.raises(UserError, match="4.0 GB"):
        fineweb.fetch(VARIANTS["10B"], 3, tmp_path)


@pytest.mark.parametrize("error, says", [(OSError(errno.ENOSPC, "No space left on device"), "disk"),
                                         (RuntimeError("of\nsome library"), "of some library")])
def test_an_error_while_fetching_leaves_nothing(listed, monkeypatch, tmp_path, error, says):
    def download(repo, name, repo_type, local_dir):
        (Path(local_dir) / name).write_bytes(b"half")
        raise error
    monkeypatch.setattr(listed, "hf_hub_download", download)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    with pytest.raises(UserError, match=says):
        fineweb.fetch(VARIANTS["10B"], 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_whole_shards_are_enough(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    for name in NAMES[:2]:
        write_shard(tmp_path / name, np.arange(10))
    fineweb.fetch(VARIANTS["10B"], 1, tmp_path)
    with pytest.raises(UserError, match="pip install"):
        fineweb.fetch(VARIANTS["10B"], 2, tmp_path)
    (tmp_path / NAMES[1]).write_bytes((tmp_path / NAMES[1]).read_bytes()[:-1])
    with pytest.raises(UserError, match="pip install"):
        fineweb.fetch(VARIANTS["10B"], 1, tmp_path)


@pytest.mark.parametrize("variant, shards, words", [
    ("10B", 103, ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000103.bin"]),
    ("100B", 1030, ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_001030.bin"]),
    ("edu", 99, ["finewebedu_val_000000.bin", "finewebedu_train_000001.bin", "finewebedu_train_000099.bin"])])
def test_variants(variant, shards, words, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "hub_files", lambda repo: pytest.fail("asked the hub"))
    names = shard_names(VARIANTS[variant], shards)
    assert [names[0], names[1], names[-1]] == words and len(set(names)) == shards + 1
    for number in (0, -1, shards + 1):
        assert fineweb.main(["--variant", variant, "--shards", str(number), "--dir", str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []
