"""nccl: pieces go from GPU to GPU through a communicator of two ranks, one for each connection.

The sender gathers a piece into its staging and announces it when the bytes are there, so that neither GPU spends
anything on waiting; both sides post in the order of announcements and can't mismatch. The receiver decides where the
bytes land: they come into its staging, and leave it for the cache only if the ticket lives.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from workers.cuda import Cuda, CupyCuda, DeviceError, Event, device_errors, wait_for
from workers.protocol.frames import ProtocolError
from workers.protocol.messages import Compression, KvBlocks, KvEndpoint, KvOpen, KvWindow
from workers.protocol.messages import Road as RoadName
from workers.transfer.beside import answered, hung_up, settle
from workers.transfer.block_memory import BlockMemory, DeviceBlocks
from workers.transfer.communicator import Pair, Seat, Seats
from workers.transfer.road import End, Offer, RoadBlocked, announce

_ID_BYTES = 128
_SLOTS = 2  # one is filled while the other is sent


class Nccl:
    name: RoadName = "nccl"
    local = False

    def __init__(self, cuda: Cuda | None = None) -> None:
        self._cuda = cuda or CupyCuda()
        self.seats = Seats()

    def lacks(self, memory: BlockMemory) -> str | None:
        if not isinstance(memory, DeviceBlocks) or not self._cuda.drives(memory.device):
            return "the KV cache is not on an NVIDIA GPU; shm and tcp do without"
        lack = self._cuda.lacks(nccl=True)
        return None if lack is None else f"{lack}; shm and tcp do without"

    def endpoint(self, memory: BlockMemory) -> dict[str, str]:
        return {"device": self._cuda.gpu(memory.device)}

    def bars(self, memory: BlockMemory, endpoint: KvEndpoint) -> str | None:
        own = self._cuda.gpu(memory.device)
        if endpoint.device != own:
            return None
        return f"both on {own}, where NCCL has room for one rank of a communicator; cuda_ipc serves that"

    def outlet(self, end: End, compression: Compression) -> NcclOutlet:
        return NcclOutlet(end, compression, self._cuda, self.seats)

    def inlet(self, end: End, opened: KvOpen, fds: Sequence[int], sock: socket.socket) -> NcclInlet:
        return NcclInlet(end, opened, self._cuda, self.seats, sock)


def _slot_bytes(end: End) -> int:
    """Of the largest piece. A single block must fit whatever was configured."""
    least = end.num_bytes(1, range(end.layout.num_layers), "none")
    return max(int(end.config.ring_memory) // _SLOTS, least)


def _device_blocks(end: End) -> DeviceBlocks:
    assert isinstance(end.memory, DeviceBlocks)  # `lacks` has seen to it
    return end.memory


class NcclOutlet:
    def __init__(self, end: End, compression: Compression, cuda: Cuda, seats: Seats) -> None:
        """Raises RoadBlocked: no communicator is left."""
        self._end, self._compression, self._cuda = end, compression, cuda
        self._memory = _device_blocks(end)
        self._slot_bytes = _slot_bytes(end)
        self._unique_id = b""
        self._pair: Pair | None = None
        self._sent: list[Event | None] = [None] * _SLOTS  # what empties a slot
        self._next = 0
        self._seat: Seat = seats.take(end.config.max_communicators)

    def offer(self) -> Offer:
        with device_errors("NCCL, for an id"):
            self._unique_id = self._cuda.unique_id()
        return Offer(
            {
                "compression": self._compression,
                "nccl_id": self._unique_id,
                "window": KvWindow(num_bytes=self._slot_bytes),
            }
        )

    def establish(self, sock: socket.socket) -> None:
        self._staging = self._memory.empty(_SLOTS * self._slot_bytes)
        self._pair = Pair(self._cuda, self._memory.device, self._unique_id, 0, self._staging, self._seat)
        self._pair.joined(self._deadline(), lambda: answered(sock))

    def send(self, message: KvBlocks, blocks: Sequence[int], layers: range, sock: socket.socket) -> None:
        pair, deadline = self._pair, self._deadline()
        assert pair is not None
        try:
            pair.joined(deadline)
        except RoadBlocked as error:
            raise ConnectionError(str(error)) from error
        if message.num_bytes > self._slot_bytes:
            raise DeviceError(f"a piece of {message.num_bytes} bytes, a slot has {self._slot_bytes}")
        offset, earlier = self._next * self._slot_bytes, self._sent[self._next]
        if earlier is not None:
            pair.finish(earlier, "sending an earlier piece", deadline)
        with device_errors("gathering"), pair.beside.use():
            slot = self._staging[offset : offset + message.num_bytes]
            self._memory.gather(slot, blocks, layers, self._end.heads, self._compression)
            wait_for(pair.beside.record(), "gathering", deadline, pair.check)
        announce(sock, message)
        self._sent[self._next] = pair.send(offset, message.num_bytes, deadline)
        self._next = (self._next + 1) % _SLOTS

    def acknowledged(self) -> None:
        pass

    def close(self) -> None:
        if self._pair is not None:
            self._pair.close()
        else:
            self._seat.leave()

    def _deadline(self) -> float:
        return time.monotonic() + self._end.config.io_timeout_s


class NcclInlet:
    def __init__(self, end: End, opened: KvOpen, cuda: Cuda, seats: Seats, sock: socket.socket) -> None:
        self._end, self._compression, self._sock = end, opened.compression, sock
        self._memory = _device_blocks(end)
        self._slot_bytes = 0 if opened.window is None else opened.window.num_bytes
        most = _slot_bytes(end)
        if len(opened.nccl_id) != _ID_BYTES or self._slot_bytes < 1:
            raise RoadBlocked("no communicator came with it")
        if self._slot_bytes > most:
            raise RoadBlocked(
                f"its pieces have up to {self._slot_bytes} bytes, here transfer.ring_memory has room for {most}"
            )
        seat = seats.take(end.config.max_communicators)
        try:
            self._staging = self._memory.empty(self._slot_bytes)
            self._pair = Pair(cuda, self._memory.device, opened.nccl_id, 1, self._staging, seat)
        except DeviceError as error:
            seat.leave()
            raise RoadBlocked(str(error)) from error
        try:
            if not self._pair.joined(self._deadline(), lambda: answered(sock)):
                raise RoadBlocked("the sender left while NCCL connected")
        except BaseException:
            self._pair.close()
            raise

    def take(self, message: KvBlocks, blocks: Sequence[int], layers: range) -> None:
        expected = self._end.num_bytes(len(blocks), layers, self._compression)
        if message.num_bytes != expected:
            raise ProtocolError(
                f"{len(blocks)} blocks of {len(layers)} layers have {expected} bytes, {message.num_bytes} were announced"
            )
        deadline = self._receive(message)
        with device_errors("scattering"), self._pair.beside.use():
            try:
                wire = self._staging[: message.num_bytes]
                self._memory.scatter(wire, blocks, layers, self._end.heads, self._compression)
            finally:
                settle(self._pair.beside.record(), "scattering", deadline, self._sock)

    def skip(self, message: KvBlocks) -> None:
        """Received and dropped."""
        self._receive(message)

    def close(self) -> None:
        self._pair.close()

    def _receive(self, message: KvBlocks) -> float:
        """The deadline of the piece."""
        if not 0 < message.num_bytes <= self._slot_bytes:
            raise ProtocolError(
                f"a piece of {message.num_bytes} bytes, {self._slot_bytes} at most were agreed"
            )
        deadline = self._deadline()
        # Not before all is there may anything be queued that writes to the cache.
        event = self._pair.recv(0, message.num_bytes, deadline)
        self._pair.finish(event, "receiving", deadline, self._check_sender)
        return deadline

    def _check_sender(self) -> None:
        if hung_up(self._sock):
            raise ConnectionError("the sender left while its blocks came")

    def _deadline(self) -> float:
        return time.monotonic() + self._end.config.io_timeout_s
