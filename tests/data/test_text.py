"""data/text.py: no document is lost, and any number of processes gives the same shards."""
import errno
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import train_gpt
from data import UserError, documents, encoders, text, usable_cores
from data.documents import cut_blocks, find_files
from data.encoders import encode_texts
from data.shards import open_shard, write_shard

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "corpus"  # exists beside the project on some machines
WORDS = "the of Ünïcödé and 1234 tokens; it's \U0001f600 \u3000 naïve\r\n\n  x".split(" ")


@pytest.fixture
def gpt2(monkeypatch):
    """The name of the encoding. Skips if its vocabulary is not here: a test downloads nothing."""
    if (SHARED / "tiktoken_cache").is_dir():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    elif not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("no GPT-2 vocabulary: set TIKTOKEN_CACHE_DIR to a folder that has it")
    return "gpt2"


def made_up(seed, count, longest=400):
    """Documents of random words, some of a single one."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) + "." for _ in range(count)]


def write_jsonl(path, texts):
    lines = [json.dumps({"text": text, "source": 1}) + "\n" for text in texts]
    path.write_text("".join(lines))
    return path


def run(tmp_path, *words, out="out"):
    """The exit code. The command writes bytes into tmp_path/OUT/mine, if words do not differ."""
    usual = ["--name", "mine", "--dir", tmp_path / out / "mine", "--encoding", "bytes",
             "--processes", 1]
    return text.main([str(word) for word in [*usual, *words]])


def read(tmp_path, split, out="out"):
    """All tokens of a split."""
    paths = sorted((tmp_path / out / "mine").glob(f"mine_{split}_*.bin"))
    return np.concatenate([open_shard(path) for path in paths])


def split_documents(tokens, end_of_text=256):
    """The documents of a stream of byte tokens."""
    starts = np.flatnonzero(tokens == end_of_text)
    assert starts[0] == 0
    return [part[1:].astype(np.uint8).tobytes() for part in np.split(tokens, starts[1:])]


# --- Encodings ---


def test_ids_of_bytes():
    ids, of_half_a_pair = encode_texts("bytes", ["Aé\n", "\ud800"])
    assert ids.tolist() == [65, 195, 169, 10]
    assert ids.dtype == np.uint16
    assert of_half_a_pair.tolist() == [ord("?")]


def test_ids_of_gpt2(gpt2):
    hello, special = encode_texts(gpt2, ["Hello world", "<|endoftext|>"])
    assert hello.tolist() == [15496, 995]
    assert hello.dtype == np.uint16
    assert 50256 not in special  # in a text these characters do not end a document
    assert encode_texts(gpt2, [""])[0].tolist() == []


def test_a_corpus_tokenized_elsewhere_has_the_same_documents(gpt2, tmp_path):
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} does not exist")
    lines = (SHARED / "documents.jsonl").read_text().splitlines()[:300]
    source = write_jsonl(tmp_path / "a.jsonl", [json.loads(line)["text"] for line in lines])
    assert run(tmp_path, source, "--encoding", "gpt2") == 0
    theirs = set()
    for path in SHARED.glob("*.bin"):
        theirs.update(split_at(open_shard(path)))
    mine = split_at(np.concatenate([read(tmp_path, "train"), read(tmp_path, "val")]))
    assert len(mine) == 300
    assert theirs.issuperset(mine)


def split_at(tokens):
    """The documents of a stream of GPT-2 tokens, as bytes."""
    starts = np.flatnonzero(tokens == 50256)
    return [part.tobytes() for part in np.split(tokens, starts[1:])]


def test_a_missing_vocabulary_is_a_user_error(monkeypatch, tmp_path):
    import requests
    import tiktoken.registry
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)

    def offline(*args, **kwargs):
        raise requests.ConnectionError("no route")
    monkeypatch.setattr(requests, "get", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        encoders.gpt2_encoding()


@pytest.mark.parametrize("before, after", [("", ""), ("a", "b"), ("a", "!"), ("", "\u00e9")])
def test_a_long_text_has_the_tokens_of_the_whole(gpt2, monkeypatch, before, after):
    """It is given to tiktoken in blocks, but no block ends in white space or within a word."""
    import tiktoken
    monkeypatch.setattr(encoders, "MOST_CHARACTERS", 500)
    rng = random.Random(0)
    gaps = [rng.choice([" ", "\n", "\u3000", " \t\x1c"]) * rng.randint(1, 60) for _ in range(200)]
    whole = "".join(before + gap + after for gap in gaps)
    expected = tiktoken.get_encoding("gpt2").encode_ordinary(whole)
    assert encode_texts(gpt2, [whole])[0].tolist() == expected


@pytest.mark.parametrize("letter", [" ", "\u3000", "a", "=", "\U0001f600"])
def test_a_run_of_a_million_characters_is_tokenized(gpt2, tmp_path, letter):
    source = write_jsonl(tmp_path / "a.jsonl", ["one", letter * 1_100_000 + "x", "two"])
    assert run(tmp_path, source, "--encoding", gpt2) == 0


def test_what_the_tokenizer_cannot_take_is_named_or_left_out(gpt2, tmp_path, monkeypatch, capsys):
    import tiktoken

    class PanicException(BaseException):
        """As tiktoken's, which is no Exception, either."""

    original = tiktoken.Encoding.encode_ordinary

    def encode(self, text):
        if "Once upon" in text:
            raise PanicException
        return original(self, text)
    monkeypatch.setattr(tiktoken.Encoding, "encode_ordinary", encode)
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "Once upon a time", "two"])
    assert run(tmp_path, source, "--encoding", gpt2) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1 and f"{source}:2" in errors
    assert not (tmp_path / "out" / "mine").exists()
    assert run(tmp_path, source, "--encoding", gpt2, "--skip_bad") == 0
    assert read(tmp_path, "train").tolist() == [50256, *encode_texts(gpt2, ["one"])[0]]
    assert read(tmp_path, "val").tolist() == [50256, *encode_texts(gpt2, ["two"])[0]]


# --- Documents ---


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("letters, weights", [
    (" \n\r\t\xa0\x1c\u2028ab12'!é漢", [6, 3, 1, 1] + [1] * 11),
    ("ab12_'!é漢、½\u0301\U0001f600", None)], ids=["prose", "no white space"])
def test_blocks_are_tokenized_like_the_whole_text(seed, letters, weights):
    regex = pytest.importorskip("regex")
    tiktoken_ext = pytest.importorskip("tiktoken_ext.openai_public")
    pattern = regex.compile(tiktoken_ext.r50k_pat_str)  # the splitting pattern of GPT-2
    rng = random.Random(seed)
    whole = "".join(rng.choices(letters, weights, k=rng.randint(0, 3000)))
    cuts = sorted(rng.choices(range(len(whole) + 1), k=30))
    chunks = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    blocks = list(cut_blocks(chunks, size=40))
    assert "".join(blocks) == whole
    assert all(blocks)
    pieces = [piece for block in blocks for piece in pattern.findall(block)]
    assert pieces == pattern.findall(whole)
    assert len(blocks) >= min(len(whole) // 1000, 3)  # it was cut


@pytest.mark.parametrize("sentence", ["漢字かな、", "naïve:1", "a" * 7, "\U0001f600", "   "])
def test_text_without_white_space_is_cut(sentence):
    whole = sentence * 1000
    chunks = [whole[start:start + 30] for start in range(0, len(whole), 30)]
    blocks = list(cut_blocks(chunks, size=50))
    assert "".join(blocks) == whole
    assert max(map(len, blocks)) <= 100


def test_a_book_without_white_space_trains_and_validates(tmp_path):
    book = "道可道，非常道。名可名，非常名。" * 20_000
    (tmp_path / "book.txt").write_text(book)
    assert run(tmp_path, tmp_path / "book.txt", "--val_fraction", 0.2) == 0
    train = b"".join(split_documents(read(tmp_path, "train"))).decode()
    val = b"".join(split_documents(read(tmp_path, "val"))).decode()
    assert 0 < len(val) < len(train)
    assert len(train) + len(val) == len(book)


def test_white_space_before_a_book_belongs_to_it(tmp_path):
    (tmp_path / "book.txt").write_text("\n" * 200_000 + "the end")
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    assert run(tmp_path, source, tmp_path / "book.txt") == 0
    assert read(tmp_path, "train").tolist() == [256, *b"one"]
    assert read(tmp_path, "val").tolist() == [256, *b"\n" * 200_000, *b"the end"]


def test_files_are_found_in_sorted_order_and_through_links(tmp_path, capsys):
    for name in ("in/b/2.TXT", "in/a.txt", "in/c.txt", "in/b/1.txt", "in/b/3.csv", "disk/4.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "in/d").symlink_to(tmp_path / "disk")
    (tmp_path / "in/b/again").symlink_to(tmp_path / "in")  # leads in circles
    (tmp_path / "in/e.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in/old disk").symlink_to(tmp_path / "unmounted")
    os.mkfifo(tmp_path / "in/pipe.txt")
    found = find_files([tmp_path / "in/c.txt", tmp_path / "in"])
    names = [path.relative_to(tmp_path / "in").as_posix() for path in found]
    assert names == ["c.txt", "a.txt", "b/1.txt", "b/2.TXT", "d/4.txt"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("e.txt", "old disk", "pipe.txt"))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
@pytest.mark.parametrize("name", ["folder", "folder/a.txt"])
def test_what_cannot_be_read_is_named_before_the_work(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").write_text("a")
    (tmp_path / name).chmod(0)
    with pytest.raises(UserError, match=name):
        find_files([tmp_path])
    (tmp_path / name).chmod(0o700)


BAD = {
    "latin.txt": "caf\xe9 con leche".encode("latin-1"),
    "cut.txt": "é".encode()[:1],
    "utf16.txt": "no mark".encode("utf-16-le"),
    "bad.jsonl": b'{"text": "good"}\n\n{"text": "cut of',
    "key.jsonl": b'{"text": "good"}\n\n{"content": "x"}\n',
    "type.jsonl": b'{"text": "good"}\n\n{"text": ["x"]}\n',
    "list.jsonl": b'{"text": "good"}\n\n["text"]\n',
    "utf8.jsonl": b'{"text": "good"}\n\n{"text": "\xff"}\n',
    "utf16.jsonl": b'{"text": "good"}\n\n' + '{"text": "no mark"}'.encode("utf-16-le"),
    "no.parquet": b"not what the name says",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_document_is_named_or_left_out(tmp_path, capsys, name):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    bad = tmp_path / name
    bad.write_bytes(BAD[name])
    is_jsonl = bad.suffix == ".jsonl"
    assert run(tmp_path, source, bad) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert (f"{bad}:3" if is_jsonl else str(bad)) in errors
    assert not (tmp_path / "out" / "mine").exists()
    assert run(tmp_path, source, bad, "--skip_bad") == 0
    kept = split_documents(read(tmp_path, "train")) + split_documents(read(tmp_path, "val"))
    assert sorted(kept) == sorted([b"one", b"two"] + [b"good"] * is_jsonl)


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "", " \n", "two"])
    assert run(tmp_path, tmp_path / "empty.txt", source) == 0
    assert read(tmp_path, "train").tolist() == [256, *b"one"]
    assert read(tmp_path, "val").tolist() == [256, *b"two"]


def test_parquet(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
        assert run(tmp_path, path) == 2
        assert "pyarrow" in capsys.readouterr().err
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), path)
    assert run(tmp_path, path) == 2
    assert "row 2" in capsys.readouterr().err
    assert run(tmp_path, path, "--text_key", "id") == 2
    assert not (tmp_path / "out" / "mine").exists()
    assert run(tmp_path, path, "--text_key", "body") == 2
    assert run(tmp_path, path, "--skip_bad") == 0
    assert read(tmp_path, "train").tolist() == [256, *b"one"]
    assert read(tmp_path, "val").tolist() == [256, *b"two"]


def test_a_row_of_parquet_that_is_not_utf8(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = pyarrow.array([b"one", b"caf\xe9", b"two"])
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, rows.buffers())
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": column}), path)
    assert run(tmp_path, path) == 2
    assert "row 2" in capsys.readouterr().err
    assert run(tmp_path, path, "--skip_bad") == 0
    assert read(tmp_path, "val").tolist() == [256, *b"two"]


# --- The corpus ---


def test_every_document_once_in_order_with_the_fraction_asked_for(tmp_path):
    texts = made_up(0, 500)
    fraction = 0.07
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    assert run(tmp_path, source, "--val_fraction", fraction, "--shard_tokens", 100_000) == 0
    expected = {"train": [], "val": []}
    total = {"train": 0, "val": 0}
    for document in texts:  # the documented rule, written out
        split = "val" if total["val"] < fraction * sum(total.values()) else "train"
        expected[split].append(document.encode())
        total[split] += len(document.encode()) + 1
    for split in ("train", "val"):
        assert split_documents(read(tmp_path, split)) == expected[split]
    num_shards = -(-total["train"] // 100_000)
    names = [f"mine_train_{number:06d}.bin" for number in range(1, num_shards + 1)]
    found = sorted(path.name for path in (tmp_path / "out" / "mine").iterdir())
    assert found == [*names, "mine_val_000000.bin"]


def test_any_number_of_processes_gives_the_same_files(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", made_up(1, 1500))
    assert source.stat().st_size > 5 * text.BATCH  # several batches for each process
    for processes in (1, 3):
        assert run(tmp_path, source, "--processes", processes, "--shard_tokens", 10**6,
                   out=f"out{processes}") == 0
    one, three = ({path.name: path.read_bytes() for path in (tmp_path / out / "mine").iterdir()}
                  for out in ("out1", "out3"))
    assert one == three
    assert len(one) == 3


def test_a_worker_that_dies_is_a_user_error():
    batches = [[documents.Piece("a", True, 1, "book.txt")]]
    with pytest.raises(UserError, match="book.txt"):
        list(text.encode_batches(batches, "no such encoding", 2))


def test_one_long_book_trains_and_validates(tmp_path):
    book = "\r\n".join(made_up(3, 300)) + "é" * 100_000 + "\n"  # 2 bytes across the blocks' ends
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + book.encode())
    assert run(tmp_path, tmp_path / "book.txt", "--val_fraction", 0.2) == 0
    train = split_documents(read(tmp_path, "train"))
    val = split_documents(read(tmp_path, "val"))
    assert len(train) == len(val) + 1 > 1  # a document begins only where the book changes sides
    assert len(b"".join(train)) + len(b"".join(val)) == len(book.encode())
    assert b"".join(val) in book.encode()
    assert b"".join(train).endswith("é\n".encode())


@pytest.mark.parametrize("words", [
    ["nothing.jsonl"], ["folder"], ["table.csv"], ["one.jsonl"], ["empty.jsonl"], ["no.parquet"],
    ["two.jsonl", "--val_fraction", "1"], ["two.jsonl", "--val_fraction", "0"],
    ["two.jsonl", "--shard_tokens", "0"], ["two.jsonl", "--processes", "0"],
    ["two.jsonl", "--text_key", "content"], ["two.jsonl", "--name", "a/b"],
    ["two.jsonl", "--name", ""], ["two.jsonl", "--name", ".."], ["two.jsonl", "--name", "a\nb"],
    ["two.jsonl", "--name=-x"], ["two.jsonl", "--name", "\udce9"],
    ["two.jsonl", "--name", "laptop"], ["two.jsonl", "--name", "fineweb10B"],
    [""], ["two.jsonl", "--dir", ""], ["long" * 100],
    ["two.jsonl", "--dir", "full"], ["two.jsonl", "--dir", "one.jsonl"]], ids=repr)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "full"):
        (tmp_path / folder).mkdir()
    for name in ("table.csv", "no.parquet", "full/old_train_000001.bin"):
        (tmp_path / name).write_text("x")
    for number, name in enumerate(("empty.jsonl", "one.jsonl", "two.jsonl")):
        write_jsonl(tmp_path / name, ["text"] * number)
    before = sorted(tmp_path.rglob("*"))
    usual = ["--name", "mine", "--dir", "mine", "--encoding", "bytes", "--processes", "1"]
    assert text.main([*usual, *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", made_up(4, 50))
    original = text.encode_batches

    def interrupted(*args):
        yield from list(original(*args))
        raise KeyboardInterrupt
    monkeypatch.setattr(text, "encode_batches", interrupted)
    assert run(tmp_path, source, "--shard_tokens", 5000) == 130  # shards were written by then
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_empty_folder_is_used(tmp_path, monkeypatch):
    """It may be a mount point, which cannot be replaced by a rename."""
    folder = tmp_path / "out" / "mine"
    folder.mkdir(parents=True)
    inode = folder.stat().st_ino
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    assert run(tmp_path, source) == 0
    assert folder.stat().st_ino == inode
    assert len(list(folder.iterdir())) == 2


def test_names_are_no_patterns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text, "DATA_FOLDER", tmp_path / "data")
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    name = "it's [1] *"
    source = write_jsonl(Path("b [x]?.jsonl"), made_up(3, 60))
    for other in ("it's 1 x", name):
        command = [str(source), "--name", other, "--encoding", "bytes", "--processes", "1",
                   "--val_fraction", "0.2"]
        assert text.main(command) == 0
    printed = capsys.readouterr().out
    lines = printed[printed.index(f"    {name!r}: Track("):]
    track = eval("{" + lines + "}", {"Track": train_gpt.Track})[name]
    assert shlex.split(track.get_data)[3:6] == [str(source), "--name", name]
    for pattern in (track.train_files, track.val_files):
        (path,) = train_gpt.TokenStream(pattern, track, 1).paths
        assert path.parent.name == name


def test_shards_that_cannot_be_moved_are_kept(tmp_path, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    replace = os.replace

    def fail(old, new):
        if Path(new).parent == tmp_path / "out" / "mine":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(old, new)
    monkeypatch.setattr(os, "replace", fail)
    assert run(tmp_path, source) == 2
    errors = capsys.readouterr().err
    (kept,) = (tmp_path / "out" / "mine").iterdir()
    assert len(errors.splitlines()) == 1 and str(kept) in errors
    assert sorted(path.name for path in kept.iterdir()) == ["mine_train_000001.bin",
                                                            "mine_val_000000.bin"]


def test_two_builds_at_once_do_not_harm_each_other(tmp_path, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    original = text.encode_batches
    folder = tmp_path / "out" / "mine"

    def slower_than_another_build(*args):
        write_shard(folder / "mine_train_000001.bin", np.arange(3))
        yield from original(*args)
    monkeypatch.setattr(text, "encode_batches", slower_than_another_build)
    assert run(tmp_path, source) == 2
    assert open_shard(folder / "mine_train_000001.bin").tolist() == [0, 1, 2]
    (kept,) = folder.glob(".unfinished-*")
    assert str(kept) in capsys.readouterr().err
    assert len(list(kept.iterdir())) == 2


def test_what_a_killed_build_left_is_named_and_stays(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    leftover = tmp_path / "out" / "mine" / f".unfinished-{os.getpid()}"
    leftover.mkdir(parents=True)
    (leftover / "mine_train_000001.bin").write_text("half")
    assert run(tmp_path, source) == 0
    assert str(leftover) in capsys.readouterr().out
    assert (leftover / "mine_train_000001.bin").read_text() == "half"
    assert read(tmp_path, "val").tolist() == [256, *b"two"]


ENDLESS = """
import sys
from data import text

def endless(*args):
    while True:
        yield [text.Piece("word " * 10_000, True, 50_000, "made up")]

text.read_batches = endless
if __name__ == "__main__":
    sys.exit(text.main(sys.argv[1:]))
"""


@pytest.fixture
def endless_build(tmp_path):
    """A build in a process group of its own, with two worker processes, that has begun."""
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "endless.py").write_text(ENDLESS)  # a file, which the worker processes import
    words = [source, "--name", "mine", "--dir", tmp_path / "out" / "mine", "--encoding", "bytes",
             "--processes", 2, "--shard_tokens", 10_000]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "endless.py"), *map(str, words)], text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not list((tmp_path / "out").glob("mine/.unfinished-*/*.bin")):
        assert process.poll() is None
        time.sleep(0.1)
    yield process
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129),
                                          (signal.SIGINT, 130)], ids=str)
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_signal_leaves_nothing(endless_build, tmp_path, send, number, code):
    send(endless_build.pid, number)
    errors = endless_build.communicate()[1]  # returns when no process of the build is left
    assert endless_build.returncode == code
    assert len(errors.splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_workers_end_with_a_main_process_that_was_killed(endless_build):
    endless_build.kill()
    endless_build.communicate(timeout=600)  # returns when no process of the build is left


def test_as_many_workers_as_this_process_has_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5}, raising=False)
    assert usable_cores() == 2


# --- The track that it prints ---


def printed_track(printed):
    """(name, Track) of the lines that end what the command printed."""
    lines = printed[printed.index("    'mine': Track("):]
    ((name, track),) = eval("{" + lines + "}", {"Track": train_gpt.Track}).items()
    return name, track


@pytest.mark.parametrize("place", ["data", "beside it's [1]/data"])
def test_the_printed_track_is_the_corpus(tmp_path, monkeypatch, capsys, place):
    repository = tmp_path / "repository"
    (repository / "data").mkdir(parents=True)
    monkeypatch.setattr(text, "DATA_FOLDER", repository / "data")
    monkeypatch.setattr(train_gpt, "ROOT", repository)
    folder = (repository if place == "data" else tmp_path) / place / "mine"
    source = write_jsonl(tmp_path / "a.jsonl", made_up(3, 60))
    assert run(tmp_path, source, "--dir", folder, "--val_fraction", 0.2) == 0
    name, track = printed_track(capsys.readouterr().out)
    assert (name, track.vocab_size, track.eot_token) == ("mine", 257, 256)
    for pattern in (track.train_files, track.val_files):
        stream = train_gpt.TokenStream(pattern, track, 1)
        assert [path.parent.resolve() for path in stream.paths] == [folder]
    assert 0 < track.val_tokens < len(stream) <= track.val_tokens + text.VAL_LENGTH + 1


def test_the_printed_track_suits_the_settings_that_it_takes(tmp_path, capsys):
    hp = train_gpt.parse_arguments(["--track=laptop"])
    assert text.STEP_TOKENS == hp.batch_size * hp.sequence_length
    assert text.VAL_LENGTH == hp.val_length
    assert text.MAX_VAL_TOKENS == train_gpt.TRACKS["laptop"].val_tokens
    source = write_jsonl(tmp_path / "a.jsonl", made_up(4, 900))
    assert run(tmp_path, source, "--val_fraction", 0.5) == 0
    assert printed_track(capsys.readouterr().out)[1].val_tokens == text.MAX_VAL_TOKENS


def test_the_track_of_a_corpus_that_exists_is_printed_again(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", made_up(3, 60))
    assert run(tmp_path, source, "--val_fraction", 0.2) == 0
    track = printed_track(capsys.readouterr().out)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "mine").iterdir()}
    for words in ([source], [source, "--encoding", "gpt2"]):  # the shards tell the encoding
        assert run(tmp_path, *words) == 2
        out, errors = capsys.readouterr()
        assert printed_track(out) == track
        assert len(errors.splitlines()) == 1 and str(tmp_path / "out" / "mine") in errors
    assert run(tmp_path, source, "--name", "other") == 2
    assert "Track(" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_too_little_text_gives_no_track(tmp_path, capsys):
    assert run(tmp_path, write_jsonl(tmp_path / "a.jsonl", made_up(5, 20))) == 0
    assert "Track(" not in capsys.readouterr().out


def test_a_text_becomes_a_track_that_trains(tmp_path, monkeypatch, capsys):
    """As data/README.md explains it."""
    (tmp_path / "run.sh").touch()  # marks the folder of a project
    monkeypatch.setattr(text, "DATA_FOLDER", tmp_path / "data")
    (tmp_path / "book.txt").write_text("\n".join(made_up(6, 150)))
    words = ["--name", "mine", "--encoding", "bytes", "--processes", "1"]
    assert text.main([str(tmp_path / "book.txt"), *words]) == 0
    printed = capsys.readouterr().out
    pasted = printed[printed.index("    'mine': Track("):]
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    script = tmp_path / "train_gpt.py"
    script.write_text(script.read_text().replace("TRACKS = {\n", "TRACKS = {\n" + pasted))
    command = [sys.executable, "train_gpt.py", "--track=mine", "--num_steps=2", "--device=cpu",
               "--model_dim=32", "--ngram_rows=1021"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "step:2/2" in done.stdout
