"""Patches that kill or stop a run, for processes of tests/small.py."""
import os
import random
import signal
import sys
import time

import torch

original_save = torch.save


def write_half(state, path) -> None:
    """What an interrupted save leaves behind."""
    original_save(state, path)
    os.truncate(path, os.path.getsize(path) // 2)


def join_in_two_seconds(module) -> None:
    """A shorter time for the ranks to find each other."""
    module.JOIN_SECONDS = 2


def kill_in_the_second_save(module) -> None:
    """SIGKILL in the middle of the second save."""
    saves = []

    def save(state, path):
        saves.append(path)
        if len(saves) == 2:
            write_half(state, path)
            os.kill(os.getpid(), signal.SIGKILL)
        original_save(state, path)

    module.torch.save = save


def twenty_kills(module) -> None:
    """main starts one child after another, which resume each other; a child has this process's
    imports. Twenty of them are killed: in a save, between two steps, or anywhere."""
    main = module.main
    training_step = module.training_step

    def run_child(argv, kind, steps_left, delay):
        def counted_step(*args):
            nonlocal steps_left
            steps_left -= 1
            if steps_left == 0 and kind == "step":
                os.kill(os.getpid(), signal.SIGKILL)
            if steps_left == 0 and kind == "anywhere":
                signal.setitimer(signal.ITIMER_REAL, delay)  # SIGALRM ends it like a kill
            return training_step(*args)

        def save(state, path):
            if steps_left <= 0 and kind == "save":
                write_half(state, path)
                os.kill(os.getpid(), signal.SIGKILL)
            original_save(state, path)

        module.warm_up = lambda *args: None
        module.training_step = counted_step
        module.torch.save = save
        return main(argv)

    def repeated_main(argv):
        moments = random.Random(0)
        for number in range(20):
            kind = ("save", "step", "anywhere")[number % 3]
            steps_left = moments.randint(1, 4)
            delay = moments.uniform(0.001, 0.03)
            if os.fork() == 0:
                os._exit(run_child(argv, kind, steps_left, delay))
            _, status = os.wait()
            if not os.WIFSIGNALED(status):
                print(f"child {number} was not killed, status {status}", file=sys.stderr)
                return 1
        return main(argv)

    module.main = repeated_main


def signal_rank_in_step_5(module, rank: int) -> None:
    """SIGTERM for one of two ranks."""
    training_step = module.training_step

    def step_with_signal(model, optimizer, batch, schedule):
        if optimizer.num_updates == 5 and module.dist.get_rank() == rank:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(2)  # a later signal is then no copy of this one
        return training_step(model, optimizer, batch, schedule)

    module.training_step = step_with_signal


def signal_rank_1_in_step_5(module) -> None:
    """SIGTERM for rank 1 alone."""
    signal_rank_in_step_5(module, rank=1)


def signal_rank_0_whose_disk_is_slow(module) -> None:
    """SIGTERM for rank 0 alone, which saves so slowly that rank 1 could end before. torchrun would
    then signal rank 0 again, which ends it at once."""
    save = module.torch.save

    def slow_save(*arguments):
        time.sleep(5)
        save(*arguments)

    signal_rank_in_step_5(module, rank=0)
    module.torch.save = slow_save
