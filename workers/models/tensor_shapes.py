"""Name and shape of every tensor that a checkpoint of an architecture holds, before quantization. No torch."""

from __future__ import annotations

from workers.models.spec import DecoderSpec

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"


def expected_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """By Hugging Face name. A matrix is [out, in], a bias or norm [out]."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        f"{EMBEDDING}.weight": (spec.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not spec.tied_embeddings:
        shapes[f"{HEAD}.weight"] = (spec.vocab_size, hidden)
    projections = [
        ("self_attn.q_proj", q_rows, hidden, spec.qkv_bias),
        ("self_attn.k_proj", kv_rows, hidden, spec.qkv_bias),
        ("self_attn.v_proj", kv_rows, hidden, spec.qkv_bias),
        ("self_attn.o_proj", hidden, q_rows, spec.output_bias),
        ("mlp.gate_proj", inner, hidden, spec.mlp_bias),
        ("mlp.up_proj", inner, hidden, spec.mlp_bias),
        ("mlp.down_proj", hidden, inner, spec.mlp_bias),
    ]
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if spec.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (spec.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (spec.head_dim,)
        for name, rows, columns, bias in projections:
            shapes[prefix + name + ".weight"] = (rows, columns)
            if bias:
                shapes[prefix + name + ".bias"] = (rows,)
    return shapes
