"""What the roads between GPUs ask of CUDA and NCCL: the one seam, behind which tests put a stand-in.

Addresses are numbers, as CUDA and NCCL take them. cupy is imported when something is asked, never with this module.
"""

from __future__ import annotations

import contextlib
import importlib
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

_LONGEST_PAUSE_S = 0.0005  # between two looks at an event


class DeviceError(OSError):
    """A GPU, its driver or NCCL refused. An OSError: whoever travels a road ends the connection."""


class Event(Protocol):
    def query(self) -> bool:
        """Whether it has come to pass. Raises RuntimeError when the device has failed."""


class Stream(Protocol):
    """A queue of work on a device, apart from the model's."""

    @property
    def handle(self) -> int:
        """For CUDA and NCCL."""

    def use(self) -> contextlib.AbstractContextManager[None]:
        """torch's work of this thread goes here, and waits on the device for what the model has queued by now."""

    def record(self) -> Event:
        """Of all that has been queued here by now."""


class Communicator(Protocol):
    """Of two or more ranks. `send` and `recv` are called by one thread, the others by any; all but `error` may block."""

    def send(self, address: int, num_bytes: int, peer: int, stream: Stream) -> None: ...

    def recv(self, address: int, num_bytes: int, peer: int, stream: Stream) -> None: ...

    def error(self) -> str | None:
        """What has gone wrong in the background. Not after `abort`."""

    def abort(self) -> None:
        """Ends what runs, wakes who waits in the other calls."""


class Cuda(Protocol):
    """Every method may raise RuntimeError, the base of CUDA's and NCCL's errors."""

    def lacks(self, *, nccl: bool) -> str | None:
        """Why it can't be used in this process, and what to do; None when it can."""

    def drives(self, device: torch.device) -> bool: ...

    def gpu(self, device: torch.device) -> str:
        """Names the GPU among all of all hosts."""

    def stream(self, device: torch.device) -> Stream:
        """A queue that nobody else has: what hangs in it holds nobody up."""

    def unique_id(self) -> bytes:
        """Of a communicator that is to be made."""

    def join(self, device: torch.device, unique_id: bytes, rank: int, ranks: int = 2) -> Communicator:
        """Blocks until all ranks have joined, for ever if need be."""

    def grouped(self) -> contextlib.AbstractContextManager[None]:
        """What is sent and received within begins together, when it ends: the order of the peers can't block anybody."""

    def allocate(self, device: torch.device, num_bytes: int) -> int:
        """Zeros, in an allocation of their own."""

    def free(self, device: torch.device, address: int) -> None: ...

    def export(self, device: torch.device, address: int) -> bytes:
        """A handle by which other processes of the host can open an allocation."""

    def open(self, device: torch.device, handle: bytes) -> int:
        """The address at which it is mapped here."""

    def close(self, device: torch.device, address: int) -> None: ...

    def bytes_at(self, device: torch.device, address: int, num_bytes: int, owner: Any) -> torch.Tensor:
        """That memory as a uint8 tensor, which keeps `owner` alive."""

    def copy_rows(
        self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int, stream: Stream
    ) -> None:
        """`height` rows of `width` bytes; a pitch is the distance of two rows in bytes."""


@contextlib.contextmanager
def device_errors(what: str) -> Iterator[None]:
    """Raises DeviceError instead of RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(f"{what}: {error}") from error


def wait_for(
    event: Event, what: str, deadline: float | None = None, check: Callable[[], None] = lambda: None
) -> None:
    """Until the event has come to pass. `deadline`: monotonic seconds, then TimeoutError; `check` may raise meanwhile."""
    pause = 0.0
    while not event.query():
        check()
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError(f"{what} did not end in time")
        time.sleep(pause)
        pause = min(pause * 2 or 0.00002, _LONGEST_PAUSE_S)


def stream_on(device: torch.device) -> Stream:
    """One of torch's streams; on a CPU all work is done at once."""
    if device.type != "cuda":
        return _Here()
    return _TorchStream(torch.cuda.Stream(device), device)  # type: ignore[no-untyped-call]


class _TorchStream:
    def __init__(self, stream: torch.cuda.Stream, device: torch.device) -> None:
        self._stream, self._device = stream, device
        self.handle: int = stream.cuda_stream

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            # The engine computes on the default stream. The device waits, not this thread.
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            yield

    def record(self) -> Event:
        with torch.cuda.device(self._device):
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return event


class _Here:
    handle = 0

    def use(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self) -> Event:
        return _Done()


class _Done:
    def query(self) -> bool:
        return True


# --- cupy -------------------------------------------------------------------------------------------------------------


class CupyCuda:
    """cupy lets other Python threads run while NCCL joins, sends, receives or aborts, which a watchdog needs."""

    def lacks(self, *, nccl: bool) -> str | None:
        try:
            runtime = _runtime()
        except ImportError as error:
            return f"cupy cannot be imported ({error}): pip install 'headrace[gpu]'"
        try:
            if runtime.getDeviceCount() < 1:
                return "CUDA sees no GPU (is CUDA_VISIBLE_DEVICES empty?)"
        except RuntimeError as error:
            return f"CUDA sees no GPU: {error}"
        if nccl and not getattr(_nccl(), "available", False):
            return "cupy finds no libnccl: pip install nvidia-nccl-cu13"
        return None

    def drives(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def gpu(self, device: torch.device) -> str:
        uuid = torch.cuda.get_device_properties(device).uuid
        return f"GPU {uuid} at {_runtime().deviceGetPCIBusId(device.index)}"

    def stream(self, device: torch.device) -> Stream:
        runtime = self._at(device)
        # torch hands out 32 streams in turn: two communicators could get the same one.
        handle = runtime.streamCreateWithFlags(runtime.streamNonBlocking)
        stream = _TorchStream(torch.cuda.ExternalStream(handle, device), device)  # type: ignore[no-untyped-call]
        weakref.finalize(stream, runtime.streamDestroy, handle).atexit = False
        return stream

    def unique_id(self) -> bytes:
        unique_id: bytes = _nccl().get_unique_id()
        return unique_id

    def join(self, device: torch.device, unique_id: bytes, rank: int, ranks: int = 2) -> Communicator:
        self._at(device)
        return _CupyCommunicator(_nccl().NcclCommunicator(ranks, unique_id, rank), device)

    @contextlib.contextmanager
    def grouped(self) -> Iterator[None]:
        nccl = _nccl()
        nccl.groupStart()
        try:
            yield
        finally:
            nccl.groupEnd()

    def allocate(self, device: torch.device, num_bytes: int) -> int:
        runtime = self._at(device)
        address: int = runtime.malloc(num_bytes)
        runtime.memset(address, 0, num_bytes)
        runtime.deviceSynchronize()
        return address

    def free(self, device: torch.device, address: int) -> None:
        self._at(device).free(address)

    def export(self, device: torch.device, address: int) -> bytes:
        handle: bytes = self._at(device).ipcGetMemHandle(address)
        return handle

    def open(self, device: torch.device, handle: bytes) -> int:
        runtime = self._at(device)
        address: int = runtime.ipcOpenMemHandle(handle, runtime.cudaIpcMemLazyEnablePeerAccess)
        return address

    def close(self, device: torch.device, address: int) -> None:
        self._at(device).ipcCloseMemHandle(address)

    def bytes_at(self, device: torch.device, address: int, num_bytes: int, owner: Any) -> torch.Tensor:
        return torch.as_tensor(_CudaArray(address, num_bytes, owner), device=device)

    def copy_rows(
        self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int, stream: Stream
    ) -> None:
        runtime = _runtime()
        kind = runtime.memcpyDeviceToDevice
        runtime.memcpy2DAsync(to, to_pitch, source, source_pitch, width, height, kind, stream.handle)

    @staticmethod
    def _at(device: torch.device) -> Any:
        """The runtime, with this thread's device chosen."""
        runtime = _runtime()
        runtime.setDevice(device.index)
        return runtime


class _CupyCommunicator:
    def __init__(self, communicator: Any, device: torch.device) -> None:
        self._communicator, self._device = communicator, device
        self._bytes: int = _nccl().NCCL_UINT8

    def send(self, address: int, num_bytes: int, peer: int, stream: Stream) -> None:
        self._communicator.send(address, num_bytes, self._bytes, peer, stream.handle)

    def recv(self, address: int, num_bytes: int, peer: int, stream: Stream) -> None:
        self._communicator.recv(address, num_bytes, self._bytes, peer, stream.handle)

    def error(self) -> str | None:
        try:
            self._communicator.check_async_error()
        except RuntimeError as error:
            return str(error)
        return None

    def abort(self) -> None:
        _runtime().setDevice(self._device.index)
        self._communicator.abort()


class _CudaArray:
    def __init__(self, address: int, num_bytes: int, owner: Any) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (num_bytes,),
            "strides": None,
            "data": (address, False),
        }


def _runtime() -> Any:
    return importlib.import_module("cupy.cuda.runtime")


def _nccl() -> Any:
    return importlib.import_module("cupy.cuda.nccl")
