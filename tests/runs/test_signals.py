"""A signal ends a run at a step at which all ranks agree, with a checkpoint and the command that
continues."""
import shlex
import signal
import sys
from pathlib import Path

import pytest
from conftest import metric_lines
from run_helpers import (
    assert_same_state,
    checkpoint,
    checkpoints,
    finish,
    log_text,
    no_warm_up,
    steps_of,
    validate_less,
    wait_for,
)

import train_gpt
from train_gpt import StopSignal

PATCHES = Path(__file__).with_name("run_patches.py")  # patches for processes
ENDLESS = ["--num_steps=100000", "--val_every=0"]


def printed_command(text: str) -> list[str]:
    """The words of the command that continues a run."""
    (line,) = [line for line in text.splitlines() if "--resume" in line]
    words = shlex.split(line)
    return words[words.index(sys.executable):]


def arguments_of(command: list[str]) -> list[str]:
    """The arguments that the command gives train_gpt.py."""
    (script,) = [i for i, word in enumerate(command) if word.endswith("train_gpt.py")]
    return command[script + 1:]


def send_at_step(monkeypatch, number: int, step: int) -> None:
    """Raise a signal in this process, in the middle of a step of a run."""
    training_step = train_gpt.training_step

    def interrupted_step(model, optimizer, batch, schedule):
        if optimizer.num_updates == step:
            signal.raise_signal(number)
        return training_step(model, optimizer, batch, schedule)

    monkeypatch.setattr(train_gpt, "training_step", interrupted_step)


def test_signal_ends_a_run_between_updates_of_adam(recipe_home, monkeypatch):
    """The signal comes in step 6. As Adam updates in every second step, the run ends before step 8,
    not 7, and continues exactly; at step 8 the embedding is untied."""
    no_warm_up(monkeypatch)
    validate_less(monkeypatch)
    whole = recipe_home.run("--save_every=14")
    last = checkpoint(recipe_home, 14)
    last = last.rename(last.with_suffix(".whole"))

    with monkeypatch.context() as patch:
        send_at_step(patch, signal.SIGTERM, 6)
        stopped = recipe_home.run("--save_every=14")
    assert stopped.code == 128 + signal.SIGTERM
    before = metric_lines(stopped.out)
    assert steps_of(before, "train_loss") == list(range(1, 9))
    arguments = arguments_of(printed_command(stopped.out))
    rest = recipe_home.run(*arguments, flags_before=[])
    assert rest.code == 0, rest.err
    assert before + metric_lines(rest.out) == metric_lines(whole.out)
    assert_same_state(checkpoint(recipe_home, 14), last)


def test_signal_in_the_last_step_leaves_a_finished_run(home, monkeypatch):
    """It is agreed on at the last step; the checkpoint is there, and the rest is one validation, of
    the same averages of the weights."""
    no_warm_up(monkeypatch)
    whole = home.run("--average_tail=1")
    with monkeypatch.context() as patch:
        send_at_step(patch, signal.SIGTERM, 5)
        stopped = home.run("--average_tail=1")
    assert stopped.code in (0, 128 + signal.SIGTERM)
    if stopped.code:
        rest = home.run(*arguments_of(printed_command(stopped.out)), flags_before=[])
        assert rest.code == 0, rest.err
        found = metric_lines(stopped.out) + metric_lines(rest.out)
    else:
        found = metric_lines(stopped.out)
    assert found == metric_lines(whole.out)


def test_stop_signal_restores_the_handlers_and_ignores_what_was_ignored(monkeypatch, capfd):
    """Outside of `with` all is as before; nohup's ignored SIGHUP stays ignored inside."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    original = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        before = {number: signal.getsignal(number) for number in numbers}
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.number == 0
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
            assert stop.number == signal.SIGTERM
        assert {number: signal.getsignal(number) for number in numbers} == before

        with pytest.raises(RuntimeError), StopSignal():
            raise RuntimeError("a mistake in the loop")
        assert {number: signal.getsignal(number) for number in numbers} == before
    finally:
        for number, handler in original.items():
            signal.signal(number, handler)


def test_second_signal_ends_at_once(monkeypatch):
    """But not the copy of the first one that torchrun sends. The handlers are called by hand,
    because Python calls them some time after a signal."""
    def deliver(number):
        signal.getsignal(number)(number, None)

    seconds = [100.0]
    exits = []
    monkeypatch.setattr(train_gpt.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(train_gpt.os, "_exit", exits.append)
    with StopSignal() as stop:
        deliver(signal.SIGTERM)
        seconds[0] += 0.1
        deliver(signal.SIGTERM)
        assert exits == [] and stop.number == signal.SIGTERM
        seconds[0] += 10
        deliver(signal.SIGINT)
        assert exits == [128 + signal.SIGINT]


@pytest.mark.parametrize("number", [
    signal.SIGTERM,
    pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_signal_ends_a_process_with_a_checkpoint(home, number):
    """The exit code is 128 + the signal's number; the printed command continues."""
    process = home.start(*ENDLESS)
    wait_for(process, "step:20/")
    process.send_signal(number)
    out, err = finish(process)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    (path,) = checkpoints(home)
    step = train_gpt.open_checkpoint(str(path))["progress"]["step"]
    command = printed_command(out)
    assert command[-1] == str(path)

    rest = home.run(*arguments_of(command), f"--num_steps={step + 3}", flags_before=[])
    assert rest.code == 0, rest.err
    lines = metric_lines(log_text(home))
    assert steps_of(lines, "train_loss") == list(range(1, step + 4))  # none twice, none lost


def assert_both_ranks_stopped(home, process, out) -> int:
    """There is one checkpoint, and the printed command starts two ranks. One rank continues
    from it. Returns the checkpoint's step."""
    assert process.returncode != 0
    (path,) = checkpoints(home)
    step = train_gpt.open_checkpoint(str(path))["progress"]["step"]
    command = printed_command(out)
    assert command[-1] == str(path) and "--nproc_per_node=2" in command
    rest = home.run(*arguments_of(command), f"--num_steps={step + 2}", flags_before=[])
    assert rest.code == 0, rest.err
    lines = metric_lines(log_text(home))
    assert steps_of(lines, "train_loss") == list(range(1, step + 3))
    return step


@pytest.mark.parametrize("patch", [
    "signal_rank_1_in_step_5",
    pytest.param("signal_rank_0_whose_disk_is_slow", marks=pytest.mark.slow)])
def test_signal_to_one_of_two_ranks_ends_both_at_the_same_step(home, patch):
    """One rank receives it in step 5. Both end after that step, when the checkpoint is saved."""
    process = home.start(*ENDLESS, ranks=2, patch=f"{PATCHES}:{patch}")
    out, _ = finish(process)
    assert assert_both_ranks_stopped(home, process, out) == 6


@pytest.mark.slow
def test_signal_to_torchrun_ends_both_ranks(home):
    process = home.start(*ENDLESS, ranks=2)
    wait_for(process, "step:20/")
    process.send_signal(signal.SIGTERM)
    out, _ = finish(process)
    assert assert_both_ranks_stopped(home, process, out) >= 20
