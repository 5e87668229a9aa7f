"""A mistake of the user ends a run with exit code 2 and one line on stderr that names the mistake.

One table holds the mistakes. What is no mistake, but a defect of the script, has a traceback.
"""
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
from run_helpers import (
    LIMIT,
    assert_one_line,
    checkpoint,
    checkpoints,
    finish,
    logged_lines,
    no_warm_up,
)

import train_gpt

PATCHES = Path(__file__).with_name("run_patches.py")  # patches for processes
TRAIN = "data/laptop/laptop_train_000001.bin"
VAL = "data/laptop/laptop_val_000000.bin"
GET_DATA = train_gpt.TRACKS["laptop"].get_data


# --- Flags ----------------------------------------------------------------------------------------

FLAGS = {
    "unknown flag": (["--moun_lr=1"], ["--moun_lr"]),
    "abbreviated flag": (["--num_step=3"], ["--num_step"]),
    "words without a flag": (["laptop"], ["laptop"]),
    "flag without its value": (["--seed"], ["--seed"]),
    "no number": (["--num_steps=many"], ["--num_steps", "many"]),
    "no whole number": (["--num_steps=1.5"], ["--num_steps", "1.5"]),
    "unknown track": (["--track=moon"], ["--track", "moon", "fineweb", "laptop"]),
    "unknown choice": (["--dtype=float64"], ["--dtype", "float64", "bfloat16"]),
    "no steps": (["--num_steps=0"], ["--num_steps", "0"]),
    "negative number": (["--muon_lr=-1"], ["--muon_lr", "-1"]),
    "NaN": (["--muon_lr=nan"], ["--muon_lr", "nan"]),
    "infinite": (["--head_lr=inf"], ["--head_lr", "inf"]),
    "NaN share": (["--cooldown=nan"], ["--cooldown", "nan"]),
    "log at no step": (["--log_every=0"], ["--log_every", "0"]),
    "no cooldown": (["--cooldown=0"], ["--cooldown"]),
    "extension is all": (["--extension=1"], ["--extension"]),
    "softcap of 0": (["--logit_cap=0"], ["--logit_cap"]),
    "softcap that underflows": (["--logit_cap=100"], ["--logit_cap", "100"]),
    "unigrams": (["--ngrams=1"], ["--ngrams", "1"]),
    "7-grams": (["--ngrams=7"], ["--ngrams", "7"]),
    "odd number of heads": (["--num_heads=3", "--model_dim=36"], ["--num_heads", "3"]),
    "width of the heads": (["--model_dim=36"], ["--model_dim", "36", "--num_heads"]),
    "width of the gates": (["--model_dim=8"], ["--model_dim", "8"]),
    "sequence length": (["--sequence_length=200"], ["--sequence_length", "200", "128"]),
    "validation length": (["--val_length=1000"], ["--val_length", "1000", "128"]),
    "validation length that does not divide": (["--val_length=384"], ["--val_length", "384"]),
    "part of a validation sequence": (
        ["--val_tokens=1000"], ["--val_tokens", "1000", "--val_length", "2048"]),
    "more validation than there is": (["--val_tokens=32768"], ["--val_tokens", "32768", "16384"]),
    "nanoGPT's number of layers": (["--n_layer=4"], ["--n_layer", "LAYERS"]),
    "hyphens": (["--num-steps=4"], ["--num-steps", "--num_steps"]),
    "misspelled flag": (["--num_head=4"], ["--num_heads"]),
    "save between updates of Adam": (
        ["--adam_every=2", "--save_every=3"], ["--save_every", "3", "--adam_every", "2"]),
    "log outside of records/": (["--entry=../elsewhere"], ["--entry", "../elsewhere"]),
    "log in another place": (["--entry=/tmp"], ["--entry", "/tmp"]),
    "too few tokens": (["--batch_size=64"], ["laptop_train_*.bin", "6,000", "16,385", GET_DATA]),
    "missing checkpoint": (["--resume=nowhere.pt"], ["nowhere.pt"]),
    "folder as checkpoint": (["--resume=records"], ["records"]),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flag(home, name):
    flags, named = FLAGS[name]
    assert_one_line(home.run(*flags), *named)
    assert not home.scratch.exists()  # no log of a run that never began


def test_no_gpu(home, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_line(home.run("--device=cuda"), "--device")


# --- Environment ----------------------------------------------------------------------------------

RENDEZVOUS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
RANKS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}
ENVIRONMENTS = {
    "only the number of ranks": ({"WORLD_SIZE": "2"}, ["RANK", "WORLD_SIZE"]),
    "no address": (RANKS, ["MASTER_ADDR", "WORLD_SIZE"]),
    "no number of ranks": ({"WORLD_SIZE": "many"}, ["WORLD_SIZE"]),
    "empty number of ranks": ({"WORLD_SIZE": ""}, ["WORLD_SIZE"]),
    "no ranks": ({**RANKS, **RENDEZVOUS, "WORLD_SIZE": "0"}, ["RANK", "WORLD_SIZE"]),
    "rank beyond the last": ({**RANKS, **RENDEZVOUS, "RANK": "3"}, ["RANK", "3"]),
    "port beyond the last": (
        {**RANKS, **RENDEZVOUS, "WORLD_SIZE": "2", "MASTER_PORT": "99999"}, ["99999"]),
    "host that does not resolve": (
        {**RANKS, **RENDEZVOUS, "WORLD_SIZE": "2", "MASTER_ADDR": "no-such-host.invalid"},
        ["no-such-host.invalid"]),
    "rank is no number": ({**RANKS, **RENDEZVOUS, "RANK": "first"}, ["RANK", "first"]),
    "ranks do not divide the batch": ({**RANKS, **RENDEZVOUS}, ["--batch_size", "3"]),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment(home, monkeypatch, name):
    variables, named = ENVIRONMENTS[name]
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert_one_line(home.run(), *named)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_rank_that_never_comes_ends_the_wait(home, rank):
    """After JOIN_SECONDS, two here. Rank 0 waits for the other rank, rank 1 for rank 0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    variables = {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                 "MASTER_PORT": port}
    process = home.start(env={**os.environ, **variables}, patch=f"{PATCHES}:join_in_two_seconds")
    _, err = finish(process)
    assert process.returncode == 2, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"localhost:{port}" in errors[0]


# --- Files ----------------------------------------------------------------------------------------


def remove(name):
    return lambda root: (root / name).unlink()


def change(name, function):
    """Replace a file's bytes by function(bytes)."""
    def apply(root):
        path = root / name
        path.write_bytes(function(path.read_bytes()))
    return apply


def replace_tokens(name, tokens):
    return lambda root: small.write_shard(root / name, tokens)


def log_folder_is_a_file(root):
    (root / "records").mkdir()
    (root / "records/scratch").touch()


FILES = {
    "no data": (lambda root: shutil.rmtree(root / "data"), ["laptop_train_*.bin", GET_DATA]),
    "no validation data": (remove(VAL), ["laptop_val_*.bin", GET_DATA]),
    "too few validation tokens": (
        replace_tokens(VAL, small.words(100, seed=1)), ["laptop_val_*.bin", "100", "16,385"]),
    "other magic number": (change(TRAIN, lambda data: b"BINS" + data[4:]), [TRAIN, GET_DATA]),
    "other version": (change(TRAIN, lambda data: data[:4] + b"\7" + data[5:]), [TRAIN, "7"]),
    "truncated": (change(TRAIN, lambda data: data[:-10]), [TRAIN, GET_DATA]),
    "longer than its header says": (change(TRAIN, lambda data: data + b"1234"), [TRAIN]),
    "header alone, cut": (change(VAL, lambda data: data[:100]), [VAL]),
    "empty": (change(TRAIN, lambda data: b""), [TRAIN]),
    "tokens of another vocabulary": (
        replace_tokens(TRAIN, small.words(3000, seed=2) + 5000), [TRAIN, "257", GET_DATA]),
    "log folder is a file": (log_folder_is_a_file, ["records/scratch", "--entry"]),
}


@pytest.mark.parametrize("name", FILES)
def test_file(home, name):
    mistake, named = FILES[name]
    mistake(home.root)
    before = {path: path.read_bytes() for path in home.root.rglob("*.bin")}
    assert_one_line(home.run(), *named)
    assert {path: path.read_bytes() for path in home.root.rglob("*.bin")} == before


def test_mistake_that_is_found_in_training_is_in_the_log(home, monkeypatch):
    no_warm_up(monkeypatch)
    tokens = small.words(3000, seed=2)
    tokens[-300:] = 300
    small.write_shard(home.root / TRAIN, tokens)
    done = home.run("--num_steps=30")
    assert_one_line(done, TRAIN, "300")
    assert done.err.strip() == logged_lines(home)[-1]


def test_text_without_documents(recipe_home):
    """The recipe cuts documents, which begin at the token 256."""
    for number in (1, 2):
        shard = recipe_home.root / f"data/laptop/laptop_train_{number:06d}.bin"
        small.write_shard(shard, small.words(20_000, seed=1) % 256)
    assert_one_line(recipe_home.run(), TRAIN, "256", GET_DATA)


# --- Checkpoints ----------------------------------------------------------------------------------


def without(key):
    def apply(state):
        del state[key]
        return state
    return apply


CHECKPOINTS = {
    "text": lambda path: path.write_text("step 3"),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "other bytes": lambda path: path.write_bytes(path.read_bytes()[::-1]),
    "list": lambda path: torch.save([1, 2], path),
    "nanoGPT's": lambda path: torch.save(
        {"model": {"lm_head.weight": torch.zeros(2)}, "iter_num": 1, "config": {}}, path),
    "without the optimizer": lambda path: torch.save(
        without("optimizer")(torch.load(path, weights_only=True)), path),
}


@pytest.fixture
def saved(home, monkeypatch):
    """A home with the checkpoint of step 3, and its path."""
    no_warm_up(monkeypatch)
    assert home.run("--save_every=3").code == 0
    checkpoint(home, 6).unlink()
    return home, checkpoint(home, 3)


def test_checkpoint_that_is_none(saved):
    home, path = saved
    good = path.read_bytes()
    for damage in CHECKPOINTS.values():
        path.write_bytes(good)
        damage(path)
        assert_one_line(home.run("--resume", path, flags_before=[]), path.name)
        assert_one_line(home.run("--resume=latest"), path.name)


@pytest.mark.parametrize("flags", [["--model_dim=64"], ["--ngram_rows=999"], ["--ngrams=2"]])
def test_checkpoint_of_another_model(saved, flags):
    home, path = saved
    assert_one_line(home.run("--resume", path, *flags), path.name)


def test_checkpoint_can_not_run_code(saved):
    home, path = saved

    class Code:
        def __reduce__(self):
            return (home.root / "executed").touch, ()

    torch.save({"model": Code()}, path)
    assert_one_line(home.run("--resume", path), path.name)
    assert not (home.root / "executed").exists()


# --- The tables and groups of who edits the script ------------------------------------------------

ROWS = {
    "attention": dict(attention="wide"),
    "value_table": dict(value_table=7),
    "skip_from": dict(skip_from=1),
    "attn_input_layer": dict(attn_input_layer=1),
}
STAGE_ROWS = {
    "until": dict(until=0.1),
    "batch_multiplier": dict(batch_multiplier=0),
    "mtp_weights": dict(mtp_weights=(1, 0.5)),
    "tied": dict(tied=True),
}


@pytest.mark.parametrize("field", ROWS)
def test_inconsistent_layer(home, monkeypatch, field):
    first, second = train_gpt.LAYERS["laptop"]
    layers = (first, second._replace(**ROWS[field]))
    monkeypatch.setitem(train_gpt.LAYERS, "laptop", layers)
    assert_one_line(home.run(), "LAYERS", "1", field)


@pytest.mark.parametrize("field", STAGE_ROWS)
def test_inconsistent_stage(home, monkeypatch, field):
    (stage,) = train_gpt.STAGES["laptop"]
    stages = (stage._replace(until=0.5), stage._replace(**STAGE_ROWS[field]))
    monkeypatch.setitem(train_gpt.STAGES, "laptop", stages)
    assert_one_line(home.run(), "STAGES", "1", field)


@pytest.mark.parametrize("times", [0, 2])
def test_parameter_that_is_not_in_exactly_one_group(home, monkeypatch, times):
    groups = train_gpt.optimizer_groups

    def changed_groups(hp, dtype):
        rest = [group for group in groups(hp, dtype) if group.name != "skip_gate"]
        head = rest.pop()
        return rest + [head] * times

    monkeypatch.setattr(train_gpt, "optimizer_groups", changed_groups)
    assert_one_line(home.run(), "optimizer_groups", "head.linear.weight")


# --- In training ----------------------------------------------------------------------------------


def replace_step(monkeypatch, step, function):
    """From `step` on, a training step returns function(model, loss)."""
    training_step = train_gpt.training_step

    def replaced_step(model, optimizer, batch, schedule):
        steps_before = optimizer.num_updates
        loss = training_step(model, optimizer, batch, schedule)
        return function(model, loss) if steps_before >= step else loss

    monkeypatch.setattr(train_gpt, "training_step", replaced_step)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_ends_the_run_at_the_next_line(home, monkeypatch, value):
    no_warm_up(monkeypatch)
    replace_step(monkeypatch, 3, lambda model, loss: loss * value)
    done = home.run("--save_every=2", "--log_every=2")
    assert_one_line(done, "4", "--resume")
    assert checkpoints(home) == [checkpoint(home, 2)]


def test_weights_that_are_not_finite_are_not_saved(home, monkeypatch):
    """Where no line with the loss is due before the next checkpoint."""
    def poison(model, loss):
        with torch.no_grad():
            model.blocks[0].mlp.fc.weight[0, 0, 0] = torch.nan
        return loss

    no_warm_up(monkeypatch)
    replace_step(monkeypatch, 2, poison)
    done = home.run("--save_every=2", "--log_every=100", "--val_every=0")
    assert_one_line(done, "4")
    assert checkpoints(home) == [checkpoint(home, 2)]
    weights = torch.load(checkpoint(home, 2), weights_only=True)["model"]
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MemoryError()])
@pytest.mark.parametrize("where", ["warm_up", "training_step", "validate"])
def test_out_of_memory(home, monkeypatch, error, where):
    def fail(*args):
        raise error

    no_warm_up(monkeypatch)
    monkeypatch.setattr(train_gpt, where, fail)
    assert_one_line(home.run(), "--micro_batch")


def test_defect_of_the_script_has_a_traceback(home, monkeypatch):
    """An exception that is no mistake of the user is not hidden."""
    def fail(*args):
        raise RuntimeError("a defect")

    monkeypatch.setattr(train_gpt, "warm_up", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        home.run()


def test_failing_compiler(home, monkeypatch):
    def fail(function):
        raise ValueError("no header file\nPython.h")

    monkeypatch.setattr(torch, "compile", fail)
    assert_one_line(home.run("--compile=on"), "--compile off", "Python.h")
    assert not home.scratch.exists()


@pytest.mark.slow
@pytest.mark.parametrize("variables", [
    {"CXX": "/nowhere/g++"}, {"CXX": "false"},
    {"CXX": "false", "TORCHDYNAMO_SUPPRESS_ERRORS": "1"}])
def test_missing_or_broken_compiler(home, variables):
    """Of torch.compile itself. torch would otherwise run some of it uncompiled."""
    variables = {**os.environ, **variables, "TORCHINDUCTOR_CACHE_DIR": str(home.root / "cold")}
    process = home.start("--compile=on", env=variables)
    _, err = finish(process)
    assert process.returncode == 2
    assert err.count("\n") == 1 and "--compile off" in err


@pytest.mark.slow
def test_two_ranks_say_a_mistake_once(home):
    process = home.start("--batch_size=3", ranks=2)
    _, err = finish(process)
    assert process.returncode != 0
    assert len([line for line in err.splitlines() if "--batch_size" in line]) == 1


@pytest.mark.slow
def test_python_without_the_packages(home):
    """-S: Python without what is installed."""
    done = subprocess.run([sys.executable, "-S", train_gpt.__file__], capture_output=True,
                          text=True, timeout=LIMIT)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "run.sh" in done.stderr


def test_help_lists_all_flags(capfd):
    assert train_gpt.main(["--help"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    for name in train_gpt.Hyperparameters.__dataclass_fields__:
        assert f"--{name}" in out
