"""What only a GPU can show: FlexAttention's kernels and gradients, what is compiled and when, NCCL.

Each test runs as it stands on the simulated GPU too (./run.sh simulate --tests), without conftest.py.
"""
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import train_gpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda")
STAGE_BEGINS = (0, 455, 910, 1297, 1365, 1405)  # of the fineweb run; the last one is its final validation


def text(S, T):
    """Random tokens (S, T), in which a document begins every 700."""
    tokens = torch.randint(50_256, (S, T), device=CUDA)
    tokens[:, ::700] = 50_256
    return tokens


def distance(a, b):
    """Relative, of two tensors."""
    return (a.float() - b.float()).norm() / (b.float().norm() + 1e-6)


def test_flex_attention_in_bfloat16_at_full_length_has_the_chunked_paths_gradients():
    """The kernels that train, with the run's own masks: 3 sequences of 16,384 tokens, many documents, each kind of
    attention in each stage; paired heads have twice the positions and half the heads."""
    hp = train_gpt.Hyperparameters()
    N, H, d = 3 * hp.sequence_length, hp.num_heads, hp.model_dim // hp.num_heads
    start = train_gpt.document_start(text(3, hp.sequence_length), 50_256)
    flex = torch.compile(train_gpt.attention, dynamic=False)
    lists = torch.compile(train_gpt.block_lists, dynamic=False)
    for kind, P in (("long", 1), ("short", 1), ("paired", 2)):
        layer = next(layer for layer in hp.layers if layer.attention == kind)
        max_window = train_gpt.Attention(hp, layer).max_window
        q, k, v, weight = torch.randn(4, P * N, H // P, d, device=CUDA).bfloat16().unbind()
        q = q / d ** 0.5
        for step in STAGE_BEGINS:
            schedule, results = train_gpt.Schedule(step, hp, CUDA), []
            for fast in (True, False):
                mask = train_gpt.GPT.masks(SimpleNamespace(hp=hp, flex=fast, block_lists=lists), start, schedule)[kind]
                dtype = torch.bfloat16 if fast else torch.float32
                inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
                y = (flex if fast else train_gpt.attention)(*inputs, mask, max_window)
                (y * weight).sum().backward()
                results.append([y.detach(), *(t.grad for t in inputs)])
                del y, inputs
            for name, a, b in zip(("y", "q", "k", "v"), *results, strict=True):
                assert distance(a, b) <= 2e-2, (name, kind, step)  # bfloat16 keeps 8 bits


def models(dtype):
    """All 11 layers, width 256: settings, the compiled model, one on the chunked path, the first's optimizer."""
    hp = train_gpt.Hyperparameters(sequence_length=2048, num_heads=2, model_dim=256, ngram_rows=1021, batch_size=2)
    pair = [train_gpt.build_model(hp, CUDA, dtype, flex) for flex in (True, False)]
    with torch.no_grad():
        for model in pair:
            generator = torch.Generator("cuda").manual_seed(0)
            for p in model.parameters():
                p.add_((0.05 * torch.randn(p.shape, generator=generator, device=CUDA)).to(p.dtype))
    optimizer = train_gpt.Optimizer(pair[0], hp, dtype)
    train_gpt.compile_parts(pair[0], optimizer, CUDA)
    return hp, *pair, optimizer


def test_compiled_model_agrees_with_the_chunked_path_in_each_stage_and_compiles_once():
    """In one stage after the other: no window compiles anything, nor do tied or own embeddings."""
    hp, flex, chunked, _ = models(torch.bfloat16)
    tokens = text(1, 2048)
    for step in STAGE_BEGINS[:5]:
        schedule = train_gpt.Schedule(step, hp, CUDA)
        flex(tokens, tokens, schedule)[0].backward()  # its number of targets may be new
        for long, other in ((64, 64), (128, 100), (384, 128), (1000, 384), (1664, 768)):
            schedule.windows = {kind: torch.full((), long if kind == "long" else other, device=CUDA)
                                for kind in schedule.windows}
            gradients, losses = [], []
            for model in (flex, chunked):
                model.zero_grad()
                with torch.compiler.set_stance("fail_on_recompile" if model is flex else "default"):
                    objective, loss = model(tokens, tokens, schedule)
                    objective.backward()
                losses.append(loss)
                gradients.append([p.grad for p in model.parameters()])
            assert distance(*losses) <= 1e-2, (step, long)
            for (name, _), a, b in zip(flex.named_parameters(), *gradients, strict=True):
                assert (a is None) == (b is None) == (name == "embed.weight" and schedule.tied), name
                if a is not None and a.numel() < 10:  # sums over the tokens that cancel: off by 0.1 to 0.9 on an H200
                    assert ((a - b).abs() <= 0.1 * b.abs() + 2).all(), (step, long, name, a, b)
                elif a is not None:
                    assert distance(a, b) <= (5e-2 if a.numel() > 1000 else 0.15), (step, long, name)


def test_compiled_changes_are_what_they_are_uncompiled():
    """Adam's and Muon's, three steps each, with cautious decay."""
    *_, optimizer = models(torch.bfloat16)
    for rule, betas, shape, tolerance in (("adam", (0.8, 0.95), (1000, 64), 2e-2),
                                          ("muon", (0.95,), (6, 96, 64), 5e-2)):
        values, results = torch.randn(shape, device=CUDA), []
        group = train_gpt.Group("x", "x", rule, 0.01, betas, 0.1, torch.bfloat16)
        grads = [torch.randn(shape, device=CUDA).bfloat16() for _ in range(3)]
        direction, names, row_names, _ = train_gpt.RULES[rule]
        for change in (optimizer.changes[rule], train_gpt.change):
            state = [torch.zeros(shape, device=CUDA) for _ in names]
            state += [torch.zeros(*shape[:-1], 1, device=CUDA) for _ in row_names]
            lr, steps = torch.full((), 0.01, device=CUDA), []
            for t, grad in enumerate(grads, 1):
                numbers = (0.5, 0.9, *(1 - beta ** t for beta in betas))
                steps.append(change(direction, group, grad, values, state, lr, *map(torch.tensor, numbers)))
            results.append([*steps, *state])
        for a, b in zip(*results, strict=True):
            assert distance(a, b) <= tolerance, rule


def test_nccl_does_what_the_buckets_ask_of_it():
    """At world size 1 the sum over the ranks, and all ranks' rows, are what went in."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for dtype in (torch.bfloat16, torch.float32):
            sent = torch.randn(1024, 768, device=CUDA).to(dtype)
            total, whole = torch.empty_like(sent), torch.empty_like(sent)
            train_gpt._reduce_scatter(total, sent, op=dist.ReduceOp.SUM, async_op=True).wait()
            train_gpt._all_gather(whole, sent, async_op=True).wait()
            torch.testing.assert_close(total, sent, atol=0, rtol=0)
            torch.testing.assert_close(whole, sent, atol=0, rtol=0)
    finally:
        dist.destroy_process_group()
