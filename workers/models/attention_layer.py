"""What surrounds attention in a layer: the fused projection to queries, keys and values, and the output projection."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kernels.attention_step import HeadNorms
from kernels.quantized_matrix import Weight
from workers.models.layer_weights import GroupedAttention
from workers.models.ops import Attention, Ops
from workers.models.spec import DecoderSpec


class AttentionLayer(Protocol):
    def attend(self, x: Tensor, attention: Attention) -> Tensor:
        """x [T, hidden], normed; writes its keys and values to the cache. What the heads have seen: [T, columns]."""

    def output(self, seen: Tensor) -> Tensor:
        """[R, columns] -> [R, hidden]."""


class GroupedAttentionLayer:
    """Grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, spec: DecoderSpec, index: int, weights: GroupedAttention[Weight], ops: Ops) -> None:
        self._index = index
        self._scale, self._window = spec.scale, spec.windows[index]
        self._head_dim = spec.head_dim
        self._qkv = ops.linear(weights.qkv, weights.qkv_bias)
        self.output = ops.linear(weights.output, weights.output_bias)
        self._norms = None
        if weights.q_norm is not None and weights.k_norm is not None:
            self._norms = HeadNorms(weights.q_norm, weights.k_norm, spec.norm_eps)
        self._sinks = weights.sinks

    def attend(self, x: Tensor, attention: Attention) -> Tensor:
        qkv = self._qkv(x).view(x.shape[0], -1, self._head_dim)
        q = attention.rotate_and_write(qkv, self._index, self._norms)
        return attention.attend(q, self._index, self._scale, self._window, self._sinks).flatten(1)
