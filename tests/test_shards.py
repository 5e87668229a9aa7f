"""data/shards.py: what is written is read back, and nothing else ever has a shard's name."""
import errno
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.shards import ShardWriter, main, verify_shard, write_shard
from train_gpt import UserError, open_shard

REPOSITORY = Path(__file__).resolve().parents[1]
TOKENS = np.array([50256, 0, 1, 65535, 50256, 513], np.uint16)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_bytes_on_disk_are_the_format(tmp_path):
    write_shard(tmp_path / "made" / "a.bin", TOKENS.astype(np.int64))
    raw = (tmp_path / "made" / "a.bin").read_bytes()
    assert raw == struct.pack("<256i", 20240520, 1, 6, *[0] * 253) + struct.pack("<6H", *TOKENS.tolist())


@pytest.mark.parametrize("count", [0, 1, 100_003])
def test_read_back(tmp_path, count):
    tokens = np.random.default_rng(0).integers(0, 50257, count).astype(np.uint16)
    write_shard(tmp_path / "a.bin", tokens)
    assert np.array_equal(open_shard(tmp_path / "a.bin"), tokens)
    assert verify_shard(tmp_path / "a.bin").num_tokens == count


@pytest.mark.parametrize("tokens, vocab_size", [
    (np.array([0, 65536]), None), (np.array([-1, 0]), None), (np.array([257], np.uint16), 257),
    (np.array([65536]), 70_000), (np.zeros((2, 2), np.uint16), None), (np.array([1.0]), None),
    (np.broadcast_to(np.uint16(0), 2**31), None),  # one token more than the header can count, in two bytes of memory
])
def test_what_is_no_shard_is_refused_and_the_old_file_kept(tmp_path, tokens, vocab_size):
    write_shard(tmp_path / "a.bin", TOKENS)
    with pytest.raises(ValueError):
        write_shard(tmp_path / "a.bin", tokens, vocab_size)
    assert np.array_equal(open_shard(tmp_path / "a.bin"), TOKENS) and files(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error, raised", [(OSError(errno.ENOSPC, "No space left on device"), UserError),
                                           (KeyboardInterrupt(), KeyboardInterrupt)])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path, monkeypatch, step, error, raised):
    write_shard(tmp_path / "a.bin", TOKENS)

    def broken(*args):
        raise error
    monkeypatch.setattr(os, step, broken)
    for name in ("a.bin", "b.bin"):
        with pytest.raises(raised):
            write_shard(tmp_path / name, TOKENS[:2])
    assert np.array_equal(open_shard(tmp_path / "a.bin"), TOKENS) and files(tmp_path) == ["a.bin"]


def test_a_folder_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        write_shard(tmp_path / "file" / "a.bin", TOKENS)


@pytest.mark.parametrize("total, sizes", [(0, []), (1, [1]), (99, [99]), (100, [100]), (101, [100, 1]),
                                          (300, [100, 100, 100]), (1234, [100] * 12 + [34])])
@pytest.mark.parametrize("split, first", [("train", 1), ("val", 0)])
def test_writer_keeps_the_stream_and_cuts_it_at_the_size(tmp_path, total, sizes, split, first):
    stream = np.random.default_rng(total).integers(0, 257, total).astype(np.uint16)
    with ShardWriter(tmp_path, "mine", split, 100, vocab_size=257) as writer:
        for document in np.split(stream, np.sort(np.random.default_rng(1).integers(0, total + 1, total // 2))):
            writer.write(document)
    names = [f"mine_{split}_{first + i:06d}.bin" for i in range(len(sizes))]
    assert files(tmp_path) == names == [path.name for path in writer.paths] and writer.num_tokens == total
    shards = [open_shard(tmp_path / name) for name in names]
    assert [len(shard) for shard in shards] == sizes
    assert np.array_equal(np.concatenate([stream[:0], *shards]), stream)


def test_writer_writes_nothing_more_after_an_error(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, "mine", "train", 4) as writer:
        writer.write(np.arange(6, dtype=np.uint16))
        raise KeyError
    assert files(tmp_path) == ["mine_train_000001.bin"] and len(open_shard(writer.paths[0])) == 4


@pytest.mark.parametrize("arguments, tokens", [((4,), np.arange(3)), ((0,), TOKENS), ((2**31,), TOKENS),
                                               ((4, 257), np.array([1, 2, 3, 257], np.uint16))])
def test_writer_refuses_other_types_sizes_and_ids(tmp_path, arguments, tokens):
    with pytest.raises(ValueError):
        ShardWriter(tmp_path, "mine", "train", *arguments).write(tokens)
    assert files(tmp_path) == []


@pytest.mark.parametrize("vocab_size", [257, 50257])
def test_verify_counts(tmp_path, vocab_size):
    tokens = np.random.default_rng(0).integers(0, vocab_size, 20_000).astype(np.uint16)
    tokens[7] = vocab_size - 1
    write_shard(tmp_path / "a.bin", tokens, vocab_size)
    expected = (20_000, int((tokens == vocab_size - 1).sum()), vocab_size - 1)
    assert verify_shard(tmp_path / "a.bin") == verify_shard(tmp_path / "a.bin", vocab_size) == expected
    with pytest.raises(UserError):
        verify_shard(tmp_path / "a.bin", vocab_size - 1)


def corrupt(path, kind):
    raw = bytearray(path.read_bytes())
    changes = {"magic": (0, 20240519), "version": (4, 2), "count": (8, len(TOKENS) + 1), "negative": (8, -1)}
    if kind in changes:
        struct.pack_into("<i", raw, *changes[kind])
    path.write_bytes({"header": raw[:1000], "empty": b"", "odd": raw + b"x", "short": raw[:-2]}.get(kind, raw))


@pytest.mark.parametrize("name, largest", [("data/laptop/laptop_val_000000.bin", 256), ("laptop_val_000000.bin", 50256),
                                           ("data/fineweb10B/fineweb_train_000003.bin", 50256), ("a.bin", 50256)])
def test_ids_are_those_of_the_tracks(tmp_path, monkeypatch, name, largest):
    """Of the file's track, also by a relative name; of a file of no track, of the largest vocabulary."""
    monkeypatch.chdir(tmp_path)
    write_shard(name, np.array([largest, 3, largest]))
    assert verify_shard(name) == verify_shard(tmp_path / name) == (3, 2, largest)
    for above in (largest + 1, 65535):
        write_shard(name, np.array([1, above]))
        with pytest.raises(UserError, match=f"{above}.* {largest + 1}"):
            verify_shard(name)
        assert verify_shard(name, 65536).max_id == above


@pytest.mark.parametrize("kind", ["magic", "version", "count", "negative", "header", "empty", "odd", "short"])
def test_verify_refuses_a_damaged_shard(tmp_path, kind):
    write_shard(tmp_path / "a.bin", TOKENS)
    verify_shard(tmp_path / "a.bin", 65536)
    corrupt(tmp_path / "a.bin", kind)
    with pytest.raises(UserError):
        verify_shard(tmp_path / "a.bin", 65536)


def test_command(tmp_path, capfd):
    good, bad = tmp_path / "good.bin", tmp_path / "bad.bin"
    write_shard(good, TOKENS[[0, 1, 4]])
    bad.write_bytes(good.read_bytes()[:-1])
    assert main([str(good)]) == 0
    assert main([str(good), str(bad)]) == 2
    assert main([str(good), "--vocab_size", "50256"]) == 2
    words = [sys.executable, "-m", "data.shards", good, bad]
    run = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 2 and str(good) in run.stdout and "Traceback" not in run.stderr
    assert len(run.stderr.splitlines()) == 1 and str(bad) in run.stderr
    with pytest.raises(SystemExit) as stop:
        main([str(good), "--vocab", "257"])
    assert stop.value.code == 2
