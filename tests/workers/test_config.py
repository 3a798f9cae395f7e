"""What settings that are left out become."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from workers.config import EngineConfig


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_is_as_large_as_suits_the_device(device: str) -> None:
    seqs, tokens = EngineConfig().batch(device)
    assert (seqs, tokens) == {"cpu": (64, 512), "cuda": (256, 2048)}[device]
    assert EngineConfig(max_num_seqs=7).batch(device) == (7, tokens)
    assert EngineConfig(max_num_seqs=7, max_num_batched_tokens=9).batch(device) == (7, 9)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_left_out_goes_with_what_is_given(device: str) -> None:
    assert EngineConfig(max_num_batched_tokens=16).batch(device) == (16, 16)
    assert EngineConfig(max_num_seqs=4000).batch(device) == (4000, 4000)


def test_every_sequence_has_a_token() -> None:
    with pytest.raises(
        ValidationError, match=r"max_num_batched_tokens \(8\) must be at least max_num_seqs \(9\)"
    ):
        EngineConfig(max_num_seqs=9, max_num_batched_tokens=8)
