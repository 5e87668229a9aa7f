"""The four historical entries: the points in which they were nearly right once, to the last digit."""
import pytest
import torch
import torch.nn.functional as F
from test_records import ADAMW, ENTRIES, MODERN, load, loss_of, small

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
        def spy(x, *rest, name=name, real=getattr(module, name)):
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
