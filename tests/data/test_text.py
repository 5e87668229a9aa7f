"""data/text.py and data/encoders.py: known ids, no document lost, the same result for any number of processes."""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import VAL_TOKENS, with_val_tokens

import train_gpt
from data import encoders, text
from data.encoders import InputError, cut_blocks, encode_texts
from train_gpt import open_shard

REPOSITORY = Path(__file__).resolve().parents[1]
CORPUS = REPOSITORY.parent / "shared" / "corpus"  # beside the project on some machines, never needed
WORDS = "the of Ünïcödé and 1234 tokens; it's \U0001f600 \u3000 naïve\r\n\n  x".split(" ")


@pytest.fixture
def gpt2(monkeypatch):
    """Skips unless GPT-2's vocabulary is on this machine: a test downloads nothing."""
    if (CORPUS / "tiktoken_cache").is_dir():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CORPUS / "tiktoken_cache"))
    elif not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("no GPT-2 vocabulary: set TIKTOKEN_CACHE_DIR to a folder that holds it")
    return "gpt2"


def sample(seed, count, longest=400):
    """Documents of random words: none empty, some of one word."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) + "." for _ in range(count)]


def write_jsonl(path, documents, key="text"):
    path.write_text("".join(json.dumps({key: document, "source": 1}) + "\n" for document in documents))
    return path


def run(tmp_path, *words, out="out"):
    """Exit code of the command into tmp_path/out/mine, by bytes and in one process unless words say otherwise."""
    usual = ["--name", "mine", "--dir", tmp_path / out / "mine", "--encoding", "bytes", "--processes", 1]
    return text.main([str(word) for word in [*usual, *words]])  # of a flag given twice the last counts


def read(tmp_path, split, out="out"):
    """The tokens of all shards of a split, one after another."""
    paths = sorted((tmp_path / out / "mine").glob(f"mine_{split}_*.bin"))
    return np.concatenate([open_shard(path) for path in paths])


def split_documents(tokens, end_of_text=256):
    """The documents of a token stream that begins with an end-of-text token, as bytes."""
    starts = np.flatnonzero(tokens == end_of_text)
    assert starts[0] == 0
    return [part[1:].astype(np.uint8).tobytes() for part in np.split(tokens, starts[1:])]


def test_known_ids_of_bytes():
    assert [ids.tolist() for ids in encode_texts("bytes", ["Aé\n", "\ud800"])] == [[65, 195, 169, 10], [63]]
    assert encode_texts("bytes", ["A"])[0].dtype == np.uint16


def test_known_ids_of_gpt2(gpt2):
    hello, special = encode_texts(gpt2, ["Hello world", "<|endoftext|>"])
    assert hello.tolist() == [15496, 995] and hello.dtype == np.uint16
    assert 50256 not in special  # the characters of a text are no end of a document
    encoding = encoders.load_encoding(gpt2)
    assert (encoding.end_of_text, encoding.vocab_size) == (50256, 50257)


def test_gpt2_corpus_is_the_one_made_elsewhere(gpt2, tmp_path):
    if not CORPUS.is_dir():
        pytest.skip(f"{CORPUS} is not on this machine")
    documents = [json.loads(line)["text"] for line in (CORPUS / "documents.jsonl").open()][:300]
    assert run(tmp_path, write_jsonl(tmp_path / "a.jsonl", documents), "--encoding", "gpt2") == 0
    mine = np.concatenate([read(tmp_path, split) for split in ("train", "val")])
    theirs = [open_shard(path) for path in sorted(CORPUS.glob("*.bin"))]
    known = {part.tobytes() for tokens in theirs for part in np.split(tokens, np.flatnonzero(tokens == 50256)[1:])}
    parts = np.split(mine, np.flatnonzero(mine == 50256)[1:])
    assert len(parts) == 300 and all(part.tobytes() in known for part in parts)


def test_no_vocabulary_and_no_network(monkeypatch, tmp_path):
    import requests
    import tiktoken.registry
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)

    def offline(*args, **kwargs):
        raise requests.ConnectionError("no route")
    monkeypatch.setattr(requests, "get", offline)
    with pytest.raises(InputError, match="TIKTOKEN_CACHE_DIR"):
        encoders.ENCODINGS["gpt2"]()


def test_every_document_once_in_order_with_the_share_asked_for(tmp_path):
    documents, fraction = sample(0, 500), 0.07
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    assert run(tmp_path, source, "--val_fraction", fraction, "--shard_tokens", 100_000) == 0
    expected, total = {"train": [], "val": []}, {"train": 0, "val": 0}
    for document in documents:  # the documented rule, written out
        split = "val" if total["val"] < fraction * sum(total.values()) else "train"
        expected[split].append(document.encode())
        total[split] += len(document.encode()) + 1
    for split in ("train", "val"):
        assert split_documents(read(tmp_path, split)) == expected[split]
    assert abs(total["val"] / sum(total.values()) - fraction) < max(map(len, expected["val"])) / sum(total.values())
    shards = -(-total["train"] // 100_000)
    names = sorted(path.name for path in (tmp_path / "out" / "mine").iterdir())
    assert names == [f"mine_train_{number:06d}.bin" for number in range(1, shards + 1)] + ["mine_val_000000.bin"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def track_of(printed):
    """The track whose lines end what the command printed, as (name, Track)."""
    lines = printed.splitlines()
    begin = max(i for i, line in enumerate(lines) if ": Track(" in line)
    ((name, track),) = eval("{" + "\n".join(lines[begin:]) + "\n}", {"Track": train_gpt.Track}).items()
    return name, track


@pytest.mark.parametrize("encoding, place", [("bytes", "data"), ("gpt2", "data"), ("bytes", "beside it's [1]/data")])
def test_the_track_to_paste_is_the_corpus(request, tmp_path, monkeypatch, capsys, encoding, place):
    """Its files, vocabulary and validation tokens: there are so many, and the preset that it takes divides them."""
    request.getfixturevalue("gpt2") if encoding == "gpt2" else None
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path / "repository")
    train_gpt.ROOT.mkdir()
    directory = tmp_path / "repository" / place / "mine" if place == "data" else tmp_path / place / "mine"
    source = write_jsonl(tmp_path / "a.jsonl", sample(3, 60))
    assert run(tmp_path, source, "--encoding", encoding, "--dir", directory, "--val_fraction", 0.2) == 0
    name, track = track_of(capsys.readouterr().out)
    loaded = encoders.load_encoding(encoding)
    assert (name, track.vocab_size, track.eot_token) == ("mine", loaded.vocab_size, loaded.end_of_text)
    preset = train_gpt.of_track(train_gpt.PRESETS, name)
    assert track.val_tokens > 0 and track.val_tokens % preset["val_length"] == 0
    train, val = (train_gpt.TokenStream(files, track, track.val_tokens + 1)
                  for files in (track.train_files, track.val_files))
    assert len(val) <= track.val_tokens + preset["val_length"]
    assert track.get_data.startswith("python -m data.text ") and f"--encoding {encoding}" in track.get_data
    assert [path.parent.resolve() for stream in (train, val) for path in stream.paths] == [directory] * 2


def test_with_more_text_as_many_are_validated_as_on_the_laptop_track(tmp_path, capsys):
    assert run(tmp_path, write_jsonl(tmp_path / "a.jsonl", sample(4, 900)), "--val_fraction", 0.5) == 0
    assert track_of(capsys.readouterr().out)[1].val_tokens == train_gpt.TRACKS["laptop"].val_tokens


def test_too_little_text_for_a_track_is_said_instead(tmp_path, capsys):
    assert run(tmp_path, write_jsonl(tmp_path / "a.jsonl", sample(5, 20))) == 0
    printed = capsys.readouterr().out
    assert "Track(" not in printed and "--val_fraction" in printed


def test_from_a_text_to_a_sample(sandbox, monkeypatch, capsys):
    """As data/README.md shows it: shards, the track pasted, a run, a checkpoint, a prompt. The other track is as before."""
    monkeypatch.setattr(train_gpt, "ROOT", sandbox.path)
    (sandbox.path / "book.txt").write_text("\n".join(sample(6, 150)))
    assert text.main([str(sandbox.path / "book.txt"), *"--name mine --encoding bytes --processes 1".split()]) == 0
    script, printed = sandbox.path / "train_gpt.py", capsys.readouterr().out
    pasted = printed[printed.index("    'mine': Track("):]
    script.write_text(script.read_text().replace("TRACKS = {\n", "TRACKS = {\n" + pasted))
    assert with_val_tokens((REPOSITORY / "train_gpt.py").read_text().replace("TRACKS = {\n", "TRACKS = {\n" + pasted),
                           VAL_TOKENS) == script.read_text()
    done = sandbox("--track=mine", "--num_steps=3", "--save_every=3")
    assert done.returncode == 0 and "track mine" in done.stdout, done.stderr
    done = sandbox("--track=mine", "--prompt=The ", "--resume=latest", "--sample_tokens=20", tiny=[])
    assert done.returncode == 0 and done.stdout.startswith("The ") and not done.stderr
    assert len(list((sandbox.path / "records/scratch").glob("*.txt"))) == 1
    assert sandbox().returncode == 0


def test_any_number_of_processes_gives_the_same_files(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", sample(1, 1500))
    assert source.stat().st_size > 5 * text.BATCH  # enough for each process to have several batches
    for processes in (1, 3):
        assert run(tmp_path, source, "--processes", processes, "--shard_tokens", 10**6, out=f"out{processes}") == 0
    one, three = [{path.name: path.read_bytes() for path in (tmp_path / out / "mine").iterdir()}
                  for out in ("out1", "out3")]
    assert one == three and len(one) == 3


def test_command_with_workers(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", sample(2, 50))
    words = [source, "--name", "mine", "--encoding", "bytes", "--processes", "2", "--dir", tmp_path / "out" / "mine"]
    done = subprocess.run([sys.executable, "-m", "data.text", *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")  # not a terminal: no progress bar
    assert len(split_documents(read(tmp_path, "train"))) + len(split_documents(read(tmp_path, "val"))) == 50


def test_workers_do_not_import_torch():
    code = "import sys, data.text; sys.exit('torch' in sys.modules)"  # a spawned worker imports the main module
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_a_worker_that_dies_is_reported(monkeypatch):
    with pytest.raises(InputError, match="--processes"):
        list(text.encode_batches([[encoders.Piece("a", True, 1)]], "no such encoding", 2))


@pytest.mark.parametrize("seed", range(20))
def test_blocks_are_tokenized_as_the_whole(seed):
    regex = pytest.importorskip("regex")
    pattern = regex.compile(pytest.importorskip("tiktoken_ext.openai_public").r50k_pat_str)  # GPT-2's splitting pattern
    rng = random.Random(seed)
    whole = "".join(rng.choices(" \n\r\t\xa0\x1c\u2028ab12'!é漢", [6, 3, 1, 1] + [1] * 11, k=rng.randint(0, 3000)))
    cuts = sorted(rng.choices(range(len(whole) + 1), k=30))
    chunks = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    blocks = list(cut_blocks(chunks, size=40))
    assert "".join(blocks) == whole and all(blocks)
    assert [piece for block in blocks for piece in pattern.findall(block)] == pattern.findall(whole)
    assert len(blocks) >= min(len(whole) // 1000, 3)  # and it was cut


def test_a_long_book_alone_trains_and_validates(tmp_path):
    book = "\r\n".join(sample(3, 300)) + "é" * 100_000 + "\n"  # two-byte characters across boundaries
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + book.encode())
    assert run(tmp_path, tmp_path / "book.txt", "--val_fraction", 0.2) == 0
    parts = {split: split_documents(read(tmp_path, split)) for split in ("train", "val")}
    assert len(parts["train"]) == len(parts["val"]) + 1 > 1  # a new beginning only where the book changes sides
    train, val = [b"".join(parts[split]) for split in ("train", "val")]
    assert len(train) + len(val) == len(book.encode()) and val in book.encode() and train.endswith("é\n".encode())
    assert not book.encode().startswith(val)


def test_text_files_are_documents_in_sorted_order(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    for name in ("b/2.TXT", "a.txt", "c.txt", "b/1.txt"):
        (tmp_path / "in" / name).write_text(name)
    write_jsonl(tmp_path / "in" / "b" / "3.jsonl", ["in jsonl", "and again"])
    (tmp_path / "in" / "b" / "4.csv").write_text("not text")
    assert run(tmp_path, tmp_path / "in" / "c.txt", tmp_path / "in", "--val_fraction", 0.001) == 0  # c.txt given twice
    assert split_documents(read(tmp_path, "train")) == [b"c.txt", b"b/1.txt", b"b/2.TXT", b"in jsonl", b"and again"]
    assert split_documents(read(tmp_path, "val")) == [b"a.txt"]


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "", " \n", "two"])
    assert run(tmp_path, tmp_path / "empty.txt", source) == 0
    assert read(tmp_path, "train").tolist() == [256, *b"one"] and read(tmp_path, "val").tolist() == [256, *b"two"]


BAD = {"latin.txt": "caf\xe9 con leche".encode("latin-1"), "cut.txt": "é".encode()[:1],
       "bad.jsonl": b'{"text": "good"}\n\n{"text": "cut of', "key.jsonl": b'{"text": "good"}\n\n{"content": "x"}\n',
       "type.jsonl": b'{"text": "good"}\n\n{"text": ["x"]}\n', "list.jsonl": b'{"text": "good"}\n\n["text"]\n',
       "utf8.jsonl": b'{"text": "good"}\n\n{"text": "\xff"}\n'}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_document_is_named_or_skipped(tmp_path, capfd, name):
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    (tmp_path / name).write_bytes(BAD[name])
    assert run(tmp_path, source, tmp_path / name) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1 and (f"{tmp_path / name}:3 " if "jsonl" in name else str(tmp_path / name)) in errors[0]
    assert list((tmp_path / "out").iterdir()) == []  # neither shards nor a folder for them
    assert run(tmp_path, source, tmp_path / name, "--skip_bad") == 0
    kept = split_documents(read(tmp_path, "train")) + split_documents(read(tmp_path, "val"))
    assert sorted(kept) == sorted([b"one", b"two"] + [b"good"] * ("jsonl" in name))


@pytest.mark.parametrize("words", [
    ["nothing.jsonl"], ["folder"], ["table.csv"], ["one.jsonl"], ["empty.jsonl"], ["no.parquet"],
    ["two.jsonl", "--val_fraction", "1"], ["two.jsonl", "--val_fraction", "0"], ["two.jsonl", "--shard_tokens", "0"],
    ["two.jsonl", "--processes", "0"], ["two.jsonl", "--text_key", "content"], ["two.jsonl", "--name", "a/b"],
    ["two.jsonl", "--dir", "full"], ["two.jsonl", "--dir", "one.jsonl"]], ids=" ".join)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capfd, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "full"):
        (tmp_path / folder).mkdir()
    for name in ("table.csv", "no.parquet", "full/old_train_000001.bin"):
        (tmp_path / name).write_text("x")
    for number, name in enumerate(("empty.jsonl", "one.jsonl", "two.jsonl")):
        write_jsonl(tmp_path / name, ["text"] * number)
    before = sorted(tmp_path.rglob("*"))
    command = {"--name": "mine", "--dir": "mine", "--encoding": "bytes", "--processes": "1"}
    command.update(zip(words[1::2], words[2::2], strict=True))
    assert text.main([words[0], *(word for pair in command.items() for word in pair)]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_flags_are_refused(tmp_path):
    for flag in ("--shards", "--proc"):  # no such flag; an abbreviation
        with pytest.raises(SystemExit) as stop:
            text.main(["a.txt", "--name", "mine", flag, "2"])
        assert stop.value.code == 2


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", sample(4, 50))

    def interrupted(*args):
        yield from list(original(*args))
        raise KeyboardInterrupt
    original = text.encode_batches
    monkeypatch.setattr(text, "encode_batches", interrupted)
    assert run(tmp_path, source, "--shard_tokens", 5000) == 130  # whole shards were written by then
    assert list((tmp_path / "out").iterdir()) == []


def test_parquet(tmp_path, monkeypatch, capfd):
    (tmp_path / "a.parquet").write_bytes(b"")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
        assert run(tmp_path, tmp_path / "a.parquet") == 2 and "pip install pyarrow" in capfd.readouterr().err
    pyarrow = pytest.importorskip("pyarrow", reason="the rest needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), tmp_path / "a.parquet")
    assert run(tmp_path, tmp_path / "a.parquet") == 2 and "row 2" in capfd.readouterr().err
    assert run(tmp_path, tmp_path / "a.parquet", "--text_key", "id") == 2
    assert run(tmp_path, tmp_path / "a.parquet", "--text_key", "body") == 2
    assert run(tmp_path, tmp_path / "a.parquet", "--skip_bad") == 0
    assert read(tmp_path, "train").tolist() == [256, *b"one"] and read(tmp_path, "val").tolist() == [256, *b"two"]
