"""Whole runs of the real script on a small corpus: log, golden losses, warm-up, resume, ranks, mistakes."""
import ast
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SEARCHES, TINY, at_window, away_from_zero, metric_lines, words

import train_gpt
from data.shards import write_shard
from train_gpt import SEPARATOR, Optimizer, Runtime, TokenStream, warm_up

CPU = torch.device("cpu")
CPU_ALONE = Runtime(0, 1, CPU)
GOLDEN = Path(__file__).with_name("golden_losses.txt")  # a run's name, step, val_loss
RENEW = ("the losses are not those of tests/golden_losses.txt; if the change was meant, renew them, and say why in the "
         "commit: RENEW_GOLDEN=1 ./run.sh test tests/test_runs.py -k golden")


def log_of(sandbox, folder="records/scratch"):
    (path,) = (sandbox.path / folder).glob("*.txt")
    return path.read_text()


def val_losses(text):
    return [(int(step), float(loss)) for step, loss in re.findall(r"^step:(\d+)/\d+ val_loss:(\S+)", text, re.M)]


@pytest.mark.parametrize("name, flags", [("sandbox", ["--num_steps=16", "--val_every=4"]), ("recipe_sandbox", [])])
def test_golden_losses(request, name, flags):
    """A change that is not meant to change the numbers must not change them: the laptop track's tables, and all of the
    full recipe's."""
    done = request.getfixturevalue(name)(*flags)
    assert done.returncode == 0, done.stderr
    measured = val_losses(done.stdout)
    rows = [line.split() for line in GOLDEN.read_text().splitlines()]
    if os.environ.get("RENEW_GOLDEN"):
        rows = [row for row in rows if row[0] != name] + [(name, step, f"{loss:.4f}") for step, loss in measured]
        GOLDEN.write_text("".join(f"{' '.join(map(str, row))}\n" for row in sorted(rows, key=lambda row: row[0])))
    golden = [(int(step), float(loss)) for run, step, loss in rows if run == name]
    assert [step for step, _ in measured] == [step for step, _ in golden], RENEW
    for (_, ours), (_, wanted) in zip(measured, golden, strict=True):
        assert ours == pytest.approx(wanted, abs=3e-3), RENEW  # kernels of other CPUs round otherwise
    untrained = float(re.search(r"^step:1/\d+ train_loss:(\S+)", done.stdout, re.M)[1])
    words = {"sandbox": 384, "recipe_sandbox": 10_240 // 96}[name]  # that compete in the first stage's softmax
    assert untrained == pytest.approx(math.log(words), abs=5e-3) and golden[-1][1] < 4.5


def test_log(sandbox):
    done = sandbox("--entry=2026-01-01_Test", "--sample_tokens=20", "--seed=5")
    assert done.returncode == 0, done.stderr
    source, environment, metrics = log_of(sandbox, "records/2026-01-01_Test").split(SEPARATOR + "\n")
    assert source == (sandbox.path / "train_gpt.py").read_text()
    told = json.loads(environment[environment.index("\n{"):environment.rindex("}") + 1])
    assert told["hyperparameters"]["seed"] == 5 and told["hyperparameters"]["track"] == "laptop"
    assert told["torch"] == torch.__version__ and told["world_size"] == 1 and told["activations"] == "float32"
    assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]{12}", told["data_fingerprint"]) and "--seed=5" in told["command"]
    for name in ("git_commit", "git_dirty", "python", "cuda", "device", "device_count", "code_hash", "target"):
        assert name in told
    step_lines = [line for line in metrics.splitlines() if line.startswith("step:")]
    for line in step_lines:
        assert re.fullmatch(r"step:\d+/6 (val|train)_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms", line)
    assert [line.split()[0] for line in step_lines if "val_loss" in line] == ["step:3/6", "step:6/6"]
    assert [line.split()[0] for line in step_lines if "train_loss" in line] == [f"step:{s}/6" for s in range(1, 7)]
    assert "tokens_per_second:" in metrics and "peak_memory_per_rank:" in metrics and "\nsample:\n| " in metrics
    assert metric_lines(done.stdout) == metric_lines(metrics)
    for pattern in SEARCHES:  # the whole log, the source that it embeds included
        found = [line for line in log_of(sandbox, "records/2026-01-01_Test").splitlines() if re.search(pattern, line)]
        assert found == [line for line in step_lines if re.search(pattern, line)] and found, pattern
    assert "\ntarget 1.1: missed\n" in metrics


def test_runs_repeat_bit_for_bit_and_resume_exactly(sandbox):
    """6 steps = 3 + resume + 3, in losses, final weights and optimizer state."""
    first = sandbox("--save_every=3", "--val_every=2")
    assert first.returncode == 0, first.stderr
    scratch = sandbox.path / "records/scratch"
    (middle,) = scratch.glob("*_step000003.pt")
    whole = torch.load(next(scratch.glob("*_step000006.pt")), weights_only=True)
    (scratch / middle.with_suffix(".kept").name).write_bytes(middle.read_bytes())
    for path in scratch.glob("*_step000006.pt"):
        path.unlink()
    second = sandbox("--save_every=3", "--val_every=2", f"--resume={middle}")
    assert second.returncode == 0, second.stderr
    resumed = torch.load(next(scratch.glob("*_step000006.pt")), weights_only=True)
    after = [line for line in metric_lines(first.stdout) if int(re.match(r"step:(\d+)", line)[1]) > 3]
    assert metric_lines(second.stdout) == after and len(after) == 5
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    for a, b in zip(whole["optimizer"]["buckets"], resumed["optimizer"]["buckets"], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert "resumed from" in log_of(sandbox)  # in the first run's log


def test_resume_refuses_what_does_not_belong(sandbox):
    assert sandbox("--save_every=3").returncode == 0
    checkpoint = next((sandbox.path / "records/scratch").glob("*_step000003.pt"))
    done = sandbox(f"--resume={checkpoint}", "--muon_lr=0.1", "--seed=2")
    assert_one_line(done, "muon_lr is 0.035, here 0.1", "seed is 0, here 2")  # all that differs
    (sandbox.path / "train_gpt.py").open("a").write("\n# another script\n")
    assert_one_line(sandbox(f"--resume={checkpoint}"), "its code_hash is")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert_one_line(sandbox(f"--resume={checkpoint}"), "resume")


@pytest.fixture
def small_stream(tmp_path, monkeypatch):
    """Training and validation tokens of the laptop track in two small shards; 4,096 tokens are validated."""
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    track = dataclasses.replace(train_gpt.TRACKS["laptop"], val_tokens=4096)
    monkeypatch.setitem(train_gpt.TRACKS, "laptop", track)
    write_shard(tmp_path / "x_000001.bin", words(10_000, seed=1))
    return TokenStream("x_*.bin", track, 1)


@pytest.mark.parametrize("settings, model", [("hp", "tiny_model"), ("recipe", "recipe_model")])
def test_warm_up_leaves_nothing(request, small_stream, settings, model):
    """After the warm-up the weights, the optimizer and the random numbers to come are what they were, bit for bit."""
    hp, model = request.getfixturevalue(settings), request.getfixturevalue(model)
    optimizer = Optimizer(model, hp, torch.float32)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    updates = []
    optimizer.changes = dict.fromkeys(optimizer.changes, lambda direction, group, *rest: updates.append(
        group.name) or train_gpt.change(direction, group, *rest))
    warm_up(model, optimizer, small_stream, hp, CPU_ALONE)
    assert {"attention", "mlp_in", "head", "values", "ngrams"} <= set(updates)  # it did train meanwhile
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters()) and optimizer.num_updates == 0
    assert not any(state.any() for bucket in optimizer.buckets for state in bucket.state.values())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.fixture
def graphs(monkeypatch):
    """Module.compile with a compiler that only collects: the graphs so far."""
    graphs, compile_module = [], torch.nn.Module.compile

    def collect(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **options: compile_module(self, backend=collect, **options))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def test_the_warm_up_compiles_all_that_a_run_of_all_stages_uses(recipe, recipe_model, small_stream, graphs):
    """No step, of any stage, and no validation compiles anything more."""
    optimizer = Optimizer(recipe_model, recipe, torch.float32)
    train_gpt.compile_parts(recipe_model, optimizer, CPU)
    warm_up(recipe_model, optimizer, small_stream, recipe, CPU_ALONE)
    compiled, loader = len(graphs), train_gpt.BatchLoader(small_stream, recipe, CPU_ALONE)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(recipe.num_steps + 1):
            schedule = train_gpt.Schedule(step, recipe, CPU)
            if schedule.unties:
                optimizer.untie()
            if step % 4 == 0 or step == recipe.num_steps:
                train_gpt.validate(recipe_model, small_stream, schedule, recipe, CPU_ALONE)
            if step < recipe.num_steps:
                train_gpt.training_step(recipe_model, optimizer, loader.next(), schedule)
    assert len(graphs) == compiled > 0


def test_compiled_parts_compute_the_same_gradients_and_a_growing_window_compiles_nothing(hp, monkeypatch):
    """With torch's compiler for CPUs, two kinds of blocks."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    monkeypatch.setitem(train_gpt.LAYERS, "laptop", hp.layers[1:])
    tiny_model = away_from_zero(train_gpt.build_model(hp, CPU, torch.float32, flex=False))
    tokens = torch.randint(256, (2, 128))
    tokens[0, 70] = 256  # a document begins here
    schedules = [at_window(w, hp) for w in (64, 100, 128)]

    def losses_and_gradients():
        tiny_model.zero_grad()
        results = [tiny_model(tokens, tokens.roll(-1), schedule) for schedule in schedules]
        (sum(objective for objective, _ in results) / tokens.numel()).backward()
        return ([loss.item() for _, loss in results],
                {name: p.grad.clone() for name, p in tiny_model.named_parameters() if p.grad is not None})

    wanted, wanted_gradients = losses_and_gradients()
    train_gpt.compile_parts(tiny_model, Optimizer(tiny_model, hp, torch.float32), CPU)
    tiny_model(tokens, tokens, schedules[0])[0].backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        losses, gradients = losses_and_gradients()
    assert losses == pytest.approx(wanted, abs=1e-4) and gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.any() and (gradient - wanted_gradients[name]).norm() < 1e-3 * gradient.norm(), name


def test_a_growing_window_compiles_flex_attention_once(recipe, graphs):
    """As on CUDA, but forward only, for FlexAttention has no backward on the CPU: paired, short and long layers."""
    hp = recipe
    models = [away_from_zero(train_gpt.build_model(hp, CPU, torch.float32, flex)) for flex in (True, False)]
    models[0].load_state_dict(models[1].state_dict())
    train_gpt.compile_parts(models[0], Optimizer(models[0], hp, torch.float32), CPU)
    tokens = torch.randint(256, (1, 256))
    with torch.no_grad():
        models[0](tokens, tokens, at_window(64, hp))
        with torch.compiler.set_stance("fail_on_recompile"):
            for window in (64, 100, 104):
                tokens[0, window] = 256
                flex, chunked = (model(tokens, tokens, at_window(window, hp))[1].item() for model in models)
                assert flex == pytest.approx(chunked, abs=1e-4)
    kinds = {(layer.attention, layer.value_table is None) for layer in hp.layers if layer.attention}
    assert sum("flex_attention" in str(graph.graph) for graph in graphs) == len(kinds) == 6  # one for all of a kind


def test_two_ranks_print_the_losses_of_one(sandbox):
    one, two = sandbox(), sandbox(ranks=2)
    assert one.returncode == two.returncode == 0, two.stderr
    a, b = ([float(line.split("loss:")[1]) for line in metric_lines(run.stdout)] for run in (one, two))
    assert len(a) == 8 and a == pytest.approx(b, abs=5e-3)
    assert "2 x " in two.stdout and len(list((sandbox.path / "records/scratch").glob("*.txt"))) == 2


def test_second_epoch_is_said_once(sandbox):
    done = sandbox("--num_steps=30", "--val_every=0", "--log_every=0")  # 15,360 of 6,000 tokens
    assert done.returncode == 0 and done.stdout.count("epoch 2") == 1, done.stderr


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_profile_traces_training_steps_and_names_their_parts(sandbox, compiled):
    """Of two layers, three steps; the validations of a run that would make one at each step are left out. What is
    compiled: by a compiler that has no kernels to build."""
    source = (sandbox.path / "train_gpt.py").read_text()
    assert source.count("(torch.compile, dynamic=False, ") == 1
    source = source.replace("(torch.compile, dynamic=False, ", '(torch.compile, dynamic=False, backend="eager", ')
    (sandbox.path / "train_gpt.py").write_text(source)
    done = sandbox("--profile", "--num_steps=8", "--val_every=1", "--log_every=0", f"--compile={compiled}")
    assert done.returncode == 0, done.stderr
    (path,) = (sandbox.path / "records/scratch").glob("*.trace.json")
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    counts = {name: names.count(name) for name in ("forward", "backward", "optimizer", "attention", "MLP", "head")}
    assert counts == {"forward": 3, "backward": 3, "optimizer": 3, "attention": 6, "MLP": 6, "head": 3}
    assert f"trace: {path} (open it in https://" in done.stdout and len(val_losses(done.stdout)) == 1
    rows = done.stdout[done.stdout.index("# of Calls"):done.stdout.index("Self CPU time total")].splitlines()[2:-1]
    assert len(rows) == 10 and any("aten::" in row for row in rows) and "validat" not in done.stdout[:done.stdout.index("trace:")]
    assert_one_line(sandbox("--profile", "--num_steps=5"), "--profile", "--num_steps 6")


def test_num_steps_scales_what_is_counted_in_steps_and_was_not_named(sandbox):
    hp = train_gpt.parse_arguments(["--track=fineweb", "--num_steps=139"])
    assert (hp.momentum_warmup_steps, hp.extension_steps, hp.momentum_cooldown_steps) == (30, 4, 5)
    hp = train_gpt.parse_arguments(["--track=fineweb", "--num_steps=139", "--extension_steps=7"])
    assert (hp.momentum_warmup_steps, hp.extension_steps) == (30, 7)
    done = sandbox("--num_steps=17", "--val_every=0")
    assert ", 17 steps (momentum rises in the first 5, " in done.stdout, done.stderr


def assert_one_line(done, *named):
    """Exit code 2, one line on stderr that names the thing, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    for name in named:
        assert name in done.stderr, done.stderr


def replace_shard(change):
    def mistake(root):
        path = root / "data/laptop/laptop_train_000001.bin"
        path.write_bytes(change(path.read_bytes()))
    return mistake


MISTAKES = {
    "no data": (lambda root: shutil.rmtree(root / "data"), [], ["laptop_train_*.bin", "python -m data.laptop"]),
    "no validation data": (lambda root: (root / "data/laptop/laptop_val_000000.bin").unlink(), [], ["laptop_val_"]),
    "too few tokens": (lambda root: None, ["--batch_size=64"], ["6,000 tokens", "16,385"]),
    "wrong magic": (replace_shard(lambda b: b"BINS" + b[4:]), [], ["train_000001.bin", "magic"]),
    "truncated": (replace_shard(lambda b: b[:-10]), [], ["train_000001.bin", "size"]),
    "ids beyond the vocabulary": (lambda root: write_shard(root / "data/laptop/laptop_train_000001.bin",
                                                           [5000] * 4000), [], ["5000", "257"]),
    "unknown track": (lambda root: None, ["--track=moon"], ["moon", "fineweb"]),
    "unknown flag": (lambda root: None, ["--moun_lr=1"], ["--moun_lr"]),
    "no GPU": (lambda root: None, ["--device=cuda"], ["--device cpu"]),
    "unwritable log folder": (lambda root: (root / "records/scratch").write_text("a file"), [], ["records", "--entry"]),
    "no checkpoint": (lambda root: None, ["--resume=nowhere.pt"], ["nowhere.pt"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line(sandbox, name):
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    mistake, flags, named = MISTAKES[name]
    mistake(sandbox.path)
    before = sorted(sandbox.path.rglob("*.bin"))
    assert_one_line(sandbox(*flags), *named)
    assert sorted(sandbox.path.rglob("*.bin")) == before and not list(sandbox.path.rglob("*.tmp"))


def test_text_without_an_end_of_text_token_can_not_be_cut(recipe_sandbox):
    """In one shard of two it is the rest of a document; in all of them there is no document to read."""
    first, second = (recipe_sandbox.path / f"data/laptop/laptop_train_{number:06d}.bin" for number in (1, 2))
    write_shard(second, [65] * 20_000)
    done = recipe_sandbox("--num_steps=3", "--val_every=0")
    assert done.returncode == 0, done.stderr
    write_shard(first, [65] * 20_000)
    assert_one_line(recipe_sandbox(), "train_000001.bin", "256", "python -m data.laptop")


def test_ranks_that_cannot_divide_the_batch(sandbox):
    done = sandbox("--batch_size=3", ranks=2)
    assert done.returncode != 0 and done.stderr.count("error: 3 sequences") == 1 and "--batch_size 4" in done.stderr


@pytest.mark.parametrize("variables, flags, named", [
    ({"NPROC": "3"}, [], ["8 sequences", "3 ranks"]), ({"NPROC": "2"}, ["--bogus=1"], ["--bogus"]),
    ({"NPROC": "0"}, [], ["NPROC"]), ({"SHARDS": "zz"}, [], ["SHARDS"]), ({"PYTHON": "/nowhere"}, [], ["/nowhere"])])
def test_run_sh_says_mistakes_in_one_line_before_it_fetches_data(tmp_path, variables, flags, named):
    for name in ("run.sh", "launch.py", "train_gpt.py"):  # no data/: had it been needed, that would be the error
        shutil.copy(REPOSITORY / name, tmp_path)
    done = subprocess.run(["bash", "run.sh", "--track=laptop", *flags], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHON": sys.executable, **variables})
    assert_one_line(done, *named)


@pytest.mark.parametrize("command", ["train_gpt.py --help", "-m data.text x.txt --name x", "-m data.laptop",
                                     "-m data.shards x.bin", "records/compare.py plot {log} -o x.svg"])
def test_a_python_without_the_packages_is_one_line(tmp_path, command):
    """-S: Python without what is installed."""
    log = tmp_path / "log.txt"
    log.write_text("step:0/1 val_loss:2.0 train_time:0ms step_avg:0ms\nstep:1/1 val_loss:1.0 train_time:1ms step_avg:1ms\n")
    done = subprocess.run([sys.executable, "-S", *command.format(log=log).split()], cwd=REPOSITORY, capture_output=True,
                          text=True)
    assert_one_line(done, "source .venv/bin/activate")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(
    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_out_of_memory_names_the_flags_to_lower(monkeypatch, capsys, error):
    def fail(hp, runtime):
        raise error
    monkeypatch.setattr(train_gpt, "train", fail)
    for flags, advice in ((["--micro_batch=1"], "--sequence_length 128 --batch_size 4"), ([], "--micro_batch 1")):
        assert train_gpt.main(["--track=laptop", *TINY, *flags]) == 2
        assert advice in capsys.readouterr().err


@pytest.mark.parametrize("memory, flags, advice", [
    (80e9, "off", ["--micro_batch", "1"]), (24e9, "on", ["--micro_batch", "1"]),
    (40e9, "off", "--micro_batch 1 --sequence_length 8192 --batch_size 16 --val_length 16384".split())])
def test_out_of_memory_on_a_gpu_names_a_length_that_fits(monkeypatch, capsys, memory, flags, advice):
    """Of 16,384 tokens a sequence takes 41 GB uncompiled, 8 GB compiled, beside 6 GB (./run.sh simulate)."""
    def fail(hp, runtime):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train_gpt, "train", fail)
    monkeypatch.setattr(train_gpt, "start_runtime", lambda hp: train_gpt.Runtime(0, 1, torch.device("cuda")))
    monkeypatch.setattr(train_gpt, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    assert train_gpt.main(["--track=fineweb", f"--compile={flags}"]) == 2
    assert f"use {' '.join(advice)}, or" in capsys.readouterr().err
    less, full = (train_gpt.parse_arguments(["--track=fineweb", *more]) for more in (advice, []))
    train_gpt.check_hyperparameters(less, 1)
    assert less.batch_size * less.sequence_length == full.batch_size * full.sequence_length


def test_compiling_without_a_compiler_is_one_line(sandbox):
    done = sandbox("--compile=on", env={"PATH": "/nowhere", "CXX": "", "CC": ""})
    assert_one_line(done, "g++ or clang++", "apt install build-essential python3-dev", "--compile off")


def test_what_torch_compile_would_miss(monkeypatch, tmp_path):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(train_gpt.sysconfig, "get_path", lambda name: str(tmp_path))
    for there, device, missing in (("", cuda, "gcc or clang"), ("", cpu, "g++"), ("g++", cuda, "gcc or clang"),
                                   ("clang", cpu, "g++"), ("gcc", cuda, "Python.h"), ("g++", cpu, "Python.h")):
        monkeypatch.setattr(train_gpt.shutil, "which", lambda name, there=there: name if name == there else None)
        assert missing in train_gpt.lacks_for_compile(device)
    (tmp_path / "Python.h").touch()
    assert not train_gpt.lacks_for_compile(cpu)  # with g++, as set last
    monkeypatch.setenv("CC", "/opt/cc")
    assert not train_gpt.lacks_for_compile(cuda)


def test_failed_run_says_so_in_its_log(sandbox):
    tokens = words(6000, seed=2)
    tokens[256 * int(np.random.RandomState(0).permutation((6000 - 1) // 256)[9]) + 10] = 300  # read at step 4
    write_shard(sandbox.path / "data/laptop/laptop_train_000001.bin", tokens)
    (sandbox.path / "data/laptop/laptop_train_000002.bin").unlink()
    done = sandbox()
    assert_one_line(done, "train_000001.bin", "300")
    assert re.search(r"^run failed at step 4: UserError: .*train_000001.bin", log_of(sandbox), re.M)


def test_full_disk_leaves_no_half_checkpoint(tmp_path, monkeypatch, capsys):
    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    model = torch.nn.Linear(2, 2)

    class Empty:
        state_dict = dict
    runtime, hp = Runtime(0, 1, torch.device("cpu")), train_gpt.Hyperparameters()
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    log = train_gpt.Log(hp, runtime, {"run_id": "a", "device": "a CPU"})
    train_gpt.save_checkpoint(train_gpt.Progress(), {"run_id": "a"}, model, Empty(), train_gpt.Watch(runtime), log)
    assert log.failed and "No space left" in capsys.readouterr().err
    assert [path.name for path in hp.folder.iterdir()] == ["a.txt"]


def test_a_run_resumed_from_an_older_checkpoint_keeps_what_it_saves(tmp_path, monkeypatch):
    """Not those of later steps that the run before had left."""
    class Empty:
        state_dict = dict
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    runtime, hp = Runtime(0, 1, torch.device("cpu")), train_gpt.Hyperparameters(keep=1)
    log, watch = train_gpt.Log(hp, runtime, {"run_id": "a", "device": "a CPU"}), train_gpt.Watch(runtime)
    for step in (6, 9, 3):
        train_gpt.save_checkpoint(train_gpt.Progress(step), {}, torch.nn.Linear(2, 2), Empty(), watch, log)
        os.utime(watch.checkpoint, (step, step))  # long ago
        assert watch.checkpoint.exists() and [*hp.folder.glob("*.pt")] == [watch.checkpoint]


def test_a_console_that_goes_away_ends_no_run(sandbox):
    """As with `| head -1`, or a tee that Ctrl-C has ended."""
    command = f"set -o pipefail; {sys.executable} train_gpt.py --track=laptop {' '.join(TINY)} | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=sandbox.path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("track laptop")
    assert "\ntarget 1.1: missed\n" in log_of(sandbox)


def test_import_has_no_effects():
    """At the top level stand definitions and constants only, but for what a program alone does. What a try holds are
    imports: where a package is missing and it is no program, it raises what they raise."""
    tree = ast.parse((REPOSITORY / "train_gpt.py").read_text())
    body = [inner for node in tree.body for inner in (node.body if isinstance(node, ast.Try) else [node])]
    guarded = [node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"]
    assert len(guarded) == 2 and guarded[-1] is body[-1]
    assert all(node in guarded or isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign))
               or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)
