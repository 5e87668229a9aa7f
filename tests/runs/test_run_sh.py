"""run.sh and tools/start.py: set-up, which track, how many processes, and what a failed run says.

The processes that these tests start run a stub instead of train_gpt.py.
"""
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import train_gpt
from data import run_as_program
from tools import start

ROOT = Path(__file__).resolve().parents[2]
HANG = 300  # seconds after which a process counts as hung


# --- tools/start.py, in this process ---


class Ended(Exception):
    """What os.execv is replaced with: the process becomes another program."""


class Launch:
    """start.start on a machine with so many GPUs. It fetches nothing and starts no process."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.fetched = None   # the track
        self.command = None   # script and flags
        self.processes = None
        for name in ("NPROC", "SHARDS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(start, "fetch", self.fetch)
        monkeypatch.setattr(start, "start_ranks", self.start_ranks)
        monkeypatch.setattr(os, "execv", self.execv)

    def fetch(self, track):
        self.fetched = track
        return 0

    def start_ranks(self, processes, script, flags):
        self.processes = processes
        self.command = [script, *flags]
        return 0

    def execv(self, program, words):
        assert program == words[0] == sys.executable
        self.processes = 1
        self.command = words[1:]
        raise Ended

    def __call__(self, *words, gpus=0, **variables):
        for name, value in variables.items():
            self.monkeypatch.setenv(name, value)
        self.monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        self.monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        try:
            return run_as_program(start.start, list(words))
        except Ended:
            return 0


@pytest.fixture
def launch(monkeypatch):
    return Launch(monkeypatch)


@pytest.mark.parametrize("words, gpus, track, processes", [
    ([], 0, "laptop", 1),
    ([], 1, "fineweb", 1),
    ([], 8, "fineweb", 8),
    (["--device", "cpu"], 8, "laptop", 1),
    (["--device=cpu", "--track=fineweb"], 8, "fineweb", 1),
    (["--track", "laptop"], 8, "laptop", 8),
])
def test_track_and_number_of_processes(launch, words, gpus, track, processes):
    assert launch(*words, gpus=gpus) == 0
    assert launch.fetched == track
    assert launch.processes == processes
    assert launch.command == ["train_gpt.py", *words]


def test_a_checkpoint_decides_the_track(launch, monkeypatch):
    saved = {"hyperparameters": {"track": "fineweb"}, "info": {"activations": "float32"}}
    monkeypatch.setattr(train_gpt, "open_checkpoint", lambda path: saved)
    assert launch("--resume", "mine.pt") == 0
    assert launch.fetched == "fineweb"


@pytest.mark.parametrize("flag", ["--no_such_flag=1", "--num_steps=0"])
def test_wrong_flags_end_it_before_anything_is_fetched(launch, capsys, flag):
    assert launch(flag) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1 and flag.partition("=")[0] in errors
    assert launch.fetched is None and launch.command is None


def test_nproc(launch):
    assert launch(NPROC="2") == 0
    assert launch.processes == 2
    assert launch(NPROC="1", gpus=8) == 0
    assert launch.processes == 1
    assert launch(NPROC="", gpus=4) == 0  # empty is unset
    assert launch.processes == 4


@pytest.mark.parametrize("value", ["0", "two", "-1", "1.5"])
@pytest.mark.parametrize("variable", ["NPROC", "SHARDS"])
def test_a_bad_number_is_one_line(launch, monkeypatch, capsys, variable, value):
    monkeypatch.undo()
    monkeypatch.setenv(variable, value)
    assert run_as_program(start.start, ["--track", "fineweb", "--device", "cpu"]) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1 and variable in errors and value in errors


def test_the_data_commands(monkeypatch):
    commands = []

    class Process:
        def __init__(self, command):
            commands.append(command[1:])

        def wait(self):
            return 3
    monkeypatch.setattr(start.subprocess, "Popen", Process)
    monkeypatch.setenv("SHARDS", "2")
    assert start.fetch("laptop") == 3
    assert start.fetch("fineweb") == 3
    monkeypatch.delenv("SHARDS")
    assert start.fetch("fineweb") == 3
    assert start.fetch("mine") == 0
    assert start.fetch(None) == 0
    assert commands == [["-m", "data.laptop"], ["-m", "data.fineweb", "--shards", "2"],
                        ["-m", "data.fineweb", "--shards", "9"]]


def test_a_fetch_that_fails_ends_it(launch, monkeypatch):
    monkeypatch.setattr(start, "fetch", lambda track: 2)
    assert launch() == 2
    assert launch.command is None


def test_record(launch, monkeypatch, tmp_path, capsys):
    for entry in ("published/2024_A", "laptop/2026_B"):
        (tmp_path / "records" / entry).mkdir(parents=True)
        (tmp_path / "records" / entry / "train_gpt.py").touch()
    (tmp_path / "train_gpt.py").touch()
    monkeypatch.setattr(start, "ROOT", tmp_path)
    # a shell completes a folder's name with a slash
    for words in (["--record", "published/2024_A"], ["--record=published/2024_A/"]):
        assert launch(*words, "--track=laptop", "--seed", "-1") == 0
        expected = ["records/published/2024_A/train_gpt.py", "--track=laptop", "--seed", "-1"]
        assert launch.command == expected
    capsys.readouterr()
    for words in (["--record", "2024_A"], ["--record", ".."], ["--record="], ["--record"]):
        assert launch(*words) == 2
        errors = capsys.readouterr().err
        assert len(errors.splitlines()) == 1
        assert "published/2024_A" in errors and "laptop/2026_B" in errors


def test_help_is_that_of_the_script(launch):
    assert launch("--help") == 0
    assert launch.command == ["train_gpt.py", "--help"]
    assert launch.fetched is None


def test_without_torch_it_is_one_line(launch, monkeypatch, capsys):
    monkeypatch.setattr(start, "find_spec", lambda name: None)
    assert launch() == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1 and "torch" in errors


# --- run.sh, in a copy of the project ---


@pytest.fixture
def project(tmp_path):
    """A copy of the project in which train_gpt.py is a stub and no data is needed."""
    folder = tmp_path / "the project"
    (folder / "tools").mkdir(parents=True)
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("*.bin"))
    for path in (ROOT / "tools").glob("*.py"):
        shutil.copy(path, folder / "tools")
    (folder / "data" / "laptop.py").write_text("print('the data is there', flush=True)\n")
    return folder


SCRIPT = """
class UserError(Exception):
    pass

class Settings:
    track = "laptop"

def parse_arguments(flags):
    return Settings()

def check_hyperparameters(settings, processes):
    pass

if __name__ == "__main__":
"""


def write_script(project, body):
    """A train_gpt.py that accepts all flags and does what body says."""
    (project / "train_gpt.py").write_text(SCRIPT + textwrap.indent(body, "    "))


def begin(command, cwd, **variables):
    """run.sh in a process group of its own, as a terminal starts it."""
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
           "CUDA_VISIBLE_DEVICES": "", "NPROC": "1", **variables}
    return subprocess.Popen([str(word) for word in command], cwd=cwd, env=env, text=True,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_started_by_a_link_it_runs_in_its_own_folder(project, tmp_path):
    """The flags and the exit code pass through; the .venv beside the link is not touched."""
    write_script(project, "import os, sys\nprint(os.getcwd(), sys.argv)\nsys.exit(7)\n")
    other = tmp_path / "other"
    (other / ".venv").mkdir(parents=True)
    (other / "first").symlink_to("../the project/run.sh")
    (other / "second").symlink_to(other / "first")
    process = begin(["./second", "--track", "laptop", "--entry", "two words"], other)
    out, errors = process.communicate(timeout=HANG)
    assert (process.returncode, errors) == (7, "")
    data, script = out.splitlines()
    assert data == "the data is there"
    assert script == f"{project} {['train_gpt.py', '--track', 'laptop', '--entry', 'two words']}"
    assert sorted(path.name for path in other.iterdir()) == [".venv", "first", "second"]


# In each, the other rank waits until torchrun ends it.
FAILS = {
    "exit code": ("sys.exit(7)", 7, "rank 1"),
    "signal": ("os.kill(os.getpid(), signal.SIGKILL)", 128 + 9, "rank 1"),
    "user error": ("print('error: mine', file=sys.stderr), sys.exit(2)", 2, "mine"),
}


@pytest.mark.parametrize("kind", [
    "exit code",
    pytest.param("signal", marks=pytest.mark.slow),
    pytest.param("user error", marks=pytest.mark.slow)])
def test_a_rank_that_fails_is_named_in_one_line(project, kind):
    action, code, named = FAILS[kind]
    write_script(project, "import os, signal, sys, time\n"
        f"if os.environ['RANK'] == '1':\n    {action}\n"
        "time.sleep(1000)\n")
    process = begin(["./run.sh", "--track=laptop"], project, NPROC="2")
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == code
    assert len(errors.splitlines()) == 1 and named in errors


@pytest.mark.slow
def test_ranks_that_were_asked_to_stop_are_no_error(project):
    write_script(project, "import sys\nsys.exit(143)\n")
    process = begin(["./run.sh", "--track=laptop"], project, NPROC="2")
    _, errors = process.communicate(timeout=HANG)
    assert (process.returncode, errors) == (143, "")


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_ends_all_ranks(project, processes):
    write_script(project, "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *args: sys.exit(130))\n"
        "sys.stdout.write('started\\n')\n"
        "sys.stdout.flush()\n"
        "time.sleep(1000)\n"
        "print('went on')\n")
    process = begin(["./run.sh", "--track=laptop"], project, NPROC=processes)
    for line in ["the data is there", *["started"] * int(processes)]:
        assert process.stdout.readline().strip() == line
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=HANG)  # all ranks have closed their outputs
    assert process.returncode == 130
    assert (out, errors) == ("", "")


@pytest.mark.slow
def test_ctrl_c_ends_a_download(project):
    write_script(project, "print('trains')\n")
    (project / "data" / "laptop.py").write_text(
        "import sys, time\n"
        "from data import run_as_program\n"
        "def download():\n"
        "    print('downloads', flush=True)\n"
        "    time.sleep(1000)\n"
        "sys.exit(run_as_program(download))\n")
    process = begin(["./run.sh", "--track=laptop"], project)
    assert process.stdout.readline() == "downloads\n"
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert out == "" and len(errors.splitlines()) == 1


@pytest.mark.slow
def test_a_host_whose_name_does_not_resolve(project):
    if subprocess.run(["unshare", "-u", "true"], capture_output=True).returncode:
        pytest.skip("unshare is not allowed here")
    write_script(project, "import os, sys\nsys.stdout.write(f'rank {os.environ[\"RANK\"]}\\n')\n")
    command = "hostname no-such-host.invalid && ./run.sh --track=laptop"
    process = begin(["unshare", "-u", "bash", "-c", command], project, NPROC="2")
    out, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors
    assert {"rank 0", "rank 1"} <= set(out.splitlines())


FAKE_PYTHON = """#!/bin/bash
# Pretends to be Python: makes a .venv with a copy of itself, installs nothing.
if [[ $1 == -m && $2 == venv ]]; then
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
else
    echo "$*" >>calls
fi
"""


def test_the_venv_is_set_up_once_and_again_when_the_requirements_change(project, tmp_path):
    """On a path with no other programs than these; cmp, for example, is missing in small images."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "rm", "cp", "cat", "mkdir"):
        (programs / name).symlink_to(shutil.which(name))
    (programs / "python3").write_text(FAKE_PYTHON)
    (programs / "python3").chmod(0o755)
    kept = project / ".venv" / "mine"

    def run():
        """The number of times that pip was called."""
        (project / "calls").write_text("")
        process = begin(["bash", "./run.sh", "compare", "a b"], project,
                        PATH=str(programs), PYTHON="")
        _, errors = process.communicate(timeout=HANG)
        assert (process.returncode, errors) == (0, "")
        calls = (project / "calls").read_text().splitlines()
        assert calls[-1] == "-m tools.compare a b"
        return sum("pip install" in call for call in calls)

    assert run() == 1
    kept.touch()
    assert run() == 0
    assert kept.exists()
    with (project / "requirements.txt").open("a") as file:
        file.write("another-package==1.0\n")
    assert run() == 1
    assert not kept.exists()


def test_an_unknown_command_is_one_line(project):
    process = begin(["./run.sh", "tset", "--num_steps=3"], project)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1 and "tset" in errors


@pytest.mark.slow
def test_a_clone_with_autocrlf_starts(project, tmp_path):
    """The clone gets the .gitattributes and run.sh of this folder, committed or not."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a", "-c", "core.autocrlf=true"]
    shutil.copy(ROOT / ".gitattributes", project)
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"],
                  ["clone", "-q", ".", tmp_path / "clone"]):
        subprocess.run([*git, *words], cwd=project, check=True)
    process = begin(["./run.sh", "tset"], tmp_path / "clone")
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 2 and "tset" in errors


@pytest.mark.slow
def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "run.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
