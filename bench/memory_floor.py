"""How fast this machine reads memory: the floor under a decode step, which must read every weight once.

python -m bench.memory_floor        prints GB/s with one thread and with all
"""

from __future__ import annotations

import os
import time


def read_bandwidth(num_threads: int, megabytes: int = 512, repeats: int = 7) -> float:
    """Bytes per second of the fastest of `repeats` passes over a buffer far larger than any cache."""
    import torch

    torch.set_num_threads(num_threads)
    buffer = torch.ones(megabytes * 2**20 // 4, dtype=torch.float32)
    best = 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        buffer.sum()
        best = max(best, buffer.nbytes / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    for threads in sorted({1, os.cpu_count() or 1}):
        print(f"{threads} threads: {read_bandwidth(threads) / 1e9:.1f} GB/s")
