"""The experts of a layer whose matrices stay quantized: one matrix, expert by expert, and the floats of each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.quantized_matrix import QuantizedMatrix, Weight
from kernels.reference_matmul import dequantize


@dataclass(frozen=True, eq=False)
class QuantizedExperts:
    """Where kernels take [E, n, k] of floats, these may stand; eager torch looks up one expert after another."""

    matrix: QuantizedMatrix  # [E * n, k], without an order of its inputs
    num_experts: int

    @property
    def shape(self) -> tuple[int, int, int]:
        rows, k = self.matrix.shape
        return self.num_experts, rows // self.num_experts, k

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, expert: int) -> Tensor:
        """[n, k] of floats."""
        _, n, _ = self.shape
        return dequantize(self.matrix.rows(expert * n, (expert + 1) * n)).to(self.dtype)


Experts = Tensor | QuantizedExperts  # [E, n, k]


class ExpertStack:
    """Matrices of one form, put below each other one at a time, so that they are never there twice."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._whole: Weight | None = None

    def put(self, expert: int, part: Weight) -> None:
        """[n, k]. Raises ValueError for one that is not as the others are."""
        whole = self._whole
        if whole is None:
            whole = self._whole = _room(part, self._num_experts)
        if _form(part) != _form(whole, self._num_experts):
            raise ValueError(
                f"expert {expert} is {_form(part)}, others are {_form(whole, self._num_experts)}; experts must be alike"
            )
        rows = slice(expert * part.shape[0], (expert + 1) * part.shape[0])
        if isinstance(whole, Tensor):
            assert isinstance(part, Tensor)
            whole[rows] = part
            return
        assert isinstance(part, QuantizedMatrix)
        whole.q[rows] = part.q
        whole.scale[:, rows] = part.scale
        if whole.minimum is not None and part.minimum is not None:
            whole.minimum[:, rows] = part.minimum

    def whole(self) -> Experts:
        assert self._whole is not None, "no experts"
        if isinstance(self._whole, Tensor):
            return self._whole.view(self._num_experts, -1, self._whole.shape[1])
        return QuantizedExperts(self._whole, self._num_experts)


def _room(first: Weight, num_experts: int) -> Weight:
    """For matrices like `first`. Raises ValueError."""
    if isinstance(first, Tensor):
        return first.new_empty(first.shape[0] * num_experts, first.shape[1])
    if first.order is not None:
        raise ValueError("experts whose inputs are scattered are not multiplied with")

    def wide(part: Tensor) -> Tensor:
        return part.new_empty(part.shape[0], part.shape[1] * num_experts)

    n, width = first.q.shape
    minimum = None if first.minimum is None else wide(first.minimum)
    q = torch.empty(n * num_experts, width, dtype=first.q.dtype, device=first.device)
    return replace(first, q=q, scale=wide(first.scale), minimum=minimum)


def _form(matrix: Weight, experts: int = 1) -> str:
    n, k = matrix.shape
    if isinstance(matrix, Tensor):
        return f"{matrix.dtype} [{n // experts}, {k}]"
    scattered = "" if matrix.order is None else ", scattered"
    return f"{matrix.format} [{n // experts}, {k}] by {matrix.group}{scattered}"
