"""The loss: softcap, multi-token cross-entropy and its gradients, sampled softmax, validation."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import away_from_zero
from reference.mask import EOT, rule
from reference.mask import random_tokens as random_mask_tokens

from train_gpt import (
    CappedCrossEntropy,
    Schedule,
    block_lists,
    block_mask,
    build_model,
    document_start,
    first_visible_key,
    next_targets,
    point,
    sample_vocabulary,
    softcap,
    vote_distribution,
)

CPU = torch.device("cpu")
CAP = (23.0, 5.0, 7.5)  # cap, shift, scale


def random_tokens(seed: int = 0, T: int = 257) -> torch.Tensor:
    """(T,) bytes; a document begins at position 100."""
    tokens = torch.randint(256, (T,), generator=torch.Generator().manual_seed(seed))
    tokens[100] = 256
    return tokens


def predict(model, tokens, schedule):
    """At each position of sequences (S, T): the logits, the pointer's shares of votes, (N, V)
    float64 each, and the sink's share, (N, 1)."""
    seen = {}
    hook = model.readout.register_forward_hook(lambda module, args, y: seen.update(state=y))
    start = document_start(tokens, 256)
    first_key = first_visible_key(start, schedule.windows["pointer"])
    model(tokens, None, schedule)
    hook.remove()
    votes, p_sink = vote_distribution(
        *model.pointer(seen["state"]), tokens.flatten(), first_key, model.hp.pointer_window, 384)
    return model.head.logits(seen["state"]).double(), votes.double(), p_sink.double()


def some_prefixes(model):
    """Give the model a table of prefixes, (257,), which a vocabulary of bytes has none of: half of
    the bytes have one."""
    model.prefix_of[::2] = (torch.arange(0, 257, 2) + 77) % 200
    return model.prefix_of


def mixture(logits, votes, p_sink, gate=257):
    """p of the next token, from the softmax without the gate and the pointer's votes."""
    alpha = logits.softmax(-1)[:, gate, None]
    without_gate = logits.index_fill(-1, torch.tensor([gate]), -math.inf).softmax(-1)
    return (1 - alpha) * without_gate + alpha * (votes + p_sink * without_gate)


def probabilities(model, tokens, schedule):
    """p of the next token and of each later one, (N, V) float64 each."""
    logits, votes, p_sink = predict(model, tokens, schedule)
    return mixture(logits, votes, p_sink), logits.softmax(-1)


def whole_softmax(step, hp):
    """The schedule at a step, without sampling."""
    schedule = Schedule(step, hp, CPU)
    schedule.softmax_size = 0
    return schedule


def assert_same_gradients(model, grads):
    """grads: by name, of all parameters that have one. Agree with model's to 1e-4 of their norm."""
    assert set(grads) == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, grad in grads.items():
        expected = model.get_parameter(name).grad
        assert (grad - expected).norm() <= 1e-4 * expected.norm(), name


# --- Capped cross-entropy -------------------------------------------------------------------------


@pytest.mark.parametrize("logit_size, dtype, tolerance, weights", [
    (0.0, torch.float32, 1e-5, (1.0,)),
    (1.0, torch.float32, 1e-5, (1.0, 0.3, 0.2)),
    (40.0, torch.float32, 1e-5, (1.0, 0.5, 0.0)),
    (1e4, torch.float32, 1e-5, (1.0, 0.3, 0.2)),  # all logits are at 0 or at the cap
    (1.0, torch.bfloat16, 2**-8, (1.0, 0.5, 0.0)),
    (1e4, torch.bfloat16, 2**-8, (1.0,))])
def test_capped_cross_entropy_agrees_with_float64(logit_size, dtype, tolerance, weights):
    """Loss and gradients agree with autograd of the formulas in float64. The weight is the
    identity, so that the logits themselves have the same rounding in both. Some targets are -1."""
    torch.manual_seed(0)
    x = (logit_size * torch.randn(64, 384)).to(dtype).requires_grad_()
    weight = torch.eye(384, dtype=dtype, requires_grad=True)
    targets = torch.randint(380, (64, len(weights)))
    targets[-2:, 1:] = -1
    targets[-1:, 2:] = -1
    targets[3, 0] = -1
    shares = torch.rand(64, 3).softmax(-1)  # of the target, of the sink, of other tokens
    p_copy, p_sink = (shares[:, i:i + 1].clone().requires_grad_() for i in (0, 1))
    objective, loss = CappedCrossEntropy.apply(
        x, weight, targets, torch.tensor(weights), p_copy, p_sink, torch.tensor([381]), CAP)

    x64 = x.detach().double().requires_grad_()
    weight64 = weight.detach().double().requires_grad_()
    copy64, sink64 = (t.detach().double().requires_grad_() for t in (p_copy, p_sink))
    logits = 23 * torch.sigmoid((x64 @ weight64.T + 5) / 7.5)
    torch.testing.assert_close(softcap(x, *CAP).double(), logits, atol=1e-5, rtol=1e-6)
    log_p = mixture(logits, copy64, sink64, gate=381).log()  # of the target
    losses = [F.nll_loss(log_p, targets[:, 0], ignore_index=-1, reduction="sum")]
    losses += [F.cross_entropy(logits, targets[:, k], ignore_index=-1, reduction="sum")
               for k in range(1, len(weights))]
    expected = sum(w * each for w, each in zip(weights, losses, strict=True))
    assert objective.dtype == torch.float32
    assert objective.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() == pytest.approx(losses[0].item(), rel=1e-6)
    assert not loss.requires_grad

    (4 * objective).backward()  # a power of two: gradients are rounded before they are multiplied
    (4 * expected).backward()
    assert x.grad.dtype == weight.grad.dtype == dtype
    rounding_of_the_cap = 4 * 23 / 7.5 * 2**-23  # the gradient contains 1 - logit / cap
    atol = max(tolerance * x64.grad.abs().max().item(), rounding_of_the_cap)
    torch.testing.assert_close(x.grad.double(), x64.grad, atol=atol, rtol=0)
    atol = max(2 * tolerance * weight64.grad.abs().max().item(),
               64 * logit_size * rounding_of_the_cap)  # a sum of 64 rows
    torch.testing.assert_close(weight.grad.double(), weight64.grad, atol=atol, rtol=0)
    torch.testing.assert_close(p_copy.grad.double(), copy64.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(p_sink.grad.double(), sink64.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gate_logit", [-1e4, 1e4])
def test_a_gate_at_its_bounds_keeps_loss_and_gradients_finite(gate_logit):
    """With the cap of 80, all of the softmax or nothing of it is the gate's."""
    x = torch.zeros(4, 8, requires_grad=True)
    weight = torch.zeros(8, 8)
    with torch.no_grad():
        x[:, 0] = 1
        weight[7, 0] = gate_logit
        weight[:7, 0] = -gate_logit
    weight.requires_grad_()
    shares = [torch.tensor([[0.0], [0.0], [0.5], [1.0]], requires_grad=True),
              torch.tensor([[1.0], [0.0], [0.5], [0.0]], requires_grad=True)]
    objective, _ = CappedCrossEntropy.apply(
        x, weight, torch.arange(4)[:, None], torch.ones(1), *shares, torch.tensor([7]),
        (80.0, 0.0, 1.0))
    objective.backward()
    assert objective.isfinite()
    for t in (x, weight, *shares):
        assert t.grad.isfinite().all()


# --- Pointer --------------------------------------------------------------------------------------


def test_without_a_pointer_the_next_token_has_the_plain_softmax(recipe):
    hp = replace(recipe, pointer_window=0)
    model = away_from_zero(build_model(hp, CPU, torch.float32, flex=False))
    tokens = random_tokens()[None]
    seen = {}
    model.readout.register_forward_hook(lambda module, args, y: seen.update(state=y))
    with torch.no_grad():
        log_p = model(tokens[:, :-1], None, Schedule(0, hp, CPU))
        logits = model.head.logits(seen["state"])
        _, loss = model(tokens[:, :-1], tokens[:, 1:], Schedule(0, hp, CPU))
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(log_p, expected)
    of_targets = expected.gather(1, tokens[0, 1:, None])
    assert loss.item() == pytest.approx(-of_targets.mean().item(), rel=1e-5)


@pytest.mark.parametrize("T, window, max_window", [(256, 64, 64), (333, 40, 128), (100, 300, 300)])
def test_the_pointer_agrees_with_its_definition_pair_by_pair(T, window, max_window):
    """A position points to the earlier ones of its document within the window, and to the sink. The
    gradients are those of the dense formula."""
    torch.manual_seed(T)
    tokens = random_mask_tokens(T, seed=T)
    targets = tokens.roll(-1)
    mask = rule(tokens, window) & ~torch.eye(T, dtype=torch.bool)
    first_key = first_visible_key(document_start(tokens[None], EOT), torch.tensor(window))
    inputs = [torch.randn(T, 16, requires_grad=True), torch.randn(T, 16, requires_grad=True),
              torch.randn(T, requires_grad=True)]
    p_copy, p_sink = point(*inputs, tokens, targets, first_key, max_window)

    q, k, sink = (t.detach().double().requires_grad_() for t in inputs)
    scores = torch.cat([(q @ k.T).masked_fill(~mask, -math.inf), sink[:, None]], dim=1)
    shares = scores.softmax(-1)
    copies = (shares[:, :-1] * (tokens[None, :] == targets[:, None])).sum(1)
    torch.testing.assert_close(p_copy.double(), copies, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(p_sink.double(), shares[:, -1], atol=1e-6, rtol=1e-5)
    assert (p_sink[document_start(tokens[None], EOT) == torch.arange(T)] == 1).all()
    weights = torch.rand(2, T)
    grads = torch.autograd.grad((weights[0] * p_copy + weights[1] * p_sink).sum(), inputs)
    expected = torch.autograd.grad(
        (weights[0] * copies + weights[1] * shares[:, -1]).sum(), (q, k, sink))
    for grad, expected_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention")
def test_flex_attention_points_as_the_chunks_do():
    torch.manual_seed(0)
    tokens = random_mask_tokens(512, seed=5)
    first_key = first_visible_key(document_start(tokens[None], EOT), torch.tensor(200))
    mask = block_mask(first_key, block_lists(first_key), strict=True)
    inputs = torch.randn(512, 32), torch.randn(512, 32), torch.randn(512), tokens, tokens.roll(-1)
    with torch.no_grad():
        flex = point(*inputs, mask, 200)
        chunks = point(*inputs, first_key, 200)
    torch.testing.assert_close(flex, chunks, atol=1e-6, rtol=1e-5)


def test_the_probabilities_of_all_tokens_are_those_of_the_losses(recipe, recipe_model):
    """exp(-loss) of each possible next token, one after the other, sums to 1, and is what sampling
    uses."""
    tokens = random_tokens(T=120)[None]
    schedule = whole_softmax(8, recipe)
    with torch.no_grad():
        p = recipe_model(tokens, None, schedule).exp()
        torch.testing.assert_close(p.sum(-1), torch.ones(120))
        for token in (0, 97, 256, 383):
            _, loss = recipe_model(tokens, torch.full_like(tokens, token), schedule)
            assert loss.item() == pytest.approx(-p[:, token].log().mean().item(), rel=1e-5)


def test_next_targets_stay_within_their_sequence():
    """Row (s, t) holds the K tokens after token t of sequence s, and -1 beyond its end."""
    text = torch.arange(24).view(2, 12)
    rows = next_targets(text[:, 1:], 3).tolist()
    assert len(rows) == 22
    for s in range(2):
        for t in range(11):
            expected = [text[s, t + 1 + k].item() if t + 1 + k < 12 else -1 for k in range(3)]
            assert rows[11 * s + t] == expected, (s, t)


# --- The model's objective ------------------------------------------------------------------------


@pytest.mark.parametrize("step, weights", [
    (0, (1, 0.5, 0.25)), (3, (1, 0.5, 0.0625)), (6, (1, 0.25)), (8, (1,))])
def test_the_objective_is_the_weighted_sum_of_the_next_tokens_losses(
        recipe, recipe_model, step, weights):
    """It is a sum over the tokens; the loss is the mean for the next token. In the first two stages
    the next token's prefix, if it has one, is predicted as well."""
    text = torch.stack([random_tokens(seed, T=129) for seed in (1, 2)])
    schedule = whole_softmax(step, recipe)
    prefix_of = some_prefixes(recipe_model)
    prefix_weight = {0: 0.25, 3: 0.25, 6: 0.125, 8: 0}[step]
    objective, loss = recipe_model(text[:, :-1], text[:, 1:], schedule)
    with torch.no_grad():
        log_p, later = (p.view(2, 128, -1).log() for p in
                        probabilities(recipe_model, text[:, :-1], schedule))
    expected = 0.0
    expected_loss = 0.0
    for s in range(2):
        for t in range(128):
            expected_loss -= log_p[s, t, text[s, t + 1]].item() / 256
            for k, weight in enumerate(weights):
                if t + k < 128:
                    expected -= weight * (later if k else log_p)[s, t, text[s, t + 1 + k]].item()
            prefix = prefix_of[text[s, t + 1]].item()
            if prefix >= 0:
                expected -= prefix_weight * later[s, t, prefix].item()
    assert objective.item() == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert objective.requires_grad and not loss.requires_grad


def test_gradients_of_all_parameters_agree_with_autograd_of_the_logits(recipe, recipe_model):
    text = random_tokens(T=129)
    tokens, targets = text[None, :-1], text[None, 1:]
    schedule = whole_softmax(0, recipe)
    recipe_model(tokens, targets, schedule)[0].backward()
    grads = {n: p.grad for n, p in recipe_model.named_parameters() if p.grad is not None}
    recipe_model.zero_grad()
    p, later = probabilities(recipe_model, tokens, schedule)
    objective = 0
    for k, weight in enumerate((1, 0.5, 0.25)):
        of_target = (later if k else p)[:128 - k].gather(1, targets[0, k:, None])
        objective = objective - weight * of_target.log().sum()
    objective.backward()
    assert_same_gradients(recipe_model, grads)


# --- Sampled softmax ------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size, softmax_size, distinct",
                         [(384, 128, 60), (384, 383, 257), (50_304, 10_240, 5000)])
def test_sampled_classes_are_all_targets_and_others(vocab_size, softmax_size, distinct):
    """Each class occurs once, the index of each target leads to it, and equal targets give equal
    classes."""
    N = min(4 * softmax_size, 9000)
    text = torch.randint(distinct, (1, N), generator=torch.Generator().manual_seed(0))
    targets = next_targets(text, 3)
    gate_row = vocab_size - 47
    entries, index, gate = sample_vocabulary(targets, vocab_size, softmax_size, gate_row)
    assert entries[gate].tolist() == [gate_row]
    assert len(entries) == len(set(entries.tolist())) == softmax_size
    assert 0 <= entries.min() and entries.max() < vocab_size
    assert set(targets.flatten().tolist()) - {-1} <= set(entries.tolist())
    assert torch.equal(torch.where(targets < 0, -1, entries[index]), targets)
    assert torch.equal(index < 0, targets < 0)
    again = sample_vocabulary(targets.clone(), vocab_size, softmax_size, gate_row)
    assert torch.equal(again[0], entries) and torch.equal(again[1], index)


def test_other_classes_are_sampled_evenly():
    """Over 200 texts of 1,000 distinct tokens each of the other 49,304 entries is sampled equally
    often, within 6 standard deviations, and neighbors are not sampled together."""
    texts = 200
    counts = torch.zeros(50_304)
    counts_with_next = torch.zeros(50_303)
    generator = torch.Generator().manual_seed(0)
    for _ in range(texts):
        targets = torch.randint(1000, (16_384, 1), generator=generator)
        sampled = torch.zeros(50_304)
        sampled[sample_vocabulary(targets, 50_304, 10_240, 1000)[0]] = 1
        counts += sampled
        counts_with_next += sampled[1:] * sampled[:-1]
    assert (counts[:1001] == texts).all()  # the gate, too
    probability = 9239 / 49_303
    deviation = (probability * (1 - probability) / texts) ** 0.5
    assert (counts[1001:] / texts - probability).abs().max() < 6 * deviation
    assert counts_with_next[1001:].mean() / texts < probability / 2


def test_targets_that_do_not_fit_into_the_sample_have_no_loss():
    targets = next_targets(torch.arange(200)[None], 2)
    entries, index, gate = sample_vocabulary(targets, 384, 64, gate_row=257)
    fits = index >= 0
    assert fits[:, 0].sum() == 63  # each token is the next one once; the gate has a place
    assert len(set(entries.tolist())) == 64
    assert torch.equal(entries[index[fits]], targets[fits])
    x = torch.randn(200, 8, requires_grad=True)
    weight = torch.randn(384, 8)
    weights = torch.tensor([1.0, 0.5])
    objective, _ = CappedCrossEntropy.apply(
        x, weight[entries], index, weights, torch.zeros(200, 1), torch.ones(200, 1), gate, CAP)
    objective.backward()
    without_target = ~fits.any(1)
    assert objective.isfinite()
    assert without_target.sum() > 70
    assert not x.grad[without_target].any()
    assert x.grad[~without_target].any(1).all()


@pytest.mark.parametrize("step", [0, 8])
def test_each_sequence_has_a_sampled_softmax_of_its_own(recipe, recipe_model, step):
    """Objective, loss and gradients of two sequences are those of each alone, over its own classes.
    So it does not matter which rank has which sequences. Head rows of other classes have no
    gradient."""
    # With these texts no gradient of a single number is a sum that cancels almost completely.
    text = torch.stack([random_tokens(seed) for seed in (11, 12)])
    tokens, targets = text[:, :-1], text[:, 1:]
    schedule = Schedule(step, recipe, CPU)
    schedule.softmax_size = 210
    prefix_of, num_prefixes = some_prefixes(recipe_model), []
    objective, loss = recipe_model(tokens, targets, schedule)
    objective.backward()
    grads = {n: p.grad for n, p in recipe_model.named_parameters() if p.grad is not None}
    recipe_model.zero_grad()

    expected = expected_loss = 0.0
    all_classes = set()
    for s in range(2):
        later = next_targets(targets[s:s + 1], len(schedule.target_weights) - schedule.has_prefix)
        entries = sample_vocabulary(later, 384, 210, 257).entries
        if schedule.has_prefix:  # where it is among the classes
            prefixes = prefix_of[targets[s]]
            prefixes = torch.where(torch.isin(prefixes, entries), prefixes, -1)
            num_prefixes.append((prefixes >= 0).sum().item())
            later = torch.cat([later, prefixes[:, None]], dim=1)
        all_classes |= set(entries.tolist())
        others = torch.ones(384, dtype=torch.bool).index_fill(0, entries, False)
        logits, votes, p_sink = predict(recipe_model, tokens[s:s + 1], schedule)
        logits = logits.masked_fill(others, -math.inf)
        next_token = mixture(logits, votes, p_sink).gather(1, later[:, :1])
        further = logits.softmax(-1).gather(1, later[:, 1:].clamp(min=0))
        p = torch.cat([next_token, further], dim=1)
        losses = -torch.where(later >= 0, p, 1).log()
        expected = expected + (losses * schedule.target_weights).sum()
        expected_loss = expected_loss + losses[:, 0].sum()
    expected.backward()
    assert objective.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx(expected_loss.item() / 512, rel=1e-5)
    assert_same_gradients(recipe_model, grads)
    assert all(0 < n < 130 for n in num_prefixes)
    # Tokens from 257 on never occur, so a tied embedding has no gradient there either.
    not_sampled = sorted(set(range(257, 384)) - all_classes)
    assert not_sampled
    assert not grads["head.linear.weight"][0, not_sampled].any()


@pytest.mark.parametrize("softmax_size, samples",
                         [(383, True), (64, True), (63, False), (384, False), (1000, False)])
def test_the_softmax_is_sampled_only_if_the_sample_may_hold_the_text(
        recipe, recipe_model, softmax_size, samples):
    """A sequence of 256 tokens needs a sample of at least 64 classes, of a vocabulary of 384."""
    text = random_tokens()[None]
    schedule = whole_softmax(0, recipe)
    whole = recipe_model(text[:, :-1], text[:, 1:], schedule)[0].item()
    schedule.softmax_size = softmax_size
    sampled = recipe_model(text[:, :-1], text[:, 1:], schedule)[0].item()
    assert (sampled != whole) == samples


# --- Validation -----------------------------------------------------------------------------------


def test_a_validation_is_over_the_whole_vocabulary_in_every_stage(recipe, recipe_model):
    text = random_tokens()[None]
    losses = []
    for softmax_size in (0, 3, 210):
        schedule = Schedule(0, recipe, CPU)
        schedule.softmax_size = softmax_size
        with torch.no_grad():
            losses.append(recipe_model(text[:, :-1], text[:, 1:], schedule)[1].item())
    with torch.no_grad():
        p, _ = probabilities(recipe_model, text[:, :-1], schedule)
    expected = -p.gather(1, text[0, 1:, None]).log().mean().item()
    assert losses[0] == losses[1] == losses[2] == pytest.approx(expected)


def test_a_validation_computes_no_gradients(recipe, recipe_model, monkeypatch):
    """CappedCrossEntropy computes gradients in its forward pass, but not without autograd."""
    computed = []
    forward = CappedCrossEntropy.forward

    def spy(ctx, *args):
        computed.append(any(ctx.needs_input_grad))
        return forward(ctx, *args)

    monkeypatch.setattr(CappedCrossEntropy, "forward", staticmethod(spy))
    text = random_tokens(T=129)[None]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            recipe_model(text[:, :-1], text[:, 1:], whole_softmax(0, recipe))
    assert computed == [False, True]


def test_a_long_validation_sequence_is_computed_in_pieces(recipe, recipe_model):
    """The head computes the logits of sequence_length tokens at a time, and the loss is that of the
    whole sequence."""
    text = random_tokens(T=641)
    tokens, targets = text[None, :-1], text[None, 1:]
    schedule = Schedule(0, recipe, CPU)
    sizes = []
    hook = recipe_model.head.register_forward_hook(
        lambda module, args, y: sizes.append(len(args[0].targets)))
    with torch.no_grad():
        objective, loss = recipe_model(tokens, targets, schedule)
        hook.remove()
        p, _ = probabilities(recipe_model, tokens, schedule)
    assert sizes == [256, 256, 128]
    expected = -p.gather(1, targets[0][:, None]).log().mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert objective.item() / 640 == pytest.approx(expected, rel=1e-5)
