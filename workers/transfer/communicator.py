"""An NCCL communicator of two ranks that can hang nobody.

NCCL blocks in C, where no exception reaches it: joining waits for the other rank, sending may wait for its connection,
and what was posted runs on the GPU until both sides have come. So every call is made by one thread that belongs to the
communicator (a communicator is for one thread at a time), callers wait for it no longer than they like, and `close`
aborts. What NCCL may still write to is given back only when it has let go: until then the communicator keeps its seat,
so what is abandoned is bounded too.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from workers.cuda import Communicator, Cuda, Event, device_errors, stream_on, wait_for
from workers.transfer.road import RoadBlocked

logger = logging.getLogger(__name__)

_LOOK_S = 0.02  # between two looks for what ends a wait early
_TURN_S = 0.5  # to wait for another communicator's post; one that hangs must not take the others with it


class Seats:
    """How many communicators this process has; each takes 50 to 100 MB of GPU memory besides its staging."""

    def __init__(self) -> None:
        self.taken = 0
        self.turn = threading.Lock()  # NCCL wants posts of communicators on one device one after another
        self._lock = threading.Lock()

    def take(self, limit: int) -> Seat:
        """Raises RoadBlocked."""
        with self._lock:
            if self.taken >= limit:
                raise RoadBlocked(
                    f"all {limit} communicators that transfer.max_communicators allows are in use here "
                    "(more take 50 to 100 MB of GPU memory each); the next of transfer.channels is tried"
                )
            self.taken += 1
        return Seat(self)

    def give_back(self) -> None:
        with self._lock:
            self.taken -= 1


class Seat:
    def __init__(self, seats: Seats) -> None:
        self._seats: Seats | None = seats
        self.turn = seats.turn

    def leave(self) -> None:
        """Idempotent."""
        seats, self._seats = self._seats, None
        if seats is not None:
            seats.give_back()


@dataclass(slots=True, eq=False)
class _Job:
    """A call for the communicator's thread."""

    call: Callable[[], Event | None]
    done: threading.Event = field(default_factory=threading.Event)
    event: Event | None = None
    error: Exception | None = None


class Pair:
    """This side of a communicator of two: the sender is rank 0. Joining begins at once."""

    def __init__(
        self,
        cuda: Cuda,
        device: torch.device,
        unique_id: bytes,
        rank: int,
        staging: torch.Tensor,
        seat: Seat,
    ) -> None:
        """`staging`: whatever is sent or received lies in it. Takes the seat over. Raises DeviceError."""
        self._cuda, self._device, self._id, self._rank = cuda, device, unique_id, rank
        self._staging, self._seat = staging, seat
        with device_errors("a stream"):
            self._stream = cuda.stream(device)
            self.beside = stream_on(device)  # for what goes into the staging and out of it
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._communicator: Communicator | None = None
        self._joining = _Job(self._join)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs.put(self._joining)
        self._poster = threading.Thread(target=self._post, name="kv-nccl", daemon=True)
        self._poster.start()

    def joined(self, deadline: float, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Waits until a byte has come across. False: interrupted, the other side has something to say.

        Raises RoadBlocked, saying what NCCL said or that the other side did not come.
        """
        while not self._joining.done.wait(_LOOK_S):
            if interrupted():
                return False
            if self._closed.is_set():
                raise RoadBlocked("the channel was closed while NCCL connected")
            if time.monotonic() >= deadline:
                raise RoadBlocked("NCCL did not connect in time (transfer.io_timeout_s)")
        if self._joining.error is not None:
            raise RoadBlocked(f"NCCL could not connect: {self._joining.error}")
        return True

    def send(self, offset: int, num_bytes: int, deadline: float) -> Event:
        """From the staging. Returns once it is posted. Raises OSError."""
        return self._call("send", offset, num_bytes, deadline)

    def recv(self, offset: int, num_bytes: int, deadline: float) -> Event:
        return self._call("recv", offset, num_bytes, deadline)

    def finish(
        self, event: Event, what: str, deadline: float, also: Callable[[], None] = lambda: None
    ) -> None:
        """Wait for something posted. Raises OSError: an error of NCCL, the deadline, or `close` by another thread.

        `also` is called meanwhile, and may raise.
        """

        def check() -> None:
            self.check()
            also()

        with device_errors("NCCL"):
            wait_for(event, what, deadline, check)

    def check(self) -> None:
        """Raises ConnectionError when it is closed or NCCL has met an error in the background."""
        with self._lock:  # nobody may ask while it is aborted
            if self._closed.is_set():
                raise ConnectionError("the channel was closed")
            error = None if self._communicator is None else self._communicator.error()
        if error is not None:
            raise ConnectionError(f"NCCL: {error}")

    def close(self) -> None:
        """Abort; wakes who waits here. Idempotent, returns at once."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
        self._jobs.put(None)
        threading.Thread(target=self._end, name="kv-nccl-end", daemon=True).start()

    # --- the communicator's thread ----------------------------------------------------------------------------------

    def _post(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._closed.is_set():
                job.error = ConnectionError("the channel was closed")
            else:
                try:
                    job.event = job.call()
                except (RuntimeError, OSError, ValueError) as error:
                    job.error = error
            job.done.set()

    def _join(self) -> None:
        communicator = self._cuda.join(self._device, self._id, self._rank)
        with self._lock:
            self._communicator = communicator
        with self._stream.use():
            pass  # behind what the model has queued: torch may have given us memory that it is not done with
        # NCCL connects with the first byte. If that goes wrong, another road can still be taken.
        act = communicator.send if self._rank == 0 else communicator.recv
        act(self._staging.data_ptr(), 1, 1 - self._rank, self._stream)
        wait_for(self._stream.record(), "the first byte", None, self.check)

    def _call(self, act: str, offset: int, num_bytes: int, deadline: float) -> Event:
        job = _Job(lambda: self._act(act, offset, num_bytes))
        self._jobs.put(job)
        while not job.done.wait(_LOOK_S):
            if self._closed.is_set():
                raise ConnectionError("the channel was closed")
            if time.monotonic() >= deadline:
                raise TimeoutError(f"NCCL did not take a {act} of {num_bytes} bytes in time")
        if isinstance(job.error, OSError):
            raise job.error
        if job.error is not None:
            raise ConnectionError(f"NCCL, to {act} {num_bytes} bytes: {job.error}") from job.error
        assert job.event is not None
        return job.event

    def _act(self, act: str, offset: int, num_bytes: int) -> Event:
        communicator = self._communicator
        assert communicator is not None
        assert offset + num_bytes <= self._staging.numel()
        address, peer = self._staging.data_ptr() + offset, 1 - self._rank
        in_turn = self._seat.turn.acquire(timeout=_TURN_S)
        try:
            if act == "send":
                communicator.send(address, num_bytes, peer, self._stream)
            else:
                communicator.recv(address, num_bytes, peer, self._stream)
            return self._stream.record()
        finally:
            if in_turn:
                self._seat.turn.release()

    # --- the end ----------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """A thread of its own: aborting may wait, and a join that nobody answers can't be aborted at all."""
        aborted = self._communicator
        self._abort(aborted)
        self._poster.join()
        if self._communicator is not aborted:  # the other rank came after all
            self._abort(self._communicator)
        try:
            for stream in (self._stream, self.beside):
                event = stream.record()
                while not event.query():
                    time.sleep(_LOOK_S)
        except RuntimeError as error:
            logger.warning("after the end of a communicator: %s", error)
        del self._staging
        self._seat.leave()

    @staticmethod
    def _abort(communicator: Communicator | None) -> None:
        if communicator is not None:
            try:
                communicator.abort()
            except RuntimeError as error:
                logger.warning("a communicator could not be aborted: %s", error)
