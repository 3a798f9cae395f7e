"""The planner's formulas against textbook values and against brute-force simulation; the errors they may have stand here."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from cluster.planner.estimate import SHARES, Pools, estimate
from cluster.planner.profile import Profile
from cluster.planner.queueing import erlang_c, mgc_wait, occupancy
from cluster.planner.slo import Slo
from cluster.planner.workload import Shape, Workload
from tests.cluster.planner_simulation import Job, arrivals, decode_pool, prefill_queue, unified_pool

PROFILE = Profile(
    "made up",
    prefill=tuple((float(n), 0.004 + n / 8000 + n * n * 2e-9) for n in (64, 256, 1024, 4096)),
    decode=((1.0, 0.010), (8.0, 0.012), (32.0, 0.020), (64.0, 0.034)),
    context_s=2e-8,
    kv_tokens=200_000,
)
EQUAL = (Shape(800, 0, 100),)


def mixed() -> tuple[Shape, ...]:
    rng = random.Random(1)
    return tuple(
        Shape(
            int(min(4000, max(32, rng.lognormvariate(6.3, 0.9)))),
            0,
            int(min(800, max(2, rng.lognormvariate(4.2, 0.8)))),
        )
        for _ in range(300)
    )


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[int(share * len(ordered))]


def steady(jobs: list[Job]) -> tuple[list[float], list[float]]:
    """TTFT and TPOT without the beginning, when all is empty, and the end."""
    kept = jobs[1000:-500]
    return [job.ttft for job in kept], [job.tpot for job in kept if job.shape.output_tokens > 1]


def test_erlang_c_is_the_textbooks() -> None:
    assert erlang_c(1, 0.7) == pytest.approx(0.7)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.409180, rel=1e-5)


def test_one_server_waits_as_pollaczek_and_khinchine_say() -> None:
    wait = mgc_wait(1, rate=0.8, service_s=1.0, service_cv2=0.0, arrival_cv2=1.0)
    assert wait is not None
    assert wait.mean_s == pytest.approx(0.8 / (2 * (1 - 0.8)))
    assert wait.beyond(0.0) == pytest.approx(0.8)
    assert wait.quantile(0.5) > 0
    assert wait.quantile(0.1) == 0
    assert mgc_wait(2, rate=2.0, service_s=1.0, service_cv2=1.0, arrival_cv2=1.0) is None


def test_occupancy_is_poisson_where_nobody_slows_anybody() -> None:
    there = occupancy(4, 1000, rate=5.0, tokens=100, step_s=lambda batch: 0.02)
    assert there is not None
    assert there.mean == pytest.approx(10.0)
    assert there.chances[0] == pytest.approx(2.718281828**-10, rel=1e-6)
    assert there.wait.chance < 1e-9


def test_occupancy_with_one_seat_a_worker_is_mmc() -> None:
    there = occupancy(3, 1, rate=2.0, tokens=10, step_s=lambda batch: 0.1)
    assert there is not None
    assert there.wait.chance == pytest.approx(erlang_c(3, 2.0))
    expected = mgc_wait(3, 2.0, 1.0, 1.0, 1.0)
    assert expected is not None
    assert there.wait.mean_s == pytest.approx(expected.mean_s)
    assert occupancy(3, 1, rate=3.0, tokens=10, step_s=lambda batch: 0.1) is None


@pytest.mark.parametrize(
    ("shapes", "rate", "pools"),
    [(EQUAL, 8.0, Pools(2, 1)), (EQUAL, 20.0, Pools(3, 3)), (mixed(), 20.0, Pools(4, 2))],
    ids=["equal, half busy", "equal, 70% busy", "mixed"],
)
def test_split_pools_are_within_15_percent_of_simulation(
    shapes: tuple[Shape, ...], rate: float, pools: Pools
) -> None:
    found = estimate(Workload(shapes, rate, rate), PROFILE, pools, Slo(), 0.99)
    jobs = arrivals(shapes, rate, 20_000, random.Random(2))
    prefill_queue(jobs, pools.prefill, lambda shape: PROFILE.prefill_s(shape.new_tokens))
    decode_pool(jobs, pools.decode, found.decode_seats, PROFILE)
    ttft, tpot = steady(jobs)
    for share in SHARES:
        assert found.ttft_s[share] == pytest.approx(quantile(ttft, share), rel=0.15)
        assert found.tpot_s[share] == pytest.approx(quantile(tpot, share), rel=0.06)


def test_clumped_arrivals_are_within_35_percent() -> None:
    """Of cv 2; the chance of waiting is taken from Poisson arrivals, which is too little."""
    found = estimate(Workload(mixed(), 20.0, 20.0, arrival_cv2=4.0), PROFILE, Pools(4, 2), Slo(), 0.99)
    jobs = arrivals(mixed(), 20.0, 20_000, random.Random(2), cv2=4.0)
    prefill_queue(jobs, 4, lambda shape: PROFILE.prefill_s(shape.new_tokens))
    decode_pool(jobs, 2, found.decode_seats, PROFILE)
    ttft, tpot = steady(jobs)
    for share in SHARES:
        assert found.ttft_s[share] == pytest.approx(quantile(ttft, share), rel=0.35)
        assert found.tpot_s[share] == pytest.approx(quantile(tpot, share), rel=0.10)


@pytest.mark.parametrize(("shapes", "workers", "rate"), [(EQUAL, 3, 8.0), (mixed(), 4, 20.0)])
def test_unified_workers_are_within_25_percent(shapes: tuple[Shape, ...], workers: int, rate: float) -> None:
    found = estimate(Workload(shapes, rate, rate), PROFILE, Pools(0, workers), Slo(), 0.99)
    jobs = arrivals(shapes, rate, 8_000, random.Random(2))
    unified_pool(jobs, workers, found.decode_seats, PROFILE)
    ttft, tpot = steady(jobs)
    for share in SHARES:
        assert found.ttft_s[share] == pytest.approx(quantile(ttft, share), rel=0.25)
        assert found.tpot_s[share] == pytest.approx(quantile(tpot, share), rel=0.25)


def test_waiting_for_seats_is_within_30_percent_of_simulation() -> None:
    """Eight seats a worker, 85% of what they can do."""
    few = Profile(PROFILE.source, PROFILE.prefill, PROFILE.decode, 0.0, 8 * 900, max_num_seqs=8)
    shapes, rate = (Shape(16, 0, 101),), 2 * 8 / (100 * 0.012) * 0.85
    there = occupancy(2, 8, rate, 100, lambda batch: few.step_s(batch, 0.0))
    assert there is not None
    jobs = arrivals(shapes, rate, 20_000, random.Random(3))
    for job in jobs:
        job.first = job.at
    decode_pool(jobs, 2, 8, few)
    waits = [job.ttft for job in jobs[1000:-500]]
    simulated = sum(wait > 0 for wait in waits) / len(waits)
    assert there.wait.chance == pytest.approx(simulated, rel=0.3)
    # Answers of one length leave more regularly than a birth-death chain's: it waits longer, never shorter.
    assert sum(waits) / len(waits) < there.wait.mean_s < 3 * sum(waits) / len(waits)


def test_overload_never_ends_and_says_what_is_too_little() -> None:
    workload = Workload(EQUAL, 30.0, 30.0)
    found = estimate(workload, PROFILE, Pools(3, 3), Slo(1.0, 0.05), 0.99)
    assert found.ttft_s[0.5] == float("inf")
    assert [shortfall.limit for shortfall in found.shortfalls] == ["prefill queue"]
