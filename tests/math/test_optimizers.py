"""Muon, Adam and their buckets against the float64 reference, torch's Adam and the SVD."""
import math
import re
from dataclasses import replace

import pytest
import small
import torch
import torch.nn.functional as F
from reference import optimizer as reference

import train_gpt
from train_gpt import (
    Bucket,
    Group,
    Hyperparameters,
    Momenta,
    Optimizer,
    Schedule,
    UserError,
    adam_direction,
    build_model,
    compute_update,
    muon_direction,
    optimizer_groups,
    orthogonalize,
    parse_arguments,
    training_step,
)

CPU = torch.device("cpu")


def make_group(rule, betas=(0.8, 0.95), decay=0.0, lr=0.1):
    return Group("name", ".*", rule, lr, betas, decay, comm_dtype=torch.float32)


MUON = make_group("muon", betas=(0.95,))


def momenta(nesterov=0.9, fast=None, fast_weight=1.0):
    """Momenta as tensors; by default one momentum."""
    fast = nesterov if fast is None else fast
    return Momenta(torch.tensor(nesterov), torch.tensor(fast), torch.tensor(fast_weight))


def muon_state(*shape):
    """Muon's state tensors for (matrices, rows, columns)."""
    return torch.zeros(shape), torch.zeros(shape), torch.zeros(*shape[:2], 1)


def muon(grad, state, *numbers):
    """muon_direction; numbers: those of momenta(). The last argument, a bias correction, is
    Adam's."""
    return muon_direction(MUON, grad, *state, momenta(*numbers), torch.tensor(0.0))


def adam_numbers(t, betas=(0.8, 0.95)):
    """The last arguments of adam_direction at its t-th update: momenta, bias corrections."""
    return [momenta(), *(torch.tensor(1 - beta ** t) for beta in betas)]


# --- Orthogonalization ----------------------------------------------------------------------------

SHAPES = [(64, 64), (32, 128), (128, 32)]


def matrix_of(shape, decades):
    """A matrix with singular values from 1 down to 10 ** -decades."""
    torch.manual_seed(0)
    rank = min(shape)
    u = torch.linalg.qr(torch.randn(shape[0], rank, dtype=torch.double))[0]
    v = torch.linalg.qr(torch.randn(shape[1], rank, dtype=torch.double))[0]
    return u @ torch.logspace(0, -decades, rank, dtype=torch.double).diag() @ v.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-4), (torch.bfloat16, 0.06)])
def test_orthogonalize_maps_singular_values_by_the_polynomials(shape, dtype, atol):
    """Singular vectors stay, the scale of the matrix does not matter, and each matrix of a stack is
    orthogonalized on its own. The condition number is 30."""
    matrix = matrix_of(shape, decades=1.5)
    stack = torch.stack([matrix, 1000 * matrix, matrix.flip(0)])
    result = orthogonalize(stack.to(dtype)).double()
    expected = reference.polar_express(matrix)
    torch.testing.assert_close(result[0], expected, atol=atol, rtol=0)
    torch.testing.assert_close(result[1], expected, atol=atol, rtol=0)
    torch.testing.assert_close(result[2], expected.flip(0), atol=atol, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_brings_singular_values_close_to_one(shape):
    matrix = matrix_of(shape, decades=2).float()
    singular_values = torch.linalg.svdvals(orthogonalize(matrix[None])[0])
    assert 0.85 < singular_values.min() and singular_values.max() < 1.15


def test_orthogonalize_maps_zero_to_zero():
    assert not orthogonalize(torch.zeros(3, 8, 16)).any()


# --- Muon -----------------------------------------------------------------------------------------


def average_of(grads, decays):
    """The moving average of gradients with weights (1 - m) m^age, if each m is its step's."""
    average = 0
    for s, grad in enumerate(grads):
        average = average + (1 - decays[s]) * math.prod(decays[s + 1:]) * grad
    return average


@pytest.fixture
def orthogonalized(monkeypatch):
    """What was orthogonalized. The result is all ones."""
    inputs = []

    def record_input(x):
        inputs.append(x.clone())
        return torch.ones_like(x)

    monkeypatch.setattr(train_gpt, "orthogonalize", record_input)
    return inputs


def test_muon_orthogonalizes_a_nesterov_average_of_the_gradients(orthogonalized):
    """(1 - n) grad + n momentum, where the momentum is a mean of two moving averages, also if their
    decays change from step to step. The slow one always decays by 0.98."""
    torch.manual_seed(0)
    grads = torch.randn(5, 2, 6, 4)
    numbers = [(0.85, 0.85, 1.0), (0.86, 0.86, 1.0), (0.87, 0.87, 1.0), (0.95, 0.85, 0.4),
               (0.9, 0.84, 0.3)]
    state = fast, slow, _ = muon_state(2, 6, 4)
    for t, (nesterov, decay, weight) in enumerate(numbers):
        muon(grads[t], state, nesterov, decay, weight)
        expected_fast = average_of(grads[:t + 1], [decay for _, decay, _ in numbers[:t + 1]])
        expected_slow = average_of(grads[:t + 1], [0.98] * (t + 1))
        torch.testing.assert_close(fast, expected_fast)
        torch.testing.assert_close(slow, expected_slow)
        momentum = weight * expected_fast + (1 - weight) * expected_slow
        torch.testing.assert_close(
            orthogonalized[-1], (1 - nesterov) * grads[t] + nesterov * momentum)


def test_the_slow_momentum_has_no_effect_before_the_second_part(orthogonalized):
    """With weight 1 of the fast one, not even on the last bit."""
    torch.manual_seed(0)
    grads = torch.randn(3, 2, 6, 4)
    with_slow, without_slow = muon_state(2, 6, 4), muon_state(2, 6, 4)
    with_slow[1].normal_()
    for grad in grads:
        muon(grad, with_slow)
        muon(grad, without_slow)
        assert torch.equal(*orthogonalized[-2:])


def test_a_constant_gradient_has_the_same_direction_with_two_momenta():
    torch.manual_seed(0)
    grad = torch.randn(2, 24, 8)
    state = muon_state(2, 24, 8)
    directions = []
    for fast_weight in (1.0, 1.0, 0.4385, 0.4385):
        directions.append(muon(grad, state, 0.95, 0.85, fast_weight))
    for direction in directions[1:]:
        torch.testing.assert_close(direction, directions[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 48, 16)])
def test_normuon_normalizes_rows_and_keeps_the_norm_of_each_matrix(shape, monkeypatch):
    """Four steps with directions whose rows differ by a factor of 100 agree with the reference."""
    torch.manual_seed(0)
    directions = torch.randn(4, *shape) * torch.logspace(0, -2, shape[1])[:, None]
    state = muon_state(*shape)
    expected_second_moment = torch.zeros(shape[:2], dtype=torch.double)
    for direction in directions:
        monkeypatch.setattr(train_gpt, "orthogonalize", lambda x, direction=direction: direction)
        result = muon(torch.randn(shape), state)
        for i in range(shape[0]):
            expected, expected_second_moment[i] = reference.normalize_rows(
                direction[i].double(), expected_second_moment[i], MUON.betas[0])
            torch.testing.assert_close(result[i].double(), expected, atol=1e-5, rtol=1e-4)
            assert result[i].norm().item() == pytest.approx(direction[i].norm().item(), rel=1e-5)
        torch.testing.assert_close(
            state[2][..., 0].double(), expected_second_moment, atol=0, rtol=1e-5)
    row_norms = result.norm(dim=-1)
    assert row_norms.max() < 3 * row_norms.min()


def test_normuon_does_not_enlarge_tiny_rows_more_than_published(monkeypatch):
    """The second moment counts as at least 1e-10, so a row of size 1e-7 is enlarged 1e5-fold, not
    1e7-fold, beside rows that are enlarged (1 - beta2) ** -0.5 fold in the first step."""
    torch.manual_seed(0)
    direction = torch.ones(1, 4, 8)
    direction[0, 1] = 1e-7
    monkeypatch.setattr(train_gpt, "orthogonalize", lambda x: direction)
    result = muon(torch.randn(1, 4, 8), muon_state(1, 4, 8))
    expected, _ = reference.normalize_rows(
        direction[0].double(), torch.zeros(4, dtype=torch.double), MUON.betas[0])
    torch.testing.assert_close(result[0].double(), expected, atol=1e-6, rtol=1e-4)
    ratio = (result[0, 1] / result[0, 0]).mean().item()
    assert ratio == pytest.approx(1e-7 * 1e5 * 0.05 ** 0.5, rel=1e-3)


def test_muon_does_not_move_a_matrix_without_gradient():
    assert not muon(torch.zeros(1, 8, 4), muon_state(1, 8, 4)).any()


# --- Adam and weight decay ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_adam_agrees_with_torch(dtype, tolerance):
    """The gradients are so small that an eps of 1e-8 instead of 1e-10 would show. torch adds eps
    after the bias correction of the second moment, the recipe before, which is the same as a larger
    eps in the first updates."""
    torch.manual_seed(3)
    expected = torch.nn.Parameter(torch.randn(5, 7).to(dtype).float())
    value = expected.detach().clone().to(dtype)
    state = torch.zeros(5, 7), torch.zeros(5, 7)
    torch_adam = torch.optim.Adam([expected], lr=0.01, betas=(0.8, 0.95), eps=1e-10)
    for t in range(1, 6):
        grad = (1e-8 * torch.randn(5, 7)).to(dtype)
        value.add_(adam_direction(make_group("adam"), grad, *state, *adam_numbers(t)), alpha=-0.01)
        expected.grad = grad.float()
        torch_adam.param_groups[0]["eps"] = 1e-10 / (1 - 0.95 ** t) ** 0.5
        torch_adam.step()
    torch.testing.assert_close(value.float(), expected.detach(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("size", [1e-11, 1e-10, 1e-9])
def test_adam_adds_its_epsilon_before_the_bias_correction(size):
    """Updates for gradients of about the epsilon agree with the reference."""
    torch.manual_seed(5)
    state = torch.zeros(5, 7), torch.zeros(5, 7)
    expected_state = torch.zeros(5, 7).double(), torch.zeros(5, 7).double()
    for t in range(1, 6):
        grad = size * torch.randn(5, 7)
        result = adam_direction(make_group("adam"), grad, *state, *adam_numbers(t))
        expected = reference.adam_step(grad.double(), *expected_state, t, 0.8, 0.95)
        torch.testing.assert_close(result.double(), expected, atol=0, rtol=1e-4)


def test_lazy_adam_skips_rows_without_gradient_and_their_moments():
    """Other rows are updated as Adam updates them."""
    torch.manual_seed(4)
    grad, m, v = torch.randn(6, 3), torch.randn(6, 3), torch.rand(6, 3) + 0.1
    idle, active = [1, 4], [0, 2, 3, 5]
    grad[idle] = 0
    m_before, v_before = m.clone(), v.clone()
    m_dense, v_dense = m.clone(), v.clone()
    lazy = adam_direction(make_group("lazy_adam"), grad, m, v, *adam_numbers(3))
    dense = adam_direction(make_group("adam"), grad, m_dense, v_dense, *adam_numbers(3))
    assert dense[idle].any() and not lazy[idle].any()
    assert torch.equal(lazy[active], dense[active])
    assert torch.equal(m[idle], m_before[idle]) and torch.equal(m[active], m_dense[active])
    assert torch.equal(v[idle], v_before[idle]) and torch.equal(v[active], v_dense[active])


@pytest.mark.parametrize("rule", ["muon", "adam"])
@pytest.mark.parametrize("lr, lr_scale, decay", [(0.2, 0.5, 0.3), (0.1, 1.73, 0.0)])
def test_weight_decay_is_cautious_and_falls_with_the_square_of_the_schedule(
        lr, lr_scale, decay, rule):
    """A weight decays only where the update shrinks it, by lr lr_scale * decay lr_scale of
    itself. Muon's also decay where the update is zero."""
    torch.manual_seed(0)
    values, direction = torch.randn(50), torch.randn(50)
    values[:3] = 0
    direction[3:6] = 0
    update = lr_scale * compute_update(
        lambda *_: direction, make_group(rule, decay=decay), None, values, [],
        torch.tensor(lr), torch.tensor(lr_scale), momenta())
    for value, step, result in zip(values, direction, update, strict=True):
        shrinks = step * value > 0 or (rule == "muon" and step * value == 0)
        decayed = lr * lr_scale * decay * lr_scale * value if shrinks else 0.0
        assert result.item() == pytest.approx(float(lr * lr_scale * step + decayed),
                                              rel=1e-5, abs=1e-9)
    signs = torch.sign(values) * torch.sign(direction)
    assert (signs > 0).any() and (signs < 0).any()
    assert ((direction == 0) & (values != 0)).any()


# --- Groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, decay", [
    ("attention", 0.023 * 1.2), ("mlp_in", 0.023 * 1.2), ("mlp_out", 0.023 * 1.2),
    ("values", 0.6 * 0.005 * 5), ("ngrams", 0.6 * 0.005 * 5), ("head", 0.008 * 0.005 * 150),
    ("gates", 0.008 * 0.005),  # of attention and of value embeddings: the default factor, 1
    ("scalars", 0), ("mudd", 0), ("skip_gate", 0), ("smear_gate", 0), ("resid", 0),
    ("branch", 0)])
def test_weight_decays_are_the_published_ones(name, decay):
    (group,) = [g for g in optimizer_groups(Hyperparameters(), torch.float32) if g.name == name]
    assert group.decay == pytest.approx(decay, rel=1e-9)


def test_every_parameter_has_its_published_rule_learning_rate_and_betas():
    hp = Hyperparameters()
    model = build_model(hp, torch.device("meta"), torch.bfloat16, flex=False)
    groups = optimizer_groups(hp, torch.float32)
    num_muon = 0
    for name, _ in model.named_parameters():
        (group,) = [g for g in groups if re.fullmatch(g.pattern, name)]
        factor = reference.muon_lr_factor(name)
        if factor:
            num_muon += 1
            assert (group.rule, group.betas) == ("muon", (0.9,)), name
            if ".mlp." in name:  # 2,816 / 768 times as wide as the model, not 4 times
                factor *= (2816 / (4 * 768)) ** 0.5
            assert group.lr == pytest.approx(0.023 * factor), name
        else:
            lr, beta1, beta2, decay_factor = reference.adam_settings(name)
            assert (group.rule, group.betas) == ("adam", (beta1, beta2)), name
            assert group.lr == pytest.approx(lr), name
            assert group.decay == pytest.approx(lr * 0.005 * decay_factor), name
    assert num_muon == 10 * 3 + 11 * 2


def test_flags_set_the_learning_rates_decays_and_betas_of_the_groups(recipe):
    flags = dict(head_lr=0.1, value_lr=0.2, ngram_lr=0.3, scalar_lr=0.4, adam_decay=0.5,
                 muon_lr=0.6, muon_decay=0.7, muon_beta2=0.8)
    hp = parse_arguments(small.RECIPE + [f"--{name}={value}" for name, value in flags.items()])
    groups = {group.name: group for group in optimizer_groups(hp, torch.float32)}
    lrs = {name: groups[name].lr for name in ("head", "values", "ngrams", "scalars", "attention")}
    assert lrs == dict(head=0.1, values=0.2, ngrams=0.3, scalars=0.4, attention=0.6)
    assert groups["head"].decay == pytest.approx(150 * 0.5 * 0.1)
    assert groups["attention"].decay == pytest.approx(0.6 * 0.7)
    assert groups["attention"].betas == (0.8,)


def change_groups(monkeypatch, change):
    """Make optimizer_groups return change(its groups)."""
    original = train_gpt.optimizer_groups
    monkeypatch.setattr(train_gpt, "optimizer_groups", lambda *args: change(original(*args)))


@pytest.mark.parametrize("pattern, parameter, other_group", [
    (r"head\.nothing", "head.linear.weight", ""),
    (r"(head\.linear|embed)\.weight|input_embedding\.smear_lambda",
     "input_embedding.smear_lambda", "scalars")])
def test_a_parameter_in_no_group_or_in_two_is_refused_by_name(
        hp, monkeypatch, pattern, parameter, other_group):
    change_groups(monkeypatch, lambda groups: [
        group._replace(pattern=pattern) if group.name == "head" else group for group in groups])
    model = build_model(hp, CPU, torch.float32, flex=False)
    with pytest.raises(UserError) as error:
        Optimizer(model, hp, torch.float32)
    assert parameter in str(error.value)
    assert other_group in str(error.value)


def test_an_unknown_rule_is_refused_by_name(hp, monkeypatch):
    change_groups(monkeypatch, lambda groups: [group._replace(rule="sgd") for group in groups])
    model = build_model(hp, CPU, torch.float32, flex=False)
    with pytest.raises(UserError, match="sgd"):
        Optimizer(model, hp, torch.float32)


def test_every_row_of_a_bucket_has_its_parameters_learning_rate(recipe):
    """Small parameters share a bucket, as do matrices of one shape, whatever their learning
    rates."""
    model = build_model(recipe, CPU, torch.float32, flex=False)
    optimizer = Optimizer(model, recipe, torch.float32)
    name_of = {id(p): name for name, p in model.named_parameters()}
    bucket_of = {}
    for bucket in optimizer.buckets:
        lr = bucket.lr.expand(bucket.num_rows, *bucket.values.shape[1:]).contiguous()
        for p, lr_of_p in zip(bucket.params, bucket.views(lr), strict=True):
            name = name_of[id(p)]
            bucket_of[name] = bucket
            factor = reference.muon_lr_factor(name)
            expected = 0.023 * factor if factor else reference.adam_settings(name)[0]
            torch.testing.assert_close(lr_of_p, torch.full_like(lr_of_p, expected))
    assert set(bucket_of) == set(name_of.values())
    assert len(optimizer.buckets) < 12
    assert optimizer.head is bucket_of["head.linear.weight"]
    assert optimizer.embed is bucket_of["embed.weight"]


# --- The whole optimizer --------------------------------------------------------------------------


def random_grads(model, tied, seed):
    """A gradient for each parameter that the loss reaches: all, but the embedding while it is
    tied."""
    torch.manual_seed(seed)
    return {name: torch.randn_like(p) for name, p in model.named_parameters()
            if not (tied and name == "embed.weight")}


def add_grads(model, grads):
    """Add to the parameters' gradients, as a backward pass does."""
    for name, grad in grads.items():
        p = model.get_parameter(name)
        p.grad = grad.clone() if p.grad is None else p.grad + grad


def first_moments(optimizer, model):
    """The first state tensor of each parameter, by name."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    moments = {}
    for bucket in optimizer.buckets:
        state = next(iter(bucket.state.values()))
        for p, moment in zip(bucket.params, bucket.views(state), strict=True):
            moments[name_of[id(p)]] = moment
    return moments


def assert_values(model, expected, when):
    """The model's parameters are those of the reference optimizer, up to rounding."""
    for name, p in model.named_parameters():
        value = expected.values[name]
        error = (p.double() - value).norm() / (value.norm() + 1e-6)
        assert error < 1e-4, (when, name, error)


def test_eight_steps_of_the_recipe_agree_with_the_reference(recipe, recipe_model):
    """All groups, tied and untied, with learning rates and momentum of four stages, two momenta
    from step 8 on, and averages that begin before the untying."""
    model = recipe_model
    optimizer = Optimizer(model, recipe, torch.float32)
    expected = reference.ReferenceOptimizer(model)
    initial_embed = model.embed.weight.detach().clone()
    for step in (0, 1, 4, 5, 8, 9, 12, 13):
        schedule = Schedule(step, recipe, CPU)
        if schedule.unties:
            assert step == 8
            assert torch.equal(model.embed.weight, initial_embed)  # not updated while tied
            optimizer.untie()
            expected.untie()
            assert torch.equal(model.embed.weight, model.head.linear.weight[0])
            moments = first_moments(optimizer, model)
            assert moments["embed.weight"].any()
            assert torch.equal(moments["embed.weight"], moments["head.linear.weight"][0])
        grads = random_grads(model, schedule.tied, seed=step)
        add_grads(model, grads)
        optimizer.step(schedule)
        expected.step(grads, schedule.lr_scale, *schedule.momenta)
        if step in (5, 9, 13):
            expected.update_averages(weight=4 / 5)  # the time constant is half of 10 steps
        assert_values(model, expected, step)
        assert (schedule.momenta.fast_weight < 1) == (step >= 8)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.use_averages()
    expected.use_averages()
    assert_values(model, expected, "averages")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    assert changed == {name for name in weights if reference.average_kind(name)}
    for name, moment in first_moments(optimizer, model).items():
        torch.testing.assert_close(moment.double(), expected.moments[name][0], atol=1e-5, rtol=1e-3)
    assert not torch.equal(model.embed.weight, model.head.linear.weight[0])


def test_a_tied_gradient_is_the_sum_of_those_of_head_and_embedding(recipe, recipe_model):
    tokens = torch.randint(256, (1, 129), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        recipe_model.embed.weight.copy_(recipe_model.head.linear.weight[0])

    def grads(tied):
        schedule = Schedule(0, recipe, CPU)
        schedule.tied = tied
        recipe_model.zero_grad()
        recipe_model(tokens[:, :-1], tokens[:, 1:], schedule)[0].backward()
        return recipe_model.head.linear.weight.grad[0], recipe_model.embed.weight.grad

    tied_grad, none = grads(tied=True)
    head_grad, embed_grad = grads(tied=False)
    assert none is None and embed_grad.any()
    atol = 1e-5 * tied_grad.abs().max().item()
    torch.testing.assert_close(tied_grad, head_grad + embed_grad, atol=atol, rtol=1e-4)


def test_untied_embedding_and_head_continue_as_two_parameters_of_torch_adam(recipe, recipe_model):
    """Four tied steps and four untied ones, without decay, agree with torch's Adam, where the
    second parameter starts as a copy of the first with its state."""
    hp = replace(recipe, adam_every=1, adam_decay=0.0)
    optimizer = Optimizer(recipe_model, hp, torch.float32)
    settings = dict(lr=0.008, betas=(0.5, 0.95), eps=1e-10)
    head = torch.nn.Parameter(recipe_model.head.linear.weight[0].detach().clone())
    head_adam = torch.optim.Adam([head], **settings)
    schedule = Schedule(0, hp, CPU)
    for step in range(8):
        untied = step >= 4
        if step == 4:
            optimizer.untie()
            embed = torch.nn.Parameter(head.detach().clone())
            embed_adam = torch.optim.Adam([embed], **settings)
            head_state = head_adam.state_dict()["state"][0]
            embed_state = {name: value.clone() for name, value in head_state.items()}
            embed_adam.load_state_dict({**embed_adam.state_dict(), "state": {0: embed_state}})
        grads = random_grads(recipe_model, tied=not untied, seed=step)
        add_grads(recipe_model, grads)
        optimizer.step(schedule)
        head.grad = grads["head.linear.weight"][0]
        head_adam.step()
        if untied:
            embed.grad = grads["embed.weight"]
            embed_adam.step()
    torch.testing.assert_close(recipe_model.head.linear.weight[0], head, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(recipe_model.embed.weight, embed, atol=1e-6, rtol=1e-5)


def test_muon_updates_in_every_step_and_adam_in_every_second(recipe, recipe_model):
    """Only gradients that Adam still needs are kept after a step."""
    optimizer = Optimizer(recipe_model, recipe, torch.float32)
    schedule = Schedule(0, recipe, CPU)
    for step in range(3):
        before = {name: p.detach().clone() for name, p in recipe_model.named_parameters()}
        add_grads(recipe_model, random_grads(recipe_model, tied=True, seed=step))
        optimizer.step(schedule)
        for name, p in recipe_model.named_parameters():
            has_gradient = name != "embed.weight"
            updates = has_gradient and (reference.muon_lr_factor(name) is not None or step == 1)
            assert torch.equal(p, before[name]) != updates, (step, name)
            assert (p.grad is None) == (updates or not has_gradient), (step, name)


def test_the_gradient_of_a_step_is_the_sum_over_its_tokens_divided_by_8(recipe, recipe_model,
                                                                        monkeypatch):
    """On one rank with two micro-batches: modded-nanogpt's gradient is the mean over 8 ranks, which
    sum over their tokens."""
    batch = []
    schedule = Schedule(8, recipe, CPU)
    schedule.softmax_size = 0
    expected = 0
    for seed in (0, 1):
        text = torch.randint(256, (1, 129), generator=torch.Generator().manual_seed(seed))
        tokens, targets = text[:, :-1], text[:, 1:]
        batch.append((tokens, targets))
        logits = recipe_model(tokens, None, schedule).double()
        expected = expected + F.cross_entropy(logits, targets.flatten(), reduction="sum") / 8
    expected.backward()
    expected_grads = {name: p.grad for name, p in recipe_model.named_parameters()}
    recipe_model.zero_grad()
    optimizer = Optimizer(recipe_model, recipe, torch.float32)
    monkeypatch.setattr(optimizer, "step", lambda schedule: None)  # would clear the gradients
    training_step(recipe_model, optimizer, batch, schedule)
    for name in ("head.linear.weight", "embed.weight", "value_embed.weight",
                 "blocks.0.mlp.fc.weight", "blocks.10.attention.proj.weight"):
        grad = recipe_model.get_parameter(name).grad
        assert (grad - expected_grads[name]).norm() <= 1e-4 * expected_grads[name].norm(), name


def test_two_steps_of_adam_are_one_step_with_both_batches(recipe):
    """With adam_every 2, two steps change Adam's parameters as one step does that has both batches
    as its micro-batches."""
    batches = []
    for seed in (0, 1):
        text = torch.randint(256, (2, 129), generator=torch.Generator().manual_seed(seed))
        batches.append((text[:, :-1], text[:, 1:]))

    def weights_after(adam_every, steps):
        hp = replace(recipe, adam_every=adam_every, muon_lr=0.0)
        model = build_model(hp, CPU, torch.float32, flex=False)
        initial = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = Optimizer(model, hp, torch.float32)
        for batch in steps:
            for name, p in model.named_parameters():
                assert torch.equal(p, initial[name]), name  # until the last step
            training_step(model, optimizer, batch, Schedule(0, hp, CPU))
        assert all(p.grad is None for p in model.parameters())
        values = {name: p.detach() for name, p in model.named_parameters()}
        changed = {name for name, value in values.items() if not torch.equal(value, initial[name])}
        return values, changed

    two_steps, changed = weights_after(2, [batches[:1], batches[1:]])
    one_step, _ = weights_after(1, [batches])
    assert {"head.linear.weight", "value_embed.weight", "ngram.tables.0.weight"} <= changed
    for name in changed:
        assert reference.muon_lr_factor(name) is None
        torch.testing.assert_close(two_steps[name], one_step[name], atol=1e-5, rtol=1e-4)


def test_sparse_tables_are_updated_like_dense_ones(hp):
    """Rows that occur several times in a batch, in two micro-batches, or not in every step."""
    models = [build_model(hp, CPU, torch.float32, flex=False, sparse=sparse)
              for sparse in (True, False)]
    optimizers = [Optimizer(model, hp, torch.float32) for model in models]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(30, (2, 2, 2, 128), generator=generator)
        batch = [(micro_batch[0], micro_batch[1]) for micro_batch in tokens]
        for model, optimizer in zip(models, optimizers, strict=True):
            training_step(model, optimizer, batch, Schedule(step, hp, CPU))
    sparse, dense = models
    for name, p in sparse.named_parameters():
        expected = dense.get_parameter(name)
        assert (p - expected).norm() <= 1e-4 * expected.norm() + 1e-6, name
    assert all(table.weight.any() for table in sparse.ngram.tables)


# --- Averages of late weights ---------------------------------------------------------------------


def averaged_optimizer(model, hp, weight=0.1, updates=3, drift=0.05):
    """An Optimizer with averages of weights that drift away, and the last weights by name."""
    optimizer = Optimizer(model, hp, torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(updates):
            for p in model.parameters():
                p.add_(drift * torch.randn_like(p))
            optimizer.update_averages(weight)
    return optimizer, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_averages_of_constant_weights_are_these_weights(recipe, recipe_model):
    optimizer, weights = averaged_optimizer(recipe_model, recipe, drift=0.0)
    optimizer.use_averages()
    for name, p in recipe_model.named_parameters():
        torch.testing.assert_close(p, weights[name], atol=0, rtol=1e-6)


def test_averages_are_blended_half_and_half_and_keep_the_norm_of_each_bucket(recipe, recipe_model):
    """Tables and small parameters are not averaged. The average begins as a copy."""
    optimizer, weights = averaged_optimizer(recipe_model, recipe, weight=0.25)
    name_of = {id(p): name for name, p in recipe_model.named_parameters()}
    averages = {}
    norms = []
    for bucket in optimizer.buckets:
        norms.append(bucket.values.norm().item())
        if "average" in bucket.state:
            views = bucket.views(bucket.state["average"])
            averages |= {name_of[id(p)]: v for p, v in zip(bucket.params, views, strict=True)}
    assert set(averages) == {name for name in weights if reference.average_kind(name)}
    optimizer.use_averages()
    for bucket, norm in zip(optimizer.buckets, norms, strict=True):
        assert bucket.values.norm().item() == pytest.approx(norm, rel=1e-6)
    for name, p in recipe_model.named_parameters():
        if name not in averages:
            assert torch.equal(p, weights[name]), name
            continue
        blend = (weights[name] + averages[name]) / 2
        assert not torch.allclose(p, weights[name], atol=1e-4)
        torch.testing.assert_close(p / p.norm(), blend / blend.norm(), atol=1e-6, rtol=1e-5)


def test_averages_are_used_once(recipe, recipe_model):
    """And weights without averages, or after a reset, stay what they are."""
    optimizer, _ = averaged_optimizer(recipe_model, recipe)
    optimizer.use_averages()
    weights = {name: p.detach().clone() for name, p in recipe_model.named_parameters()}
    optimizer.use_averages()
    Optimizer(recipe_model, recipe, torch.float32).use_averages()
    reset, _ = averaged_optimizer(recipe_model, recipe, drift=0.0)
    reset.load_state_dict(None)
    reset.use_averages()
    for name, p in recipe_model.named_parameters():
        assert torch.equal(p, weights[name]), name


def test_without_a_tail_there_are_no_averages(recipe, recipe_model):
    hp = replace(recipe, average_tail=0.0)
    optimizer = Optimizer(recipe_model, hp, torch.float32)
    assert not any("average" in bucket.state for bucket in optimizer.buckets)
    for step in range(hp.num_steps):
        assert Schedule(step, hp, CPU).average_weight == 0


# --- Buckets --------------------------------------------------------------------------------------

MEMBERS = [  # rule, shapes of the parameters
    ("muon", [(1, 6, 4)] * 5), ("muon", [(3, 4, 4), (1, 4, 4)]),
    ("adam", [(), (2,), (3, 4)]), ("adam", [(7, 3)]), ("adam", [(1, 8, 3)])]


@pytest.mark.parametrize("rule, shapes", MEMBERS)
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_the_shards_of_a_bucket_are_disjoint_and_complete(rule, shapes, world_size):
    """A row is a matrix, a row of a table, or a number. There is less than one row of padding per
    rank, and each row has its parameter's learning rate."""
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in shapes]
    groups = [make_group(rule, lr=0.1 + i) for i in range(len(shapes))]
    shards = []
    lrs = []
    for rank in range(world_size):
        params = [torch.nn.Parameter(value.clone()) for value in values]
        bucket = Bucket(params, groups, False, rank, world_size)
        for p, value in zip(params, values, strict=True):
            assert torch.equal(p, value)
        shard = bucket.values[bucket.shard]
        shards.append(shard)
        lrs.append(bucket.lr.expand_as(shard))
        assert len(shard) == len(shards[0])
    assert torch.equal(torch.cat(shards), bucket.values)
    assert bucket.values[0].ndim == {"muon": 2, "adam": 1 if len(shapes) == 1 else 0}[rule]
    assert 0 <= len(bucket.values) - bucket.num_rows < world_size
    assert not bucket.values[bucket.num_rows:].any()
    for lr, group in zip(bucket.views(torch.cat(lrs)), groups, strict=True):
        torch.testing.assert_close(lr, torch.full_like(lr, group.lr))
    # The parameters are views of the bucket.
    with torch.no_grad():
        for p in params:
            p.add_(1)
    for view, value in zip(bucket.views(bucket.values), values, strict=True):
        assert torch.equal(view, value + 1)


@pytest.mark.parametrize("rule, shapes", MEMBERS)
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_a_bucket_sends_all_gradients_once(rule, shapes, world_size, monkeypatch):
    """A parameter without gradient counts as zero. A table's gradient is not copied if its rows can
    be divided by the number of ranks."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    bucket = Bucket(params, [make_group(rule)] * len(shapes), False, 0, world_size)
    grads = [torch.full(shape, 2.0) for shape in shapes]
    if len(params) > 1:
        grads[0] = None
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    sent = []
    monkeypatch.setattr(train_gpt, "_reduce_scatter", lambda out, full, **_: sent.append(full))
    bucket.reduce_scatter_grads()
    assert len(sent) == (world_size > 1)
    (full_grad,) = sent or [bucket.grad]
    assert full_grad.shape == bucket.values.shape
    for view, grad in zip(bucket.views(full_grad), grads, strict=True):
        assert (view == (0 if grad is None else 2)).all()
    assert not full_grad[bucket.num_rows:].any()
    assert all(p.grad is None for p in params)
    if len(params) == 1 and bucket.num_rows % world_size == 0:
        assert full_grad.data_ptr() == grads[0].data_ptr()


@pytest.mark.parametrize("rule, shapes", MEMBERS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_rounded_values_have_exact_rows(rule, shapes, world_size, monkeypatch):
    """Updates that are too small for bfloat16 add up. The parameters and what a rank sends are the
    rounded exact values."""
    monkeypatch.setattr(train_gpt, "_all_gather", lambda full, rows, **_: None)
    torch.manual_seed(0)
    values = [1 + torch.rand(shape) for shape in shapes]
    groups = [make_group(rule)._replace(comm_dtype=torch.bfloat16)] * len(shapes)
    for rank in range(world_size):
        params = [torch.nn.Parameter(value.clone()) for value in values]
        bucket = Bucket(params, groups, False, rank, world_size)
        for p, value in zip(params, values, strict=True):
            assert torch.equal(p, value.bfloat16())
        initial = bucket.local.clone()
        assert torch.equal(initial, bucket.values[bucket.shard].float())  # rounded, too
        for _ in range(100):
            bucket.start_update(torch.full_like(bucket.local, 1e-3), [], lr_scale=0.1)
        torch.testing.assert_close(bucket.local, initial - 0.01, atol=1e-4, rtol=0)
        rows = bucket.values[bucket.shard]
        assert torch.equal(rows, bucket.local.bfloat16())
        assert not torch.equal(rows, initial.bfloat16())


@pytest.mark.parametrize("comm_dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_can_be_loaded_by_any_number_of_ranks(recipe, comm_dtype):
    """Each of 8 ranks loads its rows of what one rank saved; together they have all rows once."""
    model = build_model(recipe, CPU, torch.float32, flex=False)
    optimizer = Optimizer(model, recipe, comm_dtype)
    for step in range(2):
        add_grads(model, random_grads(model, tied=True, seed=step))
        optimizer.step(Schedule(step, recipe, CPU))
    state = optimizer.state_dict()
    assert sum(value.any().item() for full in state["buckets"] for value in full.values()) > 10

    ranks = []
    for rank in range(8):
        same_model = build_model(recipe, CPU, torch.float32, flex=False)
        ranks.append(Optimizer(same_model, recipe, comm_dtype, rank, 8))
        ranks[-1].load_state_dict(state)
        assert ranks[-1].num_updates == 2
    for i, full_state in enumerate(state["buckets"]):
        for name, full in full_state.items():
            joined = torch.cat([rank.buckets[i].state[name] for rank in ranks])
            assert torch.equal(joined[:len(full)], full)
            assert not joined[len(full):].any()

    optimizer.load_state_dict(None)  # resets it
    assert optimizer.num_updates == 0
    for bucket in optimizer.buckets:
        assert torch.equal(bucket.local, bucket.values.float())
        assert not any(value.any() for value in bucket.state.values() if value is not bucket.local)


def test_optimizer_state_of_another_shape_is_refused(recipe, hp):
    optimizers = [Optimizer(build_model(h, CPU, torch.float32, flex=False), h, torch.float32)
                  for h in (recipe, replace(recipe, ngram_rows=1000))]
    with pytest.raises(ValueError, match="1000"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
