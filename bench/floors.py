"""The limits of this machine that figures are held against, each behind one function and taken in the same run.

A floor must be what the machine can do at best, so the best of several probes counts: before, between and after.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from bench.memory_floor import read_bandwidth as _torch_read_bandwidth
from kernels.cpu.build import BuildError
from kernels.cpu.library import load
from workers.huge_pages import huge_zeros

_MATRIX = 2048
_PROBE_MIB = 512
_PEAK_S = 0.1


def read_bandwidth(threads: int) -> float:
    """Bytes per second of reading memory far beyond the caches with `threads` threads: by torch or by a loop of loads
    over huge pages, whichever is faster."""
    by_torch = _torch_read_bandwidth(threads, megabytes=_PROBE_MIB, repeats=5)
    try:
        read = load().cdll.hr_bench_read
    except BuildError:
        return by_torch
    read.restype, read.argtypes = ctypes.c_double, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    regions = [huge_zeros(_PROBE_MIB * 2**20 // threads) for _ in range(threads)]
    for region in regions:
        region.fill(1)
    with ThreadPoolExecutor(threads) as pool:

        def all_at_once() -> (
            None
        ):  # not the sum of what each reads at its best moment: the others may be done by then
            list(pool.map(lambda region: read(region.ctypes.data, region.nbytes, 4), regions))

        together = 4 * sum(region.nbytes for region in regions) / _fastest(all_at_once, 3)
    return float(max(by_torch, together))


def peak_bf16(threads: int) -> float:
    """FLOPs per second in bfloat16 with `threads` threads: of a large product by torch, or of multiply-adds in
    registers, whichever is faster (the first uses AMX tiles where there are any, the second does not)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = torch.ones(2, _MATRIX, _MATRIX, dtype=torch.bfloat16)
        product = 2 * _MATRIX**3 / _fastest(lambda: left @ right, 5)
    finally:
        torch.set_num_threads(before)
    try:
        peak = load().cdll.hr_bench_peak_bf16
    except BuildError:
        return product
    peak.restype, peak.argtypes = ctypes.c_double, [ctypes.c_double]
    with ThreadPoolExecutor(threads) as pool:
        return float(max(product, sum(pool.map(lambda _: peak(_PEAK_S), range(threads)))))


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
