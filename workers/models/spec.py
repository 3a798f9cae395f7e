"""What a decoder is made of, read from a Hugging Face config.json. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from workers.models.errors import ModelError
from workers.models.stored_form import stored_form

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding. Fields below `theta` are read only by the kinds that name them."""

    kind: RopeKind
    theta: float
    factor: float = 1.0  # linear, llama3, yarn
    original_max_position: int = 0  # llama3, yarn: tokens
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn; None: from factor and the mscales
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True)
class DecoderSpec:
    """A dense pre-norm decoder with SwiGLU and grouped-query attention."""

    architecture: str  # config.json's model_type
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    rope: RopeSpec
    qkv_bias: bool
    output_bias: bool  # of attention's output projection
    mlp_bias: bool
    qk_norm: bool  # RMS norm of each query and key head before RoPE
    windows: tuple[int | None, ...]  # sliding window by layer, tokens; None sees everything
    tied_embeddings: bool
    max_position: int  # tokens

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecoderSpec:
        """Raises ModelError for an architecture, option or value that this decoder does not express."""
        return _read(_Config(config))


@dataclass(frozen=True)
class _Architecture:
    """What one model_type fixes, and transformers' defaults for what its config may leave out."""

    num_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position: int = 32768
    qkv_bias: bool | None = (
        False  # None: config's attention_bias, which then covers the output projection too
    )
    mlp_bias: bool = False  # whether the config may ask for it
    qk_norm: bool = False
    window: Literal["never", "every_layer", "by_layer"] = "never"


ARCHITECTURES = {
    "llama": _Architecture(max_position=2048, qkv_bias=None, mlp_bias=True),
    "mistral": _Architecture(num_kv_heads=8, max_position=131072, window="every_layer"),
    "qwen2": _Architecture(num_kv_heads=32, qkv_bias=True, window="by_layer"),
    "qwen3": _Architecture(num_kv_heads=32, head_dim=128, qkv_bias=None, qk_norm=True, window="by_layer"),
}


class _Config:
    """config.json with checked look-ups, so that a bad value is named rather than met later as a bad shape."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ModelError(f"config.json has no {key!r}; a decoder needs it")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"config.json: {key} must be a positive integer, not {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key)
        return default if value is None else _number(key, value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelError(f"config.json: {key} must be true or false, not {value!r}")
        return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ModelError(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)


def _read(config: _Config) -> DecoderSpec:
    model_type = config.values.get("model_type")
    known = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if known is None or not isinstance(model_type, str):
        raise ModelError(
            f"architecture {model_type!r} is not supported; supported are {', '.join(ARCHITECTURES)} (dense)"
        )
    activation = config.values.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"hidden_act {activation!r} of {model_type} is not supported; silu is")
    stored_form(config.values)  # raises for a quantization that is not read

    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_layers = config.integer("num_hidden_layers")
    # transformers: a key that is there but null means "as many as query heads", an absent one the class's default.
    absent_kv_heads = None if "num_key_value_heads" in config.values else known.num_kv_heads
    num_kv_heads = config.integer("num_key_value_heads", absent_kv_heads or num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly")
    if config.values.get("head_dim") is None and known.head_dim is None and hidden_size % num_heads:
        raise ModelError(
            f"hidden_size {hidden_size} is not divisible by {num_heads} heads and head_dim is absent"
        )
    head_dim = config.integer("head_dim", known.head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise ModelError(f"head_dim must be even for rotary embeddings, not {head_dim}")
    max_position = config.integer("max_position_embeddings", known.max_position)
    bias = config.flag("attention_bias") if known.qkv_bias is None else False
    return DecoderSpec(
        architecture=model_type,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=_read_rope(config, max_position),
        qkv_bias=bias or bool(known.qkv_bias),
        output_bias=bias,
        mlp_bias=known.mlp_bias and config.flag("mlp_bias"),
        qk_norm=known.qk_norm,
        windows=_read_windows(config, known, num_layers),
        tied_embeddings=config.flag("tie_word_embeddings"),
        max_position=max_position,
    )


def _read_windows(config: _Config, known: _Architecture, num_layers: int) -> tuple[int | None, ...]:
    everything: tuple[int | None, ...] = (None,) * num_layers
    if known.window == "never":
        return everything
    if "sliding_window" in config.values and config.values["sliding_window"] is None:
        return everything
    if known.window == "every_layer":
        return (config.integer("sliding_window", 4096),) * num_layers
    if not config.flag("use_sliding_window"):
        return everything
    window = config.integer("sliding_window", 4096)
    layer_types = config.values.get("layer_types")
    if layer_types is None:
        first = config.values.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ModelError(f"config.json: max_window_layers must be an integer >= 0, not {first!r}")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    allowed = ("full_attention", "sliding_attention")
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise ModelError(f"config.json: layer_types must list {num_layers} layers, not {layer_types!r}")
    for kind in layer_types:
        if kind not in allowed:
            raise ModelError(
                f"config.json: layer type {kind!r} is not supported; supported are {', '.join(allowed)}"
            )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _read_rope(config: _Config, max_position: int) -> RopeSpec:
    """Both the form of transformers 5 (`rope_parameters`) and the older `rope_theta` + `rope_scaling`."""
    # transformers gives an old rope_scaling the precedence, so this does.
    found = config.values.get("rope_scaling") or config.values.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise ModelError(f"config.json: rope_parameters must be an object, not {found!r}")
    values = dict(found)
    kind = values.get("rope_type", values.get("type", "default"))
    if any(isinstance(value, Mapping) for value in values.values()):
        raise ModelError("config.json: RoPE parameters by layer type are not supported")
    if kind not in get_args(RopeKind):
        raise ModelError(
            f"RoPE scaling {kind!r} is not supported; supported are {', '.join(get_args(RopeKind))}"
        )
    partial = values.get("partial_rotary_factor", config.values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelError(f"partial_rotary_factor {partial!r} is not supported; the whole head is rotated")

    def number(key: str, default: float | None = None) -> float:
        value = values.get(key)
        if value is None:
            if default is None:
                raise ModelError(f"config.json: RoPE scaling {kind!r} needs {key!r}")
            return default
        return _number(f"rope {key}", value)

    def optional(key: str) -> float | None:
        return None if values.get(key) is None else number(key)

    theta = number("rope_theta", config.number("rope_theta", 10000.0))
    if kind == "default":
        return RopeSpec("default", theta)
    if kind == "linear":
        return RopeSpec("linear", theta, factor=number("factor"))
    original = int(
        config.number(
            "original_max_position_embeddings", number("original_max_position_embeddings", max_position)
        )
    )
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if high <= low:
            raise ModelError(f"config.json: rope high_freq_factor {high} must be above low_freq_factor {low}")
        return RopeSpec(
            kind="llama3",
            theta=theta,
            factor=number("factor"),
            original_max_position=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return RopeSpec(
        kind=cast(RopeKind, kind),
        theta=theta,
        # DeepSeek-style configs leave the factor to the ratio of the two lengths.
        factor=number("factor", max_position / original),
        original_max_position=original,
        attention_factor=optional("attention_factor"),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=bool(values.get("truncate", True)),
    )
