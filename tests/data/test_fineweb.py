"""data/fineweb.py against a local server that answers like the Hugging Face hub."""
import errno
import hashlib
import json
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import constants

import train_gpt
from data import fineweb
from data.fineweb import DEFAULT_SHARDS, VARIANTS, shard_names
from data.shards import write_shard

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
        self.wfile.write(body[:send])

    def do_GET(self):
        served = self.server
        path = self.path.partition("?")[0]
        name = path.rsplit("/", 1)[-1]
        known = path.startswith(f"/datasets/{VARIANT.repo}/")
        served.tokens.append(self.headers.get("Authorization"))
        answers = served.instead.get(path)
        if answers:
            answers.pop(0)(self)
        elif path == f"/api/datasets/{VARIANT.repo}":
            self.answer(200, {"Content-Type": "application/json"}, self.listing())
        elif path == f"/datasets/{VARIANT.repo}/resolve/main/{name}" and name in served.files:
            storage = served.url.replace("127.0.0.1", "localhost")  # another host, as the hub has
            # By the xet protocol the file would come from a storage that cannot be reached.
            self.answer(302, {"Location": f"{storage}/storage/{name}", "X-Xet-Hash": "a" * 64,
                              "X-Xet-Refresh-Route": f"{NOWHERE}/xet"})
        elif path == f"/storage/{name}" and name in served.files:
            served.sent.append(name)
            self.content(served.files[name])
        else:
            self.answer(404, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

    def listing(self):
        siblings = []
        for name, body in self.server.files.items():
            digest = hashlib.sha256(body).hexdigest()
            lfs = {"size": len(body), "pointerSize": 130, "sha256": digest}
            siblings.append({"rfilename": name, "size": len(body), "lfs": lfs})
        return json.dumps({"id": VARIANT.repo, "siblings": siblings}).encode()

    def content(self, body, send=None):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            last = len(body) - 1
            headers = {"Content-Range": f"bytes {start}-{last}/{len(body)}"}
            self.answer(206, headers, body[start:], send)
        else:
            self.answer(200, {}, body, send)

    def log_message(self, *args):
        pass


LISTING = f"/api/datasets/{VARIANT.repo}"
REDIRECT = f"/datasets/{VARIANT.repo}/resolve/main/{FIRST}"
STORAGE = f"/storage/{FIRST}"


def status(number, headers=None):
    """An answer without content."""
    return lambda handler: handler.answer(number, {"Retry-After": 0, **(headers or {})})


def web_page(handler):
    """The login page of a network."""
    handler.answer(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>log in</html>")


def instead(body):
    """Another content of a file."""
    return lambda handler: handler.content(body)


def broken(body, send):
    """A connection that breaks in the middle."""
    def answer(handler):
        handler.close_connection = True
        handler.content(body, send)
    return answer


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.handle_error = lambda request, address: None  # a client that hangs up
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Small shards by name, as bytes."""
    folder = tmp_path_factory.mktemp("shards")
    for number, name in enumerate(NAMES):
        tokens = np.random.default_rng(number).integers(0, 50257, 50_000 + number)
        write_shard(folder / name, tokens)
    return contents(folder)


@pytest.fixture
def served(server, shards):
    """The server with small shards in .files. Content that it sent is in .sent, the tokens that it
    got in .tokens. .instead has other answers by path, each for one request."""
    server.files = dict(shards)
    server.sent = []
    server.tokens = []
    server.instead = {}
    return server


@pytest.fixture
def fetch(tmp_path, monkeypatch, capsys):
    """A function that runs the command: fetch(endpoint, *words, **environment)."""
    for name in [*os.environ]:
        if name.lower().endswith("_proxy") or name.startswith("HF_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits, too
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    capsys.readouterr()

    def run(endpoint, *words, **environment):
        for name, value in {"HF_ENDPOINT": endpoint, **environment}.items():
            monkeypatch.setenv(name, value)
        code = fineweb.main(["--dir", str(tmp_path / "data"), *map(str, words)])
        out, errors = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=errors)
    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_missing_and_damaged_shards_are_downloaded(served, fetch, tmp_path):
    data = tmp_path / "data"
    done = fetch(served.url, "--shards", 2)
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar without a terminal
    assert contents(data) == {name: served.files[name] for name in (VAL, FIRST, SECOND)}
    assert sorted(served.sent) == sorted([VAL, FIRST, SECOND])
    served.sent.clear()
    (data / FIRST).write_bytes(served.files[FIRST][:-2])
    assert fetch(served.url, "--shards", 3).returncode == 0
    assert sorted(served.sent) == sorted([FIRST, THIRD])
    assert contents(data) == served.files
    assert fetch(NOWHERE, "--shards", 3).returncode == 0  # with all shards there it needs no hub


def test_without_a_network_a_missing_shard_is_one_line(served, fetch, tmp_path):
    assert fetch(served.url, "--shards", 1).returncode == 0
    done = fetch(NOWHERE, "--shards", 2)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "HF_ENDPOINT" in done.stderr
    assert contents(tmp_path / "data") == {name: served.files[name] for name in (VAL, FIRST)}


@pytest.mark.parametrize("path", [LISTING, REDIRECT, STORAGE])
@pytest.mark.parametrize("statuses", [[429], [503, 500], [408, 502, 504]], ids=str)
def test_a_busy_hub_is_asked_again(served, fetch, tmp_path, path, statuses):
    served.instead[path] = [status(number) for number in statuses]
    assert fetch(served.url, "--shards", 1).returncode == 0
    assert not served.instead[path]
    assert contents(tmp_path / "data") == {name: served.files[name] for name in (VAL, FIRST)}


@pytest.mark.parametrize("headers, expected", [
    ({"Retry-After": "7"}, 7), ({"Retry-After": "86400"}, fineweb.LONGEST_WAIT_S),
    ({"Retry-After": "soon"}, fineweb.FIRST_WAIT_S),
    ({"RateLimit": '"api";r=0;t=33', "Retry-After": ""}, 33)])
def test_the_hub_says_how_long_to_wait(served, fetch, monkeypatch, headers, expected):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    served.instead[LISTING] = [status(429, headers)]
    assert fetch(served.url, "--shards", 1).returncode == 0
    assert waits == [expected]


def test_no_answer_is_asked_again(served, fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    released = threading.Event()
    served.instead[STORAGE] = [lambda handler: released.wait()]
    done = fetch(served.url, "--shards", 1)
    released.set()
    assert done.returncode == 0
    # That it is downloaded, and that this failed.
    assert sum(FIRST in line for line in done.stdout.splitlines()) >= 2
    assert contents(tmp_path / "data") == {name: served.files[name] for name in (VAL, FIRST)}


def test_a_broken_connection_is_continued(served, fetch, tmp_path, monkeypatch):
    """More often than all attempts together, because some bytes come each time."""
    monkeypatch.setattr(fineweb, "CHUNK", 1000)
    body = served.files[FIRST]
    served.instead[STORAGE] = [broken(body, 1500)] * 50
    assert fetch(served.url, "--shards", 1).returncode == 0
    assert not served.instead[STORAGE]
    assert contents(tmp_path / "data") == {name: served.files[name] for name in (VAL, FIRST)}


def test_a_busy_server_costs_no_bytes(served, fetch, monkeypatch):
    monkeypatch.setattr(fineweb, "CHUNK", 1000)
    body = served.files[FIRST]
    ranges = []

    def rest(handler):
        ranges.append(handler.headers.get("Range"))
        handler.content(body)
    served.instead[STORAGE] = [broken(body, 5500), status(503), rest]
    assert fetch(served.url, "--shards", 1).returncode == 0
    assert ranges == ["bytes=5000-"]


def test_a_server_that_cannot_continue_sends_all(served, fetch, tmp_path):
    body = served.files[FIRST]
    served.instead[STORAGE] = [broken(body, len(body) - 1),
                               lambda handler: handler.answer(200, {}, body)]
    assert fetch(served.url, "--shards", 1).returncode == 0
    assert served.sent == [VAL]  # these two answers were enough
    assert contents(tmp_path / "data") == {name: served.files[name] for name in (VAL, FIRST)}


@pytest.mark.parametrize("answer, named", [
    (status(401), "401"), (status(404), "404"), (status(503), "503"),
    (web_page, "localhost"), (broken(b"x" * 1000, 10), ""), (instead(b"x" * 1000), "1,000"),
    (lambda handler: setattr(handler, "close_connection", True), "")],
    ids=["401", "404", "503", "web page", "broken", "short", "closed"])
def test_a_hub_that_keeps_refusing_is_one_line(served, fetch, tmp_path, answer, named):
    served.instead[STORAGE] = [answer] * 100
    done = fetch(served.url, "--shards", 1)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert FIRST in done.stderr and named in done.stderr
    assert contents(tmp_path / "data") == {VAL: served.files[VAL]}


@pytest.mark.parametrize("answer", [
    web_page, lambda handler: handler.answer(200, {}, b'{"siblings": [{'),
    lambda handler: handler.answer(200, {}, b"[1]"),
    lambda handler: handler.answer(302, {"Location": handler.path})],
    ids=["web page", "half", "other", "circle"])
def test_what_is_no_hub_is_named(served, fetch, tmp_path, answer):
    served.instead[LISTING] = [answer] * 1000
    done = fetch(served.url, "--shards", 1)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert VARIANT.repo in done.stderr and "HF_ENDPOINT" in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_repository_that_moved_is_followed(served, fetch):
    for path in (LISTING, REDIRECT):
        served.instead["/moved" + path] = [
            lambda handler: (setattr(handler, "path", handler.path.removeprefix("/moved")),
                             handler.do_GET())]
        served.instead[path] = [status(307, {"Location": f"/moved{path}?blobs=true"})]
    assert fetch(served.url, "--shards", 1).returncode == 0
    assert not any(served.instead.values())


# --- Settings ---


@pytest.mark.parametrize("number", [401, 403])
@pytest.mark.parametrize("path", [LISTING, REDIRECT])
def test_a_token_that_is_refused_is_left_out(served, fetch, tmp_path, path, number):
    served.instead[path] = [status(number)]
    assert fetch(served.url, "--shards", 1, HF_TOKEN="hf_expired").returncode == 0
    refused = {LISTING: 1, REDIRECT: 3}[path]  # the third request with a token is for FIRST
    assert served.tokens.count("Bearer hf_expired") == refused
    assert served.tokens[-1] is None
    assert contents(tmp_path / "data") == {name: served.files[name] for name in (VAL, FIRST)}


def test_a_token_is_sent_to_the_hub_alone(served, fetch, tmp_path):
    """And no password that ~/.netrc has for the hub takes its place."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    netrc = str(tmp_path / "netrc")
    assert fetch(served.url, "--shards", 1, HF_TOKEN="hf_right", NETRC=netrc).returncode == 0
    token = "Bearer hf_right"
    assert served.tokens == [token, token, None, token, None]


@pytest.mark.parametrize("token", ["", "hf_caf\xe9"])
def test_a_token_that_is_none_is_left_out(served, fetch, token):
    assert fetch(served.url, "--shards", 1, HF_TOKEN=token).returncode == 0
    assert set(served.tokens) == {None}


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "all_proxy"])
@pytest.mark.parametrize("value", [NOWHERE, "socks5h://127.0.0.1:9", "htp://127.0.0.1:9", "http://",
                                   "http://me:secret@127.0.0.1:9"])
def test_a_proxy_that_fails_is_named(served, fetch, variable, value):
    done = fetch("http://hub.invalid", "--shards", 1, **{variable: value})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert variable in done.stderr
    assert "huggingface" not in done.stderr and "secret" not in done.stderr + done.stdout


def test_a_proxy_that_wants_a_password_is_named(served, fetch):
    served.instead["http://hub.invalid" + LISTING] = [status(407)]
    done = fetch("http://hub.invalid", "--shards", 1, http_proxy=served.url)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "http_proxy" in done.stderr


def test_a_proxy_that_does_not_apply_is_not_named(fetch):
    done = fetch(NOWHERE, "--shards", 1, HTTP_PROXY="http://127.0.0.1:7", NO_PROXY="127.0.0.1")
    assert "HTTP_PROXY" not in done.stderr and "HF_ENDPOINT" in done.stderr


@pytest.mark.parametrize("endpoint", ["hf-mirror.com", "ftp://hf.co", "https://", "https://a..b"])
def test_an_address_that_is_none_is_named_at_once(fetch, monkeypatch, endpoint):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("tries again"))
    done = fetch(endpoint, "--shards", 1)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "HF_ENDPOINT" in done.stderr


def test_an_empty_address_is_the_public_hub(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert fineweb.Hub(VARIANT.repo).url == fineweb.PUBLIC_HUB


def test_certificates_that_cannot_be_read_are_named_at_once(fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("tries again"))
    bundle = str(tmp_path / "nothing.pem")
    done = fetch("https://127.0.0.1:9", "--shards", 1, SSL_CERT_FILE=bundle)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "SSL_CERT_FILE" in done.stderr


def test_offline_no_request_is_made(served, fetch, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the variable is read at import
    done = fetch(served.url, "--shards", 1)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "HF_HUB_OFFLINE" in done.stderr
    assert served.tokens == []


# --- Content ---


def test_wrong_bytes_in_the_right_form_are_downloaded_again(served, fetch, tmp_path):
    """Header, length and token ids are right, so only the hash can tell."""
    body = bytearray(served.files[FIRST])
    body[1030:1034] = b"\0\0\0\0"
    served.instead[STORAGE] = [instead(bytes(body))]
    assert fetch(served.url, "--shards", 1).returncode == 0
    assert served.sent.count(FIRST) == 1
    assert contents(tmp_path / "data") == {name: served.files[name] for name in (VAL, FIRST)}


@pytest.mark.parametrize("damage", [lambda body: body[:-2], lambda body: b"<html>" + body[6:],
                                    lambda body: body[:-2] + b"\xff\xff"],
                         ids=["short", "magic", "id"])
def test_a_bad_file_never_gets_the_final_name(served, fetch, tmp_path, damage):
    served.files[FIRST] = damage(served.files[FIRST])
    done = fetch(served.url, "--shards", 2)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and FIRST in done.stderr
    assert contents(tmp_path / "data") == {VAL: served.files[VAL]}


def test_a_shard_that_the_hub_lacks_is_named_before_any_download(served, fetch, tmp_path):
    done = fetch(served.url, "--shards", 4)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "fineweb_train_000004.bin" in done.stderr
    assert served.sent == []
    assert not (tmp_path / "data").exists()


def test_a_repository_that_the_hub_lacks_is_named(served, fetch):
    done = fetch(served.url, "--variant", "edu")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and VARIANTS["edu"].repo in done.stderr


def test_a_disk_that_is_too_small_is_noticed_before_any_download(served, fetch, monkeypatch):
    needed = len(served.files[VAL]) + len(served.files[FIRST])
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    done = fetch(served.url, "--shards", 1)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "--dir" in done.stderr
    assert served.sent == []
    free.free = needed
    assert fetch(served.url, "--shards", 1).returncode == 0


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   OSError(errno.EFBIG, "File too large"),
                                   PermissionError(errno.EACCES, "Permission denied")], ids=str)
def test_a_disk_that_fails_is_named_at_once(served, fetch, monkeypatch, tmp_path, error):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("tries again"))

    def fail(*args):
        raise error
    monkeypatch.setattr(fineweb, "sha_fileobj", fail)
    done = fetch(served.url, "--shards", 1)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and str(tmp_path / "data") in done.stderr
    assert contents(tmp_path / "data") == {}


def test_a_folder_that_was_cleared_behind_a_link_is_made_again(served, fetch, tmp_path):
    (tmp_path / "data").symlink_to(tmp_path / "large disk" / "data")
    assert fetch(served.url, "--shards", 1).returncode == 0
    assert contents(tmp_path / "large disk" / "data").keys() == {VAL, FIRST}


def test_what_a_killed_download_left_is_named_and_stays(served, fetch, tmp_path):
    leftover = tmp_path / "data" / ".unfinished-abc"
    leftover.mkdir(parents=True)
    (leftover / FIRST).write_text("half")
    assert str(leftover) in fetch(served.url, "--shards", 1).stdout
    assert (leftover / FIRST).read_text() == "half"


def test_without_the_library_complete_shards_are_enough(fetch, monkeypatch, tmp_path):
    monkeypatch.setattr(fineweb, "huggingface_hub", None)
    monkeypatch.setattr(fineweb, "import_error", "No module named 'httpx2'", raising=False)
    for name in NAMES[:2]:
        write_shard(tmp_path / "data" / name, np.arange(10))
    assert fetch(NOWHERE, "--shards", 1).returncode == 0
    done = fetch(NOWHERE, "--shards", 2)
    assert done.returncode == 2 and "huggingface_hub" in done.stderr


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_number_of_shards_is_checked(variant, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fineweb, "Hub", lambda repo: pytest.fail("asks the hub"))
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
