"""What a road between GPUs looks for on the connection beside it while the device works."""

from __future__ import annotations

import contextlib
import select
import socket

from workers.cuda import Event, wait_for


def answered(sock: socket.socket) -> bool:
    """Whether something came in, the other side's end included."""
    return _sees(sock, select.POLLIN)


def hung_up(sock: socket.socket) -> bool:
    """Whether the other side has left, though there may be something of it to read."""
    return _sees(sock, select.POLLRDHUP)


def settle(event: Event, what: str, deadline: float, sock: socket.socket) -> None:
    """Until the device has done what was queued that writes into a cache.

    That can't be called back, and its blocks must not be given to others before. So after the deadline (monotonic
    seconds) the connection is ended at once, but TimeoutError is raised only when the device is done.
    """
    try:
        wait_for(event, what, deadline)
    except TimeoutError:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        wait_for(event, what)
        raise


def _sees(sock: socket.socket, wanted: int) -> bool:
    poller = select.poll()
    poller.register(sock, wanted)
    return bool(poller.poll(0))  # POLLHUP and POLLERR count always
