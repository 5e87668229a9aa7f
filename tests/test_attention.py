"""The mask against brute force, both kernels against a plain softmax, rotary against its definition."""
import math

import pytest
import torch

import train_gpt
from train_gpt import attention, block_mask, chunked_attention, document_start, rotary_tables, rotate, visible

EOT = 9


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
    scores = (q.double() @ k.double().mT / math.sqrt(q.size(-1))).masked_fill(~mask, -math.inf)
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
@pytest.mark.parametrize("seed", range(3))
def test_block_mask_finds_each_block(window, seed):
    """A block is in the list of whole ones iff all of it is visible, in the list of partial ones if only some is."""
    tokens = random_documents(1024, seed, rarity=300)
    mask = full_mask(tokens, window).view(8, 128, 8, 128).transpose(1, 2)
    blocks = block_mask(first_visible_key(tokens[None], EOT, torch.tensor(window)))

    def listed(count, which):
        dense = torch.zeros(8, 8, dtype=torch.bool)
        for row in range(8):
            dense[row, which[0, 0, row, :count[0, 0, row]].long()] = True
        return dense

    partial = listed(blocks.kv_num_blocks, blocks.kv_indices)
    whole = listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    some, every = mask.flatten(2).any(-1), mask.flatten(2).all(-1)
    assert torch.equal(whole, every) and torch.equal(partial, some & ~every)


@pytest.mark.parametrize("window", [64, 300])
def test_flex_attention_sees_the_same(window):
    torch.manual_seed(0)
    tokens = random_documents(512, seed=5)
    q, k, v = (torch.randn(1, 2, 512, 16) for _ in range(3))
    mask = block_mask(first_visible_key(tokens[None], EOT, torch.tensor(window)))
    with torch.no_grad():  # FlexAttention has no backward on the CPU
        y = attention(q, k, v, mask, max_window=512)
    expected = plain_attention(q, k, v, brute_force_mask(tokens.tolist(), window))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)


def test_rotation_sees_only_the_distance():
    rotary = rotary_tables(64, 16)
    q, k = torch.randn(16), torch.randn(16)
    turned = [rotate(x.expand(64, 1, 16), rotary)[:, 0] for x in (q, k)]
    products = turned[0] @ turned[1].T
    for distance in (0, 1, 13):
        along = products.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned[0].norm(dim=-1), q.norm().expand(64), atol=1e-4, rtol=1e-4)


def test_rotation_by_its_definition():
    """Position p turns the pair (x[i], x[i + d/2]) by p * 10000^(-2i/d) as a complex number."""
    rotary = rotary_tables(10, 8)
    x = torch.randn(10, 2, 8)
    angle = torch.arange(10)[:, None] * 10_000 ** (-torch.arange(4) / 4)
    turned = torch.view_as_complex(torch.stack([x[..., :4], x[..., 4:]], -1)) * torch.exp(-1j * angle)[:, None]
    torch.testing.assert_close(rotate(x, rotary), torch.cat([turned.real, turned.imag], -1).float())
