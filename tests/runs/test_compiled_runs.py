"""torch.compile changes no numbers, and nothing is compiled after the warm-up.

Where the compiler would take long, a backend takes its place that keeps the graphs as they are.
What is compiled on CUDA is tested in test_cuda.py and by tools/simulate.
"""
import dataclasses
import functools
import os
from pathlib import Path

import pytest
import small
import torch
from conftest import at_window, away_from_zero, metric_lines
from run_helpers import validate_less

import train_gpt
from train_gpt import Optimizer, Runtime, Schedule, TokenStream

CPU = torch.device("cpu")
ALONE = Runtime(0, 1, CPU)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were compiled so far. They run as they are."""
    graphs = []
    compile_module = torch.nn.Module.compile

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def compile_with_keep(self, **options):
        compile_module(self, **{**options, "backend": keep})

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with_keep)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


@pytest.mark.slow
def test_nothing_compiles_after_the_warm_up(recipe, recipe_model, tmp_path, monkeypatch, graphs):
    """No step of any stage, and no validation."""
    small.write_corpus(tmp_path, train_tokens=10_000)
    small.install(train_gpt, tmp_path, monkeypatch, recipe=True)
    validate_less(monkeypatch)
    track = train_gpt.TRACKS["laptop"]
    stream = TokenStream(track.train_files, track, 1)
    val_stream = TokenStream(track.val_files, track, 1)
    optimizer = Optimizer(recipe_model, recipe, torch.float32)
    train_gpt.compile_model(recipe_model, optimizer, CPU)
    train_gpt.warm_up(recipe_model, optimizer, stream, recipe, ALONE)
    after_warm_up = len(graphs)
    assert after_warm_up > 0

    loader = train_gpt.BatchLoader(stream, recipe, ALONE)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(recipe.num_steps + 1):
            schedule = Schedule(step, recipe, CPU)
            if schedule.unties:
                optimizer.untie()
            if step % 4 == 0 or step == recipe.num_steps:
                train_gpt.validate(recipe_model, val_stream, schedule, recipe, ALONE)
            if step < recipe.num_steps:
                train_gpt.training_step(recipe_model, optimizer, loader.next(), schedule)
    loader.close()
    assert len(graphs) == after_warm_up


def test_growing_window_compiles_flex_attention_once(recipe, graphs):
    """As on CUDA, but forward only, because FlexAttention has no backward pass on CPUs. Short, long
    and paired layers give the loss of chunked_attention."""
    models = [away_from_zero(train_gpt.build_model(recipe, CPU, torch.float32, flex))
              for flex in (True, False)]
    with_flex, with_chunks = models
    with_flex.load_state_dict(with_chunks.state_dict())
    train_gpt.compile_model(with_flex, Optimizer(with_flex, recipe, torch.float32), CPU)
    tokens = torch.randint(256, (1, 256))
    with torch.no_grad():
        with_flex(tokens, tokens, at_window(64, recipe))
        with torch.compiler.set_stance("fail_on_recompile"):
            for window in (64, 100, 104):
                tokens[0, window] = 256  # a document begins here
                schedule = at_window(window, recipe)
                losses = [model(tokens, tokens, schedule)[1].item() for model in models]
                assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    # One graph for all layers of a kind: a layer with value embeddings has more inputs, one with
    # MUDD or XSA more operations, and layer 0 adds no n-grams.
    kinds = {(layer.attention, layer.value_table is None, layer.mudd, layer.xsa, i == 0)
             for i, layer in enumerate(recipe.layers) if layer.attention}
    with_attention = [graph for graph in graphs if "flex_attention" in str(graph.graph)]
    assert len(with_attention) == len(kinds)


@pytest.mark.parametrize("flag, problem, compiled, explained", [
    ("auto", "", True, False), ("auto", "no compiler", False, True), ("off", "no compiler", False,
    False), ("on", "", True, False)])
def test_auto_does_without_a_compiler_that_does_not_work(hp, monkeypatch, flag, problem, compiled,
                                                         explained):
    """--compile on is refused then (test_errors.py)."""
    monkeypatch.setattr(train_gpt, "compiler_problem", lambda device: problem)
    monkeypatch.setattr(train_gpt, "use_compile_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(Runtime, "sum", lambda self, *values: [float(value) for value in values])
    hp = dataclasses.replace(hp, compile=flag)
    gpu = Runtime(0, 1, torch.device("cuda", 0))
    found, reason = train_gpt.choose_compilation(hp, gpu)
    assert (found, bool(reason)) == (compiled, explained)


@pytest.mark.parametrize("variable", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_compiling_that_torch_was_told_to_disable_is_not_logged(hp, monkeypatch, variable):
    monkeypatch.setattr(train_gpt, "use_compile_cache", lambda: None)
    monkeypatch.setenv(variable, "1")  # torch has read the first one at its import
    with torch._dynamo.config.patch(disable=variable == "TORCH_COMPILE_DISABLE"):
        on = dataclasses.replace(hp, compile="on")
        compiled, reason = train_gpt.choose_compilation(on, ALONE)
    assert not compiled and variable in reason


@pytest.mark.parametrize("obstacle", ["none", "file", "read-only", "space", "quote"])
def test_cache_that_cannot_be_made_is_replaced(tmp_path, monkeypatch, capfd, obstacle):
    """The place that is taken instead is named, and exists."""
    root = tmp_path / {"space": "my project", "quote": "it's"}.get(obstacle, "project")
    root.mkdir()
    if obstacle == "file":
        (root / ".cache").touch()
    if obstacle == "read-only":  # root may write anywhere, so the file system refuses here
        def refuse(**options):
            raise PermissionError(13, "Permission denied")
        monkeypatch.setattr(train_gpt.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(train_gpt, "ROOT", root)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    warnings = []
    monkeypatch.setattr(train_gpt.log, "warning", warnings.append)
    train_gpt.use_compile_cache()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.is_dir()
    assert (folder == root / ".cache" / "inductor") == (obstacle == "none")
    assert [str(folder) in warning for warning in warnings] == [True] * (obstacle != "none")


@pytest.mark.slow
def test_compiled_run_is_the_run_without_compiling(home):
    plain = home.run()
    compiled = home.run("--compile=on")
    assert compiled.code == 0, compiled.err

    def losses(done):
        return {line.split("loss:")[0]: float(line.split("loss:")[1])
                for line in metric_lines(done.out)}

    assert len(losses(plain)) == 8
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-3)
