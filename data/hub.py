"""Downloads files of a public data set from the Hugging Face hub, or from a mirror of it.

Plain HTTP is enough for that, and it works with every mirror and behind every proxy. HF_ENDPOINT
names a mirror. HF_TOKEN is sent until the hub refuses it. HF_HUB_OFFLINE=1 forbids all requests.
The package requests heeds HTTP_PROXY and its relatives, and REQUESTS_CA_BUNDLE.
"""
import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import requests
from requests import exceptions
from requests.utils import should_bypass_proxies
from tqdm import tqdm
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from data import UserError, say

PUBLIC_HUB = "https://huggingface.co"
TIMEOUT_S = (10, 20)    # until a connection stands; until the next bytes come
ATTEMPTS = 5            # for the listing, and for each file as long as no bytes come
FIRST_WAIT_S = 1.0      # before the second attempt; doubles with each further one
LONGEST_WAIT_S = 60.0
CHUNK = 2**16           # bytes; what has come of one is lost when the connection breaks

# HTTP statuses below 500 that another attempt may change: timeout, too early, too many requests.
BUSY_STATUSES = (408, 425, 429)


class WrongContent(Exception):
    """What has come is not what the hub describes, or does not come from a hub at all."""


# Without an answer, only these errors can pass. Others lie in addresses and settings.
TRANSIENT_ERRORS = (exceptions.ConnectionError, exceptions.Timeout,
                    exceptions.ChunkedEncodingError, WrongContent)


class HubFile(NamedTuple):
    """What the hub says about a file."""
    size: int           # bytes
    sha256: str | None  # hexadecimal; None if the hub does not know it


class Hub:
    """One data set on the hub. All methods raise UserError, and OSError if the disk fails."""

    def __init__(self, repo: str):
        """repo: OWNER/NAME"""
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise UserError(f"HF_HUB_OFFLINE forbids to download from {repo}; unset it, or copy "
                            "the files from another machine")
        self.repo = repo
        self.url = (os.environ.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")
        if not re.match("https?://", self.url):
            raise UserError(f"HF_ENDPOINT is {self.url!r}, expected the address of a mirror, such "
                            "as https://hf-mirror.com")
        self.token = os.environ.get("HF_TOKEN", "").strip()
        if not (self.token.isascii() and self.token.isprintable()):
            say(f"HF_TOKEN has characters that no token has; {repo} is public, so it is left out")
            self.token = ""
        self.session = requests.Session()
        self.session.auth = self.authorize  # instead of what ~/.netrc may say

    def authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the token to a request."""
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request

    def get(self, path: str, start: int = 0) -> requests.Response:
        """Ask for a file from byte `start` on; the caller reads the content.

        Raises what with_retries catches.
        """
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        response = self.session.get(f"{self.url}/{path}", headers=headers, stream=True,
                                    timeout=TIMEOUT_S)
        if response.status_code in (401, 403) and self.token:
            say(f"the hub refuses HF_TOKEN (HTTP {response.status_code}); {self.repo} is public, "
                "so the token is left out")
            self.token = ""
            return self.get(path, start)
        response.raise_for_status()
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise WrongContent(f"a web page came from {self.url}, perhaps the login page of this "
                               "network")
        return response

    def list_files(self) -> dict[str, HubFile]:
        """Return size and hash of every file."""
        return self.with_retries(f"listing the files of {self.repo}", self._list_files)

    def _list_files(self) -> dict[str, HubFile]:
        files = {}
        try:
            for entry in self.get(f"api/datasets/{self.repo}?blobs=true").json()["siblings"]:
                sha256 = (entry.get("lfs") or {}).get("sha256")
                files[entry["rfilename"]] = HubFile(entry.get("size") or 0, sha256)
        except (exceptions.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise WrongContent(f"the answer of {self.url} is not a list of files") from error
        return files

    def download(self, name: str, path: Path, file: HubFile) -> None:
        """Download a file to path. A part that is there already is continued."""
        task = f"downloading {name} from {self.repo}"
        self.with_retries(task, self._download, name, path, file)

    def _download(self, name: str, path: Path, file: HubFile) -> None:
        path.touch()
        complete = False
        while not complete:
            start = path.stat().st_size
            try:
                self._receive(name, path, start, file.size)
                complete = True
            except exceptions.RequestException:
                if path.stat().st_size <= start:
                    raise
                time.sleep(FIRST_WAIT_S)  # some bytes came before the connection broke
        try:
            check(path, file)
        except WrongContent:
            path.unlink()
            raise

    def _receive(self, name: str, path: Path, start: int, size: int) -> None:
        """Append what follows the first `start` bytes of a file of `size` bytes (0: not known)."""
        if 0 < size <= start:
            return
        response = self.get(f"datasets/{self.repo}/resolve/main/{name}", start)
        if response.status_code != 206:  # the server sends the whole file
            start = 0
        with (tqdm(total=size, initial=start, unit="B", unit_scale=True, disable=None) as bar,
              open(path, "ab" if start else "wb") as output):
            for chunk in response.iter_content(CHUNK):
                output.write(chunk)
                bar.update(len(chunk))

    def with_retries(self, task: str, function: Callable, *args):
        """Return what function(*args) returns; call it up to ATTEMPTS times while requests fail.

        task says what it does. Raises UserError when no attempt succeeds.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return function(*args)
            # The errors of requests are OSErrors; some addresses cause another ValueError.
            except (OSError, ValueError, WrongContent) as error:
                if getattr(error, "errno", None):  # the disk
                    raise
                problem = f"{task} failed ({description(error)})"
                if attempt == ATTEMPTS or is_final(error):
                    raise UserError(f"{problem}; {self.advice(error)}") from error
                wait = seconds_until_retry(error, FIRST_WAIT_S * 2**(attempt - 1))
                say(f"{problem}; trying again in {wait:.0f} s")
                time.sleep(wait)

    def advice(self, error: Exception) -> str:
        """Return what the user can do after the last attempt."""
        repeat = "repeat the command (complete shards are kept), or set HF_ENDPOINT to a mirror"
        status = status_of(error)
        if status is not None and not is_final(error):
            return f"the server is busy: wait some minutes, then {repeat}"
        if status is not None and status != 407:  # 407: the proxy wants a password
            return f"{self.url} refuses it; check HF_ENDPOINT and HF_TOKEN"
        if "certificate" in description(error):
            return ("if the network has a proxy with a certificate of its own, set "
                    "REQUESTS_CA_BUNDLE to the file with its certificate; check this machine's "
                    "clock, too")
        settings = [name for name in os.environ if os.environ[name]
                    and name.lower() in ("http_proxy", "https_proxy", "all_proxy")
                    and not should_bypass_proxies(self.url, no_proxy=None)]
        if self.url != PUBLIC_HUB:
            settings.append("HF_ENDPOINT")
        socks = "SOCKS needs the package PySocks; " if "SOCKS" in str(error) else ""
        return f"{socks}check {' and '.join(settings) or 'the network'}, then {repeat}"


def check(path: Path, file: HubFile) -> None:
    """Raises WrongContent unless the file at path has the size and the hash of the hub's."""
    size = path.stat().st_size
    if file.size and size != file.size:
        raise WrongContent(f"{size:,} bytes came, the hub has {file.size:,}")
    digest = hashlib.sha256()
    with open(path, "rb") as content:
        while block := content.read(CHUNK):
            digest.update(block)
    if file.sha256 and digest.hexdigest() != file.sha256:
        raise WrongContent(f"the SHA-256 is {digest.hexdigest()}, on the hub it is {file.sha256}")


def status_of(error: Exception) -> int | None:
    """Return the HTTP status of the answer that led to an exception, if there was an answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_final(error: Exception) -> bool:
    """Whether another attempt would end in the same way."""
    status = status_of(error)
    if status is not None:
        return status < 500 and status not in BUSY_STATUSES
    return not isinstance(error, TRANSIENT_ERRORS) or "CERTIFICATE_VERIFY_FAILED" in str(error)


def seconds_until_retry(error: Exception, usual: float) -> float:
    """Return how long to wait: as usual, or as long as the server asks, up to LONGEST_WAIT_S."""
    response = getattr(error, "response", None)
    if response is None:
        return usual
    try:
        asked = Retry().get_retry_after(response) or 0  # the header has seconds, or a date
    except InvalidHeader:
        asked = 0
    # The hub's own header says "api";r=0;t=55: no requests remain for 55 seconds.
    rate_limit = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
    if rate_limit:
        asked = max(asked, float(rate_limit[1]))
    return min(max(usual, asked), LONGEST_WAIT_S)


def description(error: Exception) -> str:
    """Return what happened, shortened: the kind of error, and its innermost cause."""
    status = status_of(error)
    if status is not None:
        return f"HTTP {status} {error.response.reason}"
    kind = type(error).__name__
    causes = [error]
    while causes:  # requests and urllib3 wrap exceptions in several ways
        error = causes[0]
        causes = [getattr(error, "reason", None), *error.args]
        causes = [cause for cause in causes if isinstance(cause, Exception)]
    return f"{kind}: {error}"[:300]
