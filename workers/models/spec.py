"""What a decoder is made of, read from a Hugging Face config.json. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from workers.models.config_values import ConfigValues
from workers.models.errors import ModelError, NotExpressed
from workers.models.mla_spec import MlaSpec, read_mla
from workers.models.moe_spec import MoeSpec, read_moe
from workers.models.rope_spec import RopeSpec, read_rope
from workers.models.stored_form import stored_form

__all__ = ["ARCHITECTURES", "DecoderSpec", "MlaSpec", "MoeSpec", "RopeSpec"]


@dataclass(frozen=True)
class DecoderSpec:
    """A pre-norm decoder: grouped-query or latent attention, then a dense SwiGLU MLP or experts."""

    architecture: str  # config.json's model_type
    hidden_size: int
    num_layers: int
    num_heads: int  # of queries
    num_kv_heads: int  # that are cached; of latent attention one: the latent, which all heads share
    head_dim: int  # of a cached row; of latent attention `mla.latent_dim`
    intermediate_size: int  # of a dense layer's MLP
    vocab_size: int
    norm_eps: float
    rope: RopeSpec
    qkv_bias: bool
    output_bias: bool  # of attention's output projection
    mlp_bias: bool
    qk_norm: bool  # RMS norm of queries and keys before RoPE
    windows: tuple[int | None, ...]  # sliding window by layer, tokens; None sees everything
    tied_embeddings: bool
    max_position: int  # tokens
    qk_norm_whole: bool = (
        False  # that norm is over all heads together, with a weight for each, not of each head
    )
    sinks: bool = (
        False  # a learned logit for each query head takes part in attention's softmax and has no value
    )
    moe: MoeSpec | None = None  # None: every layer is dense
    mla: MlaSpec | None = None  # None: grouped-query attention

    @property
    def scale(self) -> float:
        """Of attention's scores."""
        if self.mla is None:
            return float(self.head_dim**-0.5)
        rope = self.rope
        stretched = rope.attention_mscale(rope.mscale_all_dim) if rope.mscale_all_dim else 1.0
        return float(self.mla.query_dim**-0.5) * stretched**2

    @property
    def rope_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return self.head_dim if self.mla is None else self.mla.rope_dim

    @property
    def kv_planes(self) -> int:
        """Of a layer in the KV cache: keys and values, or the one plane of latents that are both."""
        return 2 if self.mla is None else 1

    def sparse(self, layer: int) -> MoeSpec | None:
        """The experts of `layer`; None: it is dense."""
        return self.moe if self.moe is not None and self.moe.layers[layer] else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecoderSpec:
        """Raises NotExpressed for an architecture or option that this decoder lacks, ModelError for a bad value."""
        return _read(ConfigValues(config))


@dataclass(frozen=True)
class _Architecture:
    """What one model_type fixes, and transformers' defaults for what its config may leave out."""

    num_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position: int = 32768
    norm_eps: float = 1e-6
    # None: config's attention_bias, which then covers the output projection too. A string: that key, without it.
    qkv_bias: bool | str | None = False
    attention_bias: bool = False  # what attention_bias is where the config is silent
    mlp_bias: bool = False  # whether the config may ask for it
    qk_norm: bool = False
    qk_norm_whole: bool = False
    sinks: bool = False
    # after: the layers from max_window_layers on. alternate: every other layer, the first one included, below it.
    window: Literal["never", "every_layer", "after", "alternate"] = "never"
    window_if_asked: bool = False  # by use_sliding_window
    sliding_window: int | None = 4096  # tokens
    max_window_layers: int | None = 28  # None: no limit
    theta: float = 10000.0
    rope: Mapping[str, Any] | None = None


_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

ARCHITECTURES = {
    "llama": _Architecture(max_position=2048, qkv_bias=None, mlp_bias=True),
    "mistral": _Architecture(num_kv_heads=8, max_position=131072, window="every_layer"),
    "qwen2": _Architecture(num_kv_heads=32, qkv_bias=True, window="after", window_if_asked=True),
    "qwen3": _Architecture(
        num_kv_heads=32, head_dim=128, qkv_bias=None, qk_norm=True, window="after", window_if_asked=True
    ),
    "mixtral": _Architecture(
        num_kv_heads=8,
        max_position=131072,
        norm_eps=1e-5,
        window="every_layer",
        sliding_window=None,
        theta=1e6,
    ),
    "qwen2_moe": _Architecture(
        num_kv_heads=16, qkv_bias="qkv_bias", window="alternate", window_if_asked=True
    ),
    "qwen3_moe": _Architecture(
        num_kv_heads=4, qkv_bias=None, qk_norm=True, window="every_layer", window_if_asked=True
    ),
    "olmoe": _Architecture(max_position=4096, norm_eps=1e-5, qkv_bias=None, qk_norm=True, qk_norm_whole=True),
    "deepseek_v2": _Architecture(max_position=2048),
    "deepseek_v3": _Architecture(max_position=4096),
    "gpt_oss": _Architecture(
        num_kv_heads=8,
        head_dim=64,
        max_position=131072,
        norm_eps=1e-5,
        qkv_bias=None,
        attention_bias=True,
        sinks=True,
        window="alternate",
        sliding_window=128,
        max_window_layers=None,
        theta=150000.0,
        rope=_GPT_OSS_ROPE,
    ),
}


def _read(config: ConfigValues) -> DecoderSpec:
    model_type = config.values.get("model_type")
    known = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if known is None or not isinstance(model_type, str):
        raise NotExpressed(
            f"architecture {model_type!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    activation = config.values.get("hidden_act", "silu")
    if activation != "silu":
        raise NotExpressed(f"hidden_act {activation!r} of {model_type} is not supported; silu is")
    stored_form(config.values)  # raises for a quantization that is not read

    num_layers = config.integer("num_hidden_layers")
    max_position = config.integer("max_position_embeddings", known.max_position)
    num_heads, num_kv_heads, head_dim = _read_heads(config, known)
    mla = read_mla(model_type, config)
    if mla is not None:
        if num_kv_heads != num_heads:
            raise ModelError(
                f"config.json: num_key_value_heads {num_kv_heads} must be num_attention_heads {num_heads}, because "
                "every head of latent attention has keys of its own"
            )
        num_kv_heads, head_dim = 1, mla.latent_dim
    rotated = head_dim if mla is None else mla.rope_dim
    if rotated % 2:
        raise ModelError(f"head_dim must be even for rotary embeddings, not {rotated}")
    qkv_bias, output_bias = _read_biases(config, known)
    return DecoderSpec(
        architecture=model_type,
        hidden_size=config.integer("hidden_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        norm_eps=config.number("rms_norm_eps", known.norm_eps),
        rope=read_rope(config, max_position, known.theta, known.rope),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=known.mlp_bias and config.flag("mlp_bias"),
        qk_norm=known.qk_norm,
        windows=_read_windows(config, known, num_layers),
        tied_embeddings=config.flag("tie_word_embeddings"),
        max_position=max_position,
        qk_norm_whole=known.qk_norm_whole,
        sinks=known.sinks,
        moe=read_moe(model_type, config, num_layers),
        mla=mla,
    )


def _read_heads(config: ConfigValues, known: _Architecture) -> tuple[int, int, int]:
    """num_heads, num_kv_heads, head_dim."""
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    # transformers: a key that is there but null means "as many as query heads", an absent one the class's default.
    absent_kv_heads = None if "num_key_value_heads" in config.values else known.num_kv_heads
    num_kv_heads = config.integer("num_key_value_heads", absent_kv_heads or num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly")
    if config.values.get("head_dim") is None and known.head_dim is None and hidden_size % num_heads:
        raise ModelError(
            f"hidden_size {hidden_size} is not divisible by {num_heads} heads and head_dim is absent"
        )
    return num_heads, num_kv_heads, config.integer("head_dim", known.head_dim or hidden_size // num_heads)


def _read_biases(config: ConfigValues, known: _Architecture) -> tuple[bool, bool]:
    """Of the projections to q, k, v, and of the one from attention's output."""
    if known.qkv_bias is None:
        both = config.flag("attention_bias", known.attention_bias)
        return both, both
    if isinstance(known.qkv_bias, str):
        return config.flag(known.qkv_bias, True), False
    return known.qkv_bias, False


def _read_windows(config: ConfigValues, known: _Architecture, num_layers: int) -> tuple[int | None, ...]:
    everything: tuple[int | None, ...] = (None,) * num_layers
    if known.window == "never" or (known.window_if_asked and not config.flag("use_sliding_window")):
        return everything
    absent = None if "sliding_window" in config.values else known.sliding_window
    if config.values.get("sliding_window", absent) is None:
        return everything
    window = config.integer("sliding_window", absent)
    if known.window == "every_layer":
        return (window,) * num_layers
    kinds = config.values.get("layer_types")
    if kinds is None:
        limit = config.integer("max_window_layers", known.max_window_layers or num_layers, least=0)
        if known.window == "after":
            return tuple(window if layer >= limit else None for layer in range(num_layers))
        return tuple(window if layer % 2 == 0 and layer < limit else None for layer in range(num_layers))
    allowed = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ModelError(f"config.json: layer_types must list {num_layers} layers, not {kinds!r}")
    for kind in kinds:
        if kind not in allowed:
            raise NotExpressed(
                f"config.json: layer type {kind!r} is not supported; supported are {', '.join(allowed)}"
            )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
