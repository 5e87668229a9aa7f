"""Shards as the trainer reads them: every token once, the same batch for any number of ranks, bad files refused."""
import numpy as np
import pytest
import torch

import train_gpt
from data.shards import write_shard
from train_gpt import BatchLoader, Hyperparameters, Runtime, TokenStream, UserError, open_shard


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Three shards that count on: 0 to 999, 1000 to 1006, 1007 to 1999."""
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    for number, (start, end) in enumerate([(0, 1000), (1000, 1007), (1007, 2000)], 1):
        write_shard(tmp_path / f"x_{number:06d}.bin", np.arange(start, end))
    return tmp_path


def stream(**kwargs):
    return TokenStream(**{"pattern": "x_*.bin", "vocab_size": 2000, "minimum": 1, "get_data": "make data", **kwargs})


def runtime(rank=0, world_size=1):
    return Runtime(rank, world_size, torch.device("cpu"))


@pytest.mark.parametrize("start, count", [(0, 2000), (990, 30), (1999, 2), (1003, 1), (5000, 4321), (0, 0 + 1)])
def test_stream_is_the_shards_without_end(shards, start, count):
    assert np.array_equal(stream().read(start, count), np.arange(start, start + count) % 2000)


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@pytest.mark.parametrize("track", ["fineweb", "laptop"])
def test_batches_cover_the_stream_once(shards, world_size, micro_batch, track):
    """Disjoint and complete: an epoch reads each sequence once; a step reads the same ones on any number of ranks."""
    hp = Hyperparameters(track=track, batch_size=6, sequence_length=16, micro_batch=micro_batch)
    loaders = [BatchLoader(stream(), hp, runtime(rank, world_size)) for rank in range(world_size)]
    alone = BatchLoader(stream(), hp, runtime())
    seen = []
    for step in range(20):
        sequences = {}
        for rank, loader in enumerate(loaders):
            rows = [pair for tokens, targets in loader.next() for pair in zip(tokens, targets, strict=True)]
            assert len(rows) == 6 // world_size
            for i, (tokens, targets) in enumerate(rows):
                assert torch.equal(targets[:-1], tokens[1:]) and targets[-1] == (tokens[-1] + 1) % 2000
                sequences[i * world_size + rank] = tokens.tolist()
        batch = sum((sequences[i] for i in range(6)), [])
        assert batch == sum((tokens.flatten().tolist() for tokens, _ in alone.next()), [])
        if track == "fineweb":  # the files' own order
            assert batch == list(range(step * 96, (step + 1) * 96))
        seen += batch
    assert len(set(seen)) == len(seen) == 1920 and set(seen) <= set(range(2000))
    if track == "laptop":
        assert seen != sorted(seen)
    for loader in [*loaders, alone]:
        loader.pool.shutdown(cancel_futures=True)


def test_loader_begins_where_a_run_resumes(shards):
    hp = Hyperparameters(batch_size=2, sequence_length=16)
    whole, rest = BatchLoader(stream(), hp, runtime()), BatchLoader(stream(), hp, runtime(), step=3)
    for _ in range(3):
        whole.next()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole.next(), rest.next(), strict=True))


def test_fingerprint(shards):
    before = stream().fingerprint(1500)
    assert before == stream().fingerprint(1500) and len(before) == 12
    assert before != stream().fingerprint(1501)
    write_shard(shards / "x_000001.bin", np.arange(500))           # the same tokens, cut elsewhere
    write_shard(shards / "x_000002.bin", np.arange(500, 1007))
    assert stream().fingerprint(1500) == before
    write_shard(shards / "x_000003.bin", np.arange(1007, 2000)[::-1])
    assert stream().fingerprint(1500) != before and stream().fingerprint(1000) != before


def test_ids_beyond_the_vocabulary(shards):
    with pytest.raises(UserError, match=r"x_000003.bin holds the token id 1999.*below 1500"):
        stream(vocab_size=1500).read(0, 2000)


@pytest.mark.parametrize("kwargs, named", [({"pattern": "y_*.bin"}, "make data"), ({"minimum": 2001}, "2,000 tokens")])
def test_too_little_data(shards, kwargs, named):
    with pytest.raises(UserError, match=named):
        stream(**kwargs)


def test_empty_shards_do_no_harm(shards):
    write_shard(shards / "x_000002.bin", np.arange(0))
    assert np.array_equal(stream().read(998, 4), [998, 999, 1007, 1008])


@pytest.mark.parametrize("change, named", [
    (lambda b: b[:500], "magic|size"), (lambda b: b"", "magic"),
    (lambda b: b[:-1], "size"), (lambda b: b + b"\0\0", "size"),
    (lambda b: b"\0" + b[1:], "magic"), (lambda b: b[:4] + b"\2" + b[5:], "version"),
    (lambda b: b[:8] + b"\xff\xff\xff\xff" + b[12:], "number of tokens"), (lambda b: b[::-1], "magic")])
def test_damaged_shards(tmp_path, change, named):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(100))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=named):
        open_shard(path)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_no_file(tmp_path, make):
    make(tmp_path / "a.bin")
    with pytest.raises(UserError, match="a.bin"):
        open_shard(tmp_path / "a.bin")
