"""The published config.json of each family of experts is read, and stands for as many weights as its model card says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from workers.models.spec import DecoderSpec
from workers.models.tensor_shapes import expected_shapes

_QWEN = {"vocab_size": 151936, "hidden_size": 2048, "use_sliding_window": False, "rope_theta": 1000000.0}
_DEEPSEEK = {
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Mixtral-8x7B-v0.1": (
        46_702_792_704,
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "sliding_window": None,
            "vocab_size": 32000,
        },
    ),
    "Qwen1.5-MoE-A2.7B": (
        14_315_784_192,
        {
            **_QWEN,
            "model_type": "qwen2_moe",
            "decoder_sparse_step": 1,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        {
            **_QWEN,
            "model_type": "qwen3_moe",
            "head_dim": 128,
            "intermediate_size": 6144,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
        },
    ),
    "OLMoE-1B-7B-0924": (
        6_919_161_856,
        {
            "model_type": "olmoe",
            "clip_qkv": None,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "vocab_size": 50304,
        },
    ),
    "DeepSeek-V2-Lite": (
        15_706_484_224,
        {
            **_DEEPSEEK,
            "model_type": "deepseek_v2",
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "scoring_func": "softmax",
            "topk_group": 1,
            "topk_method": "greedy",
            "vocab_size": 102400,
        },
    ),
    "DeepSeek-V3": (
        671_026_419_200,  # without the layer that predicts a further token
        {
            **_DEEPSEEK,
            "model_type": "deepseek_v3",
            "first_k_dense_replace": 3,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": 1536,
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "vocab_size": 129280,
        },
    ),
    "gpt-oss-20b": (
        20_914_757_184,
        {
            "model_type": "gpt_oss",
            "attention_bias": True,
            "experts_per_token": 4,
            "head_dim": 64,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "num_attention_heads": 64,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "quantization_config": {"quant_method": "mxfp4"},
            "rope_theta": 150000,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "vocab_size": 201088,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_weights_as_the_model_card_says(name: str) -> None:
    parameters, config = PUBLISHED[name]
    spec = DecoderSpec.from_config({"tie_word_embeddings": False, **config})
    assert sum(math.prod(shape) for shape in expected_shapes(spec).values()) == parameters
