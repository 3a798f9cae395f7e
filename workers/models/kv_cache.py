"""A new KV cache for a model that computes with torch, in floats or quantized (kernels/paged_kv.py)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kernels.reference_relayout import Wire
from workers.config import KvCacheDtype


def wire_of(kv_cache_dtype: KvCacheDtype) -> Wire | None:
    """None: floats."""
    return None if kv_cache_dtype == "auto" else kv_cache_dtype


def new_kv_cache(
    shape: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    wire: Wire | None,
    device: torch.device,
    pages: Tensor | None = None,
) -> Tensor:
    """Zeros; in `pages`, uint8 zeros, when given. `shape` [num_blocks, num_layers, planes, num_kv_heads, block_size,
    head_dim] of `dtype`; with a `wire` tiles in place of the last two.

    Not garbage, because padding is read and masked, and 0 * NaN is still NaN. On a CPU the pages come from the kernel
    as zeros and cost no memory before a block is used: torch.zeros would write all of them at once.
    """
    stored, held = (shape, dtype) if wire is None else ((*shape[:4], shape[4] * (shape[5] + 4)), torch.uint8)
    if pages is not None:
        return pages.view(held).view(stored)
    if device.type != "cpu":
        return torch.zeros(stored, dtype=held, device=device)
    own = np.zeros(math.prod(stored) * held.itemsize, dtype=np.uint8)
    return torch.from_numpy(own).view(held).view(stored)
