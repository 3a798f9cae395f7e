"""What a decoder computes with besides matrix products. Two implementations: eager torch, which is the oracle and runs on
any device, and Triton's kernels (workers/models/triton_ops.py), which neither wait for the device nor make shapes of what
lies on it, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention_step import AttentionStep, HeadNorms
from kernels.paged_kv import PagedKv
from kernels.quantized_experts import Experts
from kernels.reference import rms_norm, rope_rotate, silu_mul
from kernels.reference_attention import AttentionPlan
from kernels.reference_moe import Routing, clamped_swiglu, combine, grouped_mlp, permute, route
from kernels.reference_rows import Scratch
from workers.models.linear import MakeLinear, make_linear
from workers.models.rope import RopeTable

Biases = tuple[Tensor, Tensor] | None  # of gate_up [E, 2 * I] and down [E, H]
Clamp = tuple[float, float] | None  # alpha and limit of GPT-OSS's gate; None: silu


class Attention(Protocol):
    """Attention of one step over one KV cache, for every layer. What a token writes goes to its slot."""

    def rotate_and_write(self, qkv: Tensor, layer: int, norms: HeadNorms | None = None) -> Tensor:
        """qkv [T, num_heads + 2 * num_kv_heads, D] -> queries [T, num_heads, D], normed and rotated.

        Keys, normed and rotated, and values are written to the cache.
        """

    def write(self, k: Tensor, v: Tensor, layer: int) -> None:
        """Keys and values [T, num_kv_heads, D] to the cache as they are."""

    def write_latents(self, rows: Tensor, queries: Tensor, layer: int, norm: Tensor, eps: float) -> Tensor:
        """Of latent attention: rows [T, L + R], a latent and a key to be rotated; queries [T, num_heads, N + R].

        The latent is normed, `norm` [L], its key rotated, and the row written to the cache. Result: [T, num_heads,
        L + R], whose last R are the queries' rotated last R and whose first L are the caller's to fill.
        """

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
        """q [T, num_heads, D] -> [T, num_heads, D], as kernels.reference.paged_attention. This step's rows are written.

        `values`: how many of a latent's first dimensions are its value: [T, num_heads, values].
        """


class Ops(Protocol):
    @property
    def name(self) -> str:
        """For the log and the status: "torch" or "triton"."""

    @property
    def linear(self) -> MakeLinear:
        """Makes the products with weights. Making one may take long, see workers.models.matmul_choice."""

    def attention(
        self, cache: PagedKv, step: AttentionStep, rope: RopeTable | None, positions: Tensor
    ) -> Attention:
        """Made once per step. positions int64 [T], rows of `rope`; None: nothing is rotated, only `write` and `attend`."""

    def add_rms_norm(
        self, residual: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        """residual += added, in place, float32 [T, H]; then its RMS norm in `dtype`. weight float32 [H]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, H], whose rows may have gaps between them, weight [H] -> [T, H] in x's dtype."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 * I], gate first -> silu(gate) * up, [T, I]."""

    def route(
        self, logits: Tensor, routing: Routing, correction_bias: Tensor | None, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As kernels.reference_moe.route: weights float32 [T, k], experts int64 [T, k].

        A token whose slot is below 0 is given to nobody: its experts are E, its weights 0.
        """

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
        """Weighted sums of the experts' MLPs, float32 [T, H]; shapes as in kernels.triton.moe.fused_experts.

        given: int64 [E], to which the number of tokens that each expert was given is added.
        """


def torch_ops() -> Ops:
    """Eager torch. Not thread-safe: layers share a buffer."""
    return _TorchOps()


class _TorchOps:
    name = "torch"
    linear = staticmethod(make_linear)

    def __init__(self) -> None:
        self._scratch = Scratch()

    def attention(
        self, cache: PagedKv, step: AttentionStep, rope: RopeTable | None, positions: Tensor
    ) -> Attention:
        return _TorchAttention(AttentionPlan(step, cache, self._scratch), rope, positions)

    def add_rms_norm(
        self, residual: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        if added is not None:
            residual += added
        return rms_norm(residual, weight, eps).to(dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(gate_up)

    def route(
        self, logits: Tensor, routing: Routing, correction_bias: Tensor | None, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights, experts = route(logits, routing, correction_bias)
        nobody = (slots < 0)[:, None]
        return weights.masked_fill(nobody, 0.0), experts.masked_fill(nobody, logits.shape[1])

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
        gate = silu_mul if clamp is None else partial(clamped_swiglu, alpha=clamp[0], limit=clamp[1])
        order, counts = permute(experts, len(gate_up) + 1)
        given += counts[:-1]
        rows = x.index_select(0, order // experts.shape[1])
        return combine(grouped_mlp(rows, counts[:-1], gate_up, down, biases, gate), order, weights)


class _TorchAttention:
    def __init__(self, plan: AttentionPlan, rope: RopeTable | None, positions: Tensor) -> None:
        self._plan = plan
        self._angles = None if rope is None else rope.at(positions)

    def rotate_and_write(self, qkv: Tensor, layer: int, norms: HeadNorms | None = None) -> Tensor:
        kv_heads = self._plan.num_kv_heads
        num_heads = qkv.shape[1] - 2 * kv_heads
        qk, v = qkv[:, :-kv_heads], qkv[:, -kv_heads:]
        if norms is not None:
            q, k = qk[:, :num_heads], qk[:, num_heads:]
            qk = torch.cat((_normed(q, norms.q, norms.eps), _normed(k, norms.k, norms.eps)), 1)
        qk = self._rotated(qk)
        self._plan.write(layer, qk[:, num_heads:], v)
        return qk[:, :num_heads]

    def write(self, k: Tensor, v: Tensor, layer: int) -> None:
        self._plan.write(layer, k, v)

    def write_latents(self, rows: Tensor, queries: Tensor, layer: int, norm: Tensor, eps: float) -> Tensor:
        rank, rotated = len(norm), rows.shape[1] - len(norm)
        # Keys and queries together: [T, 1 + num_heads, R].
        turned = self._rotated(torch.cat((rows[:, None, rank:], queries[..., -rotated:]), 1))
        latents = rms_norm(rows[:, :rank], norm, eps)
        self._plan.write_latents(layer, torch.cat((latents, turned[:, 0]), 1))
        return functional.pad(turned[:, 1:], (rank, 0))

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
        return self._plan.attend(q, layer, scale, window, sinks, softcap)[..., :values]

    def _rotated(self, heads: Tensor) -> Tensor:
        assert self._angles is not None, "this step's attention was made without angles"
        return rope_rotate(heads, *self._angles)


def _normed(heads: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T, n, D]; weight [D], or [n * D] for one norm of all heads together."""
    whole = len(weight) != heads.shape[2]
    return rms_norm(heads.flatten(1) if whole else heads, weight, eps).view(heads.shape)
