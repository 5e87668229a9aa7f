"""Started by test_ranks.py through torchrun: three steps on W ranks; rank 0 saves gradients, weights and state."""
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import train_gpt


def gradients_and_steps(root: Path, rank: int, world_size: int) -> dict:
    """The mean gradients of step 0, then what the model and the optimizer hold after three steps."""
    train_gpt.ROOT = root
    torch.set_num_threads(1)
    hp = train_gpt.Hyperparameters(track="laptop", batch_size=int((root / "batch_size").read_text()), num_steps=3,
                                   sequence_length=128, num_layers=3, num_heads=2, model_dim=24, window_end=64,
                                   ngrams=3, ngram_rows=211,
                                   cooldown_steps=0)
    runtime = train_gpt.Runtime(rank, world_size, torch.device("cpu"))
    stream = train_gpt.TokenStream("x_*.bin", 257, 1, "")
    model = train_gpt.build_model(hp, runtime.device, torch.float32, flex=False)
    with torch.no_grad():  # away from zero, or most gradients are
        generator = torch.Generator().manual_seed(7)
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    optimizer = train_gpt.Optimizer(model, hp, torch.float32, rank, world_size)
    loader = train_gpt.BatchLoader(stream, hp, runtime)
    batch = loader.next()
    for tokens, targets in batch:
        (model(tokens, targets, train_gpt.Schedule(0, hp, runtime.device)) / len(batch)).backward()
    gradients = []
    for bucket in optimizer.buckets:
        bucket.reduce()
        mine, _, _ = bucket.collect()
        gradients.append(bucket.whole(mine).clone())
        bucket.apply(torch.zeros_like(bucket.values), [], 0.0)
    loader = train_gpt.BatchLoader(stream, hp, runtime)
    losses = [runtime.mean(train_gpt.training_step(
        model, optimizer, loader.next(), train_gpt.Schedule(step, hp, runtime.device))) for step in range(3)]
    val_loss = train_gpt.validate(model, stream, 3, hp, runtime)
    return {"gradients": gradients, "losses": losses, "val_loss": val_loss, "optimizer": optimizer.state_dict(),
            "model": {name: p.detach() for name, p in model.named_parameters()}}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = gradients_and_steps(Path(sys.argv[1]), dist.get_rank(), dist.get_world_size())
    if dist.get_rank() == 0:
        torch.save(result, Path(sys.argv[1]) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()
