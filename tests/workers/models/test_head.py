"""The head's best logits are exact where 16 bits would make them equal."""

from __future__ import annotations

import pytest
import torch

from workers.models.head import Head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("vocab", [10, 500])
def test_close_to_float32_everywhere_and_exact_at_the_top(dtype: torch.dtype, rows: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab + rows)
    weight = torch.randn(vocab, 64, generator=generator).to(dtype)
    hidden = (3 * torch.randn(rows, 64, generator=generator)).to(dtype)
    logits = Head(weight)(hidden)
    expected = hidden.double() @ weight.double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, atol=0.3, rtol=0.01)
    best = expected.topk(min(8, vocab), dim=-1).indices
    torch.testing.assert_close(
        logits.double().gather(-1, best), expected.gather(-1, best), atol=1e-4, rtol=1e-5
    )


def test_a_tie_in_16_bits_is_none() -> None:
    """25.3 and 25.26 are both 25.25 in bfloat16; the lower id would win."""
    weight = torch.zeros(3, 32)
    weight[1, :2] = torch.tensor([25.25, 0.01])
    weight[2, :2] = torch.tensor([25.25, 0.05])
    hidden = torch.zeros(1, 32)
    hidden[0, :2] = 1.0
    assert int(Head(weight.bfloat16())(hidden.bfloat16()).argmax()) == 2
