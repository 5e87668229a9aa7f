"""The model: what it must and must not depend on, its first loss, its topology, its size."""
import math
from dataclasses import replace

import pytest
import slow_model
import torch
from conftest import TINY, at_window, away_from_zero
from torch._dynamo.testing import CompileCounter

import train_gpt
from train_gpt import (
    GPT,
    LAYERS,
    TRACKS,
    CappedCrossEntropy,
    Hyperparameters,
    Layer,
    Linear,
    NGramEmbed,
    Schedule,
    build_model,
    candidates,
    document_start,
    next_targets,
    softcap,
)

CPU = torch.device("cpu")
SMALL = train_gpt.parse_arguments(["--track=laptop", *TINY])
WINDOW = at_window(64)
CAP = (23.0, 5.0, 7.5)


def tokens_of(seed=0, T=256):
    tokens = torch.randint(256, (T,), generator=torch.Generator().manual_seed(seed))
    tokens[100] = 256  # a document begins here
    return tokens


def lively(model):
    """The model with logits and value embeddings of about 1, so that all that the layers do shows."""
    with torch.no_grad():
        model.head.linear.weight.mul_(40)
        model.value_embed.weight.mul_(40)
    return model


def logits_of(model, tokens, schedule):
    """Of sequences (S, T) or of one (T,), without gradient."""
    with torch.no_grad():
        return model(tokens.view(-1, tokens.size(-1)), None, schedule)


# ---------------------------------------------------------------------------------------------------------------------
# The whole model against the specification

@pytest.mark.parametrize("step, num_heads, model_dim", [  # the first of each stage, and the last validation
    (0, 2, 32), (4, 2, 32), (8, 2, 32), (12, 2, 32), (14, 2, 32), (0, 4, 64), (8, 4, 64)])
def test_the_recipe_is_the_written_out_model(recipe, step, num_heads, model_dim):
    """All 11 layers, tied and untied, in each stage: paired heads, key offset, value gates, XSA, MUDD, smear, skip."""
    hp = replace(recipe, num_heads=num_heads, model_dim=model_dim)
    model = lively(away_from_zero(build_model(hp, CPU, torch.float32, flex=False)))
    schedule = Schedule(step, hp, CPU)
    schedule.windows = {"long": torch.tensor(20), "short": torch.tensor(9), "paired": torch.tensor(9)}
    tokens = torch.randint(256, (44,), generator=torch.Generator().manual_seed(step))
    tokens[[12, 13]] = 256  # documents of 12, 1 and 31 tokens: longer and shorter than the windows
    stage = [0, 4, 8, 12, 14].index(step)
    theta, scale = slow_model.yarn([48, 112, 176, 208][:min(stage, 3) + 1], model_dim // num_heads // 4)
    wanted = slow_model.logits(model, tokens.tolist(), 256, dict(long=20, short=9), theta, scale, tied=stage < 2)
    torch.testing.assert_close(logits_of(model, tokens, schedule).double(), wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [
    "stem.smear_scale", "stem.smear_gate", "stem.ngram_scale", "value_embed.weight", "ngram.tables.0.weight",
    "blocks.1.attention.value_gate", "blocks.4.attention.value_scale", "blocks.3.attention.gate",
    "blocks.6.skip_scale", "blocks.6.skip_gate", "head.mudd.bias", "head.mudd.fc", "head.mudd.proj", "blocks.8.branch_scale",
    "blocks.9.residual_scale", "blocks.10.mudd.fc", "blocks.10.mudd.proj", "blocks.10.mudd.bias",
    "blocks.7.attention.xsa_scale", "blocks.0.mlp.proj.weight"])
def test_the_logits_depend_on_each_part(recipe, recipe_model, name):
    """So what the test above compares is not idle."""
    model, tokens, schedule = lively(recipe_model), tokens_of(T=128), Schedule(0, recipe, CPU)
    before = logits_of(model, tokens, schedule)
    with torch.no_grad():
        model.get_parameter(name).add_(0.2)
    assert (logits_of(model, tokens, schedule) - before).abs().max() > 0.01


@pytest.mark.parametrize("num_heads, rows", [
    (2, [("short", 0, None, None, True, True, None)]),                   # MUDD in the first layer
    (2, [("short", None, None, None, False, True, 0.0), (None, None, 0, None, False, True, None)]),  # and without tables
    (4, [("long", 0, None, None, True, False, 0.3), ("paired", 0, None, 0, True, True, -0.5)]),
    (3, [("short", None, None, None, True, False, None), ("long", 0, None, 0, True, False, 1.0)]),
    (1, [("long", 0, None, None, True, False, None)])])
def test_rows_of_ones_own_can_run(monkeypatch, num_heads, rows):
    """With XSA, MUDD, weights to the head, tables or without: losses and gradients are numbers, each part has one."""
    monkeypatch.setitem(LAYERS, "laptop", tuple(Layer(*row) for row in rows))
    hp = replace(SMALL, num_heads=num_heads, model_dim=16 * num_heads)
    train_gpt.check_hyperparameters(hp, 1)
    model, tokens = away_from_zero(build_model(hp, CPU, torch.float32, flex=False)), tokens_of(T=128)[None]
    objective, loss = model(tokens, tokens.roll(-1), Schedule(0, hp, CPU))
    objective.backward()
    assert loss.isfinite() and loss < 12
    unused = ("embed.weight",) if Schedule(0, hp, CPU).tied else ()
    for name, p in model.named_parameters():
        assert name in unused or (p.grad is not None and p.grad.isfinite().all()), name


def test_from_the_embeddings_on_all_is_one_graph(recipe):
    """As CUDA compiles it: no break in any stage, and nothing new but where the stage, or validating, is new."""
    model, counter = build_model(recipe, CPU, torch.float32, flex=False), CompileCounter()
    model.body, counts = torch.compile(model.body, backend=counter, dynamic=False, fullgraph=True), []
    text = tokens_of(T=257)[None]
    for step in (0, 4, 8, 11, 12, 14):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                model(text[:, :-1], text[:, 1:].clone(), Schedule(step, recipe, CPU))
            counts.append(counter.frame_count)
    assert counts == [1, 2, 3, 3, 4, 4, 5, 5, 5, 5, 5, 5], counts


def test_rows_of_layers_are_the_published_ones():
    """Counted from 0: attention in all but 6; pairs 0, 2, 5, 9; long 3, 10; value tables 1, 2, 8, 9, 10."""
    rows = LAYERS["fineweb"]
    assert len(rows) == 11 and [i for i, row in enumerate(rows) if row.attention is None] == [6]
    assert [i for i, row in enumerate(rows) if row.attention == "paired"] == [0, 2, 5, 9]
    assert [i for i, row in enumerate(rows) if row.attention == "long"] == [3, 10]
    assert {i: row.value_table for i, row in enumerate(rows) if row.value_table is not None} == {
        1: 0, 2: 1, 8: 2, 9: 3, 10: 4}
    assert {i: row.skip_from for i, row in enumerate(rows) if row.skip_from is not None} == {6: 3}
    assert {i: row.attends_to for i, row in enumerate(rows) if row.attends_to is not None} == {8: 7, 9: 7, 10: 7}
    assert [i for i, row in enumerate(rows) if row.xsa] == [1, 3, 4, 7, 8, 10]
    assert [i for i, row in enumerate(rows) if row.mudd] == [10]
    assert {i: row.to_head for i, row in enumerate(rows) if row.to_head is not None} == {3: 0.0, 7: -0.5, 9: 0.0}


# ---------------------------------------------------------------------------------------------------------------------
# The start of training

@pytest.mark.parametrize("track, padded", [("laptop", 384), ("fineweb", 50_304)])
def test_first_loss_is_ln_of_the_padded_vocabulary(track, padded):
    hp = replace(SMALL, track=track)
    with torch.no_grad():
        model, tokens = GPT(hp), torch.arange(64)[None]
        loss = model(tokens, tokens.roll(-1), at_window(64, hp))[1]
    assert loss.item() == pytest.approx(math.log(padded), abs=0.02)


def test_weights_at_the_start(recipe):
    """Uniform, 0.5 / sqrt(in) wide (in standard deviations); the MLP's way back zero; embedding N(0, 0.005), which is
    the head; value tables N(0, 0.01); bigrams and gates zero; lambdas as published."""
    model = build_model(replace(recipe, model_dim=128), CPU, torch.float32, flex=False)
    for name, p in model.named_parameters():
        spread = p.std().item() if p.numel() > 1 else 0.0
        if name.endswith(("qk.weight", "v.weight", "attention.proj.weight", "fc.weight")):
            assert spread == pytest.approx(0.5 / 128 ** 0.5, rel=0.02), name
            assert p.abs().max().item() == pytest.approx(0.5 * (3 / 128) ** 0.5, rel=0.01), name
        elif name in ("head.linear.weight", "embed.weight"):
            assert spread == pytest.approx(0.005, rel=0.02) and p.abs().max() > 0.015  # no uniform one
        elif name == "value_embed.weight":
            assert spread == pytest.approx(0.01, rel=0.02) and p.abs().max() > 0.03
        elif name.endswith(("residual_scale", "branch_scale")):
            wanted = [1.1 ** 0.5] * 2 if "residual" in name else [1.0, 1.0, 0.0, 0.05]
            torch.testing.assert_close(p.detach(), torch.tensor(wanted))
        elif name.endswith("mudd.fc"):
            assert p.shape == (64, 128) and spread == pytest.approx((3 * 128) ** -0.5, rel=0.02), name
        elif name.endswith("mudd.bias"):
            wanted = [0, -0.5, 0, 0, 0] if "head" in name else [0] * 6 + [2] * 2 + [1.1 ** 0.5] * 2 + [1, 1, 0, 0.05]
            torch.testing.assert_close(p.detach() / 10, torch.tensor(wanted, dtype=torch.float32))
        else:
            scalar = {"value_scale": 0.5, "skip_scale": -1.5, "smear_scale": 0.0,
                      "ngram_scale": 0.05}.get(name.split(".")[-1], 0.0)
            assert (p == scalar).all(), name
    assert torch.equal(model.embed.weight, model.head.linear.weight[0])


def test_seed_sets_the_weights_and_nothing_else_does(hp):
    def weights(seed):
        torch.rand(3)  # whatever was drawn before
        model = build_model(replace(hp, seed=seed), CPU, torch.float32, flex=False)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


# ---------------------------------------------------------------------------------------------------------------------
# Loss

@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0, 1e4])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5, 0.0), (1.0, 0.3, 0.2)])
def test_capped_cross_entropy_is_separate_cross_entropies(scale, dtype, tolerance, weights):
    """Loss and gradient against autograd in float64. The logits' own rounding is in both. Some targets are missing."""
    torch.manual_seed(0)
    logits = (scale * torch.randn(64, 384)).to(dtype).requires_grad_()
    head = torch.eye(384, dtype=dtype, requires_grad=True)  # so that the logits are not rounded
    exact, exact_head = (t.detach().double().requires_grad_() for t in (logits, head))
    targets = torch.randint(384, (64, len(weights)))
    targets[-2:, 1:] = targets[-1:, 2:] = -1
    capped = 23 * torch.sigmoid((exact @ exact_head.T + 5) / 7.5)
    torch.testing.assert_close(softcap(logits, *CAP).double(), capped, atol=1e-5, rtol=1e-6)
    objective, first = CappedCrossEntropy.apply(logits, head, targets, torch.tensor(weights), CAP)
    each = [torch.nn.functional.cross_entropy(capped, of, ignore_index=-1, reduction="sum") for of in targets.T]
    wanted = sum(weight * one for weight, one in zip(weights, each, strict=True))
    assert objective.dtype == torch.float32 and objective.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert first.item() == pytest.approx(each[0].item(), rel=1e-6) and not first.requires_grad
    (4 * objective).backward()  # a power of two: the gradients are rounded before they are multiplied by it
    (4 * wanted).backward()
    for ours, reference, loose, most in ((logits, exact, 1, 1), (head, exact_head, 2, 64 * scale)):  # a sum of 64 rows
        assert ours.grad.dtype == dtype
        slack = max(loose * tolerance * reference.grad.abs().max().item(), most * 4 * 23 / 7.5 * 2**-23)  # cap: 1 - 1
        torch.testing.assert_close(ours.grad.double(), reference.grad, atol=slack, rtol=0)


def test_next_targets_are_read_off_each_sequence():
    text = torch.arange(24).view(2, 12)
    tokens, targets = text[:, :-1], text[:, 1:]
    for (s, t), row in zip(((s, t) for s in range(2) for t in range(11)), next_targets(targets, 3).tolist(),
                           strict=True):
        assert row == [text[s, t + 1 + k].item() if t + 1 + k < 12 else -1 for k in range(3)], (s, tokens[s, t])


@pytest.mark.parametrize("step", [0, 3, 4, 6, 8, 13])
def test_the_objective_is_the_weighted_sum_and_the_loss_the_mean_of_next_tokens(recipe, recipe_model, step):
    """Weights 1, 1/2, 1/4 -> 0 in the first stage; 1, 1/2 -> 0 in the second; 1 later. Not normalised."""
    weights = {0: (1, 0.5, 0.25), 3: (1, 0.5, 0.0625), 4: (1, 0.5), 6: (1, 0.25), 8: (1,), 13: (1,)}[step]
    text = torch.stack([tokens_of(seed, T=129) for seed in (1, 2)])
    schedule = Schedule(step, recipe, CPU)
    schedule.words = 0
    objective, loss = recipe_model(text[:, :-1], text[:, 1:], schedule)
    logits = logits_of(recipe_model, text[:, :-1], schedule).double().view(2, 128, -1).log_softmax(-1)
    wanted = first = 0.0
    for s in range(2):
        for t in range(128):
            first -= logits[s, t, text[s, t + 1]].item()
            wanted -= sum(w * logits[s, t, text[s, t + 1 + k]].item() for k, w in enumerate(weights) if t + k < 128)
    assert objective.item() == pytest.approx(wanted, rel=1e-5) and objective.requires_grad
    assert loss.item() == pytest.approx(first / 256, rel=1e-5) and not loss.requires_grad


def test_the_gradient_is_that_of_autograd_on_the_logits(recipe, recipe_model):
    """Through MUDD and head into the blocks: a sum over tokens, so two sequences' is the sum of each one's."""
    text, schedule = tokens_of(T=129), Schedule(0, recipe, CPU)
    tokens, targets, schedule.words = text[None, :-1], text[None, 1:], 0
    recipe_model(tokens, targets, schedule)[0].backward()
    ours = {name: p.grad for name, p in recipe_model.named_parameters() if p.grad is not None}
    recipe_model.zero_grad()
    chances = recipe_model(tokens, None, schedule).double().log_softmax(-1)
    (-sum(w * chances[:128 - k].gather(1, targets[0, k:, None]).sum() for k, w in enumerate((1, 0.5, 0.25)))).backward()
    assert set(ours) == {name for name, p in recipe_model.named_parameters() if p.grad is not None}
    for name, p in recipe_model.named_parameters():
        if p.grad is not None:
            assert (ours[name] - p.grad).norm() <= 1e-4 * p.grad.norm(), name


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("vocab_size, words, distinct", [(384, 128, 60), (384, 383, 257), (50_304, 10_240, 5000)])
def test_the_words_of_a_softmax_are_all_targets_and_others(seed, vocab_size, words, distinct):
    random = torch.Generator().manual_seed(seed)
    targets = next_targets(torch.randint(distinct, (1, min(4 * words, 9000)), generator=random), 3)
    chosen, places = candidates(targets, vocab_size, words)
    assert len(chosen) == words == len(set(chosen.tolist())) and set(targets.flatten().tolist()) - {-1} <= set(
        chosen.tolist()) <= set(range(vocab_size))
    assert torch.equal(torch.where(targets < 0, -1, chosen[places]), targets) and torch.equal(places < 0, targets < 0)
    again = candidates(targets.clone(), vocab_size, words)
    assert all(map(torch.equal, again, (chosen, places)))


def test_the_other_words_are_drawn_evenly():
    """200 texts of 1,000 common words: each other word is drawn in a fifth of them, in other texts than its neighbour;
    within 6 standard deviations, of 49,304 words."""
    counts, texts, random = torch.zeros(50_304), 200, torch.Generator().manual_seed(0)
    both = torch.zeros(50_303)
    for _ in range(texts):
        targets = torch.randint(1000, (16_384, 1), generator=random)
        drawn = torch.zeros(50_304)
        drawn[candidates(targets, 50_304, 10_240)[0]] = 1
        counts, both = counts + drawn, both + drawn[1:] * drawn[:-1]
    assert (counts[:1000] == texts).all()
    chance = 9240 / 49_304
    spread = (chance * (1 - chance) / texts) ** 0.5
    assert (counts[1000:] / texts - chance).abs().max() < 6 * spread
    assert both[1000:].mean() / texts < chance / 2


def test_targets_without_room_among_the_words_have_no_loss():
    targets = next_targets(torch.arange(200)[None], 2)
    chosen, places = candidates(targets, 384, 64)
    kept = places >= 0
    assert kept[:, 0].sum() == 64  # each word is the first target once
    assert torch.equal(chosen[places[kept]], targets[kept]) and len(set(chosen.tolist())) == 64
    x, head = torch.randn(200, 8, requires_grad=True), torch.randn(384, 8)
    objective, _ = CappedCrossEntropy.apply(x, head[chosen], places, torch.tensor([1.0, 0.5]), CAP)
    objective.backward()
    alone = ~kept.any(1)
    assert objective.isfinite() and alone.sum() > 70 and not x.grad[alone].any() and x.grad[~alone].any(1).all()


@pytest.mark.parametrize("step", [0, 4, 8])
def test_each_sequence_has_a_softmax_over_its_own_words(recipe, recipe_model, step):
    """Objective, loss and every gradient: two sequences at once, and each written out with the other words' logits
    taken away; the same, so that it does not matter which rank has which sequences. The rest of the head rests."""
    text = torch.stack([tokens_of(seed, T=257) for seed in (1, 2)])
    tokens, targets, schedule = text[:, :-1], text[:, 1:], Schedule(step, recipe, CPU)
    schedule.words = 210
    objective, loss = recipe_model(tokens, targets, schedule)
    objective.backward()
    ours = {name: p.grad for name, p in recipe_model.named_parameters() if p.grad is not None}
    recipe_model.zero_grad()
    wanted, first, all_chosen = 0.0, 0.0, set()
    for s in range(2):
        later = next_targets(targets[s:s + 1], len(schedule.target_weights))
        chosen, _ = candidates(later, 384, 210)
        all_chosen |= set(chosen.tolist())
        others = torch.ones(384, dtype=torch.bool).index_fill(0, chosen, False)
        logits = recipe_model(tokens[s:s + 1], None, schedule).double().masked_fill(others, -math.inf).log_softmax(-1)
        each = -logits.gather(1, later.clamp(min=0)) * (later >= 0)
        wanted, first = wanted + (each * schedule.target_weights).sum(), first + each[:, 0].sum()
    wanted.backward()
    assert objective.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert loss.item() == pytest.approx(first.item() / 512, rel=1e-5)
    for name, p in recipe_model.named_parameters():
        if name in ours:
            assert (ours[name] - p.grad).norm() <= 1e-4 * p.grad.norm(), name
    rest = sorted(set(range(257, 384)) - all_chosen)  # words that the text lacks, so that a tied embedding rests, too
    assert rest and not ours["head.linear.weight"][0, rest].any()


@pytest.mark.parametrize("words, sampled", [(383, True), (64, True), (63, False), (384, False), (1000, False)])
def test_words_that_may_be_too_few_are_all(recipe, recipe_model, words, sampled):
    """16,384 tokens of English have at most 4,770 words, 65,536 tokens 11,327 (records/studies/2026-11-28_English)."""
    text, schedule = tokens_of(T=257)[None], Schedule(0, recipe, CPU)
    losses = []
    for schedule.words in (0, words):
        losses.append(recipe_model(text[:, :-1], text[:, 1:], schedule)[0].item())
    assert (losses[0] != losses[1]) == sampled


def test_a_validation_is_over_all_words(recipe, recipe_model):
    """Whatever the stage says."""
    text, losses = tokens_of(T=257)[None], []
    for words in (0, 3, 210):
        schedule = Schedule(0, recipe, CPU)
        schedule.words = words
        with torch.no_grad():
            losses.append(recipe_model(text[:, :-1], text[:, 1:], schedule)[1].item())
    chances = logits_of(recipe_model, text[:, :-1], schedule).double().log_softmax(-1)
    assert losses[0] == losses[1] == losses[2] == pytest.approx(-chances.gather(1, text[0, 1:, None]).mean().item())


def test_a_validation_makes_no_gradient(recipe, recipe_model, monkeypatch):
    """The head makes its gradients in the forward: in float32 its weight is the parameter, without a copy between."""
    asked, forward = [], CappedCrossEntropy.forward

    def spy(ctx, *args):
        asked.append(any(ctx.needs_input_grad))
        return forward(ctx, *args)
    monkeypatch.setattr(CappedCrossEntropy, "forward", staticmethod(spy))
    text = tokens_of(T=129)[None]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            recipe_model(text[:, :-1], text[:, 1:], Schedule(0, recipe, CPU))
    assert asked == [False, True]


def test_a_validation_in_pieces_is_the_whole(recipe, recipe_model):
    """Without gradients logits are made for sequence_length tokens at a time, and the next token alone counts."""
    text, schedule = tokens_of(T=641), Schedule(0, recipe, CPU)
    tokens, targets = text[None, :-1], text[None, 1:]
    with torch.no_grad():
        sizes = []
        recipe_model.head.register_forward_hook(lambda module, args, y: sizes.append(len(args[0])))
        objective, loss = recipe_model(tokens, targets, schedule)
        assert sizes == [256, 256, 128]
        chances = recipe_model(tokens, None, schedule).double().log_softmax(-1)
    wanted = -chances.gather(1, targets[0][:, None]).mean().item()
    assert loss.item() == pytest.approx(wanted, rel=1e-5) == pytest.approx(objective.item() / 640, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What a logit may depend on

@pytest.mark.parametrize("changed", [0, 99, 100, 101, 200, 255])
@pytest.mark.parametrize("model, step", [("tiny_model", 0), ("recipe_model", 0), ("recipe_model", 8)])
def test_no_logit_depends_on_later_tokens_or_other_documents(request, changed, model, step):
    model = request.getfixturevalue(model)
    schedule, tokens = Schedule(step, model.hp, CPU), tokens_of()
    other = tokens.clone()
    other[changed] = (tokens[changed] + 1) % 256
    a, b = (logits_of(model, t, schedule) for t in (tokens, other))
    differs = (a != b).any(dim=-1)
    assert not differs[:changed].any()
    assert differs[changed]
    if changed < 100:  # another document's token, though inside the window
        assert not differs[100:].any()


def test_logits_depend_on_the_window(tiny_model):
    schedules = [at_window(w) for w in (64, 128)]
    schedules[1].windows["paired"] = torch.tensor(64)  # positions of half a token
    a, b = (logits_of(tiny_model, tokens_of(), schedule) for schedule in schedules)
    differs = (a != b).any(dim=-1)
    assert not differs[:64].any() and differs[64:100].any()
    assert not differs[100:164].any() and differs[164:].any()  # a document begins at 100


@pytest.mark.parametrize("model", ["tiny_model", "recipe_model"])
def test_batched_documents_are_as_good_as_alone(request, model):
    model, tokens = request.getfixturevalue(model), tokens_of()
    schedule = Schedule(0, model.hp, CPU)
    together = logits_of(model, tokens, schedule)[100:228]
    alone = logits_of(model, tokens[100:228], schedule)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["tiny_model", "recipe_model"])
def test_packed_sequences_are_as_good_as_alone(request, model):
    model = request.getfixturevalue(model)
    schedule, tokens = Schedule(0, model.hp, CPU), torch.stack([tokens_of(seed, T=128) for seed in range(2)])
    together = logits_of(model, tokens, schedule)
    alone = torch.cat([logits_of(model, row, schedule) for row in tokens])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["tiny_model", "recipe_model"])
def test_logits_stay_below_the_cap(request, model):
    model = request.getfixturevalue(model)
    with torch.no_grad():
        model.head.linear.weight.mul_(1e5)
    logits = logits_of(model, tokens_of(T=128), Schedule(8, model.hp, CPU))  # untied: the embedding stays as it is
    assert logits.min() == 0 and logits.max() == model.hp.logit_cap


# ---------------------------------------------------------------------------------------------------------------------
# N-grams

def test_bigrams_have_the_published_rows(recipe):
    tokens = torch.randint(50_257, (2, 60), generator=torch.Generator().manual_seed(0))
    tokens[0, 20] = 50_256
    embed, rows = NGramEmbed(replace(recipe, ngram_rows=251_520, model_dim=8), sparse=False), []
    embed.tables[0].register_forward_pre_hook(lambda module, args: rows.extend(args[0].tolist()))
    start = document_start(tokens, 50_256)
    embed(tokens.flatten(), torch.arange(120) - start)
    flat, starts = tokens.flatten().tolist(), [0] * 20 + [20] * 40 + [60] * 60
    assert rows == [slow_model.bigram_row(flat, t, starts, 251_520) for t in range(120)]
    assert sum(row == 251_519 for row in rows) == 3


def test_n_grams_are_those_that_end_here_and_begin_in_the_document():
    """Two positions have the same 2- to 4-grams iff they have the same rows, for tables without collisions; where the
    document is too short, the last row."""
    tokens = torch.randint(3, (2, 60), generator=torch.Generator().manual_seed(0))
    tokens[0, 20] = 9  # a document begins here; sequences begin at 0 and 60
    embed = NGramEmbed(replace(SMALL, ngrams=4, ngram_rows=999_983, model_dim=8), sparse=False)
    rows = []
    for table in embed.tables:
        table.register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    position = torch.arange(120) - document_start(tokens, 9)
    assert not embed(tokens.flatten(), position).any()  # tables begin at zero
    flat, starts = tokens.flatten().tolist(), [0] * 20 + [20] * 40 + [60] * 60
    for n, row in zip((2, 3, 4), rows, strict=True):
        grams = [tuple(flat[i + 1 - n:i + 1]) if i + 1 - n >= start else () for i, start in enumerate(starts)]
        assert len(set(grams)) == len(set(row.tolist())) == len(set(zip(grams, row.tolist(), strict=True))) > 9
        assert {r for r, gram in zip(row.tolist(), grams, strict=True) if gram == ()} == {999_982}


def test_the_sum_of_all_n_grams_is_added(hp):
    embed, tokens = NGramEmbed(hp, sparse=False), torch.randint(256, (40,))
    for table in embed.tables:
        torch.nn.init.normal_(table.weight)
    rows = []
    for table in embed.tables:
        table.register_forward_hook(lambda module, args, y: rows.append(y))
    torch.testing.assert_close(embed(tokens, torch.arange(40)), rows[0] + rows[1])
    assert len(rows) == hp.ngrams - 1


# ---------------------------------------------------------------------------------------------------------------------
# Size and precision

def test_weights_stay_float32_and_activations_do_not(recipe):
    model = build_model(recipe, CPU, torch.bfloat16, flex=False)
    seen = []
    for module in model.modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda module, args, y: seen.append((module.weight.dtype, y.dtype)))
    model.head.register_forward_hook(
        lambda head, args, y: seen.append((head.linear.weight.dtype, args[0].dtype)))
    tokens = tokens_of()[None]
    model(tokens, tokens, Schedule(8, recipe, CPU))[0].backward()  # untied: every parameter has a gradient
    assert set(seen) == {(torch.float32, torch.bfloat16)} and len(seen) == 10 + 11 * 2 + 1
    assert model.value_embed.weight.dtype == model.ngram.tables[0].weight.dtype == torch.bfloat16
    assert model.embed.weight.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("in_features, out_features", [(8, 8), (8, 24), (24, 8)])
@pytest.mark.parametrize("parts", [1, 2])
def test_linear_is_stored_tall_and_maps_the_same(in_features, out_features, parts):
    linear, x = Linear(in_features, out_features, parts), torch.randn(5, in_features)
    parts, rows, columns = linear.weight.shape
    assert rows >= columns and {rows, columns} == {in_features, out_features}
    maps = [part.T if part.shape == (in_features, out_features) and in_features > out_features else part
            for part in linear.weight]
    wanted = torch.cat([torch.stack([w @ row for row in x]) for w in maps], dim=-1)
    torch.testing.assert_close(linear(x), wanted)


def test_fineweb_size():
    model = build_model(Hyperparameters(), torch.device("meta"), torch.bfloat16, flex=True)
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    assert parameters["value_embed.weight"] == 50_304 * 5 * 768
    assert parameters["ngram.tables.0.weight"] == 5 * 50_304 * 768 and "ngram.tables.1.weight" not in parameters
    tables = {"embed.weight", "value_embed.weight", "ngram.tables.0.weight"}  # of them one row a token is active
    matrices = (10 * 4 + 11 * 8) * 768 ** 2 + 50_304 * 768
    others = sum(n for name, n in parameters.items() if name not in tables) - matrices
    mudd = 2 * 64 * 768 + (14 + 5) * (64 + 1)
    assert 0 < others - mudd < 2000  # gates and scalars
    assert TRACKS["fineweb"].vocab_size == 50_257
