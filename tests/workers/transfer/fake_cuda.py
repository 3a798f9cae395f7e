"""As much of CUDA and NCCL as the roads ask for, without a GPU: memory on the CPU, streams as threads.

What a stream is given runs in its thread, in order; a send and a receive meet there, byte counts compared, as on two
GPUs. What torch does inside `use` happens at once. A `World` is what processes and hosts have in common.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import queue
import secrets
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from workers.cuda import Event, Stream

_STEP_S = 0.002


class World:
    def __init__(self) -> None:
        self.meetings: dict[bytes, Meeting] = {}
        self.lock = threading.Lock()
        self.wrong: list[str] = []  # rules of NCCL that were broken
        self.released = threading.Event()  # lets go of everybody who would wait for ever

    def meeting(self, unique_id: bytes) -> Meeting:
        with self.lock:
            return self.meetings.setdefault(unique_id, Meeting())


class Meeting:
    """One communicator: both sides."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.joined: set[int] = set()
        self.aborted: set[int] = set()
        self.on_wire: bytes | None = None  # what the sender has put down and the receiver not yet taken


class FakeCuda:
    def __init__(self, world: World, gpu: str = "GPU 0") -> None:
        self.world, self.name = world, gpu
        self.missing: str | None = None
        self.unreachable: str | None = None  # why memory of others can't be opened
        self.copies_slowly: Callable[[], None] = lambda: None  # runs in a copy
        self.never_joins = False
        self.post_hangs = False
        self.transfers_hang = False
        self.async_error: str | None = None
        self.communicators: list[FakeCommunicator] = []
        self.num_aborts = 0
        self.open_handles: dict[int, Any] = {}
        self._exports: dict[int, tuple[int, int, mmap.mmap]] = {}  # address -> descriptor, bytes, mapping

    def lacks(self, *, nccl: bool) -> str | None:
        return self.missing

    def drives(self, device: torch.device) -> bool:
        return True

    def gpu(self, device: torch.device) -> str:
        return self.name

    def stream(self, device: torch.device) -> FakeStream:
        return FakeStream()

    # --- NCCL -------------------------------------------------------------------------------------------------------

    def unique_id(self) -> bytes:
        return secrets.token_bytes(128)

    def join(self, device: torch.device, unique_id: bytes, rank: int) -> FakeCommunicator:
        meeting = self.world.meeting(unique_id)
        with meeting.changed:
            if not self.never_joins:
                meeting.joined.add(rank)
                meeting.changed.notify_all()
            while len(meeting.joined) < 2:
                meeting.changed.wait(0.02)
                if self.world.released.is_set():
                    raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR: the world has ended")
        communicator = FakeCommunicator(self, meeting, rank)
        self.communicators.append(communicator)
        return communicator

    # --- memory -----------------------------------------------------------------------------------------------------

    def allocate(self, device: torch.device, num_bytes: int) -> int:
        fd = os.memfd_create("fake-gpu")
        os.ftruncate(fd, num_bytes)
        memory = mmap.mmap(fd, num_bytes)
        address = int(np.frombuffer(memory, np.uint8).ctypes.data)
        self._exports[address] = (fd, num_bytes, memory)
        return address

    def free(self, device: torch.device, address: int) -> None:
        fd, _, _ = self._exports.pop(address)
        os.close(fd)

    def export(self, device: torch.device, address: int) -> bytes:
        fd, num_bytes, _ = self._exports[address]
        return f"{os.getpid()} {fd} {num_bytes}".encode()

    def open(self, device: torch.device, handle: bytes) -> int:
        if self.unreachable:
            raise RuntimeError(self.unreachable)
        pid, number, num_bytes = (int(part) for part in handle.split())
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
        try:
            memory = mmap.mmap(fd, num_bytes)
        finally:
            os.close(fd)
        address = int(np.frombuffer(memory, np.uint8).ctypes.data)
        self.open_handles[address] = memory
        return address

    def close(self, device: torch.device, address: int) -> None:
        del self.open_handles[address]

    def bytes_at(self, device: torch.device, address: int, num_bytes: int, owner: Any) -> torch.Tensor:
        memory = self._exports[address][2] if address in self._exports else self.open_handles[address]
        array = np.frombuffer(memory, np.uint8).view(_Owned)
        array.owner = owner
        return torch.from_numpy(array)

    def copy_rows(
        self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int, stream: Stream
    ) -> None:
        def copy() -> None:
            self.copies_slowly()
            for row in range(height):
                ctypes.memmove(to + row * to_pitch, source + row * source_pitch, width)

        assert isinstance(stream, FakeStream)
        stream.queue(copy)


class _Owned(np.ndarray):  # type: ignore[type-arg]
    owner: Any = None


class FakeStream:
    handle = 0

    def __init__(self) -> None:
        # The thread must not keep the stream: its end is the stream's.
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=_run, args=(self._work,), name="fake-stream", daemon=True).start()

    def use(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def queue(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def record(self) -> Event:
        event = _FakeEvent()
        self._work.put(event.set)
        return event

    def __del__(self) -> None:
        self._work.put(None)


class _FakeEvent:
    def __init__(self) -> None:
        self._done = threading.Event()
        self.set = self._done.set

    def query(self) -> bool:
        return self._done.is_set()


def _run(work: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (item := work.get()) is not None:
        item()


class FakeCommunicator:
    def __init__(self, cuda: FakeCuda, meeting: Meeting, rank: int) -> None:
        self._cuda, self._meeting, self._rank = cuda, meeting, rank
        self._thread: int | None = None
        self.order: list[int] = []  # bytes of what was posted

    def send(self, address: int, num_bytes: int, peer: int, stream: Stream) -> None:
        self._post(num_bytes, peer, stream, lambda: self._put(address, num_bytes))

    def recv(self, address: int, num_bytes: int, peer: int, stream: Stream) -> None:
        self._post(num_bytes, peer, stream, lambda: self._get(address, num_bytes))

    def error(self) -> str | None:
        if self._aborted():
            self._cuda.world.wrong.append("asked for its error after abort")
        return self._cuda.async_error

    def abort(self) -> None:
        if self._aborted():
            self._cuda.world.wrong.append("aborted twice")
        self._cuda.num_aborts += 1
        with self._meeting.changed:
            self._meeting.aborted.add(self._rank)
            self._meeting.changed.notify_all()

    def _post(self, num_bytes: int, peer: int, stream: Stream, work: Callable[[], None]) -> None:
        assert peer == 1 - self._rank
        assert isinstance(stream, FakeStream)
        if self._thread not in (None, threading.get_ident()):
            self._cuda.world.wrong.append("posted from two threads")
        self._thread = threading.get_ident()
        self.order.append(num_bytes)
        if self._cuda.post_hangs and len(self.order) > 1:
            self._until(lambda: False)
            raise RuntimeError("NCCL_ERROR_INTERNAL_ERROR: aborted")
        stream.queue(work)

    def _put(self, address: int, num_bytes: int) -> None:
        if not self._until(lambda: self._meeting.on_wire is None):
            return
        with self._meeting.changed:
            if not self._aborted():  # else the staging may be gone
                self._meeting.on_wire = ctypes.string_at(address, num_bytes)
            self._meeting.changed.notify_all()
        self._until(lambda: self._meeting.on_wire is None)

    def _get(self, address: int, num_bytes: int) -> None:
        if not self._until(lambda: self._meeting.on_wire is not None):
            return
        with self._meeting.changed:
            sent, self._meeting.on_wire = self._meeting.on_wire, None
            assert sent is not None
            if len(sent) != num_bytes:
                self._cuda.world.wrong.append(f"{len(sent)} bytes sent, {num_bytes} received")
            elif not self._aborted():
                ctypes.memmove(address, sent, num_bytes)
            self._meeting.changed.notify_all()

    def _until(self, condition: Callable[[], bool]) -> bool:
        """False: aborted."""
        with self._meeting.changed:
            while True:
                if self._aborted() or self._cuda.world.released.is_set():
                    return False
                if not (self._cuda.transfers_hang and len(self.order) > 1) and condition():
                    return True
                self._meeting.changed.wait(_STEP_S)

    def _aborted(self) -> bool:
        return self._rank in self._meeting.aborted
