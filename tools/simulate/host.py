"""Measure how long the host needs for a training step, without a GPU.

    python -m tools.simulate.host REQUEST

REQUEST is JSON. __main__.py starts this in a process of its own, on the runtime of fakecudart.cpp.
The script runs as rank 0 with real tensors, for some steps of its first stage. CUDA, cuBLAS and
NCCL return at once and compute nothing. So torch's dispatcher, dynamo's guards, the code that
inductor generates, Triton's launchers and autograd take the time that they take on a real node. The
record holds the CPU time of the process, which other processes disturb less than the wall time.
"""
import ctypes
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch._functorch.config
import torch._inductor.config as inductor_config
import torch._inductor.runtime.triton_heuristics as heuristics
from torch._inductor.runtime.benchmarking import benchmarker

from tools.simulate import stages
from tools.simulate.script import Tee, explain, fake_process_group, load, load_copy, place

STEPS = 60
# Functions whose CPU time is measured, where the script has them: (class, name).
PARTS = (("BatchLoader", "next"), ("GPT", "forward"), ("GPT", "masks"), ("Optimizer", "step"),
         ("Bucket", "reduce_scatter_grads"), ("Bucket", "start_update"), ("Bucket", "wait"))
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "all_gather_single",
               "reduce_scatter_tensor", "reduce_scatter_single")


class Enough(BaseException):
    """All steps that are measured are done."""


class Clock:
    """CPU time, launches and collectives of the steps, and CPU time of the parts of a step."""
    def __init__(self):
        self.steps = []   # what was counted at the start of each step
        self.parts = {}   # name -> seconds in each step
        library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self.launched = (ctypes.c_long * 8).in_dll(library, "host_counts")
        self.collectives = 0

    def start_step(self) -> None:
        """Note the start of a step. Raises Enough after the last one."""
        # progress() in __main__.py reads it.
        print(f"phase: training_step {1 + len(self.steps)}", flush=True)
        self.steps.append((time.process_time(), sum(self.launched), self.collectives))
        for seconds in self.parts.values():
            seconds.append(0.0)
        if len(self.steps) > STEPS:
            raise Enough

    def measure(self, owner, name: str) -> None:
        """Add up the CPU time of a function of the script, or of torch."""
        function = getattr(owner, name)
        seconds = self.parts[f"{owner.__name__}.{name}"] = []

        def call(*args, **kwargs):
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                if seconds:
                    seconds[-1] += time.process_time() - start
        setattr(owner, name, call)

    def count(self, collective):
        """The collective, counted."""
        def call(*args, **kwargs):
            self.collectives += 1
            return collective(*args, **kwargs)
        return call

    def record(self) -> dict:
        """The steps, and the median of each part in ms."""
        steps = []
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            seconds, launches, collectives = (b - a for a, b in zip(before, after, strict=True))
            steps.append(dict(ms=1e3 * seconds, launches=launches, collectives=collectives))
        parts = {name: 1e3 * statistics.median(seconds[len(seconds) // 4:])
                 for name, seconds in self.parts.items() if seconds}
        return dict(steps=steps, parts=parts)


def compile_quickly() -> None:
    """One configuration of each kernel, because nothing can be timed; no caches."""
    inductor_config.force_disable_caches = True
    torch._functorch.config.enable_autograd_cache = False
    type(benchmarker).benchmark_gpu = lambda self, *args, **kwargs: 1.0
    construct = heuristics.CachingAutotuner.__init__

    def with_one_configuration(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        self.configs = self.configs[:1]
    heuristics.CachingAutotuner.__init__ = with_one_configuration


def run_script(request: dict, clock: Clock) -> None:
    """Run the script until all steps are measured; raises Enough then."""
    script, folder = Path(request["script"]), Path(request["work"])
    world_size = request["world_size"]
    probe = load(script, "probe")
    hp = probe.parse_arguments(request["flags"])
    tokens = sum(step.tokens for step in stages.schedule(probe, hp)[:STEPS + 2])
    copy = place(script, probe.TRACKS[hp.track], tokens, folder)
    os.chdir(folder)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # nothing connects to it
    for name in COLLECTIVES:
        if hasattr(torch.distributed, name):
            counted = clock.count(getattr(torch.distributed, name))
            setattr(torch.distributed, name, counted)
    if world_size > 1:
        fake_process_group(world_size, 0)
    compile_quickly()

    module = load_copy(copy)
    for owner, name in PARTS:
        if hasattr(getattr(module, owner, None), name):
            clock.measure(getattr(module, owner), name)
    clock.measure(torch.Tensor, "backward")
    training_step = module.training_step

    def step(*args, **kwargs):
        clock.start_step()
        return training_step(*args, **kwargs)
    module.training_step = step
    module.warm_up = lambda *args, **kwargs: None  # the first steps compile
    module.validate = lambda *args, **kwargs: 3.0
    os._exit = sys.exit
    code = (module.run if hasattr(module, "run") else module.main)(request["flags"])
    raise RuntimeError(f"{script.name} ended with {code} before {STEPS} steps")


def main(request: dict) -> None:
    """Write the record: the steps and parts, or an error."""
    clock = Clock()
    sys.stderr = Tee(sys.stderr)
    try:
        run_script(request, clock)
    except Enough:
        record = dict(clock.record(), error="")
    except BaseException as wrong:
        record = dict(error=explain(wrong)[1])
    Path(request["out"]).write_text(json.dumps(record))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # threads of the script may still run
