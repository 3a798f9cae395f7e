"""A sparse layer's MLP: a router chooses among experts, shared ones run besides.

The routed experts are behind `Experts`, so that they may be here or spread over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kernels.quantized_experts import ExpertStack
from kernels.quantized_matrix import Weight
from kernels.reference import silu_mul
from kernels.reference_matmul import dequantize
from kernels.reference_moe import Activation, Routing, clamped_swiglu
from workers.models.layer_weights import Mlp, SparseMlp
from workers.models.ops import Ops
from workers.models.spec import DecoderSpec, MoeSpec


class Experts(Protocol):
    """The routed experts of one layer."""

    def start(self, x: Tensor, weights: Tensor, experts: Tensor) -> Callable[[], Tensor]:
        """x [T, H], weights float32 [T, k], logical experts int64 [T, k]; the number of experts: of nobody.

        What is returned gives the weighted sums, float32 [T, H]; work between the two calls hides the tokens' way to
        other ranks.
        """


# (index among the layers that have experts, the model, the layer's weights, what computes) -> its experts. Routed experts
# are read by calling `weights.expert`, now or later, all or some of them.
MakeExperts = Callable[[int, DecoderSpec, SparseMlp[Weight], Ops], Experts]


def routing_of(moe: MoeSpec) -> Routing:
    return Routing(
        top_k=moe.top_k,
        scoring=moe.scoring,
        normalize=moe.normalize,
        scale=moe.scale,
        num_groups=moe.num_groups,
        top_groups=moe.top_groups,
        group_score=moe.group_score,
        softmax_after_topk=moe.softmax_after_topk,
    )


def activation_of(moe: MoeSpec) -> Activation:
    if moe.activation == "silu":
        return silu_mul
    return partial(clamped_swiglu, alpha=moe.swiglu_alpha, limit=moe.swiglu_limit)


class DenseMlp:
    def __init__(self, weights: Mlp[Weight], ops: Ops) -> None:
        self._gate = ops.silu_mul
        self._gate_up = ops.linear(weights.gate_up, weights.gate_up_bias)
        self._down = ops.linear(weights.down, weights.down_bias)

    def __call__(self, x: Tensor, slots: Tensor) -> Tensor:
        """[T, H] -> [T, H] in x's dtype. `slots`: what a dense MLP does not ask for."""
        return self._down(self._gate(self._gate_up(x)))


class SparseLayer:
    def __init__(self, moe: MoeSpec, weights: SparseMlp[Weight], experts: Experts, ops: Ops) -> None:
        self.experts = experts
        self._ops = ops
        self._routing = routing_of(moe)
        self._routing.validate(moe.num_experts)
        self._router, self._router_bias = weights.router, weights.router_bias
        self._correction_bias = weights.correction_bias
        self._shared = None if weights.shared is None else DenseMlp(weights.shared, ops)
        self._shared_gate = weights.shared_gate

    def __call__(self, x: Tensor, slots: Tensor) -> Tensor:
        """[T, H], slots int64 [T], below 0 where a row only fills up -> float32 [T, H]."""
        # In float32 whatever x is: a rounded logit may choose another expert.
        logits = functional.linear(x.float(), self._router, self._router_bias)
        weights, experts = self._ops.route(logits, self._routing, self._correction_bias, slots)
        routed = self.experts.start(x, weights, experts)
        if self._shared is None:
            return routed()
        shared = self._shared(x, slots).float()
        if self._shared_gate is not None:
            shared *= functional.linear(x, self._shared_gate).sigmoid()
        return routed().add_(shared)


class LocalExperts:
    """All experts of a layer in this process."""

    def __init__(self, moe: MoeSpec, weights: SparseMlp[Weight], ops: Ops) -> None:
        device = weights.router.device
        self.counts = torch.zeros(moe.num_experts, dtype=torch.int64, device=device)  # tokens given to each
        gate_up, down, biases = ExpertStack(moe.num_experts), ExpertStack(moe.num_experts), []
        for logical in range(moe.num_experts):
            expert = weights.expert(logical)  # one at a time: a layer is never held twice
            gate_up.put(logical, expert.gate_up)
            down.put(logical, expert.down)
            biases.append((expert.gate_up_bias, expert.down_bias))
        self._gate_up, self._down = gate_up.whole(), down.whole()
        gate_up_biases, down_biases = (_stacked(column) for column in zip(*biases, strict=True))
        self._biases = (
            None if gate_up_biases is None or down_biases is None else (gate_up_biases, down_biases)
        )
        self._clamp = None if moe.activation == "silu" else (moe.swiglu_alpha, moe.swiglu_limit)
        self._compute = ops.experts

    def start(self, x: Tensor, weights: Tensor, experts: Tensor) -> Callable[[], Tensor]:
        given = (weights, experts, self._gate_up, self._down, self._biases, self._clamp, self.counts)
        return partial(self._compute, x, *given)


def local_experts(index: int, spec: DecoderSpec, weights: SparseMlp[Weight], ops: Ops) -> LocalExperts:
    assert spec.moe is not None, f"{spec.architecture} has no experts"
    return LocalExperts(spec.moe, weights, ops)


def float_expert(expert: Mlp[Weight]) -> Mlp[Tensor]:
    """Of an expert that is kept quantized, its floats: for ranks that pass experts on to one another."""
    gate_up, down = (
        part if isinstance(part, Tensor) else dequantize(part).to(part.dtype)
        for part in (expert.gate_up, expert.down)
    )
    return Mlp(gate_up, expert.gate_up_bias, down, expert.down_bias)


def _stacked(biases: tuple[Tensor | None, ...]) -> Tensor | None:
    present = [bias for bias in biases if bias is not None]
    return torch.stack(present) if present else None
