"""The attention mask, and FlexAttention's block lists, against the rule evaluated pair by pair."""
import pytest
import torch
from reference import model as reference_model
from reference.mask import EOT, random_tokens, rule

import train_gpt
from train_gpt import Schedule, block_lists, block_mask, build_model, document_start, visible

CPU = torch.device("cpu")


def first_visible_key(tokens: torch.Tensor, window: int) -> torch.Tensor:
    """train_gpt's for sequences (S, T)."""
    start = document_start(tokens, EOT)
    return train_gpt.first_visible_key(start, torch.tensor(window))


def dense_mask(first_key: torch.Tensor, strict: bool = False) -> torch.Tensor:
    """train_gpt's mask (N, N) from first_visible_key's (N,)."""
    position = torch.arange(len(first_key))
    return visible(position[:, None], position[None, :], first_key[:, None], strict)


@pytest.mark.parametrize("T", [1, 130, 256])
@pytest.mark.parametrize("window", [0, 1, 64, 1000])
def test_the_mask_agrees_with_the_rule(T, window):
    tokens = random_tokens(T, seed=T)
    mask = dense_mask(first_visible_key(tokens[None], window))
    assert torch.equal(mask, rule(tokens, window))


def test_sequences_of_a_batch_do_not_see_each_other():
    tokens = random_tokens(96, seed=3).view(3, 32)
    together = first_visible_key(tokens, 20).view(3, 32)
    for row in range(3):
        alone = first_visible_key(tokens[row:row + 1], 20)
        assert torch.equal(together[row] - 32 * row, alone)


def listed(blocks, name: str) -> torch.Tensor:
    """How often each of 8 x 8 blocks occurs in one of a BlockMask's lists."""
    count = getattr(blocks, f"{name}_num_blocks")
    indices = getattr(blocks, f"{name}_indices")
    assert count.shape == (1, 1, 8) and count.dtype == torch.int32
    assert indices.shape == (1, 1, 8, 8) and indices.dtype == torch.int32
    assert indices.is_contiguous()
    assert 0 <= indices.min() and indices.max() < 8
    dense = torch.zeros(8, 8, dtype=torch.int)
    for row in range(8):
        for column in indices[0, 0, row, :count[0, 0, row]].tolist():
            dense[row, column] += 1
    return dense


@pytest.mark.parametrize("window", [64, 200, 1000])
@pytest.mark.parametrize("mean_length", [100, 300, 10**6])  # the last one: a single document
def test_block_lists_hold_each_block_once(window, mean_length):
    """A block is in the list of full blocks if all of it is visible, and in the list of partial
    blocks if only a part is. This holds for the key blocks of each query block, which the forward
    pass reads, and for the query blocks of each key block, which the backward pass reads."""
    tokens = random_tokens(1024, seed=0, mean_length=mean_length)
    first_key = first_visible_key(tokens[None], window)
    blocks = block_mask(first_key, block_lists(first_key))
    mask = dense_mask(first_key).view(8, 128, 8, 128).transpose(1, 2).flatten(2)
    full = mask.all(-1)
    partial = mask.any(-1) & ~full
    assert torch.equal(listed(blocks, "kv"), partial.int())
    assert torch.equal(listed(blocks, "full_kv"), full.int())
    assert torch.equal(listed(blocks, "q"), partial.T.int())
    assert torch.equal(listed(blocks, "full_q"), full.T.int())


def test_a_window_of_three_blocks_needs_four_blocks_of_keys():
    """The first query of a block sees window + 1 keys, the last of them the first key of the block
    three blocks before. So an inclusive window computes no more blocks than an exclusive one."""
    tokens = random_tokens(1024, seed=0, mean_length=10**6)
    first_key = first_visible_key(tokens[None], 384)
    blocks = block_mask(first_key, block_lists(first_key))
    count = listed(blocks, "kv").sum(-1) + listed(blocks, "full_kv").sum(-1)
    assert count.tolist() == [1, 2, 3, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("kind, window", [
    ("short", 128), ("long", 384), ("paired", 128), ("pointer", 384)])
def test_the_models_masks_agree_with_the_rule_for_both_kernels(recipe, kind, window):
    """Two sequences. Paired heads have two positions per token, and their window counts
    positions."""
    tokens = random_tokens(512, seed=3, mean_length=150).view(2, 256)
    tokens[:, 0] = EOT  # the rule, as it is written here, knows only one sequence
    if kind == "paired":
        starts = reference_model.document_starts(tokens.flatten().tolist(), EOT)
        expected = torch.tensor([[k <= q and q - k <= window and starts[k // 2] == starts[q // 2]
                                  for k in range(1024)] for q in range(1024)])
    else:
        expected = rule(tokens.flatten(), window)
    if kind == "pointer":  # no token points to itself
        expected = expected & ~torch.eye(512, dtype=torch.bool)
    schedule = Schedule(0, recipe, CPU)
    schedule.windows = {"long": torch.tensor(384), "short": torch.tensor(128),
                        "paired": torch.tensor(128), "pointer": torch.tensor(384)}
    start = document_start(tokens, EOT)
    model = build_model(recipe, torch.device("meta"), torch.float32, flex=False)
    dense = dense_mask(model.masks(start, schedule)[kind], strict=kind == "pointer")
    assert torch.equal(dense, expected)

    model.flex = True
    blocks = model.masks(start, schedule)[kind]
    position = torch.arange(len(expected))
    assert torch.equal(blocks.mask_mod(0, 0, position[:, None], position), expected)
    n = len(expected) // 128
    per_block = expected.view(n, 128, n, 128).transpose(1, 2).flatten(2)
    num_full = blocks.full_kv_num_blocks[0, 0].long()
    num_partial = blocks.kv_num_blocks[0, 0].long()
    assert torch.equal(num_full, per_block.all(-1).sum(-1))
    assert torch.equal(num_full + num_partial, per_block.any(-1).sum(-1))
