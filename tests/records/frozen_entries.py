"""Load the frozen scripts of records/, and build small models and corpora for them."""
import dataclasses
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

RECORDS = Path(__file__).resolve().parents[2] / "records"
PORTS = ["2024-06-06_AdamW", "2024-10-14_ModernArch", "2024-11-03_UntieEmbed",
         "2024-12-04_ValueEmbed"]
ADAMW, MODERN, UNTIE, VALUE = PORTS
# Every entry, as a folder below records/.
ENTRIES = sorted(str(path.parent.relative_to(RECORDS))
                 for folder in ("published", "laptop", "candidates")
                 for path in (RECORDS / folder).glob("*/train_gpt.py"))
CPU = torch.device("cpu")
SMALL = ["--track=laptop", "--num_layers=4", "--num_heads=2", "--model_dim=32", "--batch_size=2",
         "--micro_batch=2", "--sequence_length=128", "--device=cpu", "--dtype=float32"]


def load_script(path: Path, name: str):
    """Import a script as a module of this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def load(port: str):
    """Return the module of one of PORTS. It is loaded once."""
    name = "port_" + port.split("_")[1]
    if name not in sys.modules:
        load_script(RECORDS / "published" / port / "train_gpt.py", name)
    return sys.modules[name]


def build(port: str, hp, device=CPU, dtype=torch.float32) -> tuple:
    """Return (module, model, optimizers) of a port."""
    module = load(port)
    model_arguments = [dtype, False] if port == VALUE else []
    optimizer_arguments = [] if port == ADAMW else [dtype]
    model = module.build_model(hp, device, *model_arguments)
    return module, model, module.build_optimizers(model, hp, *optimizer_arguments)


def build_small(port: str, *flags: str) -> tuple:
    """Return (module, model, optimizers) of a port with 4 layers and width 32."""
    return build(port, load(port).parse_arguments([*SMALL, *flags]))


def loss_of(port: str, model, tokens, targets, window=128):
    """Call a port's model. Only ValueEmbed's takes a window."""
    arguments = [torch.tensor(window)] if port == VALUE else []
    return model(tokens, targets, *arguments)


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens as a shard: a header of 256 int32, then uint16."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + tokens.astype(np.uint16).tobytes())


def words(num_tokens: int, seed: int) -> np.ndarray:
    """Return documents of made-up words as byte tokens, each after the end-of-text token 256."""
    random = np.random.default_rng(seed)
    vocabulary = np.random.default_rng(0).integers(97, 123, size=(40, 5))
    parts = []
    length = 0
    while length < num_tokens:
        chosen = vocabulary[np.minimum(random.geometric(0.1, size=40), 40) - 1]
        parts += [np.array([256]), chosen.flatten()]
        length += 1 + chosen.size
    return np.concatenate(parts)[:num_tokens]


class Sandbox:
    """A repository in a temporary folder: one frozen script and a small laptop corpus."""
    val_tokens = 4096

    def __init__(self, folder: Path, entry: str, monkeypatch):
        self.script = folder / "records" / entry / "train_gpt.py"
        self.script.parent.mkdir(parents=True)
        shutil.copy(RECORDS / entry / "train_gpt.py", self.script)
        (folder / "run.sh").touch()  # marks the root of a repository
        data = folder / "data" / "laptop"
        write_shard(data / "laptop_val_000000.bin", words(self.val_tokens + 1, seed=1))
        write_shard(data / "laptop_train_000001.bin", words(20_000, seed=2))
        # The script sets this variable. monkeypatch puts it back.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))
        name = "sandbox_" + entry.split("_")[-1]
        monkeypatch.setitem(sys.modules, name, None)
        self.module = load_script(self.script, name)
        track = dataclasses.replace(self.module.TRACKS["laptop"], val_tokens=self.val_tokens)
        monkeypatch.setitem(self.module.TRACKS, "laptop", track)
        monkeypatch.chdir(folder)
        self.folder = folder

    def run(self, *flags: str) -> list[tuple[str, float]]:
        """Run the script in this process; return ("train" or "val", loss) of the last log."""
        assert self.module.main(["--track=laptop", *flags]) == 0
        logs = (self.folder / "records/scratch").glob("*.txt")
        newest = max(logs, key=lambda path: path.stat().st_mtime_ns)
        source, environment, metrics = newest.read_text().split("=" * 100 + "\n")
        assert source == self.script.read_text()
        found = re.findall(r"^step:\d+/\d+ (train|val)_loss:(\S+) train_time:\d+ms", metrics, re.M)
        return [(kind, float(loss)) for kind, loss in found]
