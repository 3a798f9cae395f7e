"""The sides of pair.py with their caches on a GPU, or on a stand-in for one."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from tests.workers.transfer.pair import PatternEngine
from workers.cuda import Cuda
from workers.device_memory import DevicePages
from workers.transfer.block_memory import DeviceBlocks


class DeviceValues:
    """A cache on a device, read and written like the array that pair.py has in its place."""

    def __init__(self, cache: torch.Tensor) -> None:
        self._cache = cache

    def __getitem__(self, block: int) -> NDArray[Any]:
        found: NDArray[Any] = self._cache[block].cpu().numpy()
        return found

    def __setitem__(self, block: int, content: NDArray[Any]) -> None:
        self._cache[block] = torch.tensor(content, device=self._cache.device)

    def any(self) -> bool:
        return bool(self._cache.any())


def on_gpu(engine: PatternEngine, cuda: Cuda, device: str = "cpu", exported: bool = True) -> list[Any]:
    """The memories of the engine's ranks, whose caches are moved to the device."""
    memories, layout = [], engine.layout
    for rank in engine.ranks:
        shape = rank.values.shape
        pages = DevicePages(rank.values.nbytes, torch.device(device), cuda)
        cache = pages.tensor.view(torch.uint8 if layout.quantized else torch.float32).view(shape)
        rank.values = DeviceValues(cache)
        held = cache.squeeze(4) if layout.quantized else cache
        memories.append(DeviceBlocks(held, layout, pages if exported else None))
    return memories
