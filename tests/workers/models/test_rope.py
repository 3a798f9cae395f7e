"""Frequencies and angles against transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kernels.reference import rope_rotate
from workers.models.rope import RopeTable, inverse_frequencies
from workers.models.spec import DecoderSpec

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "default_1e6": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn_options": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
        "truncate": False,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "yarn_tiny": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 4,
    },
}


def config_of(scaling: dict[str, Any], head_dim: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=dict(scaling),
    )


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_equals_transformers(scaling: dict[str, Any], head_dim: int) -> None:
    config = config_of(scaling, head_dim)
    ours, factor = inverse_frequencies(DecoderSpec.from_config(config.to_dict()).rope, head_dim)
    if scaling["rope_type"] == "default":
        theirs, their_factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        theirs, their_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert factor == pytest.approx(their_factor)


@pytest.mark.parametrize("scaling", [SCALINGS["default"], SCALINGS["yarn_options"]], ids=["default", "yarn"])
def test_table_rotates_as_transformers_does(scaling: dict[str, Any]) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    config = config_of(scaling, 32)
    q, k = torch.randn(1, 4, 5, 32), torch.randn(1, 2, 5, 32)
    positions = torch.tensor([0, 1, 17, 900, 4095])
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin)
    rope = DecoderSpec.from_config(config.to_dict()).rope
    table = RopeTable(rope, 32, 4096, torch.float32, torch.device("cpu"))
    ours = rope_rotate(torch.cat((q, k), 1)[0].transpose(0, 1), *table.at(positions))
    expected = torch.cat((expected_q, expected_k), 1)[0].transpose(0, 1)
    torch.testing.assert_close(
        ours, expected, rtol=1e-5, atol=2e-4
    )  # angles of 4095 rad differ in the last bits
