"""Quantized matrices from the neutral form, on the host, to the one that kernels on a device read."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.quantized_matrix import QuantizedMatrix, pack_int4
from workers.models.quantized import GROUP, ChannelWeight, Fp8Weight, GroupedWeight, Quantized

_WIDEST_GROUP = 128


def on_device(matrix: Quantized, dtype: torch.dtype, device: torch.device) -> QuantizedMatrix:
    """`dtype`: of what it will be multiplied with. No value changes."""
    q = torch.from_numpy(matrix.q).to(device)
    k = matrix.shape[1]
    if isinstance(matrix, ChannelWeight):
        scale = torch.from_numpy(matrix.scale).to(device)[None]
        return QuantizedMatrix("int8", q, scale, None, k, k, dtype=dtype)
    if isinstance(matrix, Fp8Weight):
        scale = torch.from_numpy(matrix.scale).to(device).T.contiguous()
        return QuantizedMatrix("fp8", q.view(torch.float8_e4m3fn), scale, None, k, matrix.group, dtype=dtype)
    order = None if matrix.order is None else torch.from_numpy(matrix.order).to(device)
    d, m = (None if part is None else torch.from_numpy(part).to(device).T for part in (matrix.d, matrix.m))
    assert d is not None
    group, d, m = _widest_groups(matrix, d, m)
    if matrix.format == "q8":
        q = (q ^ 0x80).view(torch.int8)  # from an offset of 128 to two's complement
        return QuantizedMatrix("int8", q, d, None, k, group, order, dtype)
    return QuantizedMatrix("int4", pack_int4(q), d, m, k, group, order, dtype)


def _widest_groups(matrix: GroupedWeight, d: Tensor, m: Tensor | None) -> tuple[int, Tensor, Tensor | None]:
    """Groups of 64 and 128 were read as equal groups of 32: their scales, [groups, n], once again each once."""
    group, k = GROUP, matrix.shape[1]
    while group < _WIDEST_GROUP and k % (2 * group) == 0 and all(_in_pairs(part) for part in (d, m)):
        group, d, m = 2 * group, d[::2], None if m is None else m[::2]
    return group, d.contiguous(), None if m is None else m.contiguous()


def _in_pairs(part: Tensor | None) -> bool:
    return part is None or torch.equal(part[::2], part[1::2])
