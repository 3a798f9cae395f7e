"""The decode side's listener: takes blocks from prefill workers over tcp and shm, one thread for each sender."""

from __future__ import annotations

import contextlib
import logging
import secrets
import select
import socket
import threading
import time

from workers.protocol.frames import (
    MAX_GREETING_BYTES,
    ProtocolError,
    judge_hello,
    kv_to_receiver,
    new_challenge,
    recv_exactly,
    recv_frame,
    send_frame,
)
from workers.protocol.messages import (
    KvAbort,
    KvAck,
    KvBlocks,
    KvEndpoint,
    KvFirstToken,
    KvRenew,
    Refused,
    WorkerInfo,
)
from workers.transfer.arena import ArenaView, host_id, recv_arena
from workers.transfer.block_memory import BlockMemory
from workers.transfer.channel import shut
from workers.transfer.tickets import TicketGone, Tickets

logger = logging.getLogger(__name__)

_SCRATCH_BYTES = 1 << 20
_MAX_GREETINGS = (
    64  # peers that have not proved anything yet, each with a thread; one more and the oldest goes
)
_ACCEPT_PAUSE_S = 0.1


class Receiver:
    def __init__(
        self,
        tickets: Tickets,
        memory: BlockMemory,
        block_bytes: int,
        *,
        secret: bytes,
        host: str,
        channels: list[str],
        io_timeout_s: float,
    ) -> None:
        self._tickets = tickets
        self._memory = memory
        self._block_bytes = block_bytes
        self._secret = secret
        self._io_timeout_s = io_timeout_s
        self._info: WorkerInfo | None = None
        self._stopping = False
        self._connections: set[socket.socket] = set()
        self._greetings: dict[socket.socket, None] = {}  # those in the handshake, oldest first
        self._lock = threading.Lock()
        self._listeners: list[tuple[str, socket.socket]] = []
        self.endpoints: list[KvEndpoint] = []
        for kind in channels:
            if kind == "shm":
                # Abstract: the name vanishes with the process, so no file is ever left behind.
                name = f"headrace-kv-{secrets.token_hex(12)}"
                listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                listener.bind("\0" + name)
                self.endpoints.append(KvEndpoint(kind="shm", address=name, host_id=host_id()))
            else:
                listener = socket.create_server((host, 0), reuse_port=False)
                port = listener.getsockname()[1]
                self.endpoints.append(KvEndpoint(kind="tcp", address=f"{host}:{port}"))
            listener.listen(128)
            self._listeners.append((kind, listener))

    def start(self, info: WorkerInfo) -> None:
        self._info = info
        for kind, listener in self._listeners:
            threading.Thread(
                target=self._accept, args=(kind, listener), name=f"kv-accept-{kind}", daemon=True
            ).start()

    def stop(self) -> None:
        self._stopping = True
        for _, listener in self._listeners:
            shut(listener)
        with self._lock:
            for sock in self._connections:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)  # its thread wakes up, and closes it

    def _accept(self, kind: str, listener: socket.socket) -> None:
        while not self._stopping:
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if self._stopping:
                    return
                # Out of descriptors, or the peer left the queue: the listener is as good as before.
                logger.warning("kv channel (%s): accept failed: %s", kind, error)
                time.sleep(_ACCEPT_PAUSE_S)
                continue
            with self._lock:
                self._greetings[sock] = None
                if len(self._greetings) > _MAX_GREETINGS:
                    oldest = next(iter(self._greetings))
                    del self._greetings[oldest]
                    with contextlib.suppress(OSError):
                        oldest.shutdown(socket.SHUT_RDWR)  # its thread wakes up, and closes it
            threading.Thread(
                target=self._serve, args=(kind, sock), name=f"kv-recv-{kind}", daemon=True
            ).start()

    def _serve(self, kind: str, sock: socket.socket) -> None:
        with self._lock:
            self._connections.add(sock)
        try:
            sock.settimeout(self._io_timeout_s)
            if kind == "tcp":
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if self._handshake(sock):
                with self._lock:
                    self._greetings.pop(sock, None)
                arena = recv_arena(sock, kv_to_receiver) if kind == "shm" else None
                self._receive(sock, arena)
        except ProtocolError as error:
            logger.warning("kv channel (%s) closed: %s", kind, error)
        except OSError as error:
            if not self._stopping:
                logger.info("kv channel (%s) ended: %s", kind, error)
        finally:
            with self._lock:
                self._connections.discard(sock)
                self._greetings.pop(sock, None)
            shut(sock)

    def _handshake(self, sock: socket.socket) -> bool:
        assert self._info is not None
        challenge = new_challenge()
        send_frame(sock, challenge)
        deadline = time.monotonic() + self._io_timeout_s
        hello = recv_frame(sock, kv_to_receiver, max_bytes=MAX_GREETING_BYTES, deadline=deadline)
        sock.settimeout(self._io_timeout_s)
        answer = judge_hello(self._secret, challenge, hello, self._info)
        send_frame(sock, answer)
        if isinstance(answer, Refused):
            logger.warning("kv channel refused: %s", answer.reason)
            return False
        return True

    def _receive(self, sock: socket.socket, arena: ArenaView | None) -> None:
        idle = select.poll()
        idle.register(sock, select.POLLIN)
        while not self._stopping:
            idle.poll()  # between frames a sender may be silent for as long as it likes; leases look after tickets
            message = recv_frame(sock, kv_to_receiver)
            match message:
                case KvBlocks():
                    send_frame(sock, self._take_blocks(sock, arena, message))
                case KvFirstToken():
                    send_frame(sock, self._commit(message))
                case KvRenew():
                    for transfer_id in message.transfer_ids:
                        self._tickets.renew(transfer_id, message.epoch)
                case KvAbort():
                    self._tickets.abort(message.transfer_id, message.epoch, message.reason)
                case _:
                    raise ProtocolError(f"{type(message).__name__} is not expected here")

    def _take_blocks(self, sock: socket.socket, arena: ArenaView | None, message: KvBlocks) -> KvAck:
        if message.num_bytes != message.count * self._block_bytes:
            raise ProtocolError(
                f"{message.count} blocks of {self._block_bytes} bytes announced as {message.num_bytes} bytes"
            )
        taken = 0
        try:
            with self._tickets.writing_blocks(
                message.transfer_id, message.epoch, message.first, message.count
            ) as blocks:
                with self._memory.incoming(blocks) as views:
                    if arena is not None:
                        arena.pour(message.offset, views)
                    else:
                        for view in views:
                            recv_exactly(sock, view)
                            taken += len(view)
        except TicketGone as error:
            if arena is None:
                _drain(sock, message.num_bytes - taken)
            return KvAck(transfer_id=message.transfer_id, ok=False, reason=str(error))
        except (OSError, ProtocolError) as error:
            self._tickets.abort(message.transfer_id, message.epoch, f"the channel broke: {error}")
            raise
        return KvAck(transfer_id=message.transfer_id, ok=True)

    def _commit(self, message: KvFirstToken) -> KvAck:
        try:
            self._tickets.commit(
                message.transfer_id, message.epoch, message.token, message.logprobs, message.cached_tokens
            )
        except TicketGone as error:
            return KvAck(transfer_id=message.transfer_id, ok=False, reason=str(error))
        return KvAck(transfer_id=message.transfer_id, ok=True)


def _drain(sock: socket.socket, num_bytes: int) -> None:
    """Bytes for a ticket that is gone: read into scratch and dropped, so that the channel stays in step."""
    scratch = memoryview(bytearray(min(num_bytes, _SCRATCH_BYTES)))
    while num_bytes > 0:
        piece = scratch[: min(num_bytes, len(scratch))]
        recv_exactly(sock, piece)
        num_bytes -= len(piece)
