"""Bytes that one of 8 ranks sends a step at full size, counted from the collectives that the scripts call.

`PYTHONPATH=.:tests python tests/test_traffic.py` prints them. A ring sends (W - 1) / W of
the data for a reduce-scatter or an all-gather, and twice that for an all-reduce.
"""

import pytest
import torch
import torch.distributed as dist
from test_records import VALUE, load
from torch.nn.parallel import DistributedDataParallel

import train_gpt

META = torch.device("meta")
HOW_OFTEN = {"reduce_scatter": 1, "all_gather": 1, "all_reduce": 2}


class Meter:
    """In place of the collectives: counts what they would send."""

    def __init__(self, ranks: int):
        self.ranks = ranks
        self.calls: list[tuple[str, float]] = []

    def count(self, name, data, given=None):
        for tensor in (data, given if given is not None else data):
            assert tensor.is_contiguous(), "NCCL refuses what is transposed; gloo does not"
        self.calls.append((name, HOW_OFTEN[name] * (1 - 1 / self.ranks) * data.numel() * data.element_size()))
        return self

    def wait(self):
        pass

    def total(self) -> float:
        return sum(sent for _, sent in self.calls)


def sent_by_train_gpt(monkeypatch, ranks=8, step=0):
    """Two optimizer steps, Muon's and one with Adam, with the checks after them, at rank 0: (meters, model)."""
    dtype, hp, meters = torch.bfloat16, train_gpt.parse_arguments(["--track=fineweb"]), []
    model = train_gpt.build_model(hp, META, dtype, flex=False)
    optimizer, schedule = train_gpt.Optimizer(model, hp, dtype, 0, ranks), train_gpt.Schedule(step, hp, META)
    for _ in range(hp.adam_every):
        meters.append(meter := Meter(ranks))
        for name, data in (("_reduce_scatter", lambda out, data, **_: meter.count("reduce_scatter", data)),  # noqa: B023
                           ("_all_gather", lambda out, data, **_: meter.count("all_gather", out, data))):  # noqa: B023
            monkeypatch.setattr(train_gpt, name, data)
        monkeypatch.setattr(dist, "all_reduce", lambda data, **_: meter.count("all_reduce", data))  # noqa: B023
        for p in model.parameters():
            if not (schedule.tied and p is model.embed.weight):
                p.grad = torch.empty_like(p)
        optimizer.step(schedule)
        train_gpt.Watch(train_gpt.Runtime(0, ranks, torch.device("cpu"))).post(0, torch.zeros(()))
    return meters, model


def sent_by_value_embed(monkeypatch, ranks=8):
    """DistributedDataParallel's one all-reduce of each gradient, then what the optimizers send."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    module, meter = load(VALUE), Meter(ranks)
    hp = module.parse_arguments(["--track=fineweb"])
    model = module.build_model(hp, META, torch.bfloat16, False)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
        meter.count("all_reduce", p.grad)
    monkeypatch.setattr(dist, "all_reduce", lambda data, **_: meter.count("all_reduce", data))
    muon = module.build_optimizers(model, hp, torch.bfloat16)[-1]
    before = len(meter.calls)
    muon.step()
    assert len(meter.calls) == before + 1  # Adam sends nothing
    return meter


@pytest.mark.parametrize("step", [0, 1000])  # tied and untied
def test_less_than_four_tenths_of_value_embeds_bytes(monkeypatch, step):
    """Though the model has twice as many parameters, nearly all in tables: Adam steps in every second step."""
    with monkeypatch.context() as patch:
        (without_adam, with_adam), model = sent_by_train_gpt(patch, step=step)
    with monkeypatch.context() as patch:
        theirs = sent_by_value_embed(patch)
    ours = (without_adam.total() + with_adam.total()) / 2
    assert ours <= 0.4 * theirs.total(), (ours / 1e6, theirs.total() / 1e6)
    # Each gradient and each change once, two bytes each. Padded for 8 ranks are only the matrices: 60 of Q and K to 64,
    # 20 of V and the projection to 24, 22 of MLPs to 24.
    sizes = {name: p.numel() * 4 * 7 / 8 for name, p in model.named_parameters()}
    matrices = sum(size for name, size in sizes.items() if name.startswith("blocks.") and name.endswith(".weight"))
    assert matrices < without_adam.total() < 1.11 * matrices
    everything = sum(sizes.values()) - (step == 0) * sizes["embed.weight"]
    assert everything < with_adam.total() < 1.02 * everything
    assert theirs.total() == pytest.approx(2.92e9, rel=0.01)


def test_few_messages_a_step(monkeypatch):
    """Small parameters travel together: Muon's three shapes, the tables, the head, and a few for all numbers."""
    (without_adam, with_adam), _ = sent_by_train_gpt(monkeypatch)
    assert [len(meter.calls) for meter in (without_adam, with_adam)] == [2 * 3 + 1, 2 * 8 + 1]


def test_one_rank_sends_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a collective on one rank")
    for name in ("_reduce_scatter", "_all_gather"):
        monkeypatch.setattr(train_gpt, name, refuse)
    hp = train_gpt.parse_arguments(["--track=fineweb", "--model_dim=48"])
    model = train_gpt.build_model(hp, META, torch.bfloat16, flex=False)
    optimizer = train_gpt.Optimizer(model, hp, torch.bfloat16)
    for step in range(2):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step(train_gpt.Schedule(step, hp, META))
    assert all(p.grad is None for p in model.parameters())  # so each bucket has stepped


def test_ddp_sends_each_gradient_once(monkeypatch):
    """What sent_by_value_embed counts is what DistributedDataParallel hands over, in a real backward of ValueEmbed."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    module = load(VALUE)
    hp = module.parse_arguments(["--track=laptop", "--num_layers=2", "--num_heads=2", "--model_dim=32"])
    model = module.build_model(hp, torch.device("cpu"), torch.float32, False)
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        handed_over = []

        def hook(state, bucket):
            handed_over.append(bucket.buffer().numel() * bucket.buffer().element_size())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, hook)
        tokens = torch.randint(256, (1, 128))
        wrapped(tokens, tokens, torch.tensor(64)).backward()
    finally:
        dist.destroy_process_group()
    assert sum(handed_over) == sum(p.numel() * p.element_size() for p in model.parameters())


def sent(ranks: int) -> list[float]:
    """[ValueEmbed's, train_gpt.py's] bytes; of the latter the mean of a step without Adam and one with it."""
    with pytest.MonkeyPatch.context() as patch:
        theirs = sent_by_value_embed(patch, ranks).total()
    with pytest.MonkeyPatch.context() as patch:
        ours = sent_by_train_gpt(patch, ranks)[0]
    return [theirs, sum(meter.total() for meter in ours) / len(ours)]


if __name__ == "__main__":
    theirs, ours = sent(8)
    print(f"sent a step and rank at 8 ranks: {ours / 1e6:.0f} MB; ValueEmbed {theirs / 1e6:.0f} MB; "
          f"{ours / theirs:.3f} of it")
