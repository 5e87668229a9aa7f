"""Muon and Adam against the mathematics and against torch's own, and the buckets that divide their work."""
import math

import pytest
import torch

from train_gpt import (
    Bucket,
    Hyperparameters,
    Optimizer,
    adam_update,
    build_model,
    muon_update,
    newton_schulz,
)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
@pytest.mark.parametrize("dtype, slack", [(torch.float32, 0.0), (torch.bfloat16, 0.05)])
def test_newton_schulz_pulls_singular_values_to_one(shape, dtype, slack):
    torch.manual_seed(0)
    rank = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, rank))[0] for n in shape)
    matrix = u @ torch.diag(torch.logspace(0, -1.5, rank)) @ v.T  # condition number 30
    result = newton_schulz(torch.stack([matrix, 1000 * matrix]).to(dtype)).float()
    values = torch.linalg.svdvals(result)
    assert 0.65 - slack < values.min() and values.max() < 1.25 + slack
    # the singular vectors stay: U^T result V is diagonal
    inner = u.T @ result[0] @ v
    assert (inner - inner.diag().diag()).abs().max() < 0.02 + slack
    torch.testing.assert_close(result[0], result[1], atol=0.02 + slack, rtol=0)  # the scale is gone


def test_newton_schulz_of_zero_is_zero():
    assert not newton_schulz(torch.zeros(3, 8, 16)).any()


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_muon_agrees_with_torch(shape):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no torch.optim.Muon")
    torch.manual_seed(1)
    theirs = torch.nn.Parameter(torch.randn(shape))
    ours, buffer = theirs.detach().clone()[None], torch.zeros(1, *shape)
    optimizer = torch.optim.Muon([theirs], lr=0.05, momentum=0.95, nesterov=True, weight_decay=0.0)
    for _ in range(4):
        theirs.grad = torch.randn(shape)
        muon_update(ours, theirs.grad[None], buffer, lr=0.05, momentum=0.95, dtype=torch.bfloat16)
        optimizer.step()
    change = (theirs - ours[0]).norm() / theirs.norm()
    assert change < 2e-3  # four steps of bfloat16 rounding


@pytest.mark.parametrize("shape, factor", [((16, 64), 1.0), ((64, 16), 2.0), ((32, 32), 1.0)])
def test_muon_scale_for_tall_and_wide_matrices(shape, factor):
    torch.manual_seed(2)
    param = torch.zeros(1, *shape)
    muon_update(param, torch.randn(1, *shape), torch.zeros(1, *shape), lr=0.1, momentum=0.9, dtype=torch.float32)
    rms = torch.linalg.svdvals(param[0]).square().mean().sqrt().item()
    assert rms == pytest.approx(0.1 * factor, rel=0.2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_adam_agrees_with_torch(dtype, tolerance):
    torch.manual_seed(3)
    theirs = torch.nn.Parameter(torch.randn(5, 7).to(dtype).float())
    ours = theirs.detach().clone().to(dtype)
    moments = torch.zeros(5, 7), torch.zeros(5, 7)
    optimizer = torch.optim.Adam([theirs], lr=0.01, betas=(0.8, 0.95))
    for t in range(1, 6):
        theirs.grad = torch.randn(5, 7).to(dtype).float()
        corrections = torch.tensor(0.01), torch.tensor(1 - 0.8 ** t), torch.tensor(1 - 0.95 ** t)
        adam_update(ours, theirs.grad.to(dtype), *moments, *corrections, 0.8, 0.95)
        optimizer.step()
    torch.testing.assert_close(ours.float(), theirs.detach(), atol=tolerance, rtol=tolerance)


def test_every_parameter_has_its_published_rule():
    hp = Hyperparameters(num_layers=3, num_heads=2, model_dim=64, sequence_length=128, window_end=128)
    model = build_model(hp, torch.device("meta"), torch.bfloat16, flex=False)
    names = {id(p): name for name, p in model.named_parameters()}
    rules = {names[id(p)]: (b.kind, b.lr) for b in Optimizer(model, hp, torch.float32).buckets for p in b.params}
    assert set(rules) == set(names.values())
    for name, rule in rules.items():
        if name in ("embed.weight", "value_embed.weight"):
            assert rule == ("adam", 0.6)
        elif name == "head.linear.weight":
            assert rule == ("adam", 0.008)
        elif "mix" in name or name == "skip_weights":
            assert rule == ("adam", 0.04)
        else:
            assert rule == ("muon", 0.05), name
    assert sum(kind == "muon" for kind, _ in rules.values()) == 3 * 6


@pytest.mark.parametrize("kind, shapes", [("muon", [(4, 6)] * 5), ("adam", [(), (2,), (3,)]), ("adam", [(7, 3)]),
                                          ("adam", [(8, 3)])])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_buckets_divide_and_join(kind, shapes, world_size):
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    wanted = [p.detach() + 1 for p in params]
    buckets = [Bucket(kind, 0.1, params, rank, world_size) for rank in range(world_size)]
    packed = buckets[0].pack([p.detach() + 1 for p in params])
    joined = torch.cat([bucket.shard(packed) for bucket in buckets])
    assert torch.equal(joined, packed) and len(packed) % world_size == 0
    assert packed.numel() - sum(p.numel() for p in params) < world_size * math.prod(buckets[0].row_shape)
    assert not packed[sum(buckets[0].rows):].any()
    with torch.no_grad():
        buckets[0].unpack(packed)
    assert all(torch.equal(p, w) for p, w in zip(params, wanted, strict=True))


def test_one_rank_moves_as_torch_would(tiny_model, hp):
    """The whole class against torch.optim on every parameter, for three steps."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no torch.optim.Muon")
    ours = Optimizer(tiny_model, hp, torch.bfloat16)
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in tiny_model.named_parameters()}
    rule = {id(p): bucket for bucket in ours.buckets for p in bucket.params}
    theirs = []
    for name, p in tiny_model.named_parameters():
        bucket = rule[id(p)]
        if bucket.kind == "muon":
            theirs.append(torch.optim.Muon([copies[name]], lr=bucket.lr, momentum=0.9, weight_decay=0.0))
        else:
            theirs.append(torch.optim.Adam([copies[name]], lr=bucket.lr, betas=(hp.adam_beta1, hp.adam_beta2)))
    for seed in range(3):
        torch.manual_seed(seed)
        for name, p in tiny_model.named_parameters():
            p.grad = torch.randn_like(p)
            copies[name].grad = p.grad.clone()
        ours.step(1.0, 0.9)
        for optimizer in theirs:
            optimizer.step()
    for name, p in tiny_model.named_parameters():
        assert (p - copies[name]).norm() <= 5e-3 * copies[name].norm() + 1e-6, name
    assert all(p.grad is None for p in tiny_model.parameters())
