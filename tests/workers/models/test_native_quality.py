"""What each format of the native kernels costs on real text: bounds on the divergence from transformers in float32."""

from __future__ import annotations

import pytest
import torch

from bench.quality import NativeLogits, TorchLogits, TransformersLogits, text_windows
from kernels.reference_relayout import Wire
from workers.models.catalog import PreparedModel
from workers.models.scheme import FLOATS

TOKENS = 512
# KL in nats per token. docs/quantization.md has the figures of 16,384 tokens: 0.0002, 0.001, 0.004, 0.003.
BOUNDS = {
    ("none", "auto"): 0.0006,
    ("none", "int8"): 0.004,
    ("int8", "auto"): 0.012,
    ("stored", "auto"): 0.012,
    ("stored", "int8"): 0.015,
}


@pytest.fixture(scope="module")
def exact(smollm2: PreparedModel) -> torch.Tensor:
    """Log-probabilities, [TOKENS, vocab]."""
    return TransformersLogits(smollm2)(text_windows(smollm2, TOKENS, TOKENS)[0]).log_softmax(-1).clone()


@pytest.mark.parametrize(("quantization", "kv_cache"), BOUNDS)
def test_divergence(smollm2: PreparedModel, exact: torch.Tensor, quantization: str, kv_cache: str) -> None:
    logits = NativeLogits(smollm2, quantization, kv_cache, TOKENS)(text_windows(smollm2, TOKENS, TOKENS)[0])
    got = logits.log_softmax(-1)
    divergence = (exact.exp() * (exact - got)).sum(-1).mean()
    assert 0 <= divergence < BOUNDS[quantization, kv_cache]
    assert (got.argmax(-1) == exact.argmax(-1)).float().mean() > 0.93


@pytest.mark.parametrize(
    ("wire", "bound"),
    [
        pytest.param(None, 0.0012, marks=pytest.mark.slow),
        pytest.param("int8", 0.005, marks=pytest.mark.slow),
        ("fp8", 0.025),
    ],
)
def test_divergence_of_torch_with_each_kv_cache(
    smollm2: PreparedModel, exact: torch.Tensor, wire: Wire | None, bound: float
) -> None:
    """docs/quantization.md has the figures of 16,384 tokens: 0.0004, 0.0014, 0.0077. Here the beginning of one window."""
    tokens = text_windows(smollm2, TOKENS, TOKENS)[0][:128]
    got = TorchLogits(smollm2, FLOATS, torch.bfloat16, TOKENS, wire)(tokens).float().log_softmax(-1)
    divergence = (exact[:128].exp() * (exact[:128] - got)).sum(-1).mean()
    assert 0 <= divergence < bound
    assert (got.argmax(-1) == exact[:128].argmax(-1)).float().mean() > 0.9
