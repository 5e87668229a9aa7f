"""Hostile input: every mutation of a shard, checkpoint, flag or log either works or ends with one line and exit code 2.

In one process and through main(), as the command line would; the number of cases is printed.
"""
import dataclasses
import io
import random
import shutil
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from conftest import TINY, words

import train_gpt
from data.shards import write_shard
from records import compare

RUN = ["--track=laptop", *TINY, "--num_steps=1", "--val_length=512", "--val_every=0", "--log_every=0"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A repository with small shards; the script runs in it, in this process, on few validation tokens."""
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    track = train_gpt.TRACKS["laptop"]
    monkeypatch.setitem(train_gpt.TRACKS, "laptop", dataclasses.replace(track, val_tokens=1024))
    monkeypatch.setattr(train_gpt, "_output_of", lambda *command: "")  # git takes longer than the run
    write_shard(tmp_path / "data/laptop/laptop_val_000000.bin", words(1025, seed=1))
    for number in (1, 2):
        write_shard(tmp_path / f"data/laptop/laptop_train_{number:06d}.bin", words(700, seed=1 + number))
    return tmp_path


def outcome(function, *args):
    """(exit code, stderr); fails on a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = function(*args)
    return code, err.getvalue()


def assert_right_or_one_line(case, function, *args):
    try:
        code, err = outcome(function, *args)
    except BaseException as error:
        pytest.fail(f"{case}: {type(error).__name__}: {error}")
    if code:
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, f"{case}: {code} {err}"
    return code


def say(capsys, number, of):
    with capsys.disabled():
        print(f"[{number} cases of {of}] ", end="")


def header_with(index, value):
    def change(data):
        header = np.frombuffer(data[:1024], "<i4").copy()
        header[index] = value
        return header.tobytes() + data[1024:]
    return change


def token_set(position, value):
    def change(data):
        tokens = np.frombuffer(data[1024:], "<u2").copy()
        tokens[position] = value
        return data[:1024] + tokens.tobytes()
    return change


def shard_mutations(size):
    """{name: function of the bytes}; those that leave a right shard are marked with 'right'."""
    count = (size - 1024) // 2
    cases = {f"field {i} is {value}": header_with(i, value) for i, values in (
        (0, (0, -1, 20240519, 20240801, 2**31 - 1)), (1, (0, 2, -1, 7)),
        (2, (-1, 0, 1, count - 1, count + 1, 10**6, 2**31 - 1, -2**31))) for value in values}
    cases |= {f"cut to {n} bytes": (lambda data, n=n: data[:n]) for n in
              (0, 1, 3, 4, 8, 11, 12, 512, 1023, 1024, 1025, 1026, size // 2, size - 3, size - 2, size - 1)}
    cases |= {f"{n} bytes more": (lambda data, n=n: data + b"\0" * n) for n in (1, 2, 1024)}
    cases |= {f"token {p} is {v}": token_set(p, v) for p in (0, count // 2, count - 1) for v in (257, 50256, 65535)}
    cases |= {"right: field 3 is used": header_with(3, 5), "right: zeros": lambda data: data[:1024] + bytes(2 * count),
              "other endianness": lambda data: np.frombuffer(data[:1024], "<i4").astype(">i4").tobytes() + data[1024:],
              "tokens of other endianness": lambda data: data[:1024] + np.frombuffer(
                  data[1024:], "<u2").astype(">u2").tobytes(),
              "text": lambda data: b"Once upon a time " * 200, "compressed": lambda data: b"\x1f\x8b" + data[2:]}
    return cases


def test_shards(home, capsys):
    number = 0
    for name in ("laptop_train_000001.bin", "laptop_train_000002.bin", "laptop_val_000000.bin"):
        path = home / "data/laptop" / name
        right = path.read_bytes()
        for case, change in shard_mutations(len(right)).items():
            path.write_bytes(change(right))
            code = assert_right_or_one_line(f"{name}, {case}", train_gpt.main, RUN)
            assert code == 0 or not case.startswith("right"), case
            if "token" in case and "train" not in name or case.startswith(("cut", "text")) or "more" in case:
                assert code == 2, f"{name}, {case}"
            number += 1
        path.unlink()
        (home / "whole.bin").write_bytes(right)
        for case, leads_to in {"right: a link": home / "whole.bin", "a link to nowhere": home / "nowhere",
                               "a link to itself": path, "a folder": None}.items():
            path.symlink_to(leads_to) if leads_to else path.mkdir()
            code = assert_right_or_one_line(f"{name}, {case}", train_gpt.main, RUN)
            assert (code == 0) == case.startswith("right"), case
            path.rmdir() if case == "a folder" else path.unlink()
            number += 1
        path.write_bytes(right)
    assert train_gpt.main(RUN) == 0  # the mutations are undone
    say(capsys, number, "shards")


def checkpoint_mutations(right, state):
    """{name: the state with one value of another type, size or range, or missing}."""
    cases = {}
    for path in [(key,) for key in state] + [("progress", key) for key in state["progress"]] + [
            ("optimizer", "buckets"), ("optimizer", "num_updates"), ("optimizer", "buckets", 0),
            ("optimizer", "buckets", -1, "exp_avg"), ("model", "embed.weight"), ("hyperparameters", "seed")]:
        for value in ("text", None, -1, [], {}, float("nan"), torch.zeros(3), "missing"):
            copy = torch.load(io.BytesIO(right), weights_only=True)
            place = copy
            for key in path[:-1]:
                place = place[key]
            if isinstance(value, str) and value == "missing":
                del place[path[-1]]
            else:
                place[path[-1]] = value
            cases[f"{'.'.join(map(str, path))} is {value}"] = copy
    return cases


def test_checkpoints(home, capsys):
    assert train_gpt.main([*RUN, "--save_every=1"]) == 0
    (path,) = (home / "records/scratch").glob("*.pt")
    right = path.read_bytes()
    assert train_gpt.main([*RUN, f"--resume={path}"]) == 0
    state = torch.load(path, weights_only=True)
    number, numbers = 0, random.Random(0)
    for size in [0, 1, 2, 64, 1000, len(right) // 2, len(right) - 1000, len(right) - 22, len(right) - 1]:
        path.write_bytes(right[:size])
        assert assert_right_or_one_line(f"cut to {size}", train_gpt.main, [*RUN, f"--resume={path}"]) == 2
        number += 1
    for _ in range(30):
        position = numbers.randrange(len(right))
        path.write_bytes(right[:position] + bytes([right[position] ^ 0xff]) + right[position + 1:])
        assert_right_or_one_line(f"byte {position} flipped", train_gpt.main, [*RUN, f"--resume={path}"])
        number += 1
    for case, changed in checkpoint_mutations(right, state).items():
        torch.save(changed, path)
        assert_right_or_one_line(case, train_gpt.main, [*RUN, f"--resume={path}"])
        number += 1
    path.unlink()
    for case, make in {"a folder": path.mkdir, "a link to nowhere": lambda: path.symlink_to(home / "nowhere"),
                       "text": lambda: path.write_text("hello"), "an array": lambda: np.save(path.open("wb"), 1),
                       "a list": lambda: torch.save([1, 2], path)}.items():
        make()
        assert assert_right_or_one_line(case, train_gpt.main, [*RUN, f"--resume={path}"]) == 2, case
        path.rmdir() if case == "a folder" else path.unlink()
        number += 1
    say(capsys, number, "checkpoints")


def test_hyperparameters(home, capsys):
    number = worked = 0
    endless = {"num_steps": ("1000000000000000000000",), "sample_tokens": ("1000000000000000000000",)}
    for f in dataclasses.fields(train_gpt.Hyperparameters):
        values = ["", "abc", "-1", "1e400", "0x10", "１２", "None", "nan", "inf", "-0", "0", "3", "1.5",
                  "99999999999999999999"]
        if f.type is bool:
            continue
        if f.type is str:
            values = ["", "abc", "/", "..", "a\nb", "x" * 300, "ü", "auto", "-", "records/../x", "~", "*"]
        if f.name in endless:
            values = [value for value in values if value not in ("3", "99999999999999999999")] + list(endless[f.name])
        for value in values:
            code = assert_right_or_one_line(f"--{f.name}={value!r}", train_gpt.main, [*RUN, f"--{f.name}={value}"])
            worked += code == 0
            shutil.rmtree(home / "records", ignore_errors=True)
            number += 1
    assert number / 10 < worked < number / 2  # so it was the value that mattered
    say(capsys, number, "flags")


def test_shards_of_cut_documents(home, recipe, capsys):
    """The loader of a run of all stages: what it reads begins with an end-of-text token, or one line."""
    path, number = home / "data/laptop/laptop_train_000001.bin", 0
    right, alone = path.read_bytes(), train_gpt.Runtime(0, 1, torch.device("cpu"))
    count = (len(right) - 1024) // 2

    def read():
        track = train_gpt.TRACKS["laptop"]
        loader = train_gpt.BatchLoader(train_gpt.TokenStream(track.train_files, track, 1), recipe, alone)
        for _ in range(recipe.num_steps):
            assert all((tokens[:, 0] == track.eot_token).all() for tokens, _ in loader.next())

    cases = {**shard_mutations(len(right)), "no document": lambda data: data[:1024] + b"\1\0" * count,
             "right: nothing but beginnings": lambda data: data[:1024] + b"\0\1" * count,
             "right: one document": lambda data: data[:1024] + b"\0\1" + b"\1\0" * (count - 1),
             "right: one begins at the end": lambda data: data[:1024] + b"\1\0" * (count - 1) + b"\0\1"}
    (home / "data/laptop/laptop_train_000002.bin").unlink()
    for case, change in cases.items():
        path.write_bytes(change(right))
        code = assert_right_or_one_line(case, train_gpt.run_as_program, read)
        zeros = case in ("no document", "right: zeros", "field 2 is 0")
        assert code == (2 if zeros else 0) or not case.startswith(("right", "no")), case
        number += 1
    say(capsys, number, "shards")


def test_logs(home, capsys):
    """compare.py on damaged logs: a result or one line."""
    assert train_gpt.main([*RUN, "--val_every=1", "--log_every=1"]) == 0
    (path,) = (home / "records/scratch").glob("*.txt")
    right, numbers, number = path.read_bytes(), random.Random(1), 0
    start = right.rindex(b"=" * 100)
    cuts = [0, 1, 99, start, start + 100, start + 101, start + 150, len(right) - 1]
    cases = [right[:n] for n in cuts] + [right[n:] for n in cuts] + [right * 3, right[start:] * 3, right[::-1]]
    for _ in range(60):
        data = bytearray(right)
        for _ in range(5):  # near the metrics, where it matters
            data[numbers.randrange(start - 2000, len(right))] = numbers.randrange(256)
        cases.append(bytes(data))
    for i, data in enumerate(cases):
        path.write_bytes(data)
        for command in (["table"], ["table", "--json"], ["table", "--markdown"], ["report", f"--out={home}/a.html"]):
            assert_right_or_one_line(f"log {i}", compare.main, [*command, str(path)])
        number += 1
    say(capsys, number, "logs")
