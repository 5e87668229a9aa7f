"""Downloads FineWeb, tokenized for GPT-2, from the Hugging Face hub.

    python -m data.fineweb                  # the validation shard and 9 training shards, 2.0 GB
    python -m data.fineweb --shards 2       # only 2 training shards
    python -m data.fineweb --variant edu    # the educational part, into data/finewebedu10B

A shard has 10^8 tokens (200 MB), except the last one of a variant. Only shards that are missing or
damaged are downloaded, so a second call needs no network. A download goes into a temporary folder.
It gets its final name after its header, its token ids and its SHA-256 have been checked, so a file
with a final name is always complete. Interrupted downloads are resumed, failed ones are repeated.

HF_ENDPOINT (a mirror), HF_TOKEN and the other variables of huggingface_hub apply.
"""
import argparse
import errno
import hashlib
import shutil
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from data import DATA_FOLDER, UserError, run_as_program
from data.shards import GPT2_VOCAB_SIZE, open_shard, publish, verify_shard


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

ATTEMPTS = 3        # for each request, in addition to the retries of huggingface_hub
FIRST_WAIT_S = 1.0  # before the second attempt; doubles with each further one
LONGEST_WAIT_S = 60.0
FINAL_STATUSES = (400, 403, 404)  # HTTP statuses that another attempt would not change
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


class HubFile(NamedTuple):
    """What the hub says about a file."""
    size: int           # bytes
    sha256: str | None  # hexadecimal; None if the hub does not know it


class WrongContent(Exception):
    """A downloaded file is not the one that the hub describes, or not a shard of GPT-2 tokens."""


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
        print(f"downloading again: {error}")
        return False
    return True


def one_line(error: Exception) -> str:
    """Return the type and the text of an exception, shortened and without line breaks."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:300]


def status_of(error: Exception) -> int | None:
    """Return the HTTP status of the answer that led to an exception, if there was an answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def seconds_until_retry(error: Exception, usual: float) -> float:
    """Return how long to wait: as long as the server's Retry-After header says, or as usual."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    retry_after = headers.get("Retry-After", "")
    if retry_after.isdigit():
        return min(float(retry_after), LONGEST_WAIT_S)
    return usual


def disable_xet() -> None:
    """Make huggingface_hub download by plain HTTP, as HF_HUB_DISABLE_XET=1 does."""
    from huggingface_hub import constants
    constants.HF_HUB_DISABLE_XET = True


def with_retries(task: str, function: Callable, *args):
    """Return what function(*args) returns; call it up to ATTEMPTS times while it fails.

    task says what it does. After the first failure, downloads use plain HTTP: a mirror can serve
    files although the xet storage that its answers name cannot be reached. Raises UserError when no
    attempt succeeds, and OSError at once if the disk is the reason.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function(*args)
        # huggingface_hub passes on the exceptions of several HTTP libraries.
        except Exception as error:
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise
            problem = f"{task} failed ({one_line(error)})"
            if status_of(error) == 401:
                raise UserError(f"{problem}; these data sets are public, so remove the token that "
                                "the hub refuses: HF_TOKEN, or that of `hf auth login`") from error
            if attempt == ATTEMPTS or status_of(error) in FINAL_STATUSES:
                raise UserError(f"{problem}; repeat the command (complete shards are kept), or set "
                                "HF_ENDPOINT to a mirror of the hub") from error
            wait = seconds_until_retry(error, FIRST_WAIT_S * 2**(attempt - 1))
            print(f"{problem}; trying again in {wait:g} s", flush=True)
            disable_xet()
            time.sleep(wait)


def hub_files(repo: str) -> dict[str, HubFile]:
    """Return size and hash of every file of a repository. One request."""
    from huggingface_hub import HfApi

    files = {}
    for file in HfApi().dataset_info(repo, files_metadata=True, timeout=10).siblings:
        files[file.rfilename] = HubFile(file.size or 0, file.lfs.sha256 if file.lfs else None)
    return files


def check_content(path: Path, sha256: str | None) -> None:
    """Raises WrongContent unless the file is a shard of GPT-2 tokens with this hash."""
    try:
        verify_shard(path, GPT2_VOCAB_SIZE)
    except UserError as error:
        raise WrongContent(str(error)) from error
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if sha256 and digest.hexdigest() != sha256:
        raise WrongContent(f"its SHA-256 is {digest.hexdigest()}, on the hub it is {sha256}")


def download(repo: str, name: str, directory: Path, sha256: str | None) -> None:
    """Download one file of a repository to directory/name. Raises what with_retries catches."""
    from huggingface_hub import hf_hub_download

    # The temporary folder lies in the final one, because a rename cannot cross file systems.
    with TemporaryDirectory(prefix=".downloading-", dir=directory) as folder:
        path = Path(hf_hub_download(repo, name, repo_type="dataset", local_dir=folder))
        check_content(path, sha256)
        publish(path, directory / name)


def fetch(variant: Variant, num_shards: int, directory: Path) -> None:
    """Make sure that directory has the validation shard and num_shards training shards.

    Raises UserError if that is impossible. Shards that were complete by then stay.
    """
    if not 1 <= num_shards <= variant.num_train_shards:
        raise UserError(f"--shards is {num_shards}, expected 1 to {variant.num_train_shards}, the "
                        f"number of training shards of {variant.repo}")
    names = shard_names(variant, num_shards)
    missing = [name for name in names if not is_complete(directory / name)]
    if missing:
        try:
            fetch_missing(variant.repo, missing, directory)
        except OSError as error:
            raise UserError(f"cannot write into {directory}: {error.strerror or error}; free disk "
                            "space or choose another folder with --dir, then repeat the command "
                            "(complete shards are kept)") from error
    print(f"{directory}: {len(names)} shards, {len(missing)} of them downloaded now")


def fetch_missing(repo: str, names: list[str], directory: Path) -> None:
    """Download files of a repository. Raises UserError, and OSError if the disk refuses them."""
    if find_spec("huggingface_hub") is None:
        raise UserError(f"{len(names)} shards are missing in {directory}, and the package "
                        "huggingface_hub, which downloads them, is not installed: "
                        "pip install -r requirements.txt")
    from huggingface_hub import logging

    logging.set_verbosity_error()  # it would warn about each of its own retries
    files = with_retries(f"listing the files of {repo}", hub_files, repo)
    for name in names:
        if name not in files:
            raise UserError(f"{repo} has no {name}; ask for fewer shards with --shards")
    directory.mkdir(parents=True, exist_ok=True)
    needed = sum(files[name].size for name in names)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(f"{len(names)} shards of {needed / 1e9:.1f} GB are missing, but "
                        f"{directory} has only {free / 1e9:.1f} GB free; free disk space, choose "
                        "another folder with --dir, or ask for fewer shards with --shards")
    for number, name in enumerate(names, 1):
        size, sha256 = files[name]
        print(f"downloading {number}/{len(names)}: {name} ({size / 1e6:,.1f} MB)", flush=True)
        task = f"downloading {name} from {repo}"
        with_retries(task, download, repo, name, directory, sha256)


def main(argv: list[str] | None = None) -> int:
    """The command line of `python -m data.fineweb`. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.fineweb", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=DEFAULT_SHARDS,
                        help="number of training shards, counted from the first (%(default)s)")
    parser.add_argument("--variant", choices=VARIANTS, default="10B",
                        help="data set (%(default)s)")
    parser.add_argument("--dir", type=Path, help="folder for the shards (data/fineweb10B for 10B)")
    args = parser.parse_args(argv)
    variant = VARIANTS[args.variant]
    directory = args.dir or DATA_FOLDER / variant.folder
    return run_as_program(fetch, variant, args.shards, directory)


if __name__ == "__main__":
    sys.exit(main())
