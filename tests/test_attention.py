"""The mask against brute force, both kernels against a plain softmax, rotary, pairs and offset by their definitions."""
import math
from dataclasses import replace

import pytest
import slow_model
import torch
from conftest import away_from_zero

import train_gpt
from train_gpt import (
    Attention,
    Layer,
    Schedule,
    attention,
    block_mask,
    build_model,
    chunked_attention,
    document_start,
    rotary_tables,
    rotate,
    visible,
)

EOT, CPU = 9, torch.device("cpu")


def first_visible_key(tokens, eot_token, window):
    return train_gpt.first_visible_key(document_start(tokens, eot_token), window)


def random_documents(T: int, seed: int, rarity: int = 40) -> torch.Tensor:
    return torch.randint(EOT, (T,), generator=torch.Generator().manual_seed(seed)).where(
        torch.rand(T, generator=torch.Generator().manual_seed(seed + 1)) > 1 / rarity, EOT)


def brute_force_mask(tokens: list[int], window: int) -> torch.Tensor:
    """(T, T) bool from the rule's words: causal, the same document by a running count, among the last `window`."""
    document, count = [], 0
    for token in tokens:
        count += token == EOT
        document.append(count)
    T = len(tokens)
    return torch.tensor([[k <= q and document[q] == document[k] and q - k < window for k in range(T)]
                         for q in range(T)])


def plain_attention(q, k, v, mask):
    """(..., T, d); the scores are the products themselves."""
    scores = (q.double() @ k.double().mT).masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v.double()).float()


def full_mask(tokens, window):
    first_key = first_visible_key(tokens[None], EOT, torch.tensor(window))
    position = torch.arange(len(tokens))
    return visible(position[:, None], position[None, :], first_key[:, None])


@pytest.mark.parametrize("T", [1, 7, 130, 256])
@pytest.mark.parametrize("window", [1, 5, 64, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_mask_is_the_rule(T, window, seed):
    tokens = random_documents(T, seed)
    assert torch.equal(full_mask(tokens, window), brute_force_mask(tokens.tolist(), window))


def test_packed_sequences_do_not_see_each_other():
    tokens = random_documents(96, seed=3).view(3, 32)
    together = first_visible_key(tokens, EOT, torch.tensor(20)).view(3, 32)
    for row in range(3):
        assert torch.equal(together[row] - 32 * row, first_visible_key(tokens[row:row + 1], EOT, torch.tensor(20)))


@pytest.mark.parametrize("T, window, max_window", [(256, 64, 64), (256, 40, 128), (200, 128, 128), (64, 64, 256),
                                                   (333, 100, 192)])
def test_chunked_attention_and_its_gradients(T, window, max_window):
    torch.manual_seed(T)
    tokens = random_documents(T, seed=T)
    q, k, v = (torch.randn(1, 3, T, 8, requires_grad=True) for _ in range(3))
    upstream = torch.randn(1, 3, T, 8)
    results = []
    first_key = first_visible_key(tokens[None], EOT, torch.tensor(window))
    for run in (lambda: chunked_attention(q, k, v, first_key, max_window),
                lambda: plain_attention(q, k, v, brute_force_mask(tokens.tolist(), window))):
        y = run()
        results.append([y, *torch.autograd.grad(y, (q, k, v), upstream)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [64, 128, 200, 512])
@pytest.mark.parametrize("seed", range(8))
def test_block_mask_finds_each_block(window, seed):
    """A block is in the list of whole ones iff all of it is visible, in the list of partial ones if only some is; of
    both its query block and its key block, whose lists the backward pass goes through."""
    tokens = random_documents(1024, seed, rarity=300)
    mask = full_mask(tokens, window).view(8, 128, 8, 128).transpose(1, 2)
    blocks = block_mask(first_visible_key(tokens[None], EOT, torch.tensor(window)))

    def listed(name):
        count, which = getattr(blocks, f"{name}_num_blocks"), getattr(blocks, f"{name}_indices")
        assert count.shape == (1, 1, 8) and which.shape == (1, 1, 8, 8) and which.is_contiguous()
        assert count.dtype == which.dtype == torch.int32 and 0 <= which.min() and which.max() < 8
        dense = torch.zeros(8, 8, dtype=torch.int)
        for row in range(8):
            for column in which[0, 0, row, :count[0, 0, row]].tolist():
                dense[row, column] += 1  # each once
        return dense

    some, every = mask.flatten(2).any(-1), mask.flatten(2).all(-1)
    partly = some & ~every
    for name, expected in (("kv", partly), ("full_kv", every), ("q", partly.T), ("full_q", every.T)):
        assert torch.equal(listed(name), expected.int()), name


@pytest.mark.parametrize("window", [64, 300])
def test_flex_attention_sees_the_same(window):
    torch.manual_seed(0)
    tokens = random_documents(512, seed=5)
    q, k, v = (torch.randn(512, 2, 16) / 4 for _ in range(3))
    first_key = first_visible_key(tokens[None], EOT, torch.tensor(window))
    with torch.no_grad():  # FlexAttention has no backward on the CPU
        flex, chunked = (attention(q, k, v, mask, max_window=512) for mask in (block_mask(first_key), first_key))
    seen = brute_force_mask(tokens.tolist(), window)
    expected = plain_attention(*(t.transpose(0, 1) for t in (q, k, v)), seen).transpose(0, 1)
    torch.testing.assert_close(flex, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(chunked, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind, window", [("short", 128), ("long", 384), ("paired", 128)])
def test_masks_of_the_model_are_the_rule(recipe, kind, window):
    """Of both kernels, by kind of attention, over two sequences. Paired heads have two positions a token, and as many
    positions in their window as others have tokens."""
    tokens = random_documents(512, seed=3, rarity=150).view(2, 256)
    tokens[:, 0] = EOT  # brute force knows no sequences
    schedule, seen = Schedule(0, recipe, CPU), brute_force_mask(tokens.flatten().tolist(), window)
    schedule.windows = {"long": torch.tensor(384), "short": torch.tensor(128), "paired": torch.tensor(128)}
    if kind == "paired":
        documents = slow_model.documents(tokens.flatten().tolist(), EOT)
        seen = torch.tensor([[s <= p and p - s < window and documents[s // 2] == documents[p // 2]
                              for s in range(1024)] for p in range(1024)])
    position, start = torch.arange(len(seen)), document_start(tokens, EOT)
    model = build_model(recipe, torch.device("meta"), torch.float32, flex=False)
    first_key = model.masks(start, schedule)[kind]
    assert torch.equal(visible(position[:, None], position, first_key[:, None]), seen)
    model.flex = True
    blocks, n = model.masks(start, schedule)[kind], len(seen) // 128
    per_block = seen.view(n, 128, n, 128).transpose(1, 2).flatten(2)
    assert torch.equal(blocks.full_kv_num_blocks[0, 0].long(), per_block.all(-1).sum(-1))
    assert torch.equal((blocks.full_kv_num_blocks + blocks.kv_num_blocks)[0, 0].long(), per_block.any(-1).sum(-1))
    torch.testing.assert_close(blocks.mask_mod(0, 0, position[:, None], position), seen)


@pytest.mark.parametrize("step", [0, 14])
def test_both_kernels_give_the_recipe_the_same_logits(recipe, recipe_model, step):
    """All 11 layers, with documents: what a CPU trains is what FlexAttention does on a GPU."""
    tokens = torch.randint(256, (2, 384), generator=torch.Generator().manual_seed(step))
    tokens[0, 77] = tokens[1, 300] = 256
    schedule = Schedule(step, recipe, CPU)
    with torch.no_grad():
        chunked = recipe_model(tokens, None, schedule)
        recipe_model.flex = True
        flex = recipe_model(tokens, None, schedule)
    torch.testing.assert_close(flex, chunked, atol=1e-4, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions

def random_frequencies(d):
    return slow_model.yarn([384, 896], d // 4)[0].float()


def test_rotation_sees_only_the_distance():
    rotary = rotary_tables(random_frequencies(16), 64)
    q, k = torch.randn(16), torch.randn(16)
    turned = [rotate(x.expand(64, 1, 16), rotary)[:, 0] for x in (q, k)]
    products = turned[0] @ turned[1].T
    for distance in (0, 1, 13):
        along = products.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned[0].norm(dim=-1), q.norm().expand(64), atol=1e-4, rtol=1e-4)


def test_rotation_by_its_definition():
    """Position p turns (x[i], x[i + d/4]) by p theta_i as a complex number; the second half of a head stays."""
    frequencies, x = random_frequencies(16), torch.randn(10, 2, 16)
    turned = rotate(x, rotary_tables(frequencies, 10))
    for p in range(10):
        for h in range(2):
            torch.testing.assert_close(turned[p, h], slow_model.turn(x[p, h], p, frequencies))
    assert torch.equal(turned[..., 8:], x[..., 8:]) and not torch.isclose(turned[1:, :, :8], x[1:, :, :8]).all()


def test_rotary_tables_are_exact_at_the_last_position():
    """Paired heads turn by angles of up to 2 x 262,144 positions in a validation: float32 holds such integers."""
    frequencies = slow_model.yarn([384], 32)[0].float()
    position = torch.tensor([0, 1, 77_777, 2 * 262_144 - 1])
    cos, sin = rotary_tables(frequencies, 2 * 262_144)[:, position]
    angle = position[:, None].double() * frequencies.double()
    torch.testing.assert_close(cos.double(), angle.cos(), atol=0.03, rtol=0)  # 2^19 radians have steps of 2^-5
    torch.testing.assert_close(sin.double(), angle.sin(), atol=0.03, rtol=0)
    assert (cos[:2].double() - angle[:2].cos()).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# One layer's attention against loops

def layer_of(hp, kind, value_table=None):
    """An attention of that kind with weights away from zero, and its parameters by slow_model's names."""
    layer = away_from_zero(Attention(hp, Layer(kind, value_table, None, None, kind != "paired", False, None)))
    return layer, {f"blocks.{i}.attention.{name}": p.detach().double()
                   for name, p in layer.named_parameters() for i in range(11)}


def both(hp, kind, layer, p, number, x, tokens, value=None, window=9):
    """(train_gpt's, the written-out) attention of x (T, D)."""
    frequencies, starts = random_frequencies(hp.model_dim // hp.num_heads), document_start(tokens[None], EOT)
    twice = kind == "paired"
    start = (2 * starts).repeat_interleave(2) if twice else starts
    rotary = rotary_tables(frequencies, (1 + twice) * len(x))
    mask = train_gpt.first_visible_key(start, torch.tensor(window))
    begins = starts == torch.arange(len(x))
    ours = layer(x, value, begins, rotary, torch.tensor(0.3), mask, None)
    theirs = slow_model.attention(p, number, x.double(), None if value is None else value.double(), hp.num_heads,
                                  starts.tolist(), {"short": window, "long": window}, frequencies.double(), 0.3)
    return ours.double(), theirs


@pytest.mark.parametrize("kind, number", [("paired", 0), ("long", 3), ("short", 4)])
@pytest.mark.parametrize("num_heads", [2, 4, 6])
def test_attention_by_loops(recipe, kind, number, num_heads):
    hp = replace(recipe, num_heads=num_heads, model_dim=16 * num_heads)
    torch.manual_seed(num_heads)
    layer, p = layer_of(hp, kind)
    tokens, x = random_documents(30, seed=1, rarity=8), torch.randn(30, hp.model_dim)
    with torch.no_grad():
        ours, theirs = both(hp, kind, layer, p, number, x, tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_gated_value_embeddings_by_loops(recipe):
    layer, p = layer_of(recipe, "short", value_table=0)
    tokens, x, value = random_documents(30, seed=1), torch.randn(30, 32), torch.randn(30, 32)
    with torch.no_grad():
        ours, theirs = both(recipe, "short", layer, p, 1, x, tokens, value)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        without, _ = both(recipe, "short", layer, p, 1, x, tokens, 0 * value)
        assert (ours - without).abs().max() > 0.1
        layer.value_gate.zero_()  # where training starts, a gate of 1
        layer.value_scale.zero_()
        layer.xsa_scale.zero_()
        alone, _ = both(recipe, "short", layer, p, 1, x, tokens, value, window=1)
        wanted = layer.proj((value.view(30, 2, 16) * torch.sigmoid(x[:, :12] @ layer.gate.T)[..., None]).flatten(1))
    torch.testing.assert_close(alone.float(), wanted, atol=1e-5, rtol=1e-5)  # with a window of 1: its own value


def test_a_value_of_zero_has_nothing_along_it(recipe):
    """XSA divides by its square: the output stays what it is, and its gradient a number."""
    layer, _ = layer_of(recipe, "short")
    layer.v.weight.data.zero_()
    x = torch.randn(6, 32, requires_grad=True)
    mask, rotary = train_gpt.first_visible_key(torch.zeros(6, dtype=torch.long), torch.tensor(9)), torch.ones(2, 6, 4)
    y = layer(x, None, torch.arange(6) == 0, rotary, torch.tensor(1.0), mask, None)
    y.sum().backward()
    assert not y.any() and x.grad.isfinite().all()


def test_the_first_of_a_pair_does_not_see_the_second(recipe):
    """Two heads of a pair at one token: the second one's key and value reach no first one there, but later ones."""
    layer, _ = layer_of(recipe, "paired")
    x, outputs = torch.randn(6, 32), []
    layer.proj.weight.data.copy_(torch.eye(32)[None])  # so that the output shows head by head
    start = torch.zeros(12, dtype=torch.long)
    mask, rotary = train_gpt.first_visible_key(start, torch.tensor(100)), rotary_tables(random_frequencies(16), 12)
    for change in (0.0, 1.0):
        with torch.no_grad():
            layer.qk.weight.data[1, 16:] += change  # the second head's keys and values
            layer.v.weight.data[0, 16:] += change
            outputs.append(layer(x, None, torch.arange(6) == 0, rotary, torch.tensor(1.0), mask, None).view(6, 2, 16))
    differs = (outputs[0] != outputs[1]).any(-1)
    assert not differs[0, 0] and differs[0, 1] and differs[1:].all()


def test_key_offset_moves_what_does_not_turn(recipe, monkeypatch):
    """Keys of long layers: the first half of a head from the token itself, the second from the one before; at a
    document's start its own; short layers: all from the token itself."""
    keys = {}
    for kind in ("long", "short"):
        def watch(q, k, v, *_):
            keys[kind] = k  # noqa: B023 (used within the turn)
            return v
        monkeypatch.setattr(train_gpt, "attention", watch)
        torch.manual_seed(0)
        layer, _ = layer_of(recipe, kind)
        begins = torch.zeros(20, dtype=torch.bool)
        begins[[0, 7, 8]] = True
        x = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
        layer(x, None, begins, rotary_tables(random_frequencies(16), 20), torch.tensor(1.0), None, None)
    plain, moved = keys["short"], keys["long"]
    assert torch.equal(moved[..., :8], plain[..., :8])
    for t in range(20):
        assert torch.equal(moved[t, :, 8:], plain[t if t in (0, 7, 8) else t - 1, :, 8:])
    assert not torch.equal(moved, plain)
