"""The four historical entries: the points in which they were nearly right once, to the last digit."""
import importlib.util
import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ENTRY_TINY, SEARCHES
from test_records import ADAMW, CPU, ENTRIES, MODERN, RECORDS, SMALL, VALUE, build, load, loss_of, small

from records import compare

# ---------------------------------------------------------------------------------------------------------------------
# Model

@pytest.mark.parametrize("entry", ENTRIES)
def test_epsilon_of_the_norm(entry):
    """AdamW's is 1e-6, the later ones' is float32's machine epsilon: told apart by inputs as small as their roots."""
    norm, epsilon = load(entry).norm, 1e-6 if entry == ADAMW else 1.1920929e-7
    x = 3e-4 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    wanted = x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
    torch.testing.assert_close(norm(x), wanted, rtol=1e-5, atol=0)
    assert (norm(x) / F.rms_norm(x, (64,), eps=1e-6) - 1).abs().max() > 1 or entry == ADAMW
    half = x.bfloat16()  # computed in float32, whose epsilon it is: bfloat16's own, 0.008, would leave next to nothing
    assert norm(half).dtype == torch.bfloat16
    torch.testing.assert_close(norm(half), norm(half.float()).bfloat16(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("entry", ENTRIES)
def test_order_of_rotation_and_norm(entry, monkeypatch):
    """ModernArch norms what it has rotated, the later ones rotate what they have normed, AdamW norms nothing.

    The bfloat16 tables change lengths by up to a part in 256: what was normed last has a mean square of 1, what was
    rotated last has not.
    """
    module, model, _ = small(entry)
    called, orders, given = [], [], []
    for name in ("norm", "rotate"):
        def spy(x, *rest, name=name, real=getattr(module, name)):  # noqa: B008
            called.append(name)
            return real(x, *rest)
        monkeypatch.setattr(module, name, spy)

    def attention(q, k, v, *rest):
        given.extend((q, k))
        orders.append(list(called))
        return v
    monkeypatch.setattr(module, "attention", attention)
    tokens = torch.randint(256, (1, 128), generator=torch.Generator().manual_seed(0))
    loss_of(entry, model, tokens, tokens)
    last = {ADAMW: ["rotate", "rotate"], MODERN: ["rotate", "norm", "rotate", "norm"]}
    wanted = last.get(entry, ["norm", "rotate", "norm", "rotate"])
    assert len(orders) == 4 and all(order[-len(wanted):] == wanted for order in orders)
    off = torch.stack([(x.square().mean(dim=-1) - 1).abs().max() for x in given])
    if entry == MODERN:
        assert off.max() < 1e-3  # the epsilon, beside small queries, makes it a little less than 1
    elif entry != ADAMW:
        assert off.min() > 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_precision_of_value_embed(dtype):
    """Frequencies are in the model's precision, as its other buffers would be; positions and angles in float32."""
    _, model, _ = build(VALUE, load(VALUE).parse_arguments(SMALL), dtype=dtype)
    frequency = 10_000.0 ** -(torch.arange(0, 16, 2).double() / 16)
    assert model.rotary.frequency.dtype == dtype
    torch.testing.assert_close(model.rotary.frequency, frequency.to(dtype), rtol=1e-6, atol=0)
    cos, sin = model.rotary(8192, CPU)
    angle = torch.arange(8192).double()[:, None] * model.rotary.frequency.double()
    assert (cos.double() - angle.cos()).abs().max() < 3e-3 and (sin.double() - angle.sin()).abs().max() < 3e-3
    exact = torch.arange(8192).double()[:, None] * frequency
    assert ((cos.double() - exact.cos()).abs().max() > 0.5) == (dtype == torch.bfloat16)  # far from 10000^(-2i/d)


# ---------------------------------------------------------------------------------------------------------------------
# Logs

METRIC = r"step:\d+/14 (val|train)_loss:\d+\.\d{4} train_time:\d+ms step_avg:(\d+\.\d\d|nan)ms"


@pytest.mark.parametrize("entry, target, said", [
    *((entry, "9.9", "reached at step 0 after 0.0 s") for entry in ENTRIES), (ADAMW, "1.10", "missed")])
def test_a_plain_search_of_a_log_finds_metrics_and_nothing_else(sandbox, entry, target, said):
    """Nothing in the source that each log embeds looks like a metric, nor does the line about the target."""
    script = sandbox.path / f"records/{entry}/train_gpt.py"
    source = script.read_text()
    assert source.count("True, 1.10,") == 1
    script.write_text(source.replace("True, 1.10,", f"True, {target},"))
    done = sandbox(script=f"records/{entry}/train_gpt.py", tiny=[*ENTRY_TINY, "--num_layers=1"])
    assert done.returncode == 0, done.stderr
    (log,) = (sandbox.path / "records/scratch").glob("*.txt")
    lines = log.read_text().splitlines()
    metrics = [line for line in lines if re.fullmatch(METRIC, line)]
    validations = [line for line in metrics if " val_loss:" in line]
    assert (len(metrics), len(validations)) == (14 + 6, 6)
    for pattern in SEARCHES:
        found = [line for line in lines if re.search(pattern, line)]
        wanted = [line for line in metrics if re.search(pattern, line)]
        assert found == wanted and len(found) in (6, 14, 20), pattern
    assert f"target {float(target)}: {said}" in lines
    (run,) = compare.read_log(str(log))
    assert run.complete and [step for step, _, _ in run.curve] == [0, 3, 6, 9, 12, 14]


@pytest.mark.parametrize("built_for, on_gpu", [("12.8", True), ("12.8", False), (None, False)])
def test_environment_names_cuda_where_it_is(monkeypatch, built_for, on_gpu):
    """The words of the public logs: what torch was compiled for, nvidia-smi; on a CPU no table that is not there."""
    module, table = load(ADAMW), "| NVIDIA-SMI 570.00 |"
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(module, "_output_of", lambda *command: table if command == ("nvidia-smi",) else "")
    monkeypatch.setattr(module, "device_name", lambda device: "NVIDIA H100 80GB HBM3" if on_gpu else "Some CPU")
    runtime = module.Runtime(0, 8, torch.device("cuda" if on_gpu else "cpu"))
    text = module.environment(module.parse_arguments([]), runtime, {"target": 3.28})
    head, _, rest = text.partition("\n{")
    assert (f"Running PyTorch {torch.__version__} compiled for CUDA 12.8" in head.splitlines()) == bool(built_for)
    assert ("CUDA" in head) == bool(built_for)
    assert text.endswith(f"}}\nnvidia-smi:\n{table}") if on_gpu else text.endswith("}")
    environment = compare.Environment()
    for line in text.splitlines(keepends=True):
        environment.feed(line.encode())
    assert environment.values["gpu"] == ("NVIDIA H100 80GB HBM3" if on_gpu else "Some CPU")
    assert environment.values["world_size"] == 8 and environment.values["torch"] == torch.__version__
    assert environment.values["facts"] == json.loads("{" + rest.partition("\nnvidia-smi")[0])


# ---------------------------------------------------------------------------------------------------------------------
# Compilation

@pytest.mark.parametrize("entry", ENTRIES)
def test_blocks_share_one_whole_graph_also_below_ddp(sandbox, monkeypatch, entry):
    """One graph for all blocks and one for the head, though a block of width 768 is larger than DDP's bucket of 25 MB.

    Left to itself DDP cuts the block's graph in two; and ValueEmbed's first block, were x the tensor x0 there, would be
    compiled apart. It is `train` itself that builds, compiles and wraps the model here; inductor is replaced by a
    counter, and the training loop by one step.
    """
    name = f"sandbox_{entry[-8:]}"
    spec = importlib.util.spec_from_file_location(name, sandbox.path / f"records/{entry}/train_gpt.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    graphs, compile_module = [], torch.nn.Module.compile

    def counting(graph, example_inputs):
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **options: compile_module(self, backend=counting, **options))

    def loop(model, raw_model, optimizers, train_stream, val_stream, hp, runtime, log):
        tokens = torch.randint(256, (1, 128), generator=torch.Generator().manual_seed(0))
        assert type(model).__name__ == "DistributedDataParallel"
        assert sum(p.numel() for p in raw_model.blocks[0].parameters()) * 4 > 25 * 2**20
        module.training_step(model, [], [(tokens, tokens)], 0, hp, runtime)

    monkeypatch.setattr(module, "train_loop", loop)
    hp = module.parse_arguments(["--track=laptop", "--model_dim=768", "--num_layers=4", "--sequence_length=128",
                                 "--device=cpu", "--dtype=float32", "--compile=on", "--num_heads=6"])
    torch._dynamo.reset()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with torch._dynamo.config.patch(optimize_ddp=True):  # torch's default; put back at the end
            module.train(hp, module.Runtime(0, 2, CPU))
            optimized = torch._dynamo.config.optimize_ddp
    finally:
        torch.distributed.destroy_process_group()
        torch._dynamo.reset()
    assert len(graphs) == 2, f"operations of each graph: {graphs}"
    assert not optimized


# ---------------------------------------------------------------------------------------------------------------------
# History

def test_adamws_two_published_losses_are_told_apart():
    """3.2760 ends the public log, which is of a later script; the entry's own script reported 3.2818."""
    source = (RECORDS / ADAMW / "train_gpt.py").read_text()
    assert "Published: 3.2818" in source and "3.2760" not in source
    quoting = [path for path in RECORDS.rglob("README.md") if "3.2760" in path.read_text()]
    assert RECORDS / ADAMW / "README.md" in quoting
    for path in quoting:
        assert all("3.2818" in line for line in path.read_text().splitlines() if "3.2760" in line), path
