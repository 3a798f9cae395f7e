"""Memory in huge pages."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray


def huge_zeros(num_bytes: int) -> NDArray[np.uint8]:
    """Zeros that take memory only where they are touched, in pages of 2 MiB where the system grants them.

    Attention reads a KV cache in pieces of a few KiB that lie far apart: in pages of 4 KiB each of them misses the TLB.
    """
    region = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            region.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without transparent huge pages: only speed is lost
    return np.frombuffer(region, dtype=np.uint8, count=num_bytes)
