"""Shards, token stream and batches: every token once, the same batches on any number of ranks,
documents cut and packed as the specification says."""
import dataclasses
import math
import os
import resource
import struct

import numpy as np
import pytest
import torch

import train_gpt
from data.shards import write_shard
from train_gpt import (
    BatchLoader,
    Hyperparameters,
    Runtime,
    TokenStream,
    UserError,
    first_doc_of_sequences,
    open_shard,
)

EOT = 1999
TRACK = dataclasses.replace(
    train_gpt.TRACKS["fineweb"], vocab_size=2000, eot_token=EOT, get_data="make data")


def stream(pattern="x_*.bin", minimum=1, **changes) -> TokenStream:
    return TokenStream(pattern, dataclasses.replace(TRACK, **changes), minimum)


@pytest.fixture
def counting_shards(tmp_path, monkeypatch):
    """Three shards, which together count from 0 to 1999. The second has 7 tokens."""
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    for number, (start, end) in enumerate([(0, 1000), (1000, 1007), (1007, 2000)], start=1):
        write_shard(tmp_path / f"x_{number:06d}.bin", np.arange(start, end))
    return tmp_path


@pytest.fixture
def settings(monkeypatch):
    """settings(*stages, shuffled=False, **hyperparameters) makes hyperparameters of a track with
    these stages: (until, batch_multiplier, max_doc_len)."""
    def make(*stages, shuffled=False, **hyperparameters):
        template = train_gpt.STAGES["fineweb"][0]
        rows = [template._replace(until=until, batch_multiplier=multiplier, max_doc_len=max_doc_len)
                for until, multiplier, max_doc_len in stages]
        track = dataclasses.replace(TRACK, shuffled=shuffled)
        monkeypatch.setitem(train_gpt.TRACKS, "mine", track)
        monkeypatch.setitem(train_gpt.STAGES, "mine", tuple(rows))
        return Hyperparameters(**{"track": "mine", "extension": 0.0, **hyperparameters})
    return make


@pytest.fixture
def loader(request):
    """loader(hp, rank=0, world_size=1, step=0) makes a BatchLoader, which is closed after the
    test."""
    def make(hp, rank=0, world_size=1, step=0):
        runtime = Runtime(rank, world_size, torch.device("cpu"))
        batch_loader = BatchLoader(stream(), hp, runtime, step)
        request.addfinalizer(batch_loader.close)
        return batch_loader
    return make


def next_sequences(batch_loader) -> list[tuple[list, list]]:
    """(tokens, targets) of each of this rank's sequences of the next step."""
    return [(t.tolist(), u.tolist()) for tokens, targets in batch_loader.next()
            for t, u in zip(tokens, targets, strict=True)]


def interleave(ranks: list[list]) -> list:
    """The sequences of a step in their order; rank r has those whose index is r modulo W."""
    return [sequence for group in zip(*ranks, strict=True) for sequence in group]


# --- Shards ---------------------------------------------------------------------------------------


def test_a_shard_is_read_as_the_format_says(tmp_path):
    tokens = [50256, 0, 1, 65535]
    header = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253)
    (tmp_path / "a.bin").write_bytes(header + struct.pack("<4H", *tokens))
    assert open_shard(tmp_path / "a.bin", "make data").tolist() == tokens


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:500], lambda raw: b"", lambda raw: raw[:-1], lambda raw: raw + b"\0\0",
    lambda raw: b"\0" + raw[1:],                        # magic number
    lambda raw: raw[:4] + b"\2" + raw[5:],              # version
    lambda raw: raw[:8] + b"\xff" * 4 + raw[12:],       # number of tokens
    lambda raw: raw[::-1]])
def test_a_damaged_shard_is_refused_with_its_path_and_the_command(tmp_path, damage):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(100))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as error:
        open_shard(path, "make data")
    assert str(path) in str(error.value)
    assert "make data" in str(error.value)


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_shard_that_is_no_file_is_refused_with_its_path(tmp_path, is_folder):
    if is_folder:
        (tmp_path / "a.bin").mkdir()
    with pytest.raises(UserError, match="a.bin"):
        open_shard(tmp_path / "a.bin", "make data")


# --- The stream -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start, count",
                         [(0, 2000), (990, 30), (1999, 2), (1003, 1), (5000, 4321), (0, 1)])
def test_the_stream_is_the_shards_in_order_again_and_again(counting_shards, start, count):
    assert np.array_equal(stream().read(start, count), np.arange(start, start + count) % 2000)


def test_empty_shards_are_skipped(counting_shards):
    write_shard(counting_shards / "x_000002.bin", np.arange(0))
    assert np.array_equal(stream().read(998, 4), [998, 999, 1007, 1008])


def test_tokens_beyond_the_vocabulary_are_refused(counting_shards):
    with pytest.raises(UserError) as error:
        stream(vocab_size=1500).read(0, 2000)
    for name in ("x_000003.bin", "1999", "1500", "make data"):
        assert name in str(error.value)


@pytest.mark.parametrize("arguments", [dict(pattern="y_*.bin"), dict(minimum=2001)])
def test_too_few_tokens_are_refused_with_the_command_that_gets_more(counting_shards, arguments):
    with pytest.raises(UserError, match="make data"):
        stream(**arguments)


def test_documents_begin_at_the_end_of_text_token(counting_shards):
    """A shard without that token continues the document of the shard before. A stream without it is
    refused."""
    assert stream().documents.tolist() == [1999, 2000]
    write_shard(counting_shards / "x_000003.bin", np.arange(1007, 1999))
    with pytest.raises(UserError) as error:
        _ = stream().documents
    assert "1999" in str(error.value) and "make data" in str(error.value)
    write_shard(counting_shards / "x_000001.bin", np.array([5, EOT, 6, EOT]))
    assert stream().documents.tolist() == [1, 3, 4 + 7 + 992]


def test_the_fingerprint_depends_on_the_tokens_and_not_on_the_shards(counting_shards):
    before = stream().fingerprint(1500)
    assert before == stream().fingerprint(1500) and len(before) == 12
    assert before != stream().fingerprint(1501)
    write_shard(counting_shards / "x_000001.bin", np.arange(500))  # the same tokens, cut elsewhere
    write_shard(counting_shards / "x_000002.bin", np.arange(500, 1007))
    assert stream().fingerprint(1500) == before
    write_shard(counting_shards / "x_000003.bin", np.arange(1007, 2000)[::-1])
    assert stream().fingerprint(1500) != before


@pytest.mark.parametrize("change", ["none", "cut elsewhere", "one more", "first", "last"])
def test_the_fingerprint_of_shards_depends_on_their_sizes_and_ends(counting_shards, change):
    before = stream().fingerprint_of_shards()
    tokens = np.arange(1007, 2000)
    if change == "cut elsewhere":
        tokens = tokens[:-1]
    elif change == "one more":
        write_shard(counting_shards / "x_000004.bin", np.arange(1))
    elif change == "first":
        tokens[0] += 1
    elif change == "last":
        tokens[-1] -= 1
    write_shard(counting_shards / "x_000003.bin", tokens)
    assert (stream().fingerprint_of_shards() == before) == (change == "none")


def test_many_shards_need_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    for number in range(60):
        write_shard(tmp_path / f"x_{number:06d}.bin", np.array([EOT, number]))
    open_files = len(os.listdir("/dev/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files + 20, hard))
    try:
        many = stream()
        assert many.read(0, 120)[1::2].tolist() == list(range(60))
        assert len(many.documents) == 61
        many.fingerprint_of_shards()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- Batches of plain text ------------------------------------------------------------------------


@pytest.mark.parametrize("world_size, micro_batch", [(1, 1), (2, 2), (3, 5), (6, 1)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_an_epoch_has_every_token_once_on_any_number_of_ranks(
        counting_shards, settings, loader, world_size, micro_batch, shuffled):
    """Targets are the tokens one later. Each step has the same sequences on any number of ranks."""
    hp = settings((1.0, 1, 0), shuffled=shuffled, batch_size=6, sequence_length=16,
                  micro_batch=micro_batch)
    ranks = [loader(hp, rank, world_size) for rank in range(world_size)]
    single = loader(hp)
    seen = []
    for step in range(20):
        batch = interleave([next_sequences(rank) for rank in ranks])
        assert batch == next_sequences(single)
        assert len(batch) == 6
        for tokens, targets in batch:
            assert targets == [*tokens[1:], (tokens[-1] + 1) % 2000]
            seen += tokens
        if not shuffled:
            assert seen == list(range((step + 1) * 96))
    assert len(set(seen)) == len(seen) == 1920
    assert set(seen) <= set(range(2000))
    if shuffled:
        assert seen != sorted(seen)


@pytest.mark.parametrize("world_size, micro_batch, sizes", [
    (1, 4, [3, 3]), (1, 6, [6]), (1, 1, [1] * 6), (2, 2, [1] * 3), (6, 5, [1])])
def test_micro_batches_divide_a_ranks_sequences_equally(
        counting_shards, settings, loader, world_size, micro_batch, sizes):
    hp = settings((1.0, 1, 0), batch_size=6, sequence_length=16, micro_batch=micro_batch)
    batch = loader(hp, 0, world_size).next()
    assert [tuple(tokens.shape) for tokens, _ in batch] == [(size, 16) for size in sizes]


# --- Batches of packed documents ------------------------------------------------------------------

# Lengths in tokens, with the end-of-text token. Among them are 1, the lengths to which the stages
# cut and their neighbors, and one that is longer than a sequence.
LENGTHS = [*np.random.RandomState(0).randint(1, 90, size=60),
           1, 1, 19, 20, 21, 39, 40, 41, 300, 64, 63, 65, 1, 130]
# (until, batch_multiplier, max_doc_len); the schedule has 12 steps, the extension 2.
PACKED_STAGES = [(1 / 3, 1, 20), (2 / 3, 2, 40), (1.0, 3, 40), (math.inf, 3, 20)]


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """Documents as lists of tokens. They lie in three shards that are cut anywhere, behind the rest
    of another document."""
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    random = np.random.RandomState(1)
    documents = [[EOT, *random.randint(0, EOT, size=length - 1)] for length in LENGTHS]
    tokens = np.array(sum(documents, [7, 8, 9]))
    for number, part in enumerate(np.split(tokens, [1000, 1003]), start=1):
        write_shard(tmp_path / f"x_{number:06d}.bin", part)
    return documents


def pack(documents, hp):
    """The rule: each sequence is filled with the next documents, each cut to max_doc_len, until it
    has T + 1 tokens. What is left of its last document is dropped.

    Returns the sequences of each step, and the number of documents used before each step and after
    the last one."""
    steps = []
    used = [0]
    scheduled_steps = hp.num_steps - hp.extension_steps
    for step in range(hp.num_steps):
        stage = next(s for s in hp.stages if step < s.until * scheduled_steps - 1e-9)
        document = used[-1]
        batch = []
        for _ in range(stage.batch_multiplier * hp.batch_size):
            tokens = []
            while len(tokens) < hp.sequence_length + 1:
                tokens += documents[document % len(documents)][:stage.max_doc_len or None]
                document += 1
            batch.append(tokens[:hp.sequence_length + 1])
        steps.append(batch)
        used.append(document)
    return steps, used


def check_against_the_rule(documents, hp, loader, world_size) -> int:
    """The sequences of all ranks and steps, and the epochs, are those of pack(). Returns the number
    of documents used."""
    steps, used = pack(documents, hp)
    ranks = [loader(hp, rank, world_size) for rank in range(world_size)]
    for step, expected in enumerate(steps):
        found = interleave([next_sequences(rank) for rank in ranks])
        assert found == [(tokens[:-1], tokens[1:]) for tokens in expected], step
    epochs = [count // len(documents) for count in used]
    for rank in ranks:
        assert [rank.epoch(step) for step in range(len(steps) + 1)] == epochs
    assert first_doc_of_sequences(stream(), hp)[-1] == used[-1]
    return used[-1]


@pytest.mark.parametrize("length, epochs", [(16, 1), (64, 5), (256, 10)])
@pytest.mark.parametrize("world_size, micro_batch", [(1, 1), (4, 3)])
def test_documents_are_cut_and_packed_by_the_rule(
        documents, settings, loader, length, epochs, world_size, micro_batch):
    """For sequences shorter and longer than the documents, over several epochs."""
    hp = settings(*PACKED_STAGES, num_steps=14, extension=2 / 14, batch_size=4,
                  sequence_length=length, micro_batch=micro_batch)
    used = check_against_the_rule(documents, hp, loader, world_size)
    assert used > epochs * len(documents)


def test_a_stage_without_max_doc_len_packs_whole_documents(documents, settings, loader):
    hp = settings((0.5, 1, 20), (1.0, 2, 0), num_steps=12, batch_size=2, sequence_length=64)
    assert check_against_the_rule(documents, hp, loader, 1) > len(documents)


def test_a_stream_of_one_short_document_fills_all_sequences(
        tmp_path, settings, loader, monkeypatch):
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    document = [EOT, *range(30)]
    write_shard(tmp_path / "x_000001.bin", np.array(document))
    hp = settings((1.0, 1, 20), num_steps=5, batch_size=2, sequence_length=64)
    check_against_the_rule([document], hp, loader, 2)


@pytest.mark.parametrize("stages", [PACKED_STAGES, [(1.0, 1, 0)]], ids=["packed", "plain"])
def test_a_step_has_the_same_batch_in_a_resumed_run(documents, settings, loader, stages):
    """The run resumes at any step, on another number of ranks."""
    hp = settings(*stages, num_steps=14, extension=2 / 14, batch_size=4, sequence_length=64,
                  micro_batch=3)
    whole_run = loader(hp)
    steps = [next_sequences(whole_run) for _ in range(14)]
    for begin in (1, 4, 7, 8, 13):
        ranks = [loader(hp, rank, 2, begin) for rank in range(2)]
        for step in range(begin, 14):
            batch = interleave([next_sequences(rank) for rank in ranks])
            assert batch == steps[step], (begin, step)
