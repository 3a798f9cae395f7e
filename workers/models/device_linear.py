"""y = x W^T + b on a GPU, or with a quantized weight anywhere."""

from __future__ import annotations

from bisect import bisect_left
from importlib.util import find_spec

import torch
from torch import Tensor

from kernels import reference_matmul
from kernels.quantized_matrix import QuantizedMatrix, Weight
from workers.models.matmul_choice import BUCKETS, Choices, choices_on


class DeviceLinear:
    """The form of the product is chosen here, by the number of rows; a call neither measures nor waits."""

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None,
        dtype: torch.dtype | None = None,
        choices: Choices | None = None,
    ) -> None:
        """dtype: of the result; None: of what is multiplied."""
        self._dtype = dtype or weight.dtype
        self._bias = bias
        self._forms = (choices or choices_on(weight.device)).of(weight, self._dtype)

    def __call__(self, x: Tensor) -> Tensor:
        form = self._forms[min(bisect_left(BUCKETS, len(x)), len(BUCKETS) - 1)]
        return form.product(x, self._bias, self._dtype)


class EagerLinear:
    """A quantized weight in eager torch, widened for each product: the oracle, and slow."""

    def __init__(
        self, weight: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> None:
        self._weight, self._bias, self._dtype = weight, bias, dtype

    def __call__(self, x: Tensor) -> Tensor:
        return reference_matmul.multiply(x, self._weight, self._bias, self._dtype)


def has_triton() -> bool:
    return find_spec("triton") is not None
