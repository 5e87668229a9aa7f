"""Times scaled_dot_product_attention against train_gpt.chunked_attention, interleaved, on one core.

    python records/studies/2026-11-29_PlainCode/attention_on_cpu.py              # not compiled
    python records/studies/2026-11-29_PlainCode/attention_on_cpu.py --compile    # compiled

The shapes are the laptop track's. Training is forward and backward. Times are medians of 15 calls.
"""
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import train_gpt  # noqa: E402

SHAPES = {  # name: (positions, positions per sequence, heads, window, training)
    "long layer, training": (2048, 256, 2, 256, True),
    "paired layer, training": (4096, 512, 1, 128, True),
    "long layer, validation": (2048, 2048, 2, 256, False),
    "paired layer, validation": (4096, 4096, 1, 128, False),
}
HEAD_DIM = 64


def whole_sequences(q, k, v, first_key, length):
    """scaled_dot_product_attention with a boolean mask (length, length) for each sequence."""
    _, H, N, d = q.shape
    S = N // length
    position = torch.arange(length)
    first_key = first_key.view(S, length) - length * torch.arange(S)[:, None]
    mask = train_gpt.visible(position[None, :, None], position[None, None], first_key[:, :, None])

    def sequences(x):
        return x[0].view(H, S, length, d).transpose(0, 1)

    y = F.scaled_dot_product_attention(
        sequences(q), sequences(k), sequences(v), attn_mask=mask[:, None], scale=1.0)
    return y.transpose(0, 1).reshape(1, H, N, d)


def main(compiled: bool) -> None:
    torch.set_num_threads(1)
    for name, (N, length, H, window, training) in SHAPES.items():
        torch._dynamo.reset()
        functions = {"chunks": (train_gpt.chunked_attention, window),
                     "whole": (whole_sequences, length)}
        if compiled:
            functions = {key: (torch.compile(function, dynamic=False), size)
                         for key, (function, size) in functions.items()}
        q, k, v = (torch.randn(1, H, N, HEAD_DIM).requires_grad_(training) for _ in range(3))
        start = torch.arange(N) // length * length
        first_key = train_gpt.first_visible_key(start, torch.tensor(window))
        times = {key: [] for key in functions}
        results = {}
        for _ in range(18):
            for key, (function, size) in functions.items():
                begun = time.perf_counter()
                with torch.set_grad_enabled(training):
                    results[key] = function(q, k, v, first_key, size)
                    if training:
                        results[key].sum().backward()
                times[key].append(1000 * (time.perf_counter() - begun))
        difference = (results["chunks"] - results["whole"]).abs().max().item()
        chunks, whole = (statistics.median(times[key][3:]) for key in ("chunks", "whole"))
        print(f"{name}: chunks {chunks:.1f} ms, whole sequences {whole:.1f} ms, "
              f"ratio {whole / chunks:.2f}, largest difference {difference:.0e}", flush=True)


if __name__ == "__main__":
    main("--compile" in sys.argv)
