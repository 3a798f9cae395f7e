"""y = x W^T + b beside Triton's kernels, with weights of floats and with quantized ones."""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from kernels.quantized_matrix import Weight
from workers.models.matmul_choice import BUCKETS, Choices, choices_on


class DeviceLinear:
    """The form of the product is chosen here, by the number of rows; a call neither measures nor waits."""

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None = None,
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
