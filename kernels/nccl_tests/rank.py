"""One rank: it times a case out of place and in place, and compares what arrived with what must have."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from kernels.nccl_tests.collectives import About, Collectives, Region
from kernels.nccl_tests.plan import DTYPES, OPERATIONS, Case
from kernels.nccl_tests.values import POISON, Bytes, count_wrong, sent
from kernels.nccl_tests.watchdog import Watched

T = TypeVar("T")
Corrupt = Callable[[Bytes], Bytes]


@dataclass(frozen=True, slots=True)
class Repeats:
    """How often a case is run."""

    warmup: int
    iterations: int
    checks: int


@dataclass(frozen=True, slots=True)
class Timing:
    """`seconds` for one iteration; `wrong` elements of all checks, None where nothing was checked."""

    seconds: float
    wrong: int | None


@dataclass(frozen=True, slots=True)
class Result:
    out_of_place: Timing
    in_place: Timing


class Rank:
    """A member of the team in this process. What it asks of its backend runs in one thread, watched."""

    def __init__(
        self,
        open_collectives: Callable[[], Collectives],
        timeout_s: float,
        corrupt: Corrupt | None = None,
    ) -> None:
        """`corrupt` alters what is read back before it is compared: so tests see that wrong results are counted."""
        self._timeout_s = timeout_s
        self._corrupt = corrupt
        self._rank, self._num_ranks = 0, 1
        self._collectives = open_collectives()
        self._watched = Watched(timeout_s, self._collectives.abort, self._collectives.error)

    def about(self) -> About:
        return self._watched.call("looking at the device", self._collectives.about)

    def make_id(self) -> str:
        return self._watched.call("making an id", self._collectives.make_id)

    def join(self, unique_id: str, rank: int, num_ranks: int) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        self._watched.call(
            f"rank {rank}: joining {num_ranks} ranks",
            lambda: self._collectives.join(unique_id, rank, num_ranks),
        )

    def allocate(self, send_bytes: int, recv_bytes: int) -> None:
        self._watched.call(
            f"rank {self._rank}: allocating {send_bytes + recv_bytes} B",
            lambda: self._collectives.allocate(send_bytes, recv_bytes),
        )

    def measure(self, case: Case, repeats: Repeats) -> Result:
        """Every rank calls this at the same time. Raises CollectiveTimeout, CollectiveFailed."""
        checked_in_place = OPERATIONS[case.operation].in_place
        return Result(
            self._measure(case, repeats, in_place=False, checked=True),
            self._measure(case, repeats, in_place=True, checked=checked_in_place),
        )

    def close(self) -> None:
        if not self._watched.broken:
            self._watched.call(f"rank {self._rank}: closing", self._collectives.close)
        self._watched.close()

    def _measure(self, case: Case, repeats: Repeats, in_place: bool, checked: bool) -> Timing:
        place = "in place" if in_place else "out of place"
        what = f"rank {self._rank}: {case.text(self._num_ranks)}, {place}"
        send, recv = self._regions(case, in_place)
        collectives = self._collectives

        def run(times: int) -> None:
            for _ in range(times):
                collectives.start(case, send, recv)
            collectives.synchronize()

        def timed() -> float:
            collectives.barrier()
            began = time.perf_counter()
            run(repeats.iterations)
            return (time.perf_counter() - began) / repeats.iterations

        self._fill(case, send, 0)
        self._watched.call(f"{what}, warm-up", lambda: run(repeats.warmup))
        seconds = self._watched.call(what, timed)
        wrong = None
        if checked and repeats.checks:
            wrong = 0
            for repetition in range(1, repeats.checks + 1):
                self._fill(case, send, repetition)
                self._watched.call(f"{what}, check", lambda: run(1))
                wrong += self._unwatched(partial(self._count_wrong, case, recv, repetition))
        self._watched.call(f"{what}, end", collectives.barrier)
        return Timing(seconds, wrong)

    def _regions(self, case: Case, in_place: bool) -> tuple[Region, Region]:
        """In place, the smaller buffer is this rank's part of the larger one."""
        operation = OPERATIONS[case.operation]
        own = self._rank * case.count * DTYPES[case.dtype].num_bytes
        if not in_place:
            return Region("send"), Region("recv")
        if operation.splits_recv and not operation.splits_send:
            return Region("recv", own), Region("recv")
        if operation.splits_send and not operation.splits_recv:
            return Region("recv"), Region("recv", own)
        return Region("recv"), Region("recv")

    def _fill(self, case: Case, send: Region, repetition: int) -> None:
        """What this rank sends; before it, rubbish into the receive buffer, which no result may leave standing."""
        counts = case.counts(self._num_ranks)
        item = DTYPES[case.dtype].num_bytes

        def fill() -> None:
            poison = np.full(4096, POISON, np.uint8)
            self._collectives.fill(Region("recv"), poison, case.size_bytes(self._num_ranks))
            pattern = sent(case, self._rank, self._num_ranks, repetition)
            self._collectives.fill(send, pattern, counts.send * item)

        self._unwatched(fill)

    def _count_wrong(self, case: Case, recv: Region, repetition: int) -> int:
        def read(first_byte: int, num_bytes: int) -> Bytes:
            data = self._collectives.read(Region(recv.buffer, recv.first_byte + first_byte), num_bytes)
            return data if self._corrupt is None else self._corrupt(data)

        return count_wrong(case, self._rank, self._num_ranks, repetition, read)

    def _unwatched(self, function: Callable[[], T]) -> T:
        return self._watched.call(f"rank {self._rank}: host work", function, 0)
