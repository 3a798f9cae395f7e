"""Members asked at once, and what is said when one of them fails."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from kernels.nccl_tests.errors import CollectiveFailed
from kernels.nccl_tests.plan import Case
from kernels.nccl_tests.rank import Repeats, Result, Timing
from kernels.nccl_tests.team import Team, TeamError

CASE, REPEATS = Case("all_reduce", "float", "sum", -1, 4), Repeats(1, 1, 1)


class FakeMember:
    def __init__(
        self, barrier: threading.Barrier, error: Exception | None = None, hangs: bool = False
    ) -> None:
        self.calls: list[Any] = []
        self._barrier, self._error = barrier, error
        self._hang = threading.Event() if hangs else None

    def make_id(self) -> str:
        return "id"

    def join(self, unique_id: str, rank: int, num_ranks: int) -> None:
        self.calls.append((unique_id, rank, num_ranks))

    def measure(self, case: Case, repeats: Repeats) -> Result:
        self._barrier.wait(10)  # only all of them together get on
        if self._error is not None:
            raise self._error
        if self._hang is not None:
            self._hang.wait()
        return Result(Timing(float(self.calls[0][1]), 0), Timing(1.0, 0))


def test_all_are_asked_at_once_and_answer_by_rank() -> None:
    barrier = threading.Barrier(3)
    members: list[Any] = [FakeMember(barrier) for _ in range(3)]
    team = Team(members)
    team.join()
    assert [member.calls for member in members] == [[("id", rank, 3)] for rank in range(3)]
    assert [result.out_of_place.seconds for result in team.measure(CASE, REPEATS)] == [0.0, 1.0, 2.0]


def test_one_that_fails_ends_it_though_others_hang() -> None:
    barrier = threading.Barrier(3)
    errors = [CollectiveFailed("rank 0: lost"), CollectiveFailed("rank 1: lost too"), None]
    members: list[Any] = [FakeMember(barrier, error, hangs=error is None) for error in errors]
    team = Team(members)
    team.join()
    began = time.monotonic()
    with pytest.raises(TeamError) as caught:
        team.measure(CASE, REPEATS)
    assert time.monotonic() - began < 30
    assert set(str(caught.value).split("\n  ")) == {"rank 0: lost", "rank 1: lost too"}


def test_of_many_failures_a_few_are_quoted() -> None:
    barrier = threading.Barrier(9)
    team = Team([FakeMember(barrier, CollectiveFailed(f"rank {rank}: lost")) for rank in range(9)])  # type: ignore[misc]
    team.join()
    with pytest.raises(TeamError, match="and 5 ranks more"):
        team.measure(CASE, REPEATS)
