"""Rotary embedding frequencies for each kind of context extension, and the table of angles made from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.models.rope_spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """(float32 [head_dim / 2] in radians per token, factor on cos and sin)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, rope.theta**exponent), _yarn_attention_factor(rope)
    return plain, 1.0


def _llama3(rope: RopeSpec, plain: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / plain
    longest_kept = rope.original_max_position / rope.high_freq_factor
    shortest_divided = rope.original_max_position / rope.low_freq_factor
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * plain / rope.factor + smooth * plain
    scaled = torch.where(wavelength > shortest_divided, plain / rope.factor, plain)
    return torch.where((wavelength >= longest_kept) & (wavelength <= shortest_divided), between, scaled)


def _yarn(rope: RopeSpec, head_dim: int, periods: Tensor) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2): a ramp over dimensions from extrapolation to interpolation."""

    def dimension_of(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    extrapolated = 1 - ramp
    return (1.0 / (rope.factor * periods)) * (1 - extrapolated) + (1.0 / periods) * extrapolated


def _yarn_attention_factor(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return rope.attention_mscale(rope.mscale) / rope.attention_mscale(rope.mscale_all_dim)
    return rope.attention_mscale(1.0)


class RopeTable:
    """cos and sin of every position up to `max_len`: [max_len, head_dim / 2] each.

    Computed in float32 as transformers does, kept in `dtype`.
    """

    def __init__(
        self, rope: RopeSpec, head_dim: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        frequencies, factor = inverse_frequencies(rope, head_dim)
        angles = torch.arange(max_len, dtype=torch.float32)[:, None] * frequencies
        self.cos = (angles.cos() * factor).to(device, dtype)
        self.sin = (angles.sin() * factor).to(device, dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [T] -> cos, signed sin [T, 1, head_dim], as `kernels.reference.rope_rotate` takes them."""
        cos, sin = (table.index_select(0, positions)[:, None] for table in (self.cos, self.sin))
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
