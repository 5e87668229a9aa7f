"""Muon and Adam against the mathematics and against torch's own, and the buckets that divide their work."""
import math
import re

import pytest
import torch

import train_gpt
from train_gpt import (
    Bucket,
    Group,
    Hyperparameters,
    Optimizer,
    Schedule,
    UserError,
    adam_direction,
    build_model,
    lazy_adam_direction,
    muon_direction,
    newton_schulz,
    training_step,
)

CPU = torch.device("cpu")


def group(rule, dtype=torch.float32, betas=(0.8, 0.95), decay=0.0):
    return Group("name", ".*", rule, 0.1, betas, decay, dtype)


def numbers(t, momentum=0.9, betas=(0.8, 0.95)):
    """What an update rule is told of step t - 1."""
    return [torch.tensor(momentum), *(torch.tensor(1 - beta ** t) for beta in betas)]


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
        momentum = torch.tensor(0.95)
        ours -= 0.05 * muon_direction(group("muon", torch.bfloat16), theirs.grad[None], ours, buffer, momentum)
        optimizer.step()
    change = (theirs - ours[0]).norm() / theirs.norm()
    assert change < 2e-3  # four steps of bfloat16 rounding


@pytest.mark.parametrize("shape, factor", [((16, 64), 1.0), ((64, 16), 2.0), ((32, 32), 1.0)])
def test_muon_scale_for_tall_and_wide_matrices(shape, factor):
    torch.manual_seed(2)
    values, buffer = torch.zeros(2, 1, *shape)
    direction = muon_direction(group("muon"), torch.randn(1, *shape), values, buffer, torch.tensor(0.9))
    rms = torch.linalg.svdvals(direction[0]).square().mean().sqrt().item()
    assert rms == pytest.approx(factor, rel=0.2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_adam_agrees_with_torch(dtype, tolerance):
    torch.manual_seed(3)
    theirs = torch.nn.Parameter(torch.randn(5, 7).to(dtype).float())
    ours = theirs.detach().clone().to(dtype)
    moments = torch.zeros(5, 7), torch.zeros(5, 7)
    optimizer = torch.optim.Adam([theirs], lr=0.01, betas=(0.8, 0.95))
    for t in range(1, 6):
        theirs.grad = torch.randn(5, 7).to(dtype).float()
        ours.add_(adam_direction(group("adam"), theirs.grad.to(dtype), ours, *moments, *numbers(t)), alpha=-0.01)
        optimizer.step()
    torch.testing.assert_close(ours.float(), theirs.detach(), atol=tolerance, rtol=tolerance)


def test_every_parameter_has_its_published_rule():
    hp = Hyperparameters(num_layers=3, num_heads=2, model_dim=64, sequence_length=128, window_end=128)
    model = build_model(hp, torch.device("meta"), torch.bfloat16, flex=False)
    names = {id(p): name for name, p in model.named_parameters()}
    buckets = Optimizer(model, hp, torch.float32).buckets
    rules = {names[id(p)]: (bucket.group.rule, bucket.group.lr) for bucket in buckets for p in bucket.params}
    assert all(bucket.group.decay == 0 for bucket in buckets)
    assert set(rules) == set(names.values())
    for name, rule in rules.items():
        if name in ("embed.weight", "value_embed.weight"):
            assert rule == ("adam", 0.6)
        elif name.startswith("ngram.tables."):
            assert rule == ("lazy_adam", 0.6)
        elif name == "head.linear.weight":
            assert rule == ("adam", 0.008)
        elif "mix" in name:
            assert rule == ("adam", 0.04)
        else:
            assert rule == ("muon", 0.05), name
    assert sum(kind == "muon" for kind, _ in rules.values()) == 3 * 4


@pytest.mark.parametrize("pattern, found", [(r"head\.nothing", "none"), (r"head\..*|blocks\.1\.skip_mix", "head and")])
def test_a_parameter_in_no_group_or_in_two_is_an_error_that_says_what_to_add(hp, monkeypatch, pattern, found):
    groups = train_gpt.optimizer_groups
    monkeypatch.setattr(train_gpt, "optimizer_groups", lambda *args: sorted(
        [group._replace(parameters=pattern) if group.name == "head" else group for group in groups(*args)],
        key=lambda group: group.name != "head"))
    name = "head.linear.weight" if found == "none" else "blocks.1.skip_mix"
    with pytest.raises(UserError, match=rf'parameter {name} is {found}.* add a line: Group\("mine"'):
        Optimizer(build_model(hp, CPU, torch.float32, flex=False), hp, torch.float32)


def test_the_line_to_add_claims_the_parameter_of_every_layer(hp, monkeypatch):
    """Whoever pastes each line that an error proposes has placed all parameters, a line for each kind."""
    groups = train_gpt.optimizer_groups(hp, torch.float32)[1:]  # none for the matrices of the blocks
    monkeypatch.setattr(train_gpt, "optimizer_groups", lambda *args: groups)
    model = build_model(hp, CPU, torch.float32, flex=False)
    for kind in range(4):
        with pytest.raises(UserError) as error:
            Optimizer(model, hp, torch.float32)
        pattern = re.search(r'add a line: Group\("mine", r"(.*?)", "adam"', str(error.value))[1]
        assert sum(bool(re.fullmatch(pattern, name)) for name, _ in model.named_parameters()) == hp.num_layers
        groups.append(Group(f"mine{kind}", pattern, "adam", hp.scalar_lr, (0.8, 0.95), 0.0, torch.float32))
    Optimizer(model, hp, torch.float32)


def test_a_rule_that_does_not_exist_is_one_line(hp, monkeypatch):
    groups = [group._replace(rule="sgd") for group in train_gpt.optimizer_groups(hp, torch.float32)]
    monkeypatch.setattr(train_gpt, "optimizer_groups", lambda *args: groups)
    with pytest.raises(UserError, match="has the rule sgd, expected one of RULES: muon, adam"):
        Optimizer(build_model(hp, CPU, torch.float32, flex=False), hp, torch.float32)


def test_weight_decay_is_that_of_adamw(hp, monkeypatch):
    """A group's decay in the table does what torch.optim.AdamW does, on dense parameters."""
    groups = train_gpt.optimizer_groups
    monkeypatch.setattr(train_gpt, "optimizer_groups", lambda *args: [
        group._replace(decay=0.3) if group.rule == "adam" else group for group in groups(*args)])
    model = build_model(hp, CPU, torch.float32, flex=False)
    ours = Optimizer(model, hp, torch.float32)
    decayed = {id(p): bucket for bucket in ours.buckets for p in bucket.params if bucket.group.decay}
    pairs = [(p, torch.nn.Parameter(p.detach().clone())) for p in model.parameters() if id(p) in decayed]
    theirs = torch.optim.AdamW([{"params": [copy], "lr": decayed[id(p)].group.lr} for p, copy in pairs],
                               betas=(hp.adam_beta1, hp.adam_beta2), weight_decay=0.3)
    for _ in range(3):
        for p, copy in pairs:
            p.grad = torch.randn_like(p)
            copy.grad = p.grad.clone()
        ours.step(Schedule(0, hp, CPU))
        theirs.step()
    for p, copy in pairs:
        torch.testing.assert_close(p, copy, atol=1e-5, rtol=1e-5)


def test_a_rule_sees_the_values(hp, monkeypatch):
    """Of its own rows, as they are before the update: a rule that returns them takes the group to zero at rate 1."""
    for sparse in (True, False):
        with monkeypatch.context() as patch:
            patch.setitem(train_gpt.RULES, "shrink", train_gpt.Rule(lambda group, grad, values, *_: values, (), False))
            groups = train_gpt.optimizer_groups
            patch.setattr(train_gpt, "optimizer_groups", lambda *args: [
                group._replace(rule="shrink", lr=1.0) if group.name in ("ngrams", "head") else group
                for group in groups(*args)])  # noqa: B023 (used within the turn)
            model = build_model(hp, CPU, torch.float32, False, sparse)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1)
            optimizer = Optimizer(model, hp, torch.float32)
            tokens = torch.zeros(1, 128, dtype=torch.long)
            training_step(model, optimizer, [(tokens, tokens)], Schedule(0, hp, CPU))
            assert not model.head.linear.weight.any()
            for table in model.ngram.tables:
                assert bool(table.weight.any()) == sparse and (table.weight == 0).all(-1).any()


def adam_inputs(rows=6):
    torch.manual_seed(4)
    return torch.randn(rows, 3), torch.randn(rows, 3), torch.rand(rows, 3) + 0.1


def test_lazy_adam_leaves_untouched_rows_and_their_moments():
    grad, m, v = adam_inputs()
    grad[[1, 4]] = 0
    before = m.clone(), v.clone()
    dense_m, dense_v, values = m.clone(), v.clone(), torch.zeros(6, 3)
    direction = lazy_adam_direction(group("lazy_adam"), grad, values, m, v, *numbers(3))
    dense = adam_direction(group("adam"), grad, values, dense_m, dense_v, *numbers(3))
    touched = [0, 2, 3, 5]
    assert not direction[[1, 4]].any() and dense[[1, 4]].any()
    for now, then, other in ((m, before[0], dense_m), (v, before[1], dense_v)):
        assert torch.equal(now[[1, 4]], then[[1, 4]]) and torch.equal(now[touched], other[touched])
    assert torch.equal(direction[touched], dense[touched])


def test_a_sparse_table_moves_as_a_dense_one(hp):
    """The rows that occur, twice in one batch too; two micro-batches; a row that rests for a step."""
    models = [build_model(hp, torch.device("cpu"), torch.float32, False, sparse) for sparse in (True, False)]
    optimizers = [Optimizer(model, hp, torch.float32) for model in models]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        batch = [(torch.randint(30, (2, 128), generator=generator), torch.randint(30, (2, 128), generator=generator))
                 for _ in range(2)]
        for model, optimizer in zip(models, optimizers, strict=True):
            training_step(model, optimizer, batch, Schedule(step, hp, CPU))
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6, name  # sums in another order
    assert all(table.weight.any() for table in models[0].ngram.tables)


@pytest.mark.parametrize("kind, shapes", [("muon", [(1, 4, 6)] * 5), ("muon", [(3, 4, 4), (1, 4, 4)]),
                                          ("adam", [(), (2,), (3,)]), ("adam", [(7, 3)]), ("adam", [(1, 8, 3)])])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_buckets_divide_and_join(kind, shapes, world_size, monkeypatch):
    """The ranks' rows are disjoint and complete; the parameters lie in values, their gradients in grads."""
    wanted = [torch.randn(shape) for shape in shapes]
    shards = []
    for rank in range(world_size):
        params = [torch.nn.Parameter(value.clone()) for value in wanted]
        bucket = Bucket(group(kind), params, False, rank, world_size)
        assert all(torch.equal(p, w) for p, w in zip(params, wanted, strict=True))
        shards.append(bucket.values[bucket.my_rows])
    packed = torch.cat(shards)
    assert torch.equal(packed, bucket.values) and len(packed) == world_size * len(shards[0])
    assert kind == "muon" or packed[0].ndim < 2  # a table is divided by its rows
    assert packed.numel() - sum(w.numel() for w in wanted) < world_size * math.prod(packed.shape[1:])
    assert not packed[bucket.rows:].any()
    with torch.no_grad():
        for p in params:
            p.add_(1)
            p.grad = torch.full_like(p, 2)
    assert torch.equal(bucket.values.flatten()[:sum(p.numel() for p in params)], torch.cat(
        [w.flatten() for w in wanted]) + 1)
    monkeypatch.setattr(train_gpt, "_reduce_scatter", lambda mean, *_, **__: None)
    params[0].grad = None  # a parameter that the loss did not reach
    total = bucket.reduce()
    assert total == 2 * sum(p.numel() for p in params[1:]) and all(p.grad is None for p in params)
    first, *others = bucket.parts(bucket.grads)
    assert not first.any() and all(part.eq(2).all() for part in others) and not bucket.grads[bucket.rows:].any()


def test_one_rank_moves_as_torch_would(tiny_model, hp):
    """The whole class against torch.optim on every parameter, for three steps."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no torch.optim.Muon")
    ours, schedule = Optimizer(tiny_model, hp, torch.bfloat16), Schedule(0, hp, CPU)
    schedule.momentum = 0.9
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in tiny_model.named_parameters()}
    rule = {id(p): bucket for bucket in ours.buckets for p in bucket.params}
    theirs = []
    for name, p in tiny_model.named_parameters():
        bucket = rule[id(p)]
        if bucket.group.rule == "muon":  # each part is a matrix of its own
            copies[name] = [torch.nn.Parameter(part) for part in p.detach().clone()]
            theirs.append(torch.optim.Muon(copies[name], lr=bucket.group.lr, momentum=0.9, weight_decay=0.0))
        else:
            theirs.append(torch.optim.Adam([copies[name]], lr=bucket.group.lr, betas=(hp.adam_beta1, hp.adam_beta2)))
    for seed in range(3):
        torch.manual_seed(seed)
        for name, p in tiny_model.named_parameters():
            p.grad = torch.randn_like(p)
            if rule[id(p)].group.rule == "muon":
                for copy, grad in zip(copies[name], p.grad, strict=True):
                    copy.grad = grad.clone()
            else:
                copies[name].grad = p.grad.clone()
        ours.step(schedule)
        for optimizer in theirs:
            optimizer.step()
    for name, p in tiny_model.named_parameters():
        copy = torch.stack(copies[name]) if rule[id(p)].group.rule == "muon" else copies[name]
        assert (p - copy).norm() <= 2e-2 * copy.norm() + 1e-6, name  # bfloat16
    assert all(p.grad is None for p in tiny_model.parameters())
