"""Downloads FineWeb, tokenized for GPT-2, from the Hugging Face hub.

    python -m data.fineweb                  # the validation shard and 9 training shards, 2.0 GB
    python -m data.fineweb --shards 2       # only 2 training shards
    python -m data.fineweb --variant edu    # the educational part, into data/finewebedu10B

A shard has 10^8 tokens (200 MB), except the last one of a variant. Only shards that are missing or
damaged are downloaded, so a second call needs no network. A download goes into a temporary folder.
It gets its final name after its header, its token ids and its SHA-256 have been checked, so a file
with a final name is always complete. Interrupted downloads are resumed, failed ones are repeated.

The environment variables HF_ENDPOINT (a mirror), HF_TOKEN, HF_HUB_OFFLINE, HTTP_PROXY, HTTPS_PROXY,
ALL_PROXY, NO_PROXY and REQUESTS_CA_BUNDLE apply.
"""
import argparse
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

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
    try:
        from data.hub import Hub
    except ImportError as error:
        raise UserError(f"{len(names)} shards are missing in {directory}, and the package "
                        f"{error.name}, which downloads them, is not installed: "
                        "pip install -r requirements.txt") from error
    hub = Hub(repo)
    files = hub.list_files()
    for name in names:
        if name not in files:
            raise UserError(f"{repo} has no {name}; ask for fewer shards with --shards")
    make_folder(directory)
    name_leftovers(directory)
    needed = sum(files[name].size for name in names)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(f"{len(names)} shards of {needed / 1e9:.1f} GB are missing, but "
                        f"{directory} has only {free / 1e9:.1f} GB free; free disk space, choose "
                        "another folder with --dir, or ask for fewer shards with --shards")
    for number, name in enumerate(names, 1):
        size = files[name].size
        say(f"downloading {number}/{len(names)}: {name} ({size / 1e6:,.1f} MB)")
        with TemporaryDirectory(prefix=UNFINISHED, dir=directory,
                                ignore_cleanup_errors=True) as folder:
            path = Path(folder) / name
            hub.download(name, path, files[name])
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
