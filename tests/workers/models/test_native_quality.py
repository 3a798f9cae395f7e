"""What each format of the native kernels costs on real text: bounds on the divergence from transformers in float32."""

from __future__ import annotations

import pytest
import torch

from bench.quality import NativeLogits, TransformersLogits, text_windows
from workers.models.catalog import PreparedModel

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
