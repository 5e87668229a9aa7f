"""Time three forms of the head's loss on a CPU, forward and backward from bfloat16 logits.

    python records/studies/2026-11-24_Simulated/head_on_a_cpu.py [ROUNDS]     # default: 41

They are compiled and interleaved, on one thread. The figures are milliseconds of CPU time of the
process, which other load on the machine changes less than wall time.
"""
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

CAP = 15.0


# From here to WAYS: as in train_gpt.py at 3be851b.
def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) in float32 (arXiv 2408.00118). Written as a sigmoid, for inductor
    reads the logits three times where a softmax follows a tanh."""
    return 2 * cap * torch.sigmoid(2 / cap * logits.float()) - cap


class CappedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy, nats, of targets (T,) under softcap(logits (T, V), cap). The backward is
    one pass over the logits, and nothing else of their size is kept for it."""
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, cap: float) -> Tensor:
        capped, ctx.cap = softcap(logits, cap), cap
        logsumexp = capped.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, targets, logsumexp)
        return (logsumexp - capped.gather(-1, targets[:, None])).mean()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, logsumexp = ctx.saved_tensors
        capped = softcap(logits, ctx.cap)
        is_target = torch.arange(logits.size(1), device=logits.device) == targets[:, None]
        error = (capped - logsumexp).exp() - is_target.float()  # softmax - one-hot
        slope = 1 - (capped / ctx.cap).square()
        return (grad / len(targets) * error * slope).to(logits.dtype), None, None


WAYS = {
    "tanh, F.cross_entropy (before)":
        lambda x, y: F.cross_entropy(CAP * torch.tanh(x.float() / CAP), y),
    "sigmoid, F.cross_entropy": lambda x, y: F.cross_entropy(softcap(x, CAP), y),
    "CappedCrossEntropy (today's)": lambda x, y: CappedCrossEntropy.apply(x, y, CAP)}


def milliseconds(function, logits, targets) -> float:
    start = time.process_time()
    function(logits, targets).backward()
    logits.grad = None
    return 1000 * (time.process_time() - start)


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; CPU time: median (quartiles) of {rounds}")
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
