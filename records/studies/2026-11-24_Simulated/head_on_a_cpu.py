"""The head's loss on a CPU, forward and backward from bfloat16 logits: three ways in turn, compiled, one thread.

    python records/studies/2026-11-24_Simulated/head_on_a_cpu.py [ROUNDS]     # from the repository's root; default 41

Milliseconds of the process's CPU time, in which a busy machine shows less than in the clock's.
"""
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[3]))
from train_gpt import CappedCrossEntropy, device_name, softcap

CAP = 15.0
WAYS = {
    "tanh, F.cross_entropy (before)": lambda x, y: F.cross_entropy(CAP * torch.tanh(x.float() / CAP), y),
    "sigmoid, F.cross_entropy": lambda x, y: F.cross_entropy(softcap(x, CAP), y),
    "CappedCrossEntropy (today's)": lambda x, y: CappedCrossEntropy.apply(x, y, CAP)}


def milliseconds(function, logits, targets) -> float:
    start = time.process_time()
    function(logits, targets).backward()
    logits.grad = None
    return 1000 * (time.process_time() - start)


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}; CPU time: median (quartiles) of {rounds}")
    for vocab_size in (384, 50_304):
        torch._dynamo.reset()
        logits = torch.randn(2048, vocab_size).bfloat16().requires_grad_()
        targets = torch.randint(vocab_size, (2048,))
        ways = {name: torch.compile(function, dynamic=False) for name, function in WAYS.items()}
        for function in ways.values():
            milliseconds(function, logits, targets)
        times = {name: [] for name in ways}
        for _ in range(rounds):  # in turn, so that what disturbs one disturbs all
            for name, function in ways.items():
                times[name].append(milliseconds(function, logits, targets))
        for name, values in times.items():
            low, middle, high = statistics.quantiles(values, n=4)
            print(f"(2048, {vocab_size})  {name:32} {middle:8.2f} ms ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 41)
