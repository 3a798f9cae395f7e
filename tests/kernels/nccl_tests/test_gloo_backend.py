"""Real collectives between ranks on CPUs, their results checked element by element."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kernels.nccl_tests.errors import CollectiveTimeout
from kernels.nccl_tests.gloo_backend import GlooCollectives
from kernels.nccl_tests.plan import DTYPES, NO_REDOP, OPERATIONS, REDOPS, Case, not_supported
from kernels.nccl_tests.rank import Corrupt, Rank, Repeats
from kernels.nccl_tests.team import Team, TeamError
from kernels.nccl_tests.values import Bytes

ONCE = Repeats(warmup=1, iterations=1, checks=1)


@contextmanager
def team_of(
    num_ranks: int, corrupt: dict[int, Corrupt] | None = None, timeout_s: float = 30.0
) -> Iterator[Team]:
    """Ranks as threads: here the collectives matter, and processes are started elsewhere."""
    team = Team(
        [
            Rank(lambda: GlooCollectives("127.0.0.1", timeout_s), timeout_s, (corrupt or {}).get(rank))
            for rank in range(num_ranks)
        ]
    )
    team.join()
    team.allocate(1 << 20, 1 << 20)
    yield team
    team.close()


@pytest.mark.parametrize(
    "num_ranks", [1, 3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_every_operation_type_and_reduction(num_ranks: int) -> None:
    with team_of(num_ranks) as team:
        for operation in OPERATIONS.values():
            for dtype in DTYPES:
                for redop in REDOPS if operation.reduces else (NO_REDOP,):
                    case = Case(operation.name, dtype, redop, num_ranks - 1, 48)
                    if not_supported("gloo", case) is not None:
                        continue
                    for result in team.measure(case, ONCE):
                        assert result.out_of_place.wrong == 0, case
                        assert result.in_place.wrong == (0 if operation.in_place else None), case


@pytest.mark.parametrize("operation", OPERATIONS)
def test_beyond_one_period_of_the_values(operation: str) -> None:
    with team_of(3) as team:
        redop = "sum" if OPERATIONS[operation].reduces else NO_REDOP
        for result in team.measure(Case(operation, "float", redop, 1, 40_000), Repeats(1, 2, 2)):
            assert result.out_of_place.wrong == 0
            assert not result.in_place.wrong


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_corrupted_result_is_counted(operation: str) -> None:
    def corrupt(data: Bytes) -> Bytes:
        damaged = data.copy()
        damaged[7] ^= 0x40  # in the second float
        return damaged

    with team_of(2, {1: corrupt}) as team:
        redop = "sum" if OPERATIONS[operation].reduces else NO_REDOP
        good, bad = team.measure(Case(operation, "float", redop, 1, 16), Repeats(1, 1, checks=3))
    assert good.out_of_place.wrong == 0
    # A buffer in two parts is read part by part.
    parts = 2 if OPERATIONS[operation].splits_recv else 1
    assert bad.out_of_place.wrong == 3 * parts
    assert bad.in_place.wrong == (3 * parts if OPERATIONS[operation].in_place else None)


def test_a_rank_that_stays_away_is_a_timeout_with_names() -> None:
    with pytest.raises(
        TeamError, match=r"rank 0: all_reduce of 64 B \(float, sum\), out of place.*not done after 1 s"
    ):
        with team_of(2, timeout_s=1.0) as team:
            Team(team._members[:1]).measure(Case("all_reduce", "float", "sum", -1, 16), ONCE)


def test_joining_alone_times_out() -> None:
    rank = Rank(lambda: GlooCollectives("127.0.0.1", 0.5), 0.5)
    with pytest.raises(CollectiveTimeout, match=r"rank 0: joining 2 ranks: not done after 0\.5 s"):
        rank.join(rank.make_id(), 0, 2)
