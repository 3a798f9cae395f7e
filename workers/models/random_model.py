"""Tiny models with random weights in Hugging Face form, for tests that need a model but not a good one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from workers.models.errors import ModelError
from workers.models.spec import DecoderSpec
from workers.models.tensor_shapes import expected_shapes

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
_LATENT = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 32},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "intermediate_size": 32},
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        **_EXPERTS,
        "shared_expert_intermediate_size": 48,
        "norm_topk_prob": False,
    },
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], **_EXPERTS, "norm_topk_prob": True},
    "olmoe": {"architectures": ["OlmoeForCausalLM"], **_EXPERTS, "intermediate_size": 32},
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        **_LATENT,
        "q_lora_rank": None,
        "topk_method": "greedy",
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        **_LATENT,
        "q_lora_rank": 32,
        "n_group": 4,
        "topk_group": 2,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "sliding_window": 9,
    },
}
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Large enough that a layer's output outweighs the token's own embedding, so that greedy text does not repeat itself.
_PROJECTION_GAIN = 2.0
_BIAS_STD = 0.2
_NORM_STD = 0.2


def write_random_model(
    path: Path,
    config: Mapping[str, Any] | str = "llama",
    seed: int = 0,
    tokenizer_from: Path | None = None,
) -> Path:
    """Write a model directory into `path`, made if absent, and return it.

    config: a family ("llama", "mistral", "qwen2", "qwen3"; with experts "mixtral", "qwen2_moe", "qwen3_moe", "olmoe",
    "deepseek_v2", "deepseek_v3", "gpt_oss") or keys of config.json over the defaults: llama, 2 layers, hidden 64, 4 query
    and 2 KV heads of 16, 8 experts where there are any, the tokenizer's vocabulary. tokenizer_from: a model directory whose
    tokenizer is copied; without one, a byte-level tokenizer of 259 tokens with a ChatML template is made. Equal
    arguments give equal weights (float32). Raises ModelError for a config the decoder does not support.
    """
    path.mkdir(parents=True, exist_ok=True)
    vocab_size = _copy_tokenizer(tokenizer_from, path) if tokenizer_from else _write_byte_tokenizer(path)
    given = {"model_type": config} if isinstance(config, str) else dict(config)
    family = given.setdefault("model_type", "llama")
    if family not in _FAMILIES:
        raise ModelError(f"no random {family!r} model; families are {', '.join(_FAMILIES)}")
    whole = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "vocab_size": vocab_size,
        "dtype": "float32",
        **_token_ids(path),
        **_FAMILIES[family],
        **given,
    }
    (path / "config.json").write_text(json.dumps(whole, indent=2) + "\n")
    spec = DecoderSpec.from_config(whole)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _random(name, shape, generator) for name, shape in expected_shapes(spec).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith(("bias", "sinks")):
        return noise * _BIAS_STD
    if len(shape) == 1:  # a norm
        return 1 + noise * _NORM_STD
    if name == "model.embed_tokens.weight":
        return noise
    return noise * (_PROJECTION_GAIN / math.sqrt(shape[1]))


def _copy_tokenizer(source: Path, path: Path) -> int:
    if not (source / "tokenizer.json").is_file():
        raise ModelError(f"{source} has no tokenizer.json to copy")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, path / name)
    config = json.loads((source / "config.json").read_text())
    return int(config["vocab_size"])


def _token_ids(path: Path) -> dict[str, Any]:
    """The end and start tokens that the tokenizer's directory names."""
    file = path / "generation_config.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    return {key: known[key] for key in ("bos_token_id", "eos_token_id") if key in known}


def _write_byte_tokenizer(path: Path) -> int:
    """Special tokens 0..2, then one token for each byte: any text, and no text is short."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": _SPECIAL[1],
        "eos_token": _SPECIAL[2],
        "pad_token": _SPECIAL[2],
        "unk_token": _SPECIAL[0],
        "chat_template": _CHATML,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    generation_config = {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2}
    (path / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
    return len(vocabulary)
