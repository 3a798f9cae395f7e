"""Tiny random models of families that only transformers has, as directories that `prepare_model` takes."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from workers.models.random_model import write_random_model

VOCAB_SIZE = 259  # of write_random_model's tokenizer

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_GPT_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_ANY_SIZES = {  # of which a family takes what it knows
    **_SIZES,
    **_GPT_SIZES,
    "head_dim": 8,
    "sliding_window": 7,
    "query_pre_attn_scalar": 24,
    "pad_token_id": 0,
    "ffn_dim": 48,
    "dff": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    "head_dim": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {  # both soft caps, every other layer with a window, a scale of its own
        **_SIZES,
        "head_dim": 8,
        "sliding_window": 7,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_SIZES,
        "head_dim": 8,
        "sliding_window": 6,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {**_SIZES, "sliding_window": 9, "pad_token_id": 0},
    "glm4": {**_SIZES, "head_dim": 8, "pad_token_id": 0},
    "stablelm": {**_SIZES, "use_qkv_bias": True, "use_parallel_residual": True},
    "cohere": {**_SIZES, "logit_scale": 0.3, "use_qk_norm": True},
    "gpt_neox": {**_SIZES, "rotary_pct": 0.5},
    "gpt2": {**_GPT_SIZES, "scale_attn_by_inverse_layer_idx": True},
    "opt": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "granite": {**_SIZES, "attention_multiplier": 0.2, "logits_scaling": 0.5, "residual_multiplier": 0.7},
    "olmo2": _SIZES,
    "starcoder2": {**_SIZES, "sliding_window": 7},
}
MORE_FAMILIES = """afmoe apertus arcee aria_text beam biogpt bitnet cohere2 cohere2_moe ctrl cwm ernie4_5 ernie4_5_moe
exaone4 exaone_moe flex_olmo flint gemma gemma4_unified_text glm glm4_moe glm4_moe_lite gpt_bigcode granite_swa granitemoe
granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe
kolibri1 laguna mellum minicpm3 minimax_m2 ministral ministral3 modernbert-decoder nanochat nemotron olmo olmo3 persimmon phi
phimoe seed_oss smollm3 solar_open vaultgemma youtu""".split()  # noqa: SIM905  (a list would take 56 lines)
_HEADS_FROM_LATENTS = ("glm4_moe_lite", "minicpm3", "youtu")  # keys and values of unequal size


def write_fallback_model(path: Path, family: str, seed: int = 0, **values: Any) -> Path:
    """A directory with the byte-level tokenizer, float32 weights and `values` over the family's small sizes."""
    write_random_model(path)  # for its tokenizer; the model is written over
    make = CONFIG_MAPPING[family]
    given = FAMILIES.get(family)
    if given is None:
        sizes = _ANY_SIZES | (_LATENT if family in _HEADS_FROM_LATENTS else {})
        known = set(inspect.signature(make.__init__).parameters) - set(make.attribute_map)
        given = {key: value for key, value in sizes.items() if key in known}
    config = make(vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, **{**given, **values})
    write_model(path, config, seed)
    return path


def write_model(path: Path, config: PretrainedConfig, seed: int = 0) -> None:
    """Weights so large that what attention gives decides, and greedy text does not repeat itself."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 2 / math.sqrt(weight.shape[-1]))
            else:
                weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(path)
