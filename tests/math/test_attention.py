"""Attention: both kernels against a plain softmax, rotary embeddings and one layer's attention
against the float64 reference, paired heads, key offset, XSA."""
import math
from dataclasses import replace

import pytest
import torch
from conftest import away_from_zero
from reference import model as reference_model
from reference.mask import EOT, random_tokens, rule

import train_gpt
from train_gpt import (
    LAYERS,
    Attention,
    Schedule,
    attention,
    block_lists,
    block_mask,
    chunked_attention,
    document_start,
    first_visible_key,
    paired_rotary_tables,
    rotary_tables,
    rotate,
)

CPU = torch.device("cpu")
# It warns that it is slow without torch.compile.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention")


def plain_attention(q, k, v, mask):
    """softmax(q k^T) v in float64 with a dense mask, for (..., T, d)."""
    scores = (q.double() @ k.double().mT).masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v.double()).float()


# --- Kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("T, window, max_window", [
    (256, 64, 64), (256, 40, 128), (64, 64, 256), (333, 100, 192), (100, 33, 33)])
def test_chunked_attention_and_its_gradients_agree_with_a_plain_softmax(T, window, max_window):
    torch.manual_seed(T)
    tokens = random_tokens(T, seed=T)
    first_key = first_visible_key(document_start(tokens[None], EOT), torch.tensor(window))
    q, k, v = (torch.randn(3, T, 8, requires_grad=True) for _ in range(3))
    grad_y = torch.randn(3, T, 8)
    y = chunked_attention(q, k, v, first_key, max_window)
    expected = plain_attention(q, k, v, rule(tokens, window))
    torch.testing.assert_close(y, expected, atol=2e-5, rtol=1e-4)
    grads = torch.autograd.grad(y, (q, k, v), grad_y)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad_y)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [64, 300])
def test_both_kernels_agree_with_a_plain_softmax(window):
    torch.manual_seed(0)
    tokens = random_tokens(512, seed=5)
    q, k, v = (torch.randn(512, 2, 16) / 4 for _ in range(3))
    first_key = first_visible_key(document_start(tokens[None], EOT), torch.tensor(window))
    expected = plain_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1),
                               rule(tokens, window)).transpose(0, 1)
    with torch.no_grad():  # FlexAttention has no backward pass on a CPU
        flex = attention(q, k, v, block_mask(first_key, block_lists(first_key)), max_window=512)
        chunked = attention(q, k, v, first_key, max_window=512)
    torch.testing.assert_close(flex, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(chunked, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("step", [0, 14])
def test_both_kernels_give_the_recipe_the_same_logits(recipe, recipe_model, step):
    """All 11 layers, two sequences with documents: a CPU trains the model that a GPU trains."""
    tokens = torch.randint(256, (2, 384), generator=torch.Generator().manual_seed(step))
    tokens[0, 77] = tokens[1, 300] = 256
    schedule = Schedule(step, recipe, CPU)
    with torch.no_grad():
        chunked = recipe_model(tokens, None, schedule)
        recipe_model.flex = True
        flex = recipe_model(tokens, None, schedule)
    torch.testing.assert_close(flex, chunked, atol=1e-4, rtol=1e-5)


# --- Rotary embeddings ----------------------------------------------------------------------------


def frequencies_of(head_dim: int) -> torch.Tensor:
    """Rotary frequencies of a run whose window has grown once."""
    return reference_model.yarn([384, 896], head_dim // 4)[0].float()


def test_rotated_products_depend_only_on_the_distance():
    torch.manual_seed(0)
    rotary = rotary_tables(frequencies_of(16), 64)
    q, k = torch.randn(16), torch.randn(16)
    rotated_q = rotate(q.expand(64, 1, 16), rotary)[:, 0]
    rotated_k = rotate(k.expand(64, 1, 16), rotary)[:, 0]
    products = rotated_q @ rotated_k.T
    for distance in (0, 1, 13):
        same_distance = products.diagonal(-distance)
        torch.testing.assert_close(same_distance, same_distance[:1].expand_as(same_distance),
                                   atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(64), atol=1e-4, rtol=1e-4)


def test_rotation_agrees_with_complex_multiplication():
    """Position p multiplies x[i] + i x[i + d / 4] by exp(-i p frequency). Half of each head
    stays."""
    torch.manual_seed(0)
    frequencies = frequencies_of(16)
    x = torch.randn(10, 2, 16)
    rotated = rotate(x, rotary_tables(frequencies, 10))
    for position in range(10):
        for head in range(2):
            expected = reference_model.rotate(x[position, head], position, frequencies)
            torch.testing.assert_close(rotated[position, head], expected)
    assert torch.equal(rotated[..., 8:], x[..., 8:])
    assert not torch.isclose(rotated[1:, :, :8], x[1:, :, :8]).all()


def test_rotary_tables_are_as_precise_as_float32_angles():
    """Paired heads have up to 2 * 262,144 positions in a validation. Angles of 2^19 radians are
    2^-5 apart in float32."""
    frequencies = reference_model.yarn([384], 32)[0].float()
    position = torch.tensor([0, 1, 77_777, 2 * 262_144 - 1])
    cos, sin = rotary_tables(frequencies, 2 * 262_144)[:, position]
    angle = position[:, None, None].double() * frequencies.double()
    torch.testing.assert_close(cos.double(), angle.cos(), atol=0.03, rtol=0)
    torch.testing.assert_close(sin.double(), angle.sin(), atol=0.03, rtol=0)
    assert (cos[:2].double() - angle[:2].cos()).abs().max() < 1e-6


# --- One layer's attention ------------------------------------------------------------------------


def make_layer(hp, kind: str, value_table=None, narrow=None) -> Attention:
    """The attention of one layer, with noise on all weights that start at zero."""
    layer = LAYERS["fineweb"][0]._replace(
        attention=kind, narrow_qk=kind != "long" if narrow is None else narrow,
        value_table=value_table, xsa=kind != "paired",
        mudd=False)
    return away_from_zero(Attention(hp, layer))


def run_layer(hp, layer, x, tokens, value_embed=None, window=9):
    """The layer's output for x (T, D)."""
    positions_per_token = 2 if layer.kind == "paired" else 1
    start = document_start(tokens[None], EOT)
    is_doc_start = start == torch.arange(len(x))
    start = (positions_per_token * start).repeat_interleave(positions_per_token)
    frequencies = frequencies_of(hp.model_dim // hp.num_heads)
    rotary = rotary_tables(frequencies, len(x))
    if layer.kind == "paired":
        rotary = paired_rotary_tables(frequencies, len(x), hp.num_heads)
    with torch.no_grad():
        return layer(
            x, value_embed, is_doc_start,
            rotary=rotary,
            scale=torch.tensor(0.3),
            mask=first_visible_key(start, torch.tensor(window)),
            value_gates=None,
            v_skip=None)


def run_reference(hp, layer, number, x, tokens, value_embed=None, window=9):
    """The same by the reference; number: a layer of the recipe that has the same kind of
    attention."""
    parameters = {f"blocks.{number}.attention.{name}": p.detach().double()
                  for name, p in layer.named_parameters()}
    return reference_model.attention(
        parameters, number, x.double(),
        value_embed=None if value_embed is None else value_embed.double(),
        H=hp.num_heads,
        starts=reference_model.document_starts(tokens.tolist(), EOT),
        windows={"short": window, "long": window},
        frequencies=frequencies_of(hp.model_dim // hp.num_heads).double(),
        scale=0.3)


@pytest.mark.parametrize("kind, number", [("paired", 0), ("long", 3), ("short", 4)])
@pytest.mark.parametrize("num_heads", [2, 4, 6])
def test_attention_agrees_with_the_reference(recipe, kind, number, num_heads):
    torch.manual_seed(num_heads)
    hp = replace(recipe, num_heads=num_heads, model_dim=16 * num_heads)
    layer = make_layer(hp, kind)
    tokens = random_tokens(30, seed=1, mean_length=8)
    x = torch.randn(30, hp.model_dim)
    y = run_layer(hp, layer, x, tokens)
    expected = run_reference(hp, layer, number, x, tokens)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


def test_gated_value_embeddings_agree_with_the_reference(recipe):
    torch.manual_seed(0)
    layer = make_layer(recipe, "short", value_table=0)
    tokens = random_tokens(30, seed=1)
    x, value_embed = torch.randn(30, 32), torch.randn(30, 32)
    y = run_layer(recipe, layer, x, tokens, value_embed)
    expected = run_reference(recipe, layer, 1, x, tokens, value_embed)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    without = run_layer(recipe, layer, x, tokens, 0 * value_embed)
    assert (y - without).abs().max() > 0.1


def test_value_gates_are_one_at_initialization(recipe):
    """A token that sees only itself, and whose own V is zero, outputs its value embedding, and the
    output map has a learned factor."""
    torch.manual_seed(0)
    layer = make_layer(recipe, "short", value_table=0)
    with torch.no_grad():
        layer.value_gate.zero_()
        layer.v_lambda.zero_()
        layer.xsa_lambdas.zero_()
    x, value_embed = torch.randn(30, 32), torch.randn(30, 32)
    y = run_layer(recipe, layer, x, random_tokens(30, seed=1), value_embed, window=0)
    with torch.no_grad():
        gate = torch.sigmoid(x[:, :12] @ layer.gate.T)
        gated = (value_embed.view(30, 2, 16) * gate[..., None]).flatten(1)
        expected = layer.proj_lambda * layer.proj(gated)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_xsa_of_a_zero_value_is_zero_with_a_finite_gradient(recipe):
    """XSA divides by the squared norm of the token's own value."""
    layer = make_layer(recipe, "short")
    layer.v.weight.data.zero_()
    x = torch.randn(6, 32, requires_grad=True)
    y = layer(
        x, None, torch.arange(6) == 0,
        rotary=torch.ones(2, 6, 1, 4),
        scale=torch.tensor(1.0),
        mask=first_visible_key(torch.zeros(6, dtype=torch.long), torch.tensor(9)),
        value_gates=None,
        v_skip=None)
    y.sum().backward()
    assert not y.any()
    assert x.grad.isfinite().all()


def test_the_first_head_of_a_pair_does_not_see_the_second_at_its_own_token(recipe):
    """The second head's key and value at a token reach the second head there, and both heads at
    later tokens."""
    torch.manual_seed(0)
    layer = make_layer(recipe, "paired")
    layer.proj.weight.data.copy_(torch.eye(32)[None])  # the output shows the heads one by one
    x = torch.randn(6, 32)
    tokens = torch.zeros(6, dtype=torch.long)
    before = run_layer(recipe, layer, x, tokens, window=100).view(6, 2, 16)
    layer.qk.weight.data[1, 16:] += 1  # the second head's rows of K and V
    layer.v.weight.data[0, 16:] += 1
    after = run_layer(recipe, layer, x, tokens, window=100).view(6, 2, 16)
    differs = (before != after).any(-1)
    assert not differs[0, 0]
    assert differs[0, 1]
    assert differs[1:].all()


def test_long_layers_take_half_of_each_key_from_the_token_before(recipe, monkeypatch):
    """The half that is not rotated comes from the token before, or from the token itself where a
    document begins. In short layers both halves come from the token itself."""
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    tokens = torch.zeros(20, dtype=torch.long)
    tokens[[7, 8]] = EOT
    keys = {}
    for kind in ("long", "short"):
        def record_keys(q, k, v, mask, max_window, kind=kind):
            keys[kind] = k
            return v
        monkeypatch.setattr(train_gpt, "attention", record_keys)
        torch.manual_seed(0)
        run_layer(recipe, make_layer(recipe, kind, narrow=False), x, tokens)
    assert torch.equal(keys["long"][..., :8], keys["short"][..., :8])
    for t in range(20):
        source = t if t in (0, 7, 8) else t - 1
        assert torch.equal(keys["long"][t, :, 8:], keys["short"][source, :, 8:])
    assert not torch.equal(keys["long"], keys["short"])
