"""The four historical entries: what makes each itself, and that they differ by their ideas only."""
import ast
import difflib
import importlib.util
import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ENTRY_TINY, REPOSITORY, metric_lines
from torch.optim.optimizer import Optimizer

import train_gpt

RECORDS = REPOSITORY / "records"
ENTRIES = ["2024-06-06_AdamW", "2024-10-14_ModernArch", "2024-11-03_UntieEmbed", "2024-12-04_ValueEmbed"]
ADAMW, MODERN, UNTIE, VALUE = ENTRIES
NGRAM = "2026-11-22_NGramEmbed"  # another frame: today's script goes on from it
CPU = torch.device("cpu")
SMALL = ["--track=laptop", "--num_layers=4", "--num_heads=2", "--model_dim=32", "--batch_size=2", "--micro_batch=2",
         "--sequence_length=128", "--device=cpu", "--dtype=float32"]


def load(entry):
    """The entry's script as a module."""
    name = "entry_" + entry[-8:]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, RECORDS / entry / "train_gpt.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def build(entry, hp, device=CPU, dtype=torch.float32):
    """(module, model, optimizers) of an entry."""
    module = load(entry)
    model = module.build_model(hp, device, *([dtype, False] if entry == VALUE else []))
    return module, model, module.build_optimizers(model, hp, *([dtype] if entry != ADAMW else []))


def small(entry, *flags):
    """The same, of 4 layers and width 32."""
    return build(entry, load(entry).parse_arguments([*SMALL, *flags]))


def loss_of(entry, model, tokens, targets, window=128):
    return model(tokens, targets, *([torch.tensor(window)] if entry == VALUE else []))


# ---------------------------------------------------------------------------------------------------------------------
# At full size

@pytest.mark.parametrize("entry, millions", list(zip(ENTRIES, (123.6, 123.6, 162.3, 625.9), strict=True)))
def test_parameter_counts(entry, millions):
    module = load(entry)
    _, model, optimizers = build(entry, module.parse_arguments([]), torch.device("meta"))
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)
    placed = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(placed) == sorted(id(p) for p in model.parameters())  # each parameter in exactly one optimizer
    vocab_size = 50_257 if entry == ADAMW else 50_304
    assert model.embed.weight.shape == model.head.linear.weight.shape == (vocab_size, 768)


@pytest.mark.parametrize("entry, expected, tolerance", [
    (ADAMW, 10.97, 0.1), (MODERN, 16.0, 0.1), (UNTIE, math.log(50_304), 1e-4), (VALUE, math.log(50_304), 1e-4)])
def test_first_validation_loss_at_full_size(entry, expected, tolerance):
    _, model, _ = build(entry, load(entry).parse_arguments([]))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50_256, (1, 513), generator=generator)
    with torch.no_grad():
        loss = loss_of(entry, model, tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx(expected, abs=tolerance)


PUBLISHED = {  # spec: steps, batch, length, layers, heads, width, warmup, cooldown
    ADAMW: (9536, 512, 1024, 12, 12, 768, 256, 2048), MODERN: (5100, 512, 1024, 12, 6, 768, 0, 1450),
    UNTIE: (4578, 512, 1024, 12, 6, 768, 0, 1308), VALUE: (1530, 8, 65_536, 12, 6, 768, 0, 600)}


@pytest.mark.parametrize("entry", ENTRIES)
def test_defaults_are_the_published_numbers(entry):
    hp = load(entry).parse_arguments([])
    assert (hp.num_steps, hp.batch_size, hp.sequence_length, hp.num_layers, hp.num_heads, hp.model_dim,
            hp.warmup_steps, hp.cooldown_steps) == PUBLISHED[entry]
    assert hp.track == "fineweb" and hp.step_tokens == 524_288
    assert hp.micro_batch * hp.sequence_length * 8 == hp.step_tokens  # one micro-batch a GPU on 8


# ---------------------------------------------------------------------------------------------------------------------
# What makes each itself

def rules(entry, model, optimizers):
    """{parameter's name: (optimizer, learning rate, its other settings)}"""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (type(o).__name__, group["lr"], group) for o in optimizers for group in o.param_groups
            for p in group["params"]}


@pytest.mark.parametrize("entry", ENTRIES)
def test_each_parameter_has_its_published_rule(entry):
    hp = load(entry).parse_arguments(["--num_layers=2", "--model_dim=64", "--num_heads=2"])
    _, model, optimizers = build(entry, hp)
    found = rules(entry, model, optimizers)
    assert len(found) == len(list(model.parameters()))
    for name, (kind, lr, group) in found.items():
        if entry == ADAMW:
            assert (kind, lr, group["betas"], group["weight_decay"]) == ("AdamW", 0.0018, (0.9, 0.95), 0.1), name
        elif kind == "Muon":
            assert name.startswith("blocks.") and model.get_parameter(name).ndim == 2
            wanted = {MODERN: 0.00036, UNTIE: 0.02, VALUE: 0.05}[entry]
            assert lr == pytest.approx(wanted) and group["momentum"] == (0.85 if entry == VALUE else 0.95)
        else:
            assert group["weight_decay"] == 0 and group["fused"]
            assert group["betas"] == ((0.8, 0.95) if entry == VALUE else (0.9, 0.95))
            if entry == MODERN:
                assert (kind, lr, name) == ("AdamW", 0.0036, "embed.weight")
            else:
                scalar = model.get_parameter(name).ndim < 2
                part = "scalar" if scalar else "head" if name.startswith("head.") else "embed"
                wanted = {UNTIE: {"embed": 0.3, "head": 0.002}, VALUE: {"embed": 0.6, "head": 0.008, "scalar": 0.04}}
                assert (kind, lr) == ("Adam", wanted[entry][part]), name
    matrices = {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    assert entry == ADAMW or {n for n, rule in found.items() if rule[0] == "Muon"} == matrices


@pytest.mark.parametrize("entry", ENTRIES)
def test_embedding_and_head_are_tied_in_the_first_two(entry):
    _, model, _ = small(entry)
    assert (model.embed.weight is model.head.linear.weight) == (entry in (ADAMW, MODERN))
    assert not model.head.linear.weight.any() == (entry in (UNTIE, VALUE))


@pytest.mark.parametrize("entry", ENTRIES)
def test_blocks_are_the_identity_at_the_start_but_for_adamw(entry):
    _, model, _ = small(entry)
    x = torch.randn(1, 128, 32)
    cos, sin = torch.ones(128, 8), torch.zeros(128, 8)
    if entry == VALUE:
        y = model.blocks[0](x, torch.randn(1, 128, 32), torch.randn(1, 128, 32), cos, sin, torch.zeros(128).long())
    else:
        y = model.blocks[0](x, cos, sin)
    assert torch.equal(x, y) == (entry != ADAMW)


def test_adamw_scales_the_attention_branch():
    module, model, _ = small(ADAMW)
    block, x, cos, sin = model.blocks[1], torch.randn(2, 128, 32), torch.ones(128, 8), torch.zeros(128, 8)
    middle = x + block.attention(module.norm(x), cos, sin) / math.sqrt(2 * 4)
    torch.testing.assert_close(block(x, cos, sin), middle + block.mlp(module.norm(middle)))


def test_adamw_divides_each_gradient_by_its_norm():
    module, model, _ = small(ADAMW)
    seen = {}

    class Spy(Optimizer):
        def step(self):
            seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

    hp = module.parse_arguments(SMALL)
    tokens = torch.randint(256, (2, 128))
    model(tokens, tokens).backward()
    raw = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    module.training_step(model, [Spy(model.parameters(), dict(lr=1.0))], [(tokens, tokens)], 0, hp,
                         module.Runtime(0, 1, CPU))
    for name, grad in seen.items():
        torch.testing.assert_close(grad, raw[name] / (raw[name].norm() + 1e-6))


@pytest.mark.parametrize("entry", ENTRIES)
def test_mlp_and_qk_norm(entry):
    """The activation function; and whether attention feels the size of queries and keys."""
    _, model, _ = small(entry)
    mlp, x = model.blocks[0].mlp, torch.randn(5, 32)
    mlp.proj.weight.data.normal_()
    hidden = mlp.fc(x)
    hidden = F.gelu(hidden) if entry == ADAMW else F.relu(hidden) ** 2
    torch.testing.assert_close(mlp(x), mlp.proj(hidden))

    def run(scale):
        attention = model.blocks[0].attention
        attention.proj.weight.data.copy_(torch.eye(32))
        if entry == ADAMW:
            attention.qkv.weight.data[:64] *= scale
        else:
            attention.query.weight.data *= scale
            attention.key.weight.data *= scale
        x = torch.randn(1, 128, 32, generator=torch.Generator().manual_seed(0))
        if entry == VALUE:
            return attention(x, torch.zeros(1, 128, 32), *model.rotary(128, CPU), torch.zeros(128).long())
        return attention(x, *model.rotary(128, CPU))
    alike = (run(1.0) - run(7.0)).abs().max() < 1e-3
    assert alike == (entry != ADAMW)


@pytest.mark.parametrize("shape, modern, later", [
    ((64, 16), 8.0, 2.0), ((16, 64), 8.0, 1.0), ((32, 32), math.sqrt(32), 1.0)])
@pytest.mark.parametrize("entry", [MODERN, UNTIE, VALUE])
def test_scale_of_a_muon_update(entry, shape, modern, later):
    """Singular values of the update: of one size, which depends on the matrix's shape."""
    module = load(entry)
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape)
    module.Muon([p], lr=0.1, momentum=0.9, dtype=torch.float32).step()
    rms = torch.linalg.svdvals(p.detach()).square().mean().sqrt().item()
    assert rms == pytest.approx(0.1 * (modern if entry == MODERN else later), rel=0.2)


@pytest.mark.parametrize("entry", [MODERN, UNTIE, VALUE])
@pytest.mark.parametrize("shape", [(48, 48), (24, 60), (60, 24)])
def test_newton_schulz_pulls_singular_values_to_one(entry, shape):
    torch.manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -1.5, len(v))) @ v
    values = torch.linalg.svdvals(load(entry).newton_schulz(matrix, torch.float32))
    assert 0.65 < values.min() and values.max() < 1.25


def test_muon_uses_nesterov_momentum():
    module = load(UNTIE)
    torch.manual_seed(2)
    p, buffer = torch.nn.Parameter(torch.zeros(8, 8)), torch.zeros(8, 8)
    optimizer, wanted = module.Muon([p], lr=0.1, momentum=0.9, dtype=torch.float32), torch.zeros(8, 8)
    for _ in range(3):
        p.grad = torch.randn(8, 8)
        buffer = 0.9 * buffer + p.grad
        wanted -= 0.1 * module.newton_schulz(p.grad + 0.9 * buffer, torch.float32)
        optimizer.step()
    torch.testing.assert_close(p.detach(), wanted, atol=3e-3, rtol=0)  # updates travel in bfloat16


@pytest.mark.parametrize("entry", [UNTIE, VALUE])
def test_muon_divides_the_work_by_parameter_number(entry, monkeypatch):
    """Rank r of 3 fills in parameters r, r + 3, ...; the sum over ranks is what one rank does."""
    module = load(entry)
    monkeypatch.setenv("WORLD_SIZE", "3")
    flats = []
    monkeypatch.setattr(module.dist, "all_reduce", flats.append)
    torch.manual_seed(3)
    params = [torch.nn.Parameter(torch.zeros(4, 6)) for _ in range(7)]
    for p in params:
        p.grad = torch.randn(4, 6)
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        module.Muon(params, lr=0.0, momentum=0.9, dtype=torch.float32).step()
        filled = flats[-1].view(7, 24).any(dim=1)
        assert filled.tolist() == [i % 3 == rank for i in range(7)] and flats[-1].dtype == torch.bfloat16
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    module.Muon(params, lr=-1.0, momentum=0.9, dtype=torch.float32).step()
    assert torch.equal(sum(flats).float().view(7, 4, 6), torch.stack(list(params)).detach())


@pytest.mark.parametrize("entry", ENTRIES)
def test_corners_of_the_trapezoid(entry):
    module = load(entry)
    hp = module.parse_arguments([])
    N, warm, cool = hp.num_steps, hp.warmup_steps, hp.cooldown_steps
    scale = [module.lr_scale(step, hp) for step in range(N + 1)]
    assert scale[0] == (1 / 256 if entry == ADAMW else 1.0) and scale[max(warm - 1, 0)] == 1.0
    assert scale[N - cool] == 1.0 and scale[N - cool + 1] < 1.0
    assert scale[N - cool // 2] == 0.5 and scale[N] == 0.0
    assert all(x == 1.0 for x in scale[warm:N - cool])


@pytest.mark.parametrize("entry", ENTRIES)
def test_training_step_sets_the_rates(entry):
    module, model, optimizers = small(entry)
    hp = module.parse_arguments([*SMALL, "--num_steps=40", "--cooldown_steps=20", "--warmup_steps=10"])
    first = [group["lr"] for o in optimizers for group in o.param_groups]
    tokens = torch.randint(256, (2, 128))
    for step, scale in ((0, 0.1), (4, 0.5), (20, 1.0), (30, 0.5)):
        module.training_step(model, optimizers, [(tokens, tokens)], step, hp, module.Runtime(0, 1, CPU))
        rates = [group["lr"] for o in optimizers for group in o.param_groups]
        assert rates == pytest.approx([scale * lr for lr in first])
    if entry == VALUE:
        assert optimizers[-1].param_groups[0]["momentum"] == pytest.approx(module.muon_momentum(30, hp))


def test_value_embed_schedules():
    module = load(VALUE)
    hp = module.parse_arguments([])
    for step in range(0, 1531, 17):  # the published formulas
        assert module.window_size(step, hp) == 64 * math.floor((step / 1530 * (1792 - 64) + 64) / 64)
        assert module.muon_momentum(step, hp) == pytest.approx(0.85 + 0.1 * min(step / 300, 1))
    assert [module.window_size(s, hp) for s in (0, 56, 57, 1530)] == [64, 64, 128, 1792]


class Inspect(torch.nn.Module):
    """In place of the head: keeps what it is given."""

    def forward(self, x, targets):
        self.x = x
        return x.mean()


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_token_sees_a_later_one(entry):
    _, model, _ = small(entry)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.head = Inspect()
    tokens = torch.randint(256, (1, 128))
    loss_of(entry, model, tokens, tokens)
    before = model.head.x.detach().clone()
    tokens[0, 70] = (tokens[0, 70] + 1) % 256
    loss_of(entry, model, tokens, tokens)
    changed = (model.head.x - before).abs().amax(dim=-1)[0] > 1e-6
    assert not changed[:70].any() and changed[70:].float().mean() > 0.8


@pytest.mark.parametrize("num_layers", [4, 5, 12])
def test_value_embed_unet_order(num_layers):
    """Layers are stand-ins that record their input, the embedding apart; each adds its own power of two."""
    _, model, _ = small(VALUE, f"--num_layers={num_layers}")
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
    tokens = torch.randint(256, (1, 128))
    x, outputs = 0.0, []
    model(tokens, tokens, torch.tensor(64))
    x0 = F.rms_norm(model.embed(tokens), (32,))[0, 0, 0].item()
    for layer in range(num_layers):
        if layer >= num_layers - num_layers // 2:  # last in, first out; the popped output holds x0 too
            x += outputs[num_layers - 1 - layer] + x0
        assert inputs[layer] == pytest.approx(x, rel=1e-4, abs=1e-4), layer
        x += 2.0 ** -layer
        outputs.append(x)


def test_value_embed_mixes_and_caps():
    module, model, _ = small(VALUE)
    block = model.blocks[2]
    assert block.attention.value_mix.item() == 0.5 and block.x0_mix.tolist() == [1.0, 0.0]
    assert model.skip_weights.tolist() == [1.0, 1.0] and model.value_embed.weight.shape == (384, 4 * 32)
    # attention over the token itself alone returns its value: half of v, half of the value embedding
    attention, x, embed = block.attention, torch.randn(1, 128, 32), torch.randn(1, 128, 32)
    attention.proj.weight.data.copy_(torch.eye(32))
    alone = torch.arange(128)
    found = attention(x, embed, *model.rotary(128, CPU), alone)
    torch.testing.assert_close(found, 0.5 * attention.value(x) + 0.5 * embed)
    head = model.head
    head.linear.weight.data.normal_(std=100)
    x, targets = torch.randn(1, 7, 32), torch.zeros(1, 7, dtype=torch.int64)
    logits = 30 * torch.tanh(head.linear(module.norm(x)) / 30)
    torch.testing.assert_close(head(x, targets), F.cross_entropy(logits[0], targets[0]))


def test_value_embed_keeps_linear_matrices_in_float32():
    hp = load(VALUE).parse_arguments(SMALL)
    _, model, _ = build(VALUE, hp, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        matrix = p.ndim == 2 and "embed" not in name
        assert p.dtype == (torch.float32 if matrix else torch.bfloat16), name
    tokens = torch.randint(256, (2, 128))
    model(tokens, tokens, torch.tensor(64)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("entry", ENTRIES)
def test_rotary_tables(entry):
    """Scores depend on the distance alone; the tables are bfloat16 from ModernArch on; one is kept for the last T."""
    module, model, _ = small(entry)
    cos, sin = model.rotary(40, CPU)
    assert cos.dtype == (torch.float32 if entry == ADAMW else torch.bfloat16) and cos.shape == (40, 8)
    assert model.rotary(40, CPU)[0] is cos and model.rotary(41, CPU)[0] is not cos
    assert (entry == VALUE) == ("frequency" in dict(model.rotary.named_buffers()))
    q, k = (module.rotate(torch.randn(16).expand(1, 40, 1, 16), cos, sin)[0, :, 0] for _ in "qk")
    scores = q @ k.T
    tolerance = 1e-4 if entry == ADAMW else 0.1
    for distance in (0, 3, 17):
        diagonal = scores.diagonal(-distance)
        assert diagonal.max() - diagonal.min() < tolerance


def test_untie_embed_leaves_cuda_no_attention_kernel_but_cudnns():
    module, backends = load(UNTIE), torch.backends.cuda
    enabled = [backends.cudnn_sdp_enabled, backends.flash_sdp_enabled, backends.mem_efficient_sdp_enabled,
               backends.math_sdp_enabled]
    enable = [backends.enable_cudnn_sdp, backends.enable_flash_sdp, backends.enable_mem_efficient_sdp,
              backends.enable_math_sdp]
    before = [f() for f in enabled]
    try:
        module.force_cudnn_attention(module.Runtime(0, 1, CPU, torch.bfloat16))
        module.force_cudnn_attention(module.Runtime(0, 1, torch.device("cuda"), torch.float32))
        assert [f() for f in enabled] == before
        module.force_cudnn_attention(module.Runtime(0, 1, torch.device("cuda"), torch.bfloat16))
        assert [f() for f in enabled] == [True, False, False, False]
    finally:
        for f, value in zip(enable, before, strict=True):
            f(value)


# ---------------------------------------------------------------------------------------------------------------------
# Runs

@pytest.mark.parametrize("entry", [ADAMW, UNTIE, VALUE])  # ModernArch's ranks do what AdamW's do
def test_runs_alike_on_two_ranks_and_in_parts(sandbox, entry):
    """One rank, two ranks, and one rank with one sequence at a time print the same losses; the log is whole."""
    script = f"records/{entry}/train_gpt.py"
    # At the rates of ValueEmbed's laptop preset training is chaotic: the last bits of a sum grow to 0.05 in 6 steps.
    of_value = "--window_end=128 --embed_lr=0.3 --head_lr=0.004 --scalar_lr=0.01 --muon_lr=0.02".split()
    flags = [*ENTRY_TINY, "--batch_size=4", *(of_value if entry == VALUE else [])]
    runs = [sandbox(script=script, tiny=[*flags, *more], ranks=ranks) for ranks, more in
            ((1, []), (2, []), (1, ["--micro_batch=1"]))]
    losses = []
    for run in runs:
        assert run.returncode == 0, run.stderr
        losses.append([float(line.split("loss:")[1]) for line in metric_lines(run.stdout)])
    assert len(losses[0]) == 14 + 6 and losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    if entry != VALUE:  # there the packing decides where a sequence's neighbours lie, and validation's pieces
        assert losses[0] == pytest.approx(losses[2], abs=1e-3)
    logs = sorted((sandbox.path / "records/scratch").glob("*.txt"))
    source, environment, metrics = logs[0].read_text().split("=" * 100 + "\n")
    assert source == (sandbox.path / script).read_text() and f'"script": "{script}"' in environment
    assert re.search(r"^step:9/14 train_loss:\S+ train_time:0ms step_avg:nanms$", metrics, re.M)  # untimed
    time, average = re.search(r"^step:14/14 val_loss:\S+ train_time:(\d+)ms step_avg:(\S+)ms$", metrics, re.M).groups()
    assert 0 < float(average) == pytest.approx(int(time) / 4, abs=1)


@pytest.mark.parametrize("entry", ENTRIES)
def test_runs_in_bfloat16_and_saves(sandbox, entry):
    script = f"records/{entry}/train_gpt.py"
    done = sandbox("--dtype=bfloat16", "--save_every=12", script=script,
                   tiny=[*ENTRY_TINY, *(["--window_end=128"] if entry == VALUE else [])])
    assert done.returncode == 0, done.stderr
    (path,) = (sandbox.path / "records/scratch").glob("*_step000012.pt")
    state = torch.load(path, weights_only=True)
    assert state["step"] == 12 and "embed.weight" in state["model"] and "bfloat16" in done.stdout


def test_ngram_embed_runs_and_resumes_exactly(sandbox):
    """The entry before today's, as it was recorded."""
    script = f"records/{NGRAM}/train_gpt.py"
    flags = [*ENTRY_TINY, "--window_end=128", "--ngrams=3", "--ngram_rows=1021", "--sample_tokens=0", "--save_every=5"]
    whole = sandbox(script=script, tiny=flags)
    assert whole.returncode == 0, whole.stderr
    losses = [float(line.split("loss:")[1]) for line in metric_lines(whole.stdout)]
    assert len(losses) == 14 + 6 and losses[0] == pytest.approx(math.log(384), abs=1e-4) and losses[-1] < 4.5
    (middle,) = (sandbox.path / "records/scratch").glob("*_step000005.pt")
    rest = sandbox(f"--resume={middle}", script=script, tiny=flags)
    after = metric_lines(rest.stdout)
    assert rest.returncode == 0 and len(after) >= 9 and after == metric_lines(whole.stdout)[-len(after):]


@pytest.mark.parametrize("flags, named", [(["--model_dim=33"], "--model_dim"), (["--moun=1"], "--moun"),
                                          (["--num_steps=0"], "--num_steps"), (["--device=cuda"], "--device cpu")])
@pytest.mark.parametrize("entry", [ADAMW, VALUE])
def test_mistakes_end_in_one_line(sandbox, entry, flags, named):
    if flags == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = sandbox(*flags, script=f"records/{entry}/train_gpt.py", tiny=[])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Diffs

def scopes(source):
    """For each line the definition it stands in: function, Class.method, Class.field, CONSTANT, imports, docstring."""
    lines = source.splitlines()
    found = ["sections"] * len(lines)  # comments and rulers between definitions

    def mark(node, name):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found[first - 1:node.end_lineno] = [name] * (node.end_lineno - first + 1)

    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            mark(node, "imports")
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            mark(node, node.name)
            for child in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(child, ast.FunctionDef):
                    mark(child, f"{node.name}.{child.name}")
                elif isinstance(child, ast.AnnAssign):
                    mark(child, f"{node.name}.{child.target.id}")
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
            mark(node, target.id if isinstance(target, ast.Name) else target.elts[0].id)
        elif isinstance(node, ast.Expr):
            mark(node, "docstring")
    return found


def changed_scopes(old, new):
    """The definitions in which a line differs, blank lines apart."""
    a, b = old.splitlines(), new.splitlines()
    scope_a, scope_b = scopes(old), scopes(new)
    changed = set()
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal":
            changed |= {scope_a[i] for i in range(i1, i2) if a[i].strip()}
            changed |= {scope_b[j] for j in range(j1, j2) if b[j].strip()}
    return changed


def source_of(entry):
    return (RECORDS / entry / "train_gpt.py").read_text()


@pytest.mark.parametrize("old, new", list(zip(ENTRIES, ENTRIES[1:], strict=False)))
def test_every_changed_line_is_explained(old, new):
    """The README's list of changes names, in its last column, each definition that differs, and no other."""
    readme = (RECORDS / new / "README.md").read_text()
    section = readme.split("## What is new", 1)[1].split("\n## ", 1)[0]
    rows = [row for row in section.splitlines() if row.startswith("|")][2:]
    explained = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[-2])}
    changed = changed_scopes(source_of(old), source_of(new)) - {"docstring"}
    assert changed - explained == set(), "differ, but the list of changes does not say so"
    assert explained - changed == set(), "named in the list of changes, but alike"


def test_the_docstring_differs_in_its_claim_alone():
    for old, new in zip(ENTRIES, ENTRIES[1:], strict=False):
        a, b = (ast.get_docstring(ast.parse(source_of(entry))).splitlines() for entry in (old, new))
        assert [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y] == [0, 2]


FRAME = ["UserError", "Track", "TRACKS", "knob", "_Parser", "parse_arguments", "lr_scale", "open_shard",
         "TokenStream", "BatchLoader", "start_runtime", "fast_dtype", "compile_pays", "Timer", "_output_of",
         "device_name", "environment", "Log", "metric_line", "save_checkpoint", "train_loop", "run", "run_as_program",
         "main"]


def test_the_frame_is_one_text():
    """Loader, log, timing, command line: word for word the same in the four."""
    def definitions(source):
        return {getattr(node, "name", None) or getattr(node.targets[0], "id", ""): ast.get_source_segment(source, node)
                for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign))}
    texts = [definitions(source_of(entry)) for entry in ENTRIES]
    for name in FRAME:
        assert all(text[name] == texts[0][name] for text in texts), name


@pytest.mark.parametrize("entry", [*ENTRIES, NGRAM])
def test_tracks_are_todays(entry):
    """Data, vocabulary, validation tokens and target, so that results compare; there may be tracks since."""
    module = load(entry)
    entrys, todays = ({name: {**vars(track), "get_data": ""} for name, track in tracks.items()}  # shards differ
                      for tracks in (module.TRACKS, train_gpt.TRACKS))
    assert entrys and all(todays[name] == track for name, track in entrys.items())
    assert module.device_name(CPU) == train_gpt.device_name(CPU)


@pytest.mark.parametrize("entry", [VALUE, NGRAM])
def test_todays_schedules_and_attention_are_theirs(entry):
    """So the tests of today's, against formulas and against brute force, hold for both: today's with one stage's rate,
    no floor, no extension."""
    module = load(entry)
    theirs = module.parse_arguments(["--track=fineweb"])
    hp = train_gpt.Hyperparameters(
        track="laptop", num_steps=theirs.num_steps, extension_steps=0, lr_floor=0.0, momentum_cooldown_steps=0,
        cooldown=theirs.cooldown_steps / theirs.num_steps, momentum_warmup_steps=theirs.momentum_warmup_steps)
    for step in range(theirs.num_steps + 1):
        assert module.lr_scale(step, theirs) == pytest.approx(train_gpt.lr_scale(step, hp), abs=1e-12)
        assert module.muon_momentum(step, theirs) == pytest.approx(train_gpt.muon_momentum(step, hp), abs=1e-12)
    torch.manual_seed(0)
    q, k, v = (torch.randn(200, 2, 16, requires_grad=True) for _ in range(3))
    first_key = torch.arange(200).sub(37).clamp(min=0)
    ours = train_gpt.attention(q / math.sqrt(16), k, v, first_key, 64)  # today's factor is the caller's
    before = module.attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), first_key, 64)[0].transpose(0, 1)
    results = [[y, *torch.autograd.grad(y.square().sum(), (q, k, v))] for y in (ours, before)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [64, 200])
def test_value_embed_has_the_mask_of_today(window):
    """Against which tests/test_attention.py holds the brute-force mask."""
    module = load(VALUE)
    tokens = torch.randint(40, (2, 512), generator=torch.Generator().manual_seed(window))
    ours = train_gpt.first_visible_key(train_gpt.document_start(tokens, 0), torch.tensor(window))
    theirs = module.first_visible_key(tokens, 0, torch.tensor(window))
    assert torch.equal(ours, theirs)
    a, b = train_gpt.block_mask(ours), module.block_mask(theirs)
    for name in ("kv", "full_kv", "q", "full_q"):
        assert torch.equal(getattr(a, f"{name}_num_blocks"), getattr(b, f"{name}_num_blocks")), name
        for i, count in enumerate(getattr(a, f"{name}_num_blocks").flatten()):  # what follows is not looked at
            assert torch.equal(*(getattr(m, f"{name}_indices")[0, 0, i, :count].sort().values for m in (a, b))), name


def test_diff_sizes_in_the_readme():
    readme = (REPOSITORY / "README.md").read_text()
    for old, new in zip(ENTRIES, ENTRIES[1:], strict=False):
        done = subprocess.run(["diff", RECORDS / old / "train_gpt.py", RECORDS / new / "train_gpt.py"],
                              capture_output=True, text=True)
        size = tuple(sum(line.startswith(sign) for line in done.stdout.splitlines()) for sign in "><")
        (row,) = [row for row in readme.splitlines() if row.startswith(f"| [{new}]")]
        assert f"+{size[0]} −{size[1]}" in row, (new, size)
