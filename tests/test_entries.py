"""The four historical entries: the points in which they were nearly right once, to the last digit."""
import pytest
import torch
import torch.nn.functional as F
from test_records import ADAMW, ENTRIES, load

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
