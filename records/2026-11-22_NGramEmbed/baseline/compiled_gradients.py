"""Does torch.compile change the gradients of 2024-12-04_ValueEmbed? Along a compiled run on the laptop track.

    OMP_NUM_THREADS=1 python records/2026-11-22_NGramEmbed/baseline/compiled_gradients.py > compiled_gradients.txt

Prints for some steps the loss of that step's batch and a validation loss, each compiled and not, from the same weights,
then the three parameters whose gradients differ most, relative to the gradient's norm, and the largest scalar.
"""
import importlib.util
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).parents[2] / "2024-12-04_ValueEmbed/train_gpt.py"
SEED, STEPS = 1, (1, 50, 150, 300, 379, 385, 450, 600, 700, 759)
spec = importlib.util.spec_from_file_location("value_embed", SCRIPT)
script = sys.modules["value_embed"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

hp = script.parse_arguments(["--track=laptop", "--device=cpu", "--dtype=float32", f"--seed={SEED}"])
runtime, track = script.start_runtime(hp), script.TRACKS["laptop"]
train, val = (script.TokenStream(files, track.vocab_size, 1, "") for files in (track.train_files, track.val_files))
plain, compiled = (script.build_model(hp, runtime.device, torch.float32, flex=False) for _ in range(2))
for part in [*compiled.blocks, compiled.head]:
    part.compile(dynamic=False)
optimizers, loader = script.build_optimizers(compiled, hp, torch.float32), script.BatchLoader(train, hp, runtime)
for step in range(hp.num_steps):
    batch, window = loader.next(), torch.full((), script.window_size(step, hp))
    if step in STEPS:
        plain.load_state_dict(compiled.state_dict())
        losses, val_losses, gradients = [], [], []
        for model in (plain, compiled):
            model.zero_grad()
            loss = model(*batch[0], window)
            loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
            losses.append(loss.item())
            val_losses.append(model(*(t[None] for t in val.sequence(5, hp.forward_tokens)), window).item())
            model.zero_grad()
        differ = sorted((((b - gradients[1][name]).norm() / (b.norm() + 1e-30)).item(), name)
                        for name, b in gradients[0].items())
        largest = max((p.abs().max().item(), name) for name, p in compiled.named_parameters() if p.ndim < 2)
        print(f"step {step}: losses {losses}, validation {val_losses}; differ most:",
              ", ".join(f"{name} {size:.1e}" for size, name in differ[:-4:-1]),
              f"(norm of the first {gradients[0][differ[-1][1]].norm():.1e}); largest scalar: {largest[1]} "
              f"{largest[0]:.2f}", flush=True)
    script.training_step(compiled, optimizers, batch, step, hp, runtime)
loader.pool.shutdown(cancel_futures=True)
