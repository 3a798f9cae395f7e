"""cuda_ipc: the receiver copies blocks straight out of the sender's cache on a GPU of the same host, also on its own GPU.

As in shm.py: the cache is its own window, a piece is announced by its block ids, and the word in alive.py tells a slow
receiver that its copy is void. The connection is a unix socket, over which the word's descriptor travels; the memory
itself is named by a handle in `KvOpen`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

import msgspec

from kernels.cache_view import CacheView
from workers.cuda import Cuda, CupyCuda, DeviceError, device_errors, wait_for
from workers.device_memory import DevicePages, LentDevicePages
from workers.protocol.messages import Compression, KvBlocks, KvEndpoint, KvOpen, KvWindow
from workers.protocol.messages import Road as RoadName
from workers.shared_memory import PagesError
from workers.transfer.alive import AliveWord, SeenWord
from workers.transfer.beside import hung_up, settle
from workers.transfer.block_memory import BlockMemory, DeviceBlocks
from workers.transfer.road import End, Offer, RoadBlocked, announce
from workers.transfer.shm import host_id
from workers.transfer.window import check_source, source_view, window_of


class CudaIpc:
    name: RoadName = "cuda_ipc"
    local = True

    def __init__(self, cuda: Cuda | None = None) -> None:
        self._cuda = cuda or CupyCuda()

    def lacks(self, memory: BlockMemory) -> str | None:
        if not isinstance(memory, DeviceBlocks) or not self._cuda.drives(memory.device):
            return "the KV cache is not on an NVIDIA GPU; shm serves within a host"
        lack = self._cuda.lacks(nccl=False)
        return None if lack is None else f"{lack}; shm and tcp do without"

    def endpoint(self, memory: BlockMemory) -> dict[str, str]:
        return {"host_id": host_id(), "device": self._cuda.gpu(memory.device)}

    def bars(self, memory: BlockMemory, endpoint: KvEndpoint) -> str | None:
        if endpoint.host_id != host_id():
            return "it is on another host (or in another network namespace)"
        assert isinstance(memory, DeviceBlocks)  # `lacks` has seen to it
        if memory.exported is None:
            return (
                "the KV cache here is not allocated so that others can open it (that of a prefill worker is)"
            )
        return None

    def outlet(self, end: End, compression: Compression) -> CudaIpcOutlet:
        assert isinstance(end.memory, DeviceBlocks)
        assert end.memory.exported is not None  # `bars` has seen to it
        return CudaIpcOutlet(end, end.memory, end.memory.exported, self._cuda)

    def inlet(self, end: End, opened: KvOpen, fds: Sequence[int], sock: socket.socket) -> CudaIpcInlet:
        given = list(fds)
        try:
            window = opened.window
            if window is None or not window.handle or not 0 < window.num_bytes <= 2**46 or len(given) != 1:
                raise RoadBlocked("no window came with it")
            alive = SeenWord(given.pop())
            return CudaIpcInlet(end, opened, window, alive, self._cuda, sock)
        except (PagesError, OSError) as error:
            raise RoadBlocked(f"its memory can't be used: {error}") from error
        finally:
            for fd in given:
                os.close(fd)


class CudaIpcOutlet:
    def __init__(
        self, end: End, memory: DeviceBlocks, pages: DevicePages | LentDevicePages, cuda: Cuda
    ) -> None:
        self._timeout_s = end.config.io_timeout_s
        self._view, self._pages = memory.view, pages
        self._closed = False
        with device_errors("a stream"):
            self._stream = cuda.stream(memory.device)
        self._alive = AliveWord()

    def offer(self) -> Offer:
        try:
            handle = self._pages.handle
        except RuntimeError as error:
            raise RoadBlocked(f"the KV cache can't be exported: {error}") from error
        window = window_of(self._view, self._pages.address, self._pages.num_bytes, handle)
        return Offer({"window": window}, (self._alive.fd,))

    def establish(self, sock: socket.socket) -> None:
        pass

    def send(self, message: KvBlocks, blocks: Sequence[int], layers: range, sock: socket.socket) -> None:
        # The receiver can't wait for our device: what is announced has been computed.
        with device_errors("the model's work"):
            with self._stream.use():
                pass
            deadline = time.monotonic() + self._timeout_s
            wait_for(self._stream.record(), "computing what is to be sent", deadline, self._check)
        announce(sock, msgspec.structs.replace(message, source=list(blocks)))

    def acknowledged(self) -> None:
        pass

    def close(self) -> None:
        self._closed = True
        self._alive.take_back()

    def _check(self) -> None:
        if self._closed:
            raise ConnectionError("the channel was closed")


class CudaIpcInlet:
    def __init__(
        self,
        end: End,
        opened: KvOpen,
        window: KvWindow,
        alive: SeenWord,
        cuda: Cuda,
        sock: socket.socket,
    ) -> None:
        """Raises RoadBlocked."""
        assert isinstance(end.memory, DeviceBlocks)  # `lacks` has seen to it
        self._end, self._alive, self._cuda, self._sock = end, alive, cuda, sock
        self._device = end.memory.device
        self._own = end.memory.view.cut(heads=end.heads)
        try:
            self._stream = cuda.stream(self._device)
            self._address: int | None = cuda.open(self._device, window.handle)
        except RuntimeError as error:
            raise RoadBlocked(
                f"its memory can't be opened on {cuda.gpu(self._device)}: {error} (no peer access between the two GPUs, "
                "another IPC or PID namespace, or a container that does not see its GPU)"
            ) from error
        try:
            self._source = source_view(end, opened, self._address, window.num_bytes)
            for view in (self._source, self._own):
                _rows(view)
        except ValueError as error:
            self.close()
            raise RoadBlocked(str(error)) from error

    def take(self, message: KvBlocks, blocks: Sequence[int], layers: range) -> None:
        check_source(message, self._source, len(blocks))
        source, own = self._source.cut(layers=layers), self._own.cut(layers=layers)
        width, height, source_pitch = _rows(source)
        _, _, pitch = _rows(own)
        deadline = time.monotonic() + self._end.config.io_timeout_s
        with device_errors("copying"), self._stream.use():
            try:
                for block, theirs in zip(blocks, message.source, strict=True):
                    self._cuda.copy_rows(
                        own.address + block * own.block_stride,
                        pitch,
                        source.address + theirs * source.block_stride,
                        source_pitch,
                        width,
                        height,
                        self._stream,
                    )
            finally:
                settle(self._stream.record(), "copying", deadline, self._sock)
        self._alive.check()
        # A sender that was killed takes its word back no more. Its memory is said to live while it is open here, but
        # nobody promises that.
        if hung_up(self._sock):
            raise ConnectionError("the sender left while its blocks were copied")

    def skip(self, message: KvBlocks) -> None:
        pass

    def close(self) -> None:
        address, self._address = self._address, None
        if address is not None:
            try:
                with device_errors("closing a peer's memory"):
                    self._cuda.close(self._device, address)
            except DeviceError:
                pass  # the context is lost, and the mapping with it


def _rows(view: CacheView) -> tuple[int, int, int]:
    """A block as rows at equal distances: width, number, pitch. Raises ValueError where it is not."""
    tile = view.num_tokens * view.row_bytes
    whole = view.token_stride == view.row_bytes and (view.num_heads == 1 or view.head_stride == tile)
    if not whole or (view.num_layers > 1 and view.layer_stride != 2 * view.kv_stride):
        raise ValueError("a cache whose blocks are not in canonical order")
    return view.num_heads * tile, view.num_layers * 2, view.kv_stride
