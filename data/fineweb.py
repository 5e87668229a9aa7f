"""Fetches shards of FineWeb, tokenized for GPT-2, from the Hugging Face hub.

    python -m data.fineweb --shards 9                 # the validation shard and 9 of training, 2.0 GB
    python -m data.fineweb --shards 9 --variant edu   # the educational part, into data/finewebedu10B

A shard is 10^8 tokens (200 MB) but the last of a variant. Shards that are there are checked (header, size, and the size
the hub gives if it answers) and not fetched again; with all of them there no network is needed. A shard is fetched into
a folder beside, checked to the last id and against the hub's hash, and only then renamed: what has its final name is
whole. What fails is tried again a few times and goes on where it stopped. HF_ENDPOINT (a mirror), HF_TOKEN and the
other settings of huggingface_hub apply.
"""
import argparse
import errno
import hashlib
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from data.shards import publish, verify_shard
from train_gpt import ROOT, TRACKS, UserError, open_shard, run_as_program


@dataclass(frozen=True)
class Variant:
    """A data set of the hub: prefix_val_000000.bin and prefix_train_000001.bin to the number of training shards."""
    repo: str
    prefix: str
    num_train_shards: int
    folder: str  # below data/


VARIANTS = {
    "10B": Variant("kjj0/fineweb10B-gpt2", "fineweb", 103, "fineweb10B"),
    "100B": Variant("kjj0/fineweb100B-gpt2", "fineweb", 1030, "fineweb100B"),
    "edu": Variant("kjj0/finewebedu10B-gpt2", "finewebedu", 99, "finewebedu10B"),
}


TRIES, FIRST_WAIT_S = 3, 1.0  # of a shard, on top of the library's own; the wait doubles, unless the server names one


class HubFile(NamedTuple):
    """What the hub tells of a file."""
    size: int | None = None     # bytes
    sha256: str | None = None   # hexadecimal


def shard_names(variant: Variant, num_shards: int) -> list[str]:
    """The file names of the validation shard and of the first num_shards training shards."""
    return [f"{variant.prefix}_val_000000.bin"] + [f"{variant.prefix}_train_{number:06d}.bin"
                                                   for number in range(1, num_shards + 1)]


def hub_files(repo: str) -> tuple[dict[str, HubFile], str]:
    """Each file of repo by one request; where the hub can't be asked, an empty dict and why."""
    try:
        from huggingface_hub import HfApi
        files = HfApi().dataset_info(repo, files_metadata=True, timeout=10).siblings
        return {file.rfilename: HubFile(file.size, file.lfs and file.lfs.sha256) for file in files}, ""
    except ImportError:
        return {}, "huggingface_hub is not installed: pip install -r requirements.txt"
    except Exception as error:  # the library passes on errors of several HTTP packages; each means: no answer
        return {}, one_line(error)


def one_line(error: Exception) -> str:
    """An exception's text without line breaks, shortened."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def fault(path: Path, hub_size: int | None) -> str:
    """Why the file at path is not the whole shard, of hub_size bytes if that is known; empty if it is whole."""
    if not path.exists():
        return "missing"
    try:
        open_shard(path)
    except UserError as error:
        return str(error)
    size = path.stat().st_size
    return "" if hub_size in (None, size) else f"{path} has {size:,} bytes, the hub gives {hub_size:,}"


def fetch(variant: Variant, num_shards: int, directory: Path) -> None:
    """Bring the validation shard and num_shards training shards into directory.

    Raises UserError where that can't be done; the shards fetched until then stay.
    """
    if not 1 <= num_shards <= variant.num_train_shards:
        raise UserError(f"--shards is {num_shards}, {variant.repo} has 1 to {variant.num_train_shards}")
    names = shard_names(variant, num_shards)
    listed, no_answer = hub_files(variant.repo)
    files = {name: listed.get(name, HubFile()) for name in names}
    faults = {name: fault(directory / name, files[name].size) for name in names}
    missing = [name for name in names if faults[name]]
    for name in missing:
        if faults[name] != "missing":
            print(f"fetching again: {faults[name]}")
    if no_answer and missing:
        raise UserError(f"{len(missing)} of {len(names)} shards are missing in {directory} and {variant.repo} can't be "
                        f"asked ({no_answer}); repeat the command with a network, or set HF_ENDPOINT to a mirror")
    missing.sort(key=lambda name: name in listed)  # what the hub did not list first: it fails before all the others
    try:
        directory.mkdir(parents=True, exist_ok=True)
        need, free = sum(files[name].size or 0 for name in missing), shutil.disk_usage(directory).free
        if need > free:
            raise UserError(f"{len(missing)} shards of {need / 1e9:.1f} GB are missing and {directory} has "
                            f"{free / 1e9:.1f} GB free; free some, or use --dir or a smaller --shards")
        for number, name in enumerate(missing, 1):
            print(f"fetching {number}/{len(missing)}: {name} ({(files[name].size or 0) / 1e6:,.1f} MB)", flush=True)
            fetch_shard(variant.repo, name, directory, files[name].sha256)
    except OSError as error:
        raise UserError(f"cannot write into {directory}: {error.strerror or error}; use --dir") from error
    unchecked = f" (sizes not compared with the hub's: {no_answer})" if no_answer else ""
    print(f"{directory}: {len(names)} shards are there, {len(missing)} of them fetched now{unchecked}")


def fetch_shard(repo: str, name: str, directory: Path, sha256: str | None) -> None:
    """Fetch one file of repo as directory/name. Raises UserError if that fails or it is no shard of GPT-2 tokens."""
    from huggingface_hub import hf_hub_download, logging
    from huggingface_hub.errors import RemoteEntryNotFoundError

    logging.set_verbosity_error()  # it warns of each attempt of its own
    problem, wait = "", FIRST_WAIT_S
    with TemporaryDirectory(prefix=".fetching-", dir=directory) as staging:  # one filesystem: it can be renamed
        for attempt in range(TRIES):
            if attempt:
                print(f"trying again in {wait:g} s: {problem}", flush=True)
                time.sleep(wait)
                wait *= 2
            try:
                path = Path(hf_hub_download(repo, name, repo_type="dataset", local_dir=staging))
            except RemoteEntryNotFoundError as error:
                raise UserError(f"{repo} has no {name}; ask for fewer shards with --shards") from error
            except Exception as error:  # as in hub_files
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise UserError(f"the disk of {directory} is full; free some or use --dir, then repeat the "
                                    "command: whole shards are kept") from error
                problem = f"fetching {name} from {repo} failed ({one_line(error)})"
                answer = getattr(error, "response", None)
                if getattr(answer, "status_code", 0) in (400, 401, 403, 404):
                    break
                named = getattr(answer, "headers", {}).get("Retry-After", "")
                wait = min(float(named), 60.0) if named.isdigit() else wait
                continue
            problem = wrong_content(path, sha256)
            if not problem:
                return publish(path, directory / name)
            problem = f"what {repo} sent as {name} is no shard of GPT-2 tokens: {problem}"
            path.unlink()  # or the library would take it for fetched
    raise UserError(f"{problem}; repeat the command: whole shards are kept")


def wrong_content(path: Path, sha256: str | None) -> str:
    """Why the file is not what the hub holds, or no shard of GPT-2 tokens; empty if it is right."""
    try:
        verify_shard(path, TRACKS["fineweb"].vocab_size)
    except UserError as error:
        return str(error)
    found = hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()
    return "" if sha256 in (None, found) else f"its SHA-256 is {found}, the hub's {sha256}"


def main(argv: list[str] | None = None) -> int:
    """Command line of `python -m data.fineweb`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.fineweb", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=9, help="training shards, the first so many (9)")
    parser.add_argument("--variant", choices=VARIANTS, default="10B", help="which data set (10B)")
    parser.add_argument("--dir", type=Path, help="folder for the shards (data/fineweb10B for 10B)")
    args = parser.parse_args(argv)
    variant = VARIANTS[args.variant]
    return run_as_program(fetch, variant, args.shards, args.dir or ROOT / "data" / variant.folder)


if __name__ == "__main__":
    sys.exit(main())
