"""Quantized matrices from the neutral form, on the host, to the one that kernels on a device read."""

from __future__ import annotations

import torch

from kernels.quantized_matrix import QuantizedMatrix, pack_int4
from workers.models.quantized import GROUP, ChannelWeight, Fp8Weight, Quantized


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
    # Groups of 64 and 128 were read as alike groups of 32: each scale once again.
    once = matrix.shared // GROUP
    d = torch.from_numpy(matrix.d).to(device).T[::once].contiguous()
    if matrix.format == "q8":
        q = (q ^ 0x80).view(torch.int8)  # from an offset of 128 to two's complement
        return QuantizedMatrix("int8", q, d, None, k, matrix.shared, order, dtype)
    assert matrix.m is not None
    m = torch.from_numpy(matrix.m).to(device).T[::once].contiguous()
    return QuantizedMatrix("int4", pack_int4(q), d, m, k, matrix.shared, order, dtype)
