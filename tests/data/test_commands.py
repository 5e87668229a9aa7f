"""What all commands of data/ share: their output may be lost, their work may not."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import UserError, run_as_program
from data.shards import open_shard, write_shard

ROOT = Path(__file__).resolve().parents[2]

# What a shell puts behind a command whose output goes nowhere.
LOST = {"closed": ">&-", "both closed": ">&- 2>&-", "no input": "<&- >&- 2>&-",
        "full disk": ">/dev/full", "both full": ">/dev/full 2>/dev/full", "reader gone": "| true"}


def shell(words, redirection, **environment):
    """The exit code and stderr of `python -m WORDS REDIRECTION` in bash."""
    script = f'"$0" -m "$@" {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", script, sys.executable, *map(str, words)], cwd=ROOT,
                          env={**os.environ, **environment}, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("lost", LOST)
def test_work_is_done_without_a_reader(tmp_path, lost):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    words = ["data.text", tmp_path / "a.jsonl", "--name", "mine", "--dir", tmp_path / "mine",
             "--encoding", "bytes", "--processes", "2"]
    assert shell(words, LOST[lost]) == (0, "")
    assert open_shard(tmp_path / "mine" / "mine_train_000001.bin").tolist() == [256, *b"one"]
    assert open_shard(tmp_path / "mine" / "mine_val_000000.bin").tolist() == [256, *b"two"]


@pytest.mark.slow
@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("command", ["data.shards", "data.text", "data.laptop", "data.fineweb"])
def test_help_without_a_reader(command, lost):
    assert shell([command, "--help"], LOST[lost]) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("lost", LOST)
def test_an_error_keeps_its_exit_code_without_a_reader(tmp_path, lost):
    code, errors = shell(["data.shards", tmp_path / "nothing.bin"], LOST[lost])
    assert code == 2
    assert "Traceback" not in errors


def test_the_data_folder_may_be_a_link(tmp_path):
    """The paths of tracks are relative to the repository, not to the disk behind the link."""
    shutil.copytree(ROOT / "data", tmp_path / "disk" / "data", ignore=lambda folder, names: [
        name for name in names if not name.endswith(".py")])
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "data").symlink_to(tmp_path / "disk" / "data")
    command = [sys.executable, "-c", "import data; print(data.DATA_FOLDER)"]
    done = subprocess.run(command, cwd=tmp_path / "repository", capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/repository/data\n"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_every_name_can_be_printed(tmp_path, encoding):
    names = [b"caf\xe9.bin", "Ünï 漢 \U0001f600.bin".encode(), b"two\nlines.bin"]
    for name in names:
        write_shard(tmp_path / os.fsdecode(name), np.array([256, 1]))
    paths = [os.fsencode(tmp_path) + b"/" + name for name in names]
    bad = os.fsencode(tmp_path) + b"/caf\xe9\n.bin"
    done = subprocess.run([sys.executable, "-m", "data.shards", *paths, bad], cwd=ROOT,
                          env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True)
    assert done.returncode == 2
    lines = [line for line in done.stdout.splitlines() if line.endswith(b"256")]  # the largest id
    assert len(lines) == 3
    assert len(done.stderr.splitlines()) == 1 and b"caf" in done.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129),
                                          (signal.SIGINT, 130)], ids=str)
def test_a_signal_ends_with_a_line_after_the_clean_up(capsys, number, code):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    cleaned = []

    def work():
        try:
            signal.raise_signal(number)
        finally:
            if number != signal.SIGINT:
                signal.raise_signal(signal.SIGTERM)  # impatience does not end the clean-up
            cleaned.append(True)
    assert run_as_program(work) == code
    assert cleaned == [True]
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_a_signal_that_the_caller_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    assert run_as_program(lambda: signal.raise_signal(signal.SIGHUP)) == 0
    signal.signal(signal.SIGHUP, before)


def test_an_error_is_one_line_whatever_it_says(capsys):
    def work():
        raise UserError("a name\nwith \u2028 and \udce9")
    assert run_as_program(work) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
