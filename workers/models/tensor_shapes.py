"""Name and shape of every tensor that a checkpoint of an architecture holds, before quantization. No torch."""

from __future__ import annotations

from workers.models.expert_form import ExpertForm, Shapes, expert_form, mlp_shapes
from workers.models.spec import DecoderSpec, MlaSpec

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"


def expected_shapes(spec: DecoderSpec, form: ExpertForm | None = None) -> Shapes:
    """By Hugging Face name. A matrix is [out, in], a bias or norm [out]. `form` of the experts: the published one."""
    form = form or expert_form(spec)
    shapes: Shapes = {
        f"{EMBEDDING}.weight": (spec.vocab_size, spec.hidden_size),
        "model.norm.weight": (spec.hidden_size,),
    }
    if not spec.tied_embeddings:
        shapes[f"{HEAD}.weight"] = (spec.vocab_size, spec.hidden_size)
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _layer_shapes(spec, layer, form).items()}
    return shapes


def _layer_shapes(spec: DecoderSpec, layer: int, form: ExpertForm) -> Shapes:
    shapes: Shapes = {
        "input_layernorm.weight": (spec.hidden_size,),
        "post_attention_layernorm.weight": (spec.hidden_size,),
    }
    shapes |= _grouped_shapes(spec) if spec.mla is None else _latent_shapes(spec, spec.mla)
    moe = spec.sparse(layer)
    if moe is not None:
        return shapes | form.sparse_shapes(spec, moe)
    return shapes | mlp_shapes("mlp", spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)


def _grouped_shapes(spec: DecoderSpec) -> Shapes:
    hidden = spec.hidden_size
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: Shapes = {}
    if spec.qk_norm:
        shapes["self_attn.q_norm.weight"] = (q_rows if spec.qk_norm_whole else spec.head_dim,)
        shapes["self_attn.k_norm.weight"] = (kv_rows if spec.qk_norm_whole else spec.head_dim,)
    if spec.sinks:
        shapes["self_attn.sinks"] = (spec.num_heads,)
    for name, rows, columns, bias in (
        ("q_proj", q_rows, hidden, spec.qkv_bias),
        ("k_proj", kv_rows, hidden, spec.qkv_bias),
        ("v_proj", kv_rows, hidden, spec.qkv_bias),
        ("o_proj", hidden, q_rows, spec.output_bias),
    ):
        shapes[f"self_attn.{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"self_attn.{name}.bias"] = (rows,)
    return shapes


def _latent_shapes(spec: DecoderSpec, mla: MlaSpec) -> Shapes:
    hidden, heads, rank = spec.hidden_size, spec.num_heads, mla.q_lora_rank
    if rank is None:
        queries: Shapes = {"q_proj": (heads * mla.query_dim, hidden)}
    else:
        queries = {
            "q_a_proj": (rank, hidden),
            "q_a_layernorm": (rank,),
            "q_b_proj": (heads * mla.query_dim, rank),
        }
    shapes = queries | {
        "kv_a_proj_with_mqa": (mla.latent_dim, hidden),
        "kv_a_layernorm": (mla.kv_lora_rank,),
        "kv_b_proj": (heads * (mla.nope_dim + mla.value_dim), mla.kv_lora_rank),
        "o_proj": (hidden, heads * mla.value_dim),
    }
    return {f"self_attn.{name}.weight": shape for name, shape in shapes.items()}
