"""A run that survives: kills, signals, lost ranks, full disks, numbers that are not finite, foreign checkpoints."""
import dataclasses
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import timeit
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from conftest import RECIPE, REPOSITORY, TINY, metric_lines, words

import train_gpt
from data.shards import write_shard
from records import compare
from train_gpt import Runtime, UserError, Watch

CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes by Linux's /proc")


def start(sandbox, *args, ranks=1, limit=None, env=None):
    """The script in the sandbox as a running process; limit: of the size of its files, in bytes."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen([*command, "train_gpt.py", "--track=laptop", *TINY, *args], cwd=sandbox.path, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
                            preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))


def wait_for(process, text):
    """Read the process's output up to the line that holds text."""
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"no {text!r}: {process.stderr.read()}")


def finish(process, seconds=60):
    """(output, errors); a process that outlives the time is killed with its children, which fails the test."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for pid in [*children(process.pid), process.pid]:
            os.kill(pid, signal.SIGKILL)
        raise


def scratch(sandbox):
    return sandbox.path / "records/scratch"


def checkpoints(sandbox):
    return sorted(scratch(sandbox).glob("*.pt"))


def weights(sandbox):
    return torch.load(checkpoints(sandbox)[-1], weights_only=True)["model"]


def test_killed_at_twenty_moments(sandbox):
    """SIGKILL, every second time in the middle of a save; the curve and the weights are those of an unharmed run."""
    flags = ["--num_steps=160", "--save_every=1", "--val_every=16"]
    unharmed = sandbox(*flags)
    assert unharmed.returncode == 0, unharmed.stderr
    wanted_lines, wanted = metric_lines(unharmed.stdout), weights(sandbox)
    shutil.rmtree(scratch(sandbox))
    moments = random.Random(0)
    process = start(sandbox, *flags)
    wait_for(process, "step000002.pt")
    for number in range(20):
        for _ in range(moments.randint(1, 4)):
            wait_for(process, "train_loss")
        if number % 2:  # a save writes a .tmp first
            while not list(scratch(sandbox).glob("*.tmp")) and process.poll() is None:
                pass
        else:
            time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
        process = start(sandbox, *flags, "--resume=latest")
        wait_for(process, "resumed from")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    (log,) = scratch(sandbox).glob("*.txt")
    by_step = {line.split(":", 2)[1] + line.split(" ")[1].split(":")[0]: line for line in metric_lines(log.read_text())}
    assert sorted(by_step.values()) == sorted(wanted_lines)  # and what was done twice gave the same line twice
    assert set(metric_lines(log.read_text())) == set(wanted_lines)
    for name, value in weights(sandbox).items():
        assert torch.equal(value, wanted[name]), name
    assert log.read_text().count("\nresumed from") == 20 and len(checkpoints(sandbox)) == 2
    (run,) = compare.read_log(str(log))
    assert run.complete and run.restart_step == 0 and [step for step, _, _ in run.curve] == list(range(16, 161, 16))
    last = re.findall(r"^step:160/160 val_loss:\S+ train_time:(\d+)ms", log.read_text(), re.M)[-1]
    times = [float(ms) for ms in re.findall(r"train_loss:\S+ train_time:(\d+)ms", log.read_text())]
    assert run.train_time_ms == float(last) == max(times + [float(last)])  # goes on from the checkpoint's


@pytest.mark.parametrize("tables, flags, saved", [
    ("sandbox", ["--num_steps=6", "--save_every=3"], 3), ("recipe_sandbox", ["--save_every=6", "--val_every=0"], 6)])
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_another_number_of_ranks(request, tables, flags, saved, before, after):
    """The recipe's checkpoint is from the middle of its second stage, before the untying."""
    sandbox = request.getfixturevalue(tables)
    whole = sandbox(*flags, "--keep=9", ranks=before)
    assert whole.returncode == 0, whole.stderr
    for path in checkpoints(sandbox):
        if not path.name.endswith(f"_step{saved:06d}.pt"):
            path.unlink()
    done = sandbox(*flags, "--resume=latest", ranks=after)
    assert done.returncode == 0 and f"at step {saved}" in done.stdout, done.stderr
    wanted, found = ({line.split(" ")[0]: float(line.split("loss:")[1]) for line in metric_lines(run.stdout)}
                     for run in (whole, done))
    assert len(found) >= 3 and all(found[step] == pytest.approx(wanted[step], abs=5e-3) for step in found)


class Home:
    """A folder in which the script runs in this process, with the full recipe's tables on bytes."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder / "records/scratch", capsys

    def __call__(self, *flags):
        """(exit code, lines of losses) of a run."""
        code = train_gpt.main(["--track=laptop", *RECIPE, *flags])
        return code, metric_lines(self.capsys.readouterr().out)

    def checkpoint(self, step):
        (path,) = self.folder.glob(f"*_step{step:06d}.pt")
        return path


@pytest.fixture
def home(tmp_path, monkeypatch, capsys, recipe):
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    track = dataclasses.replace(train_gpt.TRACKS["laptop"], val_tokens=4096)
    monkeypatch.setitem(train_gpt.TRACKS, "laptop", track)
    monkeypatch.setattr(train_gpt, "_output_of", lambda *command: "")
    write_shard(tmp_path / "data/laptop/laptop_val_000000.bin", words(4097, seed=1))
    write_shard(tmp_path / "data/laptop/laptop_train_000001.bin", words(20_000, seed=2))
    return Home(tmp_path, capsys)


def assert_same_state(path, wanted):
    """Two checkpoints: weights and optimizer, bit for bit."""
    found, wanted = (torch.load(file, weights_only=True) for file in (path, wanted))
    assert found["model"].keys() == wanted["model"].keys()
    for name, value in wanted["model"].items():
        assert torch.equal(value, found["model"][name]), name
    assert found["optimizer"]["num_updates"] == wanted["optimizer"]["num_updates"]
    for a, b in zip(found["optimizer"]["buckets"], wanted["optimizer"]["buckets"], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_prompt_is_continued_from_a_checkpoint(home, monkeypatch, capsys):
    """Without data, log and training; with the checkpoint's settings, and what its step's stage says: while head and
    embedding are tied, the embedding's own matrix holds nothing."""
    assert home("--save_every=2", "--keep=9", "--seed=5")[0] == 0
    shutil.rmtree(home.folder.parents[1] / "data")
    before, seen, forward = sorted(home.folder.iterdir()), [], train_gpt.GPT.forward
    monkeypatch.setattr(train_gpt.GPT, "forward", lambda model, *args: seen.append(
        (args[-1].step, args[-1].tied, model.hp.seed)) or forward(model, *args))

    def text(*flags):
        assert train_gpt.main(["--track=laptop", "--prompt=äb", *flags]) == 0
        return capsys.readouterr().out

    for step, tied in ((2, True), (14, False)):
        path = home.checkpoint(step)
        seen.clear()
        written = text("--sample_tokens=30", f"--resume={path}")
        assert seen == [(step, tied, 5)] * 30 and written.startswith("äb") and len(written) > 4
        os.utime(path)  # the newest
        assert text("--sample_tokens=30", "--resume=latest") == written
        assert text("--sample_tokens=0", f"--resume={path}") == "äb\n"
    assert sorted(home.folder.iterdir()) == before


def test_a_prompt_takes_the_latest_checkpoint_and_a_seed(home, capsys):
    """Codes that a terminal would obey are written out, as an untrained model writes them."""
    assert home("--save_every=2")[0] == 0

    def text(*flags):
        assert train_gpt.main(["--prompt=\x1b[31m", "--sample_tokens=60", *flags]) == 0
        return capsys.readouterr().out
    written = text()
    assert written == text("--resume=latest") and text("--seed=3") not in (written, text("--seed=4"))
    assert written.startswith("\\x1b[31m") and all(c.isprintable() or c in "\n\t" for c in written)


@pytest.mark.parametrize("flags", [[], ["--resume=nowhere.pt"], ["--resume=latest"]])
def test_a_prompt_without_a_checkpoint_is_one_line(home, capsys, flags):
    assert train_gpt.main(["--track=laptop", "--prompt=x", *flags]) == 2
    out, errors = capsys.readouterr()
    assert not out and errors.startswith("error: ") and errors.count("\n") == 1 and "--resume" in errors + str(flags)
    assert not home.folder.exists()


def test_a_run_of_all_stages_resumes_exactly(home):
    """In the middle of a stage, at the step of the untying and after it; and where a save is due at an odd step, at
    which Adam holds the gradients of one step, it is made at the next one."""
    code, lines = home("--save_every=5", "--keep=9")  # due at 5, 10; made at 6 and 10
    assert code == 0 and [path.stem[-2:] for path in sorted(home.folder.glob("*.pt"))] == ["06", "10"]
    for path in home.folder.glob("*.pt"):
        path.unlink()
    code, again = home("--save_every=2", "--keep=9")
    assert code == 0 and again == lines and len(list(home.folder.glob("*.pt"))) == 7
    last = home.checkpoint(14).rename(home.folder / "whole.kept")
    untied = torch.load(home.checkpoint(8), weights_only=True)["model"]
    assert torch.equal(untied["embed.weight"], untied["head.linear.weight"][0])
    for step in (6, 8, 10):
        code, after = home("--save_every=14", "--keep=9", f"--resume={home.checkpoint(step)}")
        assert code == 0 and after == lines[-len(after):]
        steps = [line.split()[0] for line in after if "train_loss" in line]
        assert steps == [f"step:{i}/14" for i in range(step + 1, 15)]
        assert_same_state(home.checkpoint(14), last)
        home.checkpoint(14).unlink()


def test_a_signal_ends_a_run_where_adam_holds_no_gradient(home, monkeypatch):
    """It comes in step 6; the run ends before step 8, not 7, and resumes exactly: at the untying."""
    code, lines = home("--save_every=14")
    last = home.checkpoint(14).rename(home.folder / "whole.kept")
    training_step = train_gpt.training_step

    def interrupted(model, optimizer, batch, schedule):
        if schedule.step == optimizer.num_updates == 6:  # not in the warm-up
            signal.raise_signal(signal.SIGTERM)
        return training_step(model, optimizer, batch, schedule)
    monkeypatch.setattr(train_gpt, "training_step", interrupted)
    code, before = home()
    assert code == 128 + signal.SIGTERM and before == lines[:len(before)] and before[-1].startswith("step:8/")
    monkeypatch.setattr(train_gpt, "training_step", training_step)
    code, after = home("--save_every=14", f"--resume={home.checkpoint(8)}")
    assert code == 0 and before + after == lines
    assert_same_state(home.checkpoint(14), last)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_run_with_a_checkpoint(sandbox, number):
    flags = ["--num_steps=120", "--val_every=30"]
    whole = sandbox(*flags)
    shutil.rmtree(scratch(sandbox))
    process = start(sandbox, *flags)
    wait_for(process, "step:40/")
    process.send_signal(number)
    out, errors = process.communicate()
    assert process.returncode == 128 + number and "Traceback" not in errors
    (path,) = checkpoints(sandbox)
    assert f"run ended by {number.name}" in out
    command = out[out.index("go on with: ") + 12:].splitlines()[0]  # whole: it needs no more flags
    assert command == f"{sys.executable} train_gpt.py --resume {path}"
    done = subprocess.run(command.split(), cwd=sandbox.path, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    (log,) = scratch(sandbox).glob("*.txt")
    assert metric_lines(log.read_text()) == metric_lines(whole.stdout)  # no line twice, none lost


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_compiling_ends_at_once(sandbox, number, tmp_path):
    """There is nothing to save, and the compiler's traceback would say nothing."""
    process = start(sandbox, "--compile=on", env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cold")})
    wait_for(process, "compiling")
    time.sleep(3)
    process.send_signal(number)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert errors.splitlines()[-1] == f"run ended at once by {number.name}, without a checkpoint"
    assert "compiled in" not in out and not checkpoints(sandbox)
    (log,) = scratch(sandbox).glob("*.txt")
    assert log.read_text().endswith(f"\nrun ended at once by {number.name}, without a checkpoint\n")


def test_ctrl_c_during_the_imports_is_no_traceback(sandbox):
    source = (sandbox.path / "train_gpt.py").read_text()
    (sandbox.path / "train_gpt.py").write_text(source.replace(
        "    import numpy as np\n", "    print('importing', flush=True); time.sleep(30)\n", 1))
    process = start(sandbox)
    wait_for(process, "importing")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == ("", "") and process.returncode == -signal.SIGINT


def test_resume_takes_the_checkpoints_settings(sandbox):
    """Where no flag is given: those of the model, of the work, and how often it validates, logs, saves."""
    flags = ["--track=laptop", *TINY, "--seed=4", "--val_every=2", "--num_steps=8"]
    bare = lambda *words: sandbox(*words, tiny=[])  # noqa: E731
    whole = sandbox("--seed=4", "--val_every=2", "--num_steps=8", "--save_every=4", "--keep=9")
    assert whole.returncode == 0, whole.stderr
    four, eight = checkpoints(sandbox)
    eight.unlink()
    settings = train_gpt.parse_arguments([f"--resume={four}"])
    assert dataclasses.replace(settings, resume="", save_every=0, keep=2) == train_gpt.parse_arguments(flags)
    assert train_gpt.parse_arguments([f"--resume={four}", "--val_every=1", "--seed=5"]) == dataclasses.replace(
        settings, val_every=1, seed=5)
    done = bare("--resume", four)
    lines = metric_lines(whole.stdout)
    assert done.returncode == 0 and metric_lines(done.stdout) == lines[-len(metric_lines(done.stdout)):], done.stderr
    assert [line.split()[0] for line in metric_lines(done.stdout) if "val_loss" in line] == ["step:6/8", "step:8/8"]
    assert checkpoints(sandbox)[-1].stem.endswith("_step000008")  # saved again, as --save_every 4 says


def test_a_finished_run_that_goes_on_is_said(sandbox):
    assert sandbox("--save_every=3").returncode == 0
    checkpoints(sandbox)[-1].unlink()
    done = sandbox("--resume=latest", tiny=[])
    assert "resumed from" in done.stdout and "this run was finished" in done.stdout
    unfinished = scratch(sandbox) / next(scratch(sandbox).glob("*.txt")).name
    unfinished.write_text(unfinished.read_text().split("\ntarget 1.1: missed")[0] + "\n")
    assert "this run was finished" not in sandbox("--resume=latest", tiny=[]).stdout


def test_latest_says_which_run_it_took_and_what_others_there_are(sandbox):
    for seed in (1, 2):
        assert sandbox("--save_every=6", f"--seed={seed}").returncode == 0
    older, newer = sorted(checkpoints(sandbox), key=os.path.getmtime)
    done = sandbox("--resume=latest", tiny=[])
    assert (f"resumed from {newer} at step 6\nother runs with checkpoints there: {older.stem[:-11]}\n"
            in done.stdout), done.stdout
    newer.rename(newer.with_name("other-" + newer.name))  # of another track
    done = sandbox("--resume=latest", tiny=[])  # the sandbox names the track
    assert f"resumed from {older} at step 6" in done.stdout, done.stderr


def test_a_shorter_rest_differs_in_the_steps_alone(sandbox):
    """What was scaled to a run's steps is the checkpoint's."""
    assert sandbox("--save_every=3", "--num_steps=12").returncode == 0
    done = sandbox("--num_steps=9", f"--resume={checkpoints(sandbox)[0]}", tiny=[])
    assert done.returncode == 2 and done.stderr.count("its ") == 1 and "its num_steps is 12, here 9;" in done.stderr


@pytest.mark.parametrize("stall, threads", [(0.0, 2), (0.02, 1)])
def test_one_thread_where_two_wait_for_each_other(monkeypatch, stall, threads):
    """A clock on which a product takes a millisecond with one thread, half of that with two, and a wait now and then."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    state, products = SimpleNamespace(threads=2, clock=0.0), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: state.threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(state, "threads", n))

    def timed(function, number):
        products.append(number)
        wait = stall * number if state.threads == 2 and len(products) % 7 == 0 else 0
        return number * 0.001 / state.threads + wait
    monkeypatch.setattr(timeit, "timeit", timed)
    monkeypatch.setattr(timeit, "repeat", lambda function, number, repeat: [timed(function, number)] * repeat)
    train_gpt.choose_threads()
    assert state.threads == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    products.clear()
    train_gpt.choose_threads()
    assert not products


def test_settings_that_no_flag_may_have_are_not_taken(sandbox, tmp_path):
    """Those that are no flags are left out, values that a flag would refuse are refused."""
    assert sandbox("--save_every=6").returncode == 0
    (path,), odd = checkpoints(sandbox), str(tmp_path / "odd.pt")
    saved, wanted = torch.load(path, weights_only=True), train_gpt.parse_arguments(["--track=laptop"])
    saved["hyperparameters"] = {"resume_anyway": True, "profile": True, "resume": "x", "unknown": 1}
    torch.save(saved, odd)
    found = train_gpt.parse_arguments(["--track=laptop", f"--resume={odd}"])
    assert found == dataclasses.replace(wanted, resume=odd, dtype="float32")
    for name, value in (("track", "moon"), ("num_steps", "many"), ("device", "abacus")):
        saved["hyperparameters"] = {name: value}
        torch.save(saved, odd)
        with pytest.raises(UserError, match=f"odd.pt.*--{name}.*{value}"):
            train_gpt.parse_arguments(["--track=laptop", f"--resume={odd}"])


@LINUX
def test_a_terminal_shows_what_goes_on_and_keeps_none_of_it(sandbox):
    """Steps and the time that is left, seconds of the validation; each covered by the next line. The log has none."""
    source = (sandbox.path / "train_gpt.py").read_text()
    source = source.replace("    optimizer.step(schedule)\n", "    optimizer.step(schedule); time.sleep(0.6)\n", 1)
    source = source.replace("    num_sequences = TRACKS", "    time.sleep(1.2)\n    num_sequences = TRACKS", 1)
    (sandbox.path / "train_gpt.py").write_text(source)
    shown, terminal = os.openpty()
    process = subprocess.Popen([sys.executable, "train_gpt.py", "--track=laptop", *TINY, "--log_every=0"],
                               cwd=sandbox.path, stdout=terminal, stderr=subprocess.STDOUT)
    os.close(terminal)
    text = b""
    with suppress(OSError):  # a terminal that was left
        while part := os.read(shown, 10_000):
            text += part
    assert process.wait(timeout=60) == 0
    text = text.decode().replace("\r\n", "\n")
    assert re.search(r"\r\x1b\[Kwarming up \.\.\. \d s", text) and "step 0/" not in text.split("warming up")[0]
    assert "\r\x1b[Kvalidating on 16,384 tokens ... 1 s" in text
    assert re.search(r"\r\x1b\[Kstep [345]/6, \d s left", text) and text.endswith("\r\x1b[K")
    remains = ["".join(line.split("\r\x1b[K")[-1:]) for line in text.split("\n")]  # what a terminal keeps
    (log,) = scratch(sandbox).glob("*.txt")
    assert [line for line in remains if line] == log.read_text().split(train_gpt.SEPARATOR + "\n")[2].splitlines()
    assert "\r" not in log.read_text()


def test_a_second_signal_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for world_size, copies in ((1, 0.05), (2, 0.5)):
        watch, said = Watch(Runtime(0, world_size, CPU)), []
        watch.warn = said.append
        watch.saves = True
        watch.on_signal(signal.SIGTERM)
        clock[0] += copies
        watch.on_signal(signal.SIGTERM)  # torchrun's copy of the first
        assert left == [] and len(said) == 1 and said.pop().startswith("SIGTERM: the run ends after")
        clock[0] += copies + 0.1
        watch.on_signal(signal.SIGINT)
        assert left.pop() == 130 and said == ["run ended at once by SIGINT, without a checkpoint"]


def children(pid):
    """Process ids of the children of a process."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(word) for task in tasks for word in (task / "children").read_text().split()]


@LINUX
def test_a_signal_to_one_of_two_ranks_ends_both_at_the_same_step(sandbox):
    process = start(sandbox, "--num_steps=2000", "--val_every=0", ranks=2)
    wait_for(process, "step:30/")
    workers = [pid for pid in children(process.pid) if "train_gpt.py" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[-1], signal.SIGTERM)
    out, _ = finish(process)
    (path,) = checkpoints(sandbox)
    assert process.returncode != 0 and "run ended by SIGTERM at step" in out
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"
    assert f"go on with: {launcher} train_gpt.py --resume {path}\n" in out


@LINUX
def test_a_rank_that_dies_is_named_and_ends_the_others(sandbox):
    """Through run.sh and launch.py, which starts torchrun."""
    for name in ("run.sh", "launch.py"):
        shutil.copy(REPOSITORY / name, sandbox.path)
    (sandbox.path / "data/laptop.py").write_text("def main(words):\n    return 0\n")  # its corpus is there
    process = subprocess.Popen(["bash", "run.sh", "--track=laptop", *TINY, "--num_steps=5000", "--val_every=0"],
                               cwd=sandbox.path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "NPROC": "2", "PYTHON": sys.executable})
    wait_for(process, "step:30/")
    workers = [pid for pid in children(process.pid) if "train_gpt.py" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[1], signal.SIGKILL)
    _, errors = finish(process)
    assert process.returncode == 128 + 9, errors
    assert "rank 1 was killed by signal 9" in errors and "Traceback" not in errors, errors


def test_numbers_that_are_not_finite_end_the_run(sandbox):
    script = sandbox.path / "train_gpt.py"  # norms hold the model together, whatever the rates
    line = "return mean_loss"
    assert script.read_text().count(line) == 1
    script.write_text(script.read_text().replace(line, "return mean_loss / (0 if schedule.step == 4 else 1)"))
    done = sandbox("--save_every=1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    found = re.search(r"not finite at step 4 on rank 0; .*last checkpoint: (\S+)", done.stderr)
    assert str(checkpoints(sandbox)[-1]) == found[1] and found[1].endswith("step000004.pt")


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_the_check_sees_loss_and_gradients(tiny_model, hp, poison):
    optimizer, watch = train_gpt.Optimizer(tiny_model, hp, torch.float32), Watch(Runtime(0, 1, CPU))
    tokens = torch.randint(256, (2, 128))
    loss = train_gpt.training_step(tiny_model, optimizer, [(tokens, tokens)], train_gpt.Schedule(0, hp, CPU))
    watch.post(0, loss + optimizer.gradient_sum)
    assert watch.read() == 0
    if poison == "gradient":
        list(tiny_model.parameters())[3].register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), torch.nan))
    loss = train_gpt.training_step(tiny_model, optimizer, [(tokens, tokens)], train_gpt.Schedule(1, hp, CPU))
    watch.post(1, (loss * torch.inf if poison == "loss" else loss) + optimizer.gradient_sum)
    with pytest.raises(UserError, match="at step 1 on rank 0"):
        watch.read()


class Sums(TorchDispatchMode):
    """Adds up the elements of the tensors that are summed to one float32, as the check does it."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten.sum.default and kwargs.get("dtype") is torch.float32:
            self.elements += args[0].numel()
        return function(*args, **kwargs)


def test_the_check_sums_each_gradient_once():
    """On the laptop track's model; of sparse ones what is there. So it adds less than half a percent of what the
    products of matrices in a step add and multiply."""
    hp = train_gpt.parse_arguments(["--track=laptop"])
    model = train_gpt.build_model(hp, CPU, torch.float32, flex=False, sparse=True)
    optimizer, watch = train_gpt.Optimizer(model, hp, torch.float32), Watch(Runtime(0, 1, CPU))
    tokens = torch.randint(256, (8, 256))
    with FlopCounterMode(display=False) as products, Sums() as sums:
        loss = train_gpt.training_step(model, optimizer, [(tokens, tokens)], train_gpt.Schedule(0, hp, CPU))
        watch.post(0, loss + optimizer.gradient_sum)
        watch.read()
    gradients = [bucket.grad.values() if bucket.sparse else bucket.grad for bucket in optimizer.buckets]
    assert sums.elements == sum(part.numel() for part in gradients) < 0.005 * products.get_total_flops()


def test_a_full_disk_keeps_the_run_and_the_checkpoint_before(sandbox):
    assert sandbox("--save_every=3").returncode == 0
    kept, last = checkpoints(sandbox)
    last.unlink()
    before = kept.read_bytes()
    process = start(sandbox, "--save_every=1", "--resume=latest", limit=len(before) - 1000)  # the log still fits
    out, errors = process.communicate()
    assert process.returncode == 3 and "step:6/6 val_loss" in out
    assert errors.count("warning: can't write the checkpoint") == errors.count("\n") == 1
    assert checkpoints(sandbox) == [kept] and kept.read_bytes() == before and not list(scratch(sandbox).glob("*.tmp"))


def test_a_log_that_cannot_grow_does_not_end_the_run(sandbox):
    assert sandbox().returncode == 0
    (log,) = scratch(sandbox).glob("*.txt")
    header = log.read_text().rindex("=" * 100) + 101
    log.unlink()
    process = start(sandbox, limit=header + 400)
    out, errors = process.communicate()
    assert process.returncode == 3 and "step:6/6 val_loss" in out
    assert errors.count("warning: can't write the log") == errors.count("\n") == 1


def test_older_checkpoints_are_deleted_but_for_the_last(sandbox):
    assert sandbox("--save_every=1", "--keep=3").returncode == 0
    assert [path.stem[-6:] for path in checkpoints(sandbox)] == ["000004", "000005", "000006"]


def test_latest_without_a_checkpoint_begins_anew(sandbox):
    done = sandbox("--resume=latest")
    assert done.returncode == 0 and "begins at step 0" in done.stdout


def test_a_file_that_wants_to_run_code_is_refused(sandbox):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {sandbox.path}/pwned",)
    torch.save({"model": Evil()}, sandbox.path / "evil.pt")
    done = sandbox("--resume=evil.pt")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "evil.pt" in done.stderr
    assert not (sandbox.path / "pwned").exists()


def test_resume_anyway(sandbox):
    source, line = (sandbox.path / "train_gpt.py").read_text(), "fast = bf16 < 0.7 * fp32"
    assert source.count(line) == 1
    (sandbox.path / "train_gpt.py").write_text(source.replace(line, "fast = False"))
    assert sandbox("--save_every=3", "--dtype=auto").returncode == 0
    done = sandbox("--resume=latest", "--dtype=bfloat16")
    assert done.returncode == 2 and "activations" in done.stderr
    (sandbox.path / "train_gpt.py").write_text(source.replace(line, "fast = True"))  # as on a busy machine
    done = sandbox("--resume=latest", "--resume_anyway", tiny=[])  # would measure bfloat16, goes on in float32
    assert done.returncode == 0 and ", float32, 1 x" in done.stdout, done.stderr
    assert sandbox("--resume=latest", "--muon_lr=0.001").returncode == 2
    (sandbox.path / "train_gpt.py").open("a").write("\n# edited\n")
    checkpoints(sandbox)[-1].unlink()
    done = sandbox("--resume=latest", "--muon_lr=0.001", "--resume_anyway")
    assert done.returncode == 0 and "at step 3" in done.stdout, done.stderr
    done = sandbox("--resume=latest", "--model_dim=64", "--resume_anyway")
    assert done.returncode == 2 and "shape" in done.stderr and done.stderr.count("\n") == 1
