"""Any number of ranks computes the same: gradients, weights, optimizer state, losses; through torchrun and gloo."""
import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, words
from ranks_worker import gradients_and_steps

import train_gpt
from data.shards import write_shard


def assert_alike(a, b, path=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_alike(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_alike(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        # Newton-Schulz magnifies the rounding of a sum in another order, hence not to the last bit
        assert (a - b).norm() <= 2e-4 * b.norm() + 1e-7, path
    else:
        assert a == pytest.approx(b, abs=1e-4), path


@pytest.mark.parametrize("world_size, batch_size", [(2, 6), (3, 6), (8, 8)])
def test_ranks_agree(tmp_path, monkeypatch, world_size, batch_size):
    tracks = {**train_gpt.TRACKS, "laptop": dataclasses.replace(train_gpt.TRACKS["laptop"], val_tokens=13 * 128)}
    monkeypatch.setattr(train_gpt, "TRACKS", tracks)  # 13 sequences: no number of ranks divides them
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    source = (REPOSITORY / "train_gpt.py").read_text().replace("262_144", str(13 * 128))
    (tmp_path / "train_gpt.py").write_text(source)
    (tmp_path / "batch_size").write_text(str(batch_size))
    write_shard(tmp_path / "x_000001.bin", words(4000, seed=1))
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    done = subprocess.run([*torchrun, str(REPOSITORY / "tests/ranks_worker.py"), str(tmp_path)],
                          env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    threads = torch.get_num_threads()
    alone = gradients_and_steps(tmp_path, 0, 1)
    torch.set_num_threads(threads)
    assert_alike(torch.load(tmp_path / "result.pt"), alone)
    assert all(g.any() for g in alone["gradients"])
