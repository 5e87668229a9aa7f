"""torch.compile changes no numbers, and nothing is compiled after the warm-up.

Where the compiler would take long, a backend takes its place that keeps the graphs as they are.
What is compiled on CUDA is tested in test_cuda.py and by tools/simulate.
"""
import functools

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
