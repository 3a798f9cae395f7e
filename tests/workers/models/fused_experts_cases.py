"""Run in a process of its own, whose Triton interprets: models whose experts are computed by it, as on a GPU."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tests.workers.models.test_decoder import BLOCK_SIZE, CPU, Sequence, step
from workers.models import fused_experts
from workers.models.decoder import load_decoder
from workers.models.moe import LocalExperts
from workers.models.random_model import write_random_model


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_the_same_logits(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_random_model(tmp_path, family)
    logits, counts = [], []
    for fused in (False, True):
        if fused:
            monkeypatch.setattr("workers.models.moe.fused_experts_on", fused_experts._triton_experts)
        decoder = load_decoder(path, torch.float32, CPU)
        experts = decoder._layers[-1].mlp.experts  # type: ignore[attr-defined]
        assert isinstance(experts, LocalExperts)
        assert (getattr(experts._compute, "func", None) is not fused_experts.plain_experts) == fused
        sequence = Sequence(decoder, decoder.new_kv_cache(6, BLOCK_SIZE), torch.arange(20), torch.arange(5))
        for count in (19, 1):
            step(decoder, sequence._kv_cache, [(sequence, count)])
        logits.append(torch.cat(sequence.logits))
        counts.append(decoder.expert_counts())
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(*counts)


def test_wrong_results_are_not_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from kernels.triton import moe

    right = moe.fused_experts
    monkeypatch.setattr(moe, "fused_experts", lambda *args, **options: right(*args, **options) * 1.01)
    fused_experts._triton_experts.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert fused_experts._triton_experts(CPU, torch.float32, False, None) is None
    assert "Triton can't be used" in caplog.text
    fused_experts._triton_experts.cache_clear()
