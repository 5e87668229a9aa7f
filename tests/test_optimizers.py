"""Muon and Adam against the mathematics and against torch's own, and the buckets that divide their work."""
import math
import re
from dataclasses import replace

import pytest
import slow_optimizer
import torch
from conftest import RECIPE

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
    change,
    muon_direction,
    orthogonalise,
    training_step,
)

CPU = torch.device("cpu")


def group(rule, dtype=torch.float32, betas=(0.8, 0.95), decay=0.0, lr=0.1):
    return Group("name", ".*", rule, lr, betas, decay, dtype)


MUON = group("muon", betas=(0.95,))


def numbers(t, momentum=0.9, betas=(0.8, 0.95)):
    """What an update rule is told of step t - 1."""
    return [torch.tensor(momentum), *(torch.tensor(1 - beta ** t) for beta in betas)]


# ---------------------------------------------------------------------------------------------------------------------
# Polar Express

def matrix_of(shape, decades=1.5):
    """(u, singular values from 1 down, v)."""
    torch.manual_seed(0)
    rank = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, rank, dtype=torch.double))[0] for n in shape)
    return u, torch.logspace(0, -decades, rank, dtype=torch.double), v


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
@pytest.mark.parametrize("dtype, slack", [(torch.float32, 2e-4), (torch.bfloat16, 0.06)])
def test_polar_express_maps_singular_values_by_its_polynomials(shape, dtype, slack):
    """And leaves the singular vectors; condition number 30; the scale is gone; a stack is done one by one."""
    u, s, v = matrix_of(shape)
    matrix = u @ s.diag() @ v.T
    result = orthogonalise(torch.stack([matrix, 1000 * matrix, matrix.flip(0)]).to(dtype)).double()
    wanted = slow_optimizer.polar_express(matrix)
    for got, of in ((result[0], wanted), (result[1], wanted), (result[2], wanted.flip(0))):
        torch.testing.assert_close(got, of, atol=slack, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_polar_express_pulls_singular_values_to_one(shape):
    u, s, v = matrix_of(shape, decades=2)  # condition number 100
    values = torch.linalg.svdvals(orthogonalise((u @ s.diag() @ v.T).float()[None])[0])
    assert 0.85 < values.min() and values.max() < 1.15


def test_polar_express_of_zero_is_zero():
    assert not orthogonalise(torch.zeros(3, 8, 16)).any()


# ---------------------------------------------------------------------------------------------------------------------
# NorMuon

def test_momentum_is_an_average_of_the_gradients(monkeypatch):
    """What is orthogonalised: (1 - m) g + m buffer, the buffer an average with weights (1 - m) m^age, whatever m is at
    each step."""
    given = []
    monkeypatch.setattr(train_gpt, "orthogonalise", lambda x: given.append(x.clone()) or torch.ones_like(x))
    torch.manual_seed(0)
    grads, momenta = torch.randn(5, 2, 6, 4), (0.85, 0.86, 0.87, 0.95, 0.9)
    buffer, second = torch.zeros(2, 6, 4), torch.zeros(2, 6, 1)
    for t, momentum in enumerate(momenta):
        muon_direction(MUON, grads[t], buffer, second, torch.tensor(momentum), torch.tensor(0.0))
        weights = [(1 - momenta[s]) * math.prod(momenta[s + 1:t + 1]) for s in range(t + 1)]
        average = sum(w * g for w, g in zip(weights, grads, strict=False))
        torch.testing.assert_close(buffer, average)
        torch.testing.assert_close(given[-1], (1 - momentum) * grads[t] + momentum * average)


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 48, 16)])
def test_rows_are_divided_by_their_running_size_and_the_norm_is_kept(shape, monkeypatch):
    """Against a loop over matrices and rows, for four steps of directions whose rows differ a hundredfold."""
    torch.manual_seed(0)
    directions = torch.randn(4, *shape) * torch.logspace(0, -2, shape[1])[:, None]
    buffer, second = torch.zeros(shape), torch.zeros(*shape[:2], 1)
    wanted_second = torch.zeros(shape[:2], dtype=torch.double)
    for t in range(4):
        monkeypatch.setattr(train_gpt, "orthogonalise", lambda x: directions[t])  # noqa: B023 (used within the turn)
        result = muon_direction(MUON, torch.randn(shape), buffer, second, torch.tensor(0.9), torch.tensor(0.0))
        for i in range(shape[0]):
            wanted, wanted_second[i] = slow_optimizer.rows_evened(directions[t, i].double(), wanted_second[i],
                                                                      MUON.betas[0])
            torch.testing.assert_close(result[i].double(), wanted, atol=1e-5, rtol=1e-4)
            assert result[i].norm().item() == pytest.approx(directions[t, i].norm().item(), rel=1e-5)
        torch.testing.assert_close(second[..., 0].double(), wanted_second, atol=0, rtol=1e-5)
    rows = result.norm(dim=-1)
    assert rows.max() < 3 * rows.min() < 3 * rows.max()  # even, where they were a hundred times apart


def test_a_matrix_without_gradient_stays_where_it_is():
    state = torch.zeros(1, 8, 4), torch.zeros(1, 8, 1)
    assert not muon_direction(MUON, torch.zeros(1, 8, 4), *state, torch.tensor(0.9), torch.tensor(0.0)).any()


# ---------------------------------------------------------------------------------------------------------------------
# Adam and decay

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_adam_agrees_with_torch(dtype, tolerance):
    torch.manual_seed(3)
    theirs = torch.nn.Parameter(torch.randn(5, 7).to(dtype).float())
    ours = theirs.detach().clone().to(dtype)
    moments = torch.zeros(5, 7), torch.zeros(5, 7)
    optimizer = torch.optim.Adam([theirs], lr=0.01, betas=(0.8, 0.95), eps=1e-10)
    for t in range(1, 6):
        theirs.grad = (1e-8 * torch.randn(5, 7)).to(dtype).float()  # so small that an eps of 1e-8 would show
        ours.add_(adam_direction(group("adam"), theirs.grad.to(dtype), *moments, *numbers(t)), alpha=-0.01)
        optimizer.step()
    torch.testing.assert_close(ours.float(), theirs.detach(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("lr, lr_scale, decay", [(0.1, 1.0, 0.3), (0.2, 0.5, 0.3), (0.1, 1.73, 0.0)])
def test_decay_is_cautious_and_falls_with_the_square_of_the_schedule(lr, lr_scale, decay):
    """Number by number: only where the step leads to zero, by lr lr_scale x decay lr_scale of the value."""
    torch.manual_seed(0)
    values, steps = torch.randn(50), torch.randn(50)
    values[:3], steps[3:6] = 0, 0
    got = lr_scale * change(lambda *_: steps, group("adam", decay=decay), None, values, [], torch.tensor(lr),
                            torch.tensor(lr_scale))
    for value, step, moved in zip(values.tolist(), steps.tolist(), got.tolist(), strict=True):
        shrunk = lr * lr_scale * decay * lr_scale * value if step * value > 0 else 0.0
        assert moved == pytest.approx(lr * lr_scale * step + shrunk, rel=1e-5, abs=1e-9)
    assert (torch.sign(values) * torch.sign(steps) > 0).any() and (torch.sign(values) * torch.sign(steps) < 0).any()


@pytest.mark.parametrize("name, wd", [
    # matrices: 1.2, the scheduled rate with its factor, and the group's rate without
    ("attention", 0.023 * 1.2), ("mlp_in", 0.023 * 1.2), ("mlp_out", 0.023 * 1.2),
    # Adam: 0.005 x 5 for tables, x 150 for head and embedding, and the rate twice
    ("values", 0.6 * 0.005 * 5), ("ngrams", 0.6 * 0.005 * 5), ("head", 0.008 * 0.005 * 150),
    ("scalars", 0), ("gates", 0), ("skip_gate", 0), ("smear_gate", 0), ("residual", 0), ("branch", 0)])
def test_published_decays(name, wd):
    (found,) = [g for g in train_gpt.optimizer_groups(Hyperparameters(), torch.float32) if g.name == name]
    assert found.decay == pytest.approx(wd, rel=1e-9)


def adam_inputs(rows=6):
    torch.manual_seed(4)
    return torch.randn(rows, 3), torch.randn(rows, 3), torch.rand(rows, 3) + 0.1


def test_lazy_adam_leaves_untouched_rows_and_their_moments():
    grad, m, v = adam_inputs()
    grad[[1, 4]] = 0
    before = m.clone(), v.clone()
    dense_m, dense_v = m.clone(), v.clone()
    direction = adam_direction(group("lazy_adam"), grad, m, v, *numbers(3))
    dense = adam_direction(group("adam"), grad, dense_m, dense_v, *numbers(3))
    touched = [0, 2, 3, 5]
    assert not direction[[1, 4]].any() and dense[[1, 4]].any()
    for now, then, other in ((m, before[0], dense_m), (v, before[1], dense_v)):
        assert torch.equal(now[[1, 4]], then[[1, 4]]) and torch.equal(now[touched], other[touched])
    assert torch.equal(direction[touched], dense[touched])


# ---------------------------------------------------------------------------------------------------------------------
# Which parameter is updated how

def test_every_parameter_has_its_published_rule():
    """Rule, rate and betas of all 11 layers, each by its name."""
    hp = Hyperparameters()
    model = build_model(hp, torch.device("meta"), torch.bfloat16, flex=False)
    names = {id(p): name for name, p in model.named_parameters()}
    groups, matrices = train_gpt.optimizer_groups(hp, torch.float32), 0
    for name in names.values():
        (mine,) = [g for g in groups if re.fullmatch(g.parameters, name)]
        if factor := slow_optimizer.muon_settings(name):
            assert (mine.rule, mine.betas, mine.lr) == ("muon", (0.9,), pytest.approx(0.023 * factor)), name
            matrices += 1
        else:
            rate, beta1, beta2, _ = slow_optimizer.adam_settings(name)
            assert (mine.rule, mine.betas, mine.lr) == ("adam", (beta1, beta2), pytest.approx(rate)), name
    assert matrices == 10 * 3 + 11 * 2


def test_buckets_keep_each_parameters_rate(recipe):
    """Small parameters and matrices of one shape share a bucket, whatever their rates; each has its own."""
    model = build_model(recipe, CPU, torch.float32, flex=False)
    optimizer, seen = Optimizer(model, recipe, torch.float32), set()
    names = {id(p): name for name, p in model.named_parameters()}
    for bucket in optimizer.buckets:
        rates = bucket.parts(bucket.lr.expand(bucket.rows, *bucket.values.shape[1:]).contiguous())
        for p, lr in zip(bucket.params, rates, strict=True):
            factor = slow_optimizer.muon_settings(names[id(p)])
            rate = 0.023 * factor if factor else slow_optimizer.adam_settings(names[id(p)])[0]
            torch.testing.assert_close(lr, torch.full_like(lr, rate))
            seen.add(names[id(p)])
    assert seen == set(names.values()) and len(optimizer.buckets) < 12
    whose = {names[id(p)]: bucket for bucket in optimizer.buckets for p in bucket.params}
    assert optimizer.head is whose["head.linear.weight"] and optimizer.embed is whose["embed.weight"]


@pytest.mark.parametrize("pattern, found", [(r"head\.nothing", "none"), (r"(head|embed)\..*|stem\.smear_scale",
                                                                         r"head \(adam\) and")])
def test_a_parameter_in_no_group_or_in_two_is_an_error_that_says_what_to_add(hp, monkeypatch, pattern, found):
    groups = train_gpt.optimizer_groups
    monkeypatch.setattr(train_gpt, "optimizer_groups", lambda *args: sorted(
        [group._replace(parameters=pattern) if group.name == "head" else group for group in groups(*args)],
        key=lambda group: group.name != "head"))
    name = "head.linear.weight" if found == "none" else "stem.smear_scale"
    with pytest.raises(UserError, match=rf'parameter {name} is {found}.* add a line: Group\("mine"'):
        Optimizer(build_model(hp, CPU, torch.float32, flex=False), hp, torch.float32)


def test_the_line_to_add_claims_the_parameter_of_every_layer(hp, monkeypatch):
    """Whoever pastes each line that an error proposes has placed all parameters, a line for each kind."""
    groups = [g for g in train_gpt.optimizer_groups(hp, torch.float32) if g.rule != "muon"]
    monkeypatch.setattr(train_gpt, "optimizer_groups", lambda *args: groups)
    model = build_model(hp, CPU, torch.float32, flex=False)
    for kind in range(5):
        with pytest.raises(UserError) as error:
            Optimizer(model, hp, torch.float32)
        pattern = re.search(r'add a line: Group\("mine", r"(.*?)", "adam"', str(error.value))[1]
        assert sum(bool(re.fullmatch(pattern, name)) for name, _ in model.named_parameters()) == len(hp.layers)
        groups.append(Group(f"mine{kind}", pattern, "adam", hp.scalar_lr, (0.8, 0.95), 0.0, torch.float32))
    Optimizer(model, hp, torch.float32)


def test_a_rule_that_does_not_exist_is_one_line(hp, monkeypatch):
    groups = [group._replace(rule="sgd") for group in train_gpt.optimizer_groups(hp, torch.float32)]
    monkeypatch.setattr(train_gpt, "optimizer_groups", lambda *args: groups)
    with pytest.raises(UserError, match=r"is \w+ \(sgd\), expected one with a rule of muon, adam"):
        Optimizer(build_model(hp, CPU, torch.float32, flex=False), hp, torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# The whole optimizer

def random_grads(model, tied, seed):
    """One for each parameter that a loss reaches; the embedding has none while it is the head."""
    torch.manual_seed(seed)
    return {name: torch.randn_like(p) for name, p in model.named_parameters() if not (tied and name == "embed.weight")}


def give(model, grads):
    """As a backward would, on top of what waits for Adam."""
    for name, grad in grads.items():
        p = model.get_parameter(name)
        p.grad = grad.clone() if p.grad is None else p.grad + grad


def moments_of(optimizer, model):
    """The first state of each parameter, by its name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: part for bucket in optimizer.buckets
            for p, part in zip(bucket.params, bucket.parts(next(iter(bucket.state.values()))), strict=True)}


def test_ten_steps_of_the_recipe_are_the_written_out_ones(recipe, recipe_model):
    """All groups through the stages, but for that of the softmax alone: scheduled rates and momenta, tied and untied."""
    ours, slow = Optimizer(recipe_model, recipe, torch.float32), slow_optimizer.SlowOptimizer(recipe_model)
    embed_at_first = recipe_model.embed.weight.detach().clone()
    for step in (0, 1, 4, 5, 8, 9, 12, 13):  # two of each stage; so momentum and rates differ from step to step
        schedule = Schedule(step, recipe, CPU)
        if schedule.unties:
            assert step == 8 and torch.equal(recipe_model.embed.weight, embed_at_first)  # it has rested
            ours.untie()
            slow.untie()
            assert torch.equal(recipe_model.embed.weight, recipe_model.head.linear.weight[0])
            moments = moments_of(ours, recipe_model)
            assert torch.equal(moments["embed.weight"], moments["head.linear.weight"][0])
            assert moments["embed.weight"].any()
        grads = random_grads(recipe_model, schedule.tied, seed=step)
        give(recipe_model, grads)
        ours.step(schedule)
        slow.step(grads, schedule.lr_scale, schedule.momentum)
        for name, p in recipe_model.named_parameters():
            off = (p.double() - slow.values[name]).norm() / (slow.values[name].norm() + 1e-6)
            assert off < 1e-4, (step, name, off)
    for name, moment in moments_of(ours, recipe_model).items():
        torch.testing.assert_close(moment.double(), slow.moments[name][0], atol=1e-5, rtol=1e-3)
    assert not torch.equal(recipe_model.embed.weight, recipe_model.head.linear.weight[0])


def test_a_tied_gradient_is_the_sum_of_both_uses(recipe, recipe_model):
    """Of the head's and of the embedding's, as they are just after the untying."""
    tokens = torch.randint(256, (1, 129), generator=torch.Generator().manual_seed(0))
    tied, untied = Schedule(0, recipe, CPU), Schedule(0, recipe, CPU)
    untied.tied, grads = False, []
    with torch.no_grad():
        recipe_model.embed.weight.copy_(recipe_model.head.linear.weight[0])
    for schedule in (tied, untied):
        recipe_model.zero_grad()
        recipe_model(tokens[:, :-1], tokens[:, 1:], schedule)[0].backward()
        grads.append([recipe_model.head.linear.weight.grad[0], recipe_model.embed.weight.grad])
    (both, none), (head, embed) = grads
    assert none is None and embed.any()
    torch.testing.assert_close(both, head + embed, atol=1e-5 * both.abs().max().item(), rtol=1e-4)


def test_after_the_untying_embedding_and_head_are_two_parameters_of_torch(recipe, recipe_model):
    """Four tied steps, then four untied, without decay: torch's Adam with one parameter, then with two, each from the
    other's state."""
    hp = replace(recipe, adam_every=1, adam_decay=0.0)
    ours, settings = Optimizer(recipe_model, hp, torch.float32), dict(lr=0.008, betas=(0.5, 0.95), eps=1e-10)
    head = torch.nn.Parameter(recipe_model.head.linear.weight[0].detach().clone())
    theirs = torch.optim.Adam([head], **settings)
    schedule = Schedule(0, hp, CPU)
    for step in range(8):
        if step == 4:
            ours.untie()
            embed = torch.nn.Parameter(head.detach().clone())
            second = torch.optim.Adam([embed], **settings)
            state = theirs.state_dict()["state"]
            second.load_state_dict({**second.state_dict(), "state": {0: {k: v.clone() for k, v in state[0].items()}}})
        grads = random_grads(recipe_model, tied=step < 4, seed=step)
        give(recipe_model, grads)
        ours.step(schedule)
        head.grad = grads["head.linear.weight"][0]
        theirs.step()
        if step >= 4:
            embed.grad = grads["embed.weight"]
            second.step()
    torch.testing.assert_close(recipe_model.head.linear.weight[0], head, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(recipe_model.embed.weight, embed, atol=1e-6, rtol=1e-5)


def test_adam_steps_every_second_time_on_the_sum_of_two_gradients(recipe):
    """Two steps with a batch each are, for Adam, one step with both as its micro-batches."""
    batches, weights = [], []
    for seed in (0, 1):
        tokens = torch.randint(256, (2, 129), generator=torch.Generator().manual_seed(seed))
        batches.append((tokens[:, :-1], tokens[:, 1:]))
    for every, steps in ((2, [batches[:1], batches[1:]]), (1, [batches])):
        hp = replace(recipe, adam_every=every, muon_lr=0.0)
        model = build_model(hp, CPU, torch.float32, flex=False)
        optimizer, schedule = Optimizer(model, hp, torch.float32), Schedule(0, hp, CPU)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for batch in steps:
            if batch is steps[-1]:
                assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
            training_step(model, optimizer, batch, schedule)
        assert all(p.grad is None for p in model.parameters())
        weights.append({name: p.detach() for name, p in model.named_parameters()})
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"head.linear.weight", "value_embed.weight", "ngram.tables.0.weight"} <= moved
    assert "embed.weight" not in moved and not any(map(slow_optimizer.muon_settings, moved))
    for name in moved:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-5, rtol=1e-4)


def test_muon_steps_every_time(recipe, recipe_model):
    optimizer, schedule = Optimizer(recipe_model, recipe, torch.float32), Schedule(0, recipe, CPU)
    for step in range(3):
        before = {name: p.detach().clone() for name, p in recipe_model.named_parameters()}
        give(recipe_model, random_grads(recipe_model, True, step))
        optimizer.step(schedule)
        for name, p in recipe_model.named_parameters():
            moves = bool(slow_optimizer.muon_settings(name)) or (step == 1 and name != "embed.weight")
            assert torch.equal(p, before[name]) != moves, name
            assert (p.grad is None) == (moves or step == 1 or name == "embed.weight"), name


def test_the_optimizer_sees_each_gradient_that_is_not_finite(recipe, recipe_model):
    """Its sum over this rank's gradients is what the watch looks at: of Adam's when Adam takes them."""
    optimizer, schedule = Optimizer(recipe_model, recipe, torch.float32), Schedule(0, recipe, CPU)
    sums = []
    for step in range(2):
        grads = random_grads(recipe_model, True, step)
        if step == 0:
            grads["value_embed.weight"][7, 7] = torch.inf
        give(recipe_model, grads)
        optimizer.step(schedule)
        sums.append(optimizer.gradient_sum.isfinite().item())
    assert sums == [True, False]


def test_a_sparse_table_moves_as_a_dense_one(hp):
    """The rows that occur, twice in one batch too; two micro-batches; a row that rests for a step."""
    models = [build_model(hp, CPU, torch.float32, False, sparse) for sparse in (True, False)]
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


# ---------------------------------------------------------------------------------------------------------------------
# Buckets

@pytest.mark.parametrize("kind, shapes", [("muon", [(1, 6, 4)] * 5), ("muon", [(3, 4, 4), (1, 4, 4)]),
                                          ("adam", [(), (2,), (3, 4)]), ("adam", [(7, 3)]), ("adam", [(1, 8, 3)])])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_buckets_divide_and_join(kind, shapes, world_size, monkeypatch):
    """The ranks' rows are disjoint and complete; the parameters lie in values, their gradients in what is sent; each
    row has its parameter's rate."""
    wanted = [torch.randn(shape) for shape in shapes]
    groups = [group(kind, lr=0.1 + i) for i in range(len(shapes))]
    shards, rates = [], []
    for rank in range(world_size):
        params = [torch.nn.Parameter(value.clone()) for value in wanted]
        bucket = Bucket(params, groups, False, rank, world_size)
        assert all(torch.equal(p, w) for p, w in zip(params, wanted, strict=True))
        shards.append(bucket.values[bucket.my_rows])
        rates.append(bucket.lr.expand_as(shards[-1]))
    packed, rates = torch.cat(shards), torch.cat(rates)
    assert torch.equal(packed, bucket.values) and len(packed) == world_size * len(shards[0])
    assert packed[0].ndim == {"muon": 2, "adam": 1 if len(shapes) == 1 else 0}[kind]  # a table is divided by its rows
    assert packed.numel() - sum(w.numel() for w in wanted) < world_size * math.prod(packed.shape[1:])
    assert not packed[bucket.rows:].any()
    for lr, one in zip(bucket.parts(rates.contiguous()), groups, strict=True):
        torch.testing.assert_close(lr, torch.full_like(lr, one.lr))
    with torch.no_grad():
        for p in params:
            p.add_(1)
            p.grad = torch.full_like(p, 2)
    assert torch.equal(bucket.values.flatten()[:sum(p.numel() for p in params)], torch.cat(
        [w.flatten() for w in wanted]) + 1)
    sent, before = [], [p.grad for p in params]
    monkeypatch.setattr(train_gpt, "_reduce_scatter", lambda mine, whole, **_: sent.append(whole))
    if len(params) > 1:
        params[0].grad = before[0] = None  # a parameter that the loss did not reach
    total = bucket.reduce()
    assert total == 2 * sum(p.numel() for p in before if p is not None) and all(p.grad is None for p in params)
    whole, = sent or [bucket.grad]
    for part, gradient in zip(bucket.parts(whole), before, strict=True):
        assert part.eq(0 if gradient is None else 2).all()
    assert whole.shape == bucket.values.shape and not whole[bucket.rows:].any()
    if len(params) == 1 and bucket.rows % world_size == 0:  # a table's gradient is not copied
        assert whole.data_ptr() == before[0].data_ptr()


def test_state_goes_to_any_number_of_ranks(recipe, monkeypatch):
    """What one rank saves, eight ranks take apart, without padding, and each has its rows."""
    model = build_model(recipe, CPU, torch.float32, flex=False)
    optimizer = Optimizer(model, recipe, torch.float32)
    for step in range(2):
        give(model, random_grads(model, True, step))
        optimizer.step(Schedule(step, recipe, CPU))
    state = optimizer.state_dict()
    shards = []
    for rank in range(8):
        other = Optimizer(build_model(recipe, CPU, torch.float32, flex=False), recipe, torch.float32, rank, 8)
        other.load_state_dict(state)
        assert other.num_updates == 2
        shards.append([bucket.state for bucket in other.buckets])
    for i, whole in enumerate(state["buckets"]):
        for name, value in whole.items():
            joined = torch.cat([shard[i][name] for shard in shards])
            assert torch.equal(joined[:len(value)], value) and not joined[len(value):].any()
    assert sum(value.any().item() for whole in state["buckets"] for value in whole.values()) > 10
    optimizer.load_state_dict(None)
    assert optimizer.num_updates == 0
    assert not any(value.any() for whole in optimizer.state_dict()["buckets"] for value in whole.values())


def test_flags_reach_the_groups(recipe):
    """Each rate, decay and beta of the command line is some group's."""
    flags = dict(head_lr=0.1, value_lr=0.2, ngram_lr=0.3, scalar_lr=0.4, adam_decay=0.5, muon_lr=0.6, muon_decay=0.7,
                 muon_beta2=0.8)
    hp = train_gpt.parse_arguments(["--track=laptop", *RECIPE, *(f"--{k}={v}" for k, v in flags.items())])
    by_name = {g.name: g for g in train_gpt.optimizer_groups(hp, torch.float32)}
    assert [by_name[name].lr for name in ("head", "values", "ngrams", "scalars")] == [0.1, 0.2, 0.3, 0.4]
    assert by_name["head"].decay == pytest.approx(150 * 0.5 * 0.1) and by_name["attention"].betas == (0.8,)
    assert (by_name["attention"].lr, by_name["attention"].decay) == (0.6, pytest.approx(0.6 * 0.7))
