"""Small arrays to the device in one copy, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.gpu.device import Device

_ALIGNMENT = 16


def upload(arrays: Sequence[NDArray[Any]], device: Device) -> list[Tensor]:
    """Of the same shapes and dtypes. Queued: the arrays may be changed when it returns."""
    ends, end = [], 0
    for array in arrays:
        ends.append((end, end + array.nbytes))
        end = -(-(end + array.nbytes) // _ALIGNMENT) * _ALIGNMENT
    host = device.pinned(max(end, 1))
    room = host.numpy()
    for array, (first, last) in zip(arrays, ends, strict=True):
        room[first:last] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    sent = host.to(device.device, non_blocking=True)
    return [
        sent[first:last].view(_dtype_of(array)).view(array.shape)
        for array, (first, last) in zip(arrays, ends, strict=True)
    ]


def _dtype_of(array: NDArray[Any]) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, array.dtype.name)
    return dtype
