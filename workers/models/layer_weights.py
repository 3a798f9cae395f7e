"""The weights of one decoder layer. M is the type of its matrices, [out, in]; biases are [out]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

M = TypeVar("M")


@dataclass(frozen=True)
class GroupedAttention(Generic[M]):
    """Grouped-query attention."""

    qkv: M  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim], or [num_heads * head_dim] where `qk_norm_whole`
    k_norm: Tensor | None  # [head_dim], or [num_kv_heads * head_dim]
    sinks: Tensor | None  # [num_heads]
    output: M  # [hidden, num_heads * head_dim]
    output_bias: Tensor | None


@dataclass(frozen=True)
class LatentAttention(Generic[M]):
    """Multi-head latent attention. Rotated rows are in the checkpoint's order, see `MlaSpec.rope_interleaved`."""

    down: M  # [(q_lora_rank, or num_heads * query_dim where queries have no latent) + latent_dim, hidden]
    q_norm: Tensor | None  # [q_lora_rank]
    q_up: M | None  # [num_heads * query_dim, q_lora_rank]
    kv_norm: Tensor  # [kv_lora_rank]
    kv_up: M  # [num_heads * (nope_dim + value_dim), kv_lora_rank]
    output: M  # [hidden, num_heads * value_dim]


@dataclass(frozen=True)
class Mlp(Generic[M]):
    """A gated MLP of I neurons: a dense layer's, the shared experts', or one routed expert."""

    gate_up: M  # [2 * I, hidden], gate first
    gate_up_bias: Tensor | None
    down: M  # [hidden, I]
    down_bias: Tensor | None


@dataclass(frozen=True)
class SparseMlp(Generic[M]):
    """Experts with their router. The routed ones are read when they are asked for, one by one."""

    router: Tensor  # [num_experts, hidden]
    router_bias: Tensor | None  # [num_experts]
    correction_bias: Tensor | None  # [num_experts]
    shared: Mlp[M] | None
    shared_gate: Tensor | None  # [1, hidden]
    expert: Callable[[int], Mlp[M]]  # by logical expert


@dataclass(frozen=True)
class Layer(Generic[M]):
    input_norm: Tensor  # [hidden]
    attention: GroupedAttention[M] | LatentAttention[M]
    mlp_norm: Tensor  # [hidden]
    mlp: Mlp[M] | SparseMlp[M]
