"""Memory in huge pages."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
from numpy.typing import NDArray

_HUGE_PAGE = 2 * 1024**2


def huge_zeros(num_bytes: int) -> NDArray[np.uint8]:
    """Zeros that take memory only where they are touched, in pages of 2 MiB where the system grants them.

    Attention reads a KV cache in pieces of a few KiB that lie far apart: in pages of 4 KiB each of them misses the TLB.
    """
    region = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: only speed is lost
            region.madvise(mmap.MADV_HUGEPAGE)  # before the first touch, so that pages are born huge
    whole = np.frombuffer(region, np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE
    return whole[start : start + num_bytes]
