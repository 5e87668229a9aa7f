"""The loss: softcap, multi-token cross-entropy and its gradients, sampled softmax, validation."""
import math

import pytest
import torch
import torch.nn.functional as F

from train_gpt import (
    CappedCrossEntropy,
    Schedule,
    next_targets,
    sample_softmax_classes,
    softcap,
)

CPU = torch.device("cpu")
CAP = (23.0, 5.0, 7.5)  # cap, shift, scale


def random_tokens(seed: int = 0, T: int = 257) -> torch.Tensor:
    """(T,) bytes; a document begins at position 100."""
    tokens = torch.randint(256, (T,), generator=torch.Generator().manual_seed(seed))
    tokens[100] = 256
    return tokens


def log_probabilities(model, tokens, schedule):
    """Of the vocabulary at each position of sequences (S, T): (N, V) float64."""
    return model(tokens, None, schedule).double().log_softmax(-1)


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
    """Loss and gradients agree with autograd of separate cross-entropies in float64. The weight is
    the identity, so that the logits themselves have the same rounding in both. Some targets are
    -1."""
    torch.manual_seed(0)
    x = (logit_size * torch.randn(64, 384)).to(dtype).requires_grad_()
    weight = torch.eye(384, dtype=dtype, requires_grad=True)
    targets = torch.randint(384, (64, len(weights)))
    targets[-2:, 1:] = -1
    targets[-1:, 2:] = -1
    objective, loss = CappedCrossEntropy.apply(x, weight, targets, torch.tensor(weights), CAP)

    x64 = x.detach().double().requires_grad_()
    weight64 = weight.detach().double().requires_grad_()
    logits = 23 * torch.sigmoid((x64 @ weight64.T + 5) / 7.5)
    torch.testing.assert_close(softcap(x, *CAP).double(), logits, atol=1e-5, rtol=1e-6)
    losses = [F.cross_entropy(logits, targets[:, k], ignore_index=-1, reduction="sum")
              for k in range(len(weights))]
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
    """It is a sum over the tokens; the loss is the mean for the next token."""
    text = torch.stack([random_tokens(seed, T=129) for seed in (1, 2)])
    schedule = whole_softmax(step, recipe)
    objective, loss = recipe_model(text[:, :-1], text[:, 1:], schedule)
    with torch.no_grad():
        log_p = log_probabilities(recipe_model, text[:, :-1], schedule).view(2, 128, -1)
    expected = 0.0
    expected_loss = 0.0
    for s in range(2):
        for t in range(128):
            expected_loss -= log_p[s, t, text[s, t + 1]].item() / 256
            for k, weight in enumerate(weights):
                if t + k < 128:
                    expected -= weight * log_p[s, t, text[s, t + 1 + k]].item()
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
    log_p = log_probabilities(recipe_model, tokens, schedule)
    objective = 0
    for k, weight in enumerate((1, 0.5, 0.25)):
        objective = objective - weight * log_p[:128 - k].gather(1, targets[0, k:, None]).sum()
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
    class_ids, index = sample_softmax_classes(targets, vocab_size, softmax_size)
    assert len(class_ids) == len(set(class_ids.tolist())) == softmax_size
    assert 0 <= class_ids.min() and class_ids.max() < vocab_size
    assert set(targets.flatten().tolist()) - {-1} <= set(class_ids.tolist())
    assert torch.equal(torch.where(targets < 0, -1, class_ids[index]), targets)
    assert torch.equal(index < 0, targets < 0)
    again = sample_softmax_classes(targets.clone(), vocab_size, softmax_size)
    assert torch.equal(again[0], class_ids) and torch.equal(again[1], index)


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
        sampled[sample_softmax_classes(targets, 50_304, 10_240)[0]] = 1
        counts += sampled
        counts_with_next += sampled[1:] * sampled[:-1]
    assert (counts[:1000] == texts).all()
    probability = 9240 / 49_304
    deviation = (probability * (1 - probability) / texts) ** 0.5
    assert (counts[1000:] / texts - probability).abs().max() < 6 * deviation
    assert counts_with_next[1000:].mean() / texts < probability / 2


def test_targets_that_do_not_fit_into_the_sample_have_no_loss():
    targets = next_targets(torch.arange(200)[None], 2)
    class_ids, index = sample_softmax_classes(targets, 384, 64)
    fits = index >= 0
    assert fits[:, 0].sum() == 64  # each token is the next one once
    assert len(set(class_ids.tolist())) == 64
    assert torch.equal(class_ids[index[fits]], targets[fits])
    x = torch.randn(200, 8, requires_grad=True)
    weight = torch.randn(384, 8)
    weights = torch.tensor([1.0, 0.5])
    objective, _ = CappedCrossEntropy.apply(x, weight[class_ids], index, weights, CAP)
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
    text = torch.stack([random_tokens(seed) for seed in (3, 4)])
    tokens, targets = text[:, :-1], text[:, 1:]
    schedule = Schedule(step, recipe, CPU)
    schedule.softmax_size = 210
    objective, loss = recipe_model(tokens, targets, schedule)
    objective.backward()
    grads = {n: p.grad for n, p in recipe_model.named_parameters() if p.grad is not None}
    recipe_model.zero_grad()

    expected = expected_loss = 0.0
    all_classes = set()
    for s in range(2):
        later = next_targets(targets[s:s + 1], len(schedule.mtp_weights))
        class_ids, _ = sample_softmax_classes(later, 384, 210)
        all_classes |= set(class_ids.tolist())
        others = torch.ones(384, dtype=torch.bool).index_fill(0, class_ids, False)
        logits = recipe_model(tokens[s:s + 1], None, schedule).double()
        log_p = logits.masked_fill(others, -math.inf).log_softmax(-1)
        losses = -log_p.gather(1, later.clamp(min=0)) * (later >= 0)
        expected = expected + (losses * schedule.mtp_weights).sum()
        expected_loss = expected_loss + losses[:, 0].sum()
    expected.backward()
    assert objective.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx(expected_loss.item() / 512, rel=1e-5)
    assert_same_gradients(recipe_model, grads)
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
        log_p = log_probabilities(recipe_model, text[:, :-1], schedule)
    expected = -log_p.gather(1, text[0, 1:, None]).mean().item()
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
        lambda module, args, y: sizes.append(len(args[0])))
    with torch.no_grad():
        objective, loss = recipe_model(tokens, targets, schedule)
        hook.remove()
        log_p = log_probabilities(recipe_model, tokens, schedule)
    assert sizes == [256, 256, 128]
    expected = -log_p.gather(1, targets[0][:, None]).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert objective.item() / 640 == pytest.approx(expected, rel=1e-5)
