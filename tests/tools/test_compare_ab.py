"""`ab` runs two scripts alternately and continues where it was interrupted."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from made_logs import main

from tools import start
from tools.compare import ab

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

# A script that writes a log like the training script's, and notes that it ran.
SCRIPT = '''
import os, sys, time
from pathlib import Path

class UserError(Exception):
    pass

class Settings:
    track, device = "none", "cpu"

def parse_arguments(flags):
    if "--wrong" in flags:
        raise UserError("--wrong is wrong")
    return Settings()

def check_hyperparameters(settings, processes):
    pass

def main():
    folder, name, loss, ms = Path({folder!r}), {name!r}, {loss}, {ms}
    seed = int(sys.argv[-1].partition("=")[2])
    rank = os.environ.get("RANK", "0")
    ranks = os.environ.get("WORLD_SIZE", "1")
    if rank == "0":
        with open(folder / "order", "a") as file:
            print(name, seed, *sys.argv[1:-1], file=file)
        path = folder / f"{{name}}{{seed}} of {{ranks}} \u00e9.txt"
        sys.stdout.write(f"track laptop, 1 x CPU, log: {{path}}\\n")
        lines = [f"# {{name}}", "=" * 100,
                 f"Running PyTorch 2.13.0 on CPU with world_size {{ranks}}", "=" * 100,
                 f"step:9/9 val_loss:{{loss + seed / 1e4:.4f}} train_time:{{ms + seed}}ms"]
        path.write_text("\\n".join(lines) + "\\n")
    if "--hang" in sys.argv:
        (folder / f"pid{{rank}}").write_text(str(os.getpid()))
        sys.stdout.write("hanging\\n")
        sys.stdout.flush()
        time.sleep(100_000)

if __name__ == "__main__":
    main()
'''


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A baseline and a faster candidate; ab keeps its state below the folder of both."""
    paths = []
    for name, ms in (("A", 2000), ("B", 1000)):
        path = tmp_path / f"{name}.py"
        path.write_text(SCRIPT.format(folder=str(tmp_path), name=name, loss=3.2, ms=ms))
        paths.append(path)
    monkeypatch.setattr("tools.compare.ab.ROOT", tmp_path)
    monkeypatch.setenv("NPROC", "1")
    return paths


def ran(folder):
    """What ran since the last call: a line for each run."""
    order = folder / "order"
    lines = order.read_text().splitlines() if order.exists() else []
    order.unlink(missing_ok=True)
    return lines


def test_both_scripts_run_alternately_and_complete_runs_are_kept(tmp_path, scripts):
    command = ["ab", *scripts, "--runs", 3]
    flags = ["--", "--track", "laptop"]
    every = [f"{name} {seed} --track laptop" for seed in range(3) for name in "AB"]
    assert main(*command, *flags) == 0 and ran(tmp_path) == every
    assert main(*command, *flags) == 0 and ran(tmp_path) == []
    (tmp_path / "B1 of 1 \u00e9.txt").write_text("cut")
    (tmp_path / "A2 of 1 \u00e9.txt").unlink()
    assert main(*command, *flags) == 0 and ran(tmp_path) == [every[3], every[4]]
    scripts[1].write_text(scripts[1].read_text() + "# corrected\n")
    assert main(*command, *flags) == 0 and ran(tmp_path) == every[1::2]
    assert main(*command, "--fresh", *flags) == 0 and ran(tmp_path) == every
    assert main(*command, "--", "--track", "fineweb") == 0 and len(ran(tmp_path)) == 6


def test_runs_with_another_number_of_processes_are_kept_apart(
        tmp_path, scripts, monkeypatch, capsys):
    command = ["ab", *scripts, "--runs", 2]
    for processes in ("2", "1", "2"):
        monkeypatch.setenv("NPROC", processes)
        known = len(list(tmp_path.glob(f"* of {processes} *.txt")))
        capsys.readouterr()
        assert main(*command) == 0
        lines = capsys.readouterr().out.splitlines()
        assert processes in lines[0].split()  # the first line says how many
        devices = f"{processes} x CPU"
        assert any(line.count(devices) == 2 for line in lines)  # the verdict, of both sides
        assert len(ran(tmp_path)) == (0 if known else 4)
        assert len(list(tmp_path.glob(f"* of {processes} *.txt"))) == 4


def test_runs_elsewhere_are_kept_apart(tmp_path, scripts, monkeypatch):
    command = ["ab", *scripts, "--runs", 1, "--systems-only", "--p", "0.4"]
    for variable, value in (("OMP_NUM_THREADS", "1"), ("OMP_NUM_THREADS", "2")):
        monkeypatch.setenv(variable, value)
        main(*command)
        assert len(ran(tmp_path)) == 2
    monkeypatch.setattr("train_gpt.device_name", lambda device: "another CPU")
    main(*command)
    assert len(ran(tmp_path)) == 2


def test_the_gpus_are_named(monkeypatch):
    """Another process asks for the model, so that this one takes no memory of a GPU."""
    asked = subprocess.CompletedProcess([], 0, stdout="NVIDIA H200\n")
    monkeypatch.setattr(start.subprocess, "run", lambda *args, **kwargs: asked)
    plan = start.Plan("train_gpt.py", [], "fineweb", processes=8, gpus=8)
    assert "8 x NVIDIA H200" in start.place_of(plan)
    assert start.place_of(plan) != start.place_of(plan._replace(processes=1))


def test_what_the_track_can_tell_is_read_from_the_study(tmp_path, scripts, capsys):
    table = tmp_path / ab.FIDELITY
    table.parent.mkdir(parents=True)
    table.write_text("track\tfamily\tideas\tsame_sign\tshown\n"
                     "none\tplanted\t7\t5\t3\nother\telsewhere\t9\t9\t9\n")
    assert main("ab", *scripts, "--runs", 2) == 0  # their track is called none
    lines = [line for line in capsys.readouterr().out.splitlines() if "planted" in line]
    assert len(lines) == 1 and {"5", "7", "3"} <= set(lines[0].split())
    assert ab.what_a_track_tells("fineweb") == ""


def test_the_consoles_encoding_does_not_hide_the_log(tmp_path, scripts):
    program = ("import sys; from pathlib import Path; from tools.compare import ab, main; "
               "ab.ROOT = Path(sys.argv[1]); sys.exit(main(sys.argv[2:]))")
    words = [str(tmp_path), "ab", *map(str, scripts), "--runs", "2"]
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_verdict_is_the_exit_code_and_a_failed_script_ends_it(tmp_path, scripts, capsys):
    assert main("ab", *reversed(scripts), "--runs", 3) == 1
    fails = scripts[1].read_text() + "    raise SystemExit(7)\n"
    for broken, named in ((fails, "7"), ("print('no script')", "parse_arguments")):
        scripts[1].write_text(broken)
        capsys.readouterr()
        assert main("ab", *scripts, "--runs", 3) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and str(scripts[1]) in errors and named in errors


@pytest.mark.parametrize("variable, value, flags", [
    ("NPROC", "two", []),
    ("SHARDS", "0", []),
    ("NPROC", "1", ["--", "--wrong"])])
def test_what_cant_start_is_one_line_before_the_first_run(
        tmp_path, scripts, monkeypatch, capsys, variable, value, flags):
    monkeypatch.setenv(variable, value)
    assert main("ab", *scripts, "--runs", 1, *flags) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and (flags[-1] if flags else variable) in errors
    assert ran(tmp_path) == []


@pytest.mark.parametrize("processes, number", [
    (1, signal.SIGINT), (1, signal.SIGHUP), (2, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_ends_all_processes_of_the_run_too(tmp_path, scripts, processes, number):
    program = ("import sys; from pathlib import Path; from tools.compare import ab, main; "
               "ab.ROOT = Path(sys.argv[1]); sys.exit(main(sys.argv[2:]))")
    words = [str(tmp_path), "ab", *map(str, scripts), "--runs", "1", "--", "--hang"]
    process = subprocess.Popen([sys.executable, "-c", program, *words], cwd=ROOT, text=True,
                               env={**os.environ, "NPROC": str(processes)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    hanging = 0
    while hanging < processes:
        hanging += process.stdout.readline() == "hanging\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and errors.count("\n") == 1
    for rank in range(processes):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)
