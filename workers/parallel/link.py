"""The connection between rank 0 and another rank of its replica: an abstract unix socket that the worker's life names, so
that nobody has to be told where it is. Ranks share a host. Both ends prove that they hold the cluster's secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from workers.config import WorkerConfig
from workers.parallel.messages import from_follower, from_leader
from workers.protocol.frames import (
    MAX_FRAME_BYTES,
    MAX_GREETING_BYTES,
    Codec,
    ProtocolError,
    greet,
    judge_hello,
    new_challenge,
    recv_frame,
    recv_frame_with_fds,
    send_frame,
    send_frame_with_fds,
)
from workers.protocol.messages import Hello, Refused, WorkerInfo

_PAUSE_S = 0.05  # between two looks for rank 0


class RankLink:
    """`send` from any thread, `receive` from one."""

    def __init__(self, sock: socket.socket, codec: Codec[Any]) -> None:
        self._sock, self._codec = sock, codec
        self._sending = threading.Lock()

    def send(self, message: Any, fd: int | None = None) -> None:
        """Raises OSError, after which nothing more can be sent."""
        with self._sending:
            send_frame_with_fds(self._sock, message, [] if fd is None else [fd])

    def send_frame(self, frame: bytes) -> None:
        """What `workers.protocol.frames.encode` has made. Raises as `send`."""
        with self._sending:
            self._sock.sendall(frame)

    def receive(self) -> tuple[Any, int | None]:
        """A message, and the descriptor beside it, which is the caller's to close.

        Raises OSError (TimeoutError when nothing came in the time of `expect_within`), ProtocolError.
        """
        message, fds = recv_frame_with_fds(self._sock, self._codec, max_fds=1, max_bytes=MAX_FRAME_BYTES)
        return message, fds[0] if fds else None

    def expect_within(self, timeout_s: float | None) -> None:
        """How long the peer may say nothing, and take nothing."""
        self._sock.settimeout(timeout_s)

    def close(self) -> None:
        """Wakes who waits here. Idempotent."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class RankDoor:
    """Where rank 0 waits for the others."""

    def __init__(self, config: WorkerConfig) -> None:
        """Raises OSError when this life listens already."""
        self._config = config
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(_name(config))
            self._listener.listen(16)
        except BaseException:
            self._listener.close()
            raise

    def gather(self, info: WorkerInfo, size: int, deadline: float) -> list[RankLink]:
        """The ranks 1 to size - 1, in order. Raises TimeoutError at the deadline (monotonic), naming who is missing."""
        found: dict[int, RankLink] = {}
        while missing := [rank for rank in range(1, size) if rank not in found]:
            self._listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                sock, _ = self._listener.accept()
            except TimeoutError as error:
                raise TimeoutError(f"tensor-parallel rank {missing[0]} of {size} did not come") from error
            with contextlib.suppress(OSError, ProtocolError):  # a stranger, or it left; the rank comes again
                rank = self._answer(sock, info, missing)
                found[rank] = RankLink(sock, from_follower)
                continue
            sock.close()
        return [found[rank] for rank in sorted(found)]

    def close(self) -> None:
        self._listener.close()

    def _answer(self, sock: socket.socket, info: WorkerInfo, missing: list[int]) -> int:
        sock.settimeout(self._config.timeout_s)
        challenge = new_challenge()
        send_frame(sock, challenge)
        hello = recv_frame(sock, from_follower, max_bytes=MAX_GREETING_BYTES)
        verdict = judge_hello(self._config.secret.encode(), challenge, hello, info)
        known = [rank for rank in missing if isinstance(hello, Hello) and hello.peer_id == f"rank {rank}"]
        if not known and not isinstance(verdict, Refused):
            verdict = Refused(reason="nobody waits for this rank")
        send_frame(sock, verdict)
        if isinstance(verdict, Refused):
            raise ProtocolError(verdict.reason)
        return known[0]


def find_leader(
    config: WorkerConfig, rank: int, deadline: float, heed_stop: Callable[[], None]
) -> tuple[RankLink, WorkerInfo]:
    """Rank 0 of this life, and what it says of itself. Raises TimeoutError, OSError, ProtocolError."""
    while True:
        heed_stop()
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(config.timeout_s)
            sock.connect(_name(config))
            info = greet(sock, config.secret.encode(), f"rank {rank}", from_leader)
        except ConnectionRefusedError:
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            link = RankLink(sock, from_leader)
            link.expect_within(None)
            return link, info
        if time.monotonic() >= deadline:
            raise TimeoutError(f"rank 0 of {config.worker_id} did not come up")
        time.sleep(_PAUSE_S)


def _name(config: WorkerConfig) -> bytes:
    life = f"{config.cluster}\n{config.worker_id}\n{config.epoch}\n{os.getuid()}".encode()
    return b"\0headrace-ranks-" + hashlib.sha256(life).hexdigest()[:32].encode()
