"""What only a GPU can show: FlexAttention's kernels and gradients, no recompilation as the window grows, NCCL."""
import pytest
import torch
import torch.distributed as dist

import train_gpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda")


def at_window(window):
    schedule = train_gpt.Schedule(0, train_gpt.Hyperparameters(), CUDA)
    schedule.window = torch.full((), window, device=CUDA)
    return schedule


def models(dtype):
    hp = train_gpt.Hyperparameters(sequence_length=2048, num_layers=4, num_heads=2, model_dim=256)
    pair = [train_gpt.build_model(hp, CUDA, dtype, flex) for flex in (True, False)]
    with torch.no_grad():
        for model in pair:
            generator = torch.Generator("cuda").manual_seed(0)
            for p in model.parameters():
                p.add_((0.05 * torch.randn(p.shape, generator=generator, device=CUDA)).to(p.dtype))
    optimizer = train_gpt.Optimizer(pair[0], hp, dtype)
    train_gpt.compile_parts(pair[0], optimizer, CUDA)
    return hp, pair, optimizer


def distance(a, b):
    """Relative, of two tensors."""
    return (a.float() - b.float()).norm() / (b.float().norm() + 1e-6)


def test_flex_attention_in_bfloat16_at_full_length_has_the_chunked_paths_gradients():
    """The kernels that train: T = 65,536, many documents, the smallest and the largest window."""
    hp = train_gpt.Hyperparameters()
    T, heads, max_window = hp.sequence_length, hp.num_heads, hp.window_end
    tokens = torch.randint(50_256, (1, T), device=CUDA)
    tokens[0, ::700] = 50_256
    start = train_gpt.document_start(tokens, 50_256)
    q, k, v, weight = torch.randn(4, 1, heads, T, hp.model_dim // heads, device=CUDA).bfloat16().unbind()
    flex = torch.compile(train_gpt.attention, dynamic=False)
    for window in (64, max_window):
        first_key = train_gpt.first_visible_key(start, torch.full((), window, device=CUDA))
        results = []
        for function, mask, dtype in ((flex, train_gpt.block_mask(first_key), torch.bfloat16),
                                      (train_gpt.attention, first_key, torch.float32)):
            inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
            y = function(*inputs, mask, max_window)
            (y * weight).sum().backward()
            results.append([y.detach(), *(t.grad for t in inputs)])
        for name, a, b in zip(("y", "q", "k", "v"), *results, strict=True):
            assert distance(a, b) <= 2e-2, (name, window)  # bfloat16 keeps 8 bits


def test_flex_attention_agrees_with_the_chunked_path_and_compiles_once():
    _, (flex, chunked), _ = models(torch.bfloat16)
    tokens = torch.randint(50_256, (1, 2048), device=CUDA)
    tokens[0, 700] = 50_256
    flex(tokens, tokens, at_window(64)).backward()
    for window in (64, 128, 1000, 1792):
        gradients = []
        for model in (flex, chunked):
            model.zero_grad()
            with torch.compiler.set_stance("fail_on_recompile" if model is flex else "default"):
                loss = model(tokens, tokens, at_window(window))
                loss.backward()
            gradients.append([p.grad for p in model.parameters()])
        for (name, _), a, b in zip(flex.named_parameters(), *gradients, strict=True):
            assert distance(a, b) <= 5e-2, (window, name)


def test_compiled_adam_is_adam():
    _, (model, _), optimizer = models(torch.bfloat16)
    p, g = torch.randn(2, 1000, 64, device=CUDA).bfloat16()
    results = []
    group = train_gpt.Group("x", "x", "adam", 0.01, (0.8, 0.95), 0.0, torch.float32)
    for direction in (optimizer.rules["adam"].direction, train_gpt.adam_direction):
        q, m, v = p.clone(), torch.zeros(p.shape, device=CUDA), torch.zeros(p.shape, device=CUDA)
        for t in range(1, 4):
            numbers = map(torch.tensor, (0.9, 1 - 0.8 ** t, 1 - 0.95 ** t))
            q.add_(direction(group, g, q, m, v, *numbers), alpha=-0.01)
        results.append(q.float())
    torch.testing.assert_close(*results, atol=2e-2, rtol=2e-2)


def test_nccl_does_what_the_buckets_ask_of_it():
    """At world size 1 the mean over the ranks, and all ranks' rows, are what went in."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for dtype in (torch.bfloat16, torch.float32):
            sent = torch.randn(1024, 768, device=CUDA).to(dtype)
            mean, whole = torch.empty_like(sent), torch.empty_like(sent)
            train_gpt._reduce_scatter(mean, sent, op=dist.ReduceOp.AVG, async_op=True).wait()
            train_gpt._all_gather(whole, sent, async_op=True).wait()
            torch.testing.assert_close(mean, sent, atol=0, rtol=0)
            torch.testing.assert_close(whole, sent, atol=0, rtol=0)
    finally:
        dist.destroy_process_group()
