"""data/shards.py: what is written is read back, and a file with a final name is always complete."""
import errno
import os
import struct

import numpy as np
import pytest

import train_gpt
from data import UserError
from data.shards import MAX_TOKENS, ShardWriter, main, open_shard, verify_shard, write_shard

TOKENS = np.array([50256, 0, 1, 65535, 50256, 513], np.uint16)


def file_names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_bytes_of_a_shard(tmp_path):
    write_shard(tmp_path / "new folder" / "a.bin", TOKENS.astype(np.int64))
    header = struct.pack("<256i", 20240520, 1, 6, *[0] * 253)
    raw = (tmp_path / "new folder" / "a.bin").read_bytes()
    assert raw == header + struct.pack("<6H", *TOKENS.tolist())


@pytest.mark.parametrize("count", [0, 1, 100_003])
def test_both_readers_return_what_was_written(tmp_path, count):
    tokens = np.random.default_rng(0).integers(0, 50257, count).astype(np.uint16)
    write_shard(tmp_path / "a.bin", tokens)
    path = tmp_path / "a.bin"
    for found in (open_shard(path), train_gpt.open_shard(path, "a command")):
        assert found.dtype == np.uint16
        assert np.array_equal(found, tokens)


def damaged(raw: bytes, damage: str) -> bytes:
    """A shard's bytes with one thing wrong."""
    changed_header = {"magic": (0, 20240519), "version": (4, 2), "too many": (8, len(TOKENS) + 1),
                      "negative": (8, -1)}
    if damage in changed_header:
        changed = bytearray(raw)
        struct.pack_into("<i", changed, *changed_header[damage])
        return bytes(changed)
    return {"half a header": raw[:500], "empty": b"", "odd": raw + b"x", "short": raw[:-2],
            "long": raw + b"xx", "html": b"<html>" + raw[6:]}[damage]


@pytest.mark.parametrize("damage", ["magic", "version", "too many", "negative", "half a header",
                                    "empty", "odd", "short", "long", "html", "missing"])
def test_both_readers_refuse_what_is_no_shard(tmp_path, damage):
    path = tmp_path / "a.bin"
    write_shard(path, TOKENS)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged(path.read_bytes(), damage))
    with pytest.raises(UserError) as mine:
        open_shard(path)
    with pytest.raises(train_gpt.UserError) as theirs:
        train_gpt.open_shard(path, "a command")
    assert str(path) in str(mine.value)
    assert str(path) in str(theirs.value)


@pytest.mark.parametrize("tokens, vocab_size", [
    (np.array([0, 65536]), 65536),
    (np.array([-1, 0]), 65536),
    (np.array([257], np.uint16), 257),
    (np.array([65536]), 70_000),
    (np.zeros((2, 2), np.uint16), 65536),
    (np.array([1.0]), 65536),
    (np.broadcast_to(np.uint16(0), MAX_TOKENS + 1), 65536),
], ids=["too large", "negative", "not in the vocabulary", "vocabulary too large", "2 dimensions",
        "floats", "too many"])
def test_unfit_tokens_are_refused_and_the_old_file_stays(tmp_path, tokens, vocab_size):
    write_shard(tmp_path / "a.bin", TOKENS)
    with pytest.raises(ValueError):
        write_shard(tmp_path / "a.bin", tokens, vocab_size)
    assert np.array_equal(open_shard(tmp_path / "a.bin"), TOKENS)
    assert file_names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error, expected", [
    (OSError(errno.ENOSPC, "No space left on device"), UserError),
    (KeyboardInterrupt(), KeyboardInterrupt)], ids=["disk full", "Ctrl-C"])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, function, error, expected):
    write_shard(tmp_path / "a.bin", TOKENS)

    def fail(*args):
        raise error
    monkeypatch.setattr(os, function, fail)
    for name in ("a.bin", "b.bin"):
        with pytest.raises(expected):
            write_shard(tmp_path / name, TOKENS[:2])
    assert np.array_equal(open_shard(tmp_path / "a.bin"), TOKENS)
    assert file_names(tmp_path) == ["a.bin"]


def test_two_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """Another process with the same number, as in two containers, writes at the worst moment."""
    fsync = os.fsync

    def interleave(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        write_shard(tmp_path / "a.bin", TOKENS[:2])
    monkeypatch.setattr(os, "fsync", interleave)
    write_shard(tmp_path / "a.bin", TOKENS)
    assert np.array_equal(open_shard(tmp_path / "a.bin"), TOKENS)
    assert file_names(tmp_path) == ["a.bin"]


def test_a_folder_that_was_cleared_behind_a_link_is_made_again(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "large disk" / "data")
    write_shard(tmp_path / "link" / "a.bin", TOKENS)
    assert np.array_equal(open_shard(tmp_path / "large disk" / "data" / "a.bin"), TOKENS)


def test_a_pipe_or_a_folder_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")  # opening it would wait forever
    for path in (tmp_path / "pipe.bin", tmp_path):
        with pytest.raises(UserError, match=path.name):
            open_shard(path)


@pytest.mark.parametrize("total, sizes", [(0, []), (1, [1]), (100, [100]), (101, [100, 1]),
                                          (1234, [100] * 12 + [34])])
@pytest.mark.parametrize("split, first", [("train", 1), ("val", 0)])
def test_writer_keeps_the_stream_and_cuts_it(tmp_path, total, sizes, split, first):
    rng = np.random.default_rng(total)
    stream = rng.integers(0, 257, total).astype(np.uint16)
    cuts = np.sort(rng.integers(0, total + 1, total // 2))
    with ShardWriter(tmp_path, "mine", split, 100, vocab_size=257) as writer:
        for document in np.split(stream, cuts):
            writer.write(document)
    names = [f"mine_{split}_{first + i:06d}.bin" for i in range(len(sizes))]
    assert file_names(tmp_path) == names
    assert [path.name for path in writer.paths] == names
    assert writer.num_tokens == total
    shards = [open_shard(tmp_path / name) for name in names]
    assert [len(shard) for shard in shards] == sizes
    assert np.array_equal(np.concatenate([stream[:0], *shards]), stream)


def test_writer_writes_nothing_more_after_an_error(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, "mine", "train", 4) as writer:
        writer.write(np.arange(6, dtype=np.uint16))
        raise KeyError
    assert file_names(tmp_path) == ["mine_train_000001.bin"]
    assert len(open_shard(writer.paths[0])) == 4


def test_verify_counts_documents_of_each_vocabulary(tmp_path):
    for vocab_size in (257, 50257):
        tokens = np.random.default_rng(0).integers(0, vocab_size, 20_000).astype(np.uint16)
        tokens[7] = vocab_size - 1
        write_shard(tmp_path / "a.bin", tokens, vocab_size)
        num_documents = int((tokens == vocab_size - 1).sum())
        expected = (20_000, num_documents, vocab_size - 1)
        assert verify_shard(tmp_path / "a.bin") == expected
        assert verify_shard(tmp_path / "a.bin", vocab_size) == expected
        with pytest.raises(UserError, match=str(vocab_size - 1)):
            verify_shard(tmp_path / "a.bin", vocab_size - 1)


def test_the_command_names_a_bad_shard_in_one_line(tmp_path, capsys):
    good = tmp_path / "good.bin"
    bad = tmp_path / "bad.bin"
    write_shard(good, TOKENS[[0, 1, 4]])
    bad.write_bytes(good.read_bytes()[:-1])
    assert main([str(good)]) == 0
    assert main([str(good), "--vocab_size", "50256"]) == 2
    capsys.readouterr()
    assert main([str(good), str(bad)]) == 2
    out, errors = capsys.readouterr()
    assert str(good) in out
    assert str(bad) in errors
    assert len(errors.splitlines()) == 1


def test_the_vocabularies_are_those_of_the_tracks():
    from data import shards
    for track, vocab_size in (("laptop", shards.BYTE_VOCAB_SIZE),
                              ("fineweb", shards.GPT2_VOCAB_SIZE)):
        assert train_gpt.TRACKS[track].vocab_size == vocab_size
        assert train_gpt.TRACKS[track].eot_token == vocab_size - 1
