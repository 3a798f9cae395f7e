"""The listener of a rank: for those who look for a leader, and for those who lack weights."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable

from workers.experts.link import Link, answer
from workers.experts.messages import Fetch, Join
from workers.protocol.frames import ProtocolError
from workers.protocol.messages import WorkerInfo

logger = logging.getLogger(__name__)

_ACCEPT_PAUSE_S = 0.1
_MAX_GUESTS = 256  # connections at a time, each with a thread: more than a group has ranks


class Door:
    """Each connection has a thread; it is closed when what serves it returns or raises OSError or ProtocolError."""

    def __init__(self, host: str, secret: bytes, timeout_s: float) -> None:
        """Takes a port, without serving yet. Raises OSError."""
        self._listener = socket.create_server((host, 0), backlog=64)
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._secret, self._timeout_s = secret, timeout_s
        self._guests: set[socket.socket] = set()
        self._closing = False

    def open(
        self, info: WorkerInfo, join: Callable[[Link, Join], None], fetch: Callable[[Link, Fetch], None]
    ) -> None:
        self._info, self._join, self._fetch = info, join, fetch
        threading.Thread(target=self._accept, name="experts-door", daemon=True).start()

    def close(self) -> None:
        self._closing = True
        for sock in [self._listener, *self._guests]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if not self._closing:
                    logger.warning("accept failed: %s", error)
                    time.sleep(_ACCEPT_PAUSE_S)
                continue
            if len(self._guests) >= _MAX_GUESTS:
                sock.close()
                continue
            self._guests.add(sock)
            threading.Thread(target=self._serve, args=(sock,), name="experts-guest", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            link = answer(sock, self._secret, self._info, self._timeout_s)
            message = link.receive()
            if isinstance(message, Join):
                self._join(link, message)
                return
            while isinstance(message, Fetch):
                self._fetch(link, message)
                message = link.receive()
            raise ProtocolError(f"{type(message).__name__} is not how a rank begins")
        except ProtocolError as error:
            logger.warning("a rank's connection was closed: %s", error)
        except OSError:
            pass  # it left
        finally:
            self._guests.discard(sock)
            sock.close()
