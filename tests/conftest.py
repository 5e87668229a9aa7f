"""Fixtures and helpers of several tests, and the option --all."""
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))

import small  # noqa: E402

import train_gpt  # noqa: E402

torch.set_num_threads(1)

# A job in the background, or under nohup, starts with these signals ignored, and so would the
# processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs only with --all")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tests run side by side: each process has one thread, and its losses repeat exactly."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def make_home(root, monkeypatch, capfd, recipe, train_tokens):
    """A repository with a small corpus in which train_gpt.main runs.

    Returns an object with run(*flags), which runs it in this process and returns code, out and err;
    start(*flags, ranks=1, patch=None, shell=""), which starts it as a process of its own
    (subprocess.Popen), with redirections of the shell;
    and the folders root and scratch."""
    small.write_corpus(root, train_tokens)
    small.install(train_gpt, root, monkeypatch, recipe)
    defaults = small.RECIPE if recipe else small.TINY

    def run(*flags, flags_before=defaults):
        capfd.readouterr()
        code = train_gpt.main([*flags_before, *map(str, flags)])
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    def start(*flags, ranks=1, patch=None, env=None, shell="", flags_before=defaults):
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost",
                        f"--nproc_per_node={ranks}"]
        command += [str(TESTS / "small.py")]
        if recipe:
            command += ["--recipe"]
        if patch:
            command += ["--patch", patch]
        command += [str(root), *flags_before, *map(str, flags)]
        if shell:
            command = ["bash", "-c", f"{shlex.join(command)} {shell}"]
        return subprocess.Popen(
            command, cwd=root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return SimpleNamespace(run=run, start=start, root=root, scratch=root / "records/scratch")


@pytest.fixture
def home(tmp_path, monkeypatch, capfd):
    """make_home with the laptop track's tables and small.TINY's flags."""
    return make_home(tmp_path, monkeypatch, capfd, recipe=False, train_tokens=3000)


@pytest.fixture
def recipe_home(tmp_path, monkeypatch, capfd):
    """make_home with the full recipe's tables and small.RECIPE's flags, and more text."""
    return make_home(tmp_path, monkeypatch, capfd, recipe=True, train_tokens=20_000)


@pytest.fixture
def hp():
    """Hyperparameters of the laptop track's layers with a width of 32."""
    return train_gpt.parse_arguments(small.TINY)


@pytest.fixture
def recipe(monkeypatch):
    """Hyperparameters of all 11 layers and 5 stages of the full recipe, on bytes, with a width of
    32."""
    layers, stages = small.recipe_tables(train_gpt)
    monkeypatch.setitem(train_gpt.LAYERS, "laptop", layers)
    monkeypatch.setitem(train_gpt.STAGES, "laptop", stages)
    return train_gpt.parse_arguments(small.RECIPE)


def away_from_zero(model):
    """The model, with noise on all weights that start from zero or from one number."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.any() or "_lambda" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture
def tiny_model(hp):
    """hp's model on the CPU in float32, away_from_zero."""
    model = train_gpt.build_model(hp, torch.device("cpu"), torch.float32, flex=False)
    return away_from_zero(model)


@pytest.fixture
def recipe_model(recipe):
    """The full recipe's model on the CPU in float32, away_from_zero."""
    model = train_gpt.build_model(recipe, torch.device("cpu"), torch.float32, flex=False)
    return away_from_zero(model)


def at_window(window: int, hp=None) -> train_gpt.Schedule:
    """The schedule at step 0, with another window in all layers. hp: default small.TINY's."""
    hp = hp or train_gpt.parse_arguments(small.TINY)
    schedule = train_gpt.Schedule(0, hp, torch.device("cpu"))
    schedule.windows = {kind: torch.tensor(window) for kind in schedule.windows}
    return schedule


def metric_lines(text: str) -> list[str]:
    """The lines of a log or console with a loss, without times, which no two runs share."""
    return [line.split(" train_time")[0] for line in text.splitlines() if line.startswith("step:")]
