"""The model: what it must and must not depend on, its first loss, its topology, its size."""
import math

import pytest
import torch

from train_gpt import GPT, TRACKS, Hyperparameters, Linear, build_model, norm

WINDOW = torch.tensor(64)


def tokens_of(hp, seed=0, T=256):
    tokens = torch.randint(256, (T,), generator=torch.Generator().manual_seed(seed))
    tokens[100] = 256  # a document begins here
    return tokens


@pytest.mark.parametrize("vocab_size, padded", [(257, 384), (50_257, 50_304), (384, 384)])
def test_first_loss_is_ln_of_the_padded_vocabulary(vocab_size, padded):
    model = GPT(vocab_size, 0, 2, 2, 32, 64, 64)
    loss = model(torch.arange(64)[None], torch.arange(64)[None], WINDOW)
    assert loss.item() == pytest.approx(math.log(padded), abs=1e-4)


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
        a, b = (tiny_model(tokens_of(hp)[None], None, torch.tensor(w)) for w in (64, 128))
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
    y = model.blocks[0](x, torch.randn(128, 32), x0, model.rotary_cos[:128], model.rotary_sin[:128],
                        torch.zeros(128, dtype=torch.long))
    assert torch.equal(y, x)


@pytest.mark.parametrize("num_layers", [1, 2, 5, 12])
def test_u_net_order(num_layers, monkeypatch):
    """The last layer takes in the first one's output, the one before it the second's (last in, first out)."""
    model = GPT(256, 0, num_layers, 1, 32, 64, 64)
    assert model.skip_source == {num_layers - 1 - i: i for i in range(num_layers // 2)}
    assert torch.equal(model.skip_weights, torch.ones(num_layers // 2))
    seen = []
    for block in model.blocks:  # each block adds nothing, so its input is a sum of the outputs before
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = torch.arange(64)
    model(tokens[None], None, WINDOW)
    x0 = norm(model.embed(tokens))
    size, outputs = 1.0, []
    for layer in range(num_layers):
        if layer >= num_layers - num_layers // 2:
            size += outputs[num_layers - 1 - layer]
        outputs.append(size)
        torch.testing.assert_close(seen[layer], size * x0)


def test_value_embeddings_reach_only_their_layer(tiny_model, hp):
    tokens = tokens_of(hp)
    values = []
    for block in tiny_model.blocks:
        block.register_forward_pre_hook(lambda module, args: values.append(args[1]))
    tiny_model(tokens[None], None, WINDOW)
    table = tiny_model.value_embed(tokens)
    assert torch.equal(torch.cat(values, dim=-1), table) and all(v.shape == (256, 32) for v in values)


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
    assert sum(parameters.values()) == pytest.approx(626e6, rel=0.002)
    assert parameters["value_embed.weight"] == 50_304 * 12 * 768
    # of the tables one row each is active a token
    tables = ("embed.weight", "value_embed.weight")
    active = sum(n for name, n in parameters.items() if name not in tables) + 13 * 768
    assert active == pytest.approx(124e6, rel=0.01)
    assert TRACKS["fineweb"].vocab_size == 50_257


def test_seed_sets_the_weights_and_nothing_else_does(hp):
    def weights(seed):
        torch.rand(3)  # whatever was drawn before
        model = build_model(type(hp)(**{**vars(hp), "seed": seed}), torch.device("cpu"), torch.float32, flex=False)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
