"""Downloads FineWeb, tokenized for GPT-2, from the Hugging Face hub.

    python -m data.fineweb                  # the validation shard and 9 training shards, 2.0 GB
    python -m data.fineweb --shards 2       # only 2 training shards
    python -m data.fineweb --variant edu    # the educational part, into data/finewebedu10B

A shard has 10^8 tokens (200 MB), except the last one of a variant. Only shards that are missing or
damaged are downloaded, so a second call needs no network. A download goes into a temporary folder.
It gets its final name after its header, its token ids and its SHA-256 have been checked, so a file
with a final name is always complete. Interrupted downloads are resumed, failed ones are repeated.

HF_ENDPOINT (a mirror), HF_TOKEN, HF_HUB_OFFLINE and the other environment variables of the package
huggingface_hub apply; so do HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE.
"""
import argparse
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

from data import DATA_FOLDER, UserError, path_argument, run_as_program, say
from data.shards import (
    GPT2_VOCAB_SIZE,
    UNFINISHED,
    make_folder,
    name_leftovers,
    open_shard,
    publish,
    verify_shard,
)

try:
    import httpx2
    import huggingface_hub
    from huggingface_hub import constants, utils
    from huggingface_hub.file_download import http_get
    from huggingface_hub.hf_api import RepoSibling
    from huggingface_hub.utils.sha import sha_fileobj
except (ImportError, ValueError) as error:  # ValueError: a variable such as HF_ENDPOINT
    huggingface_hub, import_error = None, error  # complete shards need no download


class Variant(NamedTuple):
    """A data set on the hub: one validation shard and the training shards 1 to num_train_shards."""
    repo: str
    prefix: str  # file names are PREFIX_val_000000.bin, PREFIX_train_000001.bin, ...
    num_train_shards: int
    folder: str  # below data/


VARIANTS = {
    "10B": Variant("kjj0/fineweb10B-gpt2", "fineweb", 103, "fineweb10B"),
    "100B": Variant("kjj0/fineweb100B-gpt2", "fineweb", 1030, "fineweb100B"),
    "edu": Variant("kjj0/finewebedu10B-gpt2", "finewebedu", 99, "finewebedu10B"),
}
DEFAULT_SHARDS = 9  # enough for the default run of the fineweb track

PUBLIC_HUB = "https://huggingface.co"
ATTEMPTS = 5        # for the listing and for each file
FIRST_WAIT_S = 1.0  # before the second attempt; doubles with each further one
LONGEST_WAIT_S = 60.0
CHUNK = 2**16       # bytes; what has come of one is lost when the connection breaks
BUSY_STATUSES = (408, 425, 429)  # those below 500 that another attempt may change


class WrongContent(Exception):
    """What has come is not what the hub describes, or does not come from a hub at all."""


class Hub:
    """A data set on the hub. Its methods raise UserError, and OSError if the disk fails."""

    def __init__(self, repo: str):
        """repo: OWNER/NAME"""
        self.repo = repo
        self.url = (os.environ.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")
        if huggingface_hub.is_offline_mode():
            raise UserError(f"HF_HUB_OFFLINE forbids to download from {repo}; unset it, or copy "
                            "the files from another machine")
        # It says when it tries again. stderr is for the error that ends the command.
        logging.getLogger("huggingface_hub").handlers = [logging.StreamHandler(sys.stdout)]
        constants.DOWNLOAD_CHUNK_SIZE = CHUNK
        huggingface_hub.set_client_factory(lambda: httpx2.Client(
            event_hooks={"response": [check_answer]}, follow_redirects=True))
        try:
            huggingface_hub.get_session()
        except Exception as error:  # proxies and certificates cause many kinds
            raise UserError(f"{description(error)}; {self.advice(error)}") from error
        self.api = huggingface_hub.HfApi(endpoint=self.url)
        self.token = huggingface_hub.get_token() or False  # False: send none

    def files(self) -> "dict[str, RepoSibling]":
        """Return what the hub says about every file, by name."""
        info = self.ask(f"listing the files of {self.repo}", lambda: self.api.dataset_info(
            self.repo, files_metadata=True, token=self.token,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT))
        return {file.rfilename: file for file in info.siblings or []}

    def download(self, file: "RepoSibling", path: Path) -> None:
        """Download a file to path. A part that is there already is continued."""
        self.ask(f"downloading {file.rfilename} from {self.repo}", lambda: self._get(file, path))

    def _get(self, file: "RepoSibling", path: Path) -> None:
        # http_get is the part of hf_hub_download that receives a file. The rest would delete what
        # has come when a download fails, wait in silence for more than a minute, and prefer the
        # xet protocol, which hangs where a mirror lacks its storage.
        url = huggingface_hub.hf_hub_url(self.repo, file.rfilename, repo_type="dataset",
                                         endpoint=self.url)
        headers = utils.build_hf_headers(token=self.token, headers={"Accept-Encoding": "identity"})
        with open(path, "ab") as output:
            http_get(url, output, resume_size=output.tell(), headers=headers,
                     displayed_filename=file.rfilename)
        with open(path, "rb") as content:
            sha256 = sha_fileobj(content).hex()
        if file.lfs and sha256 != file.lfs.sha256:
            problem = (f"{path.stat().st_size:,} bytes with the SHA-256 {sha256} came, the hub has "
                       f"{file.lfs.size:,} with {file.lfs.sha256}")
            path.unlink()
            raise WrongContent(problem)

    def ask(self, task: str, function: Callable):
        """Return what function() returns; call it up to ATTEMPTS times while it fails.

        task says what it does. Raises UserError when no attempt succeeds.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return function()
            except Exception as error:  # httpx2 has several families of them
                if getattr(error, "errno", None):  # the disk
                    raise
                problem = f"{task} failed ({description(error)})"
                wait = seconds_until_retry(error, FIRST_WAIT_S * 2**(attempt - 1))
                if self.token and (status_of(error) in (401, 403)
                                   or isinstance(error, UnicodeError)):  # no token has such letters
                    self.token = False
                    problem += "; the files are public, so the token (HF_TOKEN) is left out"
                elif attempt == ATTEMPTS or is_final(error):
                    raise UserError(f"{problem}; {self.advice(error)}") from error
                say(f"{problem}; trying again in {wait:.0f} s")
                time.sleep(wait)

    def advice(self, error: Exception) -> str:
        """Return what the user can do about an error."""
        repeat = "repeat the command (complete shards are kept), or set HF_ENDPOINT to a mirror"
        status = status_of(error)
        if status is not None and not is_final(error):
            return f"the server is busy: wait some minutes, then {repeat}"
        if status is not None and status != 407:  # 407: the proxy wants a password
            return f"{self.url} refuses it; check HF_ENDPOINT and HF_TOKEN"
        if "CERTIFICATE" in str(error) or isinstance(error, OSError):  # its file cannot be read
            return ("if a proxy has a certificate of its own, set SSL_CERT_FILE to it; check this "
                    "machine's clock, too")
        variables = [name for name in os.environ if os.environ[name]
                     and name.lower() in ("http_proxy", "https_proxy", "all_proxy")
                     and not proxy_bypass(urlsplit(self.url).netloc)]
        if self.url != PUBLIC_HUB:
            variables.append("HF_ENDPOINT")
        socks = "run pip install 'httpx2[socks]', or " if "SOCKS" in str(error) else ""
        return f"{socks}check {' and '.join(variables) or 'the network'}, then {repeat}"


def check_answer(response: "httpx2.Response") -> None:
    """Raises HTTPStatusError or WrongContent unless the hub may have sent the answer.

    It comes before huggingface_hub's own check, which heeds a Retry-After of any length.
    """
    if response.is_error:
        response.raise_for_status()
    if response.is_success and response.headers.get("Content-Type", "").startswith("text/html"):
        raise WrongContent(f"a web page came from {response.url.host}, perhaps the login page of "
                           "this network")


def status_of(error: Exception) -> int | None:
    """Return the HTTP status of the answer that led to an exception, if there was an answer."""
    return error.response.status_code if isinstance(error, httpx2.HTTPStatusError) else None


def is_final(error: Exception) -> bool:
    """Whether another attempt would end in the same way."""
    status = status_of(error)
    if status is not None:
        return status < 500 and status not in BUSY_STATUSES
    transient = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.ProxyError,
                 httpx2.RemoteProtocolError, WrongContent)
    return not isinstance(error, transient) or "CERTIFICATE_VERIFY_FAILED" in str(error)


def seconds_until_retry(error: Exception, usual: float) -> float:
    """Return how long to wait: as usual, or as long as the server asks, up to LONGEST_WAIT_S."""
    if status_of(error) is None:
        return usual
    headers = error.response.headers
    limit = utils.parse_ratelimit_headers(headers)
    if limit and limit.remaining == 0:
        usual = max(usual, limit.reset_in_seconds)
    if headers.get("Retry-After", "").isdecimal():
        usual = max(usual, float(headers["Retry-After"]))
    return min(usual, LONGEST_WAIT_S)


def description(error: Exception) -> str:
    """Return what happened, as one short line."""
    if status_of(error) is not None:
        return f"HTTP {status_of(error)} {error.response.reason_phrase}"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def shard_names(variant: Variant, num_shards: int) -> list[str]:
    """Return the file names of the validation shard and of the first num_shards training shards."""
    names = [f"{variant.prefix}_val_000000.bin"]
    for number in range(1, num_shards + 1):
        names.append(f"{variant.prefix}_train_{number:06d}.bin")
    return names


def is_complete(path: Path) -> bool:
    """Whether the shard is there. Says so if it is there, but damaged."""
    if not path.exists():
        return False
    try:
        open_shard(path)
    except UserError as error:
        say(f"downloading again: {error}")
        return False
    return True


def fetch(variant: Variant, num_shards: int, directory: Path) -> None:
    """Make sure that directory has the validation shard and num_shards training shards.

    Raises UserError if that is impossible. Shards that were complete by then stay.
    """
    if not 1 <= num_shards <= variant.num_train_shards:
        raise UserError(f"--shards is {num_shards}, expected 1 to {variant.num_train_shards}, the "
                        f"number of training shards of {variant.repo}")
    names = shard_names(variant, num_shards)
    try:
        missing = [name for name in names if not is_complete(directory / name)]
        if missing:
            download(variant.repo, missing, directory)
    except OSError as error:
        raise UserError(f"cannot write into {directory}: {error.strerror or error}; free disk "
                        "space or choose another folder with --dir, then repeat the command "
                        "(complete shards are kept)") from error
    say(f"{directory}: {len(names)} shards, {len(missing)} of them downloaded now")


def download(repo: str, names: list[str], directory: Path) -> None:
    """Download files of a repository. Raises UserError, and OSError if the disk refuses them."""
    if huggingface_hub is None:
        raise UserError(f"{len(names)} shards are missing in {directory}, and the package "
                        "huggingface_hub, which downloads them, cannot be imported "
                        f"({import_error}): pip install -r requirements.txt, or correct the "
                        "environment variables HF_*")
    hub = Hub(repo)
    files = hub.files()
    for name in names:
        if name not in files:
            raise UserError(f"{repo} has no {name}; ask for fewer shards with --shards")
    make_folder(directory)
    name_leftovers(directory)
    needed = sum(files[name].size or 0 for name in names)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(f"{len(names)} shards of {needed / 1e9:.1f} GB are missing, but "
                        f"{directory} has only {free / 1e9:.1f} GB free; free disk space, choose "
                        "another folder with --dir, or ask for fewer shards with --shards")
    for number, name in enumerate(names, 1):
        size = files[name].size or 0
        say(f"downloading {number}/{len(names)}: {name} ({size / 1e6:,.1f} MB)")
        with TemporaryDirectory(prefix=UNFINISHED, dir=directory,
                                ignore_cleanup_errors=True) as folder:
            path = Path(folder) / name
            hub.download(files[name], path)
            try:
                verify_shard(path, GPT2_VOCAB_SIZE)
            except UserError as error:
                raise UserError(f"what {hub.url} has as {name} is no shard of GPT-2 tokens: "
                                f"{error}") from error
            publish(path, directory / name)


def command(argv: list[str] | None) -> None:
    """Fetch what the command line asks for. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m data.fineweb", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=DEFAULT_SHARDS,
                        help="number of training shards, counted from the first (%(default)s)")
    parser.add_argument("--variant", choices=VARIANTS, default="10B",
                        help="data set (%(default)s)")
    parser.add_argument("--dir", type=path_argument,
                        help="folder for the shards (data/fineweb10B for 10B)")
    args = parser.parse_args(argv)
    variant = VARIANTS[args.variant]
    fetch(variant, args.shards, args.dir or DATA_FOLDER / variant.folder)


def main(argv: list[str] | None = None) -> int:
    """The command line of `python -m data.fineweb`. Returns the exit code."""
    return run_as_program(command, argv)


if __name__ == "__main__":
    sys.exit(main())
