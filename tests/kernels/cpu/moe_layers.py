"""Random layers with experts: the float weights, and the same packed for the native kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.gemm import pack, pack_grouped
from kernels.cpu.layout import gate_up_rows
from kernels.cpu.library import Library
from kernels.cpu.packed import PackedExpert, PackedMatrix, PackedMoe
from kernels.cpu.structures import Format
from kernels.reference import silu_mul
from kernels.reference_moe import Activation, Routing, combine, grouped_mlp, permute, route
from workers.models.quantize import quantize_q4, quantize_q8


@dataclass(frozen=True)
class FloatMoe:
    """The oracle's weights; quantized formats dequantized."""

    routing: Routing
    router: Tensor  # [E, H]
    gate_up: Tensor  # [E, 2 I, H]
    down: Tensor  # [E, H, I]
    correction_bias: Tensor | None = None
    biases: tuple[Tensor, Tensor] | None = None
    shared: tuple[Tensor, Tensor] | None = None  # [2 S, H], [H, S]
    shared_gate: Tensor | None = None  # [1, H]
    activation: Activation = silu_mul

    def __call__(self, x: Tensor) -> Tensor:
        weights, experts = route(x @ self.router.T, self.routing, self.correction_bias)
        return self.with_choice(x, weights, experts)

    def with_choice(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        order, counts = permute(experts, len(self.router))
        rows = x[order // self.routing.top_k]
        y = combine(
            grouped_mlp(rows, counts, self.gate_up, self.down, self.biases, self.activation), order, weights
        )
        if self.shared is not None:
            one = torch.zeros(len(x), 1, dtype=torch.int64)
            gate = (
                torch.ones(len(x), 1) if self.shared_gate is None else torch.sigmoid(x @ self.shared_gate.T)
            )
            every = permute(one, 1)
            y += gate * grouped_mlp(
                x, every.counts, self.shared[0][None], self.shared[1][None], None, self.activation
            )
        return y


def random_moe(
    routing: Routing,
    num_experts: int,
    hidden: int,
    intermediate: int,
    *,
    shared: int = 0,
    shared_gated: bool = False,
    bias: bool = False,
    correction: bool = False,
    activation: Activation = silu_mul,
    seed: int = 0,
) -> FloatMoe:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

    return FloatMoe(
        routing=routing,
        router=normal(num_experts, hidden) * 2,
        gate_up=normal(num_experts, 2 * intermediate, hidden),
        down=normal(num_experts, hidden, intermediate),
        correction_bias=normal(num_experts) if correction else None,
        biases=(normal(num_experts, 2 * intermediate), normal(num_experts, hidden)) if bias else None,
        shared=(normal(2 * shared, hidden), normal(hidden, shared)) if shared else None,
        shared_gate=normal(1, hidden) * 2 if shared_gated else None,
        activation=activation,
    )


def packed(
    library: Library, moe: FloatMoe, format: Format, clamped: tuple[float, float] | None = None
) -> tuple[PackedMoe, FloatMoe]:
    """And the values that the packed weights stand for."""
    experts, gate_ups, downs = [], [], []
    for index in range(len(moe.router)):
        bias = (None, None) if moe.biases is None else (moe.biases[0][index], moe.biases[1][index])
        expert, gate_up, down = _expert(library, format, moe.gate_up[index], moe.down[index], bias)
        experts.append(expert)
        gate_ups.append(gate_up)
        downs.append(down)
    shared, shared_values = None, None
    if moe.shared is not None:
        shared, *values = _expert(library, format, *moe.shared, (None, None))
        shared_values = (values[0], values[1])
    router = moe.router if moe.shared_gate is None else torch.cat((moe.router, moe.shared_gate))
    native = PackedMoe(
        routing=moe.routing,
        router=pack(library, Format.F32, router.numpy()),
        correction_bias=None if moe.correction_bias is None else moe.correction_bias.numpy(),
        experts=experts,
        shared=shared,
        shared_gated=moe.shared_gate is not None,
        clamped=clamped,
    )
    values_of = FloatMoe(
        moe.routing,
        moe.router,
        torch.stack(gate_ups),
        torch.stack(downs),
        moe.correction_bias,
        moe.biases,
        shared_values,
        moe.shared_gate,
        moe.activation,
    )
    return native, values_of


def _expert(
    library: Library, format: Format, gate_up: Tensor, down: Tensor, bias: tuple[Tensor | None, Tensor | None]
) -> tuple[PackedExpert, Tensor, Tensor]:
    halves = gate_up_rows(down.shape[1])
    first, gate_up = _matrix(library, format, gate_up, halves, bias[0])
    second, down = _matrix(library, format, down, None, bias[1])
    return PackedExpert(first, second), gate_up, down


def _matrix(
    library: Library, format: Format, weight: Tensor, rows: np.ndarray | None, bias: Tensor | None
) -> tuple[PackedMatrix, Tensor]:
    columns = None
    if bias is not None:
        columns = (
            bias.numpy() if rows is None else np.where(rows < 0, 0, bias.numpy()[rows]).astype(np.float32)
        )
    if format in (Format.Q8, Format.Q4):
        grouped = quantize_q8(weight) if format == Format.Q8 else quantize_q4(weight)
        matrix = pack_grouped(library, format, grouped.q, grouped.d, grouped.m, rows=rows, bias=columns)
        return matrix, torch.from_numpy(grouped.dequantize())
    if format == Format.BF16:
        short = weight.to(torch.bfloat16)
        bits = short.view(torch.int16).numpy().view(np.uint16)
        return pack(library, format, bits, rows=rows, bias=columns), short.float()
    assert format == Format.F32
    return pack(library, format, weight.contiguous().numpy(), rows=rows, bias=columns), weight
