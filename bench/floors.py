"""The limits of this machine that figures are held against, each behind one function and taken in the same run.

A floor must be what the machine can do at best, so the best of several probes counts: before, between and after.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.memory_floor import read_bandwidth as _torch_read_bandwidth

_MATRIX = 2048
_PROBE_MIB = 512


def read_bandwidth(threads: int) -> float:
    """Bytes per second of reading memory far beyond the caches with `threads` threads."""
    return _torch_read_bandwidth(threads, megabytes=_PROBE_MIB, repeats=5)


def peak_bf16(threads: int) -> float:
    """FLOPs per second of a large bfloat16 product with `threads` threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = torch.ones(2, _MATRIX, _MATRIX, dtype=torch.bfloat16)
        return 2 * _MATRIX**3 / _fastest(lambda: left @ right, 5)
    finally:
        torch.set_num_threads(before)


def _fastest(work: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


@dataclass
class Floors:
    """The best so far."""

    threads: int
    bytes_per_s: float = 0.0
    flops_per_s: float = 0.0
    probes: list[tuple[float, float]] = field(default_factory=list)

    def probe(self) -> None:
        self.probes.append((read_bandwidth(self.threads), peak_bf16(self.threads)))
        self.bytes_per_s = max(bandwidth for bandwidth, _ in self.probes)
        self.flops_per_s = max(flops for _, flops in self.probes)
