"""Tokens through an exchange come out as from one rank that has all experts."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.experts.ranks import Rank, Weights, at_once, gloo, nccl, shm
from workers.experts.exchange import Exchange, GroupBroken, Shape
from workers.experts.shm import Segment, ShmExchange
from workers.protocol.experts import Placement

HIDDEN, INNER = 16, 8


def random_placement(num_experts: int, members: list[int], num_ranks: int, rng: random.Random) -> Placement:
    """Every expert on some member, some on several, with uneven shares."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    shares: list[list[float]] = [[] for _ in range(num_ranks)]
    for expert in rng.sample(range(num_experts), num_experts):
        at = rng.sample(members, rng.randint(1, len(members)))
        parts = [rng.random() + 0.1 for _ in at]
        for rank, part in zip(at, parts, strict=True):
            ranks[rank].append(expert)
            shares[rank].append(part / sum(parts))
    placement = Placement(1, (tuple(map(tuple, ranks)),), (tuple(map(tuple, shares)),))
    placement.validate(num_experts, [num_experts] * num_ranks)
    return placement


DTYPES = st.sampled_from(["float32", "bfloat16"])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 4), dtype=DTYPES)
def test_any_tokens_any_placement(seed: int, size: int, dtype: str) -> None:
    check(shm, seed, size, dtype)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 4), dtype=DTYPES)
def test_over_gloo(seed: int, size: int, dtype: str) -> None:
    check(gloo, seed, size, dtype)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 4), dtype=DTYPES)
def test_over_nccl(seed: int, size: int, dtype: str) -> None:
    check(nccl, seed, size, dtype)


@pytest.mark.parametrize("kind", [shm, gloo, nccl])
def test_a_wait_for_a_dead_one_is_ended_by_abort(kind: Any) -> None:
    first, second, _ = kind(3, Shape(HIDDEN, "float32", "float32", max_tokens=1, top_k=1, header=1))
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(exchange.headers, np.zeros(1, np.int64)) for exchange in (first, second)]
        first.abort()
        second.abort()
        for one in waiting:
            with pytest.raises(GroupBroken):
                one.result(timeout=20)
    with pytest.raises(GroupBroken):
        first.headers(np.zeros(1, np.int64))


def check(exchanges: Callable[[int, Shape], Sequence[Exchange]], seed: int, size: int, dtype: str) -> None:
    """Against one rank that has all experts, three steps."""
    rng = random.Random(seed)
    num_experts, num_ranks = rng.randint(size, 9), rng.randint(size, 5)
    top_k = rng.randint(1, min(3, num_experts))
    members = sorted(rng.sample(range(num_ranks), size))
    placement = random_placement(num_experts, members, num_ranks, rng)
    weights = Weights.random(num_experts, HIDDEN, INNER, getattr(torch, dtype), seed)
    shape = Shape(HIDDEN, dtype, dtype, max_tokens=12, top_k=top_k)
    ranks = [Rank(exchange, placement, weights, members, top_k) for exchange in exchanges(size, shape)]
    generator = torch.Generator().manual_seed(seed)

    for _ in range(3):  # windows are used again
        counts = [rng.choice([0, 1, rng.randint(0, 12)]) for _ in range(size)]
        x = [torch.randn(n, HIDDEN, generator=generator).to(getattr(torch, dtype)) for n in counts]
        gates = [torch.rand(n, top_k, generator=generator) for n in counts]
        chosen = [
            torch.tensor([rng.sample(range(num_experts), top_k) for _ in range(n)], dtype=torch.int64)
            for n in counts
        ]
        chosen = [experts.reshape(-1, top_k) for experts in chosen]
        steps = zip(ranks, x, gates, chosen, strict=True)
        got = at_once([partial(rank.experts, *step) for rank, *step in steps])
        for i in range(size):
            expected = weights.local(x[i], gates[i], chosen[i])
            tolerance = 1e-5 if dtype == "float32" else 2e-2
            torch.testing.assert_close(got[i], expected, atol=tolerance, rtol=tolerance)
            taken = ranks[i].counts.take()
            assert (
                taken.routed[0].tolist() == np.bincount(chosen[i].flatten(), minlength=num_experts).tolist()
            )


def test_shares_are_kept_also_by_single_tokens() -> None:
    placement = Placement(1, (((0,), (0,)),), (((0.75,), (0.25,)),))
    weights = Weights.random(1, HIDDEN, INNER, torch.float32)
    shape = Shape(HIDDEN, "float32", "float32", max_tokens=4, top_k=1)
    ranks = [Rank(exchange, placement, weights, [0, 1], 1) for exchange in shm(2, shape)]
    one = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(200):
        at_once([partial(rank.experts, torch.zeros(1, HIDDEN), torch.ones(1, 1), one) for rank in ranks])
    computed = [int(rank.counts.take().computed.sum()) for rank in ranks]
    assert sum(computed) == 400
    assert 290 <= computed[0] <= 310


def test_headers_meet() -> None:
    exchanges = shm(3, Shape(HIDDEN, "float32", "float32", max_tokens=1, top_k=1, header=2))
    for turn in range(5):
        mine = [np.array([member, turn * 10 + member]) for member in range(3)]
        got = at_once(
            [partial(exchange.headers, words) for exchange, words in zip(exchanges, mine, strict=True)]
        )
        for gathered in got:
            assert gathered.tolist() == [[member, turn * 10 + member] for member in range(3)]


def _in_a_process(path: str, me: int, shape: Shape, placement: Placement, answers: Any) -> None:
    torch.set_num_threads(1)
    weights = Weights.random(6, HIDDEN, INNER, torch.float32)
    rank = Rank(ShmExchange(path, 3, me, shape), placement, weights, [0, 1, 2], top_k=2)
    generator = torch.Generator().manual_seed(me)
    worst = 0.0
    for turn in range(50):
        count = (turn * (me + 1)) % 7
        x = torch.randn(count, HIDDEN, generator=generator)
        gates = torch.rand(count, 2, generator=generator)
        chosen = torch.rand(count, 6, generator=generator).argsort(1)[:, :2]
        difference = rank.experts(x, gates, chosen) - weights.local(x, gates, chosen)
        worst = max(worst, float(difference.abs().max()) if count else 0.0)
    answers.put((me, worst))


@pytest.mark.slow
def test_between_processes() -> None:
    shape = Shape(HIDDEN, "float32", "float32", max_tokens=8, top_k=2)
    segment = Segment(3, shape)
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    placement = Placement(1, (((0, 1), (2, 3), (4, 5, 0)),))
    processes = [
        spawn.Process(target=_in_a_process, args=(segment.path, me, shape, placement, answers), daemon=True)
        for me in range(3)
    ]
    for process in processes:
        process.start()
    try:
        worst = dict(answers.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
        segment.close()
    assert set(worst) == {0, 1, 2}
    assert max(worst.values()) < 1e-5


def test_a_step_that_is_larger_than_the_windows_is_refused() -> None:
    (first, _) = shm(2, Shape(HIDDEN, "float32", "float32", max_tokens=2, top_k=1, header=1))
    with pytest.raises(ValueError, match="do not fit into a window"):
        first.combine([None, torch.zeros(5000, HIDDEN)])
