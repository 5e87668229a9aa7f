"""The script that is simulated, as node.py and host.py see it: its folder with random data, its
import, other ranks that do not exist, and what it says when it fails.
"""
import dataclasses
import importlib.util
import shutil
import sys
import traceback
import types
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tools.simulate.model import DOCUMENT

REPOSITORY = Path(__file__).resolve().parents[2]
VAL_TOKENS = 2**20  # tokens of a validation of the simulated run
SCRIPT_FILES: set[str] = set()  # the paths of the scripts that were imported


def place(script: Path, track, tokens: int, folder: Path) -> Path:
    """Make a folder that looks like the repository to the script. Returns the script's copy.

    It has run.sh, the script at its place, the vocabulary if the track has one, and random data for
    a run of this many tokens.
    """
    records = [path for path in script.parents if path.name == "records"]
    relative = script.relative_to(records[0].parent) if records else Path(script.name)
    copy = folder / relative
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(script.read_text())
    (folder / "run.sh").touch()
    vocabulary = getattr(track, "vocabulary", "")  # older scripts know no tokens' texts
    if vocabulary:
        (folder / vocabulary).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / vocabulary, folder / vocabulary)
    random = np.random.RandomState(0)
    # Three times the tokens: a script may leave out the ends of documents.
    for pattern, count in ((track.train_files, 3 * tokens + 1), (track.val_files, VAL_TOKENS + 1)):
        path = folder / pattern.replace("*", "000001")
        path.parent.mkdir(parents=True, exist_ok=True)
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count
        text = random_text(count, track.eot_token, random)
        path.write_bytes(header.tobytes() + text.astype("<u2").tobytes())
    return copy


def random_text(count: int, eot_token: int, random: np.random.RandomState) -> np.ndarray:
    """Token ids (count,), in documents that each begin with eot_token.

    The lengths of the documents are exponential, as the model of attention assumes. So a number
    that a script takes from its batch, for example the longest document, changes from step to step
    as it would with real text.
    """
    text = random.randint(0, eot_token, count)
    lengths = np.ceil(random.exponential(DOCUMENT, 2 * count // DOCUMENT + 100)).astype(int)
    starts = np.cumsum([0, *lengths])
    text[starts[starts < count]] = eot_token
    return text


def load(path: Path, name: str) -> types.ModuleType:
    """Import a script from its path."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    SCRIPT_FILES.add(str(path))
    return module


def load_copy(copy: Path) -> types.ModuleType:
    """Import the script's copy, with short validations."""
    module = load(copy, "script_under_test")
    for name, track in list(module.TRACKS.items()):
        module.TRACKS[name] = dataclasses.replace(track, val_tokens=VAL_TOKENS)
    return module


def fake_process_group(world_size: int, rank: int) -> None:
    """Replace the process group by torch's fake one, and DistributedDataParallel's reducer."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    init = dist.init_process_group
    dist.init_process_group = lambda backend=None, device_id=None, **kwargs: init(
        "fake", store=FakeStore(), rank=rank, world_size=world_size)
    # A script may meet the other ranks before it creates the process group.
    dist.rendezvous = lambda *args, **kwargs: iter([(FakeStore(), rank, world_size)])
    import torch.nn.parallel.distributed as ddp
    ddp._verify_param_shape_across_processes = lambda *args, **kwargs: None
    ddp._sync_module_states = lambda *args, **kwargs: None
    # The real rebuilding of buckets looks at data. Here one bucket for each dtype stays.
    torch._C._distributed_c10d.Reducer._rebuild_buckets = lambda self: False
    construct, backward = ddp.DistributedDataParallel.__init__, torch.Tensor.backward
    pending = []  # handles of the collectives

    def with_hook(self, *args, **kwargs):
        """The reducer wants a future that holds a tensor; the fake group's futures are empty."""
        construct(self, *args, **kwargs)

        def hook(state, bucket):
            pending.append(dist.all_reduce(bucket.buffer(), async_op=True))
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future
        self.register_comm_hook(None, hook)

    def backward_then_wait(self, *args, **kwargs):
        """The reducer waits at the end of the backward pass."""
        backward(self, *args, **kwargs)
        while pending:
            pending.pop(0).wait()
    ddp.DistributedDataParallel.__init__ = with_hook
    torch.Tensor.backward = backward_then_wait


class Tee:
    """stderr that remembers the end of what was written: a script's message to its user."""
    def __init__(self, stream):
        self.stream, self.text = stream, ""

    def write(self, text: str) -> int:
        self.text = (self.text + text)[-4000:]
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def last_line(self) -> str:
        lines = self.text.strip().splitlines()
        return lines[-1] if lines else ""


def explain(wrong: BaseException) -> tuple[int, str]:
    """(exit code, message whose last line says what is wrong)."""
    if type(wrong).__name__ == "UserError":  # the script's own: one line for the user
        return 2, str(wrong)
    if isinstance(wrong, SystemExit) and wrong.code:
        return 2, sys.stderr.last_line() or f"SystemExit: {wrong.code}"
    # Dynamo puts advice below its errors, so the error is repeated as the last line.
    last = f"{type(wrong).__name__}: {' '.join(str(wrong).split())[:300]}"
    return 1, f"{''.join(traceback.format_exception(wrong))[-6000:]}\n{last}"
