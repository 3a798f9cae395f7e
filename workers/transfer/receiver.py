"""The listener for KV blocks, on every road that this worker has; each connection gets a thread."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence

from workers.config import TransferConfig
from workers.protocol.frames import ProtocolError
from workers.protocol.messages import KvEndpoint, KvFetch, KvLayout, WorkerInfo
from workers.transfer.block_memory import BlockMemory
from workers.transfer.channel import shut
from workers.transfer.incoming import Incoming, Target
from workers.transfer.road import RoadKind
from workers.transfer.roads import ROADS, usable
from workers.transfer.tickets import Tickets

logger = logging.getLogger(__name__)

_MAX_GREETINGS = (
    64  # peers that have not proved anything yet, each with a thread; one more and the oldest goes
)
_ACCEPT_PAUSE_S = 0.1


class Receiver:
    def __init__(
        self,
        tickets: Tickets,
        memories: Sequence[BlockMemory],
        layout: KvLayout,
        config: TransferConfig,
        *,
        secret: bytes,
        on_fetch: Callable[[KvFetch], str | None] = lambda fetch: "prefixes are not sent from here",
    ) -> None:
        """`memories`: one for each rank. `on_fetch` answers why nothing will be sent, or None."""
        self._info: WorkerInfo | None = None
        self._io_timeout_s = config.io_timeout_s
        self._stopping = False
        self._connections: set[socket.socket] = set()
        self._greetings: dict[socket.socket, None] = {}  # those in the handshake, oldest first
        self._lock = threading.Lock()
        self._listeners: list[tuple[Target, socket.socket]] = []
        self.endpoints: list[KvEndpoint] = []
        for rank, memory in enumerate(memories):
            for name, lack in usable(config.channels, memory).items():
                if lack is not None:
                    continue
                said = ROADS[name].endpoint(memory)
                listener, address = _listen(ROADS[name], config.host)
                self.endpoints.append(KvEndpoint(kind=name, address=address, rank=rank, **said))
                target = Target(
                    road=ROADS[name],
                    rank=rank,
                    ranks=len(memories),
                    memory=memory,
                    layout=layout,
                    config=config,
                    tickets=tickets,
                    secret=secret,
                    on_fetch=on_fetch,
                )
                self._listeners.append((target, listener))
        if not self._listeners:
            lacks = "; ".join(f"{name}: {why}" for name, why in usable(config.channels, memories[0]).items())
            raise ValueError(
                f"none of transfer.channels can be used here: {lacks}; add tcp, which always can"
            )

    def start(self, info: WorkerInfo) -> None:
        self._info = info
        for target, listener in self._listeners:
            threading.Thread(
                target=self._accept,
                args=(target, listener),
                name=f"kv-accept-{target.road.name}",
                daemon=True,
            ).start()

    def stop(self) -> None:
        self._stopping = True
        for _, listener in self._listeners:
            shut(listener)
        with self._lock:
            for sock in self._connections:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)  # its thread wakes up, and closes it

    def _accept(self, target: Target, listener: socket.socket) -> None:
        road = target.road.name
        while not self._stopping:
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if self._stopping:
                    return
                # Out of descriptors, or the peer left the queue: the listener is as good as before.
                logger.warning("kv channel (%s): accept failed: %s", road, error)
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
                target=self._serve, args=(target, sock), name=f"kv-recv-{road}", daemon=True
            ).start()

    def _serve(self, target: Target, sock: socket.socket) -> None:
        assert self._info is not None
        road = target.road.name
        with self._lock:
            self._connections.add(sock)
        incoming = Incoming(sock, target, self._info)
        try:
            sock.settimeout(self._io_timeout_s)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if incoming.greet():
                with self._lock:
                    self._greetings.pop(sock, None)
                if incoming.open():
                    incoming.run(lambda: self._stopping)
        except ProtocolError as error:
            logger.warning("kv channel (%s) closed: %s", road, error)
        except OSError as error:
            if not self._stopping:
                logger.info("kv channel (%s) ended: %s", road, error)
        except Exception:
            logger.exception("kv channel (%s) failed", road)
        finally:
            with self._lock:
                self._connections.discard(sock)
                self._greetings.pop(sock, None)
            incoming.close()


def _listen(road: RoadKind, host: str) -> tuple[socket.socket, str]:
    """A listener for the connections of a road, and its address."""
    if road.local:
        # Abstract: the name vanishes with the process, so no file is ever left behind.
        address = f"headrace-kv-{secrets.token_hex(12)}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind("\0" + address)
    else:
        listener = socket.create_server((host, 0), reuse_port=False)
        address = f"{host}:{listener.getsockname()[1]}"
    listener.listen(128)
    return listener, address
