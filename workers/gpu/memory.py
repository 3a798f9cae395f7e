"""How much of a GPU's memory is the KV cache's: what is left of this worker's share when everything else has its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch


class DeviceMemory(Protocol):
    def free_and_total(self) -> tuple[int, int]:
        """Bytes, whoever uses the others. What nobody needs was given back before."""

    def peak_of(self, work: Callable[[], object]) -> int:
        """Bytes that were taken for `work` at one time, beyond what is held already."""


class CudaMemory:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_and_total(self) -> tuple[int, int]:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)

    def peak_of(self, work: Callable[[], object]) -> int:
        """What torch reserves counts, not what it hands out: pieces that fit nobody are taken as well."""
        self.free_and_total()
        torch.cuda.reset_peak_memory_stats(self._device)
        before: int = torch.cuda.memory_stats(self._device)["reserved_bytes.all.current"]
        work()
        torch.cuda.synchronize(self._device)
        peak: int = torch.cuda.memory_stats(self._device)["reserved_bytes.all.peak"]
        return peak - before


@dataclass(frozen=True, slots=True)
class MemoryAtStart:
    """Of a GPU, before the model is loaded."""

    memory: DeviceMemory
    free: int  # bytes
    total: int

    @staticmethod
    def of(device: torch.device) -> MemoryAtStart | None:
        """None of a device whose memory is not measured."""
        if device.type != "cuda":
            return None
        memory = CudaMemory(device)
        return MemoryAtStart(memory, *memory.free_and_total())

    def __str__(self) -> str:
        return f"of {_gib(self.total)} there were {_gib(self.free)} free"


@dataclass(frozen=True, slots=True)
class Budget:
    """In bytes."""

    total: int  # of the device
    free: int  # before this worker took any
    share: float  # of `total` that is this worker's
    held: int  # weights, buffers, libraries: what it has taken so far
    activations: int  # at most at one time, in the largest step
    graphs: int

    def kv_bytes(self, block_bytes: int) -> int:
        """For KV blocks. Raises ValueError where there is no room for one."""
        if self.share * self.total > self.free:
            raise ValueError(
                f"engine.gpu_memory_utilization {self.share} asks for {_gib(self.share * self.total)} of the GPU's "
                f"{_gib(self.total)}, but only {_gib(self.free)} were free at the start: end what uses the rest, or set it "
                f"to {max(int(100 * self.free / self.total), 1) / 100} or less"
            )
        left = int(self.share * self.total) - self.held - self.activations - self.graphs
        if left < block_bytes:
            raise ValueError(
                f"there is no memory for a KV cache: {self}; lower engine.max_num_batched_tokens or engine.max_num_seqs, "
                "raise engine.gpu_memory_utilization, quantize the weights (engine.quantization), or share them out "
                "(tensor_parallel)"
            )
        return left

    def __str__(self) -> str:
        return (
            f"of {_gib(self.total)} this worker may have {_gib(self.share * self.total)} "
            f"(engine.gpu_memory_utilization {self.share}), weights and buffers take {_gib(self.held)}, the largest step "
            f"{_gib(self.activations)}, graphs {_gib(self.graphs)}"
        )


@contextlib.contextmanager
def memory_for(what: str, advice: str) -> Iterator[None]:
    """While the worker starts: out of memory becomes a ValueError that says the sizes and what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the GPU has no memory for {what}: {advice}. {error}") from error


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
