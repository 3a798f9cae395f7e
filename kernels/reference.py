"""The oracle: every op in eager torch, on any device. The C++ and Triton forms are tested against these.

The KV cache is one tensor in the canonical wire layout, block first, so that a block is one contiguous piece; of
floats (kernels/paged_kv.py has the other forms)

    kv_cache [num_blocks, num_layers, 2 (k, v), num_kv_heads, block_size, head_dim]

Latent attention (MLA) has one plane in place of k and v, whose rows are both.

A slot names a token's place: slot = block_id * block_size + offset. The cache must start zeroed: slots that were never
written are read and then masked, and NaN would survive the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention_step import AttentionStep
from kernels.reference_attention import AttentionPlan, paged_attention
from kernels.reference_rows import Scratch

__all__ = [
    "AttentionPlan",
    "AttentionStep",
    "Scratch",
    "apply_rope",
    "gather_blocks",
    "paged_attention",
    "rms_norm",
    "rope_rotate",
    "scatter_blocks",
    "silu_mul",
    "write_kv",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32, in x's dtype (Zhang & Sennrich 2019).

    `weight` is [x.shape[-1]], or of more dimensions, which then broadcast against x's last ones (a weight per head).
    """
    if weight.dim() == 1:
        return functional.rms_norm(x, weight.shape, weight, eps)
    return functional.rms_norm(x, weight.shape[-1:], None, eps) * weight


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's gate: [..., 2 * I], gate first -> silu(gate) * up, [..., I]."""
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate).mul_(up)


def rope_rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """The inner form of `apply_rope`, for callers that prepare the angles once for many layers.

    x [T, H, D]; cos [T, 1, D]; signed_sin [T, 1, D], its first half negated, so that a roll takes the place of
    rotate-half.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) in Hugging Face's rotate-half convention.

    x [T, H, D]; cos, sin [T, D/2], or [T, D] whose halves are equal. Result [T, H, D] in x's dtype.
    """
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    return rope_rotate(x, torch.cat((cos, cos), -1).to(x.dtype), torch.cat((-sin, sin), -1).to(x.dtype))


def write_kv(kv_cache: Tensor, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Store k, v [T, num_kv_heads, D] of one layer at `slots` [T] int64. Slots must be distinct."""
    block_size = kv_cache.shape[4]
    block, offset = slots // block_size, slots % block_size
    kv_cache[block, layer, 0, :, offset] = k
    kv_cache[block, layer, 1, :, offset] = v


def gather_blocks(kv_cache: Tensor, block_ids: Tensor) -> Tensor:
    """Copy blocks [n] out of the cache in wire layout: [n, num_layers, 2, num_kv_heads, block_size, head_dim]."""
    return kv_cache.index_select(0, block_ids)


def scatter_blocks(kv_cache: Tensor, block_ids: Tensor, blocks: Tensor) -> None:
    """Put `blocks`, as `gather_blocks` gives them, into the cache at `block_ids` [n], which must be distinct."""
    kv_cache.index_copy_(0, block_ids, blocks)
