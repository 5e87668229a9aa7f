"""The model: what it must and must not depend on, its first loss, its topology, its size."""
import math
from dataclasses import replace

import pytest
import torch
from conftest import at_window

from train_gpt import (
    GPT,
    TRACKS,
    CappedCrossEntropy,
    Hyperparameters,
    Linear,
    NGramEmbed,
    build_model,
    document_start,
    norm,
    softcap,
)

WINDOW = at_window(64)
SMALL = Hyperparameters(track="laptop", num_layers=2, num_heads=2, model_dim=32, sequence_length=64, ngrams=3,
                        ngram_rows=1021, window_start=64, window_end=64)


def tokens_of(hp, seed=0, T=256):
    tokens = torch.randint(256, (T,), generator=torch.Generator().manual_seed(seed))
    tokens[100] = 256  # a document begins here
    return tokens


@pytest.mark.parametrize("track, padded", [("laptop", 384), ("fineweb", 50_304)])
def test_first_loss_is_ln_of_the_padded_vocabulary(track, padded):
    model = GPT(replace(SMALL, track=track))
    loss = model(torch.arange(64)[None], torch.arange(64)[None], WINDOW)
    assert loss.item() == pytest.approx(math.log(padded), abs=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0, 1e4])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_capped_cross_entropy_is_cross_entropy_of_the_capped_logits(scale, dtype, tolerance):
    """Loss and gradient against autograd in float64. The logits' own rounding is in both."""
    torch.manual_seed(0)
    logits = (scale * torch.randn(64, 384)).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    targets = torch.randint(384, (64,))
    capped = 15 * torch.tanh(exact / 15)
    torch.testing.assert_close(softcap(logits, 15.0).double(), capped, atol=1e-5, rtol=1e-6)
    loss, wanted = CappedCrossEntropy.apply(logits, targets, 15.0), torch.nn.functional.cross_entropy(capped, targets)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    (3 * loss).backward()
    (3 * wanted).backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=tolerance * exact.grad.abs().max().item(), rtol=0)


@pytest.mark.parametrize("changed", [0, 99, 100, 101, 200, 255])
def test_no_logit_depends_on_later_tokens_or_other_documents(tiny_model, hp, changed):
    tokens = tokens_of(hp)
    other = tokens.clone()
    other[changed] = (tokens[changed] + 1) % 256
    with torch.no_grad():
        a, b = (tiny_model(t[None], None, WINDOW) for t in (tokens, other))
    differs = (a != b).any(dim=-1)
    assert not differs[:changed].any()
    assert differs[changed]
    if changed < 100:  # another document's token, though inside the window
        assert not differs[100:].any()


def test_logits_depend_on_the_window(tiny_model, hp):
    with torch.no_grad():
        a, b = (tiny_model(tokens_of(hp)[None], None, at_window(w)) for w in (64, 128))
    differs = (a != b).any(dim=-1)
    assert not differs[:64].any() and differs[64:100].any()
    assert not differs[100:164].any() and differs[164:].any()  # a document begins at 100


def test_batched_documents_are_as_good_as_alone(tiny_model, hp):
    tokens = tokens_of(hp)
    with torch.no_grad():
        together = tiny_model(tokens[None], None, WINDOW)[100:228]
        alone = tiny_model(tokens[None, 100:228], None, WINDOW)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_packed_sequences_are_as_good_as_alone(tiny_model, hp):
    tokens = torch.stack([tokens_of(hp, seed, T=128) for seed in range(2)])
    with torch.no_grad():
        together = tiny_model(tokens, None, WINDOW)
        alone = torch.cat([tiny_model(row[None], None, WINDOW) for row in tokens])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_mean_of_token_losses_is_the_loss(tiny_model, hp):
    tokens, targets = tokens_of(hp, 1), tokens_of(hp, 2)
    with torch.no_grad():
        logits = tiny_model(tokens[None], None, WINDOW)
        by_hand = (logits.double().logsumexp(-1) - logits.double().gather(1, targets[:, None])[:, 0]).mean()
        assert tiny_model(tokens[None], targets[None], WINDOW).item() == pytest.approx(by_hand.item(), abs=1e-5)
    assert logits.abs().max() < 30


def test_blocks_are_the_identity_at_the_start(hp):
    model = build_model(hp, torch.device("cpu"), torch.float32, flex=False)
    x, x0 = torch.randn(128, 32), torch.randn(128, 32)
    y = model.blocks[0](x, x0, None, torch.randn(128, 32), model.rotary[:, :128], torch.zeros(128, dtype=torch.long))
    assert torch.equal(y, x)


@pytest.mark.parametrize("num_layers", [1, 2, 5, 12])
def test_u_net_order(num_layers, monkeypatch):
    """The last layer takes in the first one's output, the one before it the second's (last in, first out)."""
    model = GPT(replace(SMALL, num_layers=num_layers))
    weights = [block.skip_mix for block in model.blocks]
    skips = num_layers // 2
    assert weights == [None] * (num_layers - skips) + [1.0] * skips
    seen = []
    for block in model.blocks:  # each block adds nothing but the skip, so what it works on is a sum of outputs before
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    tokens = torch.arange(64)
    model(tokens[None], None, WINDOW)
    x0 = norm(model.embed(tokens))  # n-gram tables begin at zero
    size, outputs = 1.0, []
    for layer in range(num_layers):
        if layer >= num_layers - num_layers // 2:
            size += outputs[num_layers - 1 - layer]
        outputs.append(size)
        torch.testing.assert_close(seen[layer], size * x0)


@pytest.mark.parametrize("num_layers, value_layers, table_of_layer", [
    (5, 2, [0, 1, None, 0, 1]), (4, 2, [0, 1, 0, 1]), (12, 3, [0, 1, 2, *[None] * 6, 0, 1, 2]), (3, 9, [0, None, 0]),
    (1, 2, [None]), (4, 0, [None] * 4)])
def test_value_embeddings_are_shared_by_the_first_and_the_last_layers(num_layers, value_layers, table_of_layer):
    model = GPT(replace(SMALL, num_layers=num_layers, value_layers=value_layers))
    values = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: values.append(args[3]))
    tokens = torch.arange(64)
    model(tokens[None], None, WINDOW)
    for block, value, table in zip(model.blocks, values, table_of_layer, strict=True):
        assert (value is None) == (table is None) == (block.attention.value_mix is None)
        if table is not None:
            assert torch.equal(value, model.value_embed(tokens)[:, 32 * table:32 * (table + 1)])


def test_n_grams_are_those_that_end_here_and_begin_in_the_document():
    """Two positions have the same 2- to 4-grams iff they have the same rows, for tables without collisions."""
    tokens = torch.randint(3, (2, 60), generator=torch.Generator().manual_seed(0))
    tokens[0, 20] = 9  # a document begins here; sequences begin at 0 and 60
    embed = NGramEmbed(replace(SMALL, ngrams=4, ngram_rows=999_983, model_dim=8), sparse=False)
    rows = []
    for table in embed.tables:
        table.register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    assert not embed(tokens.flatten(), document_start(tokens, 9)).any()  # tables begin at zero
    flat, starts = tokens.flatten().tolist(), [0] * 20 + [20] * 40 + [60] * 60
    for n, row in zip((2, 3, 4), rows, strict=True):
        grams = [tuple(flat[max(start, i + 1 - n):i + 1]) for i, start in enumerate(starts)]
        assert len(set(grams)) == len(set(row.tolist())) == len(set(zip(grams, row.tolist(), strict=True))) > 9


def test_weights_stay_float32_and_activations_do_not(hp):
    model = build_model(hp, torch.device("cpu"), torch.bfloat16, flex=False)
    seen = []
    for module in model.modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda module, args, y: seen.append((module.weight.dtype, y.dtype)))
    model(tokens_of(hp)[None], tokens_of(hp)[None], WINDOW).backward()
    assert set(seen) == {(torch.float32, torch.bfloat16)} and model.embed.weight.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_fineweb_size():
    hp = Hyperparameters()
    model = build_model(hp, torch.device("meta"), torch.bfloat16, flex=True)
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    assert parameters["value_embed.weight"] == 50_304 * 2 * 768
    assert parameters["ngram.tables.0.weight"] == 24_571 * 768
    # of the tables one row each is active a token
    tables = {name for name in parameters if name.startswith(("embed.", "value_embed.", "ngram.tables."))}
    assert len(tables) == 3 and sum(parameters.values()) == pytest.approx(258e6, rel=0.002)
    assert sum(n for name, n in parameters.items() if name not in tables) == pytest.approx(124e6, rel=0.01)
    assert TRACKS["fineweb"].vocab_size == 50_257


def test_seed_sets_the_weights_and_nothing_else_does(hp):
    def weights(seed):
        torch.rand(3)  # whatever was drawn before
        model = build_model(type(hp)(**{**vars(hp), "seed": seed}), torch.device("cpu"), torch.float32, flex=False)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
