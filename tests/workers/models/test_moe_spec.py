"""config.json of mixture-of-experts families, against transformers' reading of the same values."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from workers.models.errors import ModelError
from workers.models.spec import DecoderSpec, MoeSpec

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "vocab_size": 100,
}
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"]

# What transformers needs to be told: it has no default, or one that contradicts SIZES.
NEEDED = {"deepseek_v2": {"num_experts_per_tok": 3}, "deepseek_v3": {"num_key_value_heads": 16}}


def read(model_type: str, **values: Any) -> DecoderSpec:
    return DecoderSpec.from_config({"model_type": model_type, **SIZES, **values})


def experts(model_type: str, **values: Any) -> MoeSpec:
    moe = read(model_type, **values).moe
    assert moe is not None
    return moe


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    needed = NEEDED.get(model_type, {})
    theirs = AutoConfig.for_model(model_type, **SIZES, **needed)
    ours = read(model_type, **needed)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.kind == theirs.rope_parameters["rope_type"]
    if ours.mla is None:
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 4)
    else:
        assert (ours.num_kv_heads, ours.kv_planes, ours.head_dim) == (1, 1, 512 + 64)
        assert ours.mla.q_lora_rank == theirs.q_lora_rank
        assert ours.mla.query_dim == theirs.qk_head_dim
        assert ours.mla.value_dim == theirs.v_head_dim
    moe = ours.moe
    assert moe is not None
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    assert moe.num_experts == next(getattr(theirs, name) for name in names if hasattr(theirs, name))
    assert moe.top_k == theirs.num_experts_per_tok
    assert moe.intermediate_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    assert DecoderSpec.from_config(theirs.to_dict()) == ours  # the long form that save_pretrained writes


def test_shared_experts() -> None:
    assert experts("qwen2_moe").shared_intermediate_size == 5632
    assert experts("deepseek_v3", n_shared_experts=3).shared_intermediate_size == 3 * 2048
    assert experts("mixtral").shared_intermediate_size == 0
    assert [experts(f, num_experts_per_tok=2).shared_gate for f in FAMILIES] == [False, True] + [False] * 5


def test_which_layers_are_sparse() -> None:
    assert experts("mixtral").layers == (True,) * 4
    assert experts("qwen3_moe", decoder_sparse_step=2).layers == (False, True, False, True)
    assert experts("qwen2_moe", mlp_only_layers=[0, 3]).layers == (False, True, True, False)
    assert experts("deepseek_v3", first_k_dense_replace=1).layers == (False, True, True, True)
    dense_first = read("deepseek_v3", first_k_dense_replace=1)
    assert dense_first.sparse(0) is None
    assert dense_first.sparse(1) == dense_first.moe


def test_sliding_windows() -> None:
    assert read("mixtral").windows == (None,) * 4
    assert read("mixtral", sliding_window=8).windows == (8,) * 4
    assert read("qwen3_moe", sliding_window=8).windows == (None,) * 4
    assert read("qwen3_moe", sliding_window=8, use_sliding_window=True).windows == (8,) * 4
    asked = {"sliding_window": 8, "use_sliding_window": True}
    assert read("qwen2_moe", **asked).windows == (8, None, 8, None)
    assert read("qwen2_moe", **asked, max_window_layers=1).windows == (8, None, None, None)
    assert read("gpt_oss").windows == (128, None, 128, None)


def test_yarn_stretches_the_scores_of_latent_attention() -> None:
    """transformers: (0.1 * mscale_all_dim * ln(factor) + 1)^2 / sqrt(query_dim)."""
    rope = {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7}
    plain = read("deepseek_v3").scale
    assert read("deepseek_v3", rope_parameters=rope).scale / plain == pytest.approx(1.203490, rel=1e-5)
    assert read("deepseek_v3", rope_parameters={**rope, "mscale_all_dim": None}).scale == plain


@pytest.mark.parametrize(
    ("model_type", "values", "named"),
    [
        ("mixtral", {"num_local_experts": 0}, "num_local_experts must be a positive integer"),
        ("mixtral", {"num_experts_per_tok": 9}, "9 of the 8 experts"),
        ("qwen3_moe", {"mlp_only_layers": "1"}, "mlp_only_layers must be a list of layers, not '1'"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported; supported is null"),
        ("deepseek_v3", {"n_group": 7}, "256 experts cannot be cut into 7 equal groups"),
        ("deepseek_v3", {"topk_group": 9}, "9 of 8 groups"),
        ("deepseek_v3", {"n_routed_experts": 8}, "groups of 8 experts have one"),
        ("deepseek_v3", {"num_experts_per_tok": 129}, "129 of the 128 experts"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads 2"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "7"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias True"),
        ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace must be an integer >= 0"),
        ("deepseek_v2", {"topk_method": "random"}, "'greedy' or 'group_limited_greedy'"),
        ("deepseek_v2", {}, "num_experts_per_tok"),
    ],
)
def test_what_cannot_be_run_is_named(model_type: str, values: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError) as raised:
        read(model_type, **values)
    assert named in str(raised.value)
