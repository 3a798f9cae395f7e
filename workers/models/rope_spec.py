"""Rotary embedding and its context extension, read from config.json. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from workers.models.config_values import ConfigValues, positive_number
from workers.models.errors import ModelError, NotExpressed

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

    def attention_mscale(self, weight: float) -> float:
        """YaRN's factor on attention (Peng et al. 2023, section 3.4), with DeepSeek's weight on its logarithm."""
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0


def read_rope(
    config: ConfigValues, max_position: int, theta: float = 10000.0, absent: Mapping[str, Any] | None = None
) -> RopeSpec:
    """Both the form of transformers 5 (`rope_parameters`) and the older `rope_theta` + `rope_scaling`.

    `theta` and `absent` are what the architecture takes where the config is silent. Raises ModelError.
    """
    # transformers gives an old rope_scaling the precedence, so this does.
    found = config.values.get("rope_scaling") or config.values.get("rope_parameters") or absent or {}
    if not isinstance(found, Mapping):
        raise ModelError(f"config.json: rope_parameters must be an object, not {found!r}")
    values = dict(found)
    kind = values.get("rope_type", values.get("type", "default"))
    if any(isinstance(value, Mapping) for value in values.values()):
        raise NotExpressed("config.json: RoPE parameters by layer type are not supported")
    if kind not in get_args(RopeKind):
        raise NotExpressed(
            f"RoPE scaling {kind!r} is not supported; supported are {', '.join(get_args(RopeKind))}"
        )
    partial = values.get("partial_rotary_factor", config.values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise NotExpressed(f"partial_rotary_factor {partial!r} is not supported; the whole head is rotated")

    def number(key: str, default: float | None = None) -> float:
        value = values.get(key)
        if value is None:
            if default is None:
                raise ModelError(f"config.json: RoPE scaling {kind!r} needs {key!r}")
            return default
        return positive_number(f"rope {key}", value)

    def optional(key: str) -> float | None:
        return None if values.get(key) is None else number(key)

    theta = number("rope_theta", config.number("rope_theta", theta))
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
