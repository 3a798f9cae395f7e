"""As much of workers/cuda.py as the exchange over NCCL asks for, on CPU memory: grouped sends and receives that meet."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from workers.cuda import Stream, stream_on

_LOOK_S = 0.01


class World:
    """What all ranks share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.joined: dict[bytes, threading.Barrier] = {}
        self.wires: dict[tuple[bytes, int, int], queue.Queue[bytes]] = {}
        self.wrong: list[str] = []  # rules of NCCL that were broken

    def wire(self, unique_id: bytes, sender: int, receiver: int) -> queue.Queue[bytes]:
        with self.lock:
            return self.wires.setdefault((unique_id, sender, receiver), queue.Queue())

    def barrier(self, unique_id: bytes, ranks: int) -> threading.Barrier:
        with self.lock:
            return self.joined.setdefault(unique_id, threading.Barrier(ranks))


class FakeCuda:
    """One rank's."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._group: list[Callable[[], None]] | None = None

    def stream(self, device: torch.device) -> Stream:
        return stream_on(device)

    def join(self, device: torch.device, unique_id: bytes, rank: int, ranks: int = 2) -> FakeCommunicator:
        with contextlib.suppress(threading.BrokenBarrierError):
            self._world.barrier(unique_id, ranks).wait(timeout=5)
            return FakeCommunicator(self, self._world, unique_id, rank)
        raise RuntimeError("NCCL_ERROR_INTERNAL_ERROR")

    @contextlib.contextmanager
    def grouped(self) -> Iterator[None]:
        self._group = []
        try:
            yield
        finally:
            calls, self._group = self._group, None
            for call in sorted(calls, key=lambda call: call.__name__ != "send"):  # sends first: none blocks
                call()

    def post(self, call: Callable[[], None]) -> None:
        if self._group is None:
            self._world.wrong.append(
                "posted outside of a group: two ranks that send first would block each other"
            )
            return
        self._group.append(call)


class FakeCommunicator:
    def __init__(self, cuda: FakeCuda, world: World, unique_id: bytes, rank: int) -> None:
        self._cuda, self._world, self._id, self._rank = cuda, world, unique_id, rank
        self.aborted = threading.Event()

    def send(self, address: int, num_bytes: int, peer: int, stream: Any) -> None:
        def send() -> None:
            self._world.wire(self._id, self._rank, peer).put(ctypes.string_at(address, num_bytes))

        self._cuda.post(send)

    def recv(self, address: int, num_bytes: int, peer: int, stream: Any) -> None:
        def receive() -> None:
            wire = self._world.wire(self._id, peer, self._rank)
            while True:
                if self.aborted.is_set():
                    raise RuntimeError("NCCL_ERROR_REMOTE_ERROR")
                with contextlib.suppress(queue.Empty):
                    data = wire.get(timeout=_LOOK_S)
                    break
            if len(data) != num_bytes:
                self._world.wrong.append(f"{len(data)} bytes sent, {num_bytes} awaited")
            ctypes.memmove(address, data, min(num_bytes, len(data)))

        self._cuda.post(receive)

    def error(self) -> str | None:
        return None

    def abort(self) -> None:
        self.aborted.set()
