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
        for name in ("NPROC", "SHARDS", *start.RANK_VARIABLES):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(start, "fetch", self.fetch)
        monkeypatch.setattr(start, "start_ranks", self.start_ranks)
        monkeypatch.setattr(os, "execv", self.execv)

    def fetch(self, track):
        self.fetched = track
        return 0

    def start_ranks(self, plan):
        self.processes = plan.processes
        self.command = [plan.script, *plan.flags]
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


def test_a_checkpoint_decides_track_and_device(launch, tmp_path):
    saved = {"hyperparameters": {"track": "fineweb", "device": "cpu"},
             "info": {"activations": "float32"}, "progress": {}, "model": {}, "optimizer": {}}
    torch.save(saved, tmp_path / "mine.pt")
    assert launch("--resume", str(tmp_path / "mine.pt"), gpus=8) == 0
    assert (launch.fetched, launch.processes) == ("fineweb", 1)


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
    assert launch(NPROC="8", gpus=4) == 2  # a process without a GPU
    assert launch("--device=cpu", NPROC="8", gpus=4) == 0
    assert launch.processes == 8


@pytest.mark.parametrize("value", ["0", "two", "-1", "1.5", " ", "\u00b2", "1" * 5000])
@pytest.mark.parametrize("variable", ["NPROC", "SHARDS"])
def test_a_bad_number_is_one_line(launch, monkeypatch, capsys, variable, value):
    monkeypatch.undo()
    monkeypatch.setenv(variable, value)
    assert run_as_program(start.start, ["--track", "fineweb", "--device", "cpu"]) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1 and variable in errors and value in errors


def test_a_process_has_the_cores_that_are_allotted(monkeypatch):
    """Not those of the machine; Slurm and containers allot fewer."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert [start.num_threads(processes) for processes in (1, 2, 4, 7)] == [6, 3, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert start.num_threads(2) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert start.num_threads(2) == 3


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


def test_an_edited_script_is_asked_for_its_track(launch, tmp_path):
    """It can have a track and flags of its own."""
    script = tmp_path / "my idea.py"
    text = (ROOT / "train_gpt.py").read_text()
    begin = "class Hyperparameters:\n"
    assert text.count(begin) == 1
    script.write_text(text.replace(begin, begin + "    my_flag: int = setting(1, 'mine')\n"))
    assert launch(str(script), "--my_flag=2", "--track=fineweb", gpus=2) == 0
    assert (launch.fetched, launch.processes) == ("fineweb", 2)
    assert launch.command == [str(script), "--my_flag=2", "--track=fineweb"]
    assert launch("--my_flag=2") == 2


def test_the_script_of_an_entry_by_its_path(launch):
    entry = "records/published/2024-06-06_AdamW/train_gpt.py"
    assert launch(str(ROOT / entry), "--seed=3") == 0
    assert launch.command == [entry, "--track", "laptop", "--seed=3"]


NO_SCRIPTS = {
    "syntax": "def parse_arguments(:\n",
    "null": "\0",
    "other": "open('executed', 'w')\n",
    "missing": None}


@pytest.mark.parametrize("kind", NO_SCRIPTS)
def test_what_is_no_training_script_is_neither_run_nor_fetched_for(
        launch, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "idea.py"
    if NO_SCRIPTS[kind] is not None:
        script.write_text(NO_SCRIPTS[kind])
    assert launch(str(script)) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1 and str(script) in errors
    assert launch.fetched is None and not (tmp_path / "executed").exists()


def test_a_script_that_belongs_to_another_folder_is_refused(launch, tmp_path, capsys):
    script = tmp_path / "train_gpt.py"
    script.write_text((ROOT / "train_gpt.py").read_text() + f"ROOT = Path({str(tmp_path)!r})\n")
    assert launch(str(script)) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1 and str(tmp_path) in errors and str(ROOT) in errors
    assert launch.fetched is None


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
    device = "cpu"

def parse_arguments(flags):
    return Settings()

def check_hyperparameters(settings, processes):
    pass

if __name__ == "__main__":
"""


def write_script(project, body, name="train_gpt.py"):
    """A train_gpt.py, or an edited one, that accepts all flags and does what body says."""
    (project / name).write_text(SCRIPT + textwrap.indent(body, "    "))


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


def test_a_link_that_goes_up_from_a_linked_folder(project, tmp_path):
    """The shell's own idea of `..` would lead to another folder."""
    write_script(project, "import os\nprint(os.getcwd())\n")
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "project").mkdir()  # the other folder
    (tmp_path / "real" / "project").symlink_to(project)
    (tmp_path / "real" / "sub" / "go").symlink_to("../project/run.sh")
    (tmp_path / "short").symlink_to("real/sub")
    process = begin(["short/go"], tmp_path, CDPATH=str(tmp_path / "real"))
    out, errors = process.communicate(timeout=HANG)
    assert (process.returncode, errors) == (0, "")
    assert out.splitlines()[-1] == str(project)


def test_a_copy_of_run_sh_touches_nothing_in_another_project(project, tmp_path):
    other = tmp_path / "other"
    (other / ".venv").mkdir(parents=True)
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(project / name, other)
    shutil.copy(project / "run.sh", other / ".venv" / "requirements.txt")  # other requirements
    process = begin(["./run.sh"], other, PYTHON="")
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1 and str(other) in errors
    assert [path.name for path in (other / ".venv").iterdir()] == ["requirements.txt"]


@pytest.mark.parametrize("name, processes", [
    ("my idea.py", "1"),
    pytest.param("-i'd\u00e9\"a.py", "1", marks=pytest.mark.slow),
    pytest.param("-i'd\u00e9\"a.py", "2", marks=pytest.mark.slow)])
def test_an_edited_script_runs_as_train_gpt_does(project, tmp_path, name, processes):
    """Its path is relative to the caller's folder, else to the project's."""
    body = "import os, sys\nprint(os.environ.get('RANK', '0'), *sys.argv, sep='|')\n"
    write_script(project, body, name)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    mine = f"./{name}" if name.startswith("-") else name
    theirs = f"{elsewhere}/{name}"
    for folder, expected in ((project, mine), (elsewhere, mine), (elsewhere, theirs)):
        if expected == theirs:
            shutil.copy(project / name, elsewhere)
        process = begin([project / "run.sh", name, "--entry", "two words"], folder, NPROC=processes)
        out, errors = process.communicate(timeout=HANG)
        assert (process.returncode, errors) == (0, "")
        data, *lines = out.splitlines()
        assert data == "the data is there"
        ranks = [f"{rank}|{expected}|--entry|two words" for rank in range(int(processes))]
        assert sorted(lines) == ranks


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
@pytest.mark.parametrize("number, to_all", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_ends_a_download(project, number, to_all):
    """Ctrl-C goes to all processes of the terminal, SIGTERM to one."""
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
    if to_all:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, errors = process.communicate(timeout=HANG)  # both processes have closed their outputs
    assert process.returncode == 128 + number
    assert out == "" and 1 <= len(errors.splitlines()) <= 2


OTHER_LAUNCHER = {
    "RANK": "1", "LOCAL_RANK": "x", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "", "MASTER_PORT": "1",
    "MASTER_ADDR": "no-such-host.invalid", "PET_NNODES": "2", "GLOO_SOCKET_IFNAME": "no-such"}


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_another_launchers_variables_change_nothing(project, processes):
    write_script(project, "import os, sys\n"
        "if 'RANK' in os.environ:\n"
        "    import torch.distributed as dist\n"
        "    dist.init_process_group('gloo')\n"
        "    dist.barrier()\n"
        "ranks = [os.environ.get(name) for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')]\n"
        "sys.stdout.write(f'{ranks}\\n')\n")
    process = begin(["./run.sh"], project, NPROC=processes, **OTHER_LAUNCHER)
    out, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors
    assert len(errors.splitlines()) == 1 and "WORLD_SIZE" in errors  # it is said
    expected = {"1": [[None, None, None]], "2": [["0", "0", "2"], ["1", "1", "2"]]}
    assert sorted(out.splitlines()[1:]) == [str(ranks) for ranks in expected[processes]]


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [True, False])
def test_a_lost_connection_stops_the_ranks_unless_nohup_is_used(project, ignored):
    """Other signals that job systems send stop them, too."""
    write_script(project, "import os, signal, sys, time\n"
        "for name in ('SIGHUP', 'SIGUSR1'):\n"
        "    number = getattr(signal, name)\n"
        "    if signal.getsignal(number) != signal.SIG_IGN:\n"
        "        signal.signal(number, lambda number, frame: sys.exit(128 + number))\n"
        "sys.stdout.write('started\\n')\n"
        "sys.stdout.flush()\n"
        "for _ in range(1000):\n"
        "    time.sleep(1)\n")
    words = ["bash", "-c", "trap '' HUP; exec ./run.sh"] if ignored else ["./run.sh"]
    process = begin(words, project, NPROC="2")
    for line in ["the data is there", "started", "started"]:
        assert process.stdout.readline().strip() == line
    os.killpg(process.pid, signal.SIGHUP)
    if ignored:
        os.killpg(process.pid, signal.SIGUSR1)
    _, errors = process.communicate(timeout=HANG)
    expected = signal.SIGUSR1 if ignored else signal.SIGHUP
    assert (process.returncode, errors) == (128 + expected, "")


def unshare(words, command, project):
    """run.sh with two processes after a command, in namespaces of its own."""
    if subprocess.run(["unshare", *words, "true"], capture_output=True).returncode:
        pytest.skip("unshare is not allowed here")
    write_script(project, "import os, sys\nsys.stdout.write(f'rank {os.environ[\"RANK\"]}\\n')\n")
    process = begin(["unshare", *words, "bash", "-c", f"{command} && ./run.sh"], project, NPROC="2")
    out, errors = process.communicate(timeout=HANG)
    return process.returncode, out.splitlines(), errors


@pytest.mark.slow
def test_no_name_of_the_machine_resolves(project, tmp_path):
    (tmp_path / "hosts").touch()
    command = f"mount --bind {tmp_path}/hosts /etc/hosts && hostname no-such-host.invalid"
    code, lines, errors = unshare(["-u", "-m"], command, project)
    assert code == 0, errors
    assert {"rank 0", "rank 1"} <= set(lines)


@pytest.mark.slow
def test_without_a_loopback_interface_it_is_one_line(project):
    code, _, errors = unshare(["-n"], "true", project)
    assert code == 2
    assert len(errors.splitlines()) == 1 and "127.0.0.1" in errors and "NPROC" in errors


FAKE_PYTHON = """#!/bin/bash
# Pretends to be Python: makes a .venv with a copy of itself, installs nothing. The file `missing`
# holds the packages that it lacks; while there is a file `offline`, pip fails.
case $1 in
    -c) [[ ! -f missing ]] || cat missing ;;
    -m)
        [[ $2 != pip || ! -f offline ]] || exit 1
        if [[ $2 == venv ]]; then
            mkdir -p "$3/bin"
            cp "$0" "$3/bin/python"
        else
            echo "$*" >>calls
        fi
        ;;
esac
"""


@pytest.fixture
def programs(project, tmp_path):
    """A folder for PATH with no other programs than these; cmp, for example, is missing in small
    images."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "readlink", "rm", "cp", "cat", "mkdir"):
        (folder / name).symlink_to(shutil.which(name))
    (folder / "python3").write_text(FAKE_PYTHON)
    (folder / "python3").chmod(0o755)
    return folder


@pytest.fixture
def set_up(project, programs):
    """set_up() -> the exit code of run.sh, its errors, and how often it called pip."""
    def set_up():
        (project / "calls").write_text("")
        process = begin(["bash", "./run.sh", "compare", "a b"], project,
                        PATH=str(programs), PYTHON="")
        _, errors = process.communicate(timeout=HANG)
        calls = (project / "calls").read_text().splitlines()
        if process.returncode == 0:
            assert calls[-1] == "-m tools.compare a b"
        return process.returncode, errors, sum("pip install" in call for call in calls)
    return set_up


DONE = (0, "", 1)  # what set_up() returns
KEPT = (0, "", 0)


def require_another_package(project):
    with (project / "requirements.txt").open("a") as file:
        file.write("another-package==1.0\n")


def test_the_venv_is_set_up_once_and_again_when_the_requirements_change(project, set_up):
    kept = project / ".venv" / ".mine"
    assert set_up() == DONE
    kept.touch()
    assert set_up() == KEPT
    assert kept.exists()
    require_another_package(project)
    assert set_up() == DONE
    assert not kept.exists()


def test_an_interrupted_or_broken_set_up_is_repeated(project, set_up):
    (project / "offline").touch()
    assert set_up()[0] == 2
    (project / "offline").unlink()
    assert set_up() == DONE
    python = project / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("a Python that was upgraded")
    assert set_up() == DONE
    assert set_up() == KEPT


def test_a_set_up_that_runs_is_left_alone(project, set_up):
    (project / "offline").touch()
    assert set_up()[0] == 2
    (project / "offline").unlink()
    (mark,) = (project / ".venv").glob("*.sh")
    mark.write_text(f"{os.getpid()}\n")
    code, errors, calls = set_up()
    assert (code, calls) == (2, 0)
    assert len(errors.splitlines()) == 1 and str(os.getpid()) in errors


def test_the_venv_of_an_earlier_run_sh_is_its_own(project, set_up, programs):
    """Earlier ones wrote only the copy of requirements.txt."""
    (project / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(programs / "python3", project / ".venv" / "bin" / "python")
    shutil.copy(project / "requirements.txt", project / ".venv")
    assert set_up() == KEPT
    require_another_package(project)
    assert set_up() == DONE


def make_another_venv(project, programs, kind):
    """A .venv that run.sh did not make. Returns the folder in which its Python lies."""
    venv = project / ".venv"
    if kind == "file":
        venv.touch()
        return None
    if kind == "dangling link":
        venv.symlink_to("nowhere")
        return None
    if kind != "folder":  # a link to one that run.sh made, perhaps that of another project
        target = project.parent / "another venv"
        target.mkdir()
        (target / "requirements.txt").write_text("another-package\n")
        (target / "made_by_run.sh").touch()
        venv.symlink_to(target)
    (venv / "bin").mkdir(parents=True)
    (venv / "mine").touch()
    if kind != "empty link":
        shutil.copy(programs / "python3", venv / "bin" / "python")
    return venv


def tree(folder):
    """All paths in a folder, with links as links."""
    return {path: os.readlink(path) if path.is_symlink() else path.is_dir()
            for path in sorted(folder.rglob("*")) if path.name != "calls"}


@pytest.mark.parametrize("kind", ["folder", "link", "empty link", "file", "dangling link"])
def test_another_venv_is_used_as_it_is_or_refused(project, set_up, programs, kind):
    venv = make_another_venv(project, programs, kind)
    (project / "missing").write_text("tiktoken")
    before = tree(project.parent)
    code, errors, calls = set_up()
    assert (code, calls) == (2, 0)
    assert len(errors.splitlines()) == 1 and ".venv" in errors and "PYTHON" in errors
    if venv and kind != "empty link":
        assert "tiktoken" in errors
        (project / "missing").write_text("")
        assert set_up() == KEPT
        require_another_package(project)
        assert set_up() == KEPT
        (project / "missing").write_text("tiktoken")
    assert tree(project.parent) == before


def test_the_packages_of_another_venv_are_looked_up(project):
    """With the Python of these tests, which has all packages."""
    (project / ".venv").symlink_to(sys.prefix)
    write_script(project, "print('ran')\n")
    process = begin(["./run.sh"], project, PYTHON="")
    out, errors = process.communicate(timeout=HANG)
    assert (process.returncode, errors) == (0, "")
    assert out.splitlines()[-1] == "ran"
    require_another_package(project)
    process = begin(["./run.sh"], project, PYTHON="")
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1 and "another-package" in errors


def test_an_empty_folder_is_free_for_a_set_up(project, set_up):
    """Such as the mount point of a volume, which can't be deleted."""
    (project / ".venv").mkdir()
    assert set_up() == DONE


@pytest.mark.parametrize("value", ["no-such-python", "./no-such-python", "/dev/null", " ", "ls"])
def test_a_python_that_is_none_is_one_line(project, value):
    process = begin(["./run.sh"], project, PYTHON=value)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1 and value in errors
    assert not (project / ".venv").exists()


def test_an_unknown_command_is_one_line(project):
    for word in ("tset", "no such script.py"):
        process = begin(["./run.sh", word, "--num_steps=3"], project)
        _, errors = process.communicate(timeout=HANG)
        assert process.returncode == 2
        assert len(errors.splitlines()) == 1 and word in errors


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
