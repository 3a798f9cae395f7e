"""What the runner asks of a device besides arithmetic: a queue of its own, pinned memory, marks in the queue."""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A place in the queue."""

    def wait(self) -> None:
        """Until the device has passed it. Raises RuntimeError where it has failed."""


class Device(Protocol):
    @property
    def device(self) -> torch.device: ...

    def use(self) -> contextlib.AbstractContextManager[object]:
        """What this thread asks of torch within goes to the model's queue."""

    def pinned(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] on the host, from and to which copies do not hold the host up. Torch keeps what is given back
        for the next ones, and until the copies are done."""

    def mark(self) -> Mark:
        """Behind all that was queued so far."""


def device_for(device: torch.device, *, own_queue: bool = True) -> Device:
    """`own_queue`: see CudaDevice; else the default one, for a model of which others compute parts."""
    return CudaDevice(device, own_queue) if device.type == "cuda" else HostDevice(device)


class CudaDevice:
    """The model's queue is not CUDA's default one: who transfers blocks would wait there for steps that come later.

    So nothing orders the two. Blocks that leave or arrive belong to steps that the host has waited for, or to none yet.
    """

    def __init__(self, device: torch.device, own_queue: bool = True) -> None:
        self.device = device
        self.stream = torch.cuda.default_stream(device)
        if own_queue:
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def use(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self.stream)

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Mark:
        return _CudaMark(self.stream)


class _CudaMark:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = stream.record_event()

    def wait(self) -> None:
        self._event.synchronize()


class HostDevice:
    """Torch on a CPU: everything has happened when a call returns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def use(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def mark(self) -> Mark:
        return _Passed()


class _Passed:
    def wait(self) -> None:
        return
