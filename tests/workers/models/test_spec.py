from __future__ import annotations

from typing import Any

import pytest

from workers.models.errors import ModelError
from workers.models.spec import DecoderSpec

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def read(model_type: str, **values: Any) -> DecoderSpec:
    return DecoderSpec.from_config({"model_type": model_type, **SIZES, **values})


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(model_type, **SIZES)
    ours = read(model_type)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert DecoderSpec.from_config(theirs.to_dict()) == ours  # the long form that save_pretrained writes
    without = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"} | {
        "num_attention_heads": 32
    }
    kv_heads = AutoConfig.for_model(model_type, **without).num_key_value_heads
    assert (
        DecoderSpec.from_config({"model_type": model_type, **without, "hidden_size": 512}).num_kv_heads
        == kv_heads
    )


def test_biases_and_norms_by_architecture() -> None:
    def parts(spec: DecoderSpec) -> tuple[bool, bool, bool, bool]:
        return spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.qk_norm

    assert parts(read("llama")) == (False, False, False, False)
    assert parts(read("llama", attention_bias=True, mlp_bias=True)) == (True, True, True, False)
    assert parts(read("mistral", attention_bias=True)) == (False, False, False, False)
    assert parts(read("qwen2")) == (True, False, False, False)
    assert parts(read("qwen3")) == (False, False, False, True)
    assert parts(read("qwen3", attention_bias=True)) == (True, True, False, True)


def test_sliding_windows() -> None:
    assert read("llama", sliding_window=8).windows == (None,) * 4
    assert read("mistral", sliding_window=8).windows == (8,) * 4
    assert read("mistral", sliding_window=None).windows == (None,) * 4
    assert read("mistral").windows == (4096,) * 4
    assert read("qwen2", sliding_window=8, max_window_layers=2).windows == (None,) * 4
    assert read("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3).windows == (
        None,
    ) * 3 + (8,)
    kinds = ["full_attention", "sliding_attention"] * 2
    got = read("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=0, layer_types=kinds)
    assert got.windows == (None, 8, None, 8)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_rope_in_the_old_and_the_new_form(model_type: str) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 128}
    new = read(model_type, rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **scaling})
    old = read(model_type, rope_theta=5e5, rope_scaling={"type": "yarn", **scaling})
    assert new == old
    assert (new.rope.kind, new.rope.theta, new.rope.factor) == ("yarn", 5e5, 4.0)
    assert new.rope.original_max_position == 128
    assert read(model_type, rope_theta=7.0, rope_scaling=None).rope.theta == 7.0


@pytest.mark.parametrize(
    ("model_type", "values", "named"),
    [
        ("gemma3", {}, "'gemma3' is not supported; supported are llama, mistral, qwen2, qwen3"),
        ("phimoe", {}, "phimoe"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("llama", {"hidden_size": "64"}, "hidden_size"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers"),
        ("llama", {"num_key_value_heads": 3}, "3 KV heads"),
        ("llama", {"hidden_size": 66}, "66"),
        ("llama", {"head_dim": 15}, "15"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ("llama", {"rms_norm_eps": -1}, "rms_norm_eps"),
        ("llama", {"rope_theta": 0}, "rope_theta"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "'factor'"),
        ("llama", {"rope_scaling": "linear"}, "rope_parameters"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by layer type"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"quantization_config": {"quant_method": "hqq"}}, "'hqq' are not read; gptq, awq"),
        (
            "llama",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}},
            "weight_block_size 128 is not read",
        ),
        ("llama", {"quantization_config": "gptq"}, "quantization_config must be an object"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "4 layers"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["chunked"] * 4}, "chunked"),
    ],
)
def test_what_cannot_be_run_is_named(model_type: str, values: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=".*".join(named.split("|"))) as raised:
        read(model_type, **values)
    assert named in str(raised.value)


def test_no_architecture_at_all() -> None:
    with pytest.raises(ModelError, match="None is not supported"):
        DecoderSpec.from_config(SIZES)
