"""y = x W^T + b, with the weight in the layout that is quickest to read.

On a CPU oneDNN's blocked layout doubles the speed of torch's own Linear at few rows: 576 -> 3072 at 1 / 16 / 512 rows
takes 93 / 127 / 2,032 us against 137 / 192 / 2,056 in bfloat16 and 182 / 224 / 4,045 against 453 / 778 / 9,389 in
float32 (torch 2.13, two Zen 5 cores). Fusing the residual or the SwiGLU gate into the GEMM gained nothing.

What goes with Triton's kernels on a GPU is in device_linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kernels.quantized_matrix import QuantizedMatrix, Weight
from kernels.reference_matmul import multiply

Linear = Callable[[Tensor], Tensor]  # [M, in] -> [M, out]


class MakeLinear(Protocol):
    def __call__(
        self, weight: Weight, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Linear:
        """weight [out, in]; dtype: of the result, where it is to be another than x's."""


class PackedLinear:
    """oneDNN's own weight layout. The weight cannot be read back."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = bias
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]


class PlainLinear:
    """torch's Linear: every other device and dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias)


class EagerLinear:
    """A quantized weight, widened for each product: the oracle, and slow."""

    def __init__(
        self, weight: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> None:
        self._weight, self._bias, self._dtype = weight, bias, dtype

    def __call__(self, x: Tensor) -> Tensor:
        return multiply(x, self._weight, self._bias, self._dtype)


def make_linear(weight: Weight, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Linear:
    """See MakeLinear; packed where this build and processor can. A packed weight is a copy."""
    if isinstance(weight, QuantizedMatrix):
        return EagerLinear(weight, bias, dtype)
    linear: Linear
    if weight.device.type == "cpu" and _can_pack(weight.dtype):
        linear = PackedLinear(weight, bias)
    else:
        linear = PlainLinear(weight, bias)
    return linear if dtype in (None, weight.dtype) else lambda x: linear(x).to(dtype)


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
