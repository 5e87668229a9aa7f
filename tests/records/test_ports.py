"""The four ports of published records: published numbers, and the mathematics of each."""
import ast
import math
import re

import pytest
import torch
import torch.nn.functional as F
from frozen_entries import (
    ADAMW,
    CPU,
    MODERN,
    PORTS,
    RECORDS,
    SMALL,
    UNTIE,
    VALUE,
    build,
    build_small,
    load,
    loss_of,
)
from torch.optim.optimizer import Optimizer

pytestmark = pytest.mark.slow

WITH_MUON = [MODERN, UNTIE, VALUE]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0))


def rotary_identity(T: int = 128, head_dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines that rotate nothing, (T, head_dim / 2) each."""
    return torch.ones(T, head_dim // 2), torch.zeros(T, head_dim // 2)


# --- Published numbers ----------------------------------------------------------------------------

@pytest.mark.parametrize("port, millions", [
    (ADAMW, 123.6), (MODERN, 123.6), (UNTIE, 162.3), (VALUE, 625.9)])
def test_parameter_counts(port, millions):
    """Also: each parameter is in exactly one optimizer."""
    _, model, optimizers = build(port, load(port).parse_arguments([]), torch.device("meta"))
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)
    placed = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(placed) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("port, expected", [(ADAMW, 10.97), (MODERN, 16.0)])
def test_first_loss_at_full_size(port, expected):
    _, model, _ = build(port, load(port).parse_arguments([]))
    tokens = torch.randint(50_256, (1, 513))
    with torch.no_grad():
        loss = loss_of(port, model, tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("port", [UNTIE, VALUE])
def test_first_loss_is_that_of_a_uniform_guess(port):
    """The head starts at zero, so at full size the loss is ln 50,304 = 10.83, here ln 384."""
    _, model, _ = build_small(port)
    loss = loss_of(port, model, random_tokens(2, 128), random_tokens(2, 128))
    assert loss.item() == pytest.approx(math.log(384))


# steps, batch, length, layers, heads, width, warmup, cooldown
PUBLISHED = {ADAMW: (9536, 512, 1024, 12, 12, 768, 256, 2048),
             MODERN: (5100, 512, 1024, 12, 6, 768, 0, 1450),
             UNTIE: (4578, 512, 1024, 12, 6, 768, 0, 1308),
             VALUE: (1530, 8, 65_536, 12, 6, 768, 0, 600)}


@pytest.mark.parametrize("port", PORTS)
def test_defaults_are_the_published_numbers(port):
    hp = load(port).parse_arguments([])
    assert (hp.num_steps, hp.batch_size, hp.sequence_length, hp.num_layers, hp.num_heads,
            hp.model_dim, hp.warmup_steps, hp.cooldown_steps) == PUBLISHED[port]
    assert hp.batch_size * hp.sequence_length == 524_288
    assert hp.micro_batch * 8 == hp.batch_size  # one micro-batch a GPU on 8 GPUs


ADAM_RATES = {MODERN: {"embed": 0.0036},
              UNTIE: {"embed": 0.3, "head": 0.002},
              VALUE: {"embed": 0.6, "head": 0.008, "scalar": 0.04}}
MUON_RATES = {MODERN: 0.00036, UNTIE: 0.02, VALUE: 0.05}


@pytest.mark.parametrize("port", PORTS)
def test_each_parameter_has_its_published_rule(port):
    hp = load(port).parse_arguments(["--num_layers=2", "--model_dim=64", "--num_heads=2"])
    _, model, optimizers = build(port, hp)
    names = {id(p): name for name, p in model.named_parameters()}
    muon = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                name = names[id(p)]
                if port == ADAMW:
                    assert isinstance(optimizer, torch.optim.AdamW)
                    assert group["lr"] == 0.0018
                    assert group["betas"] == (0.9, 0.95)
                    assert group["weight_decay"] == 0.1
                elif type(optimizer).__name__ == "Muon":
                    muon.add(name)
                    assert group["lr"] == pytest.approx(MUON_RATES[port])
                    assert group["momentum"] == (0.85 if port == VALUE else 0.95)
                else:
                    part = "head" if name.startswith("head.") else "embed"
                    part = "scalar" if p.ndim < 2 else part
                    assert group["lr"] == ADAM_RATES[port][part], name
                    assert group["weight_decay"] == 0
                    assert group["betas"] == ((0.8, 0.95) if port == VALUE else (0.9, 0.95))
    matrices = {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    assert muon == (set() if port == ADAMW else matrices)


@pytest.mark.parametrize("port", PORTS)
def test_corners_of_the_schedule(port):
    module = load(port)
    hp = module.parse_arguments([])
    steps, warmup, cooldown = hp.num_steps, hp.warmup_steps, hp.cooldown_steps
    scale = [module.lr_scale(step, hp) for step in range(steps + 1)]
    assert scale[0] == (1 / 256 if port == ADAMW else 1.0)
    assert set(scale[warmup:steps - cooldown + 1]) == {1.0}
    assert scale[steps - cooldown // 2] == 0.5
    assert scale[steps] == 0.0


@pytest.mark.parametrize("port", PORTS)
def test_training_step_applies_the_schedule(port):
    module, model, optimizers = build_small(port)
    schedule = ["--num_steps=40", "--cooldown_steps=20", "--warmup_steps=10"]
    hp = module.parse_arguments([*SMALL, *schedule])
    runtime = module.Runtime(0, 1, CPU)
    first = [group["lr"] for o in optimizers for group in o.param_groups]
    tokens = random_tokens(2, 128)
    for step, scale in ((0, 0.1), (4, 0.5), (20, 1.0), (30, 0.5)):
        module.training_step(model, optimizers, [(tokens, tokens)], step, hp, runtime)
        rates = [group["lr"] for o in optimizers for group in o.param_groups]
        assert rates == pytest.approx([scale * lr for lr in first])
    if port == VALUE:
        momentum = optimizers[-1].param_groups[0]["momentum"]
        assert momentum == pytest.approx(module.muon_momentum(30, hp))


def test_value_embed_schedules():
    module = load(VALUE)
    hp = module.parse_arguments([])
    for step in range(0, 1531, 17):  # the published formulas
        window = step / 1530 * (1792 - 64) + 64
        assert module.window_size(step, hp) == 64 * math.floor(window / 64)
        assert module.muon_momentum(step, hp) == pytest.approx(0.85 + 0.1 * min(step / 300, 1))
    assert [module.window_size(step, hp) for step in (0, 56, 57, 1530)] == [64, 64, 128, 1792]


# --- Model ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("port", PORTS)
def test_epsilon_of_the_norm(port):
    """AdamW's is 1e-6, the later ones' is float32's. Inputs as small as a root show which."""
    norm = load(port).norm
    epsilon = 1e-6 if port == ADAMW else 1.1920929e-7
    x = 3e-4 * torch.randn(5, 64)
    expected = x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=0)
    half = x.bfloat16()  # also computed in float32: with bfloat16's epsilon little would be left
    torch.testing.assert_close(norm(half), norm(half.float()).bfloat16(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("port", PORTS)
def test_order_of_rotation_and_norm(port, monkeypatch):
    """ModernArch norms after rotary, the later ports before it, AdamW does not norm Q and K.

    The bfloat16 tables change lengths by up to a part in 256. So what was normed last has a mean
    square of 1, and what was rotated last has not.
    """
    module, model, _ = build_small(port)
    queries_and_keys = []

    def attention(q, k, v, *rest):
        queries_and_keys.extend((q, k))
        return v

    monkeypatch.setattr(module, "attention", attention)
    loss_of(port, model, random_tokens(1, 128), random_tokens(1, 128))
    errors = torch.stack([(x.square().mean(dim=-1) - 1).abs().max() for x in queries_and_keys])
    if port == ADAMW:
        assert errors.min() > 0.1
    elif port == MODERN:
        assert errors.max() < 1e-3
    else:
        assert 2e-3 < errors.min()
        assert errors.max() < 0.02


@pytest.mark.parametrize("port", PORTS)
def test_embedding_and_head_are_tied_in_the_first_two(port):
    _, model, _ = build_small(port)
    assert (model.embed.weight is model.head.linear.weight) == (port in (ADAMW, MODERN))
    assert bool(model.head.linear.weight.any()) == (port in (ADAMW, MODERN))


@pytest.mark.parametrize("port", WITH_MUON)
def test_blocks_start_as_the_identity(port):
    _, model, _ = build_small(port)
    x = torch.randn(1, 128, 32)
    cos, sin = rotary_identity()
    if port == VALUE:
        first_key = torch.zeros(128).long()
        value_embed = torch.randn(1, 128, 32)
        x0 = torch.randn(1, 128, 32)
        y = model.blocks[0](x, value_embed, x0, cos, sin, first_key)
    else:
        y = model.blocks[0](x, cos, sin)
    assert torch.equal(x, y)


def test_adamw_scales_the_attention_branch():
    module, model, _ = build_small(ADAMW)
    block = model.blocks[1]
    x = torch.randn(2, 128, 32)
    cos, sin = rotary_identity()
    middle = x + block.attention(module.norm(x), cos, sin) / math.sqrt(2 * 4)
    torch.testing.assert_close(block(x, cos, sin), middle + block.mlp(module.norm(middle)))


@pytest.mark.parametrize("port", PORTS)
def test_activation_of_the_mlp(port):
    _, model, _ = build_small(port)
    mlp = model.blocks[0].mlp
    mlp.proj.weight.data.normal_()
    x = torch.randn(5, 32)
    hidden = mlp.fc(x)
    hidden = F.gelu(hidden) if port == ADAMW else F.relu(hidden) ** 2
    torch.testing.assert_close(mlp(x), mlp.proj(hidden))


@pytest.mark.parametrize("port", WITH_MUON)
def test_attention_ignores_the_size_of_queries_and_keys(port):
    _, model, _ = build_small(port)
    attention = model.blocks[0].attention
    attention.proj.weight.data.copy_(torch.eye(32))
    x = torch.randn(1, 128, 32)
    arguments = [x, *model.rotary(128, CPU)]
    if port == VALUE:
        arguments = [x, torch.zeros(1, 128, 32), *model.rotary(128, CPU), torch.zeros(128).long()]
    before = attention(*arguments)
    attention.query.weight.data *= 7
    attention.key.weight.data *= 7
    assert (attention(*arguments) - before).abs().max() < 1e-3


@pytest.mark.parametrize("port", PORTS)
def test_rotary_scores_depend_on_the_distance(port):
    """The tables are float32 in AdamW and bfloat16 in the later ports."""
    module, model, _ = build_small(port)
    cos, sin = model.rotary(40, CPU)
    assert cos.dtype == (torch.float32 if port == ADAMW else torch.bfloat16)
    q, k = (module.rotate(torch.randn(16).expand(1, 40, 1, 16), cos, sin)[0, :, 0] for _ in "qk")
    scores = q @ k.T
    for distance in (0, 3, 17):
        diagonal = scores.diagonal(-distance)
        assert diagonal.max() - diagonal.min() < (1e-4 if port == ADAMW else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_precision_of_value_embed(dtype):
    """Frequencies have the model's precision; positions and angles are float32."""
    _, model, _ = build(VALUE, load(VALUE).parse_arguments(SMALL), dtype=dtype)
    frequency = 10_000.0 ** -(torch.arange(0, 16, 2).double() / 16)
    assert model.rotary.frequency.dtype == dtype
    torch.testing.assert_close(model.rotary.frequency, frequency.to(dtype), rtol=1e-6, atol=0)
    cos, sin = model.rotary(8192, CPU)
    angle = torch.arange(8192).double()[:, None] * model.rotary.frequency.double()
    assert (cos.double() - angle.cos()).abs().max() < 3e-3
    assert (sin.double() - angle.sin()).abs().max() < 3e-3


class Inspect(torch.nn.Module):
    """A head that keeps what it is given."""

    def forward(self, x, targets):
        self.x = x
        return x.mean()


@pytest.mark.parametrize("port", PORTS)
def test_no_token_sees_a_later_one(port):
    _, model, _ = build_small(port)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.head = Inspect()
    tokens = random_tokens(1, 128)
    loss_of(port, model, tokens, tokens)
    before = model.head.x.detach().clone()
    tokens[0, 70] = (tokens[0, 70] + 1) % 256
    loss_of(port, model, tokens, tokens)
    changed = (model.head.x - before).abs().amax(dim=-1)[0] > 1e-6
    assert not changed[:70].any()
    assert changed[70:].float().mean() > 0.8


@pytest.mark.parametrize("num_layers", [5, 12])
def test_value_embed_unet_order(num_layers):
    """Stand-in layers record their input without the embedding, and add their own power of two."""
    _, model, _ = build_small(VALUE, f"--num_layers={num_layers}")
    inputs = []

    class Layer(torch.nn.Module):
        def __init__(self, index):
            super().__init__()
            self.index = index

        def forward(self, x, value_embed, x0, cos, sin, mask):
            inputs.append((x - x0).double()[0, 0, 0].item())
            return x + 2.0 ** -self.index

    model.blocks = torch.nn.ModuleList(Layer(i) for i in range(num_layers))
    model.head = Inspect()
    tokens = random_tokens(1, 128)
    model(tokens, tokens, torch.tensor(64))
    x0 = F.rms_norm(model.embed(tokens), (32,))[0, 0, 0].item()
    x = 0.0
    outputs = []
    for layer in range(num_layers):
        if layer >= num_layers - num_layers // 2:  # last in, first out; a skip contains x0 too
            x += outputs[num_layers - 1 - layer] + x0
        assert inputs[layer] == pytest.approx(x, rel=1e-4, abs=1e-4), layer
        x += 2.0 ** -layer
        outputs.append(x)


def test_value_embed_mixes_and_caps():
    module, model, _ = build_small(VALUE)
    block = model.blocks[2]
    assert block.attention.value_mix.item() == 0.5
    assert block.x0_mix.tolist() == [1.0, 0.0]
    assert model.skip_weights.tolist() == [1.0, 1.0]
    # A token that sees only itself gets its own value: half v, half value embedding.
    attention = block.attention
    attention.proj.weight.data.copy_(torch.eye(32))
    x = torch.randn(1, 128, 32)
    value_embed = torch.randn(1, 128, 32)
    found = attention(x, value_embed, *model.rotary(128, CPU), torch.arange(128))
    torch.testing.assert_close(found, 0.5 * attention.value(x) + 0.5 * value_embed)
    head = model.head
    head.linear.weight.data.normal_(std=100)
    x = torch.randn(1, 7, 32)
    targets = torch.zeros(1, 7, dtype=torch.int64)
    logits = 30 * torch.tanh(head.linear(module.norm(x)) / 30)
    torch.testing.assert_close(head(x, targets), F.cross_entropy(logits[0], targets[0]))


def test_value_embed_keeps_linear_matrices_in_float32():
    hp = load(VALUE).parse_arguments(SMALL)
    _, model, _ = build(VALUE, hp, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        matrix = p.ndim == 2 and "embed" not in name
        assert p.dtype == (torch.float32 if matrix else torch.bfloat16), name
    tokens = random_tokens(2, 128)
    model(tokens, tokens, torch.tensor(64)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --- Attention of ValueEmbed ----------------------------------------------------------------------

def dense_mask(tokens: torch.Tensor, eot_token: int, window: int) -> torch.Tensor:
    """Return which keys each query sees, (N, N) bool, position by position for (S, T) tokens."""
    S, T = tokens.shape
    flat = tokens.flatten().tolist()
    mask = torch.zeros(S * T, S * T, dtype=torch.bool)
    for query in range(S * T):
        for key in range(query, -1, -1):
            if query - key >= window:
                break
            mask[query, key] = True
            if key % T == 0 or flat[key] == eot_token:  # the document or the sequence begins here
                break
    return mask


@pytest.mark.parametrize("window", [64, 200])
def test_value_embed_mask(window):
    module = load(VALUE)
    tokens = torch.randint(40, (2, 256))
    mask = dense_mask(tokens, 0, window)
    first_key = module.first_visible_key(tokens, 0, torch.tensor(window))
    position = torch.arange(512)
    found = module.visible(position[:, None], position[None, :], first_key[:, None])
    assert torch.equal(found, mask)
    blocks = mask.view(4, 128, 4, 128).transpose(1, 2)
    assert torch.equal(module.block_mask(first_key).to_dense()[0, 0].bool(), blocks.any(-1).any(-1))


def test_value_embed_chunked_attention():
    """Outputs and gradients agree with attention by an explicit mask."""
    module = load(VALUE)
    q, k, v = (torch.randn(1, 2, 200, 16, requires_grad=True) for _ in range(3))
    first_key = torch.arange(200).sub(37).clamp(min=0)
    found = module.attention(q, k, v, first_key, 64)
    position = torch.arange(200)
    mask = (first_key[:, None] <= position) & (position <= position[:, None])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# --- Optimizers -----------------------------------------------------------------------------------

def test_adamw_divides_each_gradient_by_its_norm():
    module, model, _ = build_small(ADAMW)
    seen = {}

    class Spy(Optimizer):
        def step(self):
            seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

    tokens = random_tokens(2, 128)
    model(tokens, tokens).backward()
    raw = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    optimizers = [Spy(model.parameters(), dict(lr=1.0))]
    hp = module.parse_arguments(SMALL)
    module.training_step(model, optimizers, [(tokens, tokens)], 0, hp, module.Runtime(0, 1, CPU))
    for name, grad in seen.items():
        torch.testing.assert_close(grad, raw[name] / (raw[name].norm() + 1e-6))


@pytest.mark.parametrize("shape, modern, later", [
    ((64, 16), 8.0, 2.0), ((16, 64), 8.0, 1.0), ((32, 32), math.sqrt(32), 1.0)])
@pytest.mark.parametrize("port", WITH_MUON)
def test_scale_of_a_muon_update(port, shape, modern, later):
    """All singular values of the update are equal. Their size depends on the matrix's shape."""
    module = load(port)
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape)
    module.Muon([p], lr=0.1, momentum=0.9, dtype=torch.float32).step()
    rms = torch.linalg.svdvals(p.detach()).square().mean().sqrt().item()
    assert rms == pytest.approx(0.1 * (modern if port == MODERN else later), rel=0.2)


@pytest.mark.parametrize("port", WITH_MUON)
@pytest.mark.parametrize("shape", [(48, 48), (24, 60), (60, 24)])
def test_newton_schulz_pulls_singular_values_to_one(port, shape):
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -1.5, len(v))) @ v
    values = torch.linalg.svdvals(load(port).newton_schulz(matrix, torch.float32))
    assert 0.65 < values.min()
    assert values.max() < 1.25


def test_muon_uses_nesterov_momentum():
    module = load(UNTIE)
    p = torch.nn.Parameter(torch.zeros(8, 8))
    buffer = torch.zeros(8, 8)
    expected = torch.zeros(8, 8)
    optimizer = module.Muon([p], lr=0.1, momentum=0.9, dtype=torch.float32)
    for _ in range(3):
        p.grad = torch.randn(8, 8)
        buffer = 0.9 * buffer + p.grad
        expected -= 0.1 * module.newton_schulz(p.grad + 0.9 * buffer, torch.float32)
        optimizer.step()
    # Updates are sent in bfloat16.
    torch.testing.assert_close(p.detach(), expected, atol=3e-3, rtol=0)


@pytest.mark.parametrize("port", [UNTIE, VALUE])
def test_muon_divides_the_work_by_parameter_number(port, monkeypatch):
    """Rank r of 3 computes parameters r, r + 3, ... One rank computes the sum over ranks."""
    module = load(port)
    sent = []
    monkeypatch.setattr(module.dist, "all_reduce", sent.append)
    params = [torch.nn.Parameter(torch.zeros(4, 6)) for _ in range(7)]
    for p in params:
        p.grad = torch.randn(4, 6)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        module.Muon(params, lr=0.0, momentum=0.9, dtype=torch.float32).step()
        computed = sent[-1].view(7, 24).any(dim=1)
        assert computed.tolist() == [i % 3 == rank for i in range(7)]
        assert sent[-1].dtype == torch.bfloat16
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    module.Muon(params, lr=-1.0, momentum=0.9, dtype=torch.float32).step()
    assert torch.equal(sum(sent).float().view(7, 4, 6), torch.stack(list(params)).detach())


def test_untie_embed_leaves_only_cudnns_attention_on_cuda():
    module = load(UNTIE)
    backends = torch.backends.cuda
    enabled = [backends.cudnn_sdp_enabled, backends.flash_sdp_enabled,
               backends.mem_efficient_sdp_enabled, backends.math_sdp_enabled]
    enable = [backends.enable_cudnn_sdp, backends.enable_flash_sdp,
              backends.enable_mem_efficient_sdp, backends.enable_math_sdp]
    before = [is_enabled() for is_enabled in enabled]
    try:
        module.force_cudnn_attention(module.Runtime(0, 1, CPU, torch.bfloat16))
        module.force_cudnn_attention(module.Runtime(0, 1, torch.device("cuda"), torch.float32))
        assert [is_enabled() for is_enabled in enabled] == before
        module.force_cudnn_attention(module.Runtime(0, 1, torch.device("cuda"), torch.bfloat16))
        assert [is_enabled() for is_enabled in enabled] == [True, False, False, False]
    finally:
        for set_enabled, value in zip(enable, before, strict=True):
            set_enabled(value)


# --- Differences between the ports ----------------------------------------------------------------

def definitions(port: str) -> dict[str, str]:
    """Return the syntax tree of each function, method, class field and constant, by its name."""
    found = {}
    source = (RECORDS / "published" / port / "train_gpt.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.dump(node)
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.dump(node)
        elif isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, ast.FunctionDef):
                    found[f"{node.name}.{child.name}"] = ast.dump(child)
                elif isinstance(child, ast.AnnAssign):
                    found[f"{node.name}.{child.target.id}"] = ast.dump(child)
    return found


@pytest.mark.parametrize("old, new", list(zip(PORTS, PORTS[1:], strict=False)))
def test_ports_differ_only_where_the_readme_says(old, new):
    before, after = definitions(old), definitions(new)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed
    readme = (RECORDS / "published" / new / "README.md").read_text()
    assert changed <= set(re.findall(r"`([^`\n]+)`", readme))
