"""Any number of ranks computes the same: gradients, weights, optimizer state, losses.

Through torchrun and gloo; where that takes too long, ranks are threads of this process with collectives of their own.
"""
import dataclasses
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import RECIPE, REPOSITORY, TINY, with_recipe, with_val_tokens, words
from ranks_worker import gradients_and_steps

import train_gpt
from data.shards import write_shard

VAL_TOKENS = 13 * 128  # 13 sequences: no number of ranks divides them
SMALLER = "--sequence_length=128 --val_length=128 --ngram_rows=211 --micro_batch=8".split()
# Of the recipe six steps: two of each of the first three stages, so the last two are untied; Adam steps three times.
FLAGS = {"laptop": [*TINY, *SMALLER, "--num_steps=3", "--model_dim=24"],
         "recipe": [*RECIPE, *SMALLER, "--num_steps=8", "--extension_steps=2"]}


def assert_alike(a, b, path=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_alike(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_alike(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        # Polar Express magnifies the rounding of a sum in another order, hence not to the last bit
        assert (a - b).norm() <= 5e-4 * b.norm() + 1e-7, (path, (a - b).norm() / b.norm())
    else:
        assert a == pytest.approx(b, abs=1e-4), path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """prepare(tables, batch_size): a folder for ranks_worker; the tracks of this process are as there."""
    tracks = {**train_gpt.TRACKS, "laptop": dataclasses.replace(train_gpt.TRACKS["laptop"], val_tokens=VAL_TOKENS)}
    monkeypatch.setattr(train_gpt, "TRACKS", tracks)
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    threads = torch.get_num_threads()

    def prepare(tables, batch_size):
        flags = ["--track=laptop", *FLAGS[tables], f"--batch_size={batch_size}"]
        (tmp_path / "flags.json").write_text(json.dumps(flags))
        write_shard(tmp_path / "x_000001.bin", words(4000 if tables == "laptop" else 16_000, seed=1))
        source = with_val_tokens((REPOSITORY / "train_gpt.py").read_text(), VAL_TOKENS)
        (tmp_path / "train_gpt.py").write_text(with_recipe(source) if tables == "recipe" else source)
        return tmp_path

    yield prepare
    torch.set_num_threads(threads)


def assert_worth_comparing(alone, tables):
    without = sum(not gradient.any() for gradient in alone["gradients"])
    assert without == (tables == "recipe")  # there the embedding is the head at step 0, and has none of its own
    if tables == "recipe":
        weights = alone["model"]
        assert not torch.equal(weights["embed.weight"], weights["head.linear.weight"][0])


@pytest.mark.parametrize("tables, world_size, batch_size", [("laptop", 3, 6), ("recipe", 2, 2)])
def test_processes_agree(request, folder, tables, world_size, batch_size):
    if tables == "recipe":
        request.getfixturevalue("recipe")
    root = folder(tables, batch_size)
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    done = subprocess.run([*torchrun, str(REPOSITORY / "tests/ranks_worker.py"), str(root)],
                          env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = gradients_and_steps(root, 0, 1)
    assert_alike(torch.load(root / "result.pt"), alone)
    assert_worth_comparing(alone, tables)


class Threads:
    """W ranks as threads; the collectives that train_gpt calls, in float32 and in the order of the ranks."""

    def __init__(self, world_size, monkeypatch):
        self.world_size, self.rank = world_size, threading.local()
        self.barrier, self.given = threading.Barrier(world_size, timeout=60), [None] * world_size
        build, one = train_gpt.build_model, threading.Lock()  # for the seeded generator is the process's

        def build_model(*args, **kwargs):
            with one:
                return build(*args, **kwargs)

        monkeypatch.setattr(train_gpt, "build_model", build_model)
        monkeypatch.setattr(train_gpt, "_reduce_scatter", self.reduce_scatter)
        monkeypatch.setattr(train_gpt, "_all_gather", self.all_gather)
        monkeypatch.setattr(train_gpt.dist, "all_reduce", self.all_reduce)

    def exchange(self, tensor):
        """What each rank gave, in a list."""
        self.given[self.rank.number] = tensor.clone()
        self.barrier.wait()
        everything = list(self.given)
        self.barrier.wait()
        return everything

    def wait(self):
        """As of a collective's handle: nothing is under way."""

    def reduce_scatter(self, out, data, op, async_op):
        assert op == torch.distributed.ReduceOp.SUM
        out.copy_(sum(self.exchange(data)).chunk(self.world_size)[self.rank.number])
        return self

    def all_gather(self, out, data, async_op):
        out.copy_(torch.cat(self.exchange(data)))
        return self

    def all_reduce(self, tensor, op):
        total = sum(self.exchange(tensor))
        tensor.copy_(total / self.world_size if op == torch.distributed.ReduceOp.AVG else total)

    def run(self, function):
        """function(rank) on each; the results. Raises what one of them raised."""
        results, errors = [None] * self.world_size, []

        def work(rank):
            self.rank.number = rank
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


def test_eight_ranks_are_one_through_stages_and_untying(recipe, folder, monkeypatch):
    root, world_size = folder("recipe", 8), 8
    alone = gradients_and_steps(root, 0, 1)
    with monkeypatch.context() as patch:
        ranks = Threads(world_size, patch).run(lambda rank: gradients_and_steps(root, rank, world_size))
    for one in ranks:
        assert_alike(one, alone)
        assert all(torch.equal(one["model"][name], ranks[0]["model"][name]) for name in alone["model"])
    assert_worth_comparing(alone, "recipe")


def test_rounded_steps_reach_all_ranks(recipe, folder, monkeypatch):
    """Float32 weights whose steps travel in bfloat16: the ranks stay equal, with one rank's losses."""
    root, world_size = folder("recipe", 2), 2
    alone = gradients_and_steps(root, 0, 1, torch.bfloat16)
    with monkeypatch.context() as patch:
        ranks = Threads(world_size, patch).run(
            lambda rank: gradients_and_steps(root, rank, world_size, torch.bfloat16))
    for name in alone["model"]:
        assert torch.equal(ranks[0]["model"][name], ranks[1]["model"][name]), name
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], abs=0.02)
    assert ranks[0]["val_loss"] == pytest.approx(alone["val_loss"], abs=0.02)
