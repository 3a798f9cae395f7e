"""What stands between two products of a decoder: residual + RMSNorm, and SwiGLU's gate, each in one launch."""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDEST = 32768  # values that one program holds in registers
_GATE_VALUES = 1024  # of a program


def add_rms_norm(
    residual: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """residual += added, then kernels.reference.rms_norm of it, in `dtype`: [T, H].

    residual [T, H] contiguous, float32 as a rule: it is changed in place. added [T, H] of any floats; None: nothing is
    added. weight [H]. Sums and products are float32. Raises ValueError.
    """
    width = residual.shape[1]
    if added is not None and added.shape != residual.shape:
        raise ValueError(f"what is added is {list(added.shape)}, the residual {list(residual.shape)}")
    if weight.shape != (width,) or not residual.is_contiguous():
        raise ValueError(
            f"a residual of {list(residual.shape)}, strides {residual.stride()}, and a weight of {list(weight.shape)} "
            "do not go together"
        )
    return _normed(residual, None if added is None else added.contiguous(), weight, eps, dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """kernels.reference.rms_norm of x [T, H], whose rows may have gaps between them, in x's dtype. Raises ValueError."""
    if weight.shape != x.shape[1:] or x.stride(1) != 1:
        raise ValueError(
            f"rows of {x.shape[1]} values of stride {x.stride(1)} and a weight of {list(weight.shape)} do not go together"
        )
    return _normed(x, None, weight, eps, x.dtype)


def _normed(x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    tokens, width = x.shape
    block = triton.next_power_of_2(width)
    if block > _WIDEST:
        raise ValueError(f"rows of {width} values are wider than the {_WIDEST} that one program holds")
    out = torch.empty((tokens, width), dtype=dtype, device=x.device)
    if tokens:
        _add_rms_norm[(tokens,)](
            x, x if added is None else added, weight, out, x.stride(0), width, eps,
            ADDS=added is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * I], gate first -> silu(gate) * up: [T, I], computed in float32."""
    tokens, both = gate_up.shape
    if both % 2:
        raise ValueError(f"gate and up together have {both} columns, which is odd")
    width = both // 2
    out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if tokens and width:
        _silu_mul[(tokens, triton.cdiv(width, _GATE_VALUES))](
            gate_up.contiguous(), out, width, BLOCK=_GATE_VALUES
        )
    return out


@triton.jit
def _add_rms_norm(residual, added, weight, out, stride, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    row = tl.program_id(0).to(tl.int64)
    place, held = row * width + column, row * stride + column
    x = tl.load(residual + held, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        stored = x.to(residual.dtype.element_ty)
        tl.store(residual + held, stored, mask=inside)
        x = stored.to(tl.float32)  # what the next addition will see
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    y = x * inverse * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + token * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * width + column, y.to(out.dtype.element_ty), mask=inside)
