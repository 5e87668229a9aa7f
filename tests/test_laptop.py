"""data/laptop.py: the same tokens from the same files, documents whole and in order, validation apart from training."""
import numpy as np
import pytest
import torch

from data.laptop import build, documents, is_validation, torch_source
from train_gpt import TRACKS, UserError, open_shard

TRACK = TRACKS["laptop"]


@pytest.fixture
def source(tmp_path):
    """600 files of 80 kB in folders whose order by path and by creation differ; and what does not belong."""
    folder = tmp_path / "torch"
    for i in reversed(range(600)):
        path = folder / f"part_{i % 7}" / f"module_{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((b"%05d" % i) * 16_000)
    (folder / "version.py").write_text("left out: it differs between builds")
    (folder / "notes.txt").write_text("no Python")
    return folder


def test_corpus_is_the_files_in_sorted_order(source, tmp_path):
    build(source, tmp_path / "out")
    names = sorted(p.relative_to(source).as_posix() for p in source.rglob("module_*.py"))
    for shard, wanted in (("laptop_val_000000.bin", [n for n in names if is_validation(n)]),
                          ("laptop_train_000001.bin", [n for n in names if not is_validation(n)])):
        tokens = open_shard(tmp_path / "out" / shard)
        starts = np.flatnonzero(tokens == TRACK.eot_token)
        texts = [bytes(part[1:].astype(np.uint8)) for part in np.split(tokens, starts)[1:]]
        assert starts[0] == 0 and texts == [(source / name).read_bytes() for name in wanted] and texts


def test_building_again_changes_nothing_and_mends_damage(source, tmp_path):
    build(source, tmp_path)
    val, train = sorted(tmp_path.glob("laptop_*.bin"))[::-1]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (val, train)}
    val.write_bytes(val.read_bytes()[:-2])
    build(source, tmp_path)
    assert val.read_bytes() == before[val][0] and train.stat().st_mtime_ns == before[train][1]


def test_line_ends_of_windows_give_the_same_tokens(tmp_path):
    for name, end in (("unix", b"\n"), ("windows", b"\r\n")):
        for i in (1, 239, 334, 417):  # the last three are validation
            path = tmp_path / name / f"module_{i}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(end.join([b"x = %d" % i] * 15_000))
        build(tmp_path / name, tmp_path / f"{name}_out")
    for shard in ("laptop_val_000000.bin", "laptop_train_000001.bin"):
        assert (tmp_path / "unix_out" / shard).read_bytes() == (tmp_path / "windows_out" / shard).read_bytes()


def test_too_little_source_is_said(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/a.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="262,144"):
        build(tmp_path / "torch", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="of the pinned torch 2.13.0: 2.11 has too little")
def test_installed_torch_holds_enough_of_everything():
    found = documents(torch_source())
    validation = [path.stat().st_size + 1 for name, path in found if is_validation(name)]
    assert len(found) > 2000 and sum(validation) > TRACK.val_tokens
    assert max(validation) < 0.5 * sum(validation)  # no one file is the test
