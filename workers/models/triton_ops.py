"""`Ops` through Triton's kernels. Nothing here waits for the device, and no shape is made of what lies on it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention_step import AttentionStep, HeadNorms
from kernels.paged_kv import PagedKv
from kernels.quantized_experts import Experts
from kernels.reference_moe import Routing
from kernels.triton.attention import paged_attention
from kernels.triton.moe import fused_experts
from kernels.triton.moe_route import route
from kernels.triton.norms import add_rms_norm, rms_norm, silu_mul
from kernels.triton.rope_kv import rotate_and_write
from kernels.triton.rope_latent import rotate_and_write_latents
from kernels.triton.write_kv import write_kv
from workers.models.device_linear import DeviceLinear
from workers.models.ops import Attention, Biases, Clamp, Ops
from workers.models.rope import RopeTable


def triton_ops() -> Ops:
    return _TritonOps()


class _TritonOps:
    name = "triton"
    linear = DeviceLinear

    def attention(
        self, cache: PagedKv, step: AttentionStep, rope: RopeTable | None, positions: Tensor
    ) -> Attention:
        return _TritonAttention(cache, step, rope, positions)

    def add_rms_norm(
        self, residual: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        return add_rms_norm(residual, added, weight, eps, dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(gate_up)

    def route(
        self, logits: Tensor, routing: Routing, correction_bias: Tensor | None, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        return route(logits, routing, correction_bias, slots)

    def experts(
        self,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        gate_up: Experts,
        down: Experts,
        biases: Biases,
        clamp: Clamp,
        given: Tensor,
    ) -> Tensor:
        return fused_experts(x, weights, experts, gate_up, down, biases, clamp, given)


class _TritonAttention:
    def __init__(
        self, cache: PagedKv, step: AttentionStep, rope: RopeTable | None, positions: Tensor
    ) -> None:
        self._cache, self._step, self._rope, self._positions = cache, step, rope, positions

    def rotate_and_write(self, qkv: Tensor, layer: int, norms: HeadNorms | None = None) -> Tensor:
        num_heads = qkv.shape[1] - 2 * self._cache.num_kv_heads
        return rotate_and_write(
            qkv, num_heads, self._cache, layer, self._step.slots, self._positions, *self._angles, norms
        )

    def write(self, k: Tensor, v: Tensor, layer: int) -> None:
        write_kv(k, v, self._cache, layer, self._step.slots)

    def write_latents(self, rows: Tensor, queries: Tensor, layer: int, norm: Tensor, eps: float) -> Tensor:
        return rotate_and_write_latents(
            rows, queries, self._cache, layer, self._step.slots, self._positions, *self._angles, norm, eps
        )

    def attend(
        self,
        q: Tensor,
        layer: int,
        scale: float,
        window: int | None = None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
        values: int | None = None,
    ) -> Tensor:
        return paged_attention(
            q, self._cache, layer, self._step, scale, window, sinks, softcap=softcap, values=values
        )

    @property
    def _angles(self) -> tuple[Tensor, Tensor]:
        assert self._rope is not None, "this step's attention was made without angles"
        return self._rope.cos, self._rope.sin
