"""Started by test_ranks.py through torchrun: some steps on W ranks; rank 0 saves gradients, weights and state."""
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import train_gpt


def gradients_and_steps(root: Path, rank: int, world_size: int, travel: torch.dtype = torch.float32) -> dict:
    """The summed gradients of step 0, then what the model and the optimizer hold after the scheduled steps, and the
    mean losses. root: a folder with the run's flags (flags.json) and its text (x_*.bin). travel: of what is sent."""
    train_gpt.ROOT = root
    torch.set_num_threads(1)
    hp = train_gpt.parse_arguments(json.loads((root / "flags.json").read_text()))
    runtime = train_gpt.Runtime(rank, world_size, torch.device("cpu"))
    stream = train_gpt.TokenStream("x_*.bin", train_gpt.TRACKS["laptop"], 1)
    model = train_gpt.build_model(hp, runtime.device, torch.float32, flex=False)
    with torch.no_grad():  # away from zero, or most gradients are
        generator = torch.Generator().manual_seed(7)
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    optimizer = train_gpt.Optimizer(model, hp, travel, rank, world_size)

    loader, schedule = train_gpt.BatchLoader(stream, hp, runtime), train_gpt.Schedule(0, hp, runtime.device)
    for tokens, targets in loader.next():
        model(tokens, targets, schedule)[0].backward()
    gradients = []
    for bucket in optimizer.buckets:
        if all(p.grad is None for p in bucket.params):  # step() leaves it out
            gradients.append(torch.zeros(1))
            continue
        bucket.reduce()
        mine, _, _ = bucket.collect()
        rows = bucket.gather(mine)
        bucket.wait()
        gradients.append(rows[:bucket.rows].clone())

    loader, losses = train_gpt.BatchLoader(stream, hp, runtime), []
    for step in range(hp.num_steps - hp.extension_steps):
        schedule = train_gpt.Schedule(step, hp, runtime.device)
        if schedule.unties:
            optimizer.untie()
        losses.append(runtime.mean(train_gpt.training_step(model, optimizer, loader.next(), schedule)))
    schedule = train_gpt.Schedule(hp.num_steps, hp, runtime.device)
    val_loss = train_gpt.validate(model, stream, schedule, hp, runtime)
    return {"gradients": gradients, "losses": losses, "val_loss": val_loss, "optimizer": optimizer.state_dict(),
            "model": {name: p.detach() for name, p in model.named_parameters()}}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = gradients_and_steps(Path(sys.argv[1]), dist.get_rank(), dist.get_world_size())
    if dist.get_rank() == 0:
        torch.save(result, Path(sys.argv[1]) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()
