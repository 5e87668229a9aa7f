"""data/laptop.py: the same files give the same tokens; documents stay whole and in order."""
import numpy as np
import pytest
import torch

import train_gpt
from data import UserError, laptop
from data.laptop import TRAIN_SHARD, VAL_SHARD, build, documents, is_validation, torch_source
from data.shards import open_shard


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder of 600 small files whose order by path is not that of their creation."""
    monkeypatch.setattr(laptop, "VAL_TOKENS", 400)
    folder = tmp_path / "torch"
    for i in reversed(range(600)):
        path = folder / f"part_{i % 7}" / f"module_{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%05d" % i * 100)
    (folder / "version.py").write_text("differs between builds")
    (folder / "notes.txt").write_text("not Python")
    return folder


def texts_of(shard):
    """The documents of a shard, as bytes."""
    tokens = open_shard(shard)
    starts = np.flatnonzero(tokens == 256)
    assert starts[0] == 0
    return [bytes(part[1:].astype(np.uint8)) for part in np.split(tokens, starts[1:])]


def test_the_corpus_is_the_files_in_sorted_order(source, tmp_path):
    build(source, tmp_path / "out")
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("module_*.py"))
    val = [(source / name).read_bytes() for name in names if is_validation(name)]
    train = [(source / name).read_bytes() for name in names if not is_validation(name)]
    assert val and train
    assert texts_of(tmp_path / "out" / VAL_SHARD) == val
    assert texts_of(tmp_path / "out" / TRAIN_SHARD) == train


def test_folders_that_are_links_belong_to_the_corpus(source, tmp_path):
    build(source, tmp_path / "whole")
    (source / "part_3").rename(tmp_path / "elsewhere")
    (source / "part_3").symlink_to(tmp_path / "elsewhere")
    (source / "part_4" / "again").symlink_to(source)  # leads in circles
    build(source, tmp_path / "linked")
    for shard in (TRAIN_SHARD, VAL_SHARD):
        assert np.array_equal(open_shard(tmp_path / "whole" / shard),
                              open_shard(tmp_path / "linked" / shard))


def test_source_that_cannot_be_read_is_a_user_error(source, tmp_path):
    (source / "part_0" / "lost.py").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="lost.py"):
        build(source, tmp_path / "out")


def test_building_again_repairs_a_damaged_shard_alone(source, tmp_path):
    build(source, tmp_path)
    val = tmp_path / VAL_SHARD
    train = tmp_path / TRAIN_SHARD
    whole = val.read_bytes()
    written = train.stat().st_mtime_ns
    val.write_bytes(whole[:-2])
    build(source, tmp_path)
    assert val.read_bytes() == whole
    assert train.stat().st_mtime_ns == written


def test_line_ends_of_windows_give_the_same_tokens(source, tmp_path):
    build(source, tmp_path / "unix")
    name = "part_0/module_0.py"
    lines = b"a = 1\nb = 2\n"
    (source / name).write_bytes(lines)
    build(source, tmp_path / "unix")
    (source / name).write_bytes(lines.replace(b"\n", b"\r\n"))
    build(source, tmp_path / "windows")
    for shard in (TRAIN_SHARD, VAL_SHARD):
        assert np.array_equal(open_shard(tmp_path / "unix" / shard),
                              open_shard(tmp_path / "windows" / shard))


def test_too_little_source_is_a_user_error(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "a.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=f"{laptop.VAL_TOKENS:,}"):
        build(tmp_path / "torch", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_and_the_validation_tokens_are_those_of_the_track():
    track = train_gpt.TRACKS["laptop"]
    assert laptop.VAL_TOKENS == track.val_tokens
    assert (laptop.FOLDER / VAL_SHARD).match(track.val_files)
    assert (laptop.FOLDER / TRAIN_SHARD).match(track.train_files)


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="true of the pinned torch")
def test_the_installed_torch_has_enough_text():
    found = documents(torch_source())
    sizes = [path.stat().st_size + 1 for name, path in found if is_validation(name)]
    assert len(found) > 2000
    assert sum(sizes) > laptop.VAL_TOKENS
    assert max(sizes) < 0.5 * sum(sizes)  # no single file dominates the validation
