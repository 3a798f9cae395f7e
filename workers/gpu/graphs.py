"""Steps that are launched as a whole: the seam to CUDA graphs, behind which tests put a stand-in.

What is captured is a function of no arguments that reads and writes persistent buffers only. It is called a few times
before (kernels are compiled, libraries make their workspaces: neither may happen during a capture), then recorded, and
replayed from then on without being called.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from workers.gpu.buckets import Shape
from workers.gpu.device import CudaDevice

logger = logging.getLogger(__name__)

Body = Callable[[], None]


class Graphs(Protocol):
    def capture(self, body: Body) -> Body:
        """The recorded `body`, to be called on the queue that it was captured on."""

    def memory_used(self) -> int:
        """Bytes of the device that are taken now, by anybody."""


@dataclass(frozen=True, slots=True)
class Captured:
    """Every shape's graph, and what they took."""

    graphs: dict[Shape, Body]
    seconds: float
    num_bytes: int


def captured_by(graphs: Graphs, capture: Callable[[], dict[Shape, Body]]) -> Captured:
    """What `capture` captures, and what it takes."""
    began, before = time.perf_counter(), graphs.memory_used()
    found = capture()
    taken = Captured(found, time.perf_counter() - began, graphs.memory_used() - before)
    logger.info(
        "captured steps of %d sizes in %.1f s, which take %.0f MiB",
        len(found),
        taken.seconds,
        taken.num_bytes / 2**20,
    )
    return taken


class CudaGraphs:
    """All captures share one pool of memory: what one allocated for its own use serves the others."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._pool: object | None = None

    def capture(self, body: Body) -> Body:
        stream = self._device.stream
        with torch.cuda.stream(stream):
            body()
            body()  # what the first call allocated and freed is there for the second, as for all that follow
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: blocks that are received, a communicator's watchdog.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            body()
        self._pool = self._pool or graph.pool()
        return graph.replay

    def memory_used(self) -> int:
        torch.cuda.synchronize(self._device.device)
        free, total = torch.cuda.mem_get_info(self._device.device)
        return total - free
