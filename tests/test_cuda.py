"""What only a GPU can show: FlexAttention's gradients, no recompilation as the window grows."""
import pytest
import torch

import train_gpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def at_window(window):
    schedule = train_gpt.Schedule(0, train_gpt.Hyperparameters(), torch.device("cuda"))
    schedule.window = torch.full((), window, device="cuda")
    return schedule


def models(dtype):
    hp = train_gpt.Hyperparameters(sequence_length=2048, num_layers=4, num_heads=2, model_dim=256)
    pair = [train_gpt.build_model(hp, torch.device("cuda"), dtype, flex) for flex in (True, False)]
    with torch.no_grad():
        for model in pair:
            generator = torch.Generator("cuda").manual_seed(0)
            for p in model.parameters():
                p.add_((0.05 * torch.randn(p.shape, generator=generator, device="cuda")).to(p.dtype))
    optimizer = train_gpt.Optimizer(pair[0], hp, dtype)
    train_gpt.compile_parts(pair[0], optimizer, torch.device("cuda"))
    return hp, pair, optimizer


def test_flex_attention_agrees_with_the_chunked_path_and_compiles_once():
    _, (flex, chunked), _ = models(torch.float32)
    tokens = torch.randint(50_256, (1, 2048), device="cuda")
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
            assert (a - b).norm() <= 2e-2 * b.norm() + 1e-6, (window, name)


def test_compiled_adam_is_adam():
    _, (model, _), optimizer = models(torch.bfloat16)
    p, g = torch.randn(2, 1000, 64, device="cuda").bfloat16()
    results = []
    group = train_gpt.Group("x", "x", "adam", 0.01, (0.8, 0.95), 0.0, torch.float32)
    for direction in (optimizer.rules["adam"].direction, train_gpt.adam_direction):
        q, m, v = p.clone(), torch.zeros(p.shape, device="cuda"), torch.zeros(p.shape, device="cuda")
        for t in range(1, 4):
            numbers = map(torch.tensor, (0.9, 1 - 0.8 ** t, 1 - 0.95 ** t))
            q.add_(direction(group, g, q, m, v, *numbers), alpha=-0.01)
        results.append(q.float())
    torch.testing.assert_close(*results, atol=2e-2, rtol=2e-2)
