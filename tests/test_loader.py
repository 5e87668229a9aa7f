"""Shards as the trainer reads them: every token once, the same batch for any number of ranks, bad files refused;
documents cut and packed as the specification says."""
import dataclasses

import numpy as np
import pytest
import torch

import train_gpt
from data.shards import write_shard
from train_gpt import BatchLoader, Hyperparameters, Runtime, TokenStream, UserError, first_documents, open_shard

EOT = 1999
TRACK = dataclasses.replace(train_gpt.TRACKS["fineweb"], vocab_size=2000, eot_token=EOT, get_data="make data")


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Three shards that count on: 0 to 999, 1000 to 1006, 1007 to 1999."""
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    for number, (start, end) in enumerate([(0, 1000), (1000, 1007), (1007, 2000)], 1):
        write_shard(tmp_path / f"x_{number:06d}.bin", np.arange(start, end))
    return tmp_path


@pytest.fixture
def settings(monkeypatch):
    """settings(stages, shuffled, ...): hyperparameters of a track "mine" with these rows (until, batch, document)."""
    def make(*stages, shuffled=False, **kwargs):
        (row, *_) = train_gpt.STAGES["fineweb"]
        monkeypatch.setitem(train_gpt.TRACKS, "mine", dataclasses.replace(TRACK, shuffled=shuffled))
        monkeypatch.setitem(train_gpt.STAGES, "mine", tuple(
            row._replace(until=until, batch=batch, document=document) for until, batch, document in stages))
        return Hyperparameters(**{"track": "mine", "extension_steps": 0, **kwargs})
    return make


def stream(pattern="x_*.bin", minimum=1, **changes):
    return TokenStream(pattern, dataclasses.replace(TRACK, **changes), minimum)


def runtime(rank=0, world_size=1):
    return Runtime(rank, world_size, torch.device("cpu"))


def sequences(loader):
    """The next step's (tokens, targets) of this rank, one pair a sequence, as lists."""
    return [(a.tolist(), b.tolist()) for tokens, targets in loader.next() for a, b in zip(tokens, targets, strict=True)]


@pytest.mark.parametrize("start, count", [(0, 2000), (990, 30), (1999, 2), (1003, 1), (5000, 4321), (0, 0 + 1)])
def test_stream_is_the_shards_without_end(shards, start, count):
    assert np.array_equal(stream().read(start, count), np.arange(start, start + count) % 2000)


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@pytest.mark.parametrize("shuffled", [False, True])
def test_batches_cover_the_stream_once(shards, settings, world_size, micro_batch, shuffled):
    """Disjoint and complete: an epoch reads each sequence once; a step reads the same ones on any number of ranks."""
    hp = settings((1.0, 1, 0), shuffled=shuffled, batch_size=6, sequence_length=16, micro_batch=micro_batch)
    loaders = [BatchLoader(stream(), hp, runtime(rank, world_size)) for rank in range(world_size)]
    alone = BatchLoader(stream(), hp, runtime())
    seen = []
    for step in range(20):
        of_ranks = {}
        for rank, loader in enumerate(loaders):
            rows = sequences(loader)
            assert len(rows) == 6 // world_size
            for i, (tokens, targets) in enumerate(rows):
                assert targets == [*tokens[1:], (tokens[-1] + 1) % 2000]
                of_ranks[i * world_size + rank] = tokens
        batch = sum((of_ranks[i] for i in range(6)), [])
        assert batch == sum((tokens for tokens, _ in sequences(alone)), [])
        if not shuffled:  # the files' own order
            assert batch == list(range(step * 96, (step + 1) * 96))
        seen += batch
    assert len(set(seen)) == len(seen) == 1920 and set(seen) <= set(range(2000))
    if shuffled:
        assert seen != sorted(seen)
    for loader in [*loaders, alone]:
        loader.pool.shutdown(cancel_futures=True)


# Documents of 1 to 300 tokens, the end-of-text token included, of which the lengths that matter occur: 1, the cuts and
# their neighbours, more than a sequence.
LENGTHS = [*np.random.RandomState(0).randint(1, 90, size=60), 1, 1, 19, 20, 21, 39, 40, 41, 300, 64, 63, 65, 1, 130]
# (share of the schedule at which the stage ends, times batch_size, cut); the schedule has 12 steps, the extension 2.
STAGES = [(1 / 3, 1, 20), (2 / 3, 2, 40), (1.0, 3, 40), (float("inf"), 3, 20)]


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """The documents as lists; on the disk in three shards, cut anywhere, with an end of some document before all."""
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    random = np.random.RandomState(1)
    documents = [[EOT, *random.randint(0, EOT, size=length - 1)] for length in LENGTHS]
    tokens = np.array(sum(documents, [7, 8, 9]))
    for number, part in enumerate(np.split(tokens, [1000, 1003]), 1):
        write_shard(tmp_path / f"x_{number:06d}.bin", part)
    return documents


def packed_slowly(documents, hp):
    """Sections 2.13, 2.25 and 2.37 of the specification, written out: [the T + 1 tokens of each sequence] of each step,
    and the number of documents begun before it (and after the last)."""
    steps, begun, scheduled = [], [0], hp.num_steps - hp.extension_steps
    for step in range(hp.num_steps):
        stage = next(s for s in hp.stages if step < s.until * scheduled - 1e-9)
        begin, batch = begun[-1], []
        for _ in range(stage.batch * hp.batch_size):
            tokens = []
            while len(tokens) < hp.sequence_length + 1:  # in order, each cut, and after the last one the first again
                tokens += documents[begin % len(documents)][:stage.document or None]
                begin += 1
            batch.append(tokens[:hp.sequence_length + 1])  # the last one is cut to fit
        steps.append(batch)
        begun.append(begin)
    return steps, begun


def check_against(documents, hp, world_size):
    """The ranks' sequences of every step, and the epochs, are packed_slowly's. Returns the documents begun."""
    steps, begun = packed_slowly(documents, hp)
    loaders = [BatchLoader(stream(), hp, runtime(rank, world_size)) for rank in range(world_size)]
    for step, wanted in enumerate(steps):
        found = [sequences(loader) for loader in loaders]
        assert {len(mine) for mine in found} == {len(wanted) // world_size}
        for i, tokens in enumerate(wanted):
            assert found[i % world_size][i // world_size] == (tokens[:-1], tokens[1:]), (step, i)
            assert tokens[0] == EOT
    for loader in loaders:
        assert [loader.epoch(step) for step in range(len(steps) + 1)] == [n // len(documents) for n in begun]
        loader.pool.shutdown(cancel_futures=True)
    return begun


@pytest.mark.parametrize("length", [16, 64, 256])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_documents_are_cut_and_packed_as_specified(documents, settings, world_size, length, micro_batch):
    hp = settings(*STAGES, num_steps=14, extension_steps=2, batch_size=4, sequence_length=length,
                  micro_batch=micro_batch)
    begun = check_against(documents, hp, world_size)
    assert first_documents(stream(), hp)[-1] == begun[-1]
    assert begun[-1] > {16: 1, 64: 5, 256: 10}[length] * len(documents)  # the documents are read several times


def test_a_stage_of_whole_documents(documents, settings):
    """A cut of 0 among stages that cut: whole documents, and what the sequences have no room for is dropped too."""
    hp = settings((0.5, 1, 20), (1.0, 2, 0), num_steps=12, batch_size=2, sequence_length=64)
    assert check_against(documents, hp, 1)[-1] > len(documents)


def test_one_document_fills_all_sequences(tmp_path, settings, monkeypatch):
    """The stream is one document, shorter than a sequence: each sequence holds its beginning again and again."""
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    write_shard(tmp_path / "x_000001.bin", [EOT, *range(30)])
    hp = settings((1.0, 1, 20), num_steps=5, batch_size=2, sequence_length=64)
    check_against([[EOT, *range(30)]], hp, 2)


@pytest.mark.parametrize("stages", [STAGES, [(1.0, 1, 0)]], ids=["cut", "uncut"])
def test_what_a_step_reads_depends_on_the_step_alone(documents, settings, stages):
    """A loader that begins in mid-stage, on another number of ranks, reads what one that began at 0 does."""
    hp = settings(*stages, num_steps=14, extension_steps=2, batch_size=4, sequence_length=64, micro_batch=3)
    whole, steps = BatchLoader(stream(), hp, runtime()), []
    for _ in range(14):
        steps.append(sequences(whole))
    for begin in (1, 3, 4, 7, 8, 13):
        ranks = [BatchLoader(stream(), hp, runtime(rank, 2), begin) for rank in range(2)]
        for step in range(begin, 14):
            found = [sequences(loader) for loader in ranks]
            assert [found[i % 2][i // 2] for i in range(len(steps[step]))] == steps[step], (begin, step)


def test_without_an_end_of_text_token(shards):
    """No document begins anywhere: one line. One shard without any goes on with the document of the one before."""
    assert stream().documents.tolist() == [1999, 2000]
    write_shard(shards / "x_000003.bin", np.arange(1007, 1999))
    with pytest.raises(UserError, match=r"x_000001.bin holds no token 1999.*make data"):
        _ = stream().documents
    write_shard(shards / "x_000001.bin", [5, EOT, 6, EOT])
    assert stream().documents.tolist() == [1, 3, 4 + 7 + 992]


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
    (lambda b: b[:8] + b"\xff\xff\xff\xff" + b[12:], "size"), (lambda b: b[::-1], "magic")])
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
