"""How many bytes and messages the optimizer sends between ranks, counted at full size without
data."""
from dataclasses import replace

import pytest
import torch

import train_gpt
from train_gpt import Hyperparameters, Optimizer, Schedule, build_model

META = torch.device("meta")
WORLD_SIZE = 8
MATRIX_SHAPES = 4  # wide Q and K, narrow ones, V and the output, the MLP: a bucket for each


class Counter:
    """Stands in for train_gpt's two collectives and counts what they would send."""

    def __init__(self):
        self.bytes = []  # of each call, sent by one rank in a ring

    def count(self, full, *others, **_):
        """full: the tensor with all ranks' rows, of which a rank sends all but its own."""
        for tensor in (full, *others):
            assert tensor.is_contiguous()  # NCCL requires it, gloo does not
        self.bytes.append((1 - 1 / WORLD_SIZE) * full.numel() * full.element_size())
        return self

    def wait(self):
        pass

    def install(self, monkeypatch):
        monkeypatch.setattr(train_gpt, "_reduce_scatter",
                            lambda local, full, **_: self.count(full, local))
        monkeypatch.setattr(train_gpt, "_all_gather",
                            lambda full, local, **_: self.count(full, local))


def count_two_steps(monkeypatch, step):
    """Rank 0's first two updates with the schedule of a step: (Counter of the update without Adam,
    Counter of the update with Adam, model)."""
    hp = Hyperparameters()
    model = build_model(hp, META, torch.bfloat16, flex=False)
    optimizer = Optimizer(model, hp, torch.bfloat16, rank=0, world_size=WORLD_SIZE)
    schedule = Schedule(step, hp, META)
    counters = []
    for _ in range(2):
        counters.append(Counter())
        counters[-1].install(monkeypatch)
        for p in model.parameters():
            if not (schedule.tied and p is model.embed.weight):
                p.grad = torch.empty_like(p)
        optimizer.step(schedule)
    return *counters, model


@pytest.mark.parametrize("step, tied", [(0, True), (1000, False)])
def test_each_gradient_and_each_new_weight_is_sent_once_in_bfloat16(monkeypatch, step, tied):
    """Muon's matrices in every step, everything else in every second. Only matrices are padded: 12
    of wide Q and K to 16, 20 of V and the output to 24, 22 of the MLPs to 24."""
    without_adam, with_adam, model = count_two_steps(monkeypatch, step)
    sent_twice = 2 * 2 * (1 - 1 / WORLD_SIZE)  # gradient and weight, 2 bytes each
    matrices = 0
    everything = 0
    for name, p in model.named_parameters():
        if not (tied and name == "embed.weight"):
            everything += sent_twice * p.numel()
        if name.startswith("blocks.") and name.endswith(".weight"):
            matrices += sent_twice * p.numel()
    assert matrices < sum(without_adam.bytes) < 1.12 * matrices
    assert everything < sum(with_adam.bytes) < 1.02 * everything


def test_small_parameters_share_their_messages(monkeypatch):
    """A step with Adam has two messages each for Muon's four shapes, the value and n-gram tables,
    the head, and three buckets of scalars and gates."""
    without_adam, with_adam, _ = count_two_steps(monkeypatch, step=0)
    assert len(without_adam.bytes) == 2 * MATRIX_SHAPES
    assert len(with_adam.bytes) == 2 * (MATRIX_SHAPES + 3 + 3)


def test_one_rank_sends_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a collective on one rank")

    monkeypatch.setattr(train_gpt, "_reduce_scatter", refuse)
    monkeypatch.setattr(train_gpt, "_all_gather", refuse)
    hp = replace(Hyperparameters(), model_dim=48)
    model = build_model(hp, META, torch.bfloat16, flex=False)
    optimizer = Optimizer(model, hp, torch.bfloat16)
    for step in range(2):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step(Schedule(step, hp, META))
    assert all(p.grad is None for p in model.parameters())  # so every bucket was updated
