"""Any number of ranks computes the same gradients, weights, optimizer state and losses as one rank.

Here ranks are threads of this process, with collectives of their own; test_golden.py runs two real
processes.
"""
import dataclasses
import threading

import pytest
import small
import torch

import train_gpt
from data.shards import write_shard

CPU = torch.device("cpu")
VAL_TOKENS = 13 * 128  # 13 validation sequences: no number of ranks divides them
SMALLER = ["--sequence_length=128", "--val_length=128", "--ngram_rows=211", "--micro_batch=8"]
# Of the recipe six steps: two of each of the first three stages. The last two are untied, and Adam
# updates three times.
FLAGS = {
    "laptop": [*small.TINY, *SMALLER, "--num_steps=3", "--model_dim=24"],
    "recipe": [*small.RECIPE, *SMALLER, "--num_steps=8", "--extension=0.25"]}

# What a checkpoint says about its run; load_checkpoint reports differences.
INFO = dict.fromkeys(
    ["code_hash", "activations", "compiled", "torch", "device", "world_size"], "same")
INFO["run_id"] = "laptop-20260101-000000-aaaaaa"


class Handle:
    """The handle of a collective that is complete."""
    def wait(self):
        pass


class ThreadRanks:
    """W ranks as threads, and the collectives that train_gpt calls. Sums are made in the order of
    the ranks, in the dtype of what is sent."""
    def __init__(self, world_size, monkeypatch):
        self.world_size = world_size
        self.local = threading.local()
        self.barrier = threading.Barrier(world_size, timeout=300)
        self.sent = [None] * world_size
        self.build_model = train_gpt.build_model
        self.building = threading.Lock()  # all threads share one random generator
        monkeypatch.setattr(train_gpt, "build_model", self.build_one_model)
        monkeypatch.setattr(train_gpt, "_reduce_scatter", self.reduce_scatter)
        monkeypatch.setattr(train_gpt, "_all_gather", self.all_gather)
        monkeypatch.setattr(train_gpt.dist, "all_reduce", self.all_reduce)

    def build_one_model(self, *args, **kwargs):
        with self.building:
            return self.build_model(*args, **kwargs)

    def exchange(self, tensor):
        """What each rank sends, in a list."""
        self.sent[self.local.rank] = tensor.clone()
        self.barrier.wait()
        received = list(self.sent)
        self.barrier.wait()
        return received

    def reduce_scatter(self, out, data, op, async_op):
        assert op == torch.distributed.ReduceOp.SUM
        total = sum(self.exchange(data))
        out.copy_(total.chunk(self.world_size)[self.local.rank])
        return Handle()

    def all_gather(self, out, data, async_op):
        out.copy_(torch.cat(self.exchange(data)))
        return Handle()

    def all_reduce(self, tensor):
        tensor.copy_(sum(self.exchange(tensor)))

    def run(self, function):
        """The results of function(rank), one per rank. Raises what one of them raised."""
        results = [None] * self.world_size
        errors = []

        def work(rank):
            self.local.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


@pytest.fixture
def setup(request, tmp_path, monkeypatch):
    """setup(tables, batch_size) -> the hyperparameters of a run on the shard of this test."""
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    track = dataclasses.replace(
        train_gpt.TRACKS["laptop"], val_tokens=VAL_TOKENS, train_files="x_*.bin")
    monkeypatch.setitem(train_gpt.TRACKS, "laptop", track)

    def setup(tables, batch_size):
        if tables == "recipe":
            request.getfixturevalue("recipe")  # its LAYERS and STAGES
        write_shard(tmp_path / "x_000001.bin", small.words(16_000, seed=1))
        hp = train_gpt.parse_arguments([*FLAGS[tables], f"--batch_size={batch_size}"])
        return hp

    return setup


def gradients_of_first_step(model, optimizer, stream, hp, runtime):
    """The gradients of step 0, summed over the ranks, by bucket."""
    loader = train_gpt.BatchLoader(stream, hp, runtime)
    schedule = train_gpt.Schedule(0, hp, CPU)
    for tokens, targets in loader.next():
        objective, _ = model(tokens, targets, schedule)
        objective.backward()
    loader.close()
    gradients = []
    for bucket in optimizer.buckets:
        if all(p.grad is None for p in bucket.params):
            gradients.append(torch.zeros(1))
            continue
        bucket.reduce_scatter_grads()
        local, _, _ = bucket.local_grad_and_state()
        full = bucket.all_gather(local)
        bucket.wait()
        gradients.append(full[:bucket.num_rows].clone())
    return gradients


def train_some(hp, rank=0, world_size=1, comm_dtype=torch.float32, save_at=None):
    """All that a rank knows after the scheduled steps, in a dictionary. hp.resume names the
    checkpoint to begin with. save_at: end at this step, with a checkpoint."""
    runtime = train_gpt.Runtime(rank, world_size, CPU)
    stream = train_gpt.TokenStream("x_*.bin", train_gpt.TRACKS["laptop"], 1)
    model = train_gpt.build_model(hp, CPU, torch.float32, flex=False)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # away from zero, where most gradients vanish
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    optimizer = train_gpt.Optimizer(model, hp, comm_dtype, rank, world_size)
    gradients = gradients_of_first_step(model, optimizer, stream, hp, runtime)
    progress = train_gpt.load_checkpoint(model, optimizer, hp, INFO)

    loader = train_gpt.BatchLoader(stream, hp, runtime, progress.step)
    losses = []
    for step in range(progress.step, hp.scheduled_steps):
        if step == save_at:
            progress.step = step
            train_gpt.save_checkpoint(progress, model, optimizer, hp, runtime, INFO)
            loader.close()
            return None
        schedule = train_gpt.Schedule(step, hp, CPU)
        if schedule.unties:
            optimizer.untie()
        loss = train_gpt.training_step(model, optimizer, loader.next(), schedule)
        (loss_sum,) = runtime.sum(loss)
        losses.append(loss_sum / world_size)
    loader.close()
    state = optimizer.state_dict()
    optimizer.use_averages()
    final = train_gpt.Schedule(hp.num_steps, hp, CPU)
    return {
        "gradients": gradients,
        "losses": losses,
        "val_loss": train_gpt.validate(model, stream, final, hp, runtime),
        "optimizer": state,
        "model": {name: p.detach() for name, p in model.named_parameters()}}


def assert_alike(a, b, path=""):
    """Two nested results are equal up to the rounding of sums that are made in another order."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_alike(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_alike(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        # Polar Express magnifies the rounding, hence a relative bound on the norm.
        assert (a - b).norm() <= 5e-4 * b.norm() + 1e-7, path
    else:
        assert a == pytest.approx(b, abs=1e-4), path


def assert_ranks_are_equal(results):
    """All ranks hold the same weights, bit for bit."""
    for result in results:
        for name, value in result["model"].items():
            assert torch.equal(value, results[0]["model"][name]), name


@pytest.mark.parametrize("tables, world_size, batch_size", [
    ("laptop", 3, 6), ("recipe", 8, 8), pytest.param("recipe", 2, 8, marks=pytest.mark.slow)])
def test_any_number_of_ranks_is_one(setup, monkeypatch, tables, world_size, batch_size):
    """Through three stages and the untying. 3 ranks do not divide the rows of most buckets."""
    hp = setup(tables, batch_size)
    alone = train_some(hp)
    with monkeypatch.context() as patch:
        ranks = ThreadRanks(world_size, patch)
        results = ranks.run(lambda rank: train_some(hp, rank, world_size))
    for result in results:
        assert_alike(result, alone)
    assert_ranks_are_equal(results)

    # While head and embedding are tied, the embedding has no gradient; later its values differ.
    without_gradient = sum(not gradient.any() for gradient in alone["gradients"])
    assert without_gradient == (tables == "recipe")
    if tables == "recipe":
        weights = alone["model"]
        assert not torch.equal(weights["embed.weight"], weights["head.linear.weight"][0])
        assert alone["optimizer"]["num_averages"] == 1  # after 4 steps


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_another_number_of_ranks_resumes(setup, monkeypatch, before, after):
    """From a checkpoint in the middle of the second stage, before the untying, that another number
    of ranks has saved. The averages of the weights are updated after 4 and 8 steps."""
    hp = dataclasses.replace(setup("recipe", 2), num_steps=12, average_tail=1.0)
    hp.folder.mkdir(parents=True)
    alone = train_some(hp)
    with monkeypatch.context() as patch:
        ranks = ThreadRanks(before, patch)
        ranks.run(lambda rank: train_some(hp, rank, before, save_at=4))
    (path,) = hp.folder.glob("*.pt")
    hp = dataclasses.replace(hp, resume=str(path))
    with monkeypatch.context() as patch:
        ranks = ThreadRanks(after, patch)
        results = ranks.run(lambda rank: train_some(hp, rank, after))
    for result in results:
        assert result["losses"] == pytest.approx(alone["losses"][4:], abs=1e-4)
        assert_alike(result["model"], alone["model"])
        assert_alike(result["optimizer"], alone["optimizer"])


def test_rounded_weights_reach_all_ranks(setup, monkeypatch):
    """Weights in bfloat16, of which each rank has its rows in float32, are equal on all ranks, and
    the losses are close to those of one rank and to those in float32."""
    hp = setup("recipe", 2)
    exact = train_some(hp)
    alone = train_some(hp, comm_dtype=torch.bfloat16)
    with monkeypatch.context() as patch:
        ranks = ThreadRanks(2, patch)
        results = ranks.run(lambda rank: train_some(hp, rank, 2, torch.bfloat16))
    assert_ranks_are_equal(results)
    assert results[0]["model"]["blocks.0.mlp.fc.weight"].dtype == torch.bfloat16
    assert results[0]["model"]["head.linear.weight"].dtype == torch.bfloat16
    for other in (alone, exact):
        assert results[0]["losses"] == pytest.approx(other["losses"], abs=0.02)
        assert results[0]["val_loss"] == pytest.approx(other["val_loss"], abs=0.02)


@pytest.mark.parametrize("cores, processes, threads", [(6, 1, 6), (6, 2, 3), (64, 1, 8), (2, 4, 1)])
def test_processes_of_one_node_share_its_cores(monkeypatch, cores, processes, threads):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    affinity = set(range(cores))
    monkeypatch.setattr(train_gpt.os, "sched_getaffinity", lambda pid: affinity, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    train_gpt.set_threads()
    assert chosen == []  # OMP_NUM_THREADS is set
    monkeypatch.delenv("OMP_NUM_THREADS")
    train_gpt.set_threads()
    assert chosen == [threads]
