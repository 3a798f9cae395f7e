"""What surrounds attention in a layer: projections, norms and rotation of queries and keys, the output projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kernels.reference import AttentionPlan, rms_norm, rope_rotate
from workers.models.layer_weights import GroupedAttention
from workers.models.linear import make_linear
from workers.models.spec import DecoderSpec

HeadsNorm = Callable[[Tensor], Tensor]  # [T, num_heads + num_kv_heads, head_dim] -> the same


class AttentionLayer(Protocol):
    def attend(self, x: Tensor, cos: Tensor, signed_sin: Tensor, attention: AttentionPlan) -> Tensor:
        """x [T, hidden], normed; writes its keys and values to the cache. What the heads have seen: [T, columns]."""

    def output(self, seen: Tensor) -> Tensor:
        """[R, columns] -> [R, hidden]."""


class GroupedAttentionLayer:
    """Grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, spec: DecoderSpec, index: int, weights: GroupedAttention[Tensor]) -> None:
        self._index = index
        self._scale = spec.scale
        self._window = spec.windows[index]
        self._num_heads, self._num_kv_heads, self._head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self._qkv = make_linear(weights.qkv, weights.qkv_bias)
        self.output = make_linear(weights.output, weights.output_bias)
        self._heads_norm = _heads_norm(spec, weights)
        self._sinks = weights.sinks

    def attend(self, x: Tensor, cos: Tensor, signed_sin: Tensor, attention: AttentionPlan) -> Tensor:
        qkv = self._qkv(x).view(x.shape[0], -1, self._head_dim)
        qk, v = qkv[:, : -self._num_kv_heads], qkv[:, -self._num_kv_heads :]
        qk = rope_rotate(self._heads_norm(qk), cos, signed_sin)
        attention.write(self._index, qk[:, self._num_heads :], v)
        q = qk[:, : self._num_heads]
        return attention.attend(q, self._index, self._scale, self._window, self._sinks).flatten(1)


def _heads_norm(spec: DecoderSpec, weights: GroupedAttention[Tensor]) -> HeadsNorm:
    q_norm, k_norm = weights.q_norm, weights.k_norm
    if q_norm is None or k_norm is None:
        return _unchanged
    if spec.qk_norm_whole:
        return lambda heads: torch.cat(
            (
                _over_all_heads(heads[:, : spec.num_heads], q_norm, spec.norm_eps),
                _over_all_heads(heads[:, spec.num_heads :], k_norm, spec.norm_eps),
            ),
            1,
        )
    both = torch.cat((q_norm.expand(spec.num_heads, -1), k_norm.expand(spec.num_kv_heads, -1)))
    # [num_heads + num_kv_heads, head_dim]: one norm over all heads
    return lambda heads: rms_norm(heads, both, spec.norm_eps)


def _over_all_heads(heads: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(heads.flatten(1), weight, eps).view(heads.shape)


def _unchanged(heads: Tensor) -> Tensor:
    return heads
